//! Rows of values to rank, where that is not the logit itself: scores plus bias; and the sums of softmax.
//!
//! The easy version, for each token: `max z`, `e = exp(z − max)`, `Σe`, `e / Σe + bias`. Then:
//!
//! 1. each step runs over all tokens of a batch before the next begins, so that the latency of one row's reduction hides behind the next row's work;
//! 2. a row's maximum and sum stay vectors of 32 columns along the row; the last levels of the butterfly are done for a tile of tokens at once,
//!    by putting the lanes of neighbouring tokens side by side ([`Simd::zip`]): the same additions in the same order, so the same bits.

use super::tile::load_tile;
use super::{Plan, Room, Rows, SLOTS};
use crate::cpu::routing::Job;
use crate::cpu::routing::logits::{Block, elementwise, softplus_exps};
use crate::cpu::simd::Simd;
use crate::cpu::simd::math::{Lanes32, REDUCTION_LANES, exp_low, exp_padded, softplus_of};
use crate::routing::Score;

/// The maximum of each of 32 interleaved columns, NaN passed over.
#[inline(always)]
pub(super) fn column_maxima<S: Simd>(s: S, row: &[Block], out: &mut Block) {
    let mut max = Lanes32::new(s, f32::NEG_INFINITY);
    for block in row {
        max.max(s, block);
    }
    *out = max.lanes(s);
}

/// [`column_maxima`] of the groups, of `size` blocks, whose bits are set in `kept`.
#[inline(always)]
pub(super) fn kept_maxima<S: Simd>(
    s: S,
    row: &[Block],
    size: usize,
    mut kept: u32,
    out: &mut Block,
) {
    let mut max = Lanes32::new(s, f32::NEG_INFINITY);
    while kept != 0 {
        for block in &row[kept.trailing_zeros() as usize * size..][..size] {
            max.max(s, block);
        }
        kept &= kept - 1;
    }
    *out = max.lanes(s);
}

/// Calls `$each` with exp(z − max) for each vector of a row of `$n` logits: its block, its place there, and the exponential. A macro, since a closure
/// that is not inlined would lose the instruction set.
macro_rules! each_exp {
    ($s:ident: $simd:ident, $n:expr, $row:expr, $max:expr, ($b:ident, $i:ident, $e:ident) => $each:expr) => {
        let (row, max): (&[Block], _) = ($row, $s.splat($max));
        for ($b, z) in row.iter().enumerate() {
            let whole = ($b + 1) * REDUCTION_LANES <= $n;
            for $i in 0..REDUCTION_LANES / $simd::LANES {
                let x = $s.sub($s.load_slice(&z[$i * $simd::LANES..]), max);
                let $e = match whole {
                    true => exp_low($s, x),
                    false => exp_padded($s, x),
                };
                $each;
            }
        }
    };
}

/// Σ exp(z − max) of `n` logits, reduced to one vector.
#[inline(always)]
pub(super) fn exp_sum<S: Simd>(s: S, n: usize, row: &[Block], max: f32) -> S::F {
    let mut sum = Lanes32::new(s, 0.0);
    each_exp!(s: S, n, row, max, (_b, i, e) => sum.add_vector(s, i, e));
    sum.fold(s)
}

/// Rows of scores plus bias; for softmax also the maxima and sums.
#[inline(always)]
pub(super) fn compute_values<S: Simd>(
    s: S,
    job: &Job<'_>,
    plan: &Plan,
    rows: Rows<'_>,
    values: &mut [Block],
    room: &mut Room,
) {
    let config = job.config;
    let blocks = config.num_logits().div_ceil(REDUCTION_LANES);
    if plan.softmax {
        softmax_values(s, config.num_logits(), rows, values, blocks, room);
    }
    for (i, values) in values.chunks_exact_mut(blocks).enumerate() {
        let (row, sum) = (rows.row(i), s.splat(room.sum[i]));
        // A macro, since a closure that is not inlined would lose the instruction set.
        macro_rules! fill {
            ($x:ident, $old:ident => $f:expr) => {
                for (b, (values, z)) in values.iter_mut().zip(row).enumerate() {
                    for i in (0..REDUCTION_LANES).step_by(S::LANES) {
                        #[allow(unused_variables)]
                        let ($x, $old) = (s.load_slice(&z[i..]), s.load_slice(&values[i..]));
                        let mut value = $f;
                        if let Some(bias) = job.bias.get(b) {
                            value = s.add(value, s.load_slice(&bias[i..]));
                        }
                        s.store_slice(&mut values[i..], value);
                    }
                }
            };
        }
        match config.score {
            Score::Softmax if !plan.by_logit => fill!(_z, e => s.div(e, sum)),
            Score::Sigmoid if !plan.by_logit => fill!(z, _e => elementwise(s, Score::Sigmoid, z)),
            Score::SqrtSoftplus if !plan.by_logit => {
                softplus_exps(s, row, values);
                fill!(z, e => s.sqrt(softplus_of(s, z, e)));
            }
            _ => fill!(z, _e => z),
        }
        // What stands beyond the end of the row must not be a candidate.
        values.as_flattened_mut()[config.num_logits()..].fill(f32::NEG_INFINITY);
    }
}

/// values = exp(z − max z), and the maxima and sums of the rows.
#[inline(always)]
pub(super) fn softmax_values<S: Simd>(
    s: S,
    n: usize,
    rows: Rows<'_>,
    values: &mut [Block],
    blocks: usize,
    room: &mut Room,
) {
    let tokens = values.len() / blocks;
    for i in 0..tokens {
        column_maxima(s, rows.row(i), &mut room.columns[i]);
    }
    for tile in (0..tokens).step_by(S::LANES) {
        let mut max = s.splat(f32::NEG_INFINITY);
        for part in (0..REDUCTION_LANES).step_by(SLOTS) {
            for column in load_tile(s, &room.columns, tile, part) {
                max = s.max(column, max);
            }
        }
        s.store_slice(&mut room.max[tile..], max);
    }
    for (i, values) in values.chunks_exact_mut(blocks).enumerate() {
        let mut sum = Lanes32::new(s, 0.0);
        each_exp!(s: S, n, rows.row(i), room.max[i], (b, i, e) => {
            s.store_slice(&mut values[b][i * S::LANES..], e);
            sum.add_vector(s, i, e);
        });
        s.store_slice(&mut room.partial[i], sum.fold(s));
    }
    sums(s, tokens, room);
}

/// `room.sum` from `room.partial`: the butterfly of [`Lanes32`], a tile of tokens at a time.
#[inline(always)]
pub(super) fn sums<S: Simd>(s: S, tokens: usize, room: &mut Room) {
    for tile in (0..tokens).step_by(S::LANES) {
        let mut v = [s.splat(0.0); SLOTS];
        for (v, partial) in v.iter_mut().zip(&room.partial[tile..][..S::LANES]) {
            *v = s.load_slice(partial);
        }
        let mut left = S::LANES;
        while left > 1 {
            left /= 2;
            for i in 0..left {
                // Lanes of neighbouring tokens side by side: each level halves the lanes of a token and the vectors.
                let (low, high) = s.zip(v[i], v[i + left]);
                v[i] = s.add(low, high);
            }
        }
        s.store_slice(&mut room.sum[tile..], v[0]);
    }
}
