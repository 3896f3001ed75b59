// Routing: logits [T, R] to ids and weights [T, K], with the bits of the CPU.
//
// The easy version, for each token:
//     z = softcap(logits · multiplier) + noise
//     s = softmax(z)                                   # or sigmoid, …
//     v = s + bias;  v[outside the best groups] = −∞ or 0
//     ids = the K best of v;  w = s[ids];  w = w / Σw · scale
// Then:
//  1. one warp a token, expert e on lane e mod 32: the contract's 32 partial sums are one register a lane, and its butterfly is five shuffles;
//  2. J = ⌈R / 32⌉ numbers a lane in registers, J = 1, 2, 4, 8, 16 by template; no shared memory, no barrier. Rows beyond 512 (256 where the rules
//     are not plain) go to a block of eight warps, whose sums meet in shared memory in the same order;
//  3. floats are ranked as integers, so that a search is `redux.max` for the key and `redux.min` for the least index that has it, K times. A lane
//     keeps its two best at hand (`Queue`), so that a round does not look through all J;
//  4. softmax looks once whether the row reaches more than 64 below its maximum. Ordinary rows do not, and their exp is 12 instructions, their correctly
//     rounded quotient 5; otherwise 21 and 10, with the same bits;
//  5. where the ranked number is the weight, the search has it already; else lane i fetches logit ids[i] again, from L1, and scores it alone;
//  6. the numerical rules sit in `include/routing/`: what is plain (TopK without groups, noise or softcap, K ≤ 32) has kernels of its own, so that the
//     general ones cost it neither registers nor instruction cache.
//
// Floor, H200, E = 128, K = 8, T = 16384, f32: 8.4 MB of logits and 1 MB of results at 4.8 TB/s are 2 µs. Instructions a token, read off the SASS for sm_90:
// about 360 (load 25, maximum 8, range 12, exp 52, sum 13, quotients 30, keys and queue 35, 8 rounds of 18, weights and stores 45); 16384 · 360 over
// 132 SMs of 4 a cycle are 11200 cycles, 6.4 µs at 1.75 GHz if none were lost. redux: 16384 · 17 at two cycles an SM are 4200 cycles beside it. So it is
// bound by instructions, not bytes, and 16-bit logits do not change that. One token is bound by latency: one load (~0.5 µs), exp, the butterfly, 8 rounds
// of two redux: about 1 µs after the launch. None of this has been measured on a GPU.
//
// Not persistent: a token keeps nothing that the next could use, so blocks of four warps let the hardware balance the tail. Pairs per expert are not counted
// here: with atomics on E counters, T·K = 131072 of them would cost more than the whole search, and the permutation counts in shared memory what it
// reads anyway.
//
// Tried and left: wider loads (J contiguous numbers a lane) need J − 1 shuffles to bring element e to lane e mod 32, where the sum wants it.
#include "routing/across.cuh"
#include "routing/token.cuh"

using namespace routing;

// Tokens of a block: one for each of its warps, of which there are 1 to 4.
#define WARP_TOKEN                                                                                          \
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;                                        \
    const uint64_t t = static_cast<uint64_t>(blockIdx.x) * (blockDim.x / 32) + warp;                        \
    if (t >= p.tokens) return

// At least so many blocks an SM: without a bound ptxas aims at more and spills.
#define PLAIN(J, BLOCKS)                                                                                    \
    extern "C" __global__ void __launch_bounds__(128, BLOCKS)                                               \
        moe_routing_plain_##J(const __grid_constant__ RoutingParams p) {                                    \
        WARP_TOKEN;                                                                                         \
        (void)warp;                                                                                         \
        route_plain<J>(p, t, lane);                                                                         \
    }                                                                                                       \
    MOE_KERNEL(moe_routing_plain_##J)

PLAIN(1, 8)
PLAIN(2, 8)
PLAIN(4, 8)
PLAIN(8, 8)
PLAIN(16, 6)

#define GENERAL(J)                                                                                          \
    using Room##J = Room<J, 1>;                                                                             \
    extern "C" __global__ void __launch_bounds__(128)                                                       \
        moe_routing_general_##J(const __grid_constant__ RoutingParams p) {                                  \
        MOE_SHARED(Room##J[4], room);                                                                       \
        WARP_TOKEN;                                                                                         \
        route_general<J, 1>(p, t, lane, room[warp]);                                                        \
    }                                                                                                       \
    MOE_KERNEL(moe_routing_general_##J)

GENERAL(2)
GENERAL(8)
// Longer rows: a block of eight warps. (Sixteen numbers a lane in one warp would spill around the divisions of sparsemixer.)

#define WIDE(J)                                                                                             \
    using RoomWide##J = Room<J, 8>;                                                                         \
    extern "C" __global__ void __launch_bounds__(256)                                                       \
        moe_routing_wide_##J(const __grid_constant__ RoutingParams p) {                                     \
        MOE_SHARED(RoomWide##J, room);                                                                      \
        route_general<J, 8>(p, blockIdx.x, threadIdx.x, room);                                              \
    }                                                                                                       \
    MOE_KERNEL(moe_routing_wide_##J)

WIDE(4)
WIDE(16)

// Capacity, first step where tokens are served by importance. Grid: scopes, blocks of a scope.
extern "C" __global__ void __launch_bounds__(128) moe_routing_order(const __grid_constant__ RoutingParams p) {
    MOE_SHARED(int32_t[128], tile);
    order_tokens(p, tile);
}
MOE_KERNEL(moe_routing_order)

// Capacity: drops pairs. Grid: scopes, experts.
extern "C" __global__ void __launch_bounds__(32) moe_routing_capacity(const __grid_constant__ RoutingParams p) {
    serve_expert(p, blockIdx.y, threadIdx.x);
}
MOE_KERNEL(moe_routing_capacity)

// Renormalises and scales weights that were left raw.
extern "C" __global__ void __launch_bounds__(128) moe_routing_finish(const __grid_constant__ RoutingParams p) {
    WARP_TOKEN;
    (void)warp;
    finish_token(p, t, lane);
}
MOE_KERNEL(moe_routing_finish)

// Expert choice: the last pair that each expert takes.
extern "C" __global__ void __launch_bounds__(256) moe_routing_choose(const __grid_constant__ RoutingParams p) {
    MOE_SHARED(ColumnRoom, room);
    choose_tokens(p, blockIdx.x, room);
}
MOE_KERNEL(moe_routing_choose)

// Expert choice: lists a token's experts.
extern "C" __global__ void __launch_bounds__(256) moe_routing_chosen(const __grid_constant__ RoutingParams p) {
    MOE_SHARED(RoomWide16, room);
    serve_token<16, 8>(p, blockIdx.x, threadIdx.x, room);
}
MOE_KERNEL(moe_routing_chosen)
