// RMS norms of rows, with the bits of src/cpu/norm.rs. For each row x of `width` columns, in f32, every operation rounded:
//     y = x / sqrt(Σ x² / width + eps) · weight · mul;   with `scale_first`, x · weight comes in place of x and the weight is not asked again
//
// The sum has the order of the contract: element i in lane i mod 32, ascending, then the butterfly of numerics::warp_sum. So one warp adds up, by a chain
// of width / 32 fused multiply-adds, whatever the others do.
//
// Roofline: a row read, a row written, a multiply-add, a division and one or two products for each number. Memory alone counts: T 32768, H 4096, bf16 in, f32
// out are 0.27 + 0.54 GB, 0.2 ms at 4.3 TB/s. To be there a row may be read once only, though its denominator needs all of it: it stays in shared memory, 16 KB
// for 4096 columns, so that 8 blocks or more of 256 threads share a multiprocessor, and while one block waits for its summing warp (128 dependent
// multiply-adds and as many loads, half a microsecond) the others read and write. A row alone, as in decoding, costs the latency of one read of memory,
// that chain, and a write: all loads of a row are on their way at once.
//
// One warp for a row, without shared memory and barriers, was weighed: its lanes have the contract's columns as they come. But a row of 4096 alone
// is then 128 loads of one warp after another, eight at a time, twice.
//
// Columns beyond `staged`, for which there is no shared memory, are read again instead. In place is fine: a thread reads a column for the last time just
// before it writes it, after the barrier behind which nobody else asks for it.
#include "columns.cuh"

namespace {

using namespace columns;

constexpr uint32_t THREADS = 256;

}  // namespace

// Mirrored in src/cuda/norm.rs. Strides are in bytes.
struct NormParams {
    const unsigned char* x;  // [rows, width]
    const float* weight;     // [width]
    unsigned char* out;      // [rows, width]; may be `x`
    const uint32_t* used;    // [1]: rows from this one on are left alone; null: none are
    uint64_t x_stride, out_stride;
    uint32_t rows, width;
    uint32_t staged;  // columns in shared memory: all, or a multiple of 32 and of a thread's columns
    uint32_t x_format, out_format, scale_first;
    float eps, mul;
};
static_assert(sizeof(NormParams) == 80, "as in Rust");

namespace {

template <int C>
MOE_DEVICE void weigh(const NormParams& p, uint32_t column, float (&v)[C]) {
    float weight[C];
    load_as<F32, C>(reinterpret_cast<const unsigned char*>(p.weight), column, weight);
#pragma unroll
    for (int c = 0; c < C; ++c) v[c] = __fmul_rn(v[c], weight[c]);
}

template <class X, int C>
MOE_DEVICE void load_x(const NormParams& p, const unsigned char* x, uint32_t column, float (&v)[C]) {
    X::template values<C>(X::template load_mutable<C>(p.x_format, x, column), v);
    if (p.scale_first) weigh<C>(p, column, v);
}

template <int C>
MOE_DEVICE void to_shared(float* at, const float (&v)[C]) {
    if constexpr (C == 1) *at = v[0];
    if constexpr (C >= 4) {
#pragma unroll
        for (int c = 0; c < C; c += 4) *reinterpret_cast<float4*>(at + c) = make_float4(v[c], v[c + 1], v[c + 2], v[c + 3]);
    }
}

template <int C>
MOE_DEVICE void from_shared(const float* at, float (&v)[C]) {
    if constexpr (C == 1) v[0] = *at;
    if constexpr (C >= 4) {
#pragma unroll
        for (int c = 0; c < C; c += 4) {
            const float4 part = *reinterpret_cast<const float4*>(at + c);
            v[c] = part.x, v[c + 1] = part.y, v[c + 2] = part.z, v[c + 3] = part.w;
        }
    }
}

// A row to shared memory: AT_ONCE loads of a thread, 4096 columns of a block, are on their way before the first is used.
template <class X, int C>
MOE_DEVICE void stage(const NormParams& p, const unsigned char* x, float* staged) {
    constexpr uint32_t AT_ONCE = C == 8 ? 2 : 4;
    for (uint32_t first = threadIdx.x * C; first < p.staged; first += AT_ONCE * THREADS * C) {
        typename X::template Raw<C> raw[AT_ONCE];
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; ++i) {
            const uint32_t column = first + i * THREADS * C;
            raw[i] = {};
            if (column < p.staged) raw[i] = X::template load_mutable<C>(p.x_format, x, column);
        }
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; ++i) {
            const uint32_t column = first + i * THREADS * C;
            if (column >= p.staged) continue;
            float v[C];
            X::template values<C>(raw[i], v);
            if (p.scale_first) weigh<C>(p, column, v);
            to_shared<C>(staged + column, v);
        }
    }
}

