// One token from logits to ids and weights: the way of nearly every router (`route_plain`), and every other one (`route_general`).
#pragma once

#include "weigh.cuh"

namespace routing {

/// The K ≤ 32 best of a row in one warp's registers: any score, by score or logit plus bias, weights from scores or softmax over the chosen, any
/// renormalisation. No groups, no softcap, no noise, no joint shared experts: the host decides.
template <int J>
MOE_DEVICE void route_plain(const RoutingParams& p, uint64_t t, uint32_t lane) {
    Team<1> team{lane, 0};
    int no_room;
    float z[J], s[J];
    load_row(p, t, team, z);
    const bool by_logit = has(p, RankByLogit) || p.score == Identity;
    const bool softmax_weight = p.score == Softmax && p.weight_source == OfScore;
    Soft soft{0.0f, 1.0f};
    if (softmax_weight || !by_logit) {
        soft = scores(p, team, no_room, z, s);
    }
    if (by_logit) {
#pragma unroll
        for (int j = 0; j < J; ++j) s[j] = z[j];
    }
    int32_t keys[J];
    if (p.score == Softmax && !by_logit && p.bias == nullptr && soft.sum == soft.sum) {
        // Softmax without NaN: not negative, no −0. Its bits are its key.
#pragma unroll
        for (int j = 0; j < J; ++j) {
            keys[j] = j * 32 + lane < p.selectable ? static_cast<int32_t>(numerics::bits_of(s[j])) : EXCLUDED;
        }
    } else {
        rank(p, team, s, p.bias, keys);
    }
    Chosen<1> chosen{{-1}, {0}};
    top_k(p.slots, team, no_room, keys, chosen);
    float w[1] = {0.0f};
    if (!by_logit && p.bias == nullptr && p.weight_source == OfScore) {
        // The score itself was ranked. Scores other than Identity are never −0.
        w[0] = chosen.key[0] == NAN_KEY ? numerics::quiet_nan() : value_of(chosen.key[0]);
    } else {
        // K logits are fetched again, from the cache, rather than carried through the search.
        const bool mine = lane < p.slots;
        float x = mine ? load(p.logits, t * p.logits_stride + static_cast<uint32_t>(chosen.id[0]), p.dtype) : numerics::negative_infinity();
        if (p.multiplier != 1.0f && mine) x = __fmul_rn(x, p.multiplier);
        w[0] = x;
        if (p.weight_source == SoftmaxSelected) {
            softmax_selected(w);
        } else {
            w[0] = p.score == Softmax ? soft.score(x) : elementwise(p.score, x);
        }
        w[0] = mine ? w[0] : 0.0f;
    }
    store(p, t, lane, chosen, w);
}

/// Logits of single experts, after the row is gone from registers.
template <class R>
struct Logits {
    const RoutingParams& p;
    const R& room;
    uint64_t t;
    MOE_DEVICE float operator()(uint32_t e) const {
        return p.selection == ProductKeys ? product_logit(p, room, e) : effective(p, t, e);
    }
};

/// PhiMoE's sparsemixer: with m the logit of a choice, its softmax over the logits that are left, that is not chosen before, and near, that is not
/// (m − z) / max(|z|, m) > reach.
template <int J, int WARPS, class R>
MOE_DEVICE void mixer_weights(const RoutingParams& p, Team<WARPS>& team, R& room, const Logits<R>& logit, const float (&z)[J],
                              const Chosen<2>& chosen, float (&w)[2]) {
    constexpr uint32_t SIZE = Team<WARPS>::SIZE;
    uint32_t before = NO_INDEX;
    for (uint32_t slot = 0; slot < p.slots; ++slot) {  // two
        const uint32_t id = static_cast<uint32_t>(__shfl_sync(FULL_WARP, chosen.id[0], static_cast<int>(slot)));
        const float m = logit(id);
        float left[J], s[J];
#pragma unroll
        for (int j = 0; j < J; ++j) {
            const uint32_t e = j * SIZE + team.tid;
            const float distance = __fdiv_rn(__fsub_rn(m, z[j]), numerics::max(numerics::abs(z[j]), m));
            // False for NaN, as 0/0: such a logit stays.
            left[j] = p.reach < distance || e == before ? numerics::negative_infinity() : z[j];
        }
        const Soft soft = softmax(p, team, room, left, s);
        if (team.lane() == slot) w[0] = soft.score(m);
        before = id;
    }
}

/// Weights of the chosen before renormalisation. A dropped choice has weight 0.
template <class R>
MOE_DEVICE void raw_weights(const RoutingParams& p, uint64_t t, uint32_t lane, bool writer, const Logits<R>& logit, const Soft& soft,
                            const Chosen<2>& chosen, float (&w)[2]) {
#pragma unroll
    for (int c = 0; c < 2; ++c) w[c] = chosen.id[c] >= 0 ? logit(static_cast<uint32_t>(chosen.id[c])) : numerics::negative_infinity();
    if (p.weight_source == SoftmaxSelected) {
        softmax_selected(w);
    } else if (p.weight_source == JointWithShared) {
        joint_sigmoid(p, t, lane, writer, logit, w);
    } else {
#pragma unroll
        for (int c = 0; c < 2; ++c) w[c] = p.score == Softmax ? soft.score(w[c]) : elementwise(p.score, w[c]);
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) w[c] = chosen.id[c] >= 0 ? w[c] : 0.0f;
}

/// Dense, and the scores that expert choice starts from: every expert in index order.
template <int J, int WARPS>
MOE_DEVICE void store_all(const RoutingParams& p, uint64_t t, const Team<WARPS>& team, const float (&s)[J]) {
    constexpr uint32_t SIZE = Team<WARPS>::SIZE;
    const bool raw = has(p, LeaveRaw);
#pragma unroll
    for (int j = 0; j < J; ++j) {
        const uint32_t e = j * SIZE + team.tid;
        if (e < p.slots) {
            p.ids[t * p.slots + e] = static_cast<int32_t>(e);
            p.weights[t * p.slots + e] = raw ? s[j] : scaled(p, s[j], 1.0f, static_cast<int32_t>(e));
        }
    }
}

/// Any router, K ≤ 64.
template <int J, int WARPS>
MOE_DEVICE void route_general(const RoutingParams& p, uint64_t t, uint32_t tid, Room<J, WARPS>& room) {
    Team<WARPS> team{tid, 0};
    const Logits<Room<J, WARPS>> logit{p, room, t};
    float z[J], s[J];
    if (p.selection == ProductKeys) {
        load_product(p, t, team, room, z);
    } else if (is_transformed(p)) {
        load_transformed(p, t, team, room, z);
    } else {
        load_row(p, t, team, z);
    }
    const bool by_logit = has(p, RankByLogit) || p.score == Identity || p.selection == ProductKeys || p.selection == SparseMixer;
    const bool all = p.selection == Dense || p.selection == ExpertChoice;
    // Dense with softmax over the chosen is softmax over all.
    const bool softmax_all = all && p.weight_source == SoftmaxSelected;
    const bool softmax_weight = p.score == Softmax && p.weight_source == OfScore && p.selection != SparseMixer;
    Soft soft{0.0f, 1.0f};
    if (softmax_all) {
        soft = softmax(p, team, room, z, s);
    } else if (softmax_weight || all || p.importance != nullptr || (p.selection == TopK && !by_logit)) {
        soft = scores(p, team, room, z, s);
    } else {
#pragma unroll
        for (int j = 0; j < J; ++j) s[j] = z[j];
    }
    if (p.importance != nullptr) {
        int32_t best = EXCLUDED;
#pragma unroll
        for (int j = 0; j < J; ++j) {
            const int32_t key = j * Team<WARPS>::SIZE + tid < p.width ? key_of(s[j]) : EXCLUDED;
            best = key > best ? key : best;
        }
        best = team.max(room, best);
        if (tid == 0) p.importance[t] = best;
    }
    if (all) return store_all(p, t, team, s);
    Chosen<2> chosen{{-1, -1}, {0, 0}};
    if (p.selection == Given) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const uint32_t slot = team.lane() + 32u * c;
            const int32_t id = slot < p.slots ? __ldg(p.given_ids + t * p.slots + slot) : -1;
            // The CPU refuses an id out of range before it starts; here it counts as dropped.
            chosen.id[c] = static_cast<uint32_t>(id) < p.selectable ? id : -1;
        }
    } else {
        int32_t keys[J];
        if (by_logit) {
            rank(p, team, z, p.bias, keys);
        } else {
            rank(p, team, s, p.bias, keys);
        }
        if (p.groups > 0) limit_groups(p, team, room, keys);
        top_k(p.slots, team, room, keys, chosen);
    }
    float w[2] = {0.0f, 0.0f};
    if (p.selection == SparseMixer) {
        mixer_weights(p, team, room, logit, z, chosen, w);
    } else {
        raw_weights(p, t, team.lane(), tid < 32, logit, soft, chosen, w);
    }
    if (tid < 32) store(p, t, tid, chosen, w);
}

}  // namespace routing
