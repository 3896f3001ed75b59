//! The example `layer`, as a library that its tests can call.
//!
//! | file | holds |
//! |---|---|
//! | `options.rs` | the command line |
//! | `shapes.rs` | published layers by name |
//! | `source.rs` | packing a layer from a source of weights: |
//! | `seeded.rs` | … a seed |
//! | `checkpoint.rs`, `naming.rs`, `settings.rs`, `file.rs` | … a checkpoint: its layer, its tensors' names, its `config.json`, its bytes |
//! | `measure.rs` | the stages, timed through the public API |
//! | `oracle.rs` | sampled tokens in f64, with a derived tolerance |
//! | `report.rs` | tables and bars |
//! | `gpu/` | the same on a GPU, with feature `cuda` |
#![allow(dead_code)] // the example and its tests each use their own part

pub mod checkpoint;
#[path = "../device.rs"]
pub mod device;
pub mod file;
#[cfg(feature = "cuda")]
pub mod gpu;
pub mod machine;
pub mod measure;
pub mod naming;
pub mod options;
pub mod oracle;
pub mod report;
pub mod seeded;
pub mod settings;
pub mod shapes;
pub mod source;
pub mod tensor;

pub use options::Options;

use checkpoint::Checkpoint;
use device::Backend;
use measure::{Machine, Measured};
use moe_kernels::{Cpu, DType};
use oracle::Checked;
use seeded::Seeded;
use shapes::Architecture;
use source::Source;
use std::fmt;
use std::io::Write;

/// Why there is no result, in words for the user.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure(pub String);

pub type Result<T> = std::result::Result<T, Failure>;

