//! The grouped product against the definition of its bits, and against the f64 oracle.

mod common;

use common::{Rng, assert_same_bits, cpus, with_threads};
use half::{bf16, f16};
use moe_kernels::grouped_gemm::{Groups, PackedMatrices, grouped_gemm_into, scratch_bytes};
use moe_kernels::{Cpu, DType, MatMut, MatRef};
use proptest::prelude::*;

/// The definition of one output element: a chain of FMAs in the documented order.
fn chain(dtype: DType, a: &[f32], w: &[f32]) -> f32 {
    let mut sum = 0.0f32;
    match dtype {
        DType::BF16 => {
            let at = |v: &[f32], k: usize| v.get(k).copied().unwrap_or(0.0);
            for k in (0..a.len()).step_by(2) {
                sum = at(a, k + 1).mul_add(at(w, k + 1), sum);
                sum = a[k].mul_add(w[k], sum);
            }
        }
        _ => {
            for (x, w) in a.iter().zip(w) {
                sum = x.mul_add(*w, sum);
            }
        }
    }
    sum
}

fn round_to(dtype: DType, v: &[f32]) -> Vec<f32> {
    v.iter()
        .map(|&x| match dtype {
            DType::F16 => f16::from_f32(x).to_f32(),
            DType::BF16 => bf16::from_f32(x).to_f32(),
            _ => x,
        })
        .collect()
}

/// Ragged counts that sum to `rows`, expert 1 (if there is one) empty.
fn ragged(rng: &mut Rng, rows: usize, experts: usize) -> (Vec<usize>, Vec<usize>) {
    let mut counts = vec![0; experts];
    for _ in 0..rows {
        let e = rng.below(experts);
        counts[if e == 1 { 0 } else { e }] += 1;
    }
    let mut offsets = vec![0];
    for c in &counts {
        offsets.push(offsets.last().unwrap() + c);
    }
    (offsets, counts)
}

struct Problem {
    n: usize,
    k: usize,
    dtype: DType,
    offsets: Vec<usize>,
    counts: Vec<usize>,
    x: Vec<f32>,
    w: Vec<f32>,
}

impl Problem {
    fn new(seed: u64, rows: usize, n: usize, k: usize, experts: usize, dtype: DType) -> Self {
        let mut rng = Rng(seed);
        let (offsets, counts) = ragged(&mut rng, rows, experts);
        let x = rng.normals(rows * k);
        let w = round_to(dtype, &rng.normals(experts * n * k));
        Self {
            n,
            k,
            dtype,
            offsets,
            counts,
            x,
            w,
        }
    }

    fn rows(&self) -> usize {
        *self.offsets.last().unwrap()
    }

    fn pack(&self, cpu: &Cpu) -> PackedMatrices {
        let mut packed = PackedMatrices::new(cpu, self.n, self.k, self.dtype).unwrap();
        for w in self.w.chunks(self.n * self.k) {
            packed
                .push(cpu, MatRef::new(w, self.n, self.k).unwrap().into(), None)
                .unwrap();
        }
        packed
    }

    fn run(&self, cpu: &Cpu, packed: &PackedMatrices) -> Vec<f32> {
        let mut out = vec![f32::NAN; self.rows() * self.n];
        let mut scratch = vec![0xff; scratch_bytes(cpu)];
        grouped_gemm_into(
            cpu,
            MatRef::new(&self.x, self.rows(), self.k).unwrap().into(),
            None,
            packed,
            Groups::Ragged {
                offsets: &self.offsets,
                counts: &self.counts,
            },
            None,
            MatMut::new(&mut out, self.rows(), self.n).unwrap().into(),
            &mut scratch,
        )
        .unwrap();
        out
    }

    fn expected(&self) -> Vec<f32> {
        let mut out = Vec::new();
        for (e, w) in self.w.chunks(self.n * self.k).enumerate() {
            for r in self.offsets[e]..self.offsets[e] + self.counts[e] {
                let a = &self.x[r * self.k..][..self.k];
                out.extend(w.chunks(self.k).map(|w| chain(self.dtype, a, w)));
            }
        }
        out
    }
}

fn dtypes() -> impl Strategy<Value = DType> {
    prop::sample::select(DType::ALL.to_vec())
}

/// Sizes at the seams of lanes, panels, tiles and blocks: one below, at, one above.
fn around(seams: &'static [usize]) -> impl Strategy<Value = usize> {
    (prop::sample::select(seams), 0..3usize).prop_map(|(s, d)| (s + d - 1).max(1))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn bits_are_one_chain(
        seed: u64,
        rows in around(&[1, 2, 4, 6, 14, 28, 96, 97]),
        n in around(&[1, 8, 16, 32, 64]),
        k in around(&[1, 2, 64, 256, 257]),
        experts in 1..5usize,
        dtype in dtypes(),
    ) {
        let p = Problem::new(seed, rows, n, k, experts, dtype);
        let expected = p.expected();
        for cpu in cpus() {
            let packed = p.pack(&cpu);
            for threads in [1, 2, 7] {
                let found = with_threads(threads, || p.run(&cpu, &packed));
                assert_same_bits(&found, &expected, &format!("{} {dtype} {threads} threads", cpu.isa()));
            }
        }
    }
}
