//! From a row of logits to scores: multiplier, softcap, noise; softmax or an element-wise score.
//!
//! A row lives in blocks of 32, the lanes of every reduction. What is beyond its end holds −∞, which softmax turns into the +0.0 that a
//! missing element contributes.

use super::Job;
use crate::cpu::simd::Simd;
use crate::cpu::simd::math::{
    Lanes32, REDUCTION_LANES, exp, sigmoid, softplus, softplus_exp, softplus_of, tanh,
};
use crate::cpu::simd::random::fill_normal;
use crate::routing::Score;

/// Thirty-two neighbouring elements of a row.
pub(crate) type Block = [f32; REDUCTION_LANES];

/// Replaces every vector `$x` of `$blocks` by `$f`. A macro, since a closure that is not inlined would lose the instruction set.
macro_rules! map_vectors {
    ($s:ident: $simd:ident, $blocks:expr, $x:ident => $f:expr) => {
        for block in $blocks.iter_mut() {
            for i in (0..REDUCTION_LANES).step_by($simd::LANES) {
                let $x = $s.load_slice(&block[i..]);
                $s.store_slice(&mut block[i..], $f);
            }
        }
    };
}

/// Row `row` of the logits as it enters the score function, filled up with −∞:
/// `z·multiplier`, then `c·tanh(z/c)`, then `fma(normal, softplus(noise logit), z)`.
#[inline(always)]
pub(super) fn load_row<S: Simd>(
    s: S,
    job: &Job<'_>,
    row: usize,
    z: &mut [Block],
    noise: &mut [Block],
    normals: &mut [Block],
) {
    let config = job.config;
    let n = job.logits.cols();
    job.logits.widen_row(row, 0, &mut z.as_flattened_mut()[..n]);
    if config.logit_multiplier != 1.0 {
        let factor = s.splat(config.logit_multiplier);
        map_vectors!(s: S, z, x => s.mul(x, factor));
    }
    if config.logit_softcap > 0.0 {
        let cap = s.splat(config.logit_softcap);
        map_vectors!(s: S, z, x => s.mul(cap, tanh(s, s.div(x, cap))));
    }
    if let (Some(seed), Some(noise_logits)) = (config.noise_seed, job.noise_logits) {
        noise_logits.widen_row(row, 0, &mut noise.as_flattened_mut()[..n]);
        let position = job.position.wrapping_add(row as u64);
        fill_normal(s, seed, position, &mut normals.as_flattened_mut()[..n]);
        for ((z, noise), normals) in z.iter_mut().zip(noise.iter()).zip(normals.iter()) {
            for i in (0..REDUCTION_LANES).step_by(S::LANES) {
                let spread = softplus(s, s.load_slice(&noise[i..]));
                let x = s.fma(s.load_slice(&normals[i..]), spread, s.load_slice(&z[i..]));
                s.store_slice(&mut z[i..], x);
            }
        }
    }
    z.as_flattened_mut()[n..].fill(f32::NEG_INFINITY);
}

/// `out = exp(z − max z) / Σ exp(z − max z)`; the sum in the order of [`Lanes32`], then one division each.
///
/// NaN throughout when z holds a NaN or +∞, or nothing but −∞.
#[inline(always)]
pub(super) fn softmax<S: Simd>(s: S, z: &[Block], out: &mut [Block]) {
    let mut max = Lanes32::new(s, f32::NEG_INFINITY);
    for block in z {
        max.max(s, block);
    }
    let max = s.splat(max.maximum(s));
    let mut sum = Lanes32::new(s, 0.0);
    for (z, out) in z.iter().zip(out.iter_mut()) {
        for i in (0..REDUCTION_LANES).step_by(S::LANES) {
            s.store_slice(&mut out[i..], exp(s, s.sub(s.load_slice(&z[i..]), max)));
        }
        sum.add(s, out);
    }
    let sum = s.splat(sum.sum(s));
    map_vectors!(s: S, out, e => s.div(e, sum));
}

/// A score that depends on its own logit alone. Softmax does not, and is not asked for here.
#[inline(always)]
pub(super) fn elementwise<S: Simd>(s: S, score: Score, z: S::F) -> S::F {
    match score {
        Score::Sigmoid => sigmoid(s, z),
        Score::SqrtSoftplus => s.sqrt(softplus(s, z)),
        Score::Identity | Score::Softmax => z,
    }
}

/// The scores of a row.
#[inline(always)]
pub(super) fn scores<S: Simd>(s: S, score: Score, z: &[Block], out: &mut [Block]) {
    // One loop for each score: a match inside would be taken for every vector.
    match score {
        Score::Softmax => softmax(s, z, out),
        Score::Identity => out.copy_from_slice(z),
        Score::Sigmoid => {
            out.copy_from_slice(z);
            map_vectors!(s: S, out, x => elementwise(s, Score::Sigmoid, x));
        }
        Score::SqrtSoftplus => {
            softplus_exps(s, z, out);
            for (z, out) in z.iter().zip(out) {
                for i in (0..REDUCTION_LANES).step_by(S::LANES) {
                    let (x, e) = (s.load_slice(&z[i..]), s.load_slice(&out[i..]));
                    s.store_slice(&mut out[i..], s.sqrt(softplus_of(s, x, e)));
                }
            }
        }
    }
}

/// The first half of [`Score::SqrtSoftplus`] for a row, the exponentials; the second is √[`softplus_of`]. In one pass a vector is a chain of some 140 cycles, of which a Zen 3 core
/// sees four or five at a time. With bias, ns a token, one pass and two: E = 256 T = 64 671 and 562, T = 4096 661 and 567; E = 512 T = 64 1121 and 936.
#[inline(always)]
pub(super) fn softplus_exps<S: Simd>(s: S, z: &[Block], out: &mut [Block]) {
    out.copy_from_slice(z);
    map_vectors!(s: S, out, x => softplus_exp(s, x));
}
