// From the experts' rows back to tokens, with the bits of src/cpu/combine.rs. For each token, in f32:
//     a = Σ_slot weight · ys[row_of_pair[t·K + slot]], one chain of fused multiply-adds from +0 in slot order, pairs without a row passed over
//     a = a · scale;   shared experts;   RMS norm;   + bias;   + residual;   rounded once
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
// whole row first. Weights, bias, gate and norm are f32; x, shared, residual have a format of their own, chosen by a branch that all threads take.
#include "numerics.cuh"

namespace {

constexpr uint32_t NONE = 0xffffffffu;  // no row
constexpr uint32_t THREADS = 256;

enum Format : uint32_t { F32 = 0, F16 = 1, BF16 = 2 };
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
    const float* norm;              // [hidden]
    const float* bias;              // [hidden] or null
    const unsigned char* residual;  // [tokens, hidden] or null; may be `out`
    unsigned char* out;             // [tokens, hidden]
    uint64_t ys_stride, x_stride, shared_stride, residual_stride, out_stride;
    uint64_t tokens, hidden;
    uint32_t rows, slots, experts, threads, tiles, sum;
    uint32_t ys_format, x_format, shared_format, residual_format, out_format, shared_mode;
    float scale, eps, mul;
    uint32_t unused;
};
static_assert(sizeof(CombineParams) == 208, "as in Rust");

namespace {

// ---- columns: C neighbours of one row as bits and as f32 ----

template <uint32_t N>
struct Bytes {
    uint32_t words[N < 4 ? 1 : N / 4];
};

// Once read, not read again: past the L1.
template <uint32_t N>
MOE_DEVICE Bytes<N> load_once(const unsigned char* at) {
    Bytes<N> v;
    if constexpr (N == 2) v.words[0] = ptx::load_nc_16(at);
    if constexpr (N == 4) v.words[0] = ptx::load_nc_32(at);
    if constexpr (N >= 16) {
#pragma unroll
        for (uint32_t i = 0; i < N / 16; ++i) {
            const uint4 part = ptx::load_nc_128(at + 16 * i);
            v.words[4 * i] = part.x, v.words[4 * i + 1] = part.y, v.words[4 * i + 2] = part.z, v.words[4 * i + 3] = part.w;
        }
    }
    return v;
}

// What may be overwritten by this very thread afterwards.
template <uint32_t N>
MOE_DEVICE Bytes<N> load(const unsigned char* at) {
    Bytes<N> v;
    if constexpr (N == 2) v.words[0] = *reinterpret_cast<const uint16_t*>(at);
    if constexpr (N == 4) v.words[0] = *reinterpret_cast<const uint32_t*>(at);
    if constexpr (N == 8) {
        const uint2 part = *reinterpret_cast<const uint2*>(at);
        v.words[0] = part.x, v.words[1] = part.y;
    }
    if constexpr (N >= 16) {
#pragma unroll
        for (uint32_t i = 0; i < N / 16; ++i) {
            const uint4 part = ptx::load_128(at + 16 * i);
            v.words[4 * i] = part.x, v.words[4 * i + 1] = part.y, v.words[4 * i + 2] = part.z, v.words[4 * i + 3] = part.w;
        }
    }
    return v;
}

template <uint32_t N>
MOE_DEVICE void store(unsigned char* at, const Bytes<N>& v) {
    if constexpr (N == 2) *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(v.words[0]);
    if constexpr (N == 4) *reinterpret_cast<uint32_t*>(at) = v.words[0];
    if constexpr (N == 8) ptx::store_64(at, make_uint2(v.words[0], v.words[1]));
    if constexpr (N >= 16) {
#pragma unroll
        for (uint32_t i = 0; i < N / 16; ++i) {
            ptx::store_128(at + 16 * i, make_uint4(v.words[4 * i], v.words[4 * i + 1], v.words[4 * i + 2], v.words[4 * i + 3]));
        }
    }
}

template <Format T>
constexpr uint32_t SIZE = T == F32 ? 4 : 2;

template <Format T, int C>
MOE_DEVICE void widen(const Bytes<C * SIZE<T>>& bits, float (&v)[C]) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
        if constexpr (T == F32) {
            v[c] = numerics::from_bits(bits.words[c]);
        } else {
            const auto half = static_cast<uint16_t>(bits.words[c / 2] >> 16 * (c % 2));
            v[c] = T == F16 ? numerics::f16_to_f32(half) : numerics::bf16_to_f32(half);
        }
    }
}

