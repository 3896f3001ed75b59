//! Checks, turns, medians.

use crate::candle_block::Block;
use crate::engine::{Call, Engine};
use crate::options::Options;
use crate::per_expert::PerExpert;
use crate::support::dense::{GemmCrate, Matrixmultiply};
use crate::support::host::Host;
use crate::support::layer::measure::{Machine, median};
use crate::support::layer::seeded::Seeded;
use crate::support::layer::shapes::Architecture;
use crate::support::layer::source::{self, Built};
use crate::support::layer::{Failure, Result, fail};
use crate::support::load::Load;
use crate::support::subject::{Batch, Subject};
use crate::support::{check_memory, on_threads, progress, shapes};
use crate::weights::{Keeping, RowMajor};
use half::f16;
use moe_kernels::{Cpu, DType};
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The rivals, in the order of the table's columns.
const RIVALS: [&str; 3] = ["gemm crate", "matrixmultiply", "candle"];
/// Batches that take turns.
const TURNS: usize = 6;
/// Calls of an engine, at least and at most.
const ROUNDS: (usize, usize) = (3, 40);

/// Runs a process for each number of threads and collects what they print.
///
/// # Errors
/// A process that failed, a file that cannot be written.
pub fn spawn(options: &Options) -> Result<()> {
    let host = Host::look("cargo run --release --locked");
    let mut record = String::new();
    let mut say = |line: &str| {
        println!("{line}");
        record += line;
        record.push('\n');
    };
    say(&format!(
        "# {}, Rust rivals\n\n{}",
        host.date,
        host.markdown()
    ));
    for threads in options.threads()? {
        let threads = threads.to_string();
        let mut command = Command::new(std::env::current_exe()?);
        command.args(std::env::args_os().skip(1));
        command.args(["--in-process", "--threads", &threads]);
        for variable in [
            "RAYON_NUM_THREADS",
            "CANDLE_NUM_THREADS",
            "MATMUL_NUM_THREADS",
        ] {
            command.env(variable, &threads);
        }
        let mut child = command.stdout(Stdio::piped()).spawn()?;
        if let Some(out) = child.stdout.take() {
            BufReader::new(out)
                .lines()
                .try_for_each(|line| line.map(|line| say(&line)))?;
        }
        if !child.wait()?.success() {
            return fail(format!("the run on {threads} threads failed"));
        }
    }
    match &options.record {
        Some(path) => std::fs::write(path, record)
            .map_err(|why| Failure(format!("{}: {why}", path.display()))),
        None => Ok(()),
    }
}

/// All cells on one number of threads.
///
/// # Errors
/// Answers that differ; too little memory.
pub fn run(options: &Options) -> Result<()> {
    let options = options.clone().or_smoke();
    let cpu = options.cpu()?;
    let threads = *options.threads()?.last().unwrap_or(&1);
    on_threads(threads, || {
        let mut machine = Machine::measure(&cpu);
        println!(
            "## {threads} thread(s), {}; at the start {}\n",
            cpu.isa(),
            machine.ceilings
        );
        header();
        for name in &options.shapes {
            let architecture = shapes::named(name)?;
            for &dtype in &options.dtypes {
                layer(&cpu, &architecture, dtype, &mut machine, &options)?;
            }
        }
        println!("\nShares are of the ceilings seen between the calls of their line.\n");
        Ok(())
    })
}

fn header() {
    let mut titles = String::from(
        "layer | weights | load | T | ours, ms | roof, ms | bound by | % of roof | GFLOP/s | of | GB/s | of",
    );
    let mut rule = "---|".repeat(12);
    for rival in RIVALS {
        titles += &format!(" | {rival}, ms | ratio");
        rule += "---|---|";
    }
    println!("| {titles} |\n|{rule}");
}

/// One layer in one format: packed once, then every load and number of tokens.
fn layer(
    cpu: &Cpu,
    architecture: &Architecture,
    dtype: DType,
    machine: &mut Machine,
    options: &Options,
) -> Result<()> {
    let mut seeded = Seeded {
        architecture: architecture.clone(),
        seed: options.seed,
        dtype,
    };
    // Ours, and one for all rivals.
    check_memory(
        &architecture.name,
        2 * shapes::weight_bytes(architecture, dtype),
    )?;
    let mut keeping = Keeping {
        seeded: &mut seeded,
        kept: Vec::new(),
    };
    let mut progress = progress();
    let built = source::build(cpu, architecture, &mut keeping, dtype, progress.as_mut())?;
    let kept = keeping.kept;
    let most = options.tokens.iter().copied().max().unwrap_or(1);
    let mut ours = Subject::new(cpu, &built, architecture, dtype, most)?;
    let mut rivals = rivals(cpu, &built, architecture, &kept, dtype, most, options)?;
    for &load in &options.loads {
        for &tokens in &options.tokens {
            let turns = (0..TURNS.min(2048usize.div_ceil(tokens))).map(|n| {
                let batch = Batch::new(architecture, dtype, load, options.seed, n, tokens);
                Call::new(batch, architecture.hidden)
            });
            let calls = turns.collect::<Result<Vec<_>>>()?;
            ours.check(&calls[0].batch, &mut seeded, options.check)?;
            agree(&ours, &mut rivals, &calls[0])?;
            machine.begin(cpu);
            let times = time(cpu, &mut ours, &mut rivals, &calls, machine, options)?;
            machine.look_again(cpu);
            line(
                architecture,
                load,
                &ours,
                &rivals,
                &calls[0],
                &times,
                machine,
            );
        }
    }
    Ok(())
}

