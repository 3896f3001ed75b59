// What multiplies an expert: raw weights of the chosen, their renormalisation, and the scales. src/cpu/routing/weigh.rs, mixer.rs.
//
// Slot i is in lane i mod 32, which is also its lane in the contract's softmax over the chosen. Sums over slots run in slot order from +0.
#pragma once

#include "select.cuh"

namespace routing {

/// sum + Σ x over slots 0 … k − 1, in this order.
template <int CHUNKS>
MOE_DEVICE float slot_sum(float sum, const float (&x)[CHUNKS], uint32_t k) {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        const uint32_t end = k > 32u * c ? (k - 32u * c < 32 ? k - 32u * c : 32) : 0;
        for (uint32_t i = 0; i < end; ++i) sum = __fadd_rn(sum, __shfl_sync(FULL_WARP, x[c], static_cast<int>(i)));
    }
    return sum;
}

/// The largest number of all lanes, NaN passed over, the sign of zero left open.
MOE_DEVICE float lane_max(float x) { return value_of(__reduce_max_sync(FULL_WARP, ordered(x == x ? x : numerics::negative_infinity()))); }

/// What a weight adds to the sum that weights are divided by; `max` is the largest |w| for p-norms other than 1.
MOE_DEVICE float renorm_term(const RoutingParams& p, float w, float max) {
    if (p.renorm != PNorm) return w;
    w = numerics::abs(w);
    if (p.renorm_value == 1.0f) return w;
    const float ratio = __fdiv_rn(w, max);
    if (p.renorm_value == 2.0f) return __fmul_rn(ratio, ratio);
    return numerics::exp(__fmul_rn(p.renorm_value, numerics::ln(ratio)));
}

/// From the sum of terms to the divisor. p-norm: m·(Σ (|w|/m)^p)^(1/p), m = max |w|.
MOE_DEVICE float renorm_divisor(const RoutingParams& p, float sum, float max) {
    if (p.renorm == SumPlusEps) return __fadd_rn(sum, p.renorm_value);
    if (p.renorm == SumClampMin) return sum < p.renorm_value ? p.renorm_value : sum;
    if (p.renorm != PNorm || p.renorm_value == 1.0f) return sum;
    if (p.renorm_value == 2.0f) return __fmul_rn(max, __fsqrt_rn(sum));
    return __fmul_rn(max, numerics::exp(__fdiv_rn(numerics::ln(sum), p.renorm_value)));
}

/// What the weights of one token are divided by; w = 0 beyond the k slots.
template <int CHUNKS>
MOE_DEVICE float divisor(const RoutingParams& p, const float (&w)[CHUNKS], uint32_t k) {
    if (p.renorm == NoRenorm) return 1.0f;
    float term[CHUNKS], max = 0.0f;
    if (p.renorm == PNorm) {
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) max = numerics::max(numerics::abs(w[c]), max);
        max = lane_max(max);
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) term[c] = renorm_term(p, w[c], max);
    return renorm_divisor(p, slot_sum(0.0f, term, k), max);
}

/// The same for any number of slots in memory.
MOE_DEVICE float long_divisor(const RoutingParams& p, const float* weights, uint32_t lane) {
    float sum = 0.0f, max = 0.0f;
    if (p.renorm == NoRenorm) return 1.0f;
    if (p.renorm == PNorm) {
        for (uint32_t slot = lane; slot < p.slots; slot += 32) max = numerics::max(numerics::abs(weights[slot]), max);
        max = lane_max(max);
    }
    for (uint32_t first = 0; first < p.slots; first += 32) {
        const uint32_t slot = first + lane;
        const float term[1] = {slot < p.slots ? renorm_term(p, weights[slot], max) : 0.0f};
        sum = slot_sum(sum, term, p.slots - first);
    }
    return renorm_divisor(p, sum, max);
}

/// A weight as it is written: `w / divisor · scale · own scale`, in this order; 0 for a dropped choice and a null expert that returns nothing.
MOE_DEVICE float scaled(const RoutingParams& p, float w, float divisor, int32_t id) {
    if (p.renorm != NoRenorm) w = __fdiv_rn(w, divisor);
    w = __fmul_rn(w, p.scale);
    const bool is_expert = id >= 0 && id < static_cast<int32_t>(p.experts);
    if (p.per_expert_scale != nullptr && is_expert) w = __fmul_rn(w, __ldg(p.per_expert_scale + id));
    const bool is_nothing = id < 0 || (has(p, ZeroNulls) && !is_expert);
    return is_nothing ? 0.0f : numerics::one_nan(w);
}

/// Writes one token's slots; neighbouring lanes write neighbouring words.
template <int CHUNKS>
MOE_DEVICE void store(const RoutingParams& p, uint64_t t, uint32_t lane, const Chosen<CHUNKS>& chosen, const float (&w)[CHUNKS]) {
    const uint64_t base = t * p.slots;
    const bool raw = has(p, LeaveRaw);
    const float d = raw ? 1.0f : divisor(p, w, p.slots);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        const uint32_t slot = lane + 32u * c;
        if (slot < p.slots) {
            p.ids[base + slot] = chosen.id[c];
            p.weights[base + slot] = raw ? w[c] : scaled(p, w[c], d, chosen.id[c]);
        }
    }
}

/// Softmax over the chosen logits, in place; beyond the slots z is −∞.
template <int CHUNKS>
MOE_DEVICE void softmax_selected(float (&z)[CHUNKS]) {
    float max = numerics::negative_infinity(), sum = 0.0f;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) max = numerics::max(z[c], max);
    max = lane_max(max);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        z[c] = numerics::exp(__fsub_rn(z[c], max));
        sum = __fadd_rn(sum, z[c]);
    }
    sum = numerics::warp_sum(sum);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) z[c] = __fdiv_rn(z[c], sum);
}

/// A factor e⁻ᵐ with m = min(max z, 0) goes into every sigmoid, so that ratios are right also where each would vanish.
MOE_DEVICE float joint_score(float z, float max) {
    if (max < 0.0f) return __fdiv_rn(numerics::exp(__fsub_rn(z, max)), __fadd_rn(1.0f, numerics::exp(z)));
    return numerics::sigmoid(z);
}

/// `σ(z) / Σ σ(z)` over the slots and the shared experts behind the selectable ones; the sum in this order. z becomes the weights, and those of
/// the shared experts are written.
template <int CHUNKS, class Logit>
MOE_DEVICE void joint_sigmoid(const RoutingParams& p, uint64_t t, uint32_t lane, bool writer, const Logit& logit, float (&z)[CHUNKS]) {
    float max = numerics::negative_infinity();
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) max = numerics::max(z[c], max);
    for (uint32_t i = lane; i < p.shared; i += 32) max = numerics::max(logit(p.selectable + i), max);
    max = lane_max(max);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) z[c] = joint_score(z[c], max);
    float sum = slot_sum(0.0f, z, p.slots);
    for (uint32_t first = 0; first < p.shared; first += 32) {
        const uint32_t i = first + lane;
        const float score[1] = {i < p.shared ? joint_score(logit(p.selectable + i), max) : 0.0f};
        sum = slot_sum(sum, score, p.shared - first);
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) z[c] = __fdiv_rn(z[c], sum);
    for (uint32_t i = lane; i < p.shared && writer; i += 32) {
        const float w = __fdiv_rn(joint_score(logit(p.selectable + i), max), sum);
        p.shared_weights[t * p.shared + i] = numerics::one_nan(__fmul_rn(w, p.scale));
    }
}

}  // namespace routing
