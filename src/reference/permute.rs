//! Permutation: pairs sorted by expert, and back.

/// Pairs sorted by expert.
#[derive(Clone, Debug, PartialEq)]
pub struct Permutation {
    /// `[experts + 1]`: the rows of expert `first + e` are `offsets[e]..offsets[e + 1]`.
    pub offsets: Vec<usize>,
    /// `[rows]`: the pair at each row; −1 marks padding.
    pub pair_of_row: Vec<i64>,
    /// `[T·K]`: the row of each pair; −1 where the pair has none (dropped, null, or not local).
    pub row_of_pair: Vec<i64>,
}

/// Sorts pairs by expert, keeping the order of pairs within an expert.
///
/// Only experts in `local` (a part of 0..E for expert parallelism) get rows. Each expert's rows are padded
/// at their end to a multiple of `align`; an expert without rows gets no padding.
///
/// ```
/// use moe_kernels::reference::permute;
/// let ids = [2, 0, 2, 3, 0, 2];
/// let p = permute(&ids, 0..4, 1);
/// assert_eq!(p.offsets, [0, 2, 2, 5, 6]);
/// assert_eq!(p.pair_of_row, [1, 4, 0, 2, 5, 3]);
/// assert_eq!(p.row_of_pair, [2, 0, 3, 5, 1, 4]);
///
/// let p = permute(&ids, 2..4, 2); // experts 2 and 3 only, rows in blocks of two
/// assert_eq!(p.offsets, [0, 4, 6]);
/// assert_eq!(p.pair_of_row, [0, 2, 5, -1, 3, -1]);
/// assert_eq!(p.row_of_pair, [0, -1, 1, 4, -1, 2]);
/// ```
pub fn permute(ids: &[i32], local: std::ops::Range<usize>, align: usize) -> Permutation {
    assert!(align > 0, "permute: align is 0");
    let mut offsets = vec![0];
    let mut pair_of_row: Vec<i64> = Vec::new();
    let mut row_of_pair = vec![-1; ids.len()];
    for e in local {
        for (pair, &id) in ids.iter().enumerate() {
            if id >= 0 && id as usize == e {
                row_of_pair[pair] = pair_of_row.len() as i64;
                pair_of_row.push(pair as i64);
            }
        }
        pair_of_row.resize(pair_of_row.len().next_multiple_of(align), -1);
        offsets.push(pair_of_row.len());
    }
    Permutation {
        offsets,
        pair_of_row,
        row_of_pair,
    }
}

/// Rows of x `[T, width]` in the order of `pair_of_row`; padding rows are zero.
pub fn permute_rows(x: &[f64], width: usize, pair_of_row: &[i64], k: usize) -> Vec<f64> {
    let token = |pair: i64| &x[pair as usize / k * width..][..width];
    pair_of_row
        .iter()
        .flat_map(|&p| {
            if p < 0 {
                vec![0.0; width]
            } else {
                token(p).to_vec()
            }
        })
        .collect()
}

/// The inverse: rows `[rows, width]` in the order of pairs, `[T·K, width]`; a pair without a row is zero.
pub fn unpermute_rows(rows: &[f64], width: usize, row_of_pair: &[i64]) -> Vec<f64> {
    permute_rows(rows, width, row_of_pair, 1)
}

#[cfg(test)]
mod tests {
    use super::super::noise;
    use super::*;

    #[test]
    fn rows_and_pairs_are_inverse_and_stable() {
        for seed in 1..50 {
            let ids: Vec<i32> = noise(seed, 60)
                .iter()
                .map(|v| (v * 5.0 + 4.0) as i32 - 1)
                .collect();
            let (align, local) = ([1, 4, 16][seed as usize % 3], 1..6);
            let p = permute(&ids, local.clone(), align);
            assert_eq!(p.offsets.len(), local.len() + 1);
            assert_eq!(*p.offsets.last().unwrap(), p.pair_of_row.len());
            for (e, rows) in p.offsets.windows(2).enumerate() {
                assert_eq!(rows[0] % align, 0);
                let pairs: Vec<i64> = p.pair_of_row[rows[0]..rows[1]].to_vec();
                let real = pairs
                    .iter()
                    .position(|pair| *pair < 0)
                    .unwrap_or(pairs.len());
                assert!(pairs.len() - real < align && pairs[real..].iter().all(|pair| *pair == -1));
                assert!(pairs[..real].is_sorted());
                for (i, &pair) in pairs[..real].iter().enumerate() {
                    assert_eq!(ids[pair as usize] as usize, local.start + e);
                    assert_eq!(p.row_of_pair[pair as usize] as usize, rows[0] + i);
                }
            }
            for (pair, &row) in p.row_of_pair.iter().enumerate() {
                let is_local = ids[pair] >= 0 && local.contains(&(ids[pair] as usize));
                assert_eq!(row >= 0, is_local);
            }
        }
    }

    #[test]
    fn rows_move_there_and_back() {
        let x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]; // three tokens of two
        let p = permute(&[2, 0, 2, 3, 0, -1], 0..4, 2);
        let rows = permute_rows(&x, 2, &p.pair_of_row, 2);
        assert_eq!(
            rows,
            [1.0, 2.0, 5.0, 6.0, 1.0, 2.0, 3.0, 4.0, 3.0, 4.0, 0.0, 0.0]
        );
        let pairs = unpermute_rows(&rows, 2, &p.row_of_pair);
        assert_eq!(
            pairs,
            [1.0, 2.0, 1.0, 2.0, 3.0, 4.0, 3.0, 4.0, 5.0, 6.0, 0.0, 0.0]
        );
    }
}
