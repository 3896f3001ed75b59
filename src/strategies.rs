//! What to feed a mixture-of-experts kernel in order to break it: [proptest](https://docs.rs/proptest) strategies, behind the feature `proptest`.
//!
//! The values are plain numbers and vectors, so that they serve any kernel, not only those of this crate. Compare what comes out with
//! [`crate::reference`], which is public for this purpose. A round of a fuzzing test is three lines:
//!
//! ```
//! use moe_kernels::{reference, strategies};
//! use proptest::prelude::*;
//! use proptest::test_runner::TestRunner;
//!
//! /// The kernel under test: here one that sorts.
//! fn my_top_k(row: &[f32], k: usize) -> Vec<usize> {
//!     let rank = |v: f32| if v.is_nan() { (0, 0.0) } else { (1, v) }; // NaN last
//!     let mut order: Vec<usize> = (0..row.len()).collect();
//!     order.sort_by(|&a, &b| rank(row[b]).partial_cmp(&rank(row[a])).unwrap()); // stable: ties keep the lower index first
//!     order.truncate(k);
//!     order
//! }
//!
//! let inputs = (strategies::logits(1..=3, 1..=40), 1usize..=8);
//! TestRunner::default().run(&inputs, |(logits, k)| {
//!     let k = k.min(logits.experts);
//!     for row in logits.rows() {
//!         let wide: Vec<f64> = row.iter().map(|&z| z.into()).collect();
//!         prop_assert_eq!(my_top_k(row, k), reference::top_k(&wide, &[], k));
//!     }
//!     Ok(())
//! })?;
//! # Ok::<(), proptest::test_runner::TestError<(strategies::Logits, usize)>>(())
//! ```
//!
//! `examples/fuzz_your_topk.rs` shows a planted bug found and shrunk.
//!
//! | strategy | gives |
//! |---|---|
//! | [`size_at_seam`] | lengths one below, at and one above vector and tile widths |
//! | [`shape`], [`top_k`] | H, I, E, K and T of a layer |
//! | [`logits`], [`logit_row`] | rows that are ordinary, tied, huge, infinite, NaN |
//! | [`routing`] | ids and weights that are valid, evenly spread or all on one expert, with empty experts |
//! | [`offsets`] | ragged offsets with empty groups |
//! | [`expert_weights`], [`tokens`] | numbers whose sums stay near 1, exact in a chosen format |
//! | [`bad_layer_sizes`], [`bad_routing`], [`bad_offsets`] | what a kernel must refuse |

use crate::element::DType;
use core::ops::RangeInclusive;
use half::{bf16, f16};
use proptest::collection::vec;
use proptest::prelude::*;

mod rows;
pub use rows::logit_row;

/// Widths at which kernels change their path: lanes of vector units, warps, register tiles, cache blocks.
pub const SEAMS: [usize; 12] = [1, 4, 6, 8, 12, 14, 16, 32, 64, 128, 256, 512];

/// A length within `range`: half of them one below, at or one above one of [`SEAMS`], the others anything.
///
/// Shrinks towards the smallest.
pub fn size_at_seam(range: RangeInclusive<usize>) -> BoxedStrategy<usize> {
    let near = SEAMS.iter().flat_map(|&s| [s - 1, s, s + 1]);
    let mut seams: Vec<usize> = near.filter(|s| range.contains(s)).collect();
    seams.sort_unstable();
    seams.dedup();
    if seams.is_empty() {
        return range.boxed();
    }
    prop_oneof![range, proptest::sample::select(seams)].boxed()
}

/// The sizes of a layer and of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// T
    pub tokens: usize,
    /// H
    pub hidden: usize,
    /// I
    pub intermediate: usize,
    /// E
    pub experts: usize,
    /// K, at most E.
    pub top_k: usize,
}

/// Upper limits of [`shape`]; H, I, E and K begin at 1, T at 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShapeLimits {
    /// Largest T.
    pub tokens: usize,
    /// Largest H.
    pub hidden: usize,
    /// Largest I.
    pub intermediate: usize,
    /// Largest E.
    pub experts: usize,
}

