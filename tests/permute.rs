//! Sorting pairs by expert, and the row copies, against the definition.

use half::{bf16, f16};
use moe_kernels::permute::{
    NO_PAIR, NO_ROW, Permutation, PermuteOptions, permute_rows_into, unpermute_rows_into,
};
use moe_kernels::{AnyMatMut, AnyMatRef, Cpu, Element, Error, MatMut, MatRef};
use proptest::prelude::*;

/// Runs `f` inside rayon pools of 1, 2 and 7 threads, and on the calling thread alone.
fn on_every_pool(f: impl Fn(&Cpu) + Send + Sync) {
    for threads in [1, 2, 7] {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| f(&Cpu::new()));
    }
    f(&Cpu::new().single_threaded());
}

/// The definition: offsets, counts, pair_of_row, row_of_pair.
fn definition(
    ids: &[i32],
    num_experts: usize,
    options: &PermuteOptions,
) -> (Vec<usize>, Vec<usize>, Vec<u32>, Vec<u32>) {
    let local = options.local.clone().unwrap_or(0..num_experts);
    let mut offsets = vec![0];
    let mut counts = Vec::new();
    let mut pair_of_row = Vec::new();
    let mut row_of_pair = vec![NO_ROW; ids.len()];
    for expert in 0..num_experts {
        for (pair, &id) in ids.iter().enumerate() {
            if id == expert as i32 && local.contains(&expert) {
                row_of_pair[pair] = pair_of_row.len() as u32;
                pair_of_row.push(pair as u32);
            }
        }
        counts.push(pair_of_row.len() - offsets[expert]);
        while pair_of_row.len() % options.block != 0 {
            pair_of_row.push(NO_PAIR);
        }
        offsets.push(pair_of_row.len());
    }
    (offsets, counts, pair_of_row, row_of_pair)
}

fn check(p: &Permutation, ids: &[i32], num_experts: usize, options: &PermuteOptions) {
    let (offsets, counts, pair_of_row, row_of_pair) = definition(ids, num_experts, options);
    assert_eq!(p.offsets(), offsets);
    assert_eq!(p.counts(), counts);
    assert_eq!(p.pair_of_row(), pair_of_row);
    assert_eq!(p.row_of_pair(), row_of_pair);
    assert_eq!(p.num_rows(), *offsets.last().unwrap());
    assert_eq!(p.num_pairs(), ids.len());
    assert_eq!(p.num_experts(), num_experts);
    for e in 0..num_experts {
        assert_eq!(p.rows_of(e), offsets[e]..offsets[e] + counts[e]);
    }
    assert!(p.rows_of(num_experts).is_empty());
}

/// Deterministic noise.
fn hash(i: usize) -> usize {
    (i as u64 + 1)
        .wrapping_mul(0x9E37_79B9_7F4A_7C15)
        .rotate_left(31) as usize
}

#[derive(Clone, Debug)]
struct Case {
    ids: Vec<i32>,
    num_experts: usize,
    options: PermuteOptions,
}

fn case() -> impl Strategy<Value = Case> {
    (1usize..70, 0usize..4, 1usize..20).prop_flat_map(|(num_experts, num_null, block)| {
        let ids = prop::collection::vec(-1..(num_experts + num_null) as i32, 0..300);
        let local = prop::option::of((0..=num_experts, 0..=num_experts))
            .prop_map(|l| l.map(|(a, b)| a.min(b)..a.max(b)));
        (ids, local).prop_map(move |(ids, local)| Case {
            ids,
            num_experts,
            options: PermuteOptions {
                block,
                local,
                num_null,
            },
        })
    })
}

