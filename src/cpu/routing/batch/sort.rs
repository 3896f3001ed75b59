//! Sorting networks across tokens: vector i holds element i of `LANES` tokens, so that one exchange serves them all.
//!
//! The easy version, for each token: sort (key, id) by falling key and, of equal keys, by rising id. Then:
//!
//! 1. sixteen elements are sorted by a network of 60 exchanges without a branch, for `LANES` tokens at once;
//! 2. bounds need values only, for which an exchange is a maximum and a minimum;
//! 3. of equal keys the lower id wins by one comparison more: a rival with a lower id competes with a key that is one less;
//! 4. more than sixteen candidates are two sorted rows, whose best sixteen one level of exchanges finds and four more sort.

use super::SLOTS;
use crate::cpu::simd::Simd;

/// Calls `$exchange!(i j)` for every exchange of a network that sorts sixteen numbers: that of Green (1969) with 60, in 10 levels. A macro, so that
/// the numbers stay in registers.
macro_rules! network {
    ($exchange:ident) => {
        $exchange!(0 1, 2 3, 4 5, 6 7, 8 9, 10 11, 12 13, 14 15);
        $exchange!(0 2, 1 3, 4 6, 5 7, 8 10, 9 11, 12 14, 13 15);
        $exchange!(0 4, 1 5, 2 6, 3 7, 8 12, 9 13, 10 14, 11 15);
        $exchange!(0 8, 1 9, 2 10, 3 11, 4 12, 5 13, 6 14, 7 15);
        $exchange!(5 10, 6 9, 3 12, 13 14, 4 8, 7 11, 1 2);
        $exchange!(1 4, 7 13, 2 8, 11 14);
        $exchange!(2 4, 5 6, 9 10, 11 13, 3 8, 7 12);
        $exchange!(6 8, 10 12, 3 5, 7 9);
        $exchange!(3 4, 5 6, 7 8, 9 10, 11 12);
        $exchange!(6 7, 8 9);
    };
}

/// Sorts, the largest first; no NaN among them.
#[inline(always)]
pub(super) fn sort_values<S: Simd>(s: S, v: &mut [S::F; SLOTS]) {
    macro_rules! exchange {
        ($($i:literal $j:literal),*) => {$(
            (v[$i], v[$j]) = (s.max(v[$i], v[$j]), s.min(v[$i], v[$j]));
        )*};
    }
    network!(exchange);
}

/// Puts the better of two (key, id) into the first place: the larger key or, of equal keys, the lower id. No key is `i32::MIN`.
macro_rules! exchange_keys {
    ($s:ident, $keys:ident, $ids:ident, $($i:literal $j:literal),*) => {$({
        let (a, b) = ($keys[$i], $keys[$j]);
        let (a_id, b_id) = ($ids[$i], $ids[$j]);
        // An equal key wins when its id is lower: it is greater than a − 1.
        let rival = $s.select_i($s.gt_i(a_id, b_id), $s.sub_i(a, $s.splat_i(1)), a);
        let b_first = $s.gt_i(b, rival);
        ($keys[$i], $keys[$j]) = ($s.max_i(a, b), $s.min_i(a, b));
        $ids[$i] = $s.select_i(b_first, b_id, a_id);
        $ids[$j] = $s.select_i(b_first, a_id, b_id);
    })*};
}

/// Sorts by key, the largest first, and equal keys by id, the lowest first.
#[inline(always)]
pub(super) fn sort_keys<S: Simd>(s: S, keys: &mut [S::I; SLOTS], ids: &mut [S::I; SLOTS]) {
    macro_rules! exchange {
        ($($pairs:tt)*) => { exchange_keys!(s, keys, ids, $($pairs)*) };
    }
    network!(exchange);
}

/// The best sixteen of two sorted rows, sorted: the better ones of a[i] and b[15 − i] rise and then fall, which four levels sort.
#[inline(always)]
pub(super) fn merge_keys<S: Simd>(
    s: S,
    keys: &mut [S::I; SLOTS],
    ids: &mut [S::I; SLOTS],
    more_keys: &[S::I; SLOTS],
    more_ids: &[S::I; SLOTS],
) {
    for i in 0..SLOTS {
        let (b, b_id) = (more_keys[SLOTS - 1 - i], more_ids[SLOTS - 1 - i]);
        let (mut two, mut two_ids) = ([keys[i], b], [ids[i], b_id]);
        exchange_keys!(s, two, two_ids, 0 1);
        (keys[i], ids[i]) = (two[0], two_ids[0]);
    }
    exchange_keys!(s, keys, ids, 0 8, 1 9, 2 10, 3 11, 4 12, 5 13, 6 14, 7 15);
    exchange_keys!(s, keys, ids, 0 4, 1 5, 2 6, 3 7, 8 12, 9 13, 10 14, 11 15);
    exchange_keys!(s, keys, ids, 0 2, 1 3, 4 6, 5 7, 8 10, 9 11, 12 14, 13 15);
    exchange_keys!(s, keys, ids, 0 1, 2 3, 4 5, 6 7, 8 9, 10 11, 12 13, 14 15);
}

#[cfg(test)]
mod tests {
    /// A network sorts everything when it sorts all rows of zeros and ones.
    #[test]
    fn the_network_sorts() {
        for bits in 0..1u32 << 16 {
            let mut v: [u32; 16] = core::array::from_fn(|i| bits >> i & 1);
            macro_rules! exchange {
                ($($i:literal $j:literal),*) => {$(
                    (v[$i], v[$j]) = (v[$i].max(v[$j]), v[$i].min(v[$j]));
                )*};
            }
            network!(exchange);
            assert!(v.is_sorted_by(|a, b| a >= b), "{bits:016b}: {v:?}");
        }
    }
}
