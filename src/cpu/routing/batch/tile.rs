//! Tiles: `LANES` tokens side by side, token t in lane t.
//!
//! The easy version: an array indexed `[token][element]` read as `[element][token]`, an element at a time. Then:
//!
//! 1. rows are loaded as whole vectors and transposed in registers, by log₂ LANES rounds of [`Simd::zip`] that work alike for every vector length;
//! 2. sixteen elements of a row are as many as any stage needs, so a tile is sixteen vectors on every instruction set;
//! 3. on the way back a row is written as whole vectors, whose excess the next token's row overwrites.

use super::{SLOTS, TOKENS};
use crate::cpu::simd::{MAX_LANES, Simd};

/// Element `first + c` of tokens `tile ..`, for c = 0 .. 16: token t in lane t. Of integers it moves the bits.
#[inline(always)]
pub(super) fn load_tile<S: Simd, const N: usize>(
    s: S,
    rows: &[[f32; N]; TOKENS],
    tile: usize,
    first: usize,
) -> [S::F; SLOTS] {
    let mut all = [s.splat(0.0); SLOTS];
    for part in (0..SLOTS).step_by(S::LANES) {
        let mut v = [s.splat(0.0); MAX_LANES];
        for (v, row) in v.iter_mut().zip(&rows[tile..][..S::LANES]) {
            *v = s.load_slice(&row[first + part..]);
        }
        s.transpose(&mut v);
        all[part..][..S::LANES].copy_from_slice(&v[..S::LANES]);
    }
    all
}

/// Writes the first `k` of each token of a tile to its row of `out`, which begins at the tile.
#[inline(always)]
pub(super) fn store_tile<S: Simd>(s: S, k: usize, slots: [S::F; SLOTS], out: &mut [f32]) {
    let mut rows = [[0.0; SLOTS]; MAX_LANES];
    for part in (0..k).step_by(S::LANES) {
        let mut v = [s.splat(0.0); MAX_LANES];
        v[..S::LANES].copy_from_slice(&slots[part..][..S::LANES]);
        s.transpose(&mut v);
        for (row, &v) in rows.iter_mut().zip(&v).take(S::LANES) {
            s.store_slice(&mut row[part..], v);
        }
    }
    // Whole vectors: what is written beyond the row of a token is overwritten by the next token's.
    for (t, row) in rows[..S::LANES].iter().enumerate() {
        for part in (0..k).step_by(S::LANES) {
            let Some(rest) = out.get_mut(t * k + part..).filter(|rest| !rest.is_empty()) else {
                return;
            };
            if rest.len() >= S::LANES {
                s.store_slice(rest, s.load_slice(&row[part..]));
            } else {
                let n = rest.len().min(k - part);
                rest[..n].copy_from_slice(&row[part..][..n]);
            }
        }
    }
}
