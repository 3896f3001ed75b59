//! What the GPU's entry points do, in builds with the feature `cuda`.
//!
//! As on the CPU's side nothing is computed here: a call is read, checked on the host as far as a host can (see `memory`), planned for the current context's device and
//! queued. What is left to the caller is that the addresses are this context's memory, and there as far as the call says.

mod combine;
mod forward;
mod gemm;
mod layer;
mod memory;
mod permute;
mod route;
mod weights;

pub(super) use combine::combine;
pub(super) use forward::forward;
pub(super) use gemm::grouped_gemm;
pub(super) use layer::{layer_create, workspace_size};
pub(super) use permute::{copy_rows, permute, permute_sizes};
pub(super) use route::{route, route_workspace_size};

use super::moe_cuda_device;
use crate::cuda::combine::Norm;
use crate::cuda::grouped_gemm::Numerics;
use crate::ffi::cuda::{MOE_CUDA_EXACT, MOE_CUDA_TENSOR_CORES, MOE_CUDA_TF32, moe_cuda_rms_norm};
use crate::ffi::memory::{Regions, read_struct, write_struct};
use crate::ffi::status::*;
use crate::routing::Router;
use bytemuck::Zeroable;
use memory::{Array, DeviceRegions};

/// # Safety
/// `device` is null or writable for its struct_size bytes.
pub(super) unsafe fn device_query(device: *mut moe_cuda_device) -> Checked {
    let info = crate::cuda::current_device_info()?;
    let mut found = moe_cuda_device::zeroed();
    (found.compute_major, found.compute_minor) = info.compute_capability;
    found.sm_count = info.sm_count;
    found.shared_per_block = info.shared_per_block;
    found.l2_bytes = info.l2_bytes;
    found.driver_version = crate::cuda::driver_version()?;
    // SAFETY: this function's contract.
    unsafe { write_struct("device", device, &found) }
}

/// Writes numbers to places of the caller's, once all of them are good.
///
/// # Safety
/// The places are null or writable.
unsafe fn answer<const N: usize>(
    places: [(&'static str, *mut usize); N],
    values: [usize; N],
) -> Checked {
    let mut regions = Regions::new();
    let mut slices = [const { None }; N];
    for (slice, (argument, place)) in slices.iter_mut().zip(places) {
        // SAFETY: this function's contract.
        *slice = Some(unsafe { regions.slice_mut(argument, place, 1) }?);
    }
    let apart = regions.apart()?;
    for (slice, value) in slices.into_iter().flatten().zip(values) {
        slice.get(&apart)[0] = value;
    }
    Ok(())
}

fn numerics(value: u32) -> Checked<Numerics> {
    match value {
        MOE_CUDA_TENSOR_CORES => Ok(Numerics::TensorCores),
        MOE_CUDA_TF32 => Ok(Numerics::Tf32),
        MOE_CUDA_EXACT => Ok(Numerics::Exact),
        other => Err(Fault::value("numerics", "MOE_CUDA_*", other)),
    }
}

/// A norm over `hidden` columns, if there is one.
///
/// # Safety
/// `p` is null or valid.
unsafe fn norm(
    regions: &mut DeviceRegions,
    argument: &'static str,
    p: *const moe_cuda_rms_norm,
    hidden: usize,
) -> Checked<Option<Norm>> {
    if p.is_null() {
        return Ok(None);
    }
    // SAFETY: this function's contract.
    let n = unsafe { read_struct(argument, p) }?;
    let weight = Array::of(argument, n.weight, n.len).exactly(regions, hidden)?;
    Ok(Some(Norm {
        weight,
        eps: n.eps,
        multiplier: match n.multiplier {
            0.0 => 1.0,
            other => other,
        },
    }))
}

/// Which tensors a router had on the host: a call on the GPU must bring them, too.
#[derive(Clone, Copy)]
struct RouterTensors {
    correction_bias: bool,
    per_expert_scale: bool,
}

impl RouterTensors {
    fn of(router: &Router) -> Self {
        Self {
            correction_bias: router.correction_bias().is_some(),
            per_expert_scale: router.per_expert_scale().is_some(),
        }
    }

    /// Refuses a call without them, whose routing would silently be another than the CPU's.
    fn expect(self, correction_bias: Array, per_expert_scale: Array) -> Checked {
        for (had, array) in [
            (self.correction_bias, correction_bias),
            (self.per_expert_scale, per_expert_scale),
        ] {
            if had && array.is_absent() {
                let expected = "device memory, since the router has one on the host";
                return Err(Fault::value(array.argument, expected, "none"));
            }
        }
        Ok(())
    }
}
