//! The weighted sum back into tokens.

use super::cpu::moe_cpu;
use super::handle::shared;
use super::memory::{InSlice, Regions, Versioned, moe_matrix, moe_matrix_mut, read_struct};
use super::status::*;
use crate::combine::{Combine, Identity, Routed, Shared, combine_into};
use crate::norm::RmsNorm;
use bytemuck::Zeroable;

/// An RMS norm: x / sqrt(mean(x^2) + eps) * weight * multiplier.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_rms_norm {
    /// sizeof(moe_rms_norm)
    pub struct_size: usize,
    /// [H], as it is applied.
    pub weight: *const f32,
    /// H
    pub len: usize,
    /// Under the root, 0 or more.
    pub eps: f32,
    /// One more factor; 0 counts as 1.
    pub multiplier: f32,
}

// SAFETY: repr(C), begins with its size, numbers and a pointer.
unsafe impl Versioned for moe_rms_norm {}

/// A norm, described to the regions.
pub(super) struct InNorm {
    weight: InSlice<f32>,
    eps: f32,
    multiplier: f32,
}

impl InNorm {
    /// # Safety
    /// `p` is null or valid, with an array as long as it says, until the C function returns.
    pub(super) unsafe fn read(
        regions: &mut Regions,
        argument: &'static str,
        p: *const moe_rms_norm,
    ) -> Checked<Self> {
        // SAFETY: this function's contract.
        let n = unsafe { read_struct(argument, p) }?;
        let multiplier = if n.multiplier == 0.0 {
            1.0
        } else {
            n.multiplier
        };
        Ok(Self {
            // SAFETY: this function's contract.
            weight: unsafe { regions.slice(argument, n.weight, n.len) }?,
            eps: n.eps,
            multiplier,
        })
    }

    pub(super) fn norm(&self, apart: &super::memory::Apart) -> Checked<RmsNorm> {
        let weight = self.weight.get(apart);
        super::memory::probe("norm", weight.len().checked_mul(size_of::<f32>()))?;
        Ok(RmsNorm::new(weight, self.eps)?.with_multiplier(self.multiplier)?)
    }
}

/// moe_combine_args.shared_kind: a + s.
pub const MOE_SHARED_ADD: u32 = 0;
/// a + sigmoid(gate) * s
pub const MOE_SHARED_SIGMOID_GATE: u32 = 1;
/// (a + s) / 2
pub const MOE_SHARED_AVERAGE: u32 = 2;

/// The operands of moe_combine. NULL stands for a step that does not happen. For token t, in f32 and in this order:
///
/// a = sum over slots of weights[t, slot] * ys[row_of_pair[t * slots + slot]]; a * routed_scale; shared experts; norm; + bias; + residual.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_combine_args {
    /// sizeof(moe_combine_args)
    pub struct_size: usize,
    /// [rows, H] f32, columns next to each other.
    pub ys: *const moe_matrix,
    /// [T * slots], or NULL for ones.
    pub weights: *const f32,
    /// Elements of weights.
    pub weights_len: usize,
    /// [T * slots]: rows of ys, or MOE_NONE.
    pub row_of_pair: *const u32,
    /// Elements of row_of_pair.
    pub row_of_pair_len: usize,
    /// Pairs of a token.
    pub slots: usize,
    /// With identity experts: ids [T * slots], those from num_experts on return x.
    pub ids: *const i32,
    /// Elements of ids.
    pub ids_len: usize,
    /// E, with identity experts.
    pub num_experts: usize,
    /// [T, H], with identity experts.
    pub x: *const moe_matrix,
    /// [T, H] f32: the shared experts' output.
    pub shared: *const moe_matrix,
    /// [T] logits, for MOE_SHARED_SIGMOID_GATE.
    pub shared_gate: *const f32,
    /// Elements of shared_gate.
    pub shared_gate_len: usize,
    /// A norm over H.
    pub norm: *const moe_rms_norm,
    /// [H]
    pub bias: *const f32,
    /// Elements of bias.
    pub bias_len: usize,
    /// [T, H], any dtype.
    pub residual: *const moe_matrix,
    /// [T, H], any dtype.
    pub out: *const moe_matrix_mut,
    /// MOE_SHARED_*
    pub shared_kind: u32,
    /// Factor on the sum; 1 changes nothing.
    pub routed_scale: f32,
}

