//! Where a layer's weights come from: a seed or a checkpoint. One expert is in memory at a time.

use super::Result;
use super::shapes::{Architecture, Join};
use super::tensor::{Expert, Matrix};
use moe_kernels::experts::PackedExperts;
use moe_kernels::moe::{Gate, MoeLayer, SharedCombine, SharedExperts};
use moe_kernels::routing::Router;
use moe_kernels::{Cpu, DType};
use std::io::Write;
use std::time::{Duration, Instant};

/// The router's tensors.
pub struct RouterTensors {
    /// `[R, H]`
    pub weight: Matrix,
    /// `[R]`, added to the logits.
    pub bias: Option<Vec<f32>>,
    /// `[E]`, added to what the selection ranks.
    pub correction: Option<Vec<f32>>,
}

/// The shared expert's tensors.
pub struct SharedTensors {
    pub expert: Expert,
    /// `[1, H]`
    pub gate: Option<Matrix>,
}

/// Gives a layer's weights, any number of times.
pub trait Source {
    fn router(&mut self) -> Result<RouterTensors>;
    fn expert(&mut self, e: usize) -> Result<Expert>;
    fn shared(&mut self) -> Result<Option<SharedTensors>>;
}

/// A layer ready to run.
pub struct Built {
    pub layer: MoeLayer,
    /// A second copy of the shared expert, to time it alone.
    pub shared: Option<PackedExperts>,
    pub packed_bytes: usize,
    pub packing: Duration,
}

/// Packs a layer expert by expert.
pub fn build(
    cpu: &Cpu,
    architecture: &Architecture,
    source: &mut dyn Source,
    dtype: DType,
    progress: &mut dyn Write,
) -> Result<Built> {
    let (hidden, inner) = (architecture.hidden, architecture.intermediate);
    let start = Instant::now();
    let tensors = source.router()?;
    let mut router = Router::new(architecture.router.clone())?;
    if let Some(correction) = &tensors.correction {
        router = router.with_correction_bias(correction)?;
    }
    let gate = Gate::new(cpu, tensors.weight.view()?, tensors.bias.as_deref())?;

    let mut experts = PackedExperts::new(cpu, hidden, inner, architecture.activation, dtype)?;
    let count = architecture.experts();
    let mut shown = Instant::now();
    for e in 0..count {
        let weights = source.expert(e)?;
        experts.push(cpu, &weights.views()?)?;
        if e + 1 == count || shown.elapsed() > Duration::from_millis(100) {
            shown = Instant::now();
            let gib = experts.bytes() as f64 / f64::from(1 << 30);
            let seconds = start.elapsed().as_secs_f64();
            write!(
                progress,
                "\rpacking expert {:4} of {count}  {gib:6.2} GiB  {seconds:5.1} s",
                e + 1
            )?;
            progress.flush()?;
        }
    }
    writeln!(progress)?;
    let mut packed_bytes = experts.bytes();
    let mut layer = MoeLayer::new(router, experts)?.with_gate(gate)?;
    if architecture.weight_on_input {
        layer = layer.with_weight_on_input();
    }
    let mut shared_copy = None;
    if let (Some(shape), Some(shared)) = (architecture.shared, source.shared()?) {
        let mut packed = PackedExperts::new(
            cpu,
            hidden,
            shape.intermediate,
            architecture.activation,
            dtype,
        )?;
        packed.push(cpu, &shared.expert.views()?)?;
        packed_bytes += packed.bytes();
        shared_copy = Some(packed.clone());
        layer = layer.with_shared(match (shape.join, &shared.gate) {
            (Join::SigmoidGate, Some(gate)) => {
                SharedExperts::with_sigmoid_gate(cpu, packed, gate.view()?)?
            }
            _ => SharedExperts::new(packed, SharedCombine::Add)?,
        })?;
    }
    Ok(Built {
        layer,
        shared: shared_copy,
        packed_bytes,
        packing: start.elapsed(),
    })
}
