//! The GPU's entry points: addresses and a stream in the calling thread's current context.
//!
//! The types and functions of the header are here, the same in every build. What they do is in `gpu`, which a build without the feature `cuda` lacks: its functions return
//! [`MOE_ERROR_UNSUPPORTED`] and say so. They exist nevertheless, so that one header is true of every library, and a program that links is told at run time
//! instead of being refused by a linker or loader.

mod device;
mod forward;
mod layer;
mod stages;

#[cfg(feature = "cuda")]
mod gpu;

pub use device::*;
pub use forward::*;
pub use layer::*;
pub use stages::*;

use super::memory::Versioned;
use super::status::*;
use bytemuck::Zeroable;

/// Runs a body that needs the GPU backend under the guard; in a library without it the arguments are named and the call refused.
macro_rules! on_gpu {
    (|| $body:expr) => { on_gpu!(| | $body) };
    (|$($argument:ident),*| $body:expr) => {{
        #[cfg(feature = "cuda")]
        let status = $crate::ffi::status::guard(|| $body);
        #[cfg(not(feature = "cuda"))]
        let status = {
            $(let _ = $argument;)*
            $crate::ffi::status::guard(|| Err($crate::ffi::cuda::no_backend()))
        };
        status
    }};
}
use on_gpu;

#[cfg(not(feature = "cuda"))]
fn no_backend() -> Fault {
    Fault::new(
        MOE_ERROR_UNSUPPORTED,
        "cuda: this library was built without its GPU backend; build it with the feature cuda (scripts/install-capi.sh PREFIX --features cuda)",
    )
}

/// What the current context's device is. Set struct_size.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_cuda_device {
    /// sizeof(moe_cuda_device)
    pub struct_size: usize,
    /// Major number of the compute capability: 9 for an H100.
    pub compute_major: u32,
    /// Minor number.
    pub compute_minor: u32,
    /// Multiprocessors.
    pub sm_count: u32,
    /// Bytes of shared memory that one block may have.
    pub shared_per_block: u32,
    /// Bytes of the L2 cache.
    pub l2_bytes: u64,
    /// The CUDA version that the driver supports: 12040 for 12.4.
    pub driver_version: u32,
    /// 0
    pub reserved: u32,
}

// SAFETY: repr(C), begins with its size, numbers.
unsafe impl Versioned for moe_cuda_device {}

/// 1 when a driver is there and a GPU that the kernels run on (compute capability 8.0 or later), else 0, and moe_last_error() says what is missing. Starts the driver,
/// makes no context.
#[unsafe(no_mangle)]
pub extern "C" fn moe_cuda_is_available() -> u32 {
    let status = on_gpu!(|| Ok(crate::cuda::check_available()?));
    u32::from(status == MOE_OK)
}

/// Describes the device of the context that is current on the calling thread.
///
/// Errors: MOE_ERROR_UNSUPPORTED without a driver, a current context, or a GPU of compute capability 8.0; those of the struct.
///
/// # Safety
/// device: NULL or writable for its struct_size bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_cuda_device_query(device: *mut moe_cuda_device) -> moe_status {
    // SAFETY: the caller's contract.
    on_gpu!(|device| unsafe { gpu::device_query(device) })
}
