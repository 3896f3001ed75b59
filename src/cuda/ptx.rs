//! Which compiled text a device gets.
//!
//! Text for sm_80 runs on everything from Ampere on: Ada, Hopper and Blackwell included, since the driver compiles it for the device. Text for sm_90a runs
//! on Hopper alone; Blackwell does not take it and gets the sm_80 kernels.

use super::plan::{ComputeCapability, Module};
use crate::error::{Error, Result};

/// The oldest compute capability that any of the texts runs on.
pub const OLDEST: ComputeCapability = (8, 0);

/// The committed text of a file, or rebuilt by feature `build-ptx`.
#[cfg(not(feature = "build-ptx"))]
macro_rules! text {
    ($path:literal) => {
        include_str!(concat!("../../kernels/ptx/", $path, ".ptx"))
    };
}
#[cfg(feature = "build-ptx")]
macro_rules! text {
    ($path:literal) => {
        include_str!(concat!(env!("OUT_DIR"), "/ptx/", $path, ".ptx"))
    };
}

/// The PTX of `module` for a device, as it is handed to `cuModuleLoadData` (which wants a NUL after it).
///
/// ```
/// use moe_kernels::cuda::plan::Module;
/// use moe_kernels::cuda::ptx;
/// assert!(ptx(Module::Routing, (12, 0))?.contains(".target sm_80"));
/// assert!(ptx(Module::GroupedGemmSm90, (9, 0))?.contains(".target sm_90a"));
/// assert!(ptx(Module::GroupedGemmSm90, (10, 0)).is_err()); // Blackwell takes the sm_80 kernels
/// # Ok::<(), moe_kernels::Error>(())
/// ```
///
/// # Errors
/// [`Error::CudaUnsupportedGpu`] when no text of the module runs on such a device.
pub fn ptx(module: Module, compute_capability: ComputeCapability) -> Result<&'static str> {
    let needed = match module {
        Module::GroupedGemmSm90 => "9.0",
        _ => "8.0 or later",
    };
    let runs = match module {
        Module::GroupedGemmSm90 => compute_capability == (9, 0),
        _ => compute_capability >= OLDEST,
    };
    if !runs {
        return Err(Error::CudaUnsupportedGpu {
            what: module.stem(),
            needed,
            found: compute_capability,
        });
    }
    Ok(match module {
        Module::Routing => text!("sm_80/routing"),
        Module::Permute => text!("sm_80/permute"),
        Module::Combine => text!("sm_80/combine"),
        Module::Norm => text!("sm_80/norm"),
        Module::GroupedGemmF32 => text!("sm_80/grouped_gemm_f32"),
        Module::GroupedGemmSm80 => text!("sm_80/grouped_gemm_sm80"),
        Module::GroupedGemmDecode => text!("sm_80/grouped_gemm_decode"),
        Module::GroupedGemmSm90 => text!("sm_90a/grouped_gemm_sm90"),
    })
}

impl Module {
    /// The same as [`ptx`].
    ///
    /// # Errors
    /// [`Error::CudaUnsupportedGpu`] when no text of the module runs on such a device.
    pub fn ptx(self, compute_capability: ComputeCapability) -> Result<&'static str> {
        ptx(self, compute_capability)
    }
}
