//! Weights at the safe level: views of cudarc's slices, and their check.

use super::weights::{BiasPointers, ExpertPointers, GatePointers, SharedPointers, WeightPointers};
use crate::cuda::stages::Door;
use crate::cuda::{Cuda, DeviceMat, DeviceVec, WeightViews};
use crate::error::{Result, checked_mul};
use cudarc::driver::CudaStream;

/// The first projection of experts, in one tensor for all experts or one for each ([`WeightViews`]; `.into()` makes them from matrices and tables).
#[derive(Debug)]
#[non_exhaustive]
pub enum UpViews<'a> {
    /// `[E, I, H]`: not gated.
    Plain(WeightViews<'a>),
    /// `[E, 2I, H]`: for each expert the gate rows, then the up rows.
    Fused(WeightViews<'a>),
    /// `[E, 2I, H]`: gate and up rows alternate, gate first.
    Interleaved(WeightViews<'a>),
    /// Two tensors `[E, I, H]`, gate and up; both stacked or both tables.
    Separate(WeightViews<'a>, WeightViews<'a>),
}

/// The weights of experts. A tensor `[E, N, K]` is given as the matrix `[E·N, K]` that it is in memory, or as a [`TensorTable`](crate::cuda::TensorTable) of E matrices
/// `[N, K]`.
#[derive(Debug)]
pub struct ExpertViews<'a> {
    /// The first projection.
    pub up: UpViews<'a>,
    /// `[E, H, I]`
    pub down: WeightViews<'a>,
    /// `[E, 2I]` laid out as the rows of a fused or interleaved projection, `[E, I]` for a plain one; added before the activation. A table has matrices of one row.
    pub up_bias: Option<WeightViews<'a>>,
    /// `[E, H]`, added to the expert's output.
    pub down_bias: Option<WeightViews<'a>>,
}

/// The gate: `logits = x · Wᵀ + b` in exact f32, whatever the formats.
#[derive(Debug)]
pub struct GateViews<'a> {
    /// `[R, H]`
    pub weights: DeviceMat<'a>,
    /// `[R]`
    pub bias: Option<DeviceVec<'a, f32>>,
}

/// The shared experts' weights.
#[derive(Debug)]
pub struct SharedViews<'a> {
    /// As many experts as the layer has shared ones.
    pub expert: ExpertViews<'a>,
    /// g `[1, H]`, for [`SharedJoin::SigmoidGate`](super::SharedJoin::SigmoidGate) and only then.
    pub gate: Option<DeviceMat<'a>>,
}

impl WeightViews<'_> {
    /// Matrices `[experts, n, k]` as plain data, when they have that shape and belong to the call's stream.
    fn check(
        &self,
        door: &Door<'_>,
        argument: &'static str,
        [experts, n, k]: [usize; 3],
    ) -> Result<WeightPointers> {
        Ok(match self {
            Self::Stacked(view) => {
                let rows = door.mat(argument, view, checked_mul(experts, n, argument)?, k)?;
                let expert_stride = checked_mul(n, rows.stride, argument)?;
                WeightPointers::strided(rows.ptr, rows.dtype, rows.stride, expert_stride)
            }
            Self::Table(table) => {
                table.expect(door.cuda, argument, door.stream, [experts, n, k])?;
                WeightPointers::table(table.ptr(), table.dtype(), k, table.alignment())
            }
        })
    }

    /// Biases `[experts, n]` as plain data: a matrix of so many rows, or a table of matrices of one row.
    pub(in crate::cuda) fn check_bias(
        &self,
        door: &Door<'_>,
        argument: &'static str,
        experts: usize,
        n: usize,
    ) -> Result<BiasPointers> {
        Ok(match self {
            Self::Stacked(view) => {
                let rows = door.mat(argument, view, experts, n)?;
                BiasPointers::strided(rows.ptr, rows.dtype, rows.stride)
            }
            Self::Table(table) => {
                table.expect(door.cuda, argument, door.stream, [experts, 1, n])?;
                BiasPointers::table(table.ptr(), table.dtype())
            }
        })
    }
}