template <Format T, int C>
MOE_DEVICE Bytes<C * SIZE<T>> narrow(const float (&v)[C]) {
    Bytes<C * SIZE<T>> bits = {};
#pragma unroll
    for (int c = 0; c < C; ++c) {
        if constexpr (T == F32) {
            bits.words[c] = numerics::bits_of(v[c]);
        } else {
            const uint32_t half = T == F16 ? numerics::f32_to_f16(v[c]) : numerics::f32_to_bf16(v[c]);
            bits.words[c / 2] |= half << 16 * (c % 2);
        }
    }
    return bits;
}

template <Format T, int C>
MOE_DEVICE void load_as(const unsigned char* row, uint64_t column, float (&v)[C]) {
    widen<T, C>(load<C * SIZE<T>>(row + column * SIZE<T>), v);
}

template <int C>
MOE_DEVICE void load_any(uint32_t format, const unsigned char* row, uint64_t column, float (&v)[C]) {
    if (format == F32) {
        load_as<F32, C>(row, column, v);
    } else if (format == F16) {
        load_as<F16, C>(row, column, v);
    } else {
        load_as<BF16, C>(row, column, v);
    }
}

// A format known when the kernel is compiled, and one known when it is launched.
template <Format T>
struct Known {
    template <int C>
    using Raw = Bytes<C * SIZE<T>>;
    template <int C>
    static MOE_DEVICE Raw<C> load_raw(uint32_t, const unsigned char* row, uint64_t column) {
        return load_once<C * SIZE<T>>(row + column * SIZE<T>);
    }
    template <int C>
    static MOE_DEVICE void values(const Raw<C>& raw, float (&v)[C]) {
        widen<T, C>(raw, v);
    }
    template <int C>
    static MOE_DEVICE void write(uint32_t, unsigned char* row, uint64_t column, const float (&v)[C]) {
        store(row + column * SIZE<T>, narrow<T, C>(v));
    }
};

struct Any {
    template <int C>
    struct Raw {
        float values[C];
    };
    template <int C>
    static MOE_DEVICE Raw<C> load_raw(uint32_t format, const unsigned char* row, uint64_t column) {
        Raw<C> raw;
        load_any<C>(format, row, column, raw.values);
        return raw;
    }
    template <int C>
    static MOE_DEVICE void values(const Raw<C>& raw, float (&v)[C]) {
#pragma unroll
        for (int c = 0; c < C; ++c) v[c] = raw.values[c];
    }
    template <int C>
    static MOE_DEVICE void write(uint32_t format, unsigned char* row, uint64_t column, const float (&v)[C]) {
        if (format == F32) {
            Known<F32>::write<C>(format, row, column, v);
        } else if (format == F16) {
            Known<F16>::write<C>(format, row, column, v);
        } else {
            Known<BF16>::write<C>(format, row, column, v);
        }
    }
};

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
            } else if (IDENTITY && p.ids != nullptr && row[i] == NONE && slot + i < p.slots && __ldg(p.ids + pair + i) >= static_cast<int32_t>(p.experts)) {
                load_any<C>(p.x_format, p.x + t * p.x_stride, column, v);
            } else {
                continue;
            }
#pragma unroll
            for (int c = 0; c < C; ++c) a[c] = __fmaf_rn(weight[i], v[c], a[c]);
        }
    }
}

// Steps 2 and 3.
template <int C>
MOE_DEVICE void add_shared(const CombineParams& p, uint64_t t, uint64_t column, float (&a)[C]) {
    if (p.scale != 1.0f) {
#pragma unroll
        for (int c = 0; c < C; ++c) a[c] = __fmul_rn(a[c], p.scale);
    }
    if (p.shared_mode == NO_SHARED) return;
    float s[C];
    load_any<C>(p.shared_format, p.shared + t * p.shared_stride, column, s);
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
            routed<Y, C, AT_ONCE, IDENTITY>(p, t, column, a);
            add_shared<C>(p, t, column, a);
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
                routed<Any, C, C == 1 ? 2 : 4, true>(p, t, column, a);
                add_shared<C>(p, t, column, a);
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
            routed<Any, C, C == 1 ? 2 : 4, true>(p, t, column, a);
            add_shared<C>(p, t, column, a);
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
