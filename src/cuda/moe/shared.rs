//! The experts that every token visits.

use super::plan::Call;
use super::products::Rows;
use super::weights::{BiasPointers, ExpertPointers, WeightPointers};
use super::{CudaMoeLayer, SharedPointers, check_size};
use crate::cuda::DevicePtr;
use crate::cuda::combine::{DeviceRows, Shared, SharedSum};
use crate::cuda::grouped_gemm::{GroupPointers, Placement};
use crate::element::DType;
use crate::error::{Error, Result};
use crate::grouped_gemm::Activation;
use crate::routing::RouterConfig;

/// The most shared experts with weights of their own: each is two launches. The published models have one or two.
pub const MAX_SHARED: usize = 4;

/// How the shared experts' output S(x) joins the routed sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SharedJoin {
    /// `y + Σ S_j(x)`
    Add,
    /// `y + σ(x · g) · Σ S_j(x)` with g `[1, H]` (Qwen2-MoE).
    SigmoidGate,
    /// `(y + Σ S_j(x)) / 2` (Cohere 2 MoE)
    Average,
    /// `y + Σ γ_j · S_j(x)`, γ the router's joint shared weights (Inkling). Not with a routing that the call brings, which has none.
    RouterWeighted,
}

/// The experts that every token visits, `Σ S_j(x)` added up in order, each sum rounded. Several that only add up may also be given as one whose I is the sum of theirs:
/// two launches instead of two for each, and other bits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SharedExpert {
    /// How many, 1 to [`MAX_SHARED`].
    pub count: usize,
    /// I of one of them.
    pub intermediate: usize,
    /// Between the two products.
    pub activation: Activation,
    /// How their output joins.
    pub join: SharedJoin,
}

impl SharedExpert {
    /// One shared expert.
    pub fn new(intermediate: usize, activation: Activation, join: SharedJoin) -> Self {
        Self {
            count: 1,
            intermediate,
            activation,
            join,
        }
    }

    pub(super) fn check(&self, router: &RouterConfig) -> Result<()> {
        self.activation.validate()?;
        check_size("shared.intermediate", self.intermediate)?;
        if !(1..=MAX_SHARED).contains(&self.count) {
            let expected = format!("1 to {MAX_SHARED} on a GPU");
            return Err(Error::value("shared.count", expected, self.count));
        }
        let joint = router.joint_shared;
        if self.join == SharedJoin::RouterWeighted && self.count != joint {
            let expected = format!("the {joint} experts that the router weighs");
            return Err(Error::value("shared.count", expected, self.count));
        }
        Ok(())
    }

    fn check_pointers(&self, pointers: &SharedPointers) -> Result<()> {
        if (self.join == SharedJoin::SigmoidGate) != pointers.gate.is_some() {
            return Err(Error::value(
                "shared.gate",
                "weights [1, H] when and only when the shared experts have a sigmoid gate",
                "the opposite",
            ));
        }
        if self.activation.gated != pointers.expert.gate.is_some() {
            return Err(Error::value(
                "shared.expert.gate",
                "a matrix when and only when the activation is gated",
                "the opposite",
            ));
        }
        Ok(())
    }
}

/// Expert `j` of several, to stand alone.
fn nth(experts: &ExpertPointers, j: usize) -> ExpertPointers {
    let at = |ptr: DevicePtr, placement: Placement, dtype: DType| {
        let bytes = match placement {
            Placement::Strided { expert_stride } => expert_stride.wrapping_mul(dtype.size()),
            Placement::Table { .. } => size_of::<u64>(),
        };
        ptr.add(j.wrapping_mul(bytes) as u64)
    };
    let weights = |w: WeightPointers| WeightPointers {
        ptr: at(w.ptr, w.placement, w.dtype),
        ..w
    };
    let bias = |b: BiasPointers| BiasPointers {
        ptr: at(b.ptr, b.placement, b.dtype),
        ..b
    };
    ExpertPointers {
        gate: experts.gate.map(weights),
        up: weights(experts.up),
        down: weights(experts.down),
        gate_bias: experts.gate_bias.map(bias),
        up_bias: experts.up_bias.map(bias),
        down_bias: experts.down_bias.map(bias),
    }
}

impl CudaMoeLayer {
    /// Whether the router's joint shared weights are used.
    pub(super) fn is_router_weighted(&self) -> bool {
        self.shared
            .is_some_and(|s| s.join == SharedJoin::RouterWeighted)
    }
}

impl Call<'_> {
    /// The shared experts' outputs, one below the other, and how they join.
    pub(super) fn shared(&mut self) -> Result<Option<(Shared, SharedSum)>> {
        let (Some(shared), Some(pointers)) = (self.layer.shared, self.pointers.shared) else {
            return Ok(None);
        };
        shared.check_pointers(&pointers)?;
        let (tokens, hidden) = (self.tokens, self.layer.hidden);
        let input = Rows {
            a: self.pointers.x,
            a_rows: tokens,
            gather: None,
            groups: GroupPointers::Single,
            rows: tokens,
        };
        let h = self.rows(self.pieces.shared_h, shared.intermediate, self.layer.dtype);
        let y = self.rows(self.pieces.shared_y, hidden, DType::F32);
        // The workspace has room for all of them, so that this is no overflow.
        let step = tokens * hidden;
        for j in 0..shared.count {
            let out = DeviceRows {
                ptr: y.ptr.add((j * step * DType::F32.size()) as u64),
                ..y
            };
            self.visit(
                &nth(&pointers.expert, j),
                shared.activation,
                [hidden, shared.intermediate],
                input,
                h,
                out,
            )?;
        }
        let mut sum = SharedSum {
            experts: shared.count,
            expert_stride: step,
            weights: DevicePtr::NULL,
        };
        let join = match (shared.join, pointers.gate) {
            (SharedJoin::Average, _) => Shared::Average(y),
            (SharedJoin::SigmoidGate, Some(w)) => {
                let gate = self.rows(self.pieces.shared_gate, 1, DType::F32);
                self.exact(self.pointers.x, w, None, 1, gate)?;
                Shared::SigmoidGate(y, gate.ptr)
            }
            (SharedJoin::RouterWeighted, _) => {
                sum.weights = self.at(self.pieces.shared_weights);
                Shared::Add(y)
            }
            _ => Shared::Add(y),
        };
        Ok(Some((join, sum)))
    }
}
