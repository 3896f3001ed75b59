//! Tensor-core products for Ampere and later: the plans of `kernels/grouped_gemm_sm80.cu`. All shapes give the same bits.

use super::params::GroupedGemmParams;
use super::{Shape, is_aligned, mean_rows};
use crate::cuda::plan::{DeviceInfo, Launch, Module};
use crate::element::DType;
use crate::error::{Error, Result};

const fn shape(kernel: &'static str, rows: u32, shared: u32, blocks_per_sm: u32) -> Shape {
    Shape {
        kernel,
        rows,
        columns: 128,
        threads: 128,
        shared,
        blocks_per_sm,
    }
}

/// bf16 and f16 kernels of one shape, from the smallest number of rows up.
const SHAPES: [[Shape; 2]; 4] = [
    [
        shape("moe_grouped_gemm_sm80_bf16_m16", 16, 60480, 3),
        shape("moe_grouped_gemm_sm80_f16_m16", 16, 60480, 3),
    ],
    [
        shape("moe_grouped_gemm_sm80_bf16_m32", 32, 66624, 3),
        shape("moe_grouped_gemm_sm80_f16_m32", 32, 66624, 3),
    ],
    [
        shape("moe_grouped_gemm_sm80_bf16_m64", 64, 46144, 3),
        shape("moe_grouped_gemm_sm80_f16_m64", 64, 46144, 3),
    ],
    [
        shape("moe_grouped_gemm_sm80_bf16_m128", 128, 74832, 2),
        shape("moe_grouped_gemm_sm80_f16_m128", 128, 74832, 2),
    ],
];
const UNALIGNED: [Shape; 2] = [
    shape("moe_grouped_gemm_sm80_bf16_m32_unaligned", 32, 66624, 3),
    shape("moe_grouped_gemm_sm80_f16_m32_unaligned", 32, 66624, 3),
];

/// Plans a grouped product on tensor cores, for any device. `p` describes it, already checked as a product of any kernel. What [`plan_grouped_gemm`](super::plan_grouped_gemm)
/// takes where Hopper's own kernels are not; public, so that the two can be compared on a Hopper.
///
/// # Errors
/// [`Error::Value`] when A and the weights are not of one 16-bit format; [`Error::Overflow`] for more than 2³¹ tiles.
pub fn plan_grouped_gemm_sm80(p: &GroupedGemmParams, device: &DeviceInfo) -> Result<Launch> {
    if p.a_dtype == DType::F32 as u32 || p.w_dtype != p.a_dtype {
        let expected = "bf16 or f16, as the weights, for tensor cores";
        return Err(Error::value("a", expected, "another format"));
    }
    let format = usize::from(p.a_dtype == DType::F16 as u32);
    let shape = match mean_rows(p) {
        _ if !is_aligned(p, 2) => &UNALIGNED[format],
        0..=16 => &SHAPES[0][format],
        17..=32 => &SHAPES[1][format],
        33..=96 => &SHAPES[2][format],
        // One block of m128 would be alone on a multiprocessor (sm_86, sm_89, sm_120: 99 KiB a block), four warps with nobody to cover their waits.
        _ if device.shared_per_block < 2 * SHAPES[3][format].shared => &SHAPES[2][format],
        _ => &SHAPES[3][format],
    };
    shape.launch(Module::GroupedGemmSm80, p, device)
}