proptest! {
    #[test]
    fn sorting_follows_the_definition(cases in prop::collection::vec(case(), 1..4)) {
        // One permutation for all cases: nothing may remain of the one before.
        let mut p = Permutation::default();
        for Case { ids, num_experts, options } in cases {
            p.sort(&Cpu::new(), &ids, num_experts, &options).unwrap();
            check(&p, &ids, num_experts, &options);
        }
    }

    #[test]
    fn a_wrong_id_is_refused_and_nothing_changes(
        c in case(),
        at in any::<prop::sample::Index>(),
        wrong in prop::sample::select(vec![i32::MIN, -2, 0, 1, i32::MAX]),
    ) {
        prop_assume!(!c.ids.is_empty());
        let mut p = Permutation::default();
        p.sort(&Cpu::new(), &c.ids, c.num_experts, &c.options).unwrap();
        let mut ids = c.ids.clone();
        let limit = (c.num_experts + c.options.num_null) as i32;
        ids[at.index(c.ids.len())] = if (0..2).contains(&wrong) { limit + wrong } else { wrong };
        let e = p.sort(&Cpu::new(), &ids, c.num_experts, &c.options).unwrap_err();
        let named = matches!(e, Error::Value { argument: "ids", .. });
        prop_assert!(named, "{}", e);
        check(&p, &c.ids, c.num_experts, &c.options);
    }
}

#[test]
fn few_pairs_are_sorted_like_many() {
    let cpu = Cpu::new();
    let mut p = Permutation::default();
    for num_experts in [1, 2, 5, 16, 130, 1000] {
        for pairs in 0..=20 {
            for round in 0..8 {
                // Equal ids, rising, falling, any.
                let id = |i: usize| match round {
                    0 => num_experts - 1,
                    1 => i % num_experts,
                    2 => (pairs - i) % num_experts,
                    _ => hash(i + 100 * round + pairs) % num_experts,
                };
                let mut ids: Vec<i32> = (0..pairs).map(|i| id(i) as i32).collect();
                let mut options = PermuteOptions::default();
                match round {
                    4 => options.block = 2,
                    5 => options.local = Some(num_experts / 2..num_experts),
                    6 => ids.iter_mut().step_by(3).for_each(|id| *id = -1),
                    7 => {
                        options.num_null = 1;
                        let last = ids.iter_mut().last();
                        last.into_iter().for_each(|id| *id = num_experts as i32);
                    }
                    _ => {}
                }
                p.sort(&cpu, &ids, num_experts, &options).unwrap();
                check(&p, &ids, num_experts, &options);
            }
        }
    }
    // Wrong ids are refused here too.
    for wrong in [-2, 5, i32::MIN, i32::MAX] {
        let before = (p.offsets().to_vec(), p.pair_of_row().to_vec());
        let options = PermuteOptions::default();
        assert!(p.sort(&cpu, &[1, wrong, 2], 5, &options).is_err());
        assert_eq!((p.offsets().to_vec(), p.pair_of_row().to_vec()), before);
    }
}

#[test]
fn chunks_and_threads_do_not_show() {
    // One below, at and one above one and two chunks of 8192 pairs, and chunks as long as E.
    for (pairs, num_experts) in [
        (8191, 5),
        (8192, 5),
        (8193, 5),
        (16_383, 130),
        (16_384, 130),
        (16_385, 130),
        (9000, 9000),
        (30_001, 10_000),
    ] {
        let ids: Vec<i32> = (0..pairs)
            .map(|i| (hash(i) % (num_experts + 2)) as i32 - 1)
            .collect();
        let local = num_experts / 5..num_experts;
        let options = PermuteOptions {
            block: 1 + pairs % 7,
            local: Some(local.clone()),
            num_null: 1,
        };
        let mut quick = Permutation::default();
        quick
            .sort(&Cpu::new().single_threaded(), &ids, num_experts, &options)
            .unwrap();
        if num_experts < 1000 {
            check(&quick, &ids, num_experts, &options);
        }
        on_every_pool(|cpu| {
            let mut p = Permutation::with_capacity(pairs, num_experts);
            p.sort(cpu, &ids, num_experts, &options).unwrap();
            assert_eq!(p.offsets(), quick.offsets());
            assert_eq!(p.pair_of_row(), quick.pair_of_row());
            assert_eq!(p.row_of_pair(), quick.row_of_pair());
            for (pair, &row) in p.row_of_pair().iter().enumerate() {
                let id = ids[pair] as usize;
                if local.contains(&id) {
                    assert!(p.rows_of(id).contains(&(row as usize)));
                    assert_eq!(p.pair_of_row()[row as usize] as usize, pair);
                } else {
                    assert_eq!(row, NO_ROW);
                }
            }
        });
    }
}

