// The rules that look across tokens: limited capacity, and experts that choose their tokens. src/cpu/routing/across.rs.
//
// Nothing here depends on which block or warp comes first: who gets a place is a count of those before it in the serving order, not the outcome
// of an atomic. (Atomics add up histograms in shared memory, whose sums do not depend on order.)
#pragma once

#include "weigh.cuh"

namespace routing {

/// order[first + rank] = token, for the tokens of scope: by falling importance, then by position. Thread i ranks one token against all of its scope.
///
/// T·scope comparisons in all, 128 at a time from shared memory: 16384 tokens in one scope are 2.7·10⁸, some 30 µs of an H200's integer lanes.
MOE_DEVICE void order_tokens(const RoutingParams& p, int32_t (&tile)[128]) {
    const uint64_t first = static_cast<uint64_t>(blockIdx.x) * p.scope;
    const uint32_t count = p.tokens - first < p.scope ? static_cast<uint32_t>(p.tokens - first) : p.scope;
    for (uint32_t start = blockIdx.y * 128; start < count; start += gridDim.y * 128) {
        const uint32_t i = start + threadIdx.x;
        const int32_t mine = i < count ? p.importance[first + i] : 0;
        uint32_t rank = 0;
        for (uint32_t from = 0; from < count; from += 128) {
            __syncthreads();
            if (from + threadIdx.x < count) tile[threadIdx.x] = p.importance[first + from + threadIdx.x];
            __syncthreads();
            const uint32_t n = count - from < 128 ? count - from : 128;
            for (uint32_t l = 0; l < n; ++l) {
                const int32_t other = tile[l];
                rank += other > mine || (other == mine && from + l < i) ? 1 : 0;
            }
        }
        if (i < count) p.order[first + rank] = static_cast<uint32_t>(first) + i;
    }
}

/// One warp for one expert and scope: walks over the scope's pairs in serving order, slot by slot, and drops the expert's pairs beyond its room.
///
/// A pair belongs to one expert, so one warp alone may drop it. Another warp that reads the id meanwhile sees −1 or this expert, neither of which is
/// its own, and goes on alike. Each warp reads all ids of its scope, from L2: E·T·K/32 words, 4 µs for E = 64, T·K = 32768.
MOE_DEVICE void serve_expert(const RoutingParams& p, uint32_t expert, uint32_t lane) {
    const uint64_t first = static_cast<uint64_t>(blockIdx.x) * p.scope;
    const uint32_t count = p.tokens - first < p.scope ? static_cast<uint32_t>(p.tokens - first) : p.scope;
    uint32_t accepted = 0;
    for (uint32_t slot = 0; slot < p.slots; ++slot) {
#pragma unroll 4
        for (uint32_t from = 0; from < count; from += 32) {
            const uint32_t i = from + lane;
            const bool there = i < count;
            const uint64_t token = there && p.order != nullptr ? p.order[first + i] : first + i;
            const uint64_t pair = token * p.slots + slot;
            const bool mine = there && p.ids[pair] == static_cast<int32_t>(expert);
            const uint32_t all = __ballot_sync(FULL_WARP, mine);
            const uint32_t before = __popc(all & ((1u << lane) - 1u));
            if (mine && accepted + before >= p.per_expert) {
                p.ids[pair] = -1;
                p.weights[pair] = 0.0f;
            }
            accepted += __popc(all);
        }
    }
}

/// One warp for one token: renormalises and scales raw weights, any number of slots.
MOE_DEVICE void finish_token(const RoutingParams& p, uint64_t t, uint32_t lane) {
    const int32_t* ids = p.ids + t * p.slots;
    float* weights = p.weights + t * p.slots;
    const float d = long_divisor(p, weights, lane);
    for (uint32_t slot = lane; slot < p.slots; slot += 32) weights[slot] = scaled(p, weights[slot], d, ids[slot]);
}

/// The key of pair (score, index) that falls in ranking order.
MOE_DEVICE uint64_t pack(int32_t key, uint32_t index) {
    return static_cast<uint64_t>(static_cast<uint32_t>(key) ^ 0x80000000u) << 32 | static_cast<uint64_t>(~index);
}

/// Shared memory of a block that searches a column.
struct ColumnRoom {
    uint32_t histogram[256];
    uint32_t warp_count[8];
    uint32_t digit, rest;
};

/// The digit in which the rest-th largest key falls, and how many of that digit's keys are still to be taken. One warp: lane l has the eight digits
/// down from 255 − 8·l.
MOE_DEVICE void find_digit(ColumnRoom& room, uint32_t rest, uint32_t lane) {
    uint32_t mine = 0;
    for (uint32_t i = 0; i < 8; ++i) mine += room.histogram[255 - 8 * lane - i];
    uint32_t upto = mine;
    for (uint32_t off = 1; off < 32; off *= 2) {
        const uint32_t other = __shfl_up_sync(FULL_WARP, upto, off);
        upto += lane >= off ? other : 0;
    }
    if (upto >= rest && upto - mine < rest) {
        rest -= upto - mine;
        uint32_t digit = 255 - 8 * lane;
        while (room.histogram[digit] < rest) rest -= room.histogram[digit--];
        room.digit = digit;
        room.rest = rest;
    }
}

/// One block for one expert: the `per_expert`-th best (score, token) of its column, by radix search: eight bits of the key at a time from the top,
/// then the token among those with the same key.
///
/// Five passes over the column; its words are E apart, so each costs a sector of L2.
MOE_DEVICE void choose_tokens(const RoutingParams& p, uint32_t expert, ColumnRoom& room) {
    const uint32_t tid = threadIdx.x;  // of 256
    const float* column = p.weights + expert;
    uint32_t prefix = 0, rest = p.per_expert < p.tokens ? p.per_expert : p.tokens;
    for (int shift = 24; shift >= 0; shift -= 8) {
        room.histogram[tid] = 0;
        __syncthreads();
        for (uint32_t t = tid; t < p.tokens; t += 256) {
            const uint32_t key = static_cast<uint32_t>(key_of(column[static_cast<uint64_t>(t) * p.slots])) ^ 0x80000000u;
            // Digits above this one agree with the search so far.
            if ((static_cast<uint64_t>(key ^ prefix) >> (shift + 8)) == 0) atomicAdd(&room.histogram[key >> shift & 255u], 1u);
        }
        __syncthreads();
        if (tid < 32) find_digit(room, rest, tid);
        __syncthreads();
        prefix |= room.digit << shift;
        rest = room.rest;
        __syncthreads();
    }
    // The rest-th token, by position, with exactly this key.
    uint32_t before = 0;
    for (uint32_t from = 0; from < p.tokens; from += 256) {
        const uint32_t t = from + tid;
        const bool mine = t < p.tokens && (static_cast<uint32_t>(key_of(column[static_cast<uint64_t>(t) * p.slots])) ^ 0x80000000u) == prefix;
        const uint32_t all = __ballot_sync(FULL_WARP, mine);
        if (tid % 32 == 0) room.warp_count[tid / 32] = __popc(all);
        __syncthreads();
        uint32_t rank = before + __popc(all & ((1u << tid % 32) - 1u));
        for (uint32_t w = 0; w < 8; ++w) {
            rank += w < tid / 32 ? room.warp_count[w] : 0;
            before += room.warp_count[w];
        }
        if (mine && rank + 1 == rest) p.last_taken[expert] = pack(static_cast<int32_t>(prefix ^ 0x80000000u), t);
        __syncthreads();
        if (before >= rest) break;
    }
}

/// One team for one token: lists the experts that took it, the best score first, and their scores as raw weights.
template <int J, int WARPS>
MOE_DEVICE void serve_token(const RoutingParams& p, uint64_t t, uint32_t tid, Room<J, WARPS>& room) {
    constexpr uint32_t SIZE = Team<WARPS>::SIZE;
    Team<WARPS> team{tid, 0};
    int32_t keys[J];
    float* weights = p.weights + t * p.slots;
    int32_t* ids = p.ids + t * p.slots;
#pragma unroll
    for (int j = 0; j < J; ++j) {
        const uint32_t e = j * SIZE + tid;
        keys[j] = EXCLUDED;
        if (e < p.slots) {
            const float score = weights[e];
            room.row[e] = numerics::bits_of(score);
            const int32_t key = key_of(score);
            if (pack(key, static_cast<uint32_t>(t)) >= p.last_taken[e]) keys[j] = key;
        }
    }
    team.sync();  // all scores are in the room before the first is overwritten
    Queue<J, SIZE> queue;
    queue.fill(keys, tid);
    uint32_t count = 0;
    for (; count < p.slots; ++count) {
        int32_t best = queue.key;
        uint32_t id = queue.index;
        team.arg_max(room, best, id);
        if (best == EXCLUDED) break;
        if (queue.index == id) {
            ids[count] = static_cast<int32_t>(id);
            weights[count] = numerics::from_bits(room.row[id]);
        }
        queue.pop(keys, tid, best, id);
    }
    for (uint32_t slot = count + tid; slot < p.slots; slot += SIZE) {
        ids[slot] = -1;
        weights[slot] = 0.0f;
    }
}

}  // namespace routing
