// From the experts' rows back to tokens, with the bits of src/cpu/combine.rs. For each token, in f32:
//     a = Σ_slot weight · ys[row_of_pair[t·K + slot]], one chain of fused multiply-adds from +0 in slot order, pairs without a row passed over
//     a = a · scale;   identity experts apart;   shared experts;   RMS norm;   + bias;   + residual;   rounded once
//
// Roofline: K rows of ys read, one row of y written, a multiply-add for each number read. Memory alone counts: T 32768, H 4096, K 8 in bf16 are
// 2.15 GB in and 0.27 GB out, 0.56 ms at the 4.3 TB/s that a copy reaches on an H200. To be at that a multiprocessor must have some 30 KB on
// the way (4.8 TB/s · 0.8 us / 132); here a thread asks for 8 rows of 16 bytes before it uses the first, so that 3 blocks of 256 threads have 96 KB.
//
// A thread has 16 bytes of columns of one token: 4 columns of f32, 8 of 16 bits. Its warp has neighbouring columns, 512 bytes of each row: four whole
// lines. `threads` neighbouring threads (32 to 256, a power of two) share a token, so that row numbers and weights are the same for a whole warp and come
// in broadcast loads, and a row that is not there is a branch that no warp splits at. Nothing goes through shared memory; no barrier.
//
// Kernels: moe_combine_<ys>_<out> for aligned operands; moe_combine_any_<columns> for everything else; moe_combine_norm_<columns> where a norm needs the
// whole row first. Weights, bias, gates and norm are f32; x, shared, residual have a format of their own, chosen by a branch that all threads take.
#include "columns.cuh"

namespace {

using namespace columns;

constexpr uint32_t NONE = 0xffffffffu;  // no row
constexpr uint32_t THREADS = 256;

enum Shared : uint32_t { NO_SHARED = 0, ADD = 1, SIGMOID_GATE = 2, AVERAGE = 3 };

}  // namespace

// Mirrored in src/cuda/combine.rs. Strides are in bytes.
struct CombineParams {
    const unsigned char* ys;        // [rows, hidden]; with `sum`, the routed sum itself, [tokens, hidden]
    const float* weights;           // [tokens, slots]; null counts as ones
    const uint32_t* row_of_pair;    // [tokens, slots]; rows or more: none
    const int32_t* ids;             // [tokens, slots], for identity experts; null: there are none
    const unsigned char* x;         // [tokens, hidden], for identity experts
    const unsigned char* shared;    // [tokens, hidden]
    const float* gate;              // [tokens]: logits for SIGMOID_GATE
    const float* gamma;             // [tokens, shared_count]: a weight for each shared expert; null: ones
    const float* apart;             // [tokens, slots]: weights of identity experts that join after the scale; null: they have their place in the sum
    const float* norm;              // [hidden]
    const float* bias;              // [hidden] or null
    const unsigned char* residual;  // [tokens, hidden] or null; may be `out`
    unsigned char* out;             // [tokens, hidden]
    uint64_t ys_stride, x_stride, shared_stride, residual_stride, out_stride;
    uint64_t shared_step;           // from one shared expert's rows to the next one's
    uint64_t tokens, hidden;
    uint32_t rows, slots, experts, threads, tiles, sum;
    uint32_t ys_format, x_format, shared_format, residual_format, out_format, shared_mode;
    uint32_t shared_count;
    float scale, apart_scale, eps, mul;
    uint32_t unused;
};
static_assert(sizeof(CombineParams) == 240, "as in Rust");

namespace {

// ---- the steps, for C columns of one token ----

// Step 1. AT_ONCE rows are asked for before the first is used.
template <class Y, int C, uint32_t AT_ONCE, bool IDENTITY>
MOE_DEVICE void routed(const CombineParams& p, uint64_t t, uint64_t column, float (&a)[C]) {
    if (p.sum) {
        Y::template values<C>(Y::template load_raw<C>(p.ys_format, p.ys + t * p.ys_stride, column), a);
        return;
    }
#pragma unroll
    for (int c = 0; c < C; ++c) a[c] = 0.0f;
    for (uint32_t slot = 0; slot < p.slots; slot += AT_ONCE) {
        const uint64_t pair = t * p.slots + slot;
        uint32_t row[AT_ONCE];
        float weight[AT_ONCE];
        typename Y::template Raw<C> raw[AT_ONCE];
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; ++i) {
            const bool there = slot + i < p.slots;
            row[i] = there ? __ldg(p.row_of_pair + pair + i) : NONE;
            weight[i] = there && p.weights != nullptr ? __ldg(p.weights + pair + i) : 1.0f;
        }
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; ++i) {
            raw[i] = {};
            if (row[i] < p.rows) raw[i] = Y::template load_raw<C>(p.ys_format, p.ys + row[i] * p.ys_stride, column);
        }
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; ++i) {
            float v[C];
            if (row[i] < p.rows) {
                Y::template values<C>(raw[i], v);
            } else if (IDENTITY && p.ids != nullptr && p.apart == nullptr && row[i] == NONE && slot + i < p.slots && __ldg(p.ids + pair + i) >= static_cast<int32_t>(p.experts)) {
                load_any<C>(p.x_format, p.x + t * p.x_stride, column, v);
            } else {
                continue;
            }
#pragma unroll
            for (int c = 0; c < C; ++c) a[c] = __fmaf_rn(weight[i], v[c], a[c]);
        }
    }
}

