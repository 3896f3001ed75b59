//! From candidates to sorted ids and weights, a tile of tokens at a time.
//!
//! The easy version, for each token: sort the candidates by score, take K, renormalise. Then:
//!
//! 1. scores of candidates are computed across tokens: sixteen or 32 of them, not E;
//! 2. where the ranked value is the weight, the sorted keys are the weights: nothing is fetched;
//! 3. else K logits are fetched by id, the only step that goes token by token;
//! 4. sums over the K weights run in slot order, in vectors of tokens: what `routing/weigh.rs` does, in the same order.

use super::sort::{merge_keys, sort_keys};
use super::tile::{load_tile, store_tile};
use super::{Plan, ROW, Ranked, Raw, Room, Rows, SLOTS};
use crate::cpu::routing::logits::elementwise;
use crate::cpu::routing::select::{NAN, key};
use crate::cpu::routing::{Job, Out, weigh};
use crate::cpu::simd::math::exp_low;
use crate::cpu::simd::{MAX_LANES, Simd};
use crate::routing::{Renorm, RouterConfig, Score};
use bytemuck::cast_ref;

/// A NaN.
const NAN_BITS: i32 = f32::NAN.to_bits() as i32;

/// Keys and ids of candidates `first .. first + 16` of each token of a tile, sorted.
#[inline(always)]
fn sorted_candidates<S: Simd>(
    s: S,
    plan: &Plan,
    tile: usize,
    first: usize,
    room: &Room,
) -> ([S::I; SLOTS], [S::I; SLOTS]) {
    let values = load_tile::<S, ROW>(s, cast_ref(&room.values), tile, first);
    let ids_of = load_tile::<S, ROW>(s, cast_ref(&room.ids), tile, first);
    let (max, sum) = (
        s.load_slice(&room.max[tile..]),
        s.load_slice(&room.sum[tile..]),
    );
    let counts = s.load_slice_i(&room.counts[tile..]);
    let mut keys = [s.splat_i(NAN); SLOTS];
    let mut ids = [s.splat_i(0); SLOTS];
    for slot in 0..SLOTS {
        let value = match plan.ranked {
            Ranked::Softmax => s.div(exp_low(s, s.sub(values[slot], max)), sum),
            Ranked::SqrtSoftplus => elementwise(s, Score::SqrtSoftplus, values[slot]),
            Ranked::Logit | Ranked::Computed => values[slot],
        };
        let is_one = s.gt_i(counts, s.splat_i((first + slot) as i32));
        // Below every candidate, but not i32::MIN.
        keys[slot] = s.select_i(is_one, key(s, value), s.splat_i(NAN));
        ids[slot] = s.to_bits(ids_of[slot]);
    }
    sort_keys(s, &mut keys, &mut ids);
    (keys, ids)
}

/// Sorts the candidates of a tile.
#[inline(always)]
pub(super) fn sorted_tile<S: Simd>(
    s: S,
    plan: &Plan,
    tile: usize,
    room: &Room,
) -> ([S::I; SLOTS], [S::I; SLOTS]) {
    let (mut keys, mut ids) = sorted_candidates(s, plan, tile, 0, room);
    if plan.candidates > SLOTS {
        let (more_keys, more_ids) = sorted_candidates(s, plan, tile, SLOTS, room);
        merge_keys(s, &mut keys, &mut ids, &more_keys, &more_ids);
    }
    (keys, ids)
}

