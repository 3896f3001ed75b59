// The grouped product with the CPU's bits, by FFMA, in f32 and in any mixture of formats; and TF32 on tensor cores. Easy version of the first:
//
//     sum = +0;  for k in 0 .. K: sum = fma(A[r][k], W[c][k], sum)        one chain an element, as on the CPU
//
// Exact (`exact`). The copies, stages, schedule and swizzle are those of include/grouped_tile.cuh; a thread holds TM x TN sums and walks k in order, four
// values of k a 16-byte shared load. Neither the tile's shape nor anything else but K touches a chain, and the chain is the CPU's (docs/design.md): k
// ascending; where W is bf16, pairs of k, odd element first, subnormal bf16 read as zeros. (Not where W counts as f32, as a gate's weights do on the CPU.) The
// odd-first order costs nothing: those elements are exchanged on their way into shared memory. Beyond K nothing is added, since fma(0, 0, −0) is +0. Bias and activation are the CPU's operations. So
// h and ys have the CPU's bits for every format: D3 reaches the GPU. NaN payloads apart.
//
//   kernel      tile     threads  sums a thread  block of k  stages  shared   what for
//   exact_m128  128x128  256      8x8            16          3       56 KiB   f32, aligned, many rows
//   exact_m16   16x128   128      4x4            32          3       56 KiB   f32, aligned, few rows
//   exact_any   32x128   128      8x4            32          3       62 KiB   any formats and alignment, input scales: element by element
//
// Roofline of exact_m128. 256 FFMA a thread for 16 shared loads of 16 bytes: a warp's take 24 of every 256 issue slots' bandwidth, so FFMA issue is
// the limit: 128 a clock and SM, 19.5 TFLOP/s on an A100, 67 on an H100 SXM at most. 8 warps of <= 128 registers, two blocks an SM. From L2: 32 multiply-adds a byte of the
// tile, 4 bytes a clock and SM. exact_m16: 4 bytes of W for 16 multiply-adds; at 4.3 TB/s 17 T multiply-adds a second, half of what FFMA can, so memory is the limit.
//
// TF32 (`tf32`) is the tile product of grouped_tile.cuh with inputs rounded to ten bits of mantissa. A mode that is asked for, never a default.
#include "grouped_tile.cuh"

namespace {

using grouped::GroupedGemmParams;
using grouped::Tile;

// A block's threads in rows of Tx: thread (tx, ty) sums rows ty + i·Ty of A with rows tx + j·Tx of W.
template <int Rows_, int BlockBytes_, int Tx_, int Tm_>
struct ExactShape {
    static constexpr int Rows = Rows_, Columns = 128, BlockBytes = BlockBytes_, Stages = 3;
    static constexpr int Tx = Tx_, Tm = Tm_, Tn = Columns / Tx, Ty = Rows / Tm;
    static constexpr int Threads = Tx * Ty;
    static constexpr int Chunks = BlockBytes / 16;
    static constexpr int RowsPerPass = Threads / Chunks;
    static constexpr int PassesA = Rows / RowsPerPass, PassesB = Columns / RowsPerPass;
    static constexpr int StageBytes = (Rows + Columns) * BlockBytes;
    static constexpr int StripRows = 32 / Tx;  // rows of a warp for one i
    static constexpr int StripBytes = StripRows * Columns * 4;
    static constexpr int SharedBytes = Stages * StageBytes + Threads / 32 * StripBytes + (Stages + 1) * 16;
    static_assert(PassesA >= 1 && RowsPerPass % 16 == 0 && Tx <= 32, "");
};

struct F32 {
    static constexpr uint32_t ElementBytes = 4;
    MOE_DEVICE static uint32_t w_bytes(const GroupedGemmParams&) { return 4; }
};

// Any format in memory, f32 in shared memory.
struct Any {
    MOE_DEVICE static uint32_t w_bytes(const GroupedGemmParams& p) { return p.w_dtype == epilogue::F32 ? 4 : 2; }
};

// Whether chains take k in pairs, as they do where W is bf16 and does not count as f32.
MOE_DEVICE bool in_pairs(const GroupedGemmParams& p) { return p.w_dtype == epilogue::BF16 && (p.flags & grouped::WidenedWeights) == 0; }

template <class Shape>
using AlignedLoader = grouped::TileLoader<F32, Shape, true>;

// Element by element: widened, scaled and rounded as the CPU does, the order of the CPU's chain.
template <class Shape>
struct AnyLoader : grouped::TileLoader<Any, Shape, false> {
    using Base = grouped::TileLoader<Any, Shape, false>;
    float scales[Shape::PassesA];

