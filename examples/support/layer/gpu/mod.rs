//! The layer on a GPU: uploaded, checked, timed call by call and as replayed graphs.
//!
//! | file | holds |
//! |---|---|
//! | `weights.rs` | the layer's weights in device memory |
//! | `rotation.rs` | inputs and copies of the weights that take turns, so that no call finds its own in the L2 |
//! | `clock.rs` | time on the device |
//! | `measure.rs` | the check's call, eager calls, graphs |
//! | `report.rs` | what is printed |

pub mod clock;
pub mod measure;
pub mod report;
pub mod rotation;
pub mod weights;

use super::device::{Gpu, line};
use super::options::Options;
use super::shapes::{Architecture, Join};
use super::{Failure, Report, Result, check_options, oracle, report as lines};
use moe_kernels::DType;
use moe_kernels::cuda::moe::{CudaMoeLayer, SharedExpert, SharedJoin};
use std::io::Write;
use weights::Weights;

impl From<String> for Failure {
    fn from(why: String) -> Self {
        Self(why)
    }
}

/// A layer whose weights are on a GPU.
pub struct OnGpu<'a> {
    gpu: &'a Gpu,
    architecture: &'a Architecture,
    dtype: DType,
    layer: CudaMoeLayer,
}

/// Uploads the layer that the options describe, checks it, times it.
///
/// # Errors
/// A [`Failure`] that says what to change.
pub fn run(options: &Options, out: &mut dyn Write, progress: &mut dyn Write) -> Result<Report> {
    let gpu = Gpu::open()?;
    let (architecture, mut source, dtype) = super::open(options, out)?;
    check_options(options, &architecture)?;
    lines::header(out, &architecture, options, dtype)?;
    report::device(out, &gpu)?;
    let on = OnGpu {
        gpu: &gpu,
        architecture: &architecture,
        dtype,
        layer: describe(&architecture, dtype)?,
    };
    on.check_memory(options)?;
    let weights = Weights::upload(&on, source.as_mut(), progress)?;
    report::uploaded(out, &weights)?;

    let mut runs = Vec::new();
    let mut weights = vec![weights];
    for &tokens in &options.tokens {
        writeln!(out, "\nT = {tokens}")?;
        let (call, sample) = measure::sample(&on, &weights[0], tokens, options.seed)?;
        let found = oracle::check(
            &architecture,
            source.as_mut(),
            dtype,
            &sample,
            options.check,
        )?;
        lines::checked(out, &found)?;
        let measured = measure::measure(&on, &mut weights, call, sample, options, out)?;
        lines::load(out, &measured)?;
        runs.push((measured, found));
    }
    Ok(Report {
        architecture,
        dtype,
        runs,
    })
}

/// The layer as the GPU's constructors take it. What it cannot have they refuse, naming the field.
fn describe(a: &Architecture, dtype: DType) -> Result<CudaMoeLayer> {
    let mut layer = CudaMoeLayer::new(
        a.router.clone(),
        a.hidden,
        a.intermediate,
        a.activation,
        dtype,
    )?;
    if a.weight_on_input {
        layer = layer.with_weight_on_input();
    }
    if let Some(shared) = a.shared {
        let join = match shared.join {
            Join::Add => SharedJoin::Add,
            Join::SigmoidGate => SharedJoin::SigmoidGate,
        };
        let expert = SharedExpert::new(shared.intermediate, a.activation, join);
        layer = layer.with_shared(expert)?;
    }
    Ok(layer)
}

impl OnGpu<'_> {
    /// Bytes of one copy of the weights, but for the small tensors.
    fn weight_bytes(&self) -> u64 {
        let a = self.architecture;
        let shared = 3 * a.hidden * a.shared.map_or(0, |s| s.intermediate);
        let elements = a.experts() as u64 * a.expert_elements() as u64 + shared as u64;
        elements.saturating_mul(self.dtype.size() as u64)
    }

    /// Bytes of the workspace and of one input with its output.
    fn call_bytes(&self, tokens: usize) -> Result<u64> {
        let workspace = self
            .layer
            .workspace_size(tokens, self.gpu.cuda.device_info())?;
        let rows = tokens as u64 * self.architecture.hidden as u64;
        Ok(workspace as u64 + 2 * rows * self.dtype.size() as u64)
    }

    /// Refuses what cannot fit before anything large is made.
    fn check_memory(&self, options: &Options) -> Result<()> {
        let most = options.tokens.iter().copied().max().unwrap_or(1);
        let needed = self.weight_bytes().saturating_add(self.call_bytes(most)?);
        let free = self.gpu.free_memory()?;
        if needed <= free / 20 * 19 {
            return Ok(());
        }
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        super::fail(format!(
            "{} in {} with {most} tokens needs about {:.1} GiB of device memory, {:.1} GiB are free; lower --tokens, cut it with --experts N or choose another --shape",
            self.architecture.name,
            self.dtype,
            gib(needed),
            gib(free)
        ))
    }
}

/// An error of the crate, for closures.
fn failure(why: moe_kernels::Error) -> Failure {
    Failure(line(why))
}
