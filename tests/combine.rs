//! The combine against the definition of its bits and against the f64 oracle.

mod common;

use common::{Rng, assert_same_bits, cases, cpus, with_threads};
use half::bf16;
use moe_kernels::combine::{Combine, Identity, Routed, Shared, combine_into};
use moe_kernels::norm::RmsNorm;
use moe_kernels::permute::NO_ROW;
use moe_kernels::{AnyMatRef, Cpu, MatMut, MatRef, reference};
use proptest::prelude::*;

/// Widths around the vectors of 4, 8 and 16, the blocks of 32, 64 and 256 columns, and the 512 after which the next token's rows are asked for.
fn widths() -> impl Strategy<Value = usize> {
    prop::sample::select(vec![
        1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 255, 256, 257, 300, 511, 512, 513,
        600,
    ])
}

/// Slots around those for which blocks are short (4) and those that are summed in registers (16).
fn slots() -> impl Strategy<Value = usize> {
    prop::sample::select(vec![1, 2, 3, 4, 5, 8, 15, 16, 17, 20])
}

/// `tokens × slots` pairs whose rows are a shuffle, one in five without a row.
struct Problem {
    tokens: usize,
    slots: usize,
    width: usize,
    ys: Vec<f32>,
    weights: Vec<f32>,
    row_of_pair: Vec<u32>,
}

impl Problem {
    fn new(seed: u64, tokens: usize, slots: usize, width: usize) -> Self {
        let mut rng = Rng(seed);
        let pairs = tokens * slots;
        let mut rows: Vec<u32> = (0..pairs as u32).collect();
        for i in (1..pairs).rev() {
            rows.swap(i, rng.below(i + 1));
        }
        let row_of_pair = rows
            .into_iter()
            .map(|r| if rng.below(5) == 0 { NO_ROW } else { r })
            .collect();
        Self {
            tokens,
            slots,
            width,
            ys: rng.normals(pairs * width),
            weights: rng.normals(pairs),
            row_of_pair,
        }
    }

    fn routed(&self) -> Routed<'_> {
        Routed::Pairs {
            ys: self.view(&self.ys),
            weights: Some(&self.weights),
            row_of_pair: &self.row_of_pair,
            slots: self.slots,
            identity: None,
        }
    }

    fn view<'a>(&self, data: &'a [f32]) -> MatRef<'a, f32> {
        MatRef::new(data, data.len() / self.width, self.width).unwrap()
    }

    /// Step 1 as documented: one chain of fused multiply-adds in slot order.
    fn chain(&self) -> Vec<f32> {
        let mut out = vec![0.0f32; self.tokens * self.width];
        for (t, row) in out.chunks_mut(self.width).enumerate() {
            for pair in t * self.slots..(t + 1) * self.slots {
                if self.row_of_pair[pair] != NO_ROW {
                    let ys = &self.ys[self.row_of_pair[pair] as usize * self.width..];
                    for (a, y) in row.iter_mut().zip(ys) {
                        *a = self.weights[pair].mul_add(*y, *a);
                    }
                }
            }
        }
        out
    }

    fn run(&self, cpu: &Cpu, operands: &Combine<'_>) -> Vec<f32> {
        let mut out = vec![f32::NAN; self.tokens * self.width];
        let y = MatMut::new(&mut out, self.tokens, self.width).unwrap();
        combine_into(cpu, operands, y.into()).unwrap();
        out
    }
}

