//! Exact f32 products and TF32: the plans of `kernels/grouped_gemm_f32.cu`.
//!
//! All exact shapes give the same bits, the CPU's; so do all TF32 shapes among themselves.

use super::params::GroupedGemmParams;
use super::{Shape, is_aligned, mean_rows};
use crate::cuda::plan::{DeviceInfo, Launch, Module};
use crate::element::DType;
use crate::error::Result;

const fn shape(
    kernel: &'static str,
    rows: u32,
    threads: u32,
    shared: u32,
    blocks_per_sm: u32,
) -> Shape {
    Shape {
        kernel,
        rows,
        columns: 128,
        threads,
        shared,
        blocks_per_sm,
    }
}

const EXACT_M128: Shape = shape("moe_grouped_gemm_f32_exact_m128", 128, 256, 57408, 2);
const EXACT_M16: Shape = shape("moe_grouped_gemm_f32_exact_m16", 16, 128, 57408, 3);
const EXACT_ANY: Shape = shape("moe_grouped_gemm_f32_exact_any", 32, 128, 63552, 3);
const TF32_M128: Shape = shape("moe_grouped_gemm_f32_tf32_m128", 128, 128, 74832, 2);
const TF32_M32: Shape = shape("moe_grouped_gemm_f32_tf32_m32", 32, 128, 66624, 3);
const TF32_UNALIGNED: Shape = shape("moe_grouped_gemm_f32_tf32_m32_unaligned", 32, 128, 66624, 3);

/// Mean rows of an expert from which the tile of 128 rows is taken.
const MANY_ROWS: u32 = 64;

/// Any formats: chains of fused multiply-adds.
pub(super) fn plan_exact(p: &GroupedGemmParams, device: &DeviceInfo) -> Result<Launch> {
    let f32 = DType::F32 as u32;
    let plain = p.a_dtype == f32 && p.w_dtype == f32 && p.input_scale.is_null();
    let shape = match () {
        () if !plain || !is_aligned(p, 4) => &EXACT_ANY,
        () if mean_rows(p) >= MANY_ROWS => &EXACT_M128,
        () => &EXACT_M16,
    };
    shape.launch(Module::GroupedGemmF32, p, device)
}

/// f32 with inputs rounded to TF32; exact for other formats.
pub(super) fn plan_tf32(p: &GroupedGemmParams, device: &DeviceInfo) -> Result<Launch> {
    let f32 = DType::F32 as u32;
    if p.a_dtype != f32 || p.w_dtype != f32 {
        return plan_exact(p, device);
    }
    let shape = match () {
        () if !is_aligned(p, 4) => &TF32_UNALIGNED,
        () if mean_rows(p) >= MANY_ROWS => &TF32_M128,
        () => &TF32_M32,
    };
    shape.launch(Module::GroupedGemmF32, p, device)
}
