// The arithmetic of the bit-exact paths: exp, ln, tanh, erf … and the reductions, with the bits of the CPU (contract D4).
//
// This is `src/cpu/simd/math.rs` operation for operation. What makes the bits the same on a GPU:
//   * every product, sum, quotient and root is one explicit IEEE-rounded intrinsic (`__fmul_rn`, `__fmaf_rn`, …), so that the compiler
//     contracts nothing and reorders nothing; nothing here depends on compiler flags but -ftz=false, the default;
//   * `max` and `min` are comparisons that return their second argument for NaN; never fmaxf, which passes over NaN;
//   * no approximate instruction (ex2, lg2, tanh): reciprocals and roots are approximated only inside the correctly rounded division and square root;
//   * sums over experts or features run in 32 lanes, element i in lane i mod 32, ascending, then a butterfly: what one warp does.
// NaN stays NaN; sign and payload of a NaN may differ from the CPU's, as they do between two CPUs. Error bounds: see math.rs.
//
// The instruction counts in the comments are SASS instructions on sm_90 (a correctly rounded division is about 10 and a call that is hardly ever
// taken). `tests/cuda_routing.rs` compares exp, sigmoid, √softplus, tanh, the normal numbers and the widening of every 16-bit number with the CPU, bit by bit;
// the rest is compared where it is used, in the epilogue of the exact product and in the combine.
#pragma once

#include <stdint.h>

#include "ptx.cuh"