proptest! {
    #![proptest_config(cases(48))]

    #[test]
    fn bits_are_one_chain_in_slot_order(
        seed: u64,
        tokens in prop::sample::select(vec![0usize, 1, 2, 15, 16, 17, 40]),
        slots in slots(),
        width in widths(),
    ) {
        let p = Problem::new(seed, tokens, slots, width);
        let expected = p.chain();
        let exact = reference::combine(
            &p.ys.iter().map(|&v| v.into()).collect::<Vec<f64>>(),
            width,
            &p.weights.iter().map(|&v| v.into()).collect::<Vec<f64>>(),
            &p.row_of_pair.iter().map(|&r| if r == NO_ROW { -1 } else { r.into() }).collect::<Vec<i64>>(),
            slots,
        );
        for cpu in cpus() {
            for threads in [1, 2, 7] {
                let found = with_threads(threads, || p.run(&cpu, &Combine::new(p.routed())));
                assert_same_bits(&found, &expected, cpu.isa().name());
            }
            for (f, e) in p.run(&cpu, &Combine::new(p.routed())).iter().zip(&exact) {
                // slots roundings of sums no larger than slots · 3.5 · 3.5 (the test's normals are bounded).
                let bound = slots as f64 * slots as f64 * 12.3 * f64::from(f32::EPSILON);
                prop_assert!((f64::from(*f) - e).abs() <= bound, "{f} is not {e}");
            }
        }
    }

    /// Every step after the sum, in the documented order, against the same steps written out.
    #[test]
    fn later_steps_follow_in_order(
        seed: u64,
        tokens in 1..20usize,
        width in widths(),
        shared_kind in 0..4,
        with_norm: bool,
        with_bias: bool,
        with_residual: bool,
        many_slots: bool,
    ) {
        let p = Problem::new(seed, tokens, if many_slots { 17 } else { 2 }, width);
        let mut rng = Rng(seed ^ 1);
        let (s, gate) = (rng.normals(tokens * width), rng.normals(tokens));
        let (bias, residual) = (rng.normals(width), rng.normals(tokens * width));
        let norm = RmsNorm::new(&rng.normals(width), 1e-5).unwrap().with_multiplier(0.5).unwrap();
        let mut operands = Combine::new(p.routed());
        operands.routed_scale = 1.5;
        operands.shared = match shared_kind {
            1 => Some(Shared::Add(p.view(&s))),
            2 => Some(Shared::SigmoidGate(p.view(&s), &gate)),
            3 => Some(Shared::Average(p.view(&s))),
            _ => None,
        };
        operands.norm = with_norm.then_some(&norm);
        operands.bias = with_bias.then_some(&bias);
        operands.residual = with_residual.then(|| p.view(&residual).into());

        let mut expected: Vec<f64> = p.chain().iter().map(|&v| f64::from(v * 1.5)).collect();
        for (i, e) in expected.iter_mut().enumerate() {
            let v = f64::from(s[i]);
            match shared_kind {
                1 => *e += v,
                2 => *e += reference::sigmoid(gate[i / width].into()) * v,
                3 => *e = (*e + v) / 2.0,
                _ => {}
            }
        }
        let mut size = vec![1.0f64; tokens];
        for (t, row) in expected.chunks_mut(width).enumerate() {
            if with_norm {
                let w: Vec<f64> = norm.weight().iter().map(|&w| w.into()).collect();
                let mean = row.iter().map(|v| v * v).sum::<f64>() / width as f64;
                // The division magnifies the rounding of what it divides.
                size[t] = (1.0 / (mean + 1e-5).sqrt()).max(1.0);
                let y = reference::rms_norm(row, &w, f64::from(1e-5f32));
                row.iter_mut().zip(y).for_each(|(r, y)| *r = y * 0.5);
            }
            for (j, r) in row.iter_mut().enumerate() {
                *r += if with_bias { f64::from(bias[j]) } else { 0.0 };
                *r += if with_residual { f64::from(residual[t * width + j]) } else { 0.0 };
            }
        }
        let mut first: Option<Vec<f32>> = None;
        for cpu in cpus() {
            let found = p.run(&cpu, &operands);
            for (i, (f, e)) in found.iter().zip(&expected).enumerate() {
                let bound = 64.0 * f64::from(f32::EPSILON) * size[i / width] * 16.0;
                prop_assert!((f64::from(*f) - e).abs() <= bound, "{}: {f} is not {e}", cpu.isa());
            }
            let first = first.get_or_insert_with(|| found.clone());
            assert_same_bits(&found, first, cpu.isa().name());
        }
    }

    /// An identity expert adds weight · x in its slot; a sum that was made elsewhere is taken as it is; the output rounds once.
    #[test]
    fn identity_experts_given_sums_and_formats(seed: u64, tokens in 1..10usize, width in widths()) {
        let mut p = Problem::new(seed, tokens, 3, width);
        let x = Rng(seed ^ 2).normals(tokens * width);
        let mut ids = vec![0i32; tokens * 3];
        for (pair, row) in p.row_of_pair.iter_mut().enumerate() {
            if pair % 4 == 1 {
                (ids[pair], *row) = (7, NO_ROW);
            }
        }
        // The identity rows as if an expert had returned x.
        let mut as_rows = Problem { ys: p.ys.clone(), weights: p.weights.clone(), row_of_pair: p.row_of_pair.clone(), ..p };
        for (pair, row) in as_rows.row_of_pair.iter_mut().enumerate() {
            if ids[pair] == 7 {
                *row = (as_rows.ys.len() / width) as u32;
                as_rows.ys.extend(&x[pair / 3 * width..][..width]);
            }
        }
        let expected = as_rows.chain();
        for cpu in cpus() {
            let Routed::Pairs { ys, weights, row_of_pair, slots, .. } = p.routed() else { unreachable!() };
            let identity = Some(Identity { ids: &ids, num_experts: 7, x: p.view(&x).into() });
            let routed = Routed::Pairs { ys, weights, row_of_pair, slots, identity };
            let found = p.run(&cpu, &Combine::new(routed));
            assert_same_bits(&found, &expected, cpu.isa().name());
            let again = p.run(&cpu, &Combine::new(Routed::Sum(p.view(&found))));
            assert_same_bits(&again, &expected, "a given sum");
            let mut narrow = vec![bf16::NAN; tokens * width];
            let out = MatMut::new(&mut narrow, tokens, width).unwrap().into();
            combine_into(&cpu, &Combine::new(routed), out).unwrap();
            for (n, e) in narrow.iter().zip(&expected) {
                prop_assert_eq!(n.to_bits(), bf16::from_f32(*e).to_bits());
            }
        }
    }
}

