//! Answers questions line by line, so that another process can time its own work and ours by turns on one GPU.
//!
//! ```text
//! list                       → name name …
//! make NAME [sm_80]          → {"flops": …, "bytes": …, "kernels": […]}     checked, warm, captured
//! run N                      → [seconds, …]                                 N samples of graph replay, seconds of a call each
//! ```
//!
//! What goes wrong is `{"error": "…"}`; the process goes on.

use super::catalog::Entry;
use super::gpu::Gpu;
use super::timing::Runner;
use super::{Result, Settings, device_for};
use serde_json::{Value, json};
use std::io::{BufRead, Lines, StdinLock, Write, stdin, stdout};

pub fn serve(gpu: &Gpu, entries: &[Entry], settings: &Settings) -> Result<()> {
    let mut lines = stdin().lock().lines();
    let mut next = lines.next().transpose()?;
    while let Some(line) = next {
        let words: Vec<&str> = line.split_whitespace().collect();
        next = match words[..] {
            ["list"] => {
                let names: Vec<&str> = entries.iter().map(|e| e.name.as_str()).collect();
                answer(&json!(names.join(" ")))?;
                lines.next().transpose()?
            }
            ["make", name, ref rest @ ..] => {
                match with_subject(
                    gpu,
                    entries,
                    settings,
                    name,
                    rest.first().copied(),
                    &mut lines,
                ) {
                    Ok(next) => next,
                    Err(why) => {
                        complain(&why.to_string())?;
                        lines.next().transpose()?
                    }
                }
            }
            _ => {
                complain("make NAME first; also known: list")?;
                lines.next().transpose()?
            }
        };
    }
    Ok(())
}

/// Makes a subject and runs it as often as asked; the first line that is something else.
fn with_subject(
    gpu: &Gpu,
    entries: &[Entry],
    settings: &Settings,
    name: &str,
    arch: Option<&str>,
    lines: &mut Lines<StdinLock<'_>>,
) -> Result<Option<String>> {
    let entry = entries
        .iter()
        .find(|e| e.name == name)
        .ok_or_else(|| format!("no {name:?}; list names them"))?;
    let device = device_for(gpu, arch.unwrap_or("native"))?;
    let subject = entry.spec.make(gpu)?;
    let runner = Runner::new(gpu, device, &*subject, settings)?;
    let work = subject.work();
    let plan = subject.plan(&device, 0)?;
    let kernels: Vec<&str> = plan.iter().map(|l| l.kernel).collect();
    answer(&json!({"flops": work.flops, "bytes": work.bytes, "kernels": kernels}))?;
    for line in lines {
        let line = line?;
        let Some(count) = line.strip_prefix("run ") else {
            return Ok(Some(line));
        };
        match count.trim().parse::<usize>() {
            Ok(count) => {
                let times: Result<Vec<f64>> = (0..count).map(|_| runner.replay()).collect();
                answer(&json!(times?))?;
            }
            Err(why) => complain(&format!("run {count:?}: {why}"))?,
        }
    }
    Ok(None)
}

fn complain(why: &str) -> Result<()> {
    answer(&json!({"error": why}))
}

fn answer(value: &Value) -> Result<()> {
    let mut out = stdout().lock();
    writeln!(out, "{value}")?;
    Ok(out.flush()?)
}
