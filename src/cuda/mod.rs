//! The NVIDIA GPU backend.

pub mod combine;
pub mod grouped_gemm;
pub mod permute;
pub mod plan;
mod ptx;
pub mod routing;

pub use plan::{ComputeCapability, DeviceInfo, DevicePtr, Launch, Module, Swizzle, TensorMap};
pub use ptx::ptx;