#[test]
fn extremes() {
    let mut p = Permutation::with_capacity(0, 0);
    assert_eq!((p.num_rows(), p.num_pairs(), p.num_experts()), (0, 0, 0));
    assert_eq!(p.offsets(), [0]);
    let cpu = Cpu::new();
    let plain = PermuteOptions::default();
    for ids in [vec![], vec![0; 50], vec![-1; 50]] {
        p.sort(&cpu, &ids, 1, &plain).unwrap();
        check(&p, &ids, 1, &plain);
    }
    // One expert takes all, every other is empty.
    p.sort(&cpu, &[4; 100], 8, &plain).unwrap();
    assert_eq!(p.counts(), [0, 0, 0, 0, 100, 0, 0, 0]);
}

#[test]
fn bad_options_are_named() {
    let mut p = Permutation::default();
    let cpu = Cpu::new();
    let mut argument = |ids: &[i32], e, options| match p.sort(&cpu, ids, e, &options) {
        Err(Error::Value { argument, .. }) => argument,
        other => panic!("{other:?}"),
    };
    let plain = PermuteOptions::default;
    #[allow(clippy::reversed_empty_ranges)]
    let backwards = Some(2..1);
    assert_eq!(argument(&[], 0, plain()), "num_experts");
    assert_eq!(argument(&[0], usize::MAX, plain()), "num_experts");
    assert_eq!(
        argument(
            &[0],
            2,
            PermuteOptions {
                block: 0,
                ..plain()
            }
        ),
        "block"
    );
    assert_eq!(
        argument(
            &[0],
            2,
            PermuteOptions {
                local: Some(1..3),
                ..plain()
            }
        ),
        "local"
    );
    assert_eq!(
        argument(
            &[0],
            2,
            PermuteOptions {
                local: backwards,
                ..plain()
            }
        ),
        "local"
    );
    assert_eq!(argument(&[2], 2, plain()), "ids");
    let huge = PermuteOptions {
        block: usize::MAX,
        ..plain()
    };
    assert!(matches!(
        p.sort(&cpu, &[0, 1], 2, &huge),
        Err(Error::Overflow { .. })
    ));
    // Impossible room is no panic either.
    Permutation::with_capacity(usize::MAX, usize::MAX).reserve(usize::MAX, usize::MAX, usize::MAX);
}

fn check_copies<T: Element>(tokens: usize, slots: usize, hidden: usize, block: usize)
where
    for<'a> AnyMatRef<'a>: From<MatRef<'a, T>>,
    for<'a> AnyMatMut<'a>: From<MatMut<'a, T>>,
{
    let num_experts = 6;
    let pairs = tokens * slots;
    let ids: Vec<i32> = (0..pairs)
        .map(|i| (hash(i) % (num_experts + 1)) as i32 - 1)
        .collect();
    let mut p = Permutation::default();
    let options = PermuteOptions {
        block,
        ..Default::default()
    };
    p.sort(&Cpu::new(), &ids, num_experts, &options).unwrap();
    let nan = narrow::<T>(f32::NAN);
    let x: Vec<T> = (0..tokens * (hidden + 3))
        .map(|i| narrow::<T>((hash(i) % 4096) as f32 / 4096.0))
        .collect();
    let views = [
        MatRef::with_strides(&x, tokens, hidden, hidden + 3, 1).unwrap(),
        MatRef::with_strides(&x, hidden, tokens, tokens, 1)
            .unwrap()
            .transposed(),
    ];
    for view in views {
        on_every_pool(|cpu| {
            let stride = hidden + 1;
            let mut rows = vec![nan; p.num_rows() * stride];
            let out = MatMut::with_row_stride(&mut rows, p.num_rows(), hidden, stride).unwrap();
            permute_rows_into(cpu, view.into(), &p, slots, out.into()).unwrap();
            for (row, &pair) in p.pair_of_row().iter().enumerate() {
                for j in 0..hidden {
                    let want = match pair {
                        NO_PAIR => T::default(),
                        pair => view.get(pair as usize / slots, j).unwrap(),
                    };
                    assert_eq!(rows[row * stride + j], want);
                }
                // What lies between the rows is not ours.
                assert!(rows[row * stride + hidden].to_f32().is_nan());
            }
            let mut back = vec![nan; pairs * hidden];
            let ys = MatRef::with_strides(&rows, p.num_rows(), hidden, stride, 1).unwrap();
            let out = MatMut::new(&mut back, pairs, hidden).unwrap();
            unpermute_rows_into(cpu, ys.into(), &p, out.into()).unwrap();
            for pair in 0..pairs {
                for j in 0..hidden {
                    let want = if ids[pair] < 0 {
                        None
                    } else {
                        view.get(pair / slots, j)
                    };
                    assert_eq!(back[pair * hidden + j], want.unwrap_or_default());
                }
            }
        });
    }
}

