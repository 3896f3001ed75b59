//! The grouped product against the definition of its bits, and against the f64 oracle.

#[path = "../common/mod.rs"]
mod common;

mod activations;
mod formats;
mod refused;

use common::product::{Stored, activations, chain, flushed, rounded};
use common::{Rng, assert_same_bits, bits, cases, cpus, with_threads};
use moe_kernels::experts::{ExpertWeights, PackedExperts};
use moe_kernels::grouped_gemm::{
    Activation, ActivationFunction, Clamp, Gather, Groups, PackedMatrices, grouped_gemm_into,
    scratch_bytes,
};
use moe_kernels::permute::{Permutation, PermuteOptions};
use moe_kernels::reference;
use moe_kernels::{AnyMatMut, AnyMatRef, Cpu, DType, Error, Isa, MatMut, MatRef};
use proptest::prelude::*;

/// The product, with as much scratch as it asks for, full of nonsense.
fn multiply(
    cpu: &Cpu,
    x: AnyMatRef<'_>,
    gather: Option<Gather<'_>>,
    packed: &PackedMatrices,
    groups: Groups<'_>,
    activation: Option<Activation>,
    out: AnyMatMut<'_>,
) -> Result<(), Error> {
    let scratch = &mut vec![0xff; scratch_bytes(cpu)];
    grouped_gemm_into(cpu, x, gather, packed, groups, activation, out, scratch)
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
        let w = rounded(dtype, &rng.normals(experts * n * k));
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

    fn groups(&self) -> Groups<'_> {
        Groups::Ragged {
            offsets: &self.offsets,
            counts: &self.counts,
        }
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
        let x = MatRef::new(&self.x, self.rows(), self.k).unwrap().into();
        let view = MatMut::new(&mut out, self.rows(), self.n).unwrap().into();
        multiply(cpu, x, None, packed, self.groups(), None, view).unwrap();
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
    #![proptest_config(cases(48))]

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

/// Adding an expert leaves the others where they are.
#[test]
fn experts_are_added_in_place() {
    for cpu in cpus() {
        let p = Problem::new(3, 12, 20, 9, 3, DType::BF16);
        let all = p.pack(&cpu);
        let mut grown = PackedMatrices::new(&cpu, p.n, p.k, p.dtype).unwrap();
        for w in p.w.chunks(p.n * p.k) {
            grown
                .push(&cpu, MatRef::new(w, p.n, p.k).unwrap().into(), None)
                .unwrap();
            assert!(grown.bytes() <= all.bytes());
        }
        assert_eq!(bits(&p.run(&cpu, &grown)), bits(&p.run(&cpu, &all)));
    }
}