impl Default for ShapeLimits {
    /// Large enough to cross two blocks of most kernels, small enough for thousands of cases in f64.
    fn default() -> Self {
        Self {
            tokens: 40,
            hidden: 70,
            intermediate: 70,
            experts: 20,
        }
    }
}

/// Shapes at seams, T = 0, E = 1 and K = E among them.
pub fn shape(limits: ShapeLimits) -> impl Strategy<Value = Shape> {
    let sizes = (
        size_at_seam(0..=limits.tokens),
        size_at_seam(1..=limits.hidden.max(1)),
        size_at_seam(1..=limits.intermediate.max(1)),
        size_at_seam(1..=limits.experts.max(1)),
    );
    sizes.prop_flat_map(|(tokens, hidden, intermediate, experts)| {
        top_k(experts).prop_map(move |top_k| Shape {
            tokens,
            hidden,
            intermediate,
            experts,
            top_k,
        })
    })
}

/// K for E experts: mostly up to 8, sometimes E.
pub fn top_k(experts: usize) -> impl Strategy<Value = usize> {
    prop_oneof![4 => 1..=experts.clamp(1, 8), 1 => Just(experts.max(1))]
}

/// Router logits `[T, E]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Logits {
    /// E
    pub experts: usize,
    /// `[T, E]`
    pub values: Vec<f32>,
}

impl Logits {
    /// The tokens' rows.
    pub fn rows(&self) -> impl Iterator<Item = &[f32]> {
        self.values.chunks_exact(self.experts)
    }

    /// T
    pub fn tokens(&self) -> usize {
        self.values.len() / self.experts
    }
}

/// Logits of a call; each row is one of the kinds of [`logit_row`], so that bad rows stand between good ones, where they must do no harm.
///
/// An E of 0 becomes 1.
pub fn logits(
    tokens: RangeInclusive<usize>,
    experts: RangeInclusive<usize>,
) -> impl Strategy<Value = Logits> {
    size_at_seam(experts).prop_flat_map(move |experts| {
        let experts = experts.max(1);
        vec(logit_row(experts), tokens.clone()).prop_map(move |rows| Logits {
            experts,
            values: rows.concat(),
        })
    })
}

/// Ids and weights of a call.
#[derive(Clone, Debug, PartialEq)]
pub struct Routed {
    /// E
    pub experts: usize,
    /// K
    pub top_k: usize,
    /// `[T, K]`, distinct in a row; −1 is a choice that was dropped.
    pub ids: Vec<i32>,
    /// `[T, K]`, 0 where the id is −1.
    pub weights: Vec<f32>,
}

/// A valid routing: any choice of experts, or one that piles all tokens on the same few; a tenth of the choices dropped in some. At least one expert is left empty
/// where E > K.
pub fn routing(tokens: usize, experts: usize, top_k: usize) -> impl Strategy<Value = Routed> {
    let experts = experts.max(1);
    let top_k = top_k.clamp(1, experts);
    // Drawing from one expert fewer leaves the last one empty.
    let pool = if experts > top_k {
        experts - 1
    } else {
        experts
    };
    let all: Vec<i32> = (0..pool as i32).collect();
    let choice = |from: Vec<i32>| proptest::sample::subsequence(from, top_k).prop_shuffle();
    let spread = vec(choice(all.clone()), tokens);
    let piled = choice(all).prop_map(move |row| vec![row; tokens]);
    let weights = vec(
        prop_oneof![8 => 0.0f32..1.0, 1 => -2.0f32..2.0],
        tokens * top_k,
    );
    let drops = prop_oneof![
        Just(vec![false; tokens * top_k]),
        vec(proptest::bool::weighted(0.1), tokens * top_k)
    ];
    (prop_oneof![3 => spread, 1 => piled], weights, drops).prop_map(
        move |(rows, mut weights, drops)| {
            let mut ids = rows.concat();
            for (pair, dropped) in drops.into_iter().enumerate() {
                if dropped {
                    ids[pair] = -1;
                    weights[pair] = 0.0;
                }
            }
            Routed {
                experts,
                top_k,
                ids,
                weights,
            }
        },
    )
}

