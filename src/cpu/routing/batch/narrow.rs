//! At most sixteen experts: a token is a lane from its logits to its weights.
//!
//! The easy version, for each token: all scores, all keys, the K best, their weights. Then:
//!
//! 1. a tile of tokens is transposed once, so that maximum, exponentials, sum and quotients are computed for `LANES` tokens in one instruction, and only for
//!    the experts that there are: in rows of 32 half and more of the lanes would be padding;
//! 2. sixteen values are what the network sorts, so nothing is searched for, and NaN is one of its keys: no token is strange here.

use super::sort::sort_keys;
use super::tile::load_tile;
use super::weigh::weigh_tile;
use super::{Plan, Room, Rows, SLOTS};
use crate::cpu::routing::logits::elementwise;
use crate::cpu::routing::select::{NAN, key};
use crate::cpu::routing::{Job, Out};
use crate::cpu::simd::Simd;
use crate::cpu::simd::math::exp_low;
use crate::routing::Score;

/// Routes the tokens of a tile.
#[inline(always)]
pub(super) fn route_narrow<S: Simd>(
    s: S,
    job: &Job<'_>,
    plan: &Plan,
    rows: Rows<'_>,
    tile: usize,
    room: &mut Room,
    out: &mut Out<'_>,
) {
    let n = job.config.num_logits();
    for i in tile..out.tokens.min(tile + S::LANES) {
        if let [block, ..] = rows.row(i) {
            room.columns[i] = *block;
        }
    }
    let z = load_tile(s, &room.columns, tile, 0);
    let (mut max, mut sum) = (s.splat(0.0), s.splat(0.0));
    let mut values = z;
    if plan.softmax {
        (max, sum) = softmax(s, &mut values[..n]);
    }
    scores(s, job, plan, &z[..n], &mut values[..n], sum);
    // Behind every expert, a NaN included: an equal key of a higher id.
    let mut keys = [s.splat_i(NAN); SLOTS];
    let mut ids = [s.splat_i(0); SLOTS];
    for (id, e) in ids.iter_mut().zip(0..) {
        *id = s.splat_i(e);
    }
    for (key_of, &value) in keys.iter_mut().zip(&values[..n]) {
        *key_of = key(s, value);
    }
    sort_keys(s, &mut keys, &mut ids);
    weigh_tile(s, job, plan, rows, tile, (keys, ids), (max, sum), out);
}

/// z = exp(z − max z); returns maximum and sum. The sum is the butterfly of `Lanes32`, whose other lanes hold zeros.
#[inline(always)]
fn softmax<S: Simd>(s: S, z: &mut [S::F]) -> (S::F, S::F) {
    let mut max = s.splat(f32::NEG_INFINITY);
    for &z in z.iter() {
        max = s.max(z, max);
    }
    let mut sum = [s.splat(0.0); SLOTS];
    for (z, sum) in z.iter_mut().zip(&mut sum) {
        *z = exp_low(s, s.sub(*z, max));
        *sum = *z;
    }
    for off in [8, 4, 2, 1] {
        for l in 0..off {
            sum[l] = s.add(sum[l], sum[l + off]);
        }
    }
    (max, sum[0])
}

/// What is ranked: `values`, which softmax has filled with exponentials, become scores or logits, plus bias.
#[inline(always)]
fn scores<S: Simd>(s: S, job: &Job<'_>, plan: &Plan, z: &[S::F], values: &mut [S::F], sum: S::F) {
    let bias = job.bias.first();
    for (e, (value, &z)) in values.iter_mut().zip(z).enumerate() {
        *value = match job.config.score {
            Score::Softmax if !plan.by_logit => s.div(*value, sum),
            score if !plan.by_logit => elementwise(s, score, z),
            _ => z,
        };
        if let Some(bias) = bias {
            *value = s.add(*value, s.splat(bias[e]));
        }
    }
}
