//! Without a driver, and in a library without the feature `cuda`.

use crate::last_error;
use bytemuck::Zeroable;
use moe_kernels::ffi::*;

/// Whether no GPU can be had here, with the reason.
fn why_not() -> Option<String> {
    match moe_cuda_is_available() {
        0 => Some(last_error()),
        found => {
            assert_eq!(found, 1);
            None
        }
    }
}

#[test]
fn a_missing_gpu_is_said_in_words() {
    let Some(why) = why_not() else {
        return; // the other files test what there is
    };
    let said = match cfg!(feature = "cuda") {
        true => ["driver", "GPU"].iter().any(|word| why.contains(word)),
        false => why.contains("built without its GPU backend"),
    };
    assert!(said, "{why}");
    let mut device = moe_cuda_device::zeroed();
    device.struct_size = size_of::<moe_cuda_device>();
    // SAFETY: a struct as long as it says.
    let status = unsafe { moe_cuda_device_query(&mut device) };
    assert_eq!(status, MOE_ERROR_UNSUPPORTED, "{}", last_error());
    assert_eq!(last_error(), why);
    assert_eq!((device.sm_count, device.driver_version), (0, 0));
}

/// Every function is there in every build, and none crashes.
#[cfg(not(feature = "cuda"))]
#[test]
fn every_function_refuses_without_the_feature() {
    use std::ptr::{null, null_mut};
    let (mut layer, mut size) = (null_mut(), 7);
    // SAFETY: NULL is allowed everywhere, and nothing is followed in such a library.
    let statuses = unsafe {
        [
            moe_cuda_layer_create(null(), null(), &mut layer),
            moe_cuda_layer_workspace_size(null(), 1, &mut size),
            moe_cuda_layer_prepare(null(), null()),
            moe_cuda_layer_forward(null(), null_mut(), null()),
            moe_cuda_route_workspace_size(null(), 1, &mut size),
            moe_cuda_route(null(), null_mut(), null()),
            moe_cuda_permute_sizes(1, 1, null(), &mut size, null_mut()),
            moe_cuda_permute(null_mut(), null()),
            moe_cuda_copy_rows(null_mut(), null()),
            moe_cuda_grouped_gemm(null_mut(), null()),
            moe_cuda_combine(null_mut(), null()),
        ]
    };
    assert_eq!(statuses, [MOE_ERROR_UNSUPPORTED; 11]);
    assert!(layer.is_null() && size == 7);
    // SAFETY: NULL is allowed.
    assert_eq!(unsafe { moe_cuda_layer_destroy(null_mut()) }, MOE_OK);
}