// Step 2, and identity experts apart: their weighted x is a chain of its own, which has the scale by itself.
template <int C, bool IDENTITY>
MOE_DEVICE void scale(const CombineParams& p, uint64_t t, uint64_t column, float (&a)[C]) {
    if (p.scale != 1.0f) {
#pragma unroll
        for (int c = 0; c < C; ++c) a[c] = __fmul_rn(a[c], p.scale);
    }
    if (!IDENTITY || p.apart == nullptr) return;
    float v[C], sum[C] = {};
    load_any<C>(p.x_format, p.x + t * p.x_stride, column, v);
    for (uint32_t slot = 0; slot < p.slots; ++slot) {
        const uint64_t pair = t * p.slots + slot;
        if (__ldg(p.ids + pair) < static_cast<int32_t>(p.experts)) continue;
        const float weight = __ldg(p.apart + pair);
#pragma unroll
        for (int c = 0; c < C; ++c) sum[c] = __fmaf_rn(weight, v[c], sum[c]);
    }
#pragma unroll
    for (int c = 0; c < C; ++c) a[c] = __fadd_rn(a[c], __fmul_rn(sum[c], p.apart_scale));
}

// Σ_j γ_j · s_j, each operation rounded, in the experts' order.
template <int C>
MOE_DEVICE void shared_sum(const CombineParams& p, uint64_t t, uint64_t column, float (&s)[C]) {
    const unsigned char* row = p.shared + t * p.shared_stride;
    load_any<C>(p.shared_format, row, column, s);
    if (p.gamma != nullptr) {
        const float gamma = __ldg(p.gamma + t * p.shared_count);
#pragma unroll
        for (int c = 0; c < C; ++c) s[c] = __fmul_rn(gamma, s[c]);
    }
    for (uint32_t j = 1; j < p.shared_count; ++j) {
        row += p.shared_step;
        float v[C];
        load_any<C>(p.shared_format, row, column, v);
        const float gamma = p.gamma != nullptr ? __ldg(p.gamma + t * p.shared_count + j) : 1.0f;
#pragma unroll
        for (int c = 0; c < C; ++c) s[c] = __fadd_rn(s[c], __fmul_rn(gamma, v[c]));
    }
}

// Step 3.
template <int C>
MOE_DEVICE void add_shared(const CombineParams& p, uint64_t t, uint64_t column, float (&a)[C]) {
    if (p.shared_mode == NO_SHARED) return;
    float s[C];
    shared_sum<C>(p, t, column, s);
    const float gate = p.shared_mode == SIGMOID_GATE ? numerics::sigmoid(__ldg(p.gate + t)) : 0.0f;
#pragma unroll
    for (int c = 0; c < C; ++c) {
        if (p.shared_mode == SIGMOID_GATE) {
            a[c] = __fmaf_rn(gate, s[c], a[c]);
        } else {
            a[c] = __fadd_rn(a[c], s[c]);
            if (p.shared_mode == AVERAGE) a[c] = __fmul_rn(a[c], 0.5f);
        }
    }
}

// Steps 1 to 3.
template <class Y, int C, uint32_t AT_ONCE, bool IDENTITY>
MOE_DEVICE void sum(const CombineParams& p, uint64_t t, uint64_t column, float (&a)[C]) {
    routed<Y, C, AT_ONCE, IDENTITY>(p, t, column, a);
    scale<C, IDENTITY>(p, t, column, a);
    add_shared<C>(p, t, column, a);
}

// Steps 5 to 7.
template <class O, int C>
MOE_DEVICE void finish(const CombineParams& p, uint64_t t, uint64_t column, float (&a)[C]) {
    float v[C];
    if (p.bias != nullptr) {
        load_as<F32, C>(reinterpret_cast<const unsigned char*>(p.bias), column, v);
#pragma unroll
        for (int c = 0; c < C; ++c) a[c] = __fadd_rn(a[c], v[c]);
    }
    if (p.residual != nullptr) {
        load_any<C>(p.residual_format, p.residual + t * p.residual_stride, column, v);
#pragma unroll
        for (int c = 0; c < C; ++c) a[c] = __fadd_rn(a[c], v[c]);
    }
    O::template write<C>(p.out_format, p.out + t * p.out_stride, column, a);
}

