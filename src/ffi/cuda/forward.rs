//! `moe_cuda_layer_forward`: the whole layer, queued on a stream.

use super::device::{moe_device_matrix, moe_device_ptr, moe_device_weights};
use super::layer::moe_cuda_layer;
use super::on_gpu;
use crate::ffi::memory::Versioned;
use crate::ffi::status::*;
use bytemuck::Zeroable;
use core::ffi::c_void;

/// The experts' weights in the GPU's memory, where the caller has them. Absent matrices are NULL. Biases may be of any dtype, one for a product.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_cuda_expert_weights {
    /// sizeof(moe_cuda_expert_weights)
    pub struct_size: usize,
    /// [E, I, H] (MOE_LAYOUT_SEPARATE, gated), else NULL. E counts the experts that the layer holds.
    pub gate: *const moe_device_weights,
    /// [E, I, H] (MOE_LAYOUT_SEPARATE), else NULL.
    pub up: *const moe_device_weights,
    /// [E, 2I, H] (the other layouts), else NULL.
    pub gate_up: *const moe_device_weights,
    /// [E, H, I]
    pub down: *const moe_device_weights,
    /// [E, I] (MOE_LAYOUT_SEPARATE, gated)
    pub gate_bias: *const moe_device_matrix,
    /// [E, I] (MOE_LAYOUT_SEPARATE)
    pub up_bias: *const moe_device_matrix,
    /// [E, 2I] (the other layouts), laid out as gate_up is.
    pub gate_up_bias: *const moe_device_matrix,
    /// [E, H]
    pub down_bias: *const moe_device_matrix,
    /// MOE_LAYOUT_*
    pub layout: u32,
    /// 0
    pub reserved: u32,
}

// SAFETY: repr(C), begins with its size, numbers and pointers.
unsafe impl Versioned for moe_cuda_expert_weights {}

/// An RMS norm in the GPU's memory: x / sqrt(mean(x^2) + eps) * weight * multiplier.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_cuda_rms_norm {
    /// sizeof(moe_cuda_rms_norm)
    pub struct_size: usize,
    /// [H] f32, as it is applied.
    pub weight: moe_device_ptr,
    /// H
    pub len: usize,
    /// Under the root, 0 or more.
    pub eps: f32,
    /// One more factor; 0 counts as 1.
    pub multiplier: f32,
}

// SAFETY: repr(C), begins with its size, numbers.
unsafe impl Versioned for moe_cuda_rms_norm {}

/// One call of a layer on the GPU. The routing comes from exactly one of gate, logits, and ids with weights. Zeros (with struct_size) are the defaults of what
/// else is not needed. Structs are read during the call; memory of the GPU is used until the stream has run what was queued.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_cuda_forward {
    /// sizeof(moe_cuda_forward)
    pub struct_size: usize,
    /// [T, H] of the layer's dtype.
    pub x: *const moe_device_matrix,
    /// [T, H], any dtype.
    pub y: *const moe_device_matrix,
    /// [R, H], any dtype: logits = x * gate^T + gate_bias, exact f32.
    pub gate: *const moe_device_matrix,
    /// [R] f32
    pub gate_bias: moe_device_ptr,
    /// Elements of gate_bias.
    pub gate_bias_len: usize,
    /// [T, R], any dtype.
    pub logits: *const moe_device_matrix,
    /// [T, K] int32, as they are: the router is not asked. Ids that name no expert count as dropped.
    pub ids: moe_device_ptr,
    /// Elements of ids.
    pub ids_len: usize,
    /// [T, K] f32, with ids.
    pub weights: moe_device_ptr,
    /// Elements of weights.
    pub weights_len: usize,
    /// [T, K] int32 for a router of MOE_SELECT_GIVEN, with gate or logits.
    pub given_ids: moe_device_ptr,
    /// Elements of given_ids.
    pub given_ids_len: usize,
    /// [E + num_null] f32, added to what the selection ranks; wanted when the router had one.
    pub correction_bias: moe_device_ptr,
    /// Elements of correction_bias.
    pub correction_bias_len: usize,
    /// [E] f32, a factor on each expert's weights; wanted when the router had one.
    pub per_expert_scale: moe_device_ptr,
    /// Elements of per_expert_scale.
    pub per_expert_scale_len: usize,
    /// [T, R] for a router with a noise seed, of the logits' dtype (f32 with gate).
    pub noise_logits: *const moe_device_matrix,
    /// Position of the first token, for noise.
    pub position: u64,
    /// The experts.
    pub experts: *const moe_cuda_expert_weights,
    /// The shared expert, with E = 1, when and only when the layer has one.
    pub shared: *const moe_cuda_expert_weights,
    /// [1, H] for MOE_JOIN_SIGMOID_GATE, any dtype.
    pub shared_gate: *const moe_device_matrix,
    /// Normalises the output, after the shared expert.
    pub out_norm: *const moe_cuda_rms_norm,
    /// [H] f32, added after the norm.
    pub out_bias: moe_device_ptr,
    /// Elements of out_bias.
    pub out_bias_len: usize,
    /// [T, H], any dtype, added last. May be y itself: the same data, stride and dtype.
    pub residual: *const moe_device_matrix,
    /// Memory to work in, of any content and alignment; see moe_cuda_layer_workspace_size. Calls that may run at the same time need one each.
    pub workspace: moe_device_ptr,
    /// Bytes of workspace.
    pub workspace_bytes: usize,
}

// SAFETY: repr(C), begins with its size, numbers and pointers.
unsafe impl Versioned for moe_cuda_forward {}

/// Loads the kernels that such a call needs and queues nothing: loading takes the driver's compiler some time, and is not allowed while a stream is being captured. The
/// addresses are not followed.
///
/// Errors: as moe_cuda_layer_forward.
///
/// # Safety
/// As moe_cuda_layer_forward, but for the GPU's memory, which need not be there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_cuda_layer_prepare(
    layer: *const moe_cuda_layer,
    args: *const moe_cuda_forward,
) -> moe_status {
    // SAFETY: the caller's contract.
    on_gpu!(|layer, args| unsafe { super::gpu::forward(layer, None, args) })
}

/// The layer: y [T, H] from x [T, H], queued on stream, a CUstream or cudaStream_t of the context that is current on the calling thread. Allocates no memory of the GPU, waits
/// for nothing and reads nothing back, so that it can be captured in a graph once its kernels are loaded: by moe_cuda_layer_prepare, or by an earlier call.
///
/// Ids and weights have the CPU's bits; f32 experts and MOE_CUDA_EXACT give them all the way to y. y may not overlap x.
///
/// Errors: those of pointers, MOE_ERROR_SHAPE, MOE_ERROR_VALUE, MOE_ERROR_BUFFER_TOO_SMALL, MOE_ERROR_UNSUPPORTED without a driver, context or able GPU: nothing is queued then.
/// MOE_ERROR_DRIVER: what had been queued before still runs, and y may hold anything.
///
/// # Safety
/// layer: NULL or living. args: NULL or valid. stream: a living stream of the current context. The GPU's memory: that of this context, there for as many bytes as
/// args says until the stream has run the call, and not touched by other work meanwhile where the call writes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_cuda_layer_forward(
    layer: *const moe_cuda_layer,
    stream: *mut c_void,
    args: *const moe_cuda_forward,
) -> moe_status {
    // SAFETY: the caller's contract.
    on_gpu!(|layer, stream, args| unsafe { super::gpu::forward(layer, Some(stream), args) })
}
