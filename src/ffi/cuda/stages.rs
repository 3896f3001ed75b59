//! The stages alone: routing, sort, copies of rows, grouped product, weighted sum.

use super::device::{moe_device_matrix, moe_device_ptr, moe_device_weights};
use super::forward::moe_cuda_rms_norm;
use super::on_gpu;
use crate::ffi::grouped_gemm::moe_activation;
use crate::ffi::memory::Versioned;
use crate::ffi::permute::moe_permute_options;
use crate::ffi::router::moe_router;
use crate::ffi::status::*;
use bytemuck::Zeroable;
use core::ffi::c_void;

/// What moe_cuda_route reads and writes. Zeros (with struct_size) are the defaults of what the router does not want.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_cuda_route_args {
    /// sizeof(moe_cuda_route_args)
    pub struct_size: usize,
    /// [T, R], any dtype; computed in f32.
    pub logits: *const moe_device_matrix,
    /// [T, R] of the same dtype for a router with a noise seed, else NULL.
    pub noise_logits: *const moe_device_matrix,
    /// [T, K] int32 for MOE_SELECT_GIVEN, else 0. An id that names no expert counts as dropped.
    pub given_ids: moe_device_ptr,
    /// Elements of given_ids.
    pub given_ids_len: usize,
    /// [E + num_null] f32; wanted when the router has one on the host.
    pub correction_bias: moe_device_ptr,
    /// Elements of correction_bias.
    pub correction_bias_len: usize,
    /// [E] f32; wanted when the router has one on the host.
    pub per_expert_scale: moe_device_ptr,
    /// Elements of per_expert_scale.
    pub per_expert_scale_len: usize,
    /// Position of the first token, for noise.
    pub position: u64,
    /// Out: [T, slots] int32 or more.
    pub ids: moe_device_ptr,
    /// Elements of ids.
    pub ids_len: usize,
    /// Out: [T, slots] f32 or more.
    pub weights: moe_device_ptr,
    /// Elements of weights.
    pub weights_len: usize,
    /// Out: [T, joint_shared] f32 or more, for such routers.
    pub shared_weights: moe_device_ptr,
    /// Elements of shared_weights.
    pub shared_weights_len: usize,
    /// At a multiple of 8 bytes; see moe_cuda_route_workspace_size.
    pub workspace: moe_device_ptr,
    /// Bytes of workspace.
    pub workspace_bytes: usize,
}

// SAFETY: repr(C), begins with its size, numbers and pointers.
unsafe impl Versioned for moe_cuda_route_args {}

/// *bytes: the workspace of moe_cuda_route for up to max_tokens tokens; 0 for most routers. Needs no driver.
///
/// Errors: MOE_ERROR_VALUE for what runs on the CPU only.
///
/// # Safety
/// router: NULL or living. bytes: NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_cuda_route_workspace_size(
    router: *const moe_router,
    max_tokens: usize,
    bytes: *mut usize,
) -> moe_status {
    // SAFETY: the caller's contract.
    on_gpu!(|router, max_tokens, bytes| unsafe {
        super::gpu::route_workspace_size(router, max_tokens, bytes)
    })
}

/// Ids and weights from logits, with the CPU's bits, queued on stream. As for all stages: a stream of the current context; nothing is allocated, waited for or read back;
/// the first call of a kernel loads it, so make one before capturing a graph.
///
/// Errors: as moe_cuda_layer_forward.
///
/// # Safety
/// As moe_cuda_layer_forward.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_cuda_route(
    router: *const moe_router,
    stream: *mut c_void,
    args: *const moe_cuda_route_args,
) -> moe_status {
    // SAFETY: the caller's contract.
    on_gpu!(|router, stream, args| unsafe { super::gpu::route(router, stream, args) })
}