// Blocks: x over tiles of `threads`·C columns, y over groups of tokens. No division; both go on in strides of the grid.
template <class Y, class O, int C, uint32_t AT_ONCE, bool IDENTITY>
MOE_DEVICE void combine(const CombineParams& p) {
    const uint32_t threads = p.threads, groups = blockDim.x / threads;
    const uint32_t group = threadIdx.x / threads, thread = threadIdx.x % threads;
    for (uint64_t t = uint64_t{blockIdx.y} * groups + group; t < p.tokens; t += uint64_t{gridDim.y} * groups) {
        for (uint32_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
            const uint64_t column = (uint64_t{tile} * threads + thread) * C;
            if (column >= p.hidden) continue;
            float a[C];
            sum<Y, C, AT_ONCE, IDENTITY>(p, t, column, a);
            finish<O, C>(p, t, column, a);
        }
    }
}

// With a norm: a block for each token, which computes the row twice, first for the sum of squares. The second time it comes from the L2 or the L1.
// The sum has the order of the contract: element i in lane i mod 32, ascending, then the butterfly. So one warp adds up, from shared memory.
template <int C>
MOE_DEVICE void combine_norm(const CombineParams& p) {
    MOE_SHARED(float[THREADS * C], row);
    MOE_SHARED(float[1], denominator);
    for (uint64_t t = blockIdx.x; t < p.tokens; t += gridDim.x) {
        float a[C], squares = 0.0f;
        for (uint64_t tile = 0; tile < p.hidden; tile += THREADS * C) {
            const uint64_t column = tile + threadIdx.x * C;
            if (column < p.hidden) {
                sum<Any, C, C == 1 ? 2 : 4, true>(p, t, column, a);
#pragma unroll
                for (int c = 0; c < C; ++c) row[threadIdx.x * C + c] = a[c];
            }
            __syncthreads();
            if (threadIdx.x < 32) {
                const uint64_t left = p.hidden - tile;
                const uint32_t width = left < THREADS * C ? static_cast<uint32_t>(left) : THREADS * C;
                for (uint32_t i = threadIdx.x; i < width; i += 32) squares = __fmaf_rn(row[i], row[i], squares);
            }
            __syncthreads();
        }
        if (threadIdx.x < 32) {
            const float mean = __fdiv_rn(numerics::warp_sum(squares), static_cast<float>(p.hidden));
            if (threadIdx.x == 0) denominator[0] = __fsqrt_rn(__fadd_rn(mean, p.eps));
        }
        __syncthreads();
        for (uint64_t tile = 0; tile < p.hidden; tile += THREADS * C) {
            const uint64_t column = tile + threadIdx.x * C;
            if (column >= p.hidden) continue;
            sum<Any, C, C == 1 ? 2 : 4, true>(p, t, column, a);
            float weight[C];
            load_as<F32, C>(reinterpret_cast<const unsigned char*>(p.norm), column, weight);
#pragma unroll
            for (int c = 0; c < C; ++c) {
                a[c] = __fmul_rn(__fdiv_rn(a[c], denominator[0]), weight[c]);
                if (p.mul != 1.0f) a[c] = __fmul_rn(a[c], p.mul);
            }
            finish<Any, C>(p, t, column, a);
        }
        __syncthreads();
    }
}

}  // namespace

#define MOE_COMBINE(name, Y, O, C)                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 3) name(const __grid_constant__ CombineParams p) {        \
        combine<Known<Y>, Known<O>, C, 8, false>(p);                                                                \
    }                                                                                                               \
    MOE_KERNEL(name)

MOE_COMBINE(moe_combine_f32_f32, F32, F32, 4)
MOE_COMBINE(moe_combine_f32_f16, F32, F16, 4)
MOE_COMBINE(moe_combine_f32_bf16, F32, BF16, 4)
MOE_COMBINE(moe_combine_f16_f32, F16, F32, 8)
MOE_COMBINE(moe_combine_f16_f16, F16, F16, 8)
MOE_COMBINE(moe_combine_bf16_f32, BF16, F32, 8)
MOE_COMBINE(moe_combine_bf16_bf16, BF16, BF16, 8)

// Any format, and identity experts. Four columns a thread want everything aligned to four columns, one column nothing.
extern "C" __global__ void __launch_bounds__(THREADS) moe_combine_any_1(const __grid_constant__ CombineParams p) { combine<Any, Any, 1, 2, true>(p); }
MOE_KERNEL(moe_combine_any_1)
extern "C" __global__ void __launch_bounds__(THREADS) moe_combine_any_4(const __grid_constant__ CombineParams p) { combine<Any, Any, 4, 4, true>(p); }
MOE_KERNEL(moe_combine_any_4)

// The same with a norm. Grid: tokens.
extern "C" __global__ void __launch_bounds__(THREADS) moe_combine_norm_1(const __grid_constant__ CombineParams p) { combine_norm<1>(p); }
MOE_KERNEL(moe_combine_norm_1)
extern "C" __global__ void __launch_bounds__(THREADS) moe_combine_norm_4(const __grid_constant__ CombineParams p) { combine_norm<4>(p); }
MOE_KERNEL(moe_combine_norm_4)
