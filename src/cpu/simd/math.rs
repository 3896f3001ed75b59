//! The only exp, ln, tanh, erf … of the crate's forward paths: polynomials over IEEE fma, so that every instruction set returns the same
//! bits. libm is not used because it differs from platform to platform.
//!
//! Each function is: own range reduction, a minimax polynomial (Remez, relative error, coefficients rounded to f32), reconstruction.
//! No table, no branch, no fast-math, no flush to zero. NaN propagates (its payload may not). The docstrings state error bounds against f64, which
//! `math/tests.rs` checks at 858 thousand bit patterns of each function in every run; its ignored test takes all 2³² (so far done for exp only: 0.891 ulp).
//! Clamps are written `max(constant, x)`, in this order: [`Simd::max`] returns its second argument when one is NaN.
//!
//! Sums over experts or features have one shape as well, 32 lanes: see [`Lanes32`].

use super::{Scalar, Simd};

#[cfg(test)]
mod tests;

const LOG2_E: f32 = core::f32::consts::LOG2_E;
/// ln 2 in two parts: LN_2_HI is the nearest f32.
const LN_2_HI: f32 = core::f32::consts::LN_2;
const LN_2_LO: f32 = -1.904_654_2e-9;
/// 1.5·2²³: adding it rounds a small number to an integer, which then sits in the low bits.
const ROUND: f32 = 12_582_912.0;

/// Σ cᵢ·xⁱ by Horner's rule, lowest coefficient first.
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(s: S, x: S::F, c: [f32; N]) -> S::F {
    let mut p = s.splat(c[N - 1]);
    for i in (0..N - 1).rev() {
        p = s.fma(p, x, s.splat(c[i]));
    }
    p
}

/// eˣ; error ≤ 0.9 ulp, subnormal results included; 0 below −103.98, ∞ above 88.72.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2; eʳ = 1 + r + r²·q(r), and 2ⁿ is applied so that the result rounds once, subnormal ones included
/// ([`Simd::scale_by_power`]).
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    // e^89 already rounds to infinity.
    exp_low(s, s.min(s.splat(89.0), x))
}

/// [`exp`] where x ≤ 89 or NaN, as −|x| is, and the difference to a maximum.
#[inline(always)]
pub(crate) fn exp_low<S: Simd>(s: S, x: S::F) -> S::F {
    // e^-104 already rounds to 0.
    let far = s.lt(x, s.splat(-104.0));
    let x = match S::SCALES_TO_ZERO {
        true => x,
        false => s.max(s.splat(-104.0), x),
    };
    let shifted = s.fma(x, s.splat(LOG2_E), s.splat(ROUND));
    let n = s.sub_i(s.to_bits(shifted), s.splat_i(ROUND.to_bits() as i32));
    let nf = s.sub(shifted, s.splat(ROUND));
    let r = s.fma(nf, s.splat(-LN_2_HI), x); // exact
    let r = s.fma(nf, s.splat(-LN_2_LO), r);
    let q = polynomial(
        s,
        r,
        [
            0.499_999_94,
            0.166_665_17,
            0.041_668_102,
            0.008_369_192_5,
            0.001_383_890_3,
        ],
    );
    let p = s.fma(r, s.fma(r, q, s.splat(1.0)), s.splat(1.0));
    s.scale_by_power(p, n, nf, far)
}

/// [`exp_low`] for numbers many of which are −∞. A result that underflows costs some processors 100 cycles and more, even when it rounds to 0.
#[inline(always)]
pub(crate) fn exp_padded<S: Simd>(s: S, x: S::F) -> S::F {
    if S::SCALES_TO_ZERO {
        return exp_low(s, x);
    }
    let (far, zero) = (s.lt(x, s.splat(-104.0)), s.splat(0.0));
    s.select(far, zero, exp_low(s, s.select(far, zero, x)))
}

/// k·ln 2 + ln(1 + f) for √½ − 1 ≤ f ≤ √2 − 1.
#[inline(always)]
fn ln_reduced<S: Simd>(s: S, k: S::F, f: S::F) -> S::F {
    let tail = ln_tail(s, f, s.mul(k, s.splat(LN_2_LO)));
    s.fma(k, s.splat(LN_2_HI), tail)
}

