//! The GPU's side of the C boundary: the bits of the CPU's C calls (on a GPU or the emulator), a status for everything that is wrong, and without a driver, or in a
//! library without the feature `cuda`, a refusal that says why.
#![allow(unsafe_code)] // what C does

#[path = "../common/mod.rs"]
mod common;

#[cfg(feature = "cuda")]
#[path = "../common/gpu.rs"]
mod gpu;

mod absent;
#[cfg(feature = "cuda")]
mod arbitrary;
#[cfg(feature = "cuda")]
mod layer;
#[cfg(feature = "cuda")]
mod operands;
#[cfg(feature = "cuda")]
mod refused;
#[cfg(feature = "cuda")]
mod refused_stages;
#[cfg(feature = "cuda")]
mod stages;
#[cfg(feature = "cuda")]
mod world;

use moe_kernels::ffi::*;
use std::ffi::CStr;

/// The sizes of all tests.
#[cfg(feature = "cuda")]
mod sizes {
    pub const T: usize = 11;
    pub const H: usize = 40;
    pub const I: usize = 24;
    pub const E: usize = 8;
    pub const K: usize = 2;
}
#[cfg(feature = "cuda")]
use sizes::*;

fn last_error() -> String {
    // SAFETY: the text stays until this thread's next error.
    unsafe { CStr::from_ptr(moe_last_error()) }
        .to_string_lossy()
        .into_owned()
}

#[cfg(feature = "cuda")]
#[track_caller]
fn must(status: moe_status) {
    assert_eq!(status, MOE_OK, "{}", last_error());
}

/// Sizes of the structs are the interface: they may only grow, with new fields at the end and `FIRST_SIZE` left as it was.
#[cfg(target_pointer_width = "64")]
#[test]
fn structs_keep_their_sizes() {
    let sizes = [
        size_of::<moe_cuda_device>(),
        size_of::<moe_device_matrix>(),
        size_of::<moe_device_weights>(),
        size_of::<moe_cuda_layer_config>(),
        size_of::<moe_cuda_expert_weights>(),
        size_of::<moe_cuda_rms_norm>(),
        size_of::<moe_cuda_forward>(),
        size_of::<moe_cuda_route_args>(),
        size_of::<moe_cuda_permute_args>(),
        size_of::<moe_cuda_copy_args>(),
        size_of::<moe_cuda_gemm_args>(),
        size_of::<moe_cuda_combine_args>(),
    ];
    assert_eq!(sizes, [40, 48, 64, 96, 80, 32, 224, 144, 120, 56, 144, 160]);
}
