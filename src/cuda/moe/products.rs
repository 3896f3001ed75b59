//! The layer's matrix products: gate, experts, shared expert.

use super::plan::Call;
use super::weights::{ExpertPointers, WeightPointers};
use super::{SharedExpert, SharedJoin, SharedPointers};
use crate::cuda::DevicePtr;
use crate::cuda::combine::{DeviceRows, Shared};
use crate::cuda::grouped_gemm::{
    BiasPointers, GatherPointers, GroupPointers, GroupedGemm, Numerics, plan_grouped_gemm,
};
use crate::element::DType;
use crate::error::{Error, Result};
use crate::grouped_gemm::{Activation, ActivationFunction};

/// No activation.
const LINEAR: Activation = Activation::plain(ActivationFunction::Identity);

/// The rows of one expert product, and where they come from.
#[derive(Clone, Copy)]
struct Rows {
    a: DeviceRows,
    a_rows: usize,
    gather: Option<GatherPointers>,
    groups: GroupPointers,
    rows: usize,
}

impl Call<'_> {
    fn product(&mut self, product: &GroupedGemm) -> Result<()> {
        let launch = plan_grouped_gemm(product, self.device)?;
        self.plan.push(launch)
    }

    /// An ordinary product of x with one matrix `[n, H]` in exact f32: `out [T, n] = x · Wᵀ + b`.
    pub(super) fn dense(
        &mut self,
        w: DeviceRows,
        bias: Option<DevicePtr>,
        n: usize,
        out: DeviceRows,
    ) -> Result<()> {
        self.product(&GroupedGemm {
            a: self.pointers.x,
            a_rows: self.tokens,
            gather: None,
            groups: GroupPointers::Single,
            gate: None,
            up: WeightPointers {
                ptr: w.ptr,
                dtype: w.dtype,
                row_stride: w.stride,
                expert_stride: 0,
            },
            gate_bias: None,
            up_bias: bias.map(|ptr| BiasPointers::contiguous(ptr, DType::F32, n)),
            activation: LINEAR,
            out,
            rows: self.tokens,
            n,
            k: self.layer.hidden,
            numerics: Numerics::Exact,
            strict: true,
        })
    }

    /// An expert's two products over rows: h, then the output.
    fn visit(
        &mut self,
        experts: &ExpertPointers,
        activation: Activation,
        intermediate: usize,
        input: Rows,
        h: DeviceRows,
        out: DeviceRows,
    ) -> Result<()> {
        let (hidden, numerics, strict) =
            (self.layer.hidden, self.layer.numerics, self.layer.strict);
        let first = GroupedGemm {
            a: input.a,
            a_rows: input.a_rows,
            gather: input.gather,
            groups: input.groups,
            gate: experts.gate,
            up: experts.up,
            gate_bias: experts.gate_bias,
            up_bias: experts.up_bias,
            activation,
            out: h,
            rows: input.rows,
            n: intermediate,
            k: hidden,
            numerics,
            strict,
        };
        self.product(&first)?;
        self.product(&GroupedGemm {
            a: h,
            a_rows: input.rows,
            gather: None,
            gate: None,
            up: experts.down,
            gate_bias: None,
            up_bias: experts.down_bias,
            activation: LINEAR,
            out,
            n: hidden,
            k: intermediate,
            ..first
        })
    }

    /// The pairs through their experts: h, then ys.
    pub(super) fn experts(&mut self, weights: DevicePtr) -> Result<()> {
        let layer = self.layer;
        let local = &layer.local_experts;
        // Those of the local experts: offsets are absolute, and the others have no rows.
        let first = local.start as u64 * 4;
        let input = Rows {
            a: self.pointers.x,
            a_rows: self.tokens,
            gather: Some(GatherPointers {
                pair_of_row: self.at(self.pieces.pair_of_row),
                slots: layer.router.slots(),
                input_scale: if layer.weight_on_input {
                    weights
                } else {
                    DevicePtr::NULL
                },
            }),
            groups: GroupPointers::Ragged {
                offsets: self.at(self.pieces.offsets).add(first),
                counts: self.at(self.pieces.counts).add(first),
                experts: local.len(),
            },
            rows: self.pieces.rows,
        };
        let h = self.rows(self.pieces.h, layer.intermediate, layer.dtype);
        let ys = self.rows(self.pieces.ys, layer.hidden, layer.ys_dtype);
        self.visit(
            &self.pointers.experts,
            layer.activation,
            layer.intermediate,
            input,
            h,
            ys,
        )
    }

    /// The shared expert's output, and how it joins.
    pub(super) fn shared(&mut self) -> Result<Option<Shared>> {
        let (Some(shared), Some(pointers)) = (self.layer.shared, self.pointers.shared) else {
            return Ok(None);
        };
        check_shared(&shared, &pointers)?;
        let input = Rows {
            a: self.pointers.x,
            a_rows: self.tokens,
            gather: None,
            groups: GroupPointers::Single,
            rows: self.tokens,
        };
        let h = self.rows(self.pieces.shared_h, shared.intermediate, self.layer.dtype);
        let y = self.rows(self.pieces.shared_y, self.layer.hidden, DType::F32);
        self.visit(
            &pointers.expert,
            shared.activation,
            shared.intermediate,
            input,
            h,
            y,
        )?;
        Ok(Some(match (shared.join, pointers.gate) {
            (SharedJoin::Average, _) => Shared::Average(y),
            (SharedJoin::SigmoidGate, Some(w)) => {
                let gate = self.rows(self.pieces.shared_gate, 1, DType::F32);
                self.dense(w, None, 1, gate)?;
                Shared::SigmoidGate(y, gate.ptr)
            }
            _ => Shared::Add(y),
        }))
    }
}

fn check_shared(shared: &SharedExpert, pointers: &SharedPointers) -> Result<()> {
    if (shared.join == SharedJoin::SigmoidGate) != pointers.gate.is_some() {
        return Err(Error::value(
            "shared.gate",
            "weights [1, H] when and only when the shared expert has a sigmoid gate",
            "the opposite",
        ));
    }
    if shared.activation.gated != pointers.expert.gate.is_some() {
        return Err(Error::value(
            "shared.expert.gate",
            "a matrix when and only when the activation is gated",
            "the opposite",
        ));
    }
    Ok(())
}
