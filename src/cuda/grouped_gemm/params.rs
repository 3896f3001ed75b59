//! The parameters of every grouped product's kernel, as `kernels/include/grouped.cuh` has them.

use crate::cuda::plan::DevicePtr;
use bytemuck::{Pod, Zeroable};

/// Bits of [`GroupedGemmParams::flags`].
pub struct Flags;

impl Flags {
    /// `gate` and `up` are arrays of addresses.
    pub const WEIGHT_TABLES: u32 = 1;
    /// The biases are arrays of addresses.
    pub const BIAS_TABLES: u32 = 2;
    /// `out` and its row stride are multiples of 16 bytes.
    pub const ALIGNED_OUT: u32 = 4;
}

/// `epilogue::Activation`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
#[allow(missing_docs)]
pub struct ActivationParams {
    pub kind: u32,
    pub gated: u32,
    pub gate_max: f32,
    pub result_max: f32,
    pub up_limit: f32,
    pub alpha: f32,
    pub gate_cap: f32,
    pub up_cap: f32,
}

/// `grouped::GroupedGemmParams`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
#[allow(missing_docs)]
pub struct GroupedGemmParams {
    pub a: DevicePtr,
    pub pair_of_row: DevicePtr,
    pub input_scale: DevicePtr,
    pub offsets: DevicePtr,
    pub counts: DevicePtr,
    pub gate: DevicePtr,
    pub up: DevicePtr,
    pub gate_bias: DevicePtr,
    pub up_bias: DevicePtr,
    pub out: DevicePtr,
    pub a_row_stride: i64,
    pub gate_row_stride: i64,
    pub gate_expert_stride: i64,
    pub up_row_stride: i64,
    pub up_expert_stride: i64,
    pub gate_bias_expert_stride: i64,
    pub up_bias_expert_stride: i64,
    pub out_row_stride: i64,
    pub gate_bias_stride: u32,
    pub up_bias_stride: u32,
    pub experts: u32,
    pub rows: u32,
    pub n: u32,
    pub k: u32,
    pub slots: u32,
    pub flags: u32,
    pub a_dtype: u32,
    pub w_dtype: u32,
    pub bias_dtype: u32,
    pub out_dtype: u32,
    pub a_rows: u32,
    pub reserved: u32,
    pub activation: ActivationParams,
}
const _: () = assert!(size_of::<GroupedGemmParams>() == 232);
