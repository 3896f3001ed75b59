//! The grouped product.

use super::memory::{Array, DeviceRegions};
use super::numerics;
use crate::cuda::RawStream;
use crate::cuda::grouped_gemm::{GatherPointers, GroupPointers, GroupedGemm, plan_grouped_gemm};
use crate::cuda::raw::CurrentGpu;
use crate::error::checked_mul;
use crate::ffi::cuda::moe_cuda_gemm_args;
use crate::ffi::grouped_gemm::activation;
use crate::ffi::memory::read_struct;
use crate::ffi::router::flag;
use crate::ffi::status::*;
use crate::grouped_gemm::{Activation, ActivationFunction};
use core::ffi::c_void;

/// # Safety
/// As `moe_cuda_grouped_gemm`.
pub(in crate::ffi::cuda) unsafe fn grouped_gemm(
    stream: *mut c_void,
    args: *const moe_cuda_gemm_args,
) -> Checked {
    // SAFETY: this function's contract.
    let a = unsafe { read_struct("args", args) }?;
    let mut regions = DeviceRegions::new();
    // SAFETY: this function's contract.
    let product = unsafe { read(&mut regions, &a) }?;
    regions.apart()?;
    let gpu = CurrentGpu::get()?;
    let launch = plan_grouped_gemm(&product, gpu.info())?;
    // SAFETY: the caller's promise for stream and memory, whose extents are what the caller says.
    Ok(unsafe { gpu.queue(RawStream(stream), core::iter::once(&launch)) }?)
}

/// # Safety
/// The pointers of `a` are null or valid.
unsafe fn read(regions: &mut DeviceRegions, a: &moe_cuda_gemm_args) -> Checked<GroupedGemm> {
    // SAFETY: this function's contract.
    let (input, up, gate, out) = unsafe {
        (
            regions.matrix("a", a.a)?,
            regions.weights("up", a.up)?,
            regions.optional_weights("gate", a.gate)?,
            regions.matrix_mut("out", a.out)?,
        )
    };
    let (experts, n, k) = (up.experts, up.rows, up.cols);
    let activation = match a.activation.is_null() {
        true => Activation::plain(ActivationFunction::Identity),
        // SAFETY: this function's contract.
        false => unsafe { activation(a.activation) }?,
    };
    // SAFETY: this function's contract.
    let (gate_bias, up_bias) = unsafe {
        (
            regions.optional_matrix("gate_bias", a.gate_bias)?,
            regions.optional_matrix("up_bias", a.up_bias)?,
        )
    };
    if gate_bias.is_some() && gate.is_none() {
        return Err(Fault::value("gate_bias", "NULL without a gate", "a matrix"));
    }
    let groups = groups(regions, a, experts)?;
    Ok(GroupedGemm {
        a: input.expect(input.rows, k)?,
        a_rows: input.rows,
        gather: gather(regions, a, out.rows, input.rows)?,
        groups,
        gate: gate.map(|g| g.expect(experts, n, k)).transpose()?,
        up: up.expect(experts, n, k)?,
        gate_bias: gate_bias.map(|b| b.biases(experts, n)).transpose()?,
        up_bias: up_bias.map(|b| b.biases(experts, n)).transpose()?,
        activation,
        out: out.expect(out.rows, n)?,
        rows: out.rows,
        n,
        k,
        numerics: numerics(a.numerics)?,
        strict: flag("strict", a.strict)?,
    })
}

/// Which rows are whose.
fn groups(
    regions: &mut DeviceRegions,
    a: &moe_cuda_gemm_args,
    experts: usize,
) -> Checked<GroupPointers> {
    let offsets = Array::of("offsets", a.offsets, a.offsets_len);
    let counts = Array::of("counts", a.counts, a.counts_len);
    match (offsets.is_absent(), counts.is_absent(), experts) {
        (true, true, 1) => Ok(GroupPointers::Single),
        (true, true, _) => {
            let expected = "offsets and counts with several matrices";
            Err(Fault::value("offsets", expected, "none"))
        }
        _ => Ok(GroupPointers::Ragged {
            offsets: offsets.at_least(regions, experts.saturating_add(1))?,
            counts: counts.at_least(regions, experts)?,
            experts,
        }),
    }
}

/// Rows of A by pair.
fn gather(
    regions: &mut DeviceRegions,
    a: &moe_cuda_gemm_args,
    rows: usize,
    a_rows: usize,
) -> Checked<Option<GatherPointers>> {
    let pair_of_row = Array::of("pair_of_row", a.pair_of_row, a.pair_of_row_len);
    let scale = Array::of("input_scale", a.input_scale, a.input_scale_len);
    if pair_of_row.is_absent() {
        scale.must_be_absent("none without pair_of_row")?;
        return match a.slots {
            0 => Ok(None),
            other => Err(Fault::value("slots", "0 without pair_of_row", other)),
        };
    }
    Ok(Some(GatherPointers {
        pair_of_row: pair_of_row.at_least(regions, rows)?,
        slots: a.slots,
        input_scale: scale
            .exactly_or_absent(regions, checked_mul(a_rows, a.slots, "input_scale")?)?,
    }))
}