/// What moe_cuda_permute reads and writes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_cuda_permute_args {
    /// sizeof(moe_cuda_permute_args)
    pub struct_size: usize,
    /// E
    pub num_experts: usize,
    /// How to sort, or NULL.
    pub options: *const moe_permute_options,
    /// [T * K] int32; ids that name no expert get no row.
    pub ids: moe_device_ptr,
    /// Elements of ids: the number of pairs.
    pub ids_len: usize,
    /// Out: [E] int32 or more: rows of each expert without padding.
    pub counts: moe_device_ptr,
    /// Elements of counts.
    pub counts_len: usize,
    /// Out: [E + 1] int32 or more: expert e has rows offsets[e] .. offsets[e + 1], padding included.
    pub offsets: moe_device_ptr,
    /// Elements of offsets.
    pub offsets_len: usize,
    /// Out: [max_rows] uint32 or more, see moe_cuda_permute_sizes: the pair of a row; MOE_NONE for padding and, up to max_rows, from offsets[E] on.
    pub pair_of_row: moe_device_ptr,
    /// Elements of pair_of_row.
    pub pair_of_row_len: usize,
    /// Out: [T * K] uint32 or more: the row of a pair, or MOE_NONE.
    pub row_of_pair: moe_device_ptr,
    /// Elements of row_of_pair.
    pub row_of_pair_len: usize,
    /// At a multiple of 4 bytes; see moe_cuda_permute_sizes.
    pub workspace: moe_device_ptr,
    /// Bytes of workspace.
    pub workspace_bytes: usize,
}

// SAFETY: repr(C), begins with its size, numbers and pointers.
unsafe impl Versioned for moe_cuda_permute_args {}

/// *max_rows: the most rows that num_pairs pairs can take, padding included. *workspace_bytes: the workspace of moe_cuda_permute for up to num_pairs pairs on the
/// current context's device; 0 up to 65536 pairs.
///
/// Errors: MOE_ERROR_VALUE for options that make no sense or more than 4096 experts, MOE_ERROR_OVERFLOW, MOE_ERROR_UNSUPPORTED without a driver, context or able GPU.
///
/// # Safety
/// options: NULL or valid. max_rows, workspace_bytes: NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_cuda_permute_sizes(
    num_pairs: usize,
    num_experts: usize,
    options: *const moe_permute_options,
    max_rows: *mut usize,
    workspace_bytes: *mut usize,
) -> moe_status {
    on_gpu!(|num_pairs, num_experts, options, max_rows, workspace_bytes|
        // SAFETY: the caller's contract.
        unsafe { super::gpu::permute_sizes(num_pairs, num_experts, options, max_rows, workspace_bytes) })
}

/// Sorts pairs by expert, stably: what moe_permutation_sort gives, in the GPU's memory, queued on stream.
///
/// Errors: as moe_cuda_layer_forward.
///
/// # Safety
/// As moe_cuda_layer_forward.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_cuda_permute(
    stream: *mut c_void,
    args: *const moe_cuda_permute_args,
) -> moe_status {
    // SAFETY: the caller's contract.
    on_gpu!(|stream, args| unsafe { super::gpu::permute(stream, args) })
}

/// out[i] = src[index[i] / divisor], zeros where index[i] is MOE_NONE or leads beyond src.
///
/// Tokens to rows: index = pair_of_row, divisor = K, used = the address of offsets[E]. Rows back to pairs: index = row_of_pair, divisor = 1. The grouped product gathers by itself.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_cuda_copy_args {
    /// sizeof(moe_cuda_copy_args)
    pub struct_size: usize,
    /// [src_rows, H]
    pub src: *const moe_device_matrix,
    /// [rows, H] of the same dtype.
    pub out: *const moe_device_matrix,
    /// [rows] uint32 or more.
    pub index: moe_device_ptr,
    /// Elements of index.
    pub index_len: usize,
    /// One int32: rows of out from this one on are left as they are. 0: all are written.
    pub used: moe_device_ptr,
    /// What indices are divided by, at least 1.
    pub divisor: usize,
}

// SAFETY: repr(C), begins with its size, numbers and pointers.
unsafe impl Versioned for moe_cuda_copy_args {}

/// Copies rows, queued on stream. Errors: as moe_cuda_layer_forward.
///
/// # Safety
/// As moe_cuda_layer_forward.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_cuda_copy_rows(
    stream: *mut c_void,
    args: *const moe_cuda_copy_args,
) -> moe_status {
    // SAFETY: the caller's contract.
    on_gpu!(|stream, args| unsafe { super::gpu::copy_rows(stream, args) })
}

