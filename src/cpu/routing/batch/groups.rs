//! The best groups of experts, across tokens.
//!
//! The easy version, for each token: each group's largest value, or the sum of its two largest; the best groups stay, the values of the others are
//! filled. Then:
//!
//! 1. the largest and second largest are kept lane by lane along a group, without a branch;
//! 2. the lanes of neighbouring groups are put side by side, level by level, so that all groups of a token are reduced together;
//! 3. groups are sorted for `LANES` tokens at once, by the network of `sort.rs`;
//! 4. groups that fall out to −∞ are not filled but passed over from here on;
//! 5. NaN is looked for in the sum of all values (∞ − ∞ finds more than there are): such a token goes the careful way.

use super::sort::sort_keys;
use super::tile::load_tile;
use super::{Room, SLOTS};
use crate::cpu::routing::logits::Block;
use crate::cpu::routing::select::{NAN, key};
use crate::cpu::simd::{MAX_LANES, Simd};
use crate::routing::{GroupLimit, GroupScore, MaskedFill};

/// Finds the best groups of each token: `room.kept` has a bit for each whose values count. Values that count as 0 are filled.
#[inline(always)]
pub(super) fn limit_groups<S: Simd>(
    s: S,
    groups: &GroupLimit,
    values: &mut [Block],
    blocks: usize,
    tokens: usize,
    room: &mut Room,
) {
    let size = blocks / groups.n_group;
    for (i, values) in values.chunks_exact(blocks).enumerate() {
        let has_nan = score_groups(s, groups, values, &mut room.group_scores[i]);
        room.strange[i] |= i32::from(has_nan);
    }
    for tile in (0..tokens).step_by(S::LANES) {
        let scores = load_tile(s, &room.group_scores, tile, 0);
        let mut keys = [s.splat_i(NAN); SLOTS];
        let mut ids = [s.splat_i(0); SLOTS];
        for (g, id) in ids.iter_mut().enumerate() {
            *id = s.splat_i(g as i32);
            if g < groups.n_group {
                keys[g] = key(s, scores[g]);
            }
        }
        sort_keys(s, &mut keys, &mut ids);
        let (kept, dropped) = ids[..groups.n_group].split_at(groups.topk_group);
        if groups.fill == MaskedFill::NegInf {
            room.kept[tile..][..S::LANES].fill(0);
            for &kept in kept {
                let mut group = [0; MAX_LANES];
                s.store_slice_i(&mut group, kept);
                for (all, &group) in room.kept[tile..].iter_mut().zip(&group[..S::LANES]) {
                    *all |= 1 << group;
                }
            }
            continue;
        }
        for &dropped in dropped {
            let mut group = [0; MAX_LANES];
            s.store_slice_i(&mut group, dropped);
            for (t, &group) in (tile..tokens).zip(&group[..S::LANES]) {
                let from = t * blocks + group as usize * size;
                values[from..][..size].as_flattened_mut().fill(0.0);
            }
        }
    }
}

/// The score of each group of a token; whether one of its values may be NaN.
#[inline(always)]
fn score_groups<S: Simd>(
    s: S,
    groups: &GroupLimit,
    values: &[Block],
    scores: &mut [f32; SLOTS],
) -> bool {
    let nothing = s.splat(f32::NEG_INFINITY);
    let mut best = [nothing; SLOTS];
    let mut second = [nothing; SLOTS];
    let mut sum = s.splat(0.0);
    let size = values.len() / groups.n_group;
    for (g, members) in values.chunks_exact(size).enumerate() {
        let (mut first, mut next) = (nothing, nothing);
        for x in members.as_flattened().chunks_exact(S::LANES) {
            let x = s.load_slice(x);
            next = s.max(s.min(first, x), next);
            first = s.max(x, first);
            sum = s.add(sum, x);
        }
        (best[g], second[g]) = (first, next);
    }
    let has_nan = s.mask_bits(s.eq(sum, sum)) != (1 << S::LANES) - 1;
    // As in `sums`: lanes of neighbouring groups side by side, level by level; then the copies of one group against each other.
    let together = groups.n_group.next_power_of_two().min(S::LANES);
    for part in (0..groups.n_group).step_by(together) {
        let mut lanes = S::LANES;
        let mut left = together;
        while lanes > 1 {
            lanes /= 2;
            let half = left / 2;
            for i in 0..half.max(1) {
                let (b, c) = (part + i, part + i + half);
                let (b0, b1) = s.zip(best[b], best[c]);
                let (s0, s1) = s.zip(second[b], second[c]);
                best[b] = s.max(b0, b1);
                second[b] = s.max(s.min(b0, b1), s.max(s0, s1));
            }
            left = half.max(1);
        }
        let score = match groups.score {
            GroupScore::Max => best[part],
            GroupScore::Top2Sum => s.add(best[part], second[part]),
        };
        let mut all = [0.0; MAX_LANES];
        s.store_slice(&mut all, score);
        let copies = S::LANES / together;
        for (score, copies) in scores[part..]
            .iter_mut()
            .zip(all[..S::LANES].chunks_exact(copies))
        {
            *score = copies[0];
        }
    }
    has_nan
}
