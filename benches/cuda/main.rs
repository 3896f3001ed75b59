//! The CUDA kernels on a GPU: the five stems and the layer, each beside the ceilings of the same run and the figure that it is meant to reach.
//!
//! `cargo bench --features cuda --bench cuda` runs all; `-- --only routing,moe/1` selects by name, `--list` names them, `--smoke` takes tiny sizes (for the emulator),
//! `--out FOLDER` writes `bench.md` and `bench.jsonl`, `--sweep` measures what a tuner can choose, `--serve` answers another process (`serve.rs`). Times come from the device's own
//! events: calls planned and queued by the host one by one (eager), and replays of a graph of several calls. Operands are random, answers are checked before and after, sets of
//! operands take turns where one would stay in the L2 though real work would not find it there.
//!
//! | file | holds |
//! |---|---|
//! | `catalog.rs` | what is measured, by name, with its target |
//! | `subjects/` | operands, plan and check of each |
//! | `timing.rs` | samples and medians |
//! | `gpu.rs` | device, memory, events, graphs |
//! | `tape.rs` | gigabytes of random numbers that the host can look up |

#![allow(missing_docs)]

mod catalog;
mod data;
mod gpu;
#[path = "../support/host.rs"]
#[allow(dead_code)] // the date alone
mod host;
#[path = "../support/micro.rs"]
mod micro;
mod report;
mod serve;
mod subjects;
mod sweep;
mod tape;
mod timing;

use catalog::{COPY, DENSE, Entry, catalog, smoke};
use clap::Parser;
use gpu::Gpu;
use moe_kernels::cuda::DeviceInfo;
use report::{Ceilings, Report, Row};
use std::path::PathBuf;
use std::process::ExitCode;
use subjects::Subject;
use timing::Runner;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

#[derive(Parser, Debug)]
struct Options {
    /// Only rows whose name contains one of these
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Kernels of this GPU (native), those that every GPU gets (sm_80), or both where they differ
    #[arg(long, default_value = "both", value_parser = ["native", "sm_80", "both"])]
    arch: String,
    /// Seconds of measuring for each row
    #[arg(long, default_value_t = 1.0)]
    budget: f64,
    /// Tiny sizes, few samples: to see that it works, not how fast
    #[arg(long)]
    smoke: bool,
    /// Names of the rows
    #[arg(long)]
    list: bool,
    /// Answer questions on standard input
    #[arg(long)]
    serve: bool,
    /// Measure what a tuner can choose
    #[arg(long)]
    sweep: bool,
    /// Folder for the table and the numbers
    #[arg(long)]
    out: Option<PathBuf>,
    /// Cargo passes it
    #[arg(long, hide = true)]
    bench: bool,
}

/// How long and how often.
pub struct Settings {
    /// Seconds of a sample at least, so that the clock's grain does not show.
    sample: f64,
    most_calls: usize,
    /// Seconds for a row.
    budget: f64,
    /// Samples at least and at most.
    samples: (usize, usize),
}

impl Settings {
    fn new(options: &Options) -> Self {
        match options.smoke {
            true => Self {
                sample: 0.0,
                most_calls: 1,
                budget: 0.0,
                samples: (1, 1),
            },
            false => Self {
                sample: 2e-3,
                most_calls: 256,
                budget: options.budget,
                samples: (7, 400),
            },
        }
    }
}

/// What plans are told of the device: the truth, or an older one of the same size.
fn device_for(gpu: &Gpu, arch: &str) -> Result<DeviceInfo> {
    match arch {
        "native" => Ok(*gpu.info()),
        "sm_80" => Ok(DeviceInfo {
            compute_capability: (8, 0),
            ..*gpu.info()
        }),
        _ => Err(format!("unknown kernels {arch:?}: native or sm_80").into()),
    }
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("error: {why}");
            ExitCode::FAILURE
        }
    }
}

