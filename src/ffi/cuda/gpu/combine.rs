//! The weighted sum.

use super::memory::{Array, DeviceRegions, Matrix};
use super::norm;
use crate::cuda::RawStream;
use crate::cuda::combine::{CombineOperands, Identity, Routed, Shared, plan_combine};
use crate::cuda::raw::CurrentGpu;
use crate::ffi::combine::{MOE_SHARED_ADD, MOE_SHARED_AVERAGE, MOE_SHARED_SIGMOID_GATE};
use crate::ffi::cuda::moe_cuda_combine_args;
use crate::ffi::memory::read_struct;
use crate::ffi::status::*;
use crate::shape::pairs;
use core::ffi::c_void;

/// # Safety
/// As `moe_cuda_combine`.
pub(in crate::ffi::cuda) unsafe fn combine(
    stream: *mut c_void,
    args: *const moe_cuda_combine_args,
) -> Checked {
    // SAFETY: this function's contract.
    let a = unsafe { read_struct("args", args) }?;
    let mut regions = DeviceRegions::new();
    // SAFETY: this function's contract.
    let operands = unsafe { read(&mut regions, &a) }?;
    regions.apart()?;
    let gpu = CurrentGpu::get()?;
    let launch = plan_combine(&operands, gpu.info())?;
    // SAFETY: the caller's promise for stream and memory, whose extents are what the caller says.
    Ok(unsafe { gpu.queue(RawStream(stream), core::iter::once(&launch)) }?)
}

/// # Safety
/// The pointers of `a` are null or valid.
unsafe fn read(regions: &mut DeviceRegions, a: &moe_cuda_combine_args) -> Checked<CombineOperands> {
    // SAFETY: this function's contract.
    let out = unsafe { regions.matrix_mut("out", a.out) }?;
    // SAFETY: this function's contract.
    let routed = unsafe { routed(regions, a, &out) }?;
    let mut operands = CombineOperands::new(out.rows, out.cols, routed, out.data());
    operands.routed_scale = a.routed_scale;
    let bias = Array::of("bias", a.bias, a.bias_len);
    operands.bias = bias.exactly_or_absent(regions, out.cols)?;
    // SAFETY: this function's contract.
    unsafe {
        operands.shared = shared(regions, a, &out)?;
        operands.norm = norm(regions, "norm", a.norm, out.cols)?;
        operands.residual = regions.residual(a.residual, &out)?;
    }
    Ok(operands)
}

/// Pairs and their rows.
///
/// # Safety
/// As [`read`].
unsafe fn routed(
    regions: &mut DeviceRegions,
    a: &moe_cuda_combine_args,
    out: &Matrix,
) -> Checked<Routed> {
    // SAFETY: this function's contract.
    let (ys, x) = unsafe {
        (
            regions.matrix("ys", a.ys)?,
            regions.optional_matrix("x", a.x)?,
        )
    };
    let pairs = pairs(out.rows, a.slots)?;
    let ids = Array::of("ids", a.ids, a.ids_len);
    let identity = match (x, ids.is_absent()) {
        (None, true) => None,
        (Some(x), false) => Some(Identity {
            ids: ids.exactly(regions, pairs)?,
            num_experts: a.num_experts,
            x: x.expect(out.rows, out.cols)?,
        }),
        // Without tokens there are no ids either.
        (Some(x), true) if pairs == 0 => x.expect(out.rows, out.cols).map(|_| None)?,
        _ => return Err(Fault::value("ids, x", "both or neither", "one of them")),
    };
    let weights = Array::of("weights", a.weights, a.weights_len);
    let row_of_pair = Array::of("row_of_pair", a.row_of_pair, a.row_of_pair_len);
    Ok(Routed::Pairs {
        ys: ys.expect(ys.rows, out.cols)?,
        rows: ys.rows,
        slots: a.slots,
        weights: weights.exactly_or_absent(regions, pairs)?,
        row_of_pair: row_of_pair.exactly(regions, pairs)?,
        identity,
    })
}

/// The shared experts' output and how it joins.
///
/// # Safety
/// As [`read`].
unsafe fn shared(
    regions: &mut DeviceRegions,
    a: &moe_cuda_combine_args,
    out: &Matrix,
) -> Checked<Option<Shared>> {
    // SAFETY: this function's contract.
    let shared = unsafe { regions.optional_matrix("shared", a.shared) }?
        .map(|s| s.expect(out.rows, out.cols))
        .transpose()?;
    let gate = Array::of("shared_gate", a.shared_gate, a.shared_gate_len);
    // Without tokens there are no gates either.
    let has_gate = !gate.is_absent() || (out.rows == 0 && a.shared_kind == MOE_SHARED_SIGMOID_GATE);
    Ok(match (shared, a.shared_kind, has_gate) {
        (None, MOE_SHARED_ADD, false) => None,
        (Some(s), MOE_SHARED_ADD, false) => Some(Shared::Add(s)),
        (Some(s), MOE_SHARED_AVERAGE, false) => Some(Shared::Average(s)),
        (Some(s), MOE_SHARED_SIGMOID_GATE, true) => {
            Some(Shared::SigmoidGate(s, gate.exactly(regions, out.rows)?))
        }
        (_, kind, _) => {
            let expected =
                "MOE_SHARED_*, with shared, and with shared_gate for a sigmoid gate only";
            return Err(Fault::value("shared_kind", expected, kind));
        }
    })
}
