//! The driver of the grouped product at its seams: row tiles, blocks of rows, lines and parts of A, groups of panels, streamed outputs, both products
//! in one region.

mod common;

use common::product::{Stored, chain, flushed};
use common::{Rng, assert_same_bits, cpus, with_threads};
use moe_kernels::experts::{ExpertWeights, PackedExperts};
use moe_kernels::grouped_gemm::{
    Activation, Gather, Groups, PackedMatrices, grouped_gemm_into, scratch_bytes,
};
use moe_kernels::{AnyMatRef, Cpu, DType, Error, MatMut, MatRef};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// One expert's product with rows in the weights' format; every element that `sampled` names is one chain.
fn check_product(rows: usize, n: usize, k: usize, dtype: DType, samples: usize) {
    let mut rng = Rng((rows * 31 + n * 7 + k) as u64);
    let x = Stored::new(dtype, &rng.normals(rows * k));
    let w = Stored::new(dtype, &rng.normals(n * k));
    let flush = |v: &Stored| match dtype {
        DType::BF16 => flushed(&v.to_f32()),
        _ => v.to_f32(),
    };
    let (wide_x, wide_w) = (flush(&x), flush(&w));
    for cpu in cpus() {
        let mut packed = PackedMatrices::new(&cpu, n, k, dtype).unwrap();
        packed.push(&cpu, w.view(n, k), None).unwrap();
        for threads in [1, 3] {
            let out = with_threads(threads, || {
                let mut out = vec![f32::NAN; rows * n];
                let mut scratch = vec![0xff; scratch_bytes(&cpu)];
                grouped_gemm_into(
                    &cpu,
                    x.view(rows, k),
                    None,
                    &packed,
                    Groups::Single { rows, expert: 0 },
                    None,
                    MatMut::new(&mut out, rows, n).unwrap().into(),
                    &mut scratch,
                )
                .unwrap();
                out
            });
            for sample in 0..samples.min(rows * n) {
                let at = if samples < rows * n {
                    rng.below(rows * n)
                } else {
                    sample
                };
                let (r, j) = (at / n, at % n);
                let expected = chain(dtype, &wide_x[r * k..][..k], &wide_w[j * k..][..k]);
                assert_eq!(
                    out[at].to_bits(),
                    expected.to_bits(),
                    "{dtype} {} native {} {threads} threads: [{rows}, {k}] · [{n}, {k}]ᵀ at {r}, {j}",
                    cpu.isa(),
                    cpu.native_bf16()
                );
            }
        }
    }
}

/// Every number of rows up to two tiles of the largest kind, and around a block.
#[test]
fn each_number_of_rows() {
    for dtype in DTYPES {
        for rows in (1..=29).chain([95, 96, 97, 193]) {
            check_product(rows, 37, 35, dtype, usize::MAX);
        }
    }
}

/// k around lines of A (16 words, 32 bf16) and the unrolled steps.
#[test]
fn each_end_of_a_line() {
    for dtype in DTYPES {
        for k in (1..=36).chain([63, 64, 65, 127, 129]) {
            check_product(5, 33, k, dtype, usize::MAX);
        }
    }
}

/// More of A than fits its half of the L2 cache, whatever that is here (2 MiB at the most), and more columns than one group of panels.
#[test]
fn rows_that_come_in_parts() {
    for dtype in DTYPES {
        check_product(96, 17, 6_001, dtype, 500);
        check_product(7, 17, 80_011, dtype, 100);
        // A group of panels more than one, where half of L2 is at most half a MiB.
        let k = if dtype == DType::BF16 { 2_801 } else { 1_401 };
        check_product(96, 530, k, dtype, 500);
    }
}

