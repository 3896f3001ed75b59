//! Who is chosen: ranking keys, group limits, the K best.
//!
//! A value becomes an i32 key with the same order, so that one integer comparison ranks floats, NaN and excluded experts alike:
//! [`EXCLUDED`] < [`NAN`] < −∞ < … < −0 = +0 < … < +∞. Among equal keys the lower index wins. This order is total, so every way to find the K best
//! finds the same.

use super::logits::Block;
use crate::cpu::simd::Simd;
use crate::cpu::simd::math::REDUCTION_LANES;
use crate::routing::{GroupLimit, GroupScore, MaskedFill};

/// Thirty-two neighbouring keys.
pub(super) type Keys = [i32; REDUCTION_LANES];

/// Ranks below everything: outside the chosen groups, or beyond the end of the row.
pub(super) const EXCLUDED: i32 = i32::MIN;
/// The key of every NaN.
pub(super) const NAN: i32 = i32::MIN + 1;

/// Most candidates that are ranked by counting.
const MAX_CANDIDATES: usize = 64;
/// The largest K for which candidates are looked for; above it, quickselect and sort.
const MAX_COUNTED_K: usize = 16;

/// The key of a value.
#[inline(always)]
pub(super) fn key<S: Simd>(s: S, x: S::F) -> S::I {
    let bits = s.to_bits(s.add(x, s.splat(0.0))); // −0 + 0 = +0
    // Negative floats grow downwards: flip all but their sign.
    let ordered = s.xor_i(bits, s.shr::<1>(s.sar::<31>(bits)));
    s.select_i(s.eq(x, x), ordered, s.splat_i(NAN))
}

/// [`key`] of one value.
pub(super) fn key1(x: f32) -> i32 {
    if x.is_nan() {
        return NAN;
    }
    let bits = (x + 0.0).to_bits() as i32;
    bits ^ ((bits >> 31) as u32 >> 1) as i32
}

/// The value of a key, the inverse of [`key1`] but for −0 and the payload of NaN.
fn value(key: i32) -> f32 {
    f32::from_bits((key ^ ((key >> 31) as u32 >> 1) as i32) as u32)
}

/// Keys of the first `n` values plus `bias` (none if empty); the rest is [`EXCLUDED`].
#[inline(always)]
pub(super) fn keys<S: Simd>(s: S, n: usize, values: &[Block], bias: &[Block], keys: &mut [Keys]) {
    let blocks = n.div_ceil(REDUCTION_LANES);
    for b in 0..blocks {
        for i in (0..REDUCTION_LANES).step_by(S::LANES) {
            let mut x = s.load_slice(&values[b][i..]);
            if let Some(bias) = bias.get(b) {
                x = s.add(x, s.load_slice(&bias[i..]));
            }
            s.store_slice_i(&mut keys[b][i..], key(s, x));
        }
    }
    keys.as_flattened_mut()[n..blocks * REDUCTION_LANES].fill(EXCLUDED);
}

/// The largest key of the first `n` values; `room` is overwritten.
#[inline(always)]
pub(super) fn best_key<S: Simd>(s: S, n: usize, values: &[Block], room: &mut [Keys]) -> i32 {
    keys(s, n, values, &[], room);
    room.as_flattened()[..n]
        .iter()
        .fold(EXCLUDED, |best, &key| best.max(key))
}

/// Room for [`limit_groups`].
pub(super) struct GroupRoom<'a> {
    /// A key, and later a flag, for each group.
    pub keys: &'a mut [Keys],
    /// The groups kept.
    pub kept: &'a mut [i32],
    pub sort: &'a mut [u64],
}

