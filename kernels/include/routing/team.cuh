// The threads that route one token: a warp, or eight. Thread `tid` of a team holds elements e = j·SIZE + tid, j = 0 … J − 1, in registers.
//
// With one warp that is element e in lane e mod 32, as the contract's reductions have it. With eight, sums go through shared memory, where every
// warp adds up the same 32 lanes in the same order.
#pragma once

#include "params.cuh"

namespace routing {

using numerics::FULL_WARP;

/// Ranks below everything: outside the chosen groups, or beyond the end of the row.
constexpr int32_t EXCLUDED = INT32_MIN;
/// The key of every NaN.
constexpr int32_t NAN_KEY = INT32_MIN + 1;
constexpr uint32_t NO_INDEX = 0xffffffffu;

/// A float as an integer of the same order, NaN apart; −0 below +0. Its own inverse.
MOE_DEVICE int32_t ordered(float x) {
    const int32_t bits = static_cast<int32_t>(numerics::bits_of(x));
    return bits ^ static_cast<int32_t>(static_cast<uint32_t>(bits >> 31) >> 1);
}
MOE_DEVICE float value_of(int32_t key) {
    return numerics::from_bits(static_cast<uint32_t>(key) ^ (static_cast<uint32_t>(key >> 31) >> 1));
}

/// The ranking key: NaN < −∞ < … < −0 = +0 < … < +∞.
MOE_DEVICE int32_t key_of(float x) {
    const int32_t key = ordered(__fadd_rn(x, 0.0f));
    return x == x ? key : NAN_KEY;
}

/// Shared memory of a team. Small things are double, so that one barrier a round is enough.
template <int J, int WARPS>
struct Room {
    uint32_t row[J * 32 * WARPS];  // numerators, keys or flags
    float halves[2][64];           // product keys: both rows
    int32_t group_keys[32];
    int32_t best[2][WARPS];
    uint32_t best_index[2][WARPS];
};

template <int WARPS>
struct Team {
    static constexpr uint32_t SIZE = 32 * WARPS;
    uint32_t tid;  // in the team
    uint32_t parity;

    MOE_DEVICE uint32_t lane() const { return tid & 31u; }

    MOE_DEVICE void sync() const {
        if constexpr (WARPS == 1) {
            __syncwarp();
        } else {
            __syncthreads();
        }
    }

    /// The largest key of all threads, and the least index among those that have it.
    template <class R>
    MOE_DEVICE void arg_max(R& room, int32_t& best, uint32_t& index) {
        int32_t warp_best = __reduce_max_sync(FULL_WARP, best);
        uint32_t warp_index = __reduce_min_sync(FULL_WARP, best == warp_best ? index : NO_INDEX);
        if constexpr (WARPS > 1) {
            if (lane() == 0) {
                room.best[parity][tid / 32] = warp_best;
                room.best_index[parity][tid / 32] = warp_index;
            }
            __syncthreads();
            const int32_t other = room.best[parity][lane() % WARPS];
            const uint32_t other_index = room.best_index[parity][lane() % WARPS];
            parity ^= 1u;  // the other half is free: everyone has read it before this barrier
            warp_best = __reduce_max_sync(FULL_WARP, other);
            warp_index = __reduce_min_sync(FULL_WARP, other == warp_best ? other_index : NO_INDEX);
        }
        best = warp_best;
        index = warp_index;
    }

    template <class R>
    MOE_DEVICE int32_t max(R& room, int32_t key) {
        uint32_t index = 0;
        arg_max(room, key, index);
        return key;
    }

    template <class R>
    MOE_DEVICE bool any(R& room, bool condition) {
        if constexpr (WARPS == 1) {
            return __any_sync(FULL_WARP, condition) != 0;
        } else {
            return max(room, condition ? 1 : 0) != 0;
        }
    }
};

/// A thread's part of a search for the best: its two best elements that are left, refilled from its J keys when both are gone.
///
/// A full sort of J keys costs more than a search ever uses: of 8 winners among 32 lanes, three in one lane are seen for one token in twenty.
template <int J, uint32_t STRIDE>
struct Queue {
    int32_t key, next_key;
    uint32_t index, next_index;
    uint32_t left;  // elements at hand

    /// Finds the two best of all, or of those after (last_key, last_index) in ranking order.
    MOE_DEVICE void fill(const int32_t (&keys)[J], uint32_t tid, bool all, int32_t last_key, uint32_t last_index) {
        key = next_key = EXCLUDED;
        index = next_index = NO_INDEX;
        left = 2;
#pragma unroll
        for (int j = 0; j < J; ++j) {
            const uint32_t e = static_cast<uint32_t>(j) * STRIDE + tid;
            const bool there = all || keys[j] < last_key || (keys[j] == last_key && e > last_index);
            const int32_t mine = there ? keys[j] : EXCLUDED;
            // An equal one comes later in index: it is not better.
            const bool best = mine > key, second = mine > next_key;
            next_index = best ? index : (second ? e : next_index);
            next_key = best ? key : (second ? mine : next_key);
            index = best ? e : index;
            key = best ? mine : key;
        }
    }

    MOE_DEVICE void fill(const int32_t (&keys)[J], uint32_t tid) { fill(keys, tid, true, 0, 0); }

    /// Drops the winner of a round, if it was this thread's.
    MOE_DEVICE void pop(const int32_t (&keys)[J], uint32_t tid, int32_t best, uint32_t winner) {
        const bool mine = index == winner;
        key = mine ? next_key : key;
        index = mine ? next_index : index;
        if constexpr (J <= 2) {
            next_key = mine ? EXCLUDED : next_key;
            next_index = mine ? NO_INDEX : next_index;
        } else {
            // What was second is given once: after that the queue is filled again, and after no earlier element than the winner.
            left -= mine ? 1 : 0;
            if (left == 0) fill(keys, tid, false, best, winner);
        }
    }
};

}  // namespace routing
