//! The layer's matrix products, and the norms of rows between them.

use super::PostNorm;
use super::plan::Call;
use super::weights::{ExpertPointers, WeightPointers};
use crate::cuda::DevicePtr;
use crate::cuda::combine::DeviceRows;
use crate::cuda::grouped_gemm::{
    BiasPointers, GatherPointers, GroupPointers, GroupedGemm, Numerics, plan_grouped_gemm,
};
use crate::cuda::norm::{NormRows, plan_norm_rows};
use crate::element::DType;
use crate::error::Result;
use crate::grouped_gemm::{Activation, ActivationFunction};

/// No activation.
const LINEAR: Activation = Activation::plain(ActivationFunction::Identity);

/// The rows of one expert product, and where they come from.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) a: DeviceRows,
    pub(super) a_rows: usize,
    pub(super) gather: Option<GatherPointers>,
    pub(super) groups: GroupPointers,
    pub(super) rows: usize,
}

impl Call<'_> {
    fn product(&mut self, product: &GroupedGemm) -> Result<()> {
        let launch = plan_grouped_gemm(product, self.device)?;
        self.plan.push(launch)
    }

    /// Rows normalised by a launch of their own.
    pub(super) fn norm_rows(&mut self, rows: &NormRows) -> Result<()> {
        let launch = plan_norm_rows(rows)?;
        self.plan.push(launch)
    }

    /// An ordinary product with one matrix `w [n, H]` in exact f32, as the CPU packs its gates: `out [T, n] = a · Wᵀ + b`.
    pub(super) fn exact(
        &mut self,
        a: DeviceRows,
        w: DeviceRows,
        bias: Option<DevicePtr>,
        n: usize,
        out: DeviceRows,
    ) -> Result<()> {
        let product = self.one_matrix(a, w, n, self.layer.hidden, out);
        self.product(&GroupedGemm {
            up_bias: bias.map(|ptr| BiasPointers::contiguous(ptr, DType::F32, n)),
            numerics: Numerics::ExactWidened,
            strict: true,
            ..product
        })
    }

    /// The same as the experts' products are summed.
    pub(super) fn dense(
        &mut self,
        a: DeviceRows,
        w: DeviceRows,
        n: usize,
        k: usize,
        out: DeviceRows,
    ) -> Result<()> {
        self.product(&self.one_matrix(a, w, n, k, out))
    }

    fn one_matrix(
        &self,
        a: DeviceRows,
        w: DeviceRows,
        n: usize,
        k: usize,
        out: DeviceRows,
    ) -> GroupedGemm {
        GroupedGemm {
            a,
            a_rows: self.tokens,
            gather: None,
            groups: GroupPointers::Single,
            gate: None,
            up: WeightPointers::strided(w.ptr, w.dtype, w.stride, 0),
            gate_bias: None,
            up_bias: None,
            activation: LINEAR,
            out,
            rows: self.tokens,
            n,
            k,
            numerics: self.layer.numerics,
            strict: self.layer.strict,
        }
    }

    /// An expert's two products over rows: h, then the output.
    pub(super) fn visit(
        &mut self,
        experts: &ExpertPointers,
        activation: Activation,
        [hidden, intermediate]: [usize; 2],
        input: Rows,
        h: DeviceRows,
        out: DeviceRows,
    ) -> Result<()> {
        let (numerics, strict) = (self.layer.numerics, self.layer.strict);
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

    /// The pairs through their experts: h, then ys, normalised if the layer does that.
    pub(super) fn experts(&mut self, weights: DevicePtr) -> Result<()> {
        let layer = self.layer;
        let a = self.enter()?;
        let local = &layer.local_experts;
        // Those of the local experts: offsets are absolute, and the others have no rows.
        let first = local.start as u64 * 4;
        let offsets = self.at(self.pieces.offsets);
        let input = Rows {
            a,
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
                offsets: offsets.add(first),
                counts: self.at(self.pieces.counts).add(first),
                experts: local.len(),
            },
            rows: self.pieces.rows,
        };
        let width = layer.expert_hidden();
        let h = self.rows(self.pieces.h, layer.intermediate, layer.dtype);
        let ys = self.rows(self.pieces.ys, width, layer.ys_dtype);
        let experts = &self.pointers.experts;
        let sizes = [width, layer.intermediate];
        self.visit(experts, layer.activation, sizes, input, h, ys)?;
        let (Some(order), Some(norm)) = (layer.post_norm, self.pointers.post_norm) else {
            return Ok(());
        };
        self.norm_rows(&NormRows {
            scale_first: order == PostNorm::ScaleFirst,
            // Rows from the last expert's end on are nobody's.
            used: offsets.add(layer.router.num_experts as u64 * 4),
            ..NormRows::new(self.pieces.rows, width, ys, norm, ys)
        })
    }
}