/// Fills the keys of experts outside the best groups.
#[inline(always)]
pub(super) fn limit_groups<S: Simd>(
    s: S,
    groups: &GroupLimit,
    n: usize,
    keys: &mut [Keys],
    room: GroupRoom<'_>,
) {
    let keys = &mut keys.as_flattened_mut()[..n];
    let size = n / groups.n_group;
    let group_keys = room.keys.as_flattened_mut();
    group_keys.fill(EXCLUDED);
    for (group, members) in group_keys.iter_mut().zip(keys.chunks_exact(size)) {
        let (best, second) = best_two(members);
        *group = match groups.score {
            GroupScore::Max => best,
            GroupScore::Top2Sum if size == 1 => best,
            GroupScore::Top2Sum => key1(value(best) + value(second)),
        };
    }
    let kept = &mut room.kept[..groups.topk_group];
    top_k(s, groups.n_group, room.keys, room.sort, kept);
    let is_kept = room.keys.as_flattened_mut();
    is_kept.fill(0);
    for &group in kept.iter() {
        is_kept[group as usize] = 1;
    }
    for (&is_kept, members) in is_kept.iter().zip(keys.chunks_exact_mut(size)) {
        if is_kept == 0 {
            match groups.fill {
                MaskedFill::NegInf => members.fill(EXCLUDED),
                MaskedFill::Zero => members
                    .iter_mut()
                    .filter(|key| **key != NAN)
                    .for_each(|key| *key = 0),
            }
        }
    }
}

/// The two largest keys; the second is [`EXCLUDED`] where there is only one.
#[inline(always)]
fn best_two(keys: &[i32]) -> (i32, i32) {
    keys.iter()
        .fold((EXCLUDED, EXCLUDED), |(best, second), &key| {
            (best.max(key), second.max(best.min(key)))
        })
}

/// The indices of the `ids.len()` best of `n` keys, the best first. At least so many are not [`EXCLUDED`].
#[inline(always)]
pub(super) fn top_k<S: Simd>(s: S, n: usize, keys: &[Keys], sort: &mut [u64], ids: &mut [i32]) {
    let keys = &keys[..n.div_ceil(REDUCTION_LANES)];
    if ids.len() > MAX_COUNTED_K || !top_k_counted(s, keys, ids) {
        top_k_sorted(&keys.as_flattened()[..n], sort, ids);
    }
}

/// Key and index as one number that falls in ranking order.
#[inline(always)]
pub(super) fn pack(key: i32, index: usize) -> u64 {
    u64::from(key as u32 ^ 1 << 31) << 32 | u64::from(!(index as u32))
}

/// Inverse of [`pack`], for the index.
#[inline(always)]
pub(super) fn packed_index(packed: u64) -> usize {
    !(packed as u32) as usize
}

/// Any K: quickselect, then sort the K best. Also taken when there are too many ties to count.
#[inline(never)]
fn top_k_sorted(keys: &[i32], sort: &mut [u64], ids: &mut [i32]) {
    let sort = &mut sort[..keys.len()];
    for (i, (packed, &key)) in sort.iter_mut().zip(keys).enumerate() {
        *packed = pack(key, i);
    }
    if ids.len() < sort.len() && !ids.is_empty() {
        sort.select_nth_unstable_by(ids.len() - 1, |a, b| b.cmp(a));
    }
    let best = &mut sort[..ids.len()];
    best.sort_unstable_by(|a, b| b.cmp(a));
    for (id, &packed) in ids.iter_mut().zip(best.iter()) {
        *id = packed_index(packed) as i32;
    }
}

/// Small K, without a branch that depends on the data:
/// 1. the maxima of C interleaved columns (C ≥ 2K) are C different keys, so the K-th largest of them bounds the K-th largest key from
///    below;
/// 2. the keys from there up are few (about C·ln(C / (C − K)): 11 for K = 8) and are collected with their indices;
/// 3. the rank of each is the number of candidates before it, counted.
///
/// False when there are too many candidates, as with many equal keys.
#[inline(always)]
fn top_k_counted<S: Simd>(s: S, keys: &[Keys], ids: &mut [i32]) -> bool {
    let k = ids.len();
    let bound = lower_bound(s, keys, k);
    let mut candidates = Candidates::new();
    let below = s.splat_i(bound - 1); // bound ≥ NAN, so this does not wrap
    for (b, block) in keys.iter().enumerate() {
        let mut found = 0u32;
        for i in (0..REDUCTION_LANES).step_by(S::LANES) {
            found |= s.mask_bits(s.gt_i(s.load_slice_i(&block[i..]), below)) << i;
        }
        if candidates.count + found.count_ones() as usize > MAX_CANDIDATES {
            return false;
        }
        while found != 0 {
            let lane = found.trailing_zeros() as usize;
            candidates.push(block[lane], (b * REDUCTION_LANES + lane) as i32);
            found &= found - 1;
        }
    }
    candidates.rank(s, ids);
    true
}

