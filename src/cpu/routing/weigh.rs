//! What multiplies an expert: weights of the chosen, their renormalisation, and the scales.

use super::Job;
use super::logits::{Block, elementwise, softmax};
use crate::cpu::simd::Simd;
use crate::cpu::simd::math::{REDUCTION_LANES, exp, exp1, ln1, sigmoid};
use crate::routing::{NullExperts, RankBy, Renorm, RouterConfig, Score, Selection, WeightSource};

/// The weights of one token's choices before renormalisation, and those of jointly scored shared experts. A dropped choice has weight 0.
///
/// `scores` is empty where no score but those of the chosen is needed; it then comes from the logits `z`. `room` holds as many blocks as
/// the slots and the shared experts fill.
#[inline(always)]
pub(super) fn raw_weights<S: Simd>(
    s: S,
    config: &RouterConfig,
    z: &[Block],
    scores: &[Block],
    ids: &[i32],
    room: &mut [Block],
    weights: &mut [f32],
    shared: &mut [f32],
) {
    let z_flat = z.as_flattened();
    match config.weights {
        WeightSource::Score if !scores.is_empty() => {
            gather(scores.as_flattened(), ids, 0.0, weights)
        }
        WeightSource::Score => {
            gather(z_flat, ids, 0.0, weights);
            for chunk in weights.chunks_mut(S::LANES) {
                let x = s.load_partial(chunk, 0.0);
                s.store_partial(chunk, elementwise(s, config.score, x));
            }
            clear_dropped(ids, weights);
        }
        WeightSource::SoftmaxSelectedLogits => {
            let blocks = ids.len().div_ceil(REDUCTION_LANES);
            let (chosen, soft) = room.split_at_mut(blocks);
            let soft = &mut soft[..blocks];
            chosen.as_flattened_mut()[ids.len()..].fill(f32::NEG_INFINITY);
            gather(
                z_flat,
                ids,
                f32::NEG_INFINITY,
                &mut chosen.as_flattened_mut()[..ids.len()],
            );
            softmax(s, chosen, soft);
            weights.copy_from_slice(&soft.as_flattened()[..ids.len()]);
            clear_dropped(ids, weights);
        }
        WeightSource::JointWithShared => {
            gather(z_flat, ids, f32::NEG_INFINITY, weights);
            let first = config.selectable();
            shared.copy_from_slice(&z_flat[first..first + shared.len()]);
            joint_sigmoid(s, weights, shared);
            clear_dropped(ids, weights);
        }
    }
}

#[inline(always)]
fn gather(values: &[f32], ids: &[i32], dropped: f32, out: &mut [f32]) {
    for (o, &id) in out.iter_mut().zip(ids) {
        *o = usize::try_from(id).map_or(dropped, |id| values[id]);
    }
}

fn clear_dropped(ids: &[i32], weights: &mut [f32]) {
    for (w, &id) in weights.iter_mut().zip(ids) {
        if id < 0 {
            *w = 0.0;
        }
    }
}

/// `σ(z) / Σ σ(z)` over both slices, in place; the sum in the order of the slices.
///
/// With m = min(max z, 0), every σ(z) is multiplied by e⁻ᵐ, which the division takes back: `e^(z−m) / (1 + e^z)`. So the largest is at least ½,
/// and ratios are right also where every sigmoid would vanish.
#[inline(always)]
fn joint_sigmoid<S: Simd>(s: S, weights: &mut [f32], shared: &mut [f32]) {
    let larger = |a: f32, &b: &f32| if b > a { b } else { a };
    let max = weights
        .iter()
        .chain(shared.iter())
        .fold(f32::NEG_INFINITY, larger);
    let one = s.splat(1.0);
    for slice in [&mut *weights, &mut *shared] {
        for chunk in slice.chunks_mut(S::LANES) {
            let z = s.load_partial(chunk, 0.0);
            let score = if max < 0.0 {
                s.div(exp(s, s.sub(z, s.splat(max))), s.add(one, exp(s, z)))
            } else {
                sigmoid(s, z)
            };
            s.store_partial(chunk, score);
        }
    }
    let sum = weights
        .iter()
        .chain(shared.iter())
        .fold(0.0, |sum, w| sum + w);
    weights
        .iter_mut()
        .chain(shared.iter_mut())
        .for_each(|w| *w /= sum);
}

/// Renormalises and scales one token's weights: `w / divisor · scale · per-expert scale`, in this order.
///
/// A dropped choice, and a null expert of kind [`NullExperts::Zero`], weighs 0. NaN is written with one pattern of bits.
#[inline]
pub(super) fn finish(job: &Job<'_>, ids: &[i32], weights: &mut [f32], shared: &mut [f32]) {
    let config = job.config;
    let divisor = divisor(config.renorm, weights);
    let zero_from = match config.null_experts {
        NullExperts::Zero(_) => config.num_experts,
        _ => usize::MAX,
    };
    for (w, &id) in weights.iter_mut().zip(ids) {
        let Ok(id) = usize::try_from(id) else {
            *w = 0.0;
            continue;
        };
        let own = job.per_expert_scale.get(id).copied().unwrap_or(1.0);
        let scaled = *w / divisor * config.scale * own;
        *w = if id >= zero_from {
            0.0
        } else {
            one_nan(scaled)
        };
    }
    for w in shared {
        *w = one_nan(*w * config.scale);
    }
}

#[inline]
fn one_nan(x: f32) -> f32 {
    if x.is_nan() { f32::NAN } else { x }
}

/// What the weights of one token are divided by. Sums run in slot order, from +0.0.
#[inline]
fn divisor(renorm: Renorm, weights: &[f32]) -> f32 {
    let sum = || weights.iter().fold(0.0, |sum, w| sum + w);
    match renorm {
        Renorm::None => 1.0,
        Renorm::Sum => sum(),
        Renorm::SumPlusEps(eps) => sum() + eps,
        Renorm::SumClampMin(eps) => {
            let sum = sum();
            if sum < eps { eps } else { sum }
        }
        Renorm::PNorm(p) => p_norm(p, weights),
    }
}

/// `m·(Σ (|w|/m)^p)^(1/p)` with m = max |w|: the largest terms are powers of numbers near 1, which are the accurate ones.
fn p_norm(p: f32, weights: &[f32]) -> f32 {
    let sum_of = |f: &dyn Fn(f32) -> f32| weights.iter().fold(0.0, |sum, w| sum + f(w.abs()));
    if p == 1.0 {
        return sum_of(&|w| w);
    }
    let max = weights
        .iter()
        .fold(0.0, |m, w| if w.abs() > m { w.abs() } else { m });
    if p == 2.0 {
        return max * sum_of(&|w| (w / max) * (w / max)).sqrt();
    }
    let sum = sum_of(&|w| exp1(p * ln1(w / max)));
    max * exp1(ln1(sum) / p)
}

/// Whether scores of experts that were not chosen are needed.
pub(super) fn needs_all_scores(config: &RouterConfig) -> bool {
    let ranked = matches!(
        config.selection,
        Selection::TopK {
            rank_by: RankBy::Score,
            ..
        } | Selection::ExpertChoice { .. }
    );
    let own_weights = matches!(config.selection, Selection::SparseMixer { .. });
    let weighed =
        config.weights == WeightSource::Score && config.score == Score::Softmax && !own_weights;
    ranked || weighed || config.capacity.is_some_and(|c| c.batch_prioritized)
}
