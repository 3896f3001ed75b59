//! Products of few rows in 16 bits: the plan of `kernels/grouped_gemm_decode.cu`. A class of bits of its own.

use super::params::GroupedGemmParams;
use super::{Shape, is_aligned};
use crate::cuda::plan::{DeviceInfo, Launch, Module};
use crate::element::DType;
use crate::error::Result;

/// A tile is 8 rows of A and 16 rows of W.
const fn shape(kernel: &'static str) -> Shape {
    Shape {
        kernel,
        rows: 8,
        columns: 16,
        threads: 128,
        shared: 0,
        blocks_per_sm: 6,
    }
}

const ALIGNED: [Shape; 2] = [
    shape("moe_grouped_gemm_decode_bf16"),
    shape("moe_grouped_gemm_decode_f16"),
];
const UNALIGNED: [Shape; 2] = [
    shape("moe_grouped_gemm_decode_bf16_unaligned"),
    shape("moe_grouped_gemm_decode_f16_unaligned"),
];

/// A and weights of one 16-bit format.
pub(super) fn plan_decode(p: &GroupedGemmParams, device: &DeviceInfo) -> Result<Launch> {
    let shapes = if is_aligned(p, 2) {
        &ALIGNED
    } else {
        &UNALIGNED
    };
    shapes[usize::from(p.a_dtype == DType::F16 as u32)].launch(Module::GroupedGemmDecode, p, device)
}