/// A key that at least `k` keys reach.
#[inline(always)]
fn lower_bound<S: Simd>(s: S, keys: &[Keys], k: usize) -> i32 {
    let mut column = [EXCLUDED; REDUCTION_LANES];
    for i in (0..REDUCTION_LANES).step_by(S::LANES) {
        let mut max = s.splat_i(EXCLUDED);
        for block in keys {
            max = s.max_i(max, s.load_slice_i(&block[i..]));
        }
        s.store_slice_i(&mut column[i..], max);
    }
    // Fewer columns: cheaper to rank, more candidates.
    let columns = match k {
        0..=4 => 8,
        5..=8 => 16,
        _ => 32,
    };
    let mut width = REDUCTION_LANES;
    while width > columns {
        width /= 2;
        for i in 0..width {
            column[i] = column[i].max(column[i + width]);
        }
    }
    // The k-th largest is the smallest that fewer than k exceed. In lanes: the columns; counted over: the columns.
    let mut bound = s.splat_i(i32::MAX);
    for i in (0..columns).step_by(S::LANES) {
        let mine = s.load_slice_i(&column[i..]);
        let mut above = s.splat_i(0);
        for &other in &column[..columns] {
            let more = s.gt_i(s.splat_i(other), mine);
            above = s.add_i(above, s.select_i(more, s.splat_i(1), s.splat_i(0)));
        }
        let reached = s.gt_i(s.splat_i(k as i32), above);
        let better = s.select_i(s.gt_i(bound, mine), mine, bound);
        bound = s.select_i(reached, better, bound);
    }
    let mut lanes = [i32::MAX; REDUCTION_LANES];
    s.store_slice_i(&mut lanes, bound);
    let bound = lanes.iter().copied().min().unwrap_or(NAN);
    // Where groups leave fewer than k columns occupied, every key that is not excluded is a candidate.
    bound.max(NAN)
}

/// Keys in the order of their indices.
struct Candidates {
    keys: [i32; MAX_CANDIDATES],
    indices: [i32; MAX_CANDIDATES],
    count: usize,
}

impl Candidates {
    #[inline(always)]
    fn new() -> Self {
        Self {
            keys: [EXCLUDED; MAX_CANDIDATES],
            indices: [0; MAX_CANDIDATES],
            count: 0,
        }
    }

    #[inline(always)]
    fn push(&mut self, key: i32, index: i32) {
        self.keys[self.count] = key;
        self.indices[self.count] = index;
        self.count += 1;
    }

    /// Writes the indices of the best to `ids`, each to the place given by the number of candidates before it: those with a larger
    /// key, and those with an equal key and a lower index.
    #[inline(always)]
    fn rank<S: Simd>(&self, s: S, ids: &mut [i32]) {
        const LANE: [i32; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
        for first in (0..self.count).step_by(S::LANES) {
            let mine = s.load_slice_i(&self.keys[first..]);
            // An equal key that comes before counts too: it is greater than mine − 1. (mine > EXCLUDED, but for unused lanes.)
            let mine_less = s.sub_i(mine, s.splat_i(1));
            let my_index = s.add_i(s.load_slice_i(&LANE), s.splat_i(first as i32));
            let mut rank = s.splat_i(0);
            for (j, &other) in self.keys[..self.count].iter().enumerate() {
                let comes_before = s.gt_i(my_index, s.splat_i(j as i32));
                let rival = s.select_i(comes_before, mine_less, mine);
                let beats = s.gt_i(s.splat_i(other), rival);
                rank = s.add_i(rank, s.select_i(beats, s.splat_i(1), s.splat_i(0)));
            }
            let mut ranks = [0; 16];
            s.store_slice_i(&mut ranks, rank);
            let indices = &self.indices[first..self.count.min(first + S::LANES)];
            for (&rank, &index) in ranks.iter().zip(indices) {
                if let Some(id) = ids.get_mut(rank as usize) {
                    *id = index;
                }
            }
        }
    }
}
