//! A grouped product alone, bf16: `out[r] = A[r] · W[e]ᵀ`. One group is a dense product.

use super::{Result, Subject, Work, near, sets_beyond_l2};
use crate::data::{dot, spread};
use crate::gpu::{Buffer, Gpu};
use crate::tape::{Filled, Tape};
use half::bf16;
use moe_kernels::DType;
use moe_kernels::cuda::combine::DeviceRows;
use moe_kernels::cuda::grouped_gemm::{
    GroupPointers, GroupedGemm, Numerics, WeightPointers, plan_grouped_gemm,
};
use moe_kernels::cuda::{DeviceInfo, DevicePtr, Launch};
use moe_kernels::grouped_gemm::{Activation, ActivationFunction};

/// Rows of each expert, and the product's other sides.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProductShape {
    /// 1 for a dense product.
    pub experts: usize,
    /// Rows of each.
    pub rows: usize,
    pub n: usize,
    pub k: usize,
}

struct Set {
    a: Filled,
    w: Filled,
    out: Buffer,
}

pub struct Product {
    shape: ProductShape,
    sets: Vec<Set>,
    offsets: Buffer,
    counts: Buffer,
}

impl Product {
    pub fn new(gpu: &Gpu, shape: ProductShape) -> Result<Self> {
        let ProductShape {
            experts,
            rows,
            n,
            k,
        } = shape;
        let all = experts * rows;
        let elements = all * k + experts * n * k + all * n;
        let set = |i: usize| -> Result<Set> {
            Ok(Set {
                a: gpu.filled(Tape::Input, 7919 * i, all * k)?,
                w: gpu.filled(Tape::Weight, 104_729 * i, experts * n * k)?,
                out: gpu.alloc(2 * all * n)?,
            })
        };
        let sets = (0..sets_beyond_l2(gpu, 2 * elements)).map(set);
        let offsets: Vec<i32> = (0..=experts).map(|e| (e * rows) as i32).collect();
        Ok(Self {
            shape,
            sets: sets.collect::<Result<_>>()?,
            offsets: gpu.upload(&offsets)?,
            counts: gpu.upload(&vec![rows as i32; experts])?,
        })
    }

    fn all_rows(&self) -> usize {
        self.shape.experts * self.shape.rows
    }

    fn product(&self, set: usize) -> GroupedGemm {
        let ProductShape { experts, n, k, .. } = self.shape;
        let (rows, set) = (self.all_rows(), &self.sets[set]);
        let matrix = |ptr: DevicePtr, stride| DeviceRows {
            ptr,
            stride,
            dtype: DType::BF16,
        };
        GroupedGemm {
            a: matrix(set.a.buffer.ptr, k),
            a_rows: rows,
            gather: None,
            groups: match experts {
                1 => GroupPointers::Single,
                _ => GroupPointers::Ragged {
                    offsets: self.offsets.ptr,
                    counts: self.counts.ptr,
                    experts,
                },
            },
            gate: None,
            up: WeightPointers::contiguous(set.w.buffer.ptr, DType::BF16, n, k),
            gate_bias: None,
            up_bias: None,
            activation: Activation::plain(ActivationFunction::Identity),
            out: matrix(set.out.ptr, n),
            rows,
            n,
            k,
            numerics: Numerics::TensorCores,
            strict: true,
        }
    }
}

impl Subject for Product {
    fn sets(&self) -> usize {
        self.sets.len()
    }

    fn work(&self) -> Work {
        let ProductShape { experts, n, k, .. } = self.shape;
        let rows = self.all_rows();
        Work {
            flops: 2.0 * rows as f64 * n as f64 * k as f64,
            bytes: 2.0 * (rows * k + experts * n * k + rows * n) as f64,
        }
    }

    fn plan(&self, device: &DeviceInfo, set: usize) -> Result<Vec<Launch>> {
        Ok(vec![plan_grouped_gemm(&self.product(set), device)?])
    }

    fn poison(&self, gpu: &Gpu, set: usize) -> Result<()> {
        gpu.poison(&self.sets[set].out)
    }

    /// All of it written; 8 columns of 64 rows against f64.
    fn check(&self, gpu: &Gpu, set: usize) -> Result<()> {
        let ProductShape { rows, n, k, .. } = self.shape;
        let set = &self.sets[set];
        gpu.all_written::<u16>(&set.out)?;
        for row in spread(self.all_rows(), 64) {
            let found: Vec<bf16> = gpu.download(&set.out, row * n, n)?;
            let a = set.a.numbers(row * k, k);
            for column in spread(n, 8) {
                let w = set.w.numbers((row / rows * n + column) * k, k);
                let (sum, all) = dot(&a, &w);
                // f32 sums in any order, one rounding to bf16.
                let tolerance = all * k as f64 * f64::from(f32::EPSILON) + sum.abs() / 256.0;
                let place = format!("row {row}, column {column}");
                near(&place, found[column].to_f64(), sum, tolerance)?;
            }
        }
        Ok(())
    }
}
