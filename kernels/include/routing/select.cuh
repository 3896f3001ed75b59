// Who is chosen: ranking keys, group limits, the K best. src/cpu/routing/select.rs.
//
// Equal keys go to the lower index, so the order is total and every way to find the K best finds the same.
#pragma once

#include "logits.cuh"

namespace routing {

/// Logits of a general row, by way of shared memory: a rolled loop, since tanh, Philox and the normal quantile J times over would not fit the
/// instruction cache.
template <int J, int WARPS, class R>
MOE_DEVICE void load_transformed(const RoutingParams& p, uint64_t t, const Team<WARPS>& team, R& room, float (&z)[J]) {
    constexpr uint32_t SIZE = Team<WARPS>::SIZE;
#pragma unroll 1
    for (uint32_t e = team.tid; e < J * SIZE; e += SIZE) {
        room.row[e] = numerics::bits_of(e < p.columns ? effective(p, t, e) : numerics::negative_infinity());
    }
    // Each thread reads what it has written.
#pragma unroll
    for (int j = 0; j < J; ++j) z[j] = numerics::from_bits(room.row[j * SIZE + team.tid]);
}

/// The logit of expert i·n + j is first[i] + second[j].
template <class R>
MOE_DEVICE float product_logit(const RoutingParams& p, const R& room, uint32_t e) {
    return __fadd_rn(room.halves[0][e / p.keys], room.halves[1][e % p.keys]);
}

/// Product keys: halves of a token's own row; or, if stacked, rows t and T + t of the logits read as [2T, n].
template <int J, int WARPS, class R>
MOE_DEVICE void load_product(const RoutingParams& p, uint64_t t, const Team<WARPS>& team, R& room, float (&z)[J]) {
    constexpr uint32_t SIZE = Team<WARPS>::SIZE;
    const uint32_t n = p.keys;
    team.sync();  // the token before may still be read
    for (uint32_t i = team.tid; i < 2 * n; i += SIZE) {
        const uint32_t half = i >= n ? 1 : 0, column = i - half * n;
        const uint64_t virtual_row = has(p, StackedKeys) ? half * static_cast<uint64_t>(p.tokens) + t : 2 * t + half;
        room.halves[half][column] = effective(p, virtual_row / 2, static_cast<uint32_t>(virtual_row % 2) * n + column);
    }
    team.sync();
#pragma unroll
    for (int j = 0; j < J; ++j) {
        const uint32_t e = j * SIZE + team.tid;
        z[j] = e < p.width ? product_logit(p, room, e) : numerics::negative_infinity();
    }
}

/// Keys of the first `n` values plus bias; the rest is excluded.
template <int J, int WARPS>
MOE_DEVICE void rank(const RoutingParams& p, const Team<WARPS>& team, const float (&values)[J], const float* bias, int32_t (&keys)[J]) {
    constexpr uint32_t SIZE = Team<WARPS>::SIZE;
    float x[J];
#pragma unroll
    for (int j = 0; j < J; ++j) x[j] = values[j];
    if (bias != nullptr) {
        // All loads first. What is beyond the row is excluded below.
        float b[J];
#pragma unroll
        for (int j = 0; j < J; ++j) b[j] = j * SIZE + team.tid < p.selectable ? __ldg(bias + (j * SIZE + team.tid)) : 0.0f;
#pragma unroll
        for (int j = 0; j < J; ++j) x[j] = __fadd_rn(x[j], b[j]);
    }
#pragma unroll
    for (int j = 0; j < J; ++j) {
        const int32_t key = key_of(x[j]);
        keys[j] = j * SIZE + team.tid < p.selectable ? key : EXCLUDED;
    }
}

MOE_DEVICE void best_two(int32_t& best, int32_t& second, int32_t key) {
    const int32_t loser = key > best ? best : key;
    best = key > best ? key : best;
    second = loser > second ? loser : second;
}

MOE_DEVICE int32_t group_key(const RoutingParams& p, int32_t best, int32_t second) {
    if (!has(p, GroupTop2Sum) || p.group_size == 1) return best;
    return key_of(__fadd_rn(value_of(best), value_of(second)));
}

/// The key of each group, group g = j·SIZE + tid in g[j]. `room.row` holds the keys of all experts.
///
/// Up to 32 groups are taken by one warp each: lanes walk over a group side by side, then the warp agrees on its best two. More groups than that
/// are small, and each is a thread's own.
template <int J, int WARPS, class R>
MOE_DEVICE void score_groups(const RoutingParams& p, const Team<WARPS>& team, R& room, int32_t (&g)[J]) {
    constexpr uint32_t SIZE = Team<WARPS>::SIZE;
    if (p.groups > 32) {
#pragma unroll
        for (int j = 0; j < J; ++j) {
            const uint32_t group = j * SIZE + team.tid;
            int32_t best = EXCLUDED, second = EXCLUDED;
            if (group < p.groups) {
                for (uint32_t i = 0; i < p.group_size; ++i) {
                    best_two(best, second, static_cast<int32_t>(room.row[group * p.group_size + i]));
                }
                best = group_key(p, best, second);
            }
            g[j] = best;
        }
        return;
    }
    for (uint32_t group = team.tid / 32; group < p.groups; group += WARPS) {
        int32_t best = EXCLUDED, second = EXCLUDED;
        for (uint32_t i = team.lane(); i < p.group_size; i += 32) {
            best_two(best, second, static_cast<int32_t>(room.row[group * p.group_size + i]));
        }
        const int32_t top = __reduce_max_sync(FULL_WARP, best);
        // One lane that has it offers its second instead.
        const uint32_t winner = __ffs(__ballot_sync(FULL_WARP, best == top)) - 1;
        const int32_t next = __reduce_max_sync(FULL_WARP, team.lane() == winner ? second : best);
        if (team.lane() == 0) room.group_keys[group] = group_key(p, top, next);
    }
    team.sync();
#pragma unroll
    for (int j = 0; j < J; ++j) g[j] = EXCLUDED;
    if (team.tid < p.groups) g[0] = room.group_keys[team.tid];
}

MOE_DEVICE uint32_t group_of(const RoutingParams& p, uint32_t e) { return p.group_magic == 0 ? e : __umulhi(e, p.group_magic); }

/// Fills the keys of experts outside the best groups.
template <int J, int WARPS, class R>
MOE_DEVICE void limit_groups(const RoutingParams& p, Team<WARPS>& team, R& room, int32_t (&keys)[J]) {
    constexpr uint32_t SIZE = Team<WARPS>::SIZE;
#pragma unroll
    for (int j = 0; j < J; ++j) room.row[j * SIZE + team.tid] = static_cast<uint32_t>(keys[j]);
    team.sync();
    int32_t g[J];
    score_groups(p, team, room, g);
    team.sync();  // the keys have been read: the row now holds one flag for each group
#pragma unroll
    for (int j = 0; j < J; ++j) room.row[j * SIZE + team.tid] = 0;
    Queue<J, SIZE> queue;
    queue.fill(g, team.tid);
    for (uint32_t i = 0; i < p.kept_groups; ++i) {
        int32_t best = queue.key;
        uint32_t group = queue.index;
        team.arg_max(room, best, group);
        if (queue.index == group) room.row[group] = 1;  // this thread's own element
        queue.pop(g, team.tid, best, group);
    }
    team.sync();
#pragma unroll
    for (int j = 0; j < J; ++j) {
        const uint32_t e = j * SIZE + team.tid;
        if (e < p.selectable && room.row[group_of(p, e)] == 0) {
            keys[j] = has(p, GroupFillZero) ? (keys[j] == NAN_KEY ? NAN_KEY : 0) : EXCLUDED;
        }
    }
    team.sync();
}

/// Choices of a token: slot i in lane i mod 32, element i / 32. All warps of a team have the same.
template <int CHUNKS>
struct Chosen {
    int32_t id[CHUNKS];   // −1: dropped, or beyond the slots
    int32_t key[CHUNKS];
};

/// The K best, the best first; at least so many are not excluded.
///
/// K rounds of two redux each (two cycles an SM for each), 18 instructions a round in all.
template <int J, int WARPS, int CHUNKS, class R>
MOE_DEVICE void top_k(uint32_t k, Team<WARPS>& team, R& room, const int32_t (&keys)[J], Chosen<CHUNKS>& chosen) {
    Queue<J, Team<WARPS>::SIZE> queue;
    queue.fill(keys, team.tid);
    for (uint32_t slot = 0; slot < k; ++slot) {
        int32_t best = queue.key;
        uint32_t id = queue.index;
        team.arg_max(room, best, id);
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            if (slot == team.lane() + 32u * c) {
                chosen.id[c] = static_cast<int32_t>(id);
                chosen.key[c] = best;
            }
        }
        queue.pop(keys, team.tid, best, id);
    }
}

}  // namespace routing