/// Weights and rows that are not finite reach the columns that they belong to, and no others: what fills up a vector stays out of the norm's sum.
#[test]
fn infinite_weights_do_not_reach_beyond_the_row() {
    for (width, slots) in [(1, 2), (33, 2), (65, 8), (257, 8), (257, 17)] {
        let mut p = Problem::new(3, 5, slots, width);
        p.row_of_pair = (0..5 * slots as u32).collect();
        p.weights[0] = f32::INFINITY;
        p.ys[..width].fill(0.5);
        p.ys[width * slots] = f32::NAN;
        let norm = RmsNorm::new(&vec![1.0; width], 1e-5).unwrap();
        let with_norm = Combine {
            norm: Some(&norm),
            ..Combine::new(p.routed())
        };
        let chain = p.chain();
        let mut first: Option<Vec<f32>> = None;
        for cpu in cpus() {
            assert_same_bits(
                &p.run(&cpu, &Combine::new(p.routed())),
                &chain,
                cpu.isa().name(),
            );
            let found = p.run(&cpu, &with_norm);
            // ∞ / ∞ in token 0, NaN in the mean of token 1, numbers elsewhere.
            for (i, y) in found.iter().enumerate() {
                assert_eq!(y.is_nan(), i / width < 2, "{}: {i}: {y}", cpu.isa());
            }
            let first = first.get_or_insert_with(|| found.clone());
            assert_same_bits(&found, first, cpu.isa().name());
        }
    }
}

#[test]
fn bad_input_is_named_and_nothing_is_written() {
    let p = Problem::new(1, 4, 2, 8);
    let short = [0.5f32; 7];
    let one_row = MatRef::new(&p.ys, 1, 8).unwrap();
    let gap = MatRef::with_strides(&p.ys, 4, 8, 16, 2).unwrap();
    let norm = RmsNorm::new(&short, 0.0).unwrap();
    let Routed::Pairs {
        ys,
        weights,
        row_of_pair,
        slots,
        identity,
    } = p.routed()
    else {
        unreachable!()
    };
    let good = Combine::new(p.routed());
    let with = |routed| Combine { routed, ..good };
    let pairs = |ys, weights, row_of_pair, identity| {
        with(Routed::Pairs {
            ys,
            weights,
            row_of_pair,
            slots,
            identity,
        })
    };
    let bad_rows = &[100u32; 8][..];
    let ids = [9i32; 8];
    let bad_identity = Some(Identity {
        ids: &ids,
        num_experts: 7,
        x: AnyMatRef::F32(one_row),
    });
    let few_rows = &row_of_pair[1..];
    let wrong = [
        ("row_of_pair", pairs(ys, weights, few_rows, identity)),
        ("row_of_pair", pairs(ys, weights, bad_rows, identity)),
        ("weights", pairs(ys, Some(&short), row_of_pair, identity)),
        ("weights", pairs(ys, None, row_of_pair, bad_identity)),
        ("x", pairs(ys, weights, row_of_pair, bad_identity)),
        ("ys", pairs(gap, weights, row_of_pair, identity)),
        ("routed sum", with(Routed::Sum(one_row))),
        (
            "routed_scale",
            Combine {
                routed_scale: f32::INFINITY,
                ..good
            },
        ),
        (
            "shared",
            Combine {
                shared: Some(Shared::Add(one_row)),
                ..good
            },
        ),
        (
            "shared gate",
            Combine {
                shared: Some(Shared::SigmoidGate(p.view(&p.ys[..32]), &short)),
                ..good
            },
        ),
        (
            "norm",
            Combine {
                norm: Some(&norm),
                ..good
            },
        ),
        (
            "bias",
            Combine {
                bias: Some(&short),
                ..good
            },
        ),
        (
            "residual",
            Combine {
                residual: Some(one_row.into()),
                ..good
            },
        ),
    ];
    for (argument, operands) in wrong {
        let mut out = [7.5f32; 32];
        let error = combine_into(
            &Cpu::new(),
            &operands,
            MatMut::new(&mut out, 4, 8).unwrap().into(),
        )
        .expect_err(argument);
        assert!(
            error.to_string().starts_with(argument),
            "{argument}: {error}"
        );
        assert_eq!(out, [7.5; 32], "{argument}");
    }
    assert!(RmsNorm::new(&short, -1.0).is_err() && RmsNorm::new(&short, f32::NAN).is_err());
}
