//! The grouped product against the definition of its bits, and against the f64 oracle.

mod common;

use common::product::{Stored, chain, flushed};
use common::{Rng, assert_same_bits, bits, cases, cpus, with_threads};
use half::{bf16, f16};
use moe_kernels::experts::{ExpertWeights, PackedExperts};
use moe_kernels::grouped_gemm::{
    Activation, ActivationFunction, Clamp, Gather, Groups, PackedMatrices, grouped_gemm_into,
    scratch_bytes,
};
use moe_kernels::reference;
use moe_kernels::{AnyMatRef, Cpu, DType, Error, Isa, MatMut, MatRef};
use proptest::prelude::*;

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

/// Every activation that can be asked for.
fn activations() -> Vec<Activation> {
    use ActivationFunction::*;
    let mut all = Vec::new();
    for function in [Identity, Silu, Gelu, GeluTanh, Relu, Relu2] {
        for gated in [true, false] {
            for clamp in [
                Clamp::None,
                Clamp::Pre { limit: 0.7 },
                Clamp::Post { limit: 0.5 },
            ] {
                all.push(Activation {
                    function,
                    gated,
                    clamp,
                });
            }
        }
    }
    all.push(Activation::GPT_OSS);
    all.push(Activation {
        clamp: Clamp::GptOss {
            limit: 0.8,
            alpha: 1.3,
        },
        ..Activation::SWIGLU
    });
    for (gate, up) in [(0.9, 1.1), (0.0, 1.1), (0.9, 0.0)] {
        all.push(Activation {
            clamp: Clamp::Softcap { gate, up },
            ..Activation::SWIGLU
        });
    }
    all
}

/// `act(z)` for one row of pre-activations, fed through K = 1 products with weights z and input 1.
fn activate(cpu: &Cpu, activation: Activation, gate: &[f32], up: &[f32]) -> Vec<f32> {
    let n = up.len();
    let view = |w| AnyMatRef::from(MatRef::new(w, n, 1).unwrap());
    let packed = if activation.gated {
        let mut packed = PackedMatrices::new_gated(cpu, n, 1, DType::F32).unwrap();
        packed
            .push_gated(cpu, view(gate), view(up), None, None)
            .unwrap();
        packed
    } else {
        let mut packed = PackedMatrices::new(cpu, n, 1, DType::F32).unwrap();
        packed.push(cpu, view(up), None).unwrap();
        packed
    };
    let mut out = vec![f32::NAN; n];
    grouped_gemm_into(
        cpu,
        MatRef::new(&[1.0f32], 1, 1).unwrap().into(),
        None,
        &packed,
        Groups::Single { rows: 1, expert: 0 },
        Some(activation),
        MatMut::new(&mut out, 1, n).unwrap().into(),
        &mut vec![0; scratch_bytes(cpu)],
    )
    .unwrap();
    out
}

#[test]
fn activations_match_the_oracle_and_each_other() {
    let mut rng = Rng(5);
    let special = [
        0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 90.0, -90.0, 1e4, -1e4,
    ];
    let gate: Vec<f32> = special
        .into_iter()
        .chain((0..501).map(|_| rng.normal() * 3.0))
        .collect();
    let up: Vec<f32> = rng.normals(gate.len());
    for activation in activations() {
        let spec = reference::MlpSpec::from(activation);
        let inputs = if activation.gated { &up } else { &gate };
        let mut first: Option<Vec<f32>> = None;
        for cpu in cpus() {
            let found = activate(&cpu, activation, &gate, inputs);
            for (i, &f) in found.iter().enumerate() {
                let (g, u) = (f64::from(gate[i]), f64::from(inputs[i]));
                let exact = spec.activate(g, u);
                // A few roundings, each relative to an intermediate no larger than this (ReLU² squares, the rest are at most linear).
                let size = g.abs().max(1.0) * (u.abs() + 1.0).max(g.abs());
                let bound = 16.0 * f64::from(f32::EPSILON) * size;
                assert!(
                    (f64::from(f) - exact).abs() <= bound,
                    "{} {activation:?} of ({g}, {u}): {f} is not {exact}",
                    cpu.isa()
                );
            }
            let first = first.get_or_insert_with(|| found.clone());
            assert_same_bits(&found, first, &format!("{} {activation:?}", cpu.isa()));
        }
    }
}