/// Names of the operands of a first projection, for errors.
pub(in crate::cuda) struct UpNames {
    pub(in crate::cuda) gate: &'static str,
    pub(in crate::cuda) up: &'static str,
    pub(in crate::cuda) bias: &'static str,
}

/// A first projection as plain data.
pub(in crate::cuda) struct UpPointers {
    pub(in crate::cuda) gate: Option<WeightPointers>,
    pub(in crate::cuda) up: WeightPointers,
    pub(in crate::cuda) gate_bias: Option<BiasPointers>,
    pub(in crate::cuda) up_bias: Option<BiasPointers>,
}

impl UpViews<'_> {
    /// The same as plain data, when all is of the shape `[experts, n, k]`, or `[experts, 2n, k]` where gate and up share tensors.
    pub(in crate::cuda) fn check(
        &self,
        door: &Door<'_>,
        names: &UpNames,
        [experts, n, k]: [usize; 3],
        bias: Option<&WeightViews<'_>>,
    ) -> Result<UpPointers> {
        let both = checked_mul(2, n, names.up)?;
        let up = |views: &WeightViews<'_>, rows| views.check(door, names.up, [experts, rows, k]);
        let (gate, up) = match self {
            Self::Plain(views) => (None, up(views, n)?),
            Self::Fused(views) => {
                let all = up(views, both)?;
                (Some(all), all.rows(n, 1))
            }
            Self::Interleaved(views) => {
                let all = up(views, both)?;
                (Some(all.rows(0, 2)), all.rows(1, 2))
            }
            Self::Separate(gate, views) => {
                let gate = gate.check(door, names.gate, [experts, n, k])?;
                (Some(gate), up(views, n)?)
            }
        };
        let width = if gate.is_some() { both } else { n };
        let bias = match bias {
            Some(bias) => Some(bias.check_bias(door, names.bias, experts, width)?),
            None => None,
        };
        let (gate_bias, up_bias) = match self {
            Self::Plain(_) => (None, bias),
            Self::Interleaved(_) => (bias.map(|b| b.columns(0, 2)), bias.map(|b| b.columns(1, 2))),
            // Also where the weights are separate: the gate's biases, then the up projection's.
            Self::Fused(_) | Self::Separate(..) => (bias, bias.map(|b| b.columns(n, 1))),
        };
        Ok(UpPointers {
            gate,
            up,
            gate_bias,
            up_bias,
        })
    }
}

impl<'a> ExpertViews<'a> {
    /// Experts without biases.
    pub fn new(up: UpViews<'a>, down: impl Into<WeightViews<'a>>) -> Self {
        Self {
            up,
            down: down.into(),
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
        let door = Door { cuda, stream };
        let names = UpNames {
            gate: "experts.gate",
            up: "experts.up",
            bias: "experts.up_bias",
        };
        let shape = [experts, intermediate, hidden];
        let first = self.up.check(&door, &names, shape, self.up_bias.as_ref())?;
        let down = [experts, hidden, intermediate];
        Ok(ExpertPointers {
            gate: first.gate,
            up: first.up,
            down: self.down.check(&door, "experts.down", down)?,
            gate_bias: first.gate_bias,
            up_bias: first.up_bias,
            down_bias: match &self.down_bias {
                Some(b) => Some(b.check_bias(&door, "experts.down_bias", experts, hidden)?),
                None => None,
            },
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
        count: usize,
        hidden: usize,
        intermediate: usize,
    ) -> Result<SharedPointers> {
        let expert = self
            .expert
            .check(cuda, stream, count, hidden, intermediate)?;
        if let Some(gate) = &self.gate {
            gate.expect(cuda, "shared.gate", stream, 1, hidden)?;
        }
        Ok(SharedPointers {
            expert,
            gate: self.gate.as_ref().map(DeviceMat::as_rows),
        })
    }
}
