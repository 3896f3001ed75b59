//! RMS norm of rows, in place.

use super::Cpu;
use super::parallel::for_each_part;
use super::simd::{Op, Simd, dispatch, math};
use crate::moe::PostNorm;

/// Normalises each row of `data [rows, width]`, where `width` is the norm's.
pub(crate) fn normalize_rows(cpu: &Cpu, data: &mut [f32], norm: &PostNorm) {
    let width = norm.norm().width();
    for_each_part(cpu.threads(), data, width, &|_, rows| {
        dispatch(cpu.isa(), NormalizeRows { rows, norm });
    });
}

struct NormalizeRows<'a> {
    rows: &'a mut [f32],
    norm: &'a PostNorm,
}

impl Op for NormalizeRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let norm = self.norm.norm();
        let width = norm.width();
        let weight_first = matches!(self.norm, PostNorm::ScaleFirst(_));
        for row in self.rows.chunks_exact_mut(width) {
            if weight_first {
                multiply(s, row, norm.weight());
            }
            let squares = math::dot32(s, row, row);
            let denominator = s.splat((squares / width as f32 + norm.eps()).sqrt());
            for v in row.chunks_mut(S::LANES) {
                let quotient = s.div(s.load_partial(v, 0.0), denominator);
                s.store_partial(v, quotient);
            }
            if !weight_first {
                multiply(s, row, norm.weight());
            }
            if norm.multiplier() != 1.0 {
                let mul = s.splat(norm.multiplier());
                for v in row.chunks_mut(S::LANES) {
                    let product = s.mul(s.load_partial(v, 0.0), mul);
                    s.store_partial(v, product);
                }
            }
        }
    }
}

/// `row ← row · weight`
#[inline(always)]
fn multiply<S: Simd>(s: S, row: &mut [f32], weight: &[f32]) {
    for (v, w) in row.chunks_mut(S::LANES).zip(weight.chunks(S::LANES)) {
        let product = s.mul(s.load_partial(v, 0.0), s.load_partial(w, 0.0));
        s.store_partial(v, product);
    }
}