/// An output larger than any last-level cache of today's desktops, at a cache line's begin and beside it: K = 1, so that every element is one product.
#[test]
fn large_outputs() {
    let (rows, n) = (4_099, 2_064);
    let mut rng = Rng(11);
    let (x, w) = (rng.normals(rows), rng.normals(n));
    let mut buffer = vec![0.0f32; rows * n + 32];
    for cpu in cpus() {
        let mut packed = PackedMatrices::new(&cpu, n, 1, DType::F32).unwrap();
        packed
            .push(&cpu, MatRef::new(&w, n, 1).unwrap().into(), None)
            .unwrap();
        let aligned = buffer.as_ptr().align_offset(64);
        for skip in [aligned, aligned + 3] {
            buffer.fill(f32::NAN);
            let out = &mut buffer[skip..skip + rows * n];
            grouped_gemm_into(
                &cpu,
                MatRef::new(&x, rows, 1).unwrap().into(),
                None,
                &packed,
                Groups::Single { rows, expert: 0 },
                None,
                MatMut::new(&mut *out, rows, n).unwrap().into(),
                &mut vec![0; scratch_bytes(&cpu)],
            )
            .unwrap();
            for (r, row) in out.chunks_exact(n).enumerate() {
                let same = row.iter().zip(&w).all(|(y, w)| *y == x[r] * w);
                assert!(same, "{} row {r}", cpu.isa());
            }
            assert!(buffer[..skip].iter().all(|v| v.is_nan()));
            assert!(buffer[skip + rows * n..].iter().all(|v| v.is_nan()));
        }
    }
}

/// A layer's experts on a few tokens, with padding rows between.
struct Layer {
    h: usize,
    i: usize,
    x: Stored,
    tokens: usize,
    pair_of_row: Vec<u32>,
    offsets: Vec<usize>,
    counts: Vec<usize>,
    weights: Vec<[Stored; 3]>,
    dtype: DType,
}

impl Layer {
    const SLOTS: usize = 2;

    fn new(seed: u64, tokens: usize, (h, i): (usize, usize), dtype: DType) -> Self {
        let mut rng = Rng(seed);
        let experts = 5;
        let mut of_expert = vec![Vec::new(); experts];
        for pair in 0..(tokens * Self::SLOTS) as u32 {
            // Expert 3 gets nothing.
            of_expert[[0, 1, 2, 4, 4][rng.below(5)]].push(pair);
        }
        let (mut pair_of_row, mut offsets, mut counts) = (Vec::new(), vec![0], Vec::new());
        for pairs in of_expert {
            counts.push(pairs.len());
            pair_of_row.extend(pairs);
            pair_of_row.resize(pair_of_row.len().next_multiple_of(4), u32::MAX);
            offsets.push(pair_of_row.len());
        }
        let mut stored = |n| Stored::new(dtype, &rng.normals(n));
        Self {
            h,
            i,
            x: stored(tokens * h),
            tokens,
            pair_of_row,
            offsets,
            counts,
            weights: (0..experts)
                .map(|_| [stored(i * h), stored(i * h), stored(h * i)])
                .collect(),
            dtype,
        }
    }

    fn pack(&self, cpu: &Cpu) -> PackedExperts {
        let mut experts =
            PackedExperts::new(cpu, self.h, self.i, Activation::SWIGLU, self.dtype).unwrap();
        for [gate, up, down] in &self.weights {
            let (h, i) = (self.h, self.i);
            let weights = ExpertWeights::gated(gate.view(i, h), up.view(i, h), down.view(h, i));
            experts.push(cpu, &weights).unwrap();
        }
        experts
    }

    fn operands(&self) -> (AnyMatRef<'_>, Gather<'_>, Groups<'_>) {
        let gather = Gather {
            pair_of_row: &self.pair_of_row,
            slots: Self::SLOTS,
            input_scale: None,
        };
        let groups = Groups::Ragged {
            offsets: &self.offsets,
            counts: &self.counts,
        };
        (self.x.view(self.tokens, self.h), gather, groups)
    }