// SAFETY: repr(C), begins with its size, numbers and pointers.
unsafe impl Versioned for moe_combine_args {}

/// Combines the experts' rows into out [T, H]. Allocates only for a norm.
///
/// Errors: those of pointers, MOE_ERROR_SHAPE, MOE_ERROR_VALUE; nothing is written then.
///
/// # Safety
/// cpu: NULL or living. args: NULL or valid, with memory as long as it says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_combine(
    cpu: *const moe_cpu,
    args: *const moe_combine_args,
) -> moe_status {
    // SAFETY: the caller's contract.
    guard(|| unsafe { combine(cpu, args) })
}

/// # Safety
/// As [`moe_combine`].
unsafe fn combine(cpu: *const moe_cpu, args: *const moe_combine_args) -> Checked {
    // SAFETY: this function's contract.
    let cpu = unsafe { shared(cpu) }?;
    // SAFETY: this function's contract.
    let a = unsafe { read_struct("args", args) }?;
    let mut regions = Regions::new();
    // SAFETY: this function's contract, here and below.
    let (ys, weights, row_of_pair, out) = unsafe {
        (
            regions.matrix("ys", a.ys)?,
            regions.optional_slice("weights", a.weights, a.weights_len)?,
            regions.slice("row_of_pair", a.row_of_pair, a.row_of_pair_len)?,
            regions.matrix_mut("out", a.out)?,
        )
    };
    // SAFETY: as above.
    let (ids, x, residual, bias) = unsafe {
        (
            regions.optional_slice("ids", a.ids, a.ids_len)?,
            regions.optional_matrix("x", a.x)?,
            regions.optional_matrix("residual", a.residual)?,
            regions.optional_slice("bias", a.bias, a.bias_len)?,
        )
    };
    // SAFETY: as above.
    let (shared, shared_gate, norm) = unsafe {
        (
            regions.optional_matrix("shared", a.shared)?,
            regions.optional_slice("shared_gate", a.shared_gate, a.shared_gate_len)?,
            match a.norm.is_null() {
                true => None,
                false => Some(InNorm::read(&mut regions, "norm", a.norm)?),
            },
        )
    };
    let apart = regions.apart()?;
    let identity = match (ids, x) {
        (Some(ids), Some(x)) => Some(Identity {
            ids: ids.get(&apart),
            num_experts: a.num_experts,
            x: x.view(&apart)?,
        }),
        (None, None) => None,
        _ => return Err(Fault::value("ids, x", "both or neither", "one of them")),
    };
    let norm = norm.map(|n| n.norm(&apart)).transpose()?;
    let mut operands = Combine::new(Routed::Pairs {
        ys: ys.f32("ys", &apart)?,
        weights: weights.map(|w| w.get(&apart)),
        row_of_pair: row_of_pair.get(&apart),
        slots: a.slots,
        identity,
    });
    operands.routed_scale = a.routed_scale;
    operands.shared = match (shared, a.shared_kind, shared_gate) {
        (None, _, None) => None,
        (Some(s), MOE_SHARED_ADD, None) => Some(Shared::Add(s.f32("shared", &apart)?)),
        (Some(s), MOE_SHARED_AVERAGE, None) => Some(Shared::Average(s.f32("shared", &apart)?)),
        (Some(s), MOE_SHARED_SIGMOID_GATE, Some(g)) => {
            Some(Shared::SigmoidGate(s.f32("shared", &apart)?, g.get(&apart)))
        }
        (_, kind, _) => {
            let expected =
                "MOE_SHARED_*, with shared, and with shared_gate for a sigmoid gate only";
            return Err(Fault::value("shared_kind", expected, kind));
        }
    };
    operands.norm = norm.as_ref();
    operands.bias = bias.map(|b| b.get(&apart));
    operands.residual = residual.map(|r| r.view(&apart)).transpose()?;
    let out = out.view(&apart)?;
    Ok(cpu.run(|cpu| combine_into(cpu, &operands, out))?)
}
