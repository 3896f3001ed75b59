//! Products of few rows in 16 bits: the plan of `kernels/grouped_gemm_decode.cu`. A class of bits of its own.

use super::params::{GroupedGemmParams, check_16_bit};
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

/// Plans a product by the kernels for few rows, however many there are; [`plan_grouped_gemm`](super::plan_grouped_gemm) takes them up to
/// [`DECODE_ROWS`](super::DECODE_ROWS) for each expert. `p` describes it, already checked as a product of any kernel.
///
/// # Errors
/// [`Error::Value`](crate::Error::Value) when A and the weights are not of one 16-bit format; [`Error::Overflow`](crate::Error::Overflow).
pub fn plan_decode(p: &GroupedGemmParams, device: &DeviceInfo) -> Result<Launch> {
    let format = check_16_bit(p)?;
    let shapes = if is_aligned(p, 2) {
        &ALIGNED
    } else {
        &UNALIGNED
    };
    shapes[usize::from(format == DType::F16)].launch(Module::GroupedGemmDecode, p, device)
}