/// out[r] = act(a[src(r)] * W[e]^T + bias[e]) for the rows r of each expert e, offsets[e] .. offsets[e] + counts[e]; src(r) = pair_of_row[r] / slots, or r without
/// pair_of_row. Rows of no expert, such as padding, are left as they are.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_cuda_gemm_args {
    /// sizeof(moe_cuda_gemm_args)
    pub struct_size: usize,
    /// [a_rows, K]
    pub a: *const moe_device_matrix,
    /// [rows] uint32 or more, from a sort; 0: row r of out is row r of a.
    pub pair_of_row: moe_device_ptr,
    /// Elements of pair_of_row.
    pub pair_of_row_len: usize,
    /// Pairs of a token, with pair_of_row.
    pub slots: usize,
    /// [a_rows * slots] f32, a factor on each pair's input, with pair_of_row; 0 for none.
    pub input_scale: moe_device_ptr,
    /// Elements of input_scale.
    pub input_scale_len: usize,
    /// [E + 1] int32 or more; 0, and counts too: all rows are the first matrix's.
    pub offsets: moe_device_ptr,
    /// Elements of offsets.
    pub offsets_len: usize,
    /// [E] int32 or more.
    pub counts: moe_device_ptr,
    /// Elements of counts.
    pub counts_len: usize,
    /// [E, N, K], with a gated activation only.
    pub gate: *const moe_device_weights,
    /// [E, N, K]
    pub up: *const moe_device_weights,
    /// [E, N] or NULL.
    pub gate_bias: *const moe_device_matrix,
    /// [E, N] or NULL, of gate_bias's dtype.
    pub up_bias: *const moe_device_matrix,
    /// What happens to the sums; NULL: nothing.
    pub activation: *const moe_activation,
    /// [rows, N], any dtype.
    pub out: *const moe_device_matrix,
    /// MOE_CUDA_*
    pub numerics: u32,
    /// 1: a row has the same bits whatever the number of rows.
    pub strict: u32,
}

// SAFETY: repr(C), begins with its size, numbers and pointers.
unsafe impl Versioned for moe_cuda_gemm_args {}

/// The ragged grouped product, queued on stream. Errors: as moe_cuda_layer_forward.
///
/// # Safety
/// As moe_cuda_layer_forward.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_cuda_grouped_gemm(
    stream: *mut c_void,
    args: *const moe_cuda_gemm_args,
) -> moe_status {
    // SAFETY: the caller's contract.
    on_gpu!(|stream, args| unsafe { super::gpu::grouped_gemm(stream, args) })
}

/// The operands of moe_cuda_combine, those of moe_combine_args in the GPU's memory. For token t, in f32 and in this order:
///
/// a = sum over slots of weights[t, slot] * ys[row_of_pair[t * slots + slot]]; a * routed_scale; shared experts; norm; + bias; + residual.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_cuda_combine_args {
    /// sizeof(moe_cuda_combine_args)
    pub struct_size: usize,
    /// [rows, H], any dtype.
    pub ys: *const moe_device_matrix,
    /// [T * slots] f32, or 0 for ones.
    pub weights: moe_device_ptr,
    /// Elements of weights.
    pub weights_len: usize,
    /// [T * slots] uint32: rows of ys; MOE_NONE or beyond: passed over.
    pub row_of_pair: moe_device_ptr,
    /// Elements of row_of_pair.
    pub row_of_pair_len: usize,
    /// Pairs of a token.
    pub slots: usize,
    /// With identity experts: ids [T * slots] int32, those from num_experts on return x.
    pub ids: moe_device_ptr,
    /// Elements of ids.
    pub ids_len: usize,
    /// E, with identity experts.
    pub num_experts: usize,
    /// [T, H], with identity experts.
    pub x: *const moe_device_matrix,
    /// [T, H], any dtype: the shared experts' output.
    pub shared: *const moe_device_matrix,
    /// [T] f32 logits, for MOE_SHARED_SIGMOID_GATE.
    pub shared_gate: moe_device_ptr,
    /// Elements of shared_gate.
    pub shared_gate_len: usize,
    /// A norm over H.
    pub norm: *const moe_cuda_rms_norm,
    /// [H] f32
    pub bias: moe_device_ptr,
    /// Elements of bias.
    pub bias_len: usize,
    /// [T, H], any dtype. May be out itself: the same data, stride and dtype.
    pub residual: *const moe_device_matrix,
    /// [T, H], any dtype.
    pub out: *const moe_device_matrix,
    /// MOE_SHARED_*
    pub shared_kind: u32,
    /// Factor on the sum; 1 changes nothing.
    pub routed_scale: f32,
}

// SAFETY: repr(C), begins with its size, numbers and pointers.
unsafe impl Versioned for moe_cuda_combine_args {}

/// The weighted sum, with the CPU's bits from the same ys, queued on stream. Errors: as moe_cuda_layer_forward.
///
/// # Safety
/// As moe_cuda_layer_forward.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_cuda_combine(
    stream: *mut c_void,
    args: *const moe_cuda_combine_args,
) -> moe_status {
    // SAFETY: the caller's contract.
    on_gpu!(|stream, args| unsafe { super::gpu::combine(stream, args) })
}