    MOE_DEVICE void start(const GroupedGemmParams& p, uint32_t column_tiles, Tile* ring) {
        Base::start(p, column_tiles, ring);
        read_scales(p);
    }

    MOE_DEVICE void advance(const GroupedGemmParams& p, uint32_t column_tiles, uint32_t k_bytes, Tile* ring) {
        Base::advance(p, column_tiles, k_bytes, ring);
        if (this->k_byte == 0) read_scales(p);
    }

    MOE_DEVICE void read_scales(const GroupedGemmParams& p) {
#pragma unroll
        for (int i = 0; i < Shape::PassesA; ++i) {
            const uint32_t r = this->first_row + threadIdx.x / Shape::Chunks + i * Shape::RowsPerPass;
            scales[i] = (this->a_valid >> i) & 1 ? grouped::scale_of_row(p, r) : 1.0f;
        }
    }

    MOE_DEVICE static float flushed(float v, bool flush) {
        return flush && (__float_as_uint(v) & 0x7f800000u) == 0 ? __uint_as_float(__float_as_uint(v) & 0x80000000u) : v;
    }

    MOE_DEVICE static float element_of_a(const GroupedGemmParams& p, int64_t at, float scale) {
        float v = epilogue::load_element(p.a, p.a_dtype, at);
        if (p.input_scale != nullptr) {
            v = __fmul_rn(v, scale);
            if (p.a_dtype == epilogue::F16) v = numerics::f16_to_f32(numerics::f32_to_f16(v));
            if (p.a_dtype == epilogue::BF16) v = numerics::bf16_to_f32(numerics::f32_to_bf16(v));
        }
        return flushed(v, in_pairs(p) && p.a_dtype == epilogue::BF16);
    }

