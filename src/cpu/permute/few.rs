//! A handful of pairs: the tokens of a decode step.
//!
//! The easy version is the counting sort of `permute.rs`. It walks over all experts and prepares for threads, which for one token is more work than its routing. Here a
//! pair's row is the number of pairs that come before it, counted, and what is left to do for each expert is to fill two arrays. A stable sort has one
//! answer, so both give the same.

/// Most pairs that are sorted by comparing each with each.
const FEW: usize = 16;

/// Whether [`sort_few`] may be asked: few pairs, all of experts in 0..E.
pub(crate) fn are_few(ids: &[i32], num_experts: usize) -> bool {
    // Below 2²⁷, id and pair fit one positive i32.
    ids.len() <= FEW
        && num_experts < 1 << 27
        && ids.iter().all(|&id| (id as u32 as usize) < num_experts)
}

/// Fills all four for `ids`, of which [`are_few`] has been asked. Lengths: E + 1, E, pairs, pairs.
pub(crate) fn sort_few(
    ids: &[i32],
    offsets: &mut [usize],
    counts: &mut [usize],
    pair_of_row: &mut [u32],
    row_of_pair: &mut [u32],
) {
    // All different, in the order of a stable sort.
    let mut keys = [i32::MAX; FEW];
    for ((key, &id), pair) in keys.iter_mut().zip(ids).zip(0..) {
        *key = id * FEW as i32 + pair;
    }
    let mut sorted = [0; FEW];
    counts.fill(0);
    for ((pair, &id), row_of) in ids.iter().enumerate().zip(row_of_pair) {
        // The unused places are never before a pair: a loop of fixed length, in vectors.
        let before: u32 = keys
            .iter()
            .map(|&other| u32::from(other < keys[pair]))
            .sum();
        *row_of = before;
        pair_of_row[before as usize] = pair as u32;
        sorted[before as usize] = id as usize;
        counts[id as usize] += 1;
    }
    let mut next = 0;
    for (row, &id) in sorted[..ids.len()].iter().enumerate() {
        // Nothing for the second pair of an expert.
        offsets[next..=id].fill(row);
        next = id + 1;
    }
    offsets[next..].fill(ids.len());
}
