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
    // Loops of fixed length, in vectors.
    let rows = match ids.len() {
        ..=4 => &rows_of::<4>(ids)[..],
        5..=8 => &rows_of::<8>(ids),
        _ => &rows_of::<FEW>(ids),
    };
    let mut sorted = [0; FEW];
    counts.fill(0);
    for ((pair, &id), (&row, row_of)) in ids.iter().enumerate().zip(rows.iter().zip(row_of_pair)) {
        *row_of = row;
        pair_of_row[row as usize] = pair as u32;
        sorted[row as usize] = id as usize;
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

/// The pairs before each pair, counted; at most N pairs.
#[inline(always)]
fn rows_of<const N: usize>(ids: &[i32]) -> [u32; N] {
    // All different, in the order of a stable sort; the unused places are never before a pair.
    let mut keys = [i32::MAX; N];
    for ((key, &id), pair) in keys.iter_mut().zip(ids).zip(0..) {
        *key = id * FEW as i32 + pair;
    }
    let mut rows = [0; N];
    for &other in &keys {
        for (row, &key) in rows.iter_mut().zip(&keys) {
            *row += u32::from(other < key);
        }
    }
    rows
}