    MOE_DEVICE void copy_part(const GroupedGemmParams& p, uint32_t, uint32_t stage, int i) const {
        const uint32_t row = threadIdx.x / Shape::Chunks, chunk = threadIdx.x % Shape::Chunks;
        const bool of_a = i < Shape::PassesA;
        const int pass = of_a ? i : i - Shape::PassesA;
        const uint32_t column = pass * (p.activation.gated != 0 ? Shape::RowsPerPass / 2 : Shape::RowsPerPass);
        const bool valid = of_a ? (this->a_valid >> pass) & 1 : column < this->w_left;
        const int64_t a_row = this->rows_of_a[pass % Shape::PassesA] * p.a_row_stride;
        uint32_t words[4];
#pragma unroll
        for (uint32_t q = 0; q < 4; ++q) {
            uint32_t k = this->k_byte / 4 + chunk * 4 + q;
            if (in_pairs(p)) k ^= 1;
            float v = 0.0f;
            if (valid && k < p.k) {
                v = of_a ? element_of_a(p, a_row + k, scales[pass % Shape::PassesA])
                         : flushed(epilogue::load_element(this->w + pass * this->w_step, p.w_dtype, k), in_pairs(p));
            }
            words[q] = __float_as_uint(v);
        }
        const uint32_t target = stage + ((of_a ? 0 : Shape::Rows) + pass * Shape::RowsPerPass + row) * Shape::BlockBytes;
        ptx::store_shared_128(target + grouped::swizzle<Shape>(row, chunk) * 16, make_uint4(words[0], words[1], words[2], words[3]));
    }
};

// Values of k that the chains take: an odd K gets a partner of zeros where they are taken in pairs.
template <class Shape>
MOE_DEVICE uint32_t chain_length(const AlignedLoader<Shape>&, const GroupedGemmParams& p) {
    return p.k;  // of f32, whatever the parameters say: one that looked spilled on sm_90
}

template <class Shape>
MOE_DEVICE uint32_t chain_length(const AnyLoader<Shape>&, const GroupedGemmParams& p) {
    return in_pairs(p) ? p.k + p.k % 2 : p.k;
}

MOE_DEVICE float part(const uint4& v, uint32_t i) { return __uint_as_float(i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w); }

// Four values of k, or the first `left` of them.
template <class Shape, bool All>
MOE_DEVICE void multiply(uint32_t stage, uint32_t chunk, uint32_t left, float (&acc)[Shape::Tm][Shape::Tn]) {
    const uint32_t tx = threadIdx.x % Shape::Tx, ty = threadIdx.x / Shape::Tx;
    uint4 a[Shape::Tm];
#pragma unroll
    for (int i = 0; i < Shape::Tm; ++i) {
        const uint32_t row = ty + i * Shape::Ty;
        a[i] = ptx::load_shared_128(stage + row * Shape::BlockBytes + grouped::swizzle<Shape>(row, chunk) * 16);
    }
#pragma unroll
    for (int j = 0; j < Shape::Tn; ++j) {
        const uint32_t row = tx + j * Shape::Tx;
        const uint4 w = ptx::load_shared_128(stage + (Shape::Rows + row) * Shape::BlockBytes + grouped::swizzle<Shape>(row, chunk) * 16);
#pragma unroll
        for (uint32_t q = 0; q < 4; ++q) {
            if (!All && q >= left) continue;
#pragma unroll
            for (int i = 0; i < Shape::Tm; ++i) acc[i][j] = __fmaf_rn(part(a[i], q), part(w, q), acc[i][j]);
        }
    }
}

// As grouped::finish_warp, a few rows of the warp at a time. The scale is in A already.
template <class Shape>
MOE_DEVICE void finish_warp(const GroupedGemmParams& p, const Tile& tile, const float (&acc)[Shape::Tm][Shape::Tn], float* strip) {
    const uint32_t lane = ptx::lane_id(), tx = threadIdx.x % Shape::Tx;
    const uint32_t ty = threadIdx.x / Shape::Tx, warp_row = threadIdx.x / 32 * Shape::StripRows;
    const bool gated = p.activation.gated != 0;
    const uint32_t vectors = gated ? Shape::Columns / 16 : Shape::Columns / 8;
#pragma unroll 1
    for (uint32_t s = 0; s < Shape::Tm; ++s) {
        __syncwarp();
#pragma unroll
        for (uint32_t i = 0; i < Shape::Tm; ++i) {
            if (i != s) continue;
#pragma unroll
            for (int j = 0; j < Shape::Tn; ++j) strip[(ty - warp_row) * Shape::Columns + tx + j * Shape::Tx] = acc[i][j];
        }
        __syncwarp();
#pragma unroll 1
        for (uint32_t v = lane; v < Shape::StripRows * vectors; v += 32) {
            const uint32_t c = v % vectors, row = warp_row + v / vectors + s * Shape::Ty, column = (tile.column_tile * vectors + c) * 8;
            if (row >= tile.rows || column >= p.n) continue;
            const float* const sums = strip + v / vectors * Shape::Columns + (gated ? c * 16 : c * 8);
            float g[8], u[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) g[i] = sums[i], u[i] = gated ? sums[8 + i] : 0.0f;
            grouped::finish<false>(p, tile.expert, tile.first_row + row, column, g, u);
        }
    }
}

template <class Loader, class Shape>
MOE_DEVICE void exact_product(const GroupedGemmParams& p, unsigned char* shared) {
    float* const strip = reinterpret_cast<float*>(shared + Shape::Stages * Shape::StageBytes + threadIdx.x / 32 * Shape::StripBytes);
    Tile* const ring = reinterpret_cast<Tile*>(shared + Shape::Stages * Shape::StageBytes + Shape::Threads / 32 * Shape::StripBytes);
    const uint32_t stages = ptx::shared_address(shared);
    const uint32_t output_columns = p.activation.gated != 0 ? Shape::Columns / 2 : Shape::Columns;
    const uint32_t column_tiles = (p.n + output_columns - 1) / output_columns;

    Loader loader;
    const uint32_t k_bytes = chain_length(loader, p) * 4;
    loader.start(p, column_tiles, ring);
#pragma unroll 1
    for (int s = 0; s < Shape::Stages - 1; ++s) {
#pragma unroll
        for (int i = 0; i < Loader::Parts; ++i) loader.copy_part(p, k_bytes, stages + s * Shape::StageBytes, i);
        ptx::cp_async_commit();
        loader.advance(p, column_tiles, k_bytes, ring);
    }
    uint32_t read = 0, write = (Shape::Stages - 1) * Shape::StageBytes;
    for (uint32_t done = 0;; ++done) {
        Tile tile = {};
        float acc[Shape::Tm][Shape::Tn] = {};
#pragma unroll 1
        for (uint32_t k_byte = 0; k_byte < k_bytes; k_byte += Shape::BlockBytes) {
            ptx::cp_async_wait<Shape::Stages - 2>();
            __syncthreads();  // this block is there, and everybody has left the one before
            tile = ring[done % (Shape::Stages + 1)];
            if (tile.expert == Tile::None) break;
#pragma unroll
            for (int i = 0; i < Loader::Parts; ++i) loader.copy_part(p, k_bytes, stages + write, i);
            ptx::cp_async_commit();
            const uint32_t left = (k_bytes - k_byte) / 4;
            if (left * 4 >= Shape::BlockBytes) {
                // Not unrolled: 16 to 256 FFMA an iteration hide its few instructions, and hoisted loads would not fit 128 registers.
#pragma unroll 1
                for (uint32_t chunk = 0; chunk < Shape::Chunks; ++chunk) multiply<Shape, true>(stages + read, chunk, 4, acc);
            } else {
#pragma unroll 1
                for (uint32_t chunk = 0; chunk * 4 < left; ++chunk) multiply<Shape, false>(stages + read, chunk, left - chunk * 4, acc);
            }
            read = read == (Shape::Stages - 1) * Shape::StageBytes ? 0 : read + Shape::StageBytes;
            write = write == (Shape::Stages - 1) * Shape::StageBytes ? 0 : write + Shape::StageBytes;
            loader.advance(p, column_tiles, k_bytes, ring);
        }
        if (tile.expert == Tile::None) break;
        finish_warp<Shape>(p, tile, acc, strip);
    }
    ptx::cp_async_wait_all();
}

using ExactM128 = ExactShape<128, 64, 16, 8>;
using ExactM16 = ExactShape<16, 128, 32, 4>;
using ExactAny = ExactShape<32, 128, 32, 8>;
using Tf32M128 = grouped::TileShape<128, 128, 64, 2, 2, 4>;
using Tf32M32 = grouped::TileShape<32, 128, 128, 1, 4, 3>;

// Mirrored in src/cuda/grouped_gemm/f32.rs.
static_assert(ExactM128::SharedBytes == 57408 && ExactM16::SharedBytes == 57408 && ExactAny::SharedBytes == 63552, "");
static_assert(Tf32M128::SharedBytes == 74832 && Tf32M32::SharedBytes == 66624, "");

}  // namespace