/// A [`Failure`] as a `Result`.
pub fn fail<T>(why: impl Into<String>) -> Result<T> {
    Err(Failure(why.into()))
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<moe_kernels::Error> for Failure {
    fn from(why: moe_kernels::Error) -> Self {
        Self(why.to_string())
    }
}

impl From<std::io::Error> for Failure {
    fn from(why: std::io::Error) -> Self {
        Self(format!("cannot write the report: {why}"))
    }
}

/// What a run found.
pub struct Report {
    pub architecture: Architecture,
    pub dtype: DType,
    /// For each number of tokens.
    pub runs: Vec<(Measured, Checked)>,
}

impl Report {
    /// Whether every sampled token is as close to the reference as rounding allows.
    pub fn passed(&self) -> bool {
        self.runs.iter().all(|(_, checked)| checked.passed())
    }
}

/// Takes the layer that the options describe to the machine that they name, times it, checks it.
///
/// # Errors
/// A [`Failure`] that says what to change.
pub fn run(
    options: &Options,
    out: &mut (dyn Write + Send),
    progress: &mut (dyn Write + Send),
) -> Result<Report> {
    options.check()?;
    if options.backend == Backend::Cuda {
        return run_on_gpu(options, out, progress);
    }
    let cpu = match options.isa {
        Some(isa) => Cpu::with_isa(isa)?,
        None => Cpu::from_env()?,
    };
    let Some(threads) = options.threads else {
        return run_on(&cpu, options, out, progress);
    };
    if threads == 0 || threads > 4096 {
        return fail(format!("--threads: expected 1 to 4096, got {threads}"));
    }
    match rayon::ThreadPoolBuilder::new().num_threads(threads).build() {
        Ok(pool) => pool.install(|| run_on(&cpu, options, out, progress)),
        Err(why) => fail(format!("--threads {threads}: {why}")),
    }
}

#[cfg(feature = "cuda")]
use gpu::run as run_on_gpu;

/// Never called: [`Options::check`] refuses the backend.
#[cfg(not(feature = "cuda"))]
fn run_on_gpu(_: &Options, _: &mut dyn Write, _: &mut dyn Write) -> Result<Report> {
    fail("--backend cuda: not compiled in")
}

fn run_on(
    cpu: &Cpu,
    options: &Options,
    out: &mut dyn Write,
    progress: &mut dyn Write,
) -> Result<Report> {
    let (architecture, mut source, dtype) = open(options, out)?;
    check_sizes(options, &architecture, dtype)?;
    report::header(out, &architecture, options, dtype)?;

    let mut machine = (!options.no_peaks).then(|| Machine::measure(cpu));
    report::machine(out, cpu, machine.as_ref())?;
    let built = source::build(cpu, &architecture, source.as_mut(), dtype, progress)?;
    report::packed(out, &built)?;

    let mut runs = Vec::new();
    for &tokens in &options.tokens {
        let measured = measure::measure(
            cpu,
            &built,
            &architecture,
            dtype,
            tokens,
            machine.as_mut(),
            options,
        )?;
        report::stages(out, machine.as_ref(), &measured)?;
        report::load(out, &measured)?;
        let checked = oracle::check(
            &architecture,
            source.as_mut(),
            dtype,
            &measured.sample,
            options.check,
        )?;
        report::checked(out, &checked)?;
        runs.push((measured, checked));
    }
    Ok(Report {
        architecture,
        dtype,
        runs,
    })
}

/// The layer and where its weights come from.
fn open(options: &Options, out: &mut dyn Write) -> Result<(Architecture, Box<dyn Source>, DType)> {
    let Some(path) = &options.weights else {
        let dtype = options.dtype.unwrap_or(DType::BF16);
        let architecture = options.shape()?;
        let source = Seeded {
            architecture: architecture.clone(),
            seed: options.seed,
            dtype,
        };
        return Ok((architecture, Box::new(source), dtype));
    };
    let checkpoint = Checkpoint::open(path, options)?;
    for note in &checkpoint.notes {
        writeln!(out, "note: {note}")?;
    }
    let dtype = options.dtype.unwrap_or(checkpoint.dtype);
    Ok((checkpoint.architecture.clone(), Box::new(checkpoint), dtype))
}

/// Refuses what is no call, whatever the machine.
fn check_options(options: &Options, architecture: &Architecture) -> Result<()> {
    if options.tokens.is_empty() || options.tokens.contains(&0) {
        return fail("--tokens: expected numbers of at least 1, as in 1,512");
    }
    Ok(architecture.router.validate()?)
}

/// Refuses what cannot fit before anything large is made.
fn check_sizes(options: &Options, architecture: &Architecture, dtype: DType) -> Result<()> {
    check_options(options, architecture)?;
    let most = options.tokens.iter().copied().max().unwrap_or(1);
    let slots = architecture.router.slots();
    let expert = Some(architecture.expert_elements()).and_then(|n| n.checked_mul(dtype.size()));
    let shared = architecture.shared.map_or(0, |s| 3 * s.intermediate);
    let fixed =
        (architecture.hidden * shared * dtype.size() * 3) as u64 + measure::PROBE_BYTES as u64;
    // x and y twice, and for each pair a row of h and one of ys, once in the workspace and once for the stages.
    let row = 4 * (architecture.hidden + architecture.intermediate);
    let rows = most
        .checked_mul(slots + 4)
        .and_then(|n| n.checked_mul(2 * row));
    let needed = expert.zip(rows).and_then(|(expert, rows)| {
        let experts = (architecture.experts() as u64 + 2).checked_mul(expert as u64)?;
        experts.checked_add(rows as u64)?.checked_add(fixed)
    });
    let Some(needed) = needed else {
        return fail("this layer with so many tokens does not fit the address space");
    };
    match machine::available_memory() {
        Some(available) if needed > available / 20 * 19 => {
            let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
            let mut why = format!(
                "{} in {dtype} with {most} tokens needs about {:.1} GiB of memory, {:.1} GiB are available",
                architecture.name,
                gib(needed),
                gib(available)
            );
            if options.weights.is_none() {
                let per_expert = expert.unwrap_or(1).max(1) as u64;
                let spare = (available / 10 * 9).saturating_sub(fixed + rows.unwrap_or(0) as u64);
                let fits = (spare / per_expert).saturating_sub(2);
                why += &if fits < architecture.router.top_k as u64 {
                    "; lower --tokens or choose another --shape".into()
                } else {
                    format!(
                        "; cut it with --experts N (at most about {fits} here) or choose another --shape"
                    )
                };
            }
            fail(why)
        }
        _ => Ok(()),
    }
}
