//! Weights on the device, where the framework has them.

use crate::cuda::DevicePtr;
use crate::cuda::combine::DeviceRows;
pub use crate::cuda::grouped_gemm::{BiasPointers, WeightPointers};
use crate::element::DType;

impl WeightPointers {
    /// Matrices without gaps.
    pub fn contiguous(ptr: DevicePtr, dtype: DType, n: usize, k: usize) -> Self {
        Self::strided(ptr, dtype, k, n.saturating_mul(k))
    }

    /// Every `step`-th row from row `first` on.
    pub(super) fn rows(self, first: usize, step: usize) -> Self {
        let (ptr, placement) =
            self.placement
                .behind(self.ptr, self.dtype, first.wrapping_mul(self.row_stride));
        Self {
            ptr,
            placement,
            row_stride: self.row_stride.wrapping_mul(step),
            ..self
        }
    }
}

impl BiasPointers {
    /// Biases without gaps.
    pub fn contiguous(ptr: DevicePtr, dtype: DType, n: usize) -> Self {
        Self::strided(ptr, dtype, n)
    }

    /// Every `step`-th column from column `first` on.
    pub(super) fn columns(self, first: usize, step: usize) -> Self {
        let (ptr, placement) =
            self.placement
                .behind(self.ptr, self.dtype, first.wrapping_mul(self.stride));
        Self {
            ptr,
            placement,
            stride: self.stride.wrapping_mul(step),
            ..self
        }
    }
}

/// The weights of experts. Checkpoints come in several layouts; each is one of these, without a copy:
///
/// | in memory | pointers |
/// |---|---|
/// | `gate [E,I,H]`, `up [E,I,H]`, `down [E,H,I]` | [`ExpertPointers::gated`] |
/// | `gate_up [E,2I,H]`, gate rows first | [`ExpertPointers::fused`] |
/// | `gate_up [E,2I,H]`, rows alternating | [`ExpertPointers::interleaved`] |
/// | `up [E,I,H]`, `down [E,H,I]` | [`ExpertPointers::plain`] |
///
/// Each tensor is one allocation ([`WeightPointers::strided`]) or one an expert ([`WeightPointers::table`]), gate and up alike.
/// In-features that are not neighbours (`[E,H,2I]`) have to be transposed once, at load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertPointers {
    /// `[E, I, H]`; `None` when the experts are not gated.
    pub gate: Option<WeightPointers>,
    /// `[E, I, H]`
    pub up: WeightPointers,
    /// `[E, H, I]`
    pub down: WeightPointers,
    /// `[E, I]`, added before the activation.
    pub gate_bias: Option<BiasPointers>,
    /// `[E, I]`, added before the activation.
    pub up_bias: Option<BiasPointers>,
    /// `[E, H]`, added to the expert's output.
    pub down_bias: Option<BiasPointers>,
}

impl ExpertPointers {
    /// Experts without a gate.
    pub fn plain(up: WeightPointers, down: WeightPointers) -> Self {
        Self {
            gate: None,
            up,
            down,
            gate_bias: None,
            up_bias: None,
            down_bias: None,
        }
    }

    /// Experts with separate gate and up projections.
    pub fn gated(gate: WeightPointers, up: WeightPointers, down: WeightPointers) -> Self {
        Self {
            gate: Some(gate),
            ..Self::plain(up, down)
        }
    }

    /// Experts whose gate and up projections are the halves of one `[2I, H]` matrix.
    pub fn fused(gate_up: WeightPointers, intermediate: usize, down: WeightPointers) -> Self {
        Self::gated(gate_up, gate_up.rows(intermediate, 1), down)
    }

    /// Experts whose gate and up projections alternate in the rows of one `[2I, H]` matrix, gate first.
    pub fn interleaved(gate_up: WeightPointers, down: WeightPointers) -> Self {
        Self::gated(gate_up.rows(0, 2), gate_up.rows(1, 2), down)
    }

    /// The same experts with biases `[E, I]`, `[E, I]` and `[E, H]`.
    pub fn with_biases(
        self,
        gate: Option<BiasPointers>,
        up: Option<BiasPointers>,
        down: Option<BiasPointers>,
    ) -> Self {
        Self {
            gate_bias: gate,
            up_bias: up,
            down_bias: down,
            ..self
        }
    }

    /// The same experts with one bias `[E, 2I]` for both halves, laid out as their weights are, and one `[E, H]`.
    pub fn with_fused_biases(
        self,
        gate_up: BiasPointers,
        intermediate: usize,
        down: Option<BiasPointers>,
    ) -> Self {
        self.with_biases(Some(gate_up), Some(gate_up.columns(intermediate, 1)), down)
    }

    /// As [`with_fused_biases`](Self::with_fused_biases), alternating.
    pub fn with_interleaved_biases(
        self,
        gate_up: BiasPointers,
        down: Option<BiasPointers>,
    ) -> Self {
        self.with_biases(
            Some(gate_up.columns(0, 2)),
            Some(gate_up.columns(1, 2)),
            down,
        )
    }
}

/// The gate's weights: `logits = x · Wᵀ + b` in exact f32, whatever the formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatePointers {
    /// `[R, H]`
    pub weights: DeviceRows,
    /// `[R]` f32
    pub bias: Option<DevicePtr>,
}

/// The shared experts' weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedPointers {
    /// As many experts as the layer has shared ones.
    pub expert: ExpertPointers,
    /// g `[1, H]`, for [`SharedJoin::SigmoidGate`](super::SharedJoin::SigmoidGate) and only then.
    pub gate: Option<DeviceRows>,
}
