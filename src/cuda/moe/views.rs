//! Weights at the safe level: views of cudarc's slices, and their check.

use super::weights::{BiasPointers, ExpertPointers, GatePointers, SharedPointers, WeightPointers};
use crate::cuda::{Cuda, DeviceMat, DeviceVec};
use crate::error::{Result, checked_mul};
use cudarc::driver::CudaStream;

/// The first projection of experts, all experts of a tensor one below the other.
#[derive(Debug)]
#[non_exhaustive]
pub enum UpViews<'a> {
    /// `[E·I, H]`: not gated.
    Plain(DeviceMat<'a>),
    /// `[E·2I, H]`: for each expert the gate rows, then the up rows.
    Fused(DeviceMat<'a>),
    /// `[E·2I, H]`: gate and up rows alternate, gate first.
    Interleaved(DeviceMat<'a>),
    /// Two tensors `[E·I, H]`, gate and up.
    Separate(DeviceMat<'a>, DeviceMat<'a>),
}

/// The weights of experts. A tensor `[E, N, K]` is given as the matrix `[E·N, K]` that it is in memory.
#[derive(Debug)]
pub struct ExpertViews<'a> {
    /// The first projection.
    pub up: UpViews<'a>,
    /// `[E·H, I]`
    pub down: DeviceMat<'a>,
    /// `[E, 2I]` laid out as the rows of a fused or interleaved projection, `[E, I]` for a plain one; added before the activation.
    pub up_bias: Option<DeviceMat<'a>>,
    /// `[E, H]`, added to the expert's output.
    pub down_bias: Option<DeviceMat<'a>>,
}

/// The gate: `logits = x · Wᵀ + b` in exact f32, whatever the formats.
#[derive(Debug)]
pub struct GateViews<'a> {
    /// `[R, H]`
    pub weights: DeviceMat<'a>,
    /// `[R]`
    pub bias: Option<DeviceVec<'a, f32>>,
}

/// The shared expert's weights.
#[derive(Debug)]
pub struct SharedViews<'a> {
    /// One expert.
    pub expert: ExpertViews<'a>,
    /// g `[1, H]`, for [`SharedJoin::SigmoidGate`](super::SharedJoin::SigmoidGate) and only then.
    pub gate: Option<DeviceMat<'a>>,
}

impl<'a> ExpertViews<'a> {
    /// Experts without biases.
    pub fn new(up: UpViews<'a>, down: DeviceMat<'a>) -> Self {
        Self {
            up,
            down,
            up_bias: None,
            down_bias: None,
        }
    }

    /// The same weights as plain data, when they have the layer's shape and belong to the call's stream.
    pub(super) fn check(
        &self,
        cuda: &Cuda,
        stream: &CudaStream,
        experts: usize,
        hidden: usize,
        intermediate: usize,
    ) -> Result<ExpertPointers> {
        let weights =
            |argument, view: &DeviceMat<'_>, n: usize, k: usize| -> Result<WeightPointers> {
                view.expect(
                    cuda,
                    argument,
                    stream,
                    checked_mul(experts, n, argument)?,
                    k,
                )?;
                Ok(WeightPointers {
                    ptr: view.ptr(),
                    dtype: view.dtype(),
                    row_stride: view.stride(),
                    expert_stride: checked_mul(n, view.stride(), argument)?,
                })
            };
        let bias =
            |argument, view: &Option<DeviceMat<'_>>, n: usize| -> Result<Option<BiasPointers>> {
                let Some(view) = view else { return Ok(None) };
                view.expect(cuda, argument, stream, experts, n)?;
                Ok(Some(BiasPointers {
                    expert_stride: view.stride(),
                    ..BiasPointers::contiguous(view.ptr(), view.dtype(), n)
                }))
            };
        let both = checked_mul(2, intermediate, "2·I")?;
        let down = weights("experts.down", &self.down, hidden, intermediate)?;
        let down_bias = bias("experts.down_bias", &self.down_bias, hidden)?;
        let up_width = if matches!(self.up, UpViews::Plain(_)) {
            intermediate
        } else {
            both
        };
        let up_bias = bias("experts.up_bias", &self.up_bias, up_width)?;
        Ok(match &self.up {
            UpViews::Plain(up) => {
                ExpertPointers::plain(weights("experts.up", up, intermediate, hidden)?, down)
                    .with_biases(None, up_bias, down_bias)
            }
            UpViews::Fused(gate_up) => {
                let pointers = ExpertPointers::fused(
                    weights("experts.up", gate_up, both, hidden)?,
                    intermediate,
                    down,
                );
                match up_bias {
                    Some(b) => pointers.with_fused_biases(b, intermediate, down_bias),
                    None => pointers.with_biases(None, None, down_bias),
                }
            }
            UpViews::Interleaved(gate_up) => {
                let pointers = ExpertPointers::interleaved(
                    weights("experts.up", gate_up, both, hidden)?,
                    down,
                );
                match up_bias {
                    Some(b) => pointers.with_interleaved_biases(b, down_bias),
                    None => pointers.with_biases(None, None, down_bias),
                }
            }
            UpViews::Separate(gate, up) => {
                let gate = weights("experts.gate", gate, intermediate, hidden)?;
                let pointers = ExpertPointers::gated(
                    gate,
                    weights("experts.up", up, intermediate, hidden)?,
                    down,
                );
                match up_bias {
                    // [E, 2I]: the gate's bias, then the up projection's.
                    Some(b) => pointers.with_fused_biases(b, intermediate, down_bias),
                    None => pointers.with_biases(None, None, down_bias),
                }
            }
        })
    }
}

impl GateViews<'_> {
    pub(super) fn check(
        &self,
        cuda: &Cuda,
        stream: &CudaStream,
        columns: usize,
        hidden: usize,
    ) -> Result<GatePointers> {
        self.weights.expect(cuda, "gate", stream, columns, hidden)?;
        let bias = match &self.bias {
            Some(bias) => Some(bias.expect(cuda, "gate bias", stream, columns)?),
            None => None,
        };
        Ok(GatePointers {
            weights: self.weights.as_rows(),
            bias,
        })
    }
}

impl SharedViews<'_> {
    pub(super) fn check(
        &self,
        cuda: &Cuda,
        stream: &CudaStream,
        hidden: usize,
        intermediate: usize,
    ) -> Result<SharedPointers> {
        let expert = self.expert.check(cuda, stream, 1, hidden, intermediate)?;
        if let Some(gate) = &self.gate {
            gate.expect(cuda, "shared.gate", stream, 1, hidden)?;
        }
        Ok(SharedPointers {
            expert,
            gate: self.gate.as_ref().map(DeviceMat::as_rows),
        })
    }
}