/// Offsets `[E + 1]` of ragged groups from 0 to at most `rows`: many empty groups, some of one row, some at seams.
pub fn offsets(rows: usize, experts: usize) -> impl Strategy<Value = Vec<usize>> {
    let size = prop_oneof![2 => Just(0), 1 => Just(1), 3 => size_at_seam(0..=rows)];
    vec(size, experts).prop_map(move |sizes| {
        let mut offsets = vec![0];
        let mut end = 0;
        for size in sizes {
            end = rows.min(end + size);
            offsets.push(end);
        }
        offsets
    })
}

/// n numbers of mean square 1/3 (uniform in −1..1), exact in `dtype`: tokens.
pub fn tokens(n: usize, dtype: DType) -> impl Strategy<Value = Vec<f32>> {
    scaled(n, 1.0, dtype)
}

/// A weight matrix `[n_out, n_in]`, row-major, exact in `dtype`, of magnitude √(3 / n_in): products with [`tokens`] have sums near 1, as in a trained layer,
/// and neither overflow f16 nor drown in cancellation.
pub fn expert_weights(n_out: usize, n_in: usize, dtype: DType) -> impl Strategy<Value = Vec<f32>> {
    scaled(n_out * n_in, (3.0 / n_in.max(1) as f32).sqrt(), dtype)
}

/// Numbers from a seed: shrinking thousands of them one by one would find nothing, so they shrink together, to the seed 0.
fn scaled(n: usize, scale: f32, dtype: DType) -> impl Strategy<Value = Vec<f32>> {
    any::<u32>().prop_map(move |seed| {
        let mut state = (u64::from(seed) << 1) | 1;
        (0..n)
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let unit = (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0;
                round(unit * scale, dtype)
            })
            .collect()
    })
}

/// Subnormals of bf16 become zero: hardware flushes them.
fn round(v: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F32 => v,
        DType::F16 => f16::from_f32(v).to_f32(),
        DType::BF16 => Some(bf16::from_f32(v).to_f32())
            .filter(|v| !v.is_subnormal())
            .unwrap_or(0.0),
    }
}

/// Sizes that no layer has: a zero, K above E, products beyond the address space.
pub fn bad_layer_sizes() -> impl Strategy<Value = Shape> {
    let good = shape(ShapeLimits::default());
    (good, 0usize..7).prop_map(|(good, fault)| match fault {
        0 => Shape { hidden: 0, ..good },
        1 => Shape {
            intermediate: 0,
            ..good
        },
        2 => Shape { experts: 0, ..good },
        3 => Shape { top_k: 0, ..good },
        4 => Shape {
            top_k: good.experts + 1,
            ..good
        },
        5 => Shape {
            hidden: usize::MAX / 2,
            intermediate: 3,
            ..good
        },
        _ => Shape {
            hidden: 1 << 40,
            intermediate: 1 << 40,
            ..good
        },
    })
}

/// A routing with one fault: an id beyond the experts or below −1, or a weight or an id too few.
pub fn bad_routing(tokens: usize, experts: usize, top_k: usize) -> impl Strategy<Value = Routed> {
    let fault = (any::<proptest::sample::Index>(), 0usize..6);
    (routing(tokens.max(1), experts, top_k), fault).prop_map(|(mut routed, (at, fault))| {
        let at = at.index(routed.ids.len());
        let beyond = i32::try_from(routed.experts).unwrap_or(i32::MAX);
        match fault {
            0 => routed.ids[at] = beyond,
            1 => routed.ids[at] = i32::MAX,
            2 => routed.ids[at] = -2,
            3 => routed.ids[at] = i32::MIN,
            4 => drop(routed.weights.pop()),
            _ => drop(routed.ids.pop()),
        }
        routed
    })
}