/// Ids and weights of a tile from its sorted keys; `max` and `sum` are those of the tokens' softmax, where the plan has one.
#[inline(always)]
pub(super) fn weigh_tile<S: Simd>(
    s: S,
    job: &Job<'_>,
    plan: &Plan,
    rows: Rows<'_>,
    tile: usize,
    (keys, ids): ([S::I; SLOTS], [S::I; SLOTS]),
    (max, sum): (S::F, S::F),
    out: &mut Out<'_>,
) {
    let k = job.config.top_k;
    let mut weights = [s.splat(0.0); SLOTS];
    match plan.raw {
        Raw::Key => {
            for (w, &key) in weights.iter_mut().zip(&keys[..k]) {
                // The key of NaN, and of what is no candidate, has the bits of a subnormal number, with which arithmetic is slow.
                let is_number = s.gt_i(key, s.splat_i(NAN));
                *w = s.from_bits(s.select_i(is_number, key, s.splat_i(NAN_BITS)));
            }
        }
        _ => {
            fetch_logits(s, rows, tile, out.tokens, &ids[..k], &mut weights);
            match plan.raw {
                Raw::Selected => softmax_selected(s, k, &mut weights),
                Raw::Softmax => {
                    for w in &mut weights[..k] {
                        *w = s.div(exp_low(s, s.sub(*w, max)), sum);
                    }
                }
                _ => {
                    for w in &mut weights[..k] {
                        *w = elementwise(s, job.config.score, *w);
                    }
                }
            }
        }
    }
    if plan.finish {
        finish_weights(s, job.config, &mut weights[..k]);
    }
    let pairs = tile * k..out.tokens * k;
    let mut as_floats = [s.splat(0.0); SLOTS];
    for (f, &id) in as_floats.iter_mut().zip(&ids[..k]) {
        *f = s.from_bits(id);
    }
    let out_ids = &mut out.ids[pairs.clone()];
    store_tile(s, k, as_floats, bytemuck::cast_slice_mut(out_ids));
    store_tile(s, k, weights, &mut out.weights[pairs]);
    if !plan.finish {
        for i in tile..out.tokens.min(tile + S::LANES) {
            let out = out.token(i, job.config);
            weigh::finish(job, out.ids, out.weights, out.shared);
        }
    }
}

/// `z[slot] = logit of ids[slot]`, token by token.
#[inline(always)]
fn fetch_logits<S: Simd>(
    s: S,
    rows: Rows<'_>,
    tile: usize,
    tokens: usize,
    ids: &[S::I],
    z: &mut [S::F; SLOTS],
) {
    let mut of = [[0; MAX_LANES]; SLOTS];
    let mut logits = [[0.0; MAX_LANES]; SLOTS];
    for (of, &ids) in of.iter_mut().zip(ids) {
        s.store_slice_i(of, ids);
    }
    for (lane, i) in (tile..tokens).take(S::LANES).enumerate() {
        let row = rows.row(i).as_flattened();
        for (logits, of) in logits.iter_mut().zip(&of).take(ids.len()) {
            // A strange token's ids are whatever was there before.
            logits[lane] = row.get(of[lane] as usize).copied().unwrap_or_default();
        }
    }
    for (z, logits) in z.iter_mut().zip(&logits).take(ids.len()) {
        *z = s.load_slice(logits);
    }
}

/// Softmax over the first `k` of each token, in place. Sixteen lanes of the reduction's 32 are in use: the first level of the butterfly adds zeros.
#[inline(always)]
fn softmax_selected<S: Simd>(s: S, k: usize, z: &mut [S::F; SLOTS]) {
    let mut max = s.splat(f32::NEG_INFINITY);
    for &z in &z[..k] {
        max = s.max(z, max);
    }
    let mut sum = [s.splat(0.0); SLOTS];
    for (z, sum) in z.iter_mut().zip(&mut sum).take(k) {
        *z = exp_low(s, s.sub(*z, max));
        *sum = s.add(*sum, *z);
    }
    for off in [8, 4, 2, 1] {
        for l in 0..off {
            sum[l] = s.add(sum[l], sum[l + off]);
        }
    }
    for z in &mut z[..k] {
        *z = s.div(*z, sum[0]);
    }
}

/// `weigh::finish` for a tile, where nothing is dropped and experts have no scale of their own.
#[inline(always)]
fn finish_weights<S: Simd>(s: S, config: &RouterConfig, weights: &mut [S::F]) {
    let mut sum = s.splat(0.0);
    for &w in weights.iter() {
        sum = s.add(sum, w);
    }
    let divisor = match config.renorm {
        Renorm::None | Renorm::PNorm(_) => s.splat(1.0),
        Renorm::Sum => sum,
        Renorm::SumPlusEps(eps) => s.add(sum, s.splat(eps)),
        Renorm::SumClampMin(eps) => {
            let eps = s.splat(eps);
            s.select(s.lt(sum, eps), eps, sum)
        }
    };
    let scale = s.splat(config.scale);
    for w in weights {
        let scaled = s.mul(s.div(*w, divisor), scale);
        *w = s.select(s.eq(scaled, scaled), scaled, s.splat(f32::NAN));
    }
}