/// Those that were asked for and have the format.
fn rivals<'a>(
    cpu: &'a Cpu,
    built: &'a Built,
    architecture: &Architecture,
    kept: &'a [RowMajor],
    dtype: DType,
    most: usize,
    options: &Options,
) -> Result<Vec<Box<dyn Engine + 'a>>> {
    let router = built.layer.router();
    let mut engines: Vec<Box<dyn Engine + 'a>> = Vec::new();
    for rival in &options.rivals {
        match (rival.as_str(), dtype) {
            ("gemm", DType::F32) => engines.push(Box::new(PerExpert::<f32, GemmCrate>::new(
                cpu,
                router,
                architecture,
                kept,
                most,
            )?)),
            ("gemm", DType::F16) => engines.push(Box::new(PerExpert::<f16, GemmCrate>::new(
                cpu,
                router,
                architecture,
                kept,
                most,
            )?)),
            ("matrixmultiply", DType::F32) => {
                engines.push(Box::new(PerExpert::<f32, Matrixmultiply>::new(
                    cpu,
                    router,
                    architecture,
                    kept,
                    most,
                )?))
            }
            ("candle", _) => engines.push(Box::new(Block::new(architecture, kept))),
            ("gemm" | "matrixmultiply", _) => {}
            (unknown, _) => {
                return fail(format!(
                    "--rivals: unknown {unknown:?}; known are gemm, matrixmultiply, candle"
                ));
            }
        }
    }
    Ok(engines)
}

/// Rivals round more often than we do: gate, up, their product, the output, its weight and each partial sum in their format. A dozen independent roundings move an element by
/// about √12·u of its size; twice that is a mistake. The second term is f32's own long sums.
fn tolerance(dtype: DType) -> f64 {
    let unit = match dtype {
        DType::BF16 => 2f64.powi(-8),
        DType::F16 => 2f64.powi(-11),
        _ => 2f64.powi(-24),
    };
    2.0 * 12f64.sqrt() * unit + 2e-5
}

/// Every rival gives our answer, which the reference has confirmed.
fn agree(ours: &Subject<'_>, rivals: &mut [Box<dyn Engine + '_>], call: &Call) -> Result<()> {
    let expected = ours.output(&call.batch);
    let size: f64 = expected.iter().map(|y| f64::from(*y).powi(2)).sum();
    for rival in rivals {
        rival.forward(call)?;
        let found = rival.output(call)?;
        let pairs = found.iter().zip(&expected);
        let error: f64 = pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum();
        let relative = (error / size).sqrt();
        let allowed = tolerance(call.batch.dtype);
        // NaN is an error, too.
        if found.len() != expected.len() || relative.is_nan() || relative > allowed {
            return fail(format!(
                "{}: its answer is {relative:.1e} away from ours, relatively; {allowed:.1e} is rounding",
                rival.name()
            ));
        }
    }
    Ok(())
}

/// Medians in seconds of ours and each rival: in every round each takes its turn, and another begins.
fn time(
    cpu: &Cpu,
    ours: &mut Subject<'_>,
    rivals: &mut [Box<dyn Engine + '_>],
    calls: &[Call],
    machine: &mut Machine,
    options: &Options,
) -> Result<Vec<f64>> {
    let engines = rivals.len() + 1;
    let mut times = vec![Vec::new(); engines];
    let start = Instant::now();
    for round in 0..ROUNDS.1 {
        let call = &calls[round % calls.len()];
        for turn in 0..engines {
            let who = (round + turn) % engines;
            machine.sweep_caches(cpu);
            let start = Instant::now();
            match who {
                0 => ours.forward(&call.batch)?,
                _ => rivals[who - 1].forward(call)?,
            }
            times[who].push(start.elapsed().as_secs_f64());
        }
        let least = if options.budget > 0.0 { ROUNDS.0 } else { 1 };
        let spent = start.elapsed() > Duration::from_secs_f64(options.budget);
        if spent && round + 1 >= least {
            break;
        }
    }
    Ok(times.into_iter().map(|t| median(t.into_iter())).collect())
}

/// One line of the table.
fn line(
    architecture: &Architecture,
    load: Load,
    ours: &Subject<'_>,
    rivals: &[Box<dyn Engine + '_>],
    call: &Call,
    times: &[f64],
    machine: &Machine,
) {
    let (batch, seconds) = (&call.batch, times[0]);
    let work = ours.work(batch);
    let roof = work.roof(&machine.ceilings, batch.dtype);
    let mut cells = format!(
        "| {} | {} | {load} | {} | {:.2} | {:.2} | {} | {:.1} | {:.1} | {:.0} | {:.1} | {:.1} |",
        architecture.name,
        batch.dtype,
        batch.tokens,
        seconds * 1e3,
        roof.seconds * 1e3,
        roof.bound.name(),
        100.0 * roof.seconds / seconds,
        work.flops / seconds / 1e9,
        machine.ceilings.flop_peak(batch.dtype) / 1e9,
        work.bytes / seconds / 1e9,
        machine.ceilings.read_bandwidth / 1e9
    );
    for column in RIVALS {
        match rivals.iter().position(|rival| rival.name() == column) {
            Some(i) => {
                let theirs = times[i + 1];
                cells += &format!(" {:.2} | {:.2} |", theirs * 1e3, theirs / seconds);
            }
            None => cells += " | |",
        }
    }
    println!("{cells}");
    // The parent reads a pipe.
    let _ = std::io::stdout().flush();
}