/// Offsets for `rows` rows that run backwards or end beyond them.
pub fn bad_offsets(rows: usize, experts: usize) -> impl Strategy<Value = Vec<usize>> {
    let fault = (any::<proptest::sample::Index>(), 0usize..3);
    (offsets(rows, experts.max(1)), fault).prop_map(move |(mut offsets, (at, fault))| {
        let last = offsets.len() - 1;
        match fault {
            0 => offsets[last] = rows + 1,
            1 => offsets[last] = usize::MAX,
            // One that is followed by another, raised above all rows.
            _ => offsets[at.index(last)] = rows + 1,
        }
        offsets
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experts::PackedExperts;
    use crate::grouped_gemm::Activation;
    use crate::{Cpu, reference, routing as ours};

    /// Whether this crate takes a layer of these sizes.
    fn accepts(s: &Shape) -> bool {
        let experts = PackedExperts::new(
            &Cpu::new(),
            s.hidden,
            s.intermediate,
            Activation::SWIGLU,
            DType::F32,
        );
        experts.is_ok()
            && ours::RouterConfig::mixtral(s.experts, s.top_k)
                .validate()
                .is_ok()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn shapes_are_shapes(s in shape(ShapeLimits::default())) {
            prop_assert!(accepts(&s));
        }

        #[test]
        fn bad_sizes_are_refused(s in bad_layer_sizes()) {
            prop_assert!(!accepts(&s));
        }

        #[test]
        fn routings_are_valid(
            routed in (0usize..20, size_at_seam(1..=20))
                .prop_flat_map(|(t, e)| top_k(e).prop_flat_map(move |k| routing(t, e, k)))
        ) {
            let mut out = ours::Routing::new();
            let given = ours::GivenRouting::new(routed.experts, routed.top_k, &routed.ids, &routed.weights);
            prop_assert!(out.set_given(&Cpu::new(), &given).is_ok());
            for row in routed.ids.chunks(routed.top_k) {
                let mut kept: Vec<_> = row.iter().filter(|&&id| id >= 0).collect();
                let n = kept.len();
                kept.sort();
                kept.dedup();
                prop_assert_eq!(kept.len(), n);
            }
            if routed.experts > routed.top_k {
                prop_assert!(reference::load_stats(&routed.ids, routed.experts).counts.contains(&0));
            }
        }

        #[test]
        fn bad_routings_are_refused(
            routed in (1usize..20, 1usize..20)
                .prop_flat_map(|(t, e)| top_k(e).prop_flat_map(move |k| bad_routing(t, e, k)))
        ) {
            let mut out = ours::Routing::new();
            let given = ours::GivenRouting::new(routed.experts, routed.top_k, &routed.ids, &routed.weights);
            prop_assert!(out.set_given(&Cpu::new(), &given).is_err());
            prop_assert_eq!(out.tokens(), 0);
        }

        #[test]
        fn offsets_ascend(o in offsets(30, 9)) {
            prop_assert_eq!(o.len(), 10);
            prop_assert!(o[0] == 0 && o[9] <= 30 && o.is_sorted());
        }

        #[test]
        fn bad_offsets_do_not(o in bad_offsets(30, 9)) {
            prop_assert!(!o.is_sorted() || o[9] > 30);
        }

        #[test]
        fn numbers_are_exact(w in expert_weights(3, 7, DType::BF16), x in tokens(9, DType::F16)) {
            prop_assert!(w.iter().all(|v| v.abs() <= 1.0 && bf16::from_f32(*v).to_f32() == *v));
            prop_assert!(x.iter().all(|v| f16::from_f32(*v).to_f32() == *v));
        }

        #[test]
        fn logits_have_their_shape(l in logits(0..=5, 1..=40)) {
            prop_assert_eq!(l.values.len(), l.tokens() * l.experts);
            prop_assert_eq!(l.rows().count(), l.tokens());
        }
    }
}