// √(mean + eps), in the first thread. A whole warp calls it.
template <class X>
MOE_DEVICE float root(const NormParams& p, const unsigned char* x, const float* staged) {
    float squares = 0.0f;
    uint32_t column = threadIdx.x;
#pragma unroll 8
    for (; column < p.staged; column += 32) squares = __fmaf_rn(staged[column], staged[column], squares);
    for (; column < p.width; column += 32) {
        float v[1];
        load_x<X, 1>(p, x, column, v);
        squares = __fmaf_rn(v[0], v[0], squares);
    }
    const float mean = __fdiv_rn(numerics::warp_sum(squares), static_cast<float>(p.width));
    return __fsqrt_rn(__fadd_rn(mean, p.eps));
}

// What follows the sum, for columns of x, or of x · weight.
template <int C>
MOE_DEVICE void finish(const NormParams& p, unsigned char* out, uint32_t column, float denominator, float (&v)[C]) {
#pragma unroll
    for (int c = 0; c < C; ++c) v[c] = __fdiv_rn(v[c], denominator);
    if (!p.scale_first) weigh<C>(p, column, v);
    if (p.mul != 1.0f) {
#pragma unroll
        for (int c = 0; c < C; ++c) v[c] = __fmul_rn(v[c], p.mul);
    }
    Any::write<C>(p.out_format, out, column, v);
}

// A block for each row, in strides of the grid.
template <class X, int C>
MOE_DEVICE void norm(const NormParams& p) {
    MOE_DYNAMIC_SHARED(shared);
    MOE_SHARED(float[1], denominator);
    float* const staged = reinterpret_cast<float*>(shared);
    const uint32_t rows = p.used != nullptr && __ldg(p.used) < p.rows ? __ldg(p.used) : p.rows;
    for (uint64_t r = blockIdx.x; r < rows; r += gridDim.x) {
        const unsigned char* const x = p.x + r * p.x_stride;
        unsigned char* const out = p.out + r * p.out_stride;
        stage<X, C>(p, x, staged);
        __syncthreads();
        if (threadIdx.x < 32) {
            const float d = root<X>(p, x, staged);
            if (threadIdx.x == 0) denominator[0] = d;
        }
        __syncthreads();
        const float d = denominator[0];
        uint32_t column = threadIdx.x * C;
        float v[C];
        for (; column < p.staged; column += THREADS * C) {
            from_shared<C>(staged + column, v);
            finish<C>(p, out, column, d, v);
        }
        for (; column < p.width; column += THREADS * C) {
            load_x<X, C>(p, x, column, v);
            finish<C>(p, out, column, d, v);
        }
        __syncthreads();
    }
}

}  // namespace

// Sixteen bytes a thread, for aligned operands; one column, for any.
#define MOE_NORM(name, X, C)                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) name(const __grid_constant__ NormParams p) {        \
        norm<X, C>(p);                                                                                        \
    }                                                                                                         \
    MOE_KERNEL(name)

MOE_NORM(moe_norm_f32, Known<F32>, 4)
MOE_NORM(moe_norm_f16, Known<F16>, 8)
MOE_NORM(moe_norm_bf16, Known<BF16>, 8)
MOE_NORM(moe_norm_any, Any, 1)