namespace numerics {

// ---- bits and comparisons ----------------------------------------------------------------------------------------------------------------

constexpr uint32_t FULL_WARP = 0xffffffffu;

MOE_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
MOE_DEVICE float from_bits(uint32_t bits) { return __uint_as_float(bits); }
MOE_DEVICE float infinity() { return from_bits(0x7f800000u); }
MOE_DEVICE float negative_infinity() { return from_bits(0xff800000u); }
/// The one NaN that is ever written as a weight: Rust's f32::NAN.
MOE_DEVICE float quiet_nan() { return from_bits(0x7fc00000u); }
MOE_DEVICE bool is_nan(float x) { return !(x == x); }
/// Every NaN becomes [`quiet_nan`].
MOE_DEVICE float one_nan(float x) { return x == x ? x : quiet_nan(); }

/// b when either is NaN.
MOE_DEVICE float max(float a, float b) { return a > b ? a : b; }
/// b when either is NaN.
MOE_DEVICE float min(float a, float b) { return a < b ? a : b; }
MOE_DEVICE float neg(float x) { return from_bits(bits_of(x) ^ 0x80000000u); }
MOE_DEVICE float abs(float x) { return from_bits(bits_of(x) & 0x7fffffffu); }
/// Magnitude of `a`, sign of `sign`.
MOE_DEVICE float copysign(float a, float sign) {
    return from_bits((bits_of(a) & 0x7fffffffu) | (bits_of(sign) & 0x80000000u));
}

// ---- 16-bit formats: the bits of a number in a uint16_t ----------------------------------------------------------------------------------

/// Exact.
MOE_DEVICE float bf16_to_f32(uint16_t x) { return from_bits(static_cast<uint32_t>(x) << 16); }

/// To nearest, ties to even; beyond the largest finite number, infinity. A NaN keeps its sign and upper bits and becomes quiet, as on the CPU (the
/// instruction alone makes it 0x7fff).
MOE_DEVICE uint16_t f32_to_bf16(float x) {
    return x == x ? ptx::f32_to_bf16(x) : static_cast<uint16_t>(bits_of(x) >> 16 | 0x40u);
}

/// Exact, subnormal numbers included. NaN stays NaN.
MOE_DEVICE float f16_to_f32(uint16_t x) { return ptx::f16_to_f32(x); }

/// To nearest, ties to even, subnormal results included; beyond the largest finite number, infinity. NaN as in [`f32_to_bf16`].
MOE_DEVICE uint16_t f32_to_f16(float x) {
    const uint32_t bits = bits_of(x);
    return x == x ? ptx::f32_to_f16(x) : static_cast<uint16_t>((bits >> 16 & 0x8000u) | 0x7e00u | (bits >> 13 & 0x3ffu));
}

// ---- functions of one number -------------------------------------------------------------------------------------------------------------

constexpr float LOG2_E = 1.44269504088896340736f;
/// ln 2 in two parts.
constexpr float LN_2_HI = 0.693147180559945309417f;
constexpr float LN_2_LO = -1.9046542e-9f;
/// 1.5·2²³: adding it rounds a small number to an integer, which then sits in the low bits.
constexpr float ROUND = 12582912.0f;
constexpr uint32_t ROUND_BITS = 0x4b400000u;
constexpr float MAX_F32 = 3.40282346638528859812e+38f;
constexpr float MIN_POSITIVE = 1.17549435082228750797e-38f;

/// Σ cᵢ·xⁱ by Horner's rule, lowest coefficient first.
template <int N>
MOE_DEVICE float polynomial(float x, const float (&c)[N]) {
    float p = c[N - 1];
#pragma unroll
    for (int i = N - 2; i >= 0; --i) p = __fmaf_rn(p, x, c[i]);
    return p;
}

/// a·2ⁿ, rounded once, for 0.5 ≤ |a| < 2 and −252 ≤ n ≤ 254: two exact halves, so that only the last product rounds.
MOE_DEVICE float scale_by_power(float a, int32_t n) {
    const int32_t half = n >> 1, rest = n - half;
    const float by_half = from_bits(static_cast<uint32_t>(half + 127) << 23);
    const float by_rest = from_bits(static_cast<uint32_t>(rest + 127) << 23);
    return __fmul_rn(__fmul_rn(a, by_half), by_rest);
}

/// eʳ for the r left of x after n·ln 2, where `shifted` = ROUND + n: the polynomial of [`exp`].
MOE_DEVICE float exp_reduced(float x, float shifted) {
    const float nf = __fsub_rn(shifted, ROUND);
    float r = __fmaf_rn(nf, -LN_2_HI, x);  // exact
    r = __fmaf_rn(nf, -LN_2_LO, r);
    const float c[5] = {0.49999994f, 0.16666517f, 0.041668102f, 0.0083691925f, 0.0013838903f};
    const float q = polynomial(r, c);
    return __fmaf_rn(r, __fmaf_rn(r, q, 1.0f), 1.0f);
}

/// eˣ; error ≤ 0.9 ulp, subnormal results included; 0 below −103.98, ∞ above 88.72. 21 instructions.
MOE_DEVICE float exp(float x) {
    x = min(89.0f, max(-104.0f, x));
    const float shifted = __fmaf_rn(x, LOG2_E, ROUND);
    const int32_t n = static_cast<int32_t>(bits_of(shifted) - ROUND_BITS);
    return scale_by_power(exp_reduced(x, shifted), n);
}

/// The bits of [`exp`] for −87 ≤ x ≤ 88, where neither clamp nor second factor is needed. 12 instructions: ROUND's low 9 bits are 0, so the sum
/// shifted by 23 is n in the exponent, and the product with 2ⁿ, exact here, is an integer addition.
MOE_DEVICE float exp_normal(float x) {
    const float shifted = __fmaf_rn(x, LOG2_E, ROUND);
    return from_bits(bits_of(exp_reduced(x, shifted)) + (bits_of(shifted) << 23));
}

/// k·ln 2 + ln(1 + f) for √½ − 1 ≤ f ≤ √2 − 1.
MOE_DEVICE float ln_reduced(float k, float f) {
    const float c[9] = {0.33333313f,  -0.2500001f,  0.2000212f,    -0.16667996f, 0.1421952f,
                      -0.12405543f, 0.11888375f, -0.116760544f, 0.06746645f};
    const float p = polynomial(f, c);
    const float ff = __fmul_rn(f, f);
    float tail = __fmaf_rn(__fmul_rn(f, ff), p, __fmul_rn(k, LN_2_LO));
    tail = __fmaf_rn(ff, -0.5f, tail);
    return __fmaf_rn(k, LN_2_HI, __fadd_rn(f, tail));
}

/// The k with √½ ≤ u·2⁻ᵏ < √2, for normal u > 0.
MOE_DEVICE int32_t binary_exponent(float u) { return static_cast<int32_t>(bits_of(u) - 0x3f3504f3u) >> 23; }

/// u·2⁻ᵏ for normal u and the k of [`binary_exponent`].
MOE_DEVICE float without_exponent(float u, int32_t k) { return from_bits(bits_of(u) - (static_cast<uint32_t>(k) << 23)); }

/// ln x; error ≤ 0.9 ulp. −∞ at ±0, NaN below 0, ∞ at ∞.
MOE_DEVICE float ln(float x) {
    const bool tiny = x < MIN_POSITIVE;
    const float u = tiny ? __fmul_rn(x, 8388608.0f) : x;
    const int32_t k = binary_exponent(u);
    const float m = without_exponent(u, k);
    const float kf = __fadd_rn(static_cast<float>(k), tiny ? -23.0f : 0.0f);
    float r = ln_reduced(kf, __fsub_rn(m, 1.0f));
    r = x < infinity() ? r : x;  // ∞ and NaN
    r = x == 0.0f ? negative_infinity() : r;
    return x < 0.0f ? quiet_nan() : r;
}

/// ln(1 + x) for x ≥ 0 only; error ≤ 1.4 ulp. ∞ at ∞.
MOE_DEVICE float log1p(float x) {
    const float u = __fadd_rn(x, 1.0f);
    const int32_t k = binary_exponent(u);
    const float scale = from_bits(static_cast<uint32_t>(127 - k) << 23);
    float f = __fmaf_rn(x, scale, __fsub_rn(scale, 1.0f));
    // From 2²⁵ on 1 + x = x, and 2⁻ᵏ would soon leave the range.
    f = k > 25 ? __fsub_rn(without_exponent(u, k), 1.0f) : f;
    const float r = ln_reduced(static_cast<float>(k), f);
    return x < infinity() ? r : x;
}

/// n / (1 + e), rounded once, for 0 ≤ e ≤ 1: the bits of `__fdiv_rn`, without its branch, so that neighbouring elements overlap.
///
/// The five operations are those of the compiler's own fast path: reciprocal, one Newton step, quotient, exact remainder, correction. That path
/// leaves out quotients so small that the remainder underflows (|n| < 2⁻¹⁰⁰ or so). Here n is 1, e, 2e, x or x·e with e = exp(−|z|) and z = x or
/// about 1.6·x: such an n means that e is below 2⁻²⁵ or above 1 − 2⁻²⁵, 1 + e is then exactly 1 or 2, and so is every step.
MOE_DEVICE float over_one_plus(float n, float e) {
    const float d = __fadd_rn(1.0f, e);
    float r = ptx::reciprocal(d);
    r = __fmaf_rn(r, __fmaf_rn(neg(d), r, 1.0f), r);
    const float q = __fmul_rn(n, r);
    const float rounded = __fmaf_rn(r, __fmaf_rn(neg(d), q, n), q);
    return n != 0.0f && abs(n) < infinity() ? rounded : q;  // the correction would lose −0, and make ∞ a NaN
}

/// 1 / (1 + e⁻ˣ) as `(x < 0 ? e : 1) / (1 + e)` with e = exp(−|x|); error ≤ 2.5 ulp.
MOE_DEVICE float sigmoid(float x) {
    const float e = exp(neg(abs(x)));
    return over_one_plus(x < 0.0f ? e : 1.0f, e);
}

/// x·sigmoid(z). −∞ gives −0.
MOE_DEVICE float times_sigmoid(float x, float z) {
    const float e = exp(neg(abs(z)));
    x = max(-MAX_F32, x);
    const float numerator = z < 0.0f ? __fmul_rn(x, e) : x;
    return over_one_plus(numerator, e);
}

/// x / (1 + e⁻ˣ); error ≤ 3 ulp for x ≥ −87. −0 at −∞.
MOE_DEVICE float silu(float x) { return times_sigmoid(x, x); }

/// ln(1 + eˣ) as `max(x, 0) + log1p(exp(−|x|))`; error ≤ 2 ulp.
MOE_DEVICE float softplus(float x) {
    const float e = exp(neg(abs(x)));
    return __fadd_rn(max(x, 0.0f), log1p(e));
}

/// √(ln(1 + eˣ)): DeepSeek-V4's score.
MOE_DEVICE float sqrt_softplus(float x) { return __fsqrt_rn(softplus(x)); }

/// tanh x; error ≤ 1.5 ulp. −0 stays −0.
MOE_DEVICE float tanh(float x) {
    const float a = abs(x), xx = __fmul_rn(x, x);
    const float c[5] = {-0.3333328f, 0.13331406f, -0.053736515f, 0.020628167f, -0.005692296f};
    const float small = __fmaf_rn(__fmul_rn(a, xx), polynomial(xx, c), a);
    const float e = exp(__fmul_rn(a, -2.0f));
    const float big = __fsub_rn(1.0f, over_one_plus(__fadd_rn(e, e), e));
    return copysign(a < 0.625f ? small : big, x);
}

/// erf x; error ≤ 1.5 ulp. −0 stays −0.
MOE_DEVICE float erf(float x) {
    const float a = abs(x);
    const float near[7] = {0.12837917f,  -0.3761263f,  0.11283626f, -0.02685574f,
                         0.0051924605f, -0.0008050804f, 8.002775e-5f};
    const float small = __fmaf_rn(a, polynomial(__fmul_rn(x, x), near), a);
    const float far[7] = {-0.0001956753f, -1.1276757f,    -0.6371822f,   -0.10393167f,
                        0.02222696f,    -0.0030432234f, 0.00019593607f};
    const float big = __fsub_rn(1.0f, exp(polynomial(min(4.0f, a), far)));
    return copysign(a < 0.92f ? small : big, x);
}

/// x·(1 + erf(x/√2))/2. 0 at −∞.
MOE_DEVICE float gelu_erf(float x) {
    const float phi = erf(__fmul_rn(x, 0.707106781186547524401f));
    const float half = __fmul_rn(max(-MAX_F32, x), 0.5f);
    return __fmaf_rn(half, phi, half);
}

/// x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))/2 as x·sigmoid(2·√(2/π)·(x + 0.044715·x³)). −0 at −∞.
MOE_DEVICE float gelu_tanh(float x) {
    const float z = __fmul_rn(x, __fmaf_rn(__fmul_rn(x, x), 0.071354814f, 1.595769f));
    return times_sigmoid(x, z);
}

/// max(x, 0). −0 stays −0; NaN stays.
MOE_DEVICE float relu(float x) { return max(0.0f, x); }

/// max(x, 0)².
MOE_DEVICE float relu2(float x) {
    const float r = relu(x);
    return __fmul_rn(r, r);
}

/// c·tanh(x/c) for c > 0.
MOE_DEVICE float softcap(float x, float c) { return __fmul_rn(c, tanh(__fdiv_rn(x, c))); }

/// The standard normal quantile for 0 < u < 1 (Giles 2010).
MOE_DEVICE float normal_quantile(float u) {
    const float x = __fmaf_rn(u, 2.0f, -1.0f);
    const float product = __fmul_rn(__fmul_rn(u, 4.0f), __fsub_rn(1.0f, u));
    const float w = neg(ln(product));
    const float near[9] = {1.5014094f,      0.24664073f,    -0.0041776816f, -0.001253725f, 0.00021858087f,
                         -4.3915065e-6f, -3.5233877e-6f, 3.4327394e-7f,  2.8102264e-8f};
    const float central = polynomial(__fsub_rn(w, 2.5f), near);
    const float far[9] = {2.8329768f,     1.001674f,      0.00943887f,     -0.0076224613f, 0.0057395077f,
                        -0.0036734284f, 0.0013493432f, 0.00010095056f, -0.00020021426f};
    const float tail = polynomial(__fsub_rn(__fsqrt_rn(w), 3.0f), far);
    const float p = w < 5.0f ? central : tail;
    return __fmul_rn(__fmul_rn(p, x), 1.41421356237309504880f);
}

// ---- random numbers by counter: src/cpu/simd/random.rs -----------------------------------------------------------------------------------

/// One of the four words of Philox4x32-10 for a counter under a key.
MOE_DEVICE uint32_t philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1, uint32_t word) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint32_t a_high = __umulhi(c0, 0xd2511f53u), a_low = c0 * 0xd2511f53u;
        const uint32_t b_high = __umulhi(c2, 0xcd9e8d57u), b_low = c2 * 0xcd9e8d57u;
        c0 = b_high ^ c1 ^ k0;
        c1 = b_low;
        c2 = a_high ^ c3 ^ k1;
        c3 = a_low;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    const uint32_t low = word & 1u ? c1 : c0, high = word & 1u ? c3 : c2;
    return word & 2u ? high : low;
}

