//! Tensor-core products for Ampere and later: the plans of `kernels/grouped_gemm_sm80.cu`. All shapes give the same bits.

use super::params::{GroupedGemmParams, check_16_bit};
use super::{Shape, is_aligned, mean_rows};
use crate::cuda::plan::{DeviceInfo, Launch, Module};
use crate::element::DType;
use crate::error::{Error, Result};

/// Rows of the tiles that there are.
pub const TILE_ROWS: [usize; 4] = [16, 32, 64, 128];

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
    let format = usize::from(check_16_bit(p)? == DType::F16);
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

/// Plans a product by tiles of one's own choice among [`TILE_ROWS`], where [`plan_grouped_gemm`](super::plan_grouped_gemm) takes them by the mean number of rows. The bits are the
/// same. `params` describe it, already checked as a product of any kernel.
///
/// # Errors
/// [`Error::Value`] naming a number of rows that is not there, formats that are not one of 16 bits, operands that are not aligned to 16 bytes; [`Error::Overflow`].
pub fn plan_with_tile(
    params: &GroupedGemmParams,
    tile_rows: usize,
    device: &DeviceInfo,
) -> Result<Launch> {
    let format = check_16_bit(params)?;
    if !is_aligned(params, 2) {
        let expected = "addresses and strides that are multiples of 16 bytes";
        return Err(Error::value("a and weights", expected, "others"));
    }
    let Some(place) = TILE_ROWS.iter().position(|&rows| rows == tile_rows) else {
        let expected = format!("one of {TILE_ROWS:?}");
        return Err(Error::value("tile_rows", expected, tile_rows));
    };
    SHAPES[place][usize::from(format == DType::F16)].launch(Module::GroupedGemmSm80, params, device)
}

#[cfg(test)]
mod tests {
    use super::super::decode::plan_decode;
    use super::*;
    use bytemuck::Zeroable;

    #[test]
    fn choices_that_are_not_there_are_refused_by_name() {
        let device = &DeviceInfo::A100;
        let good = GroupedGemmParams {
            a_dtype: DType::BF16 as u32,
            w_dtype: DType::BF16 as u32,
            experts: 2,
            rows: 300,
            a_rows: 300,
            n: 256,
            k: 64,
            ..GroupedGemmParams::zeroed()
        };
        for rows in TILE_ROWS {
            let launch = plan_with_tile(&good, rows, device).unwrap();
            assert!(launch.kernel.ends_with(&format!("bf16_m{rows}")));
            assert!(!launch.is_empty());
        }
        assert!(
            plan_decode(&good, device)
                .unwrap()
                .kernel
                .ends_with("_bf16")
        );
        let named = |result: Result<Launch>| match result {
            Err(Error::Value { argument, .. }) => argument,
            other => panic!("{other:?}"),
        };
        assert_eq!(named(plan_with_tile(&good, 48, device)), "tile_rows");
        let odd = GroupedGemmParams {
            a_row_stride: 9,
            ..good
        };
        assert_eq!(named(plan_with_tile(&odd, 64, device)), "a and weights");
        for (a_dtype, w_dtype) in [(0, 0), (1, 2), (2, 9), (9, 9)] {
            let mixed = GroupedGemmParams {
                a_dtype,
                w_dtype,
                ..good
            };
            assert_eq!(named(plan_with_tile(&mixed, 64, device)), "a and weights");
            assert_eq!(named(plan_decode(&mixed, device)), "a and weights");
        }
    }
}
