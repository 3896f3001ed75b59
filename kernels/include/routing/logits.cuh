// From a row of logits to scores: multiplier, softcap, noise; softmax or an element-wise score. src/cpu/routing/logits.rs.
#pragma once

#include "team.cuh"

namespace routing {

MOE_DEVICE float load(const void* base, uint64_t i, uint32_t dtype) {
    if (dtype == F32) return __ldg(static_cast<const float*>(base) + i);
    const uint16_t bits = __ldg(static_cast<const uint16_t*>(base) + i);
    return dtype == BF16 ? bf16_to_f32(bits) : f16_to_f32(bits);
}

/// Whether logits enter the score function otherwise than as they come, the multiplier aside.
MOE_DEVICE bool is_transformed(const RoutingParams& p) { return p.softcap > 0.0f || has(p, Noisy); }

/// The logit of a row and column as it enters the score function.
MOE_DEVICE float effective(const RoutingParams& p, uint64_t row, uint32_t column) {
    float z = load(p.logits, row * p.logits_stride + column, p.dtype);
    if (p.multiplier != 1.0f) z = __fmul_rn(z, p.multiplier);
    if (p.softcap > 0.0f) z = numerics::softcap(z, p.softcap);
    if (has(p, Noisy)) {
        const float spread = numerics::softplus(load(p.noise_logits, row * p.noise_stride + column, p.noise_dtype));
        z = __fmaf_rn(numerics::normal_at(p.seed, p.position + row, column), spread, z);
    }
    return z;
}

/// z[j] = logit of element e, −∞ beyond the row.
template <int J, int WARPS>
MOE_DEVICE void load_row(const RoutingParams& p, uint64_t t, const Team<WARPS>& team, float (&z)[J]) {
    constexpr uint32_t SIZE = Team<WARPS>::SIZE;
    const uint64_t base = t * p.logits_stride + team.tid;
    // One loop for each format, its loads in flight together: 128 or 64 neighbouring bytes an instruction. Lane e mod 32 is what the sums want, and
    // it excludes wider loads, which would need J − 1 shuffles to bring the numbers there; the row's sectors are read once either way.
    if (p.dtype == F32) {
        const float* logits = static_cast<const float*>(p.logits) + base;
#pragma unroll
        for (int j = 0; j < J; ++j) {
            z[j] = j * SIZE + team.tid < p.columns ? __ldg(logits + j * SIZE) : numerics::negative_infinity();
        }
    } else {
        const uint16_t* logits = static_cast<const uint16_t*>(p.logits) + base;
        const bool bf16 = p.dtype == BF16;
        const uint16_t nothing = bf16 ? 0xff80u : 0xfc00u;
        uint16_t bits[J];
#pragma unroll
        for (int j = 0; j < J; ++j) bits[j] = j * SIZE + team.tid < p.columns ? __ldg(logits + j * SIZE) : nothing;
#pragma unroll
        for (int j = 0; j < J; ++j) z[j] = bf16 ? bf16_to_f32(bits[j]) : f16_to_f32(bits[j]);
    }
    if (p.multiplier != 1.0f) {
#pragma unroll
        for (int j = 0; j < J; ++j) {
            z[j] = j * SIZE + team.tid < p.columns ? __fmul_rn(z[j], p.multiplier) : z[j];
        }
    }
}

/// The largest element; the sign of a zero is left open and NaN passed over, neither of which reaches a score: exp(±0 − ±0) = 1 always, and one
/// NaN makes the sum NaN and with it every quotient. So this may be fmaxf, one instruction, as nothing else here may.
template <int J, int WARPS, class R>
MOE_DEVICE float row_max(Team<WARPS>& team, R& room, const float (&z)[J]) {
    float max = numerics::negative_infinity();
#pragma unroll
    for (int j = 0; j < J; ++j) max = fmaxf(max, z[j]);
    return value_of(team.max(room, ordered(max)));
}

/// Σ e[j] in the order of the contract. No e[j] is −0, so that a sum may begin with the first of them.
template <int J, int WARPS, class R>
MOE_DEVICE float row_sum(const RoutingParams& p, Team<WARPS>& team, R& room, const float (&e)[J]) {
    float sum = e[0];
    if constexpr (WARPS == 1) {
#pragma unroll
        for (int j = 1; j < J; ++j) sum = __fadd_rn(sum, e[j]);
    } else {
#pragma unroll
        for (int j = 0; j < J; ++j) room.row[j * Team<WARPS>::SIZE + team.tid] = numerics::bits_of(e[j]);
        team.sync();
        // Every warp adds up the same lanes: nothing to hand round. What is beyond the row holds +0.
        sum = 0.0f;
#pragma unroll 8
        for (uint32_t i = team.lane(); i < p.width; i += 32) sum = __fadd_rn(sum, numerics::from_bits(room.row[i]));
        team.sync();
    }
    return numerics::warp_sum(sum);
}

/// e / sum, correctly rounded, given r = 1 / sum correctly rounded: five instructions instead of ten and a branch.
///
/// q₁ is within one ulp (r errs by half an ulp, e·r by up to 1.5, and one Newton step leaves half an ulp and 2⁻²²), and from there q₁ + (e − q₁·sum)·r
/// rounds correctly (Markstein 1990), as long as nothing underflows: for 2⁻⁹³ ≤ e ≤ 1 ≤ sum ≤ 2¹² the remainders are multiples of 2⁻¹³⁹, and e = 0 gives 0.
/// (Without the first step no wrong quotient was found among 10⁹, but the theorem does not reach as far.)
MOE_DEVICE float quotient(float e, float sum, float r) {
    const float q0 = __fmul_rn(e, r);
    const float q1 = __fmaf_rn(__fmaf_rn(-q0, sum, e), r, q0);
    return __fmaf_rn(__fmaf_rn(-q1, sum, e), r, q1);
}

/// What softmax needs of a row, to score any logit again.
struct Soft {
    float max, sum;
    MOE_DEVICE float score(float z) const { return __fdiv_rn(numerics::exp(__fsub_rn(z, max)), sum); }
};

/// Softmax over z; scores to s. NaN throughout when z holds a NaN or +∞, or nothing but −∞.
template <int J, int WARPS, class R>
MOE_DEVICE Soft softmax(const RoutingParams& p, Team<WARPS>& team, R& room, const float (&z)[J], float (&s)[J]) {
    constexpr uint32_t SIZE = Team<WARPS>::SIZE;
    Soft soft;
    soft.max = row_max(team, room, z);
    // Ordinary rows reach less than 64 below their maximum: e⁻⁶⁴ = 2⁻⁹². Then neither exp nor the quotient has to look at the ends of the range.
    bool ordinary = true;
#pragma unroll
    for (int j = 0; j < J; ++j) {
        s[j] = __fsub_rn(z[j], soft.max);
        ordinary &= s[j] >= -64.0f || j * SIZE + team.tid >= p.width;
    }
    if (!team.any(room, !ordinary)) {
#pragma unroll
        for (int j = 0; j < J; ++j) {
            const float e = numerics::exp_normal(s[j]);  // of nonsense beyond the row; a branch around it would cost more
            s[j] = j * SIZE + team.tid < p.width ? e : 0.0f;
        }
        soft.sum = row_sum(p, team, room, s);
        const float r = __fdiv_rn(1.0f, soft.sum);
#pragma unroll
        for (int j = 0; j < J; ++j) s[j] = quotient(s[j], soft.sum, r);
    } else {
#pragma unroll
        for (int j = 0; j < J; ++j) {
            const float e = numerics::exp(s[j]);
            s[j] = j * SIZE + team.tid < p.width ? e : 0.0f;
        }
        soft.sum = row_sum(p, team, room, s);
#pragma unroll
        for (int j = 0; j < J; ++j) s[j] = __fdiv_rn(s[j], soft.sum);
    }
    return soft;
}

/// A score that depends on its own logit alone. Softmax does not, and is not asked for here.
MOE_DEVICE float elementwise(uint32_t score, float z) {
    if (score == Sigmoid) return numerics::sigmoid(z);
    if (score == SqrtSoftplus) return numerics::sqrt_softplus(z);
    return z;
}

/// The scores of a row.
template <int J, int WARPS, class R>
MOE_DEVICE Soft scores(const RoutingParams& p, Team<WARPS>& team, R& room, const float (&z)[J], float (&s)[J]) {
    if (p.score == Softmax) return softmax(p, team, room, z, s);
    if (p.score == Sigmoid) {
#pragma unroll
        for (int j = 0; j < J; ++j) s[j] = numerics::sigmoid(z[j]);
    } else if (p.score == SqrtSoftplus) {
#pragma unroll
        for (int j = 0; j < J; ++j) s[j] = numerics::sqrt_softplus(z[j]);
    } else {
#pragma unroll
        for (int j = 0; j < J; ++j) s[j] = z[j];
    }
    return Soft{0.0f, 1.0f};
}

}  // namespace routing