    /// ys, by one call or by two.
    fn run(&self, cpu: &Cpu, experts: &PackedExperts, at_once: bool) -> Vec<f32> {
        let (x, gather, groups) = self.operands();
        let rows = self.pair_of_row.len();
        let mut h = Stored::new(self.dtype, &vec![f32::NAN; rows * self.i]);
        let mut ys = vec![f32::NAN; rows * self.h];
        let mut scratch = vec![0xff; scratch_bytes(cpu)];
        let scratch = &mut scratch[..];
        let out = MatMut::new(&mut ys, rows, self.h).unwrap().into();
        if at_once {
            let h = h.view_mut(rows, self.i);
            experts
                .forward_into(cpu, x, Some(gather), groups, h, out, scratch)
                .unwrap();
        } else {
            experts
                .up_into(
                    cpu,
                    x,
                    Some(gather),
                    groups,
                    h.view_mut(rows, self.i),
                    scratch,
                )
                .unwrap();
            experts
                .down_into(cpu, h.view(rows, self.i), groups, out, scratch)
                .unwrap();
        }
        ys
    }
}

/// One call for both products gives the bits of two, at any number of threads, many times over; padding rows stay as they are.
#[test]
fn both_products_at_once() {
    for dtype in DTYPES {
        for (tokens, shape) in [(1, (70, 33)), (40, (33, 100)), (300, (64, 48))] {
            let layer = Layer::new(tokens as u64, tokens, shape, dtype);
            let mut of_first = None;
            for cpu in cpus() {
                let experts = layer.pack(&cpu);
                let expected = with_threads(1, || layer.run(&cpu, &experts, false));
                for e in 0..layer.counts.len() {
                    let padding = layer.offsets[e] + layer.counts[e]..layer.offsets[e + 1];
                    let range = padding.start * layer.h..padding.end * layer.h;
                    assert!(expected[range].iter().all(|v| v.is_nan()));
                }
                let first = of_first.get_or_insert(expected.clone());
                assert_same_bits(&expected, first, &format!("{} {dtype}", cpu.isa()));
                for threads in [1, 2, 7] {
                    for _ in 0..3 {
                        let found = with_threads(threads, || layer.run(&cpu, &experts, true));
                        let what = format!("{} {dtype} {threads} threads", cpu.isa());
                        assert_same_bits(&found, &expected, &what);
                    }
                }
            }
        }
    }
}

/// Each wrong operand is named, and neither output is touched.
#[test]
fn both_products_refuse_what_does_not_fit() {
    let cpu = Cpu::new();
    let layer = Layer::new(1, 6, (8, 4), DType::F32);
    let experts = layer.pack(&cpu);
    let rows = layer.pair_of_row.len();
    let (x, gather, groups) = layer.operands();
    let try_with = |x, h_cols: usize, ys_rows: usize, scratch: usize| {
        let (mut h, mut ys) = (vec![7.5f32; rows * h_cols], vec![7.5f32; ys_rows * 8]);
        let error = experts
            .forward_into(
                &cpu,
                x,
                Some(gather),
                groups,
                MatMut::new(&mut h, rows, h_cols).unwrap().into(),
                MatMut::new(&mut ys, ys_rows, 8).unwrap().into(),
                &mut vec![0; scratch],
            )
            .unwrap_err();
        assert!(h.iter().chain(&ys).all(|&v| v == 7.5));
        error.to_string()
    };
    let enough = scratch_bytes(&cpu);
    let narrow = [0.0f32; 6 * 7];
    let narrow = MatRef::new(&narrow, 6, 7).unwrap().into();
    assert!(try_with(narrow, 4, rows, enough).contains("x"));
    assert!(try_with(x, 5, rows, enough).contains('h'));
    assert!(try_with(x, 4, rows + 1, enough).contains("ys"));
    assert!(try_with(x, 4, rows, enough - 1).contains("scratch"));
    let empty = PackedExperts::new(&cpu, 8, 4, Activation::SWIGLU, DType::F32).unwrap();
    let (mut h, mut ys) = (vec![0.0f32; rows * 4], vec![0.0f32; rows * 8]);
    let error = empty.forward_into(
        &cpu,
        x,
        Some(gather),
        groups,
        MatMut::new(&mut h, rows, 4).unwrap().into(),
        MatMut::new(&mut ys, rows, 8).unwrap().into(),
        &mut vec![0; enough],
    );
    assert!(
        matches!(
            error,
            Err(Error::Value {
                argument: "weights",
                ..
            })
        ),
        "{error:?}"
    );
}
