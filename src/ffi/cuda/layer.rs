//! `moe_cuda_layer`: what a layer on the GPU does. Its weights are named in each call.

use super::on_gpu;
use crate::ffi::grouped_gemm::moe_activation;
use crate::ffi::memory::{Versioned, moe_dtype};
use crate::ffi::router::moe_router;
use crate::ffi::status::*;
use bytemuck::Zeroable;

/// moe_cuda_layer_config.numerics, moe_cuda_gemm_args.numerics: f16 and bf16 on tensor cores, f32 exactly.
pub const MOE_CUDA_TENSOR_CORES: u32 = 0;
/// The same, with f32 on tensor cores, rounded to TF32.
pub const MOE_CUDA_TF32: u32 = 1;
/// Every format by chains of f32 fused multiply-adds: the CPU's bits.
pub const MOE_CUDA_EXACT: u32 = 2;

/// What a layer on the GPU does. Zeros (with struct_size) are the defaults of all but hidden, intermediate, activation and dtype.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_cuda_layer_config {
    /// sizeof(moe_cuda_layer_config)
    pub struct_size: usize,
    /// H
    pub hidden: usize,
    /// I
    pub intermediate: usize,
    /// Between the experts' products.
    pub activation: *const moe_activation,
    /// The layer holds experts first_local .. first_local + num_local of the router's and skips the pairs of others (expert parallelism: outputs add up). Identity experts belong
    /// to the layer that holds expert 0.
    pub first_local: usize,
    /// See first_local; 0 stands for all experts.
    pub num_local: usize,
    /// I of the expert that every token visits; 0: there is none. Several that only add up are one whose I is the sum of theirs.
    pub shared_intermediate: usize,
    /// Its activation; NULL: that of the others.
    pub shared_activation: *const moe_activation,
    /// How it joins: MOE_JOIN_ADD, MOE_JOIN_SIGMOID_GATE or MOE_JOIN_AVERAGE.
    pub shared_join: u32,
    /// MOE_DTYPE_* of x and of what is between the products. Weights in the same dtype go to tensor cores; others are computed exactly.
    pub dtype: moe_dtype,
    /// MOE_DTYPE_* of the experts' outputs until they are summed; 0: f32. 16 bits are half the traffic and one rounding more.
    pub ys_dtype: moe_dtype,
    /// MOE_CUDA_*
    pub numerics: u32,
    /// 1: a token has the same bits whatever the number of tokens; the kernels for few rows, which sum in another order, are not used.
    pub strict: u32,
    /// 1: a pair's weight multiplies the expert's input instead of its output (Llama 4).
    pub weight_on_input: u32,
    /// A factor on the routed sum, before the shared expert; 0 counts as 1.
    pub routed_scale: f32,
    /// 0
    pub reserved: u32,
}

// SAFETY: repr(C), begins with its size, numbers and pointers.
unsafe impl Versioned for moe_cuda_layer_config {}

/// A layer on the GPU: plain data on the host, of no context, without weights. Calls take it as const and may run at the same time in several threads, each with a workspace
/// of its own. Work that is queued does not need it any more.
pub struct moe_cuda_layer {
    _opaque: (),
}

/// Makes a layer. The router is copied and serves layers on the CPU as well; what it says is done here, but its correction bias and per-expert scale come with each
/// call, in the GPU's memory: a call that lacks one that the router had here is refused. Needs no driver.
///
/// Errors: MOE_ERROR_VALUE naming the field: a zero size, an activation or constant that is none, local experts that are not the router's, and what runs on the CPU
/// only (docs/gpu.md).
///
/// # Safety
/// router: NULL or living. config: NULL or valid. out: writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_cuda_layer_create(
    router: *const moe_router,
    config: *const moe_cuda_layer_config,
    out: *mut *mut moe_cuda_layer,
) -> moe_status {
    // SAFETY: the caller's contract.
    on_gpu!(|router, config, out| unsafe { super::gpu::layer_create(router, config, out) })
}

/// Ends a handle. NULL is allowed. MOE_ERROR_BUSY while a call uses it; work that is queued does not.
///
/// # Safety
/// layer: NULL or living, not used afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_cuda_layer_destroy(layer: *mut moe_cuda_layer) -> moe_status {
    if layer.is_null() {
        return MOE_OK;
    }
    // SAFETY: the caller's contract.
    on_gpu!(|layer| unsafe { crate::ffi::handle::destroy(layer) })
}

/// *bytes: the workspace in the GPU's memory that moe_cuda_layer_forward needs for up to max_tokens tokens on the current context's device, wherever the routing
/// comes from.
///
/// # Safety
/// layer: NULL or living. bytes: NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_cuda_layer_workspace_size(
    layer: *const moe_cuda_layer,
    max_tokens: usize,
    bytes: *mut usize,
) -> moe_status {
    // SAFETY: the caller's contract.
    on_gpu!(|layer, max_tokens, bytes| unsafe {
        super::gpu::workspace_size(layer, max_tokens, bytes)
    })
}