#[test]
fn rows_are_copied_there_and_back() {
    for (tokens, slots, hidden, block) in [
        (0, 2, 8, 1),
        (1, 1, 1, 1),
        (5, 2, 33, 4),
        (64, 3, 7, 1),
        (3, 8, 0, 2),
        (900, 2, 129, 8),
    ] {
        check_copies::<f32>(tokens, slots, hidden, block);
        check_copies::<f16>(tokens, slots, hidden, block);
        check_copies::<bf16>(tokens, slots, hidden, block);
    }
}

#[test]
fn copies_refuse_what_does_not_fit() {
    let cpu = Cpu::new();
    let mut p = Permutation::default();
    p.sort(&cpu, &[1, 0, 1, 1], 2, &PermuteOptions::default())
        .unwrap();
    let x = [1f32; 8];
    let two = AnyMatRef::from(MatRef::new(&x, 2, 4).unwrap());
    let four = AnyMatRef::from(MatRef::new(&x, 4, 2).unwrap());
    let mut out = [f32::NAN; 16];
    let mut halves = [f16::NAN; 16];
    for (x, slots, rows, cols) in [
        (four, 2, 4, 2),
        (two, 0, 4, 4),
        (two, usize::MAX, 4, 4),
        (two, 2, 3, 4),
        (two, 2, 4, 3),
    ] {
        let y = MatMut::new(&mut out, rows, cols).unwrap();
        let e = permute_rows_into(&cpu, x, &p, slots, y.into()).unwrap_err();
        assert!(
            matches!(e, Error::Shape { .. } | Error::Overflow { .. }),
            "{e}"
        );
    }
    for (ys, rows, cols) in [(two, 4, 4), (four, 4, 3), (four, 3, 2)] {
        let y = MatMut::new(&mut out, rows, cols).unwrap();
        let e = unpermute_rows_into(&cpu, ys, &p, y.into()).unwrap_err();
        assert!(matches!(e, Error::Shape { .. }), "{e}");
    }
    let refuses_out = |e| match e {
        Error::Value { argument, .. } => assert_eq!(argument, "out"),
        other => panic!("{other}"),
    };
    let y = MatMut::new(&mut halves, 4, 4).unwrap();
    let e = permute_rows_into(&cpu, two, &p, 2, y.into()).unwrap_err();
    refuses_out(e);
    let y = MatMut::new(&mut halves, 4, 2).unwrap();
    let e = unpermute_rows_into(&cpu, four, &p, y.into()).unwrap_err();
    refuses_out(e);
    assert!(out.iter().all(|v| v.is_nan()) && halves.iter().all(|v| v.is_nan()));
}

fn narrow<T: Element>(x: f32) -> T {
    T::from_f32_nearest(x)
}