#[test]
fn nan_passes_through_every_activation() {
    for cpu in cpus() {
        for activation in activations() {
            let n = 40;
            for (g, u) in [(f32::NAN, 1.0), (1.0, f32::NAN)] {
                let u = if activation.gated { u } else { f32::NAN };
                let out = activate(&cpu, activation, &vec![g; n], &vec![u; n]);
                assert!(
                    out.iter().all(|v| v.is_nan()),
                    "{} {activation:?}",
                    cpu.isa()
                );
            }
        }
    }
}

/// A subnormal bf16 counts as a zero in rows and in weights, wherever it stands: the other factor is so large that its product would show.
#[test]
fn subnormal_bf16_numbers_count_as_zeros() {
    for (rows, k) in [(1, 7), (3, 40), (23, 33), (23, 8)] {
        for at in 0..k {
            for in_rows in [true, false] {
                let (n, tiny, large) = (19, -1e-40, 1e36);
                let place = |len: usize, tiny_here: bool| -> Vec<f32> {
                    let at = |i: usize| if i % k == at { tiny } else { 0.0 };
                    (0..len)
                        .map(|i| if tiny_here { at(i) } else { large })
                        .collect()
                };
                let x = Stored::new(DType::BF16, &place(rows * k, in_rows));
                let w = Stored::new(DType::BF16, &place(n * k, !in_rows));
                for cpu in cpus() {
                    let mut packed = PackedMatrices::new(&cpu, n, k, DType::BF16).unwrap();
                    packed.push(&cpu, w.view(n, k), None).unwrap();
                    let mut out = vec![f32::NAN; rows * n];
                    grouped_gemm_into(
                        &cpu,
                        x.view(rows, k),
                        None,
                        &packed,
                        Groups::Ragged {
                            offsets: &[0, rows],
                            counts: &[rows],
                        },
                        None,
                        MatMut::new(&mut out, rows, n).unwrap().into(),
                        &mut vec![0xff; scratch_bytes(&cpu)],
                    )
                    .unwrap();
                    let what = format!("{} native {}: k {at} of {k}", cpu.isa(), cpu.native_bf16());
                    assert_same_bits(&out, &vec![0.0; rows * n], &what);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(cases(32))]

    /// Gathered rows, weights on the input, biases, padding rows, every pair of formats: still one chain, then the bias, then one rounding.
    #[test]
    fn gathered_rows_biases_and_formats(
        seed: u64,
        tokens in around(&[1, 5, 33]),
        slots in 1..4usize,
        n in around(&[16, 33]),
        k in around(&[2, 64, 130]),
        x_type in dtypes(),
        w_type in dtypes(),
        out_type in dtypes(),
        with_scale: bool,
        block in 1..5usize,
    ) {
        let experts = 3;
        let mut rng = Rng(seed);
        let mut values = rng.normals(tokens * k);
        values[0] = 1e-40; // subnormal in f32 and bf16
        let x = Stored::new(x_type, &values);
        let scale = rng.normals(tokens * slots);
        let ids: Vec<i32> = (0..tokens * slots).map(|_| rng.below(experts) as i32).collect();
        let mut p = moe_kernels::permute::Permutation::default();
        let options = moe_kernels::permute::PermuteOptions { block, ..Default::default() };
        p.sort(&Cpu::new(), &ids, experts, &options).unwrap();
        let (rows, bias) = (p.num_rows(), rng.normals(experts * n));
        let mut w = round_to(w_type, &rng.normals(experts * n * k));
        w[k - 1] = 1e-40;
        let w = Stored::new(w_type, &w).to_f32();

        let flush = w_type == DType::BF16;
        let chain_w = if flush { flushed(&w) } else { w.clone() };
        let x_f32 = x.to_f32();
        let mut expected = vec![f32::NAN; rows * n];
        for e in 0..experts {
            for r in p.rows_of(e) {
                let pair = p.pair_of_row()[r] as usize;
                let mut a = x_f32[pair / slots * k..][..k].to_vec();
                if with_scale {
                    a = round_to(x_type, &a.iter().map(|v| v * scale[pair]).collect::<Vec<_>>());
                }
                if flush && x_type == DType::BF16 {
                    a = flushed(&a);
                }
                for j in 0..n {
                    let sum = chain(w_type, &a, &chain_w[(e * n + j) * k..][..k]) + bias[e * n + j];
                    expected[r * n + j] = round_to(out_type, &[sum])[0];
                }
            }
        }

        for cpu in cpus() {
            let mut packed = PackedMatrices::new(&cpu, n, k, w_type).unwrap();
            for e in 0..experts {
                let w = MatRef::new(&w[e * n * k..][..n * k], n, k).unwrap();
                packed.push(&cpu, w.into(), Some(&bias[e * n..][..n])).unwrap();
            }
            let mut out = Stored::new(out_type, &vec![f32::NAN; rows * n]);
            grouped_gemm_into(
                &cpu,
                x.view(tokens, k),
                Some(Gather {
                    pair_of_row: p.pair_of_row(),
                    slots,
                    input_scale: with_scale.then_some(&scale[..]),
                }),
                &packed,
                Groups::Ragged { offsets: p.offsets(), counts: p.counts() },
                None,
                out.view_mut(rows, n),
                &mut vec![0xff; scratch_bytes(&cpu)],
            )
            .unwrap();
            // Padding rows stay the NaN that they were.
            assert_same_bits(&out.to_f32(), &expected, &format!("{} {x_type} x {w_type}", cpu.isa()));
        }
    }

    /// All layouts of a checkpoint pack to the same bits.
    #[test]
    fn layouts_agree(seed: u64, i in around(&[8, 17]), h in around(&[16, 65]), dtype in dtypes()) {
        let mut rng = Rng(seed);
        let (gate, up) = (rng.normals(i * h), rng.normals(i * h));
        let down = rng.normals(h * i);
        let fused: Vec<f32> = gate.iter().chain(&up).copied().collect();
        let interleaved: Vec<f32> =
            gate.chunks(h).zip(up.chunks(h)).flat_map(|(g, u)| [g, u].concat()).collect();
        let transpose = |m: &[f32], rows: usize, cols: usize| -> Vec<f32> {
            (0..cols).flat_map(|c| (0..rows).map(move |r| m[r * cols + c])).collect()
        };
        let (fused_t, interleaved_t) = (transpose(&fused, 2 * i, h), transpose(&interleaved, 2 * i, h));
        let down_t = transpose(&down, h, i);
        fn view(m: &[f32], rows: usize, cols: usize) -> AnyMatRef<'_> {
            MatRef::new(m, rows, cols).unwrap().into()
        }
        let d = view(&down, h, i);
        let layouts = [
            ExpertWeights::gated(view(&gate, i, h), view(&up, i, h), d),
            ExpertWeights::fused(view(&fused, 2 * i, h), d).unwrap(),
            ExpertWeights::fused(view(&fused_t, h, 2 * i).transposed(), d).unwrap(),
            ExpertWeights::interleaved(view(&interleaved, 2 * i, h), d).unwrap(),
            ExpertWeights::interleaved(
                view(&interleaved_t, h, 2 * i).transposed(),
                view(&down_t, i, h).transposed(),
            )
            .unwrap(),
        ];
        let x = rng.normals(3 * h);
        for cpu in cpus() {
            let mut experts = PackedExperts::new(&cpu, h, i, Activation::SWIGLU, dtype).unwrap();
            for layout in &layouts {
                experts.push(&cpu, layout).unwrap();
            }
            let mut scratch = vec![0; scratch_bytes(&cpu)];
            let results: Vec<Vec<u32>> = (0..layouts.len())
                .map(|expert| {
                    let groups = Groups::Single { rows: 3, expert };
                    let (mut mid, mut out) = (vec![f32::NAN; 3 * i], vec![f32::NAN; 3 * h]);
                    let mid_out = MatMut::new(&mut mid, 3, i).unwrap().into();
                    experts.up_into(&cpu, view(&x, 3, h), None, groups, mid_out, &mut scratch).unwrap();
                    let out_mut = MatMut::new(&mut out, 3, h).unwrap().into();
                    experts.down_into(&cpu, view(&mid, 3, i), groups, out_mut, &mut scratch).unwrap();
                    bits(&out)
                })
                .collect();
            for result in &results {
                prop_assert_eq!(result, &results[0]);
            }
        }
    }
}

/// One wrong argument at a time: an error that names it, and an output that nobody touched.
#[test]
fn bad_input_is_named_and_nothing_is_written() {
    let cpu = Cpu::new();
    let p = Problem::new(1, 6, 5, 4, 2, DType::F32);
    let packed = p.pack(&cpu);
    let good = Groups::Ragged {
        offsets: &p.offsets,
        counts: &p.counts,
    };
    let x = |rows, cols| AnyMatRef::from(MatRef::new(&p.x, rows, cols).unwrap());
    let check = |argument: &str, x, gather, groups, activation, (rows, cols), scratch| {
        let mut out = [7.5f32; 64];
        let error = grouped_gemm_into(
            &cpu,
            x,
            gather,
            &packed,
            groups,
            activation,
            MatMut::new(&mut out, rows, cols).unwrap().into(),
            &mut vec![0; scratch],
        )
        .expect_err(argument);
        assert!(
            error.to_string().starts_with(argument),
            "{argument}: {error}"
        );
        assert_eq!(out, [7.5; 64], "{argument}");
    };
    let enough = scratch_bytes(&cpu);
    check("x", x(6, 3), None, good, None, (6, 5), enough);
    check("x", x(5, 4), None, good, None, (6, 5), enough);
    check("out", x(6, 4), None, good, None, (6, 4), enough);
    check("out", x(6, 4), None, good, None, (5, 5), enough);
    check("scratch", x(6, 4), None, good, None, (6, 5), enough - 1);
    check(
        "activation",
        x(6, 4),
        None,
        good,
        Some(Activation::SWIGLU),
        (6, 5),
        enough,
    );
    let bad_clamp = Activation {
        clamp: Clamp::Pre { limit: f32::NAN },
        ..Activation::plain(ActivationFunction::Relu)
    };
    check(
        "clamp.limit",
        x(6, 4),
        None,
        good,
        Some(bad_clamp),
        (6, 5),
        enough,
    );
    let short = Groups::Ragged {
        offsets: &p.offsets[..2],
        counts: &p.counts[..1],
    };
    check("groups", x(6, 4), None, short, None, (6, 5), enough);
    let overlapping = Groups::Ragged {
        offsets: &[0, 2, 6],
        counts: &[3, 4],
    };
    check("groups", x(6, 4), None, overlapping, None, (6, 5), enough);
    let huge = Groups::Ragged {
        offsets: &[0, 2, 6],
        counts: &[usize::MAX, 4],
    };
    check("groups", x(6, 4), None, huge, None, (6, 5), enough);
    check(
        "groups",
        x(6, 4),
        None,
        Groups::Single { rows: 6, expert: 2 },
        None,
        (6, 5),
        enough,
    );
    let gather = |pair_of_row, slots, input_scale| {
        Some(Gather {
            pair_of_row,
            slots,
            input_scale,
        })
    };
    check(
        "pair_of_row",
        x(6, 4),
        gather(&[0; 5], 1, None),
        good,
        None,
        (6, 5),
        enough,
    );
    check(
        "pair_of_row",
        x(6, 4),
        gather(&[0, 1, 2, 3, 4, 6], 1, None),
        good,
        None,
        (6, 5),
        enough,
    );
    check(
        "slots",
        x(6, 4),
        gather(&[0; 6], 0, None),
        good,
        None,
        (6, 5),
        enough,
    );
    check(
        "input_scale",
        x(6, 4),
        gather(&[0; 6], 1, Some(&[1.0; 5])),
        good,
        None,
        (6, 5),
        enough,
    );
}

#[test]
fn packed_sets_refuse_what_does_not_fit() {
    let cpu = Cpu::new();
    let w = vec![0.0f32; 64];
    let view = |rows, cols| AnyMatRef::from(MatRef::new(&w, rows, cols).unwrap());
    let named = |error: Error, argument: &str| {
        assert!(
            error.to_string().starts_with(argument),
            "{argument}: {error}"
        );
    };
    named(
        PackedMatrices::new(&cpu, 0, 4, DType::F32).unwrap_err(),
        "n",
    );
    named(
        PackedMatrices::new(&cpu, 4, 0, DType::F32).unwrap_err(),
        "k",
    );
    named(
        PackedMatrices::new(&cpu, usize::MAX / 2, 8, DType::F32).unwrap_err(),
        "packed matrix",
    );
    let mut plain = PackedMatrices::new(&cpu, 4, 8, DType::F32).unwrap();
    named(plain.push(&cpu, view(8, 4), None).unwrap_err(), "w");
    named(
        plain.push(&cpu, view(4, 8), Some(&[0.0; 3])).unwrap_err(),
        "bias",
    );
    named(
        plain
            .push_gated(&cpu, view(4, 8), view(4, 8), None, None)
            .unwrap_err(),
        "gate",
    );
    let mut gated = PackedMatrices::new_gated(&cpu, 4, 8, DType::F32).unwrap();
    named(gated.push(&cpu, view(4, 8), None).unwrap_err(), "w");
    assert!(plain.is_empty() && gated.is_empty());

    let mut experts = PackedExperts::new(&cpu, 8, 4, Activation::SWIGLU, DType::F32).unwrap();
    let good = ExpertWeights::gated(view(4, 8), view(4, 8), view(8, 4));
    named(
        experts
            .push(
                &cpu,
                &ExpertWeights {
                    down: view(4, 8),
                    ..good
                },
            )
            .unwrap_err(),
        "down",
    );
    named(
        experts
            .push(
                &cpu,
                &ExpertWeights {
                    up: view(8, 4),
                    ..good
                },
            )
            .unwrap_err(),
        "up",
    );
    named(
        experts
            .push(&cpu, &ExpertWeights { gate: None, ..good })
            .unwrap_err(),
        "gate",
    );
    let bias = &[0.0f32; 3][..];
    named(
        experts
            .push(&cpu, &good.with_biases(None, None, Some(bias)))
            .unwrap_err(),
        "down_bias",
    );
    named(
        experts
            .push(&cpu, &good.with_biases(Some(bias), None, None))
            .unwrap_err(),
        "gate_bias",
    );
    assert_eq!(experts.len(), 0);
    assert_eq!(experts.push(&cpu, &good), Ok(0));
    named(
        ExpertWeights::fused(view(3, 8), view(8, 4)).unwrap_err(),
        "gate_up",
    );
}

#[test]
fn weights_packed_for_another_isa_are_refused() {
    let scalar = Cpu::with_isa(Isa::Scalar).unwrap();
    let best = Cpu::new();
    if best.isa() == Isa::Scalar {
        return; // one ISA: there is no other to pack for
    }
    let p = Problem::new(1, 6, 5, 4, 2, DType::F32);
    let packed = p.pack(&scalar);
    let mut out = [7.5f32; 30];
    let error = grouped_gemm_into(
        &best,
        MatRef::new(&p.x, 6, 4).unwrap().into(),
        None,
        &packed,
        Groups::Ragged {
            offsets: &p.offsets,
            counts: &p.counts,
        },
        None,
        MatMut::new(&mut out, 6, 5).unwrap().into(),
        &mut vec![0; scratch_bytes(&best)],
    )
    .unwrap_err();
    assert!(
        matches!(
            error,
            Error::PackedFor {
                argument: "weights",
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(out, [7.5; 30]);
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