/// ln(1 + f) + low for √½ − 1 ≤ f ≤ √2 − 1 and a tiny `low`.
#[inline(always)]
fn ln_tail<S: Simd>(s: S, f: S::F, low: S::F) -> S::F {
    let p = polynomial(
        s,
        f,
        [
            0.333_333_13,
            -0.250_000_1,
            0.200_021_2,
            -0.166_679_96,
            0.142_195_2,
            -0.124_055_43,
            0.118_883_75,
            -0.116_760_544,
            0.067_466_45,
        ],
    );
    let ff = s.mul(f, f);
    let tail = s.fma(s.mul(f, ff), p, low);
    let tail = s.fma(ff, s.splat(-0.5), tail);
    s.add(f, tail)
}

/// The k with √½ ≤ u·2⁻ᵏ < √2, for normal u > 0.
#[inline(always)]
fn binary_exponent<S: Simd>(s: S, u: S::F) -> S::I {
    let sqrt_half = s.splat_i(core::f32::consts::FRAC_1_SQRT_2.to_bits() as i32);
    s.sar::<23>(s.sub_i(s.to_bits(u), sqrt_half))
}

/// ln x; error ≤ 0.9 ulp. −∞ at ±0, NaN below 0, ∞ at ∞.
#[inline(always)]
pub(crate) fn ln<S: Simd>(s: S, x: S::F) -> S::F {
    // Subnormals are scaled into the normal range; negative numbers go along and are replaced below.
    let tiny = s.lt(x, s.splat(f32::MIN_POSITIVE));
    let u = s.select(tiny, s.mul(x, s.splat(8_388_608.0)), x);
    let k = binary_exponent(s, u);
    let m = s.from_bits(s.sub_i(s.to_bits(u), s.shl::<23>(k)));
    let kf = s.add(s.to_float(k), s.select(tiny, s.splat(-23.0), s.splat(0.0)));
    let r = ln_reduced(s, kf, s.sub(m, s.splat(1.0)));
    let zero = s.splat(0.0);
    let r = s.select(s.lt(x, s.splat(f32::INFINITY)), r, x); // ∞ and NaN
    let r = s.select(s.eq(x, zero), s.splat(f32::NEG_INFINITY), r);
    s.select(s.lt(x, zero), s.splat(f32::NAN), r)
}

/// 1 / (1 + e⁻ˣ), computed as `(x < 0 ? e : 1) / (1 + e)` with e = exp(−|x|), which underflows gradually; error ≤ 2.5 ulp.
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    let e = exp_low(s, s.neg(s.abs(x)));
    s.div(s.select(s.lt(x, s.splat(0.0)), e, one), s.add(one, e))
}

/// x·sigmoid(z): the common form of SiLU and tanh-GELU. −∞ gives −0 instead of −∞·0 = NaN.
#[inline(always)]
fn times_sigmoid<S: Simd>(s: S, x: S::F, z: S::F) -> S::F {
    let e = exp_low(s, s.neg(s.abs(z)));
    let x = s.max(s.splat(-f32::MAX), x);
    let numerator = s.select(s.lt(z, s.splat(0.0)), s.mul(x, e), x);
    s.div(numerator, s.add(s.splat(1.0), e))
}

/// x / (1 + e⁻ˣ), computed as `(x < 0 ? x·e : x) / (1 + e)` with e = exp(−|x|); error ≤ 3 ulp for x ≥ −87, below 2⁻¹⁴² under that.
/// −0 at −∞.
#[inline(always)]
pub(crate) fn silu<S: Simd>(s: S, x: S::F) -> S::F {
    times_sigmoid(s, x, x)
}

/// ln(1 + x) for 0 ≤ x ≤ 1 or NaN (what softplus needs); error ≤ 1.4 ulp.
///
/// As k·ln 2 + ln(1 + f) with √½ ≤ 1 + f < √2, where k is 0 or 1, so that all it decides is three selections: k = 0 has f = x, k = 1 has f = x/2 − ½. The bits are those
/// of the general form, for every x ≥ 0, that `math/tests.rs` keeps to compare.
#[inline(always)]
fn log1p_unit<S: Simd>(s: S, x: S::F) -> S::F {
    let u = s.add(x, s.splat(1.0));
    let k0 = s.lt(u, s.splat(2.0 * core::f32::consts::FRAC_1_SQRT_2));
    let zero = s.splat(0.0);
    let f = s.select(k0, x, s.fma(x, s.splat(0.5), s.splat(-0.5)));
    let low = s.select(k0, zero, s.splat(LN_2_LO));
    let high = s.select(k0, zero, s.splat(LN_2_HI));
    s.add(high, ln_tail(s, f, low))
}