/// Whether every row was measured.
fn run(options: &Options) -> Result<bool> {
    let entries = if options.smoke { smoke() } else { catalog() };
    if options.list {
        entries.iter().for_each(|e| println!("{}", e.name));
        return Ok(true);
    }
    let most_sets = if options.smoke { 2 } else { 16 };
    let (gpu, settings) = (Gpu::open(most_sets)?, Settings::new(options));
    if options.serve {
        serve::serve(&gpu, &entries, &settings)?;
        return Ok(true);
    }
    if options.sweep {
        return sweep::sweep(&gpu, options, &settings);
    }
    let wanted = |e: &Entry| {
        e.name.starts_with("ceiling/")
            || options.only.is_empty()
            || options.only.iter().any(|o| e.name.contains(o))
    };
    let mut report = Report::begin(options.out.as_deref(), "bench", &gpu)?;
    let (mut ceilings, mut complete) = (Ceilings::default(), true);
    for entry in entries.iter().filter(|e| wanted(e)) {
        complete &= measure(&gpu, entry, options, &settings, &mut ceilings, &mut report)?;
    }
    Ok(complete)
}

/// An entry's one or two rows; what fails is reported and does not stop the others.
fn measure(
    gpu: &Gpu,
    entry: &Entry,
    options: &Options,
    settings: &Settings,
    ceilings: &mut Ceilings,
    report: &mut Report,
) -> Result<bool> {
    let subject = match entry.spec.make(gpu) {
        Ok(subject) => subject,
        Err(why) => {
            report.failed(&entry.name, "", &why.to_string())?;
            return Ok(false);
        }
    };
    let mut variants = Vec::new();
    for arch in arches(gpu, &*subject, &options.arch)? {
        variants.push((arch, device_for(gpu, arch)?, &*subject));
    }
    let rows = rows(gpu, entry, &variants, settings, report)?;
    let complete = rows.len() == variants.len();
    for row in &rows {
        let rate = |work: f64| work / row.graph.median;
        match entry.name.as_str() {
            COPY => ceilings.copy = Some(rate(row.work.bytes)),
            // Shares are of the faster of the two kinds of kernel.
            DENSE => {
                let other = ceilings.dense.unwrap_or(0.0);
                ceilings.dense = Some(rate(row.work.flops).max(other));
            }
            _ => {}
        }
    }
    for row in &rows {
        report.row(row, entry.target, ceilings)?;
    }
    Ok(complete)
}

/// What is measured by turns: a name, what plans are told of the device, the subject.
type Variant<'a> = (&'a str, DeviceInfo, &'a dyn Subject);

/// A row for each variant that works; the others are reported.
fn rows(
    gpu: &Gpu,
    entry: &Entry,
    variants: &[Variant<'_>],
    settings: &Settings,
    report: &mut Report,
) -> Result<Vec<Row>> {
    let (mut runners, mut names) = (Vec::new(), Vec::new());
    for &(name, device, subject) in variants {
        match Runner::new(gpu, device, subject, settings) {
            Ok(runner) => {
                runners.push(runner);
                names.push((name, device, subject));
            }
            Err(why) => report.failed(&entry.name, name, &why.to_string())?,
        }
    }
    let times = match timing::measure(&runners, settings) {
        Ok(times) => times,
        Err(why) => {
            report.failed(&entry.name, "", &why.to_string())?;
            return Ok(Vec::new());
        }
    };
    let row = |((name, device, subject), (eager, graph)): (Variant<'_>, _)| {
        let plan = subject.plan(&device, 0)?;
        Ok(Row {
            id: entry.id,
            name: entry.name.clone(),
            arch: name.into(),
            kernels: plan.iter().map(|l| l.kernel).collect(),
            work: subject.work(),
            eager,
            graph,
        })
    };
    names.into_iter().zip(times).map(row).collect()
}

/// Which kernels to measure: both only where they differ.
fn arches(gpu: &Gpu, subject: &dyn Subject, wanted: &str) -> Result<Vec<&'static str>> {
    Ok(match wanted {
        "native" => vec!["native"],
        "sm_80" => vec!["sm_80"],
        _ => {
            let plan = |arch| subject.plan(&device_for(gpu, arch)?, 0);
            match plan("native")? == plan("sm_80")? {
                true => vec!["native"],
                false => vec!["native", "sm_80"],
            }
        }
    })
}