/// (2·⌊word / 2⁹⌋ + 1) / 2²⁴.
MOE_DEVICE float uniform(uint32_t word) {
    return __fmul_rn(static_cast<float>((word >> 9) * 2u + 1u), 1.0f / 16777216.0f);
}

/// The standard normal number of (seed, token, expert): word expert mod 4 of counter (⌊expert / 4⌋, 0, token low, token high).
MOE_DEVICE float normal_at(uint64_t seed, uint64_t token, uint32_t expert) {
    const uint32_t word = philox4x32(expert >> 2, 0, static_cast<uint32_t>(token), static_cast<uint32_t>(token >> 32),
                                   static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), expert & 3u);
    return normal_quantile(uniform(word));
}

// ---- reductions: the 32 lanes of a warp are the 32 lanes of the contract -------------------------------------------------------------------

/// s[l] = s[l] + s[l ^ off] for off = 16, 8, 4, 2, 1. Every lane gets s[0]: both partners add the same two numbers.
MOE_DEVICE float warp_sum(float s) {
#pragma unroll
    for (int off = 16; off > 0; off >>= 1) s = __fadd_rn(s, __shfl_xor_sync(FULL_WARP, s, off));
    return s;
}

/// s[l] = s[l] > s[l + off] ? s[l] : s[l + off], NaN apart (lanes start at −∞ and pass over it). Every lane gets s[0], the sign of a zero
/// included, because the lower lane's number is compared first in both partners.
MOE_DEVICE float warp_max(float s) {
    const uint32_t lane = threadIdx.x & 31u;
#pragma unroll
    for (int off = 16; off > 0; off >>= 1) {
        const float other = __shfl_xor_sync(FULL_WARP, s, off);
        const bool upper = (lane & static_cast<uint32_t>(off)) != 0;
        const float a = upper ? other : s, b = upper ? s : other;
        s = a > b ? a : b;
    }
    return s;
}

}  // namespace numerics

using numerics::bf16_to_f32;
using numerics::f16_to_f32;
using numerics::f32_to_bf16;
using numerics::f32_to_f16;