/// ln(1 + eˣ), computed as `max(x, 0) + log1p(exp(−|x|))`; error ≤ 2 ulp.
#[inline(always)]
pub(crate) fn softplus<S: Simd>(s: S, x: S::F) -> S::F {
    softplus_of(s, x, softplus_exp(s, x))
}

/// The first half of [`softplus`]: exp(−|x|).
#[inline(always)]
pub(crate) fn softplus_exp<S: Simd>(s: S, x: S::F) -> S::F {
    exp_low(s, s.neg(s.abs(x)))
}

/// The second half: [`softplus`] of x with its exp(−|x|).
#[inline(always)]
pub(crate) fn softplus_of<S: Simd>(s: S, x: S::F, e: S::F) -> S::F {
    s.add(s.max(x, s.splat(0.0)), log1p_unit(s, e))
}

/// tanh x; error ≤ 1.5 ulp, near 0 too. −0 stays −0.
///
/// |x| < 0.625: x + x³·p(x²); else 1 − 2e / (1 + e) with e = exp(−2|x|), where the error of e counts less than half.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(s: S, x: S::F) -> S::F {
    let a = s.abs(x);
    let xx = s.mul(x, x);
    let p = polynomial(
        s,
        xx,
        [
            -0.333_332_8,
            0.133_314_06,
            -0.053_736_515,
            0.020_628_167,
            -0.005_692_296,
        ],
    );
    let small = s.fma(s.mul(a, xx), p, a);
    let one = s.splat(1.0);
    let e = exp(s, s.mul(a, s.splat(-2.0)));
    let big = s.sub(one, s.div(s.add(e, e), s.add(one, e)));
    s.copysign(s.select(s.lt(a, s.splat(0.625)), small, big), x)
}

/// erf x = 2/√π ∫₀ˣ e^(−t²) dt; error ≤ 1.5 ulp, near 0 too. −0 stays −0.
///
/// |x| < 0.92: x + x·p(x²); else 1 − exp(q(|x|)), q fitted to ln erfc up to 4, where erf has rounded to 1.
#[inline(always)]
pub(crate) fn erf<S: Simd>(s: S, x: S::F) -> S::F {
    let a = s.abs(x);
    let p = polynomial(
        s,
        s.mul(x, x),
        [
            0.128_379_17,
            -0.376_126_3,
            0.112_836_26,
            -0.026_855_74,
            0.005_192_460_5,
            -0.000_805_080_4,
            8.002_775e-5,
        ],
    );
    let small = s.fma(a, p, a);
    let q = polynomial(
        s,
        s.min(s.splat(4.0), a),
        [
            -0.000_195_675_3,
            -1.127_675_7,
            -0.637_182_2,
            -0.103_931_67,
            0.022_226_96,
            -0.003_043_223_4,
            0.000_195_936_07,
        ],
    );
    let big = s.sub(s.splat(1.0), exp(s, q));
    s.copysign(s.select(s.lt(a, s.splat(0.92)), small, big), x)
}

/// x·(1 + erf(x/√2))/2; error ≤ 1.5·|x|·2⁻²⁴ (for x < −1 the sum cancels, as it does in every framework). 0 at −∞.
#[inline(always)]
pub(crate) fn gelu_erf<S: Simd>(s: S, x: S::F) -> S::F {
    let phi = erf(s, s.mul(x, s.splat(core::f32::consts::FRAC_1_SQRT_2)));
    let half = s.mul(s.max(s.splat(-f32::MAX), x), s.splat(0.5));
    s.fma(half, phi, half)
}

/// x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))/2, computed as the identical x·sigmoid(2·√(2/π)·(x + 0.044715·x³)), which does not cancel for
/// x < 0; error ≤ 2·|x|·2⁻²⁴. −0 at −∞.
#[inline(always)]
pub(crate) fn gelu_tanh<S: Simd>(s: S, x: S::F) -> S::F {
    const LINEAR: f32 = 1.595_769; // 2·√(2/π)
    const CUBIC: f32 = 0.071_354_814; // 2·√(2/π)·0.044715
    let z = s.mul(x, s.fma(s.mul(x, x), s.splat(CUBIC), s.splat(LINEAR)));
    times_sigmoid(s, x, z)
}

/// max(x, 0); exact. −0 stays −0.
#[inline(always)]
pub(crate) fn relu<S: Simd>(s: S, x: S::F) -> S::F {
    s.max(s.splat(0.0), x)
}

