//! Formats of numbers, gathered rows, layouts of weights.

use super::*;

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
                    let groups = Groups::Ragged {
                        offsets: &[0, rows],
                        counts: &[rows],
                    };
                    let (x, view) = (x.view(rows, k), MatMut::new(&mut out, rows, n).unwrap());
                    multiply(&cpu, x, None, &packed, groups, None, view.into()).unwrap();
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
        let mut p = Permutation::default();
        let options = PermuteOptions { block, ..Default::default() };
        p.sort(&Cpu::new(), &ids, experts, &options).unwrap();
        let (rows, bias) = (p.num_rows(), rng.normals(experts * n));
        let mut w = rounded(w_type, &rng.normals(experts * n * k));
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
                    a = rounded(x_type, &a.iter().map(|v| v * scale[pair]).collect::<Vec<_>>());
                }
                if flush && x_type == DType::BF16 {
                    a = flushed(&a);
                }
                for j in 0..n {
                    let sum = chain(w_type, &a, &chain_w[(e * n + j) * k..][..k]) + bias[e * n + j];
                    expected[r * n + j] = rounded(out_type, &[sum])[0];
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
            let gather = Gather {
                pair_of_row: p.pair_of_row(),
                slots,
                input_scale: with_scale.then_some(&scale[..]),
            };
            let groups = Groups::Ragged { offsets: p.offsets(), counts: p.counts() };
            let (x, view) = (x.view(tokens, k), out.view_mut(rows, n));
            multiply(&cpu, x, Some(gather), &packed, groups, None, view).unwrap();
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
