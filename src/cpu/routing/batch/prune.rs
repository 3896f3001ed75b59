//! Few candidates from many values.
//!
//! The easy version, for each token: find the K-th largest value, keep what is not below it. Then:
//!
//! 1. 32 interleaved columns have 32 maxima, each a different expert; the K-th largest maximum bounds the K-th largest value from below, and about
//!    32·ln(32 / (32 − K)) values reach it (9 for K = 8);
//! 2. the maxima of `LANES` tokens are sorted at once; the K largest of two sorted halves need no merge, only their smallest does;
//! 3. for softmax the bound is on logits, less a margin for the rounding of exp and quotient, so that only candidates need a quotient; for √softplus too, so that only
//!    candidates need a score;
//! 4. candidates are moved to the front by compression, without a branch but for whole blocks of long rows.

use super::sort::sort_values;
use super::tile::load_tile;
use super::{MARGIN, MAX_CANDIDATES, Plan, REACH, ROW, Ranked, Room, SLOTS};
use crate::cpu::routing::logits::Block;
use crate::cpu::routing::select::{key, key1};
use crate::cpu::simd::math::REDUCTION_LANES;
use crate::cpu::simd::{MAX_LANES, Simd};

/// For the tokens of a tile: the value that their candidates exceed, their maxima, and whether they are strange.
#[inline(always)]
pub(super) fn bounds<S: Simd>(s: S, k: usize, plan: &Plan, tile: usize, room: &mut Room) {
    let mut low = load_tile(s, &room.columns, tile, 0);
    sort_values(s, &mut low);
    let mut high = load_tile(s, &room.columns, tile, SLOTS);
    sort_values(s, &mut high);
    // The K largest of two falling rows are the larger ones of low[i] and high[K − 1 − i].
    let mut bound = s.splat(f32::INFINITY);
    for (&low, &high) in low[..k].iter().zip(high[..k].iter().rev()) {
        bound = s.min(s.max(low, high), bound);
    }
    let max = s.max(low[0], high[0]);
    let (one, none) = (s.splat_i(1), s.splat_i(0));
    let is_strange = match plan.ranked {
        // False for NaN.
        Ranked::Softmax => s.select_i(s.lt(s.splat(-REACH), s.sub(bound, max)), none, one),
        Ranked::SqrtSoftplus => {
            let too_large = s.select_i(s.lt(max, s.splat(REACH)), none, one);
            s.select_i(s.lt(s.splat(-REACH), bound), too_large, one)
        }
        _ => s.select_i(s.lt(s.splat(f32::NEG_INFINITY), bound), none, one),
    };
    let mut strange = [0; MAX_LANES];
    s.store_slice_i(&mut strange, is_strange);
    for (all, &this) in room.strange[tile..].iter_mut().zip(&strange[..S::LANES]) {
        *all |= this;
    }
    if matches!(plan.ranked, Ranked::Softmax | Ranked::SqrtSoftplus) {
        bound = s.sub(bound, s.splat(MARGIN));
    }
    if plan.ranked != Ranked::Computed {
        s.store_slice(&mut room.max[tile..], max);
    }
    s.store_slice(&mut room.below[tile..], below(s, bound));
}

/// A number below `x`, two steps away at most. (The step from +0 to −0 would be none; two from −MAX would lead beyond −∞, to NaN.)
#[inline(always)]
fn below<S: Simd>(s: S, x: S::F) -> S::F {
    let lowest = s.splat_i(key1(f32::NEG_INFINITY));
    let k = s.max_i(s.sub_i(key(s, x), s.splat_i(2)), lowest);
    s.from_bits(s.xor_i(k, s.shr::<1>(s.sar::<31>(k))))
}

/// Rows so long have many blocks without a candidate, so that a branch is worth it.
const SPARSE_BLOCKS: usize = 12;

/// [`collect`] from the groups, of `size` blocks, whose bits are set in `kept`.
#[inline(always)]
pub(super) fn collect_kept<S: Simd>(
    s: S,
    row: &[Block],
    size: usize,
    mut kept: u32,
    below: f32,
    values: &mut [i32; ROW],
    ids: &mut [i32; ROW],
) -> i32 {
    let mut count = 0;
    while kept != 0 {
        let first = kept.trailing_zeros() as usize * size;
        let group = &row[first..][..size];
        count = collect(s, group, first * REDUCTION_LANES, count, below, values, ids);
        kept &= kept - 1;
    }
    count
}

/// Moves all values above `below` to the front, with their ids, which begin at `first_id`; returns how many there are with the `count` that had been
/// found before. Beyond [`MAX_CANDIDATES`] of them nothing is kept.
#[inline(always)]
pub(super) fn collect<S: Simd>(
    s: S,
    row: &[Block],
    first_id: usize,
    mut count: i32,
    below: f32,
    values: &mut [i32; ROW],
    ids: &mut [i32; ROW],
) -> i32 {
    const LANE: [i32; MAX_LANES] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
    let below = s.splat(below);
    let mut place = (count as usize).min(MAX_CANDIDATES);
    let lane = s.load_slice_i(&LANE);
    for (b, block) in row.iter().enumerate() {
        if row.len() > SPARSE_BLOCKS {
            let mut any = 0;
            for i in (0..REDUCTION_LANES).step_by(S::LANES) {
                any |= s.mask_bits(s.lt(below, s.load_slice(&block[i..])));
            }
            if any == 0 {
                continue;
            }
        }
        for i in (0..REDUCTION_LANES).step_by(S::LANES) {
            let x = s.load_slice(&block[i..]);
            let found = s.lt(below, x);
            let id = s.add_i(lane, s.splat_i((first_id + b * REDUCTION_LANES + i) as i32));
            s.store_slice_i(&mut values[place..], s.compress(found, s.to_bits(x)));
            s.store_slice_i(&mut ids[place..], s.compress(found, id));
            count += s.mask_bits(found).count_ones() as i32;
            place = (count as usize).min(MAX_CANDIDATES);
        }
    }
    count
}