/// max(x, 0)²; correctly rounded.
#[inline(always)]
pub(crate) fn relu2<S: Simd>(s: S, x: S::F) -> S::F {
    let r = relu(s, x);
    s.mul(r, r)
}

/// The standard normal quantile Φ⁻¹(u) = √2·erf⁻¹(2u − 1) for 0 < u < 1, NaN outside; error ≤ 4.5 ulp.
///
/// M. Giles, "Approximating the erfinv function", GPU Computing Gems 2 (2010), single precision: two polynomials in
/// w = −ln(1 − (2u − 1)²) = −ln(4u(1 − u)).
#[inline(always)]
pub(crate) fn normal_quantile<S: Simd>(s: S, u: S::F) -> S::F {
    let x = s.fma(u, s.splat(2.0), s.splat(-1.0));
    let product = s.mul(s.mul(u, s.splat(4.0)), s.sub(s.splat(1.0), u));
    let w = s.neg(ln(s, product));
    let central = polynomial(
        s,
        s.sub(w, s.splat(2.5)),
        [
            1.501_409_4,
            0.246_640_73,
            -0.004_177_681_6,
            -0.001_253_725,
            0.000_218_580_87,
            -4.391_506_5e-6,
            -3.523_387_7e-6,
            3.432_739_4e-7,
            2.810_226_4e-8,
        ],
    );
    let tail = polynomial(
        s,
        s.sub(s.sqrt(w), s.splat(3.0)),
        [
            2.832_976_8,
            1.001_674,
            0.009_438_87,
            -0.007_622_461_3,
            0.005_739_507_7,
            -0.003_673_428_4,
            0.001_349_343_2,
            0.000_100_950_56,
            -0.000_200_214_26,
        ],
    );
    let p = s.select(s.lt(w, s.splat(5.0)), central, tail);
    s.mul(s.mul(p, x), s.splat(core::f32::consts::SQRT_2))
}

