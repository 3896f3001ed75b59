//! One line for each row on the terminal, in Markdown and as JSON.

use super::Result;
use super::catalog::Target;
use super::gpu::Gpu;
use super::subjects::Work;
use super::timing::Spread;
use serde::Serialize;
use std::fs::{File, create_dir_all};
use std::io::Write as _;
use std::path::Path;

/// A measured row.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub id: &'static str,
    pub name: String,
    /// Which kernels: those for this GPU, or those that every GPU gets.
    pub arch: String,
    pub kernels: Vec<&'static str>,
    pub work: Work,
    pub eager: Spread,
    pub graph: Spread,
}

/// What the machine gave in the same run.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Ceilings {
    /// Bytes read and written in a second by the driver's copy.
    pub copy: Option<f64>,
    /// FLOP/s of our own dense product.
    pub dense: Option<f64>,
}

impl Row {
    fn tflops(&self) -> f64 {
        self.work.flops / self.graph.median / 1e12
    }

    fn tbps(&self) -> f64 {
        self.work.bytes / self.graph.median / 1e12
    }

    /// The least time of the work at the ceilings over the time, and which of the two binds.
    fn share(&self, ceilings: &Ceilings) -> Option<(f64, &'static str)> {
        let by_bytes = ceilings.copy.map(|c| (self.work.bytes / c, "bytes"));
        let by_flops = ceilings.dense.map(|c| (self.work.flops / c, "FLOPs"));
        let longer = [by_bytes, by_flops]
            .into_iter()
            .flatten()
            .max_by(|a, b| a.0.total_cmp(&b.0))?;
        Some((longer.0 / self.graph.median, longer.1))
    }

    /// The target in words and whether it is reached.
    fn verdict(&self, target: Target, ceilings: &Ceilings) -> (String, String) {
        let (words, needed, found, more_is_better) = match target {
            Target::None => return ("".into(), "".into()),
            Target::Micros(us) => (format!("<= {us} us"), us, self.graph.median * 1e6, false),
            Target::Tflops(t) => (format!(">= {t} TFLOP/s"), t, self.tflops(), true),
            Target::Tbps(t) => (format!(">= {t} TB/s"), t, self.tbps(), true),
            Target::OfDense(share) => {
                let words = format!(">= {:.0}% of dense", share * 100.0);
                let Some(dense) = ceilings.dense else {
                    return (words, "no dense row".into());
                };
                (words, share, self.tflops() * 1e12 / dense, true)
            }
        };
        let ratio = if more_is_better {
            found / needed
        } else {
            needed / found
        };
        let verdict = match ratio >= 1.0 {
            true => format!("reached ({ratio:.2}x)"),
            false => format!("MISSED ({ratio:.2}x)"),
        };
        (words, verdict)
    }

    fn cells(&self, target: Target, ceilings: &Ceilings) -> Vec<String> {
        let (words, verdict) = self.verdict(target, ceilings);
        let us = |s: &Spread| format!("{:.2}", s.median * 1e6);
        let share = self.share(ceilings);
        let noise = (self.graph.high - self.graph.low) / self.graph.median;
        vec![
            self.id.into(),
            self.name.clone(),
            self.arch.clone(),
            us(&self.eager),
            us(&self.graph),
            format!("{:.1}", noise * 100.0),
            format!("{:.1}", self.tflops()),
            format!("{:.3}", self.tbps()),
            share.map_or("".into(), |(s, by)| format!("{:.1} ({by})", s * 100.0)),
            words,
            verdict,
        ]
    }
}

const TITLES: [&str; 11] = [
    "goal",
    "what",
    "kernels for",
    "eager, us",
    "graph, us",
    "spread, %",
    "TFLOP/s",
    "TB/s",
    "% of ceiling",
    "target",
    "verdict",
];
const WIDTHS: [usize; 11] = [4, 34, 11, 10, 10, 9, 8, 7, 13, 16, 16];

/// Where rows go.
pub struct Report {
    markdown: Option<File>,
    json: Option<File>,
}

impl Report {
    /// Begins the files `<name>.md` and `<name>.jsonl` in `folder`, and says what machine this is.
    pub fn begin(folder: Option<&Path>, name: &str, gpu: &Gpu) -> Result<Self> {
        let mut report = Self {
            markdown: None,
            json: None,
        };
        if let Some(folder) = folder {
            create_dir_all(folder)?;
            report.markdown = Some(File::create(folder.join(format!("{name}.md")))?);
            report.json = Some(File::create(folder.join(format!("{name}.jsonl")))?);
        }
        let (info, version) = (gpu.info(), gpu.cuda.driver_version()?);
        let machine = format!(
            "{}, compute capability {}.{}, {} multiprocessors, {} MiB of L2, driver for CUDA {}.{}; medians, {}",
            gpu.cuda.name()?,
            info.compute_capability.0,
            info.compute_capability.1,
            info.sm_count,
            info.l2_bytes >> 20,
            version.0,
            version.1,
            super::host::date(std::time::SystemTime::now()),
        );
        let command: Vec<String> = std::env::args().skip(1).collect();
        println!(
            "{machine}\nGoals are those for an H200; shares are of the copy and of our own dense product in this run."
        );
        report.line(&format!(
            "# moe-kernels on {machine}\n\nCommand: `cuda {}`\n",
            command.join(" ")
        ))?;
        report.json(&serde_json::json!({"machine": machine, "command": command}))?;
        let line: Vec<String> = TITLES.iter().map(|t| t.to_string()).collect();
        report.cells(&line)?;
        report.line(&format!("|{}", "---|".repeat(TITLES.len())))?;
        Ok(report)
    }

    pub fn row(&mut self, row: &Row, target: Target, ceilings: &Ceilings) -> Result<()> {
        let cells = row.cells(target, ceilings);
        self.cells(&cells)?;
        let mut json = serde_json::to_value(row)?;
        json["share_of_ceiling"] = row.share(ceilings).map(|s| s.0).into();
        json["target"] = cells[9].clone().into();
        json["verdict"] = cells[10].clone().into();
        self.json(&json)
    }

    /// A row that has no numbers, and why.
    pub fn failed(&mut self, name: &str, arch: &str, why: &str) -> Result<()> {
        println!("     {name} ({arch}): FAILED: {why}");
        let cell = why.replace('|', "/").replace('\n', " ");
        self.line(&format!("| | {name} | {arch} | FAILED: {cell} |"))?;
        self.json(&serde_json::json!({"name": name, "arch": arch, "failed": why}))
    }

    fn cells(&mut self, cells: &[String]) -> Result<()> {
        let padded: Vec<String> = cells
            .iter()
            .zip(WIDTHS)
            .enumerate()
            .map(|(i, (cell, width))| match i {
                3..=7 => format!("{cell:>width$}"),
                _ => format!("{cell:width$}"),
            })
            .collect();
        println!("{}", padded.join(" ").trim_end());
        self.line(&format!("| {} |", cells.join(" | ")))
    }

    fn line(&mut self, line: &str) -> Result<()> {
        if let Some(file) = &mut self.markdown {
            writeln!(file, "{line}")?;
        }
        Ok(())
    }

    fn json(&mut self, value: &serde_json::Value) -> Result<()> {
        if let Some(file) = &mut self.json {
            writeln!(file, "{value}")?;
        }
        Ok(())
    }
}