#define KERNEL(name, threads, blocks_per_sm, call)                                                                           \
    extern "C" __global__ void __launch_bounds__(threads, blocks_per_sm) name(const __grid_constant__ GroupedGemmParams p) { \
        MOE_DYNAMIC_SHARED(shared);                                                                                          \
        call(p, shared);                                                                                                     \
    }                                                                                                                        \
    MOE_KERNEL(name)

KERNEL(moe_grouped_gemm_f32_exact_m128, 256, 2, (exact_product<AlignedLoader<ExactM128>, ExactM128>));
KERNEL(moe_grouped_gemm_f32_exact_m16, 128, 3, (exact_product<AlignedLoader<ExactM16>, ExactM16>));
KERNEL(moe_grouped_gemm_f32_exact_any, 128, 3, (exact_product<AnyLoader<ExactAny>, ExactAny>));
KERNEL(moe_grouped_gemm_f32_tf32_m128, 128, 2, (grouped::tile_product<grouped::Tf32, Tf32M128, true>));
KERNEL(moe_grouped_gemm_f32_tf32_m32, 128, 3, (grouped::tile_product<grouped::Tf32, Tf32M32, true>));
KERNEL(moe_grouped_gemm_f32_tf32_m32_unaligned, 128, 3, (grouped::tile_product<grouped::Tf32, Tf32M32, false>));