/// One value of a vector function, with the bits that every ISA gives: the plain path, whose seven unused lanes the compiler drops.
macro_rules! single {
    ($($(#[$doc:meta])* $name:ident = $function:ident;)*) => {$(
        $(#[$doc])*
        pub(crate) fn $name(x: f32) -> f32 {
            let s = Scalar::new();
            $function(s, s.splat(x))[0]
        }
    )*};
}
single! {
    /// [`exp`] of one number.
    exp1 = exp;
    /// [`ln`] of one number.
    ln1 = ln;
    /// [`sigmoid`] of one number.
    #[cfg(test)]
    sigmoid1 = sigmoid;
    /// [`softplus`] of one number.
    #[cfg(test)]
    softplus1 = softplus;
    /// [`tanh`] of one number.
    #[cfg(test)]
    tanh1 = tanh;
    /// [`normal_quantile`] of one number.
    #[cfg(test)]
    normal_quantile1 = normal_quantile;
}

/// Lanes of every reduction over experts or features: those of a warp.
pub(crate) const REDUCTION_LANES: usize = 32;

/// The accumulators of a reduction: 32 partial results, element i in lane i mod 32, whatever the vector width.
///
/// The order is part of the contract: lanes start at +0.0 (sum) or −∞ (max) and take their elements in ascending order; then
/// `for off in [16, 8, 4, 2, 1] { s[l] = s[l] ∘ s[l ^ off] }`, and the result is `s[0]`. A warp does the same with one register a lane
/// and five shuffles.
#[derive(Clone, Copy)]
pub(crate) struct Lanes32<S: Simd> {
    // 32 / LANES of them are used: 8, 4 or 2.
    vectors: [S::F; 8],
}

impl<S: Simd> Lanes32<S> {
    const USED: usize = REDUCTION_LANES / S::LANES;

    /// All lanes `start`.
    #[inline(always)]
    pub(crate) fn new(s: S, start: f32) -> Self {
        Self {
            vectors: [s.splat(start); 8],
        }
    }

    /// s[l] = s[l] + x[l]
    #[inline(always)]
    pub(crate) fn add(&mut self, s: S, x: &[f32; REDUCTION_LANES]) {
        for v in 0..Self::USED {
            self.vectors[v] = s.add(self.vectors[v], s.load_slice(&x[v * S::LANES..]));
        }
    }

    /// s[l] = s[l] + x[l] for the lanes of vector `v` of a block.
    #[inline(always)]
    pub(crate) fn add_vector(&mut self, s: S, v: usize, x: S::F) {
        self.vectors[v] = s.add(self.vectors[v], x);
    }

    /// s[l] = a[l]·b[l] + s[l], rounded once.
    #[inline(always)]
    pub(crate) fn add_product(
        &mut self,
        s: S,
        a: &[f32; REDUCTION_LANES],
        b: &[f32; REDUCTION_LANES],
    ) {
        for v in 0..Self::USED {
            let a = s.load_slice(&a[v * S::LANES..]);
            let b = s.load_slice(&b[v * S::LANES..]);
            self.vectors[v] = s.fma(a, b, self.vectors[v]);
        }
    }

    /// s[l] = max(x[l], s[l]): NaN is passed over.
    #[inline(always)]
    pub(crate) fn max(&mut self, s: S, x: &[f32; REDUCTION_LANES]) {
        for v in 0..Self::USED {
            self.vectors[v] = s.max(s.load_slice(&x[v * S::LANES..]), self.vectors[v]);
        }
    }

    /// The sum of the lanes by the butterfly.
    #[inline(always)]
    pub(crate) fn sum(self, s: S) -> f32 {
        let mut lanes = self.lanes(s);
        for off in [16, 8, 4, 2, 1] {
            // Only s[0] is wanted, so lanes from `off` on need not be kept up.
            for l in 0..off {
                lanes[l] += lanes[l + off];
            }
        }
        lanes[0]
    }

    /// The maximum of the lanes by the butterfly.
    #[inline(always)]
    pub(crate) fn maximum(self, s: S) -> f32 {
        let mut lanes = self.lanes(s);
        for off in [16, 8, 4, 2, 1] {
            for l in 0..off {
                let (a, b) = (lanes[l], lanes[l + off]);
                lanes[l] = if a > b { a } else { b };
            }
        }
        lanes[0]
    }

    /// The first levels of the butterfly, down to one vector.
    #[inline(always)]
    pub(crate) fn fold(mut self, s: S) -> S::F {
        let mut left = Self::USED;
        while left > 1 {
            left /= 2;
            for v in 0..left {
                self.vectors[v] = s.add(self.vectors[v], self.vectors[v + left]);
            }
        }
        self.vectors[0]
    }

    /// The partial results.
    #[inline(always)]
    pub(crate) fn lanes(self, s: S) -> [f32; REDUCTION_LANES] {
        let mut lanes = [0.0; REDUCTION_LANES];
        for v in 0..Self::USED {
            s.store_slice(&mut lanes[v * S::LANES..], self.vectors[v]);
        }
        lanes
    }
}

/// `x` filled up to 32 numbers.
#[inline(always)]
pub(crate) fn filled(x: &[f32], fill: f32) -> [f32; REDUCTION_LANES] {
    let mut block = [fill; REDUCTION_LANES];
    block[..x.len()].copy_from_slice(x);
    block
}

/// Σ x in the order of [`Lanes32`]; +0.0 for an empty slice.
#[inline(always)]
pub(crate) fn sum32<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut acc = Lanes32::new(s, 0.0);
    let (blocks, rest) = x.as_chunks();
    for block in blocks {
        acc.add(s, block);
    }
    if !rest.is_empty() {
        acc.add(s, &filled(rest, 0.0));
    }
    acc.sum(s)
}

/// Σ a·b in the order of [`Lanes32`], each lane a chain of fma. The slices are equally long.
#[inline(always)]
pub(crate) fn dot32<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    debug_assert_eq!(a.len(), b.len());
    let mut acc = Lanes32::new(s, 0.0);
    let (a_blocks, a_rest) = a.as_chunks();
    let (b_blocks, b_rest) = b.as_chunks();
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        acc.add_product(s, a, b);
    }
    if !a_rest.is_empty() {
        // 0·0 adds nothing to a lane that started at +0.0.
        acc.add_product(s, &filled(a_rest, 0.0), &filled(b_rest, 0.0));
    }
    acc.sum(s)
}

/// The largest of `x`, NaN passed over, in the order of [`Lanes32`] (which decides between +0 and −0); −∞ for an empty slice.
#[inline(always)]
pub(crate) fn max32<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut acc = Lanes32::new(s, f32::NEG_INFINITY);
    let (blocks, rest) = x.as_chunks();
    for block in blocks {
        acc.max(s, block);
    }
    if !rest.is_empty() {
        acc.max(s, &filled(rest, f32::NEG_INFINITY));
    }
    acc.maximum(s)
}
