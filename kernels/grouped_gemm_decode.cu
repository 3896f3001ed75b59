// The grouped product for few rows an expert, bf16 and f16: bound by reading the weights once. Easy version first:
//
//     for each (expert, up to 8 of its rows, 16 rows of W), a block:
//         acc[16 rows of W][8 rows of A] = Σ over k in blocks of 32
//
// 1. W goes from memory to the registers of one warp, 16 bytes a lane, and nowhere else: no shared memory, no barrier before the end. 16 rows of W are the
//    m16 of mma.sync, the rows of A its n8: all (up to) 8 rows share one read of W at no cost in arithmetic.
// 2. The fragment of m16n8k16 wants 4 bytes of k from a lane, memory wants 16. So k is renumbered: in a block of 32 the lane t of a quad holds elements
//    8t .. 8t+7 of both W and A, two of them as "2t, 2t+1" and two as "2t+8, 2t+9" of a first mma, the other four of a second. A sum does not mind
//    in which column a product stands, as long as both operands agree.
// 3. A gated product puts 8 rows of the gate above 8 of the up matrix: the two sums of one output meet in one thread.
// 4. Four warps share the k of a tile, block b to warp b % 4, so that even one token keeps every SM busy; each holds 4 blocks (4 KiB of W) in flight.
//
// Bits (D1, D2). An element is (p0 + p1) + p2 + p3, where p_w is one accumulator to which the blocks w, w + 4, ... are added, two mma each. That
// depends on K alone: not on the number of rows, on a row's place among the eight, on the grid. It is not the order of the tiles
// (include/grouped_tile.cuh): the plan chooses one or the other by the number of pairs, or in strict mode always the tiles.
//
// Roofline. Reads 2·N·K bytes for each expert that has rows, and does at most 8 multiply-adds for each 2 bytes, 1/30 of what the tensor cores
// can at that rate: memory is the only limit. In flight: 6 blocks x 4 warps x 4 KiB = 96 KiB an SM; 4.3 TB/s on 132 SMs at 1.7 GHz are 19 bytes a
// clock each, 800 clocks of latency need 15 KiB. Rows of A come through L1 and L2: rows/16 of the bytes of W. 128 experts, I = 704, H = 2816,
// k = 8 on an H200 (4.3 TB/s as copied): one token reads 95 MB, 22 us; 8 tokens meet 52 experts, 615 MB, 143 us; 32 tokens 112 experts, 1.33 GB, 309 us. One token
// has 8 x 88 tiles of the first product for 132 x 6 blocks: one wave.
//
// Not done: fused first and second product (h would have to cross blocks), several tiles of W a warp (fewer reads of A, but fewer blocks for one token).
#include "grouped.cuh"

namespace {

using grouped::GroupedGemmParams;
using grouped::Tile;

constexpr uint32_t Rows = 8;        // of A in a tile
constexpr uint32_t Warps = 4;       // that share k
constexpr uint32_t Unroll = 4;      // blocks of 32 k in flight a warp
constexpr uint32_t BlockBytes = 64;  // of k
constexpr uint32_t Pitch = Rows + 1;

// 16 bytes of a row from byte `at` on; `Whole`: they exist, otherwise zeros from `end` on.
template <bool Aligned, bool Streamed, bool Whole>
MOE_DEVICE uint4 load_chunk(const unsigned char* row, uint32_t at, uint32_t end) {
    if (Aligned && (Whole || at + 16 <= end)) return Streamed ? ptx::load_nc_128(row + at) : ptx::load_128(row + at);
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
        if (at + 2 * i < end) words[i / 2] |= static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(row + at + 2 * i)) << (16 * (i % 2));
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

template <bool Bf16>
MOE_DEVICE void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    if (Bf16) {
        ptx::mma_m16n8k16_bf16(d, a, b);
    } else {
        ptx::mma_m16n8k16_f16(d, a, b);
    }
}

// Row of W number `row` (0 to 15) of a tile; the last one there is instead of one beyond N.
MOE_DEVICE const unsigned char* row_of_w(const GroupedGemmParams& p, const Tile& tile, uint32_t row) {
    const bool gated = p.activation.gated != 0;
    const bool gate = gated && row < 8;
    uint32_t column = gated ? tile.column_tile * 8 + row % 8 : tile.column_tile * 16 + row;
    if (column >= p.n) column = p.n - 1;
    const int64_t stride = gate ? p.gate_row_stride : p.up_row_stride;
    return grouped::matrix_of(p, gate, tile.expert, 2) + static_cast<int64_t>(column) * stride * 2;
}

// Where a lane's operands are: two rows of W, one of A. Places without a row get another one's address: the rows and columns of a product are
// independent, and what comes of those is not stored. So no load has a condition.
struct Source {
    const unsigned char* low;
    const unsigned char* high;
    const unsigned char* x;
};

// Up to Unroll blocks from byte `block` of k on. `Whole`: all of them, to the end.
template <bool Bf16, bool Aligned, bool Whole>
MOE_DEVICE void add_blocks(const Source& source, uint32_t block, uint32_t end, float (&acc)[4]) {
    const uint32_t first = block + ptx::lane_id() % 4 * 16;
    uint4 w0[Unroll], w1[Unroll], a[Unroll];
#pragma unroll
    for (uint32_t i = 0; i < Unroll; ++i) {
        w0[i] = load_chunk<Aligned, true, Whole>(source.low, first + i * Warps * BlockBytes, end);
        w1[i] = load_chunk<Aligned, true, Whole>(source.high, first + i * Warps * BlockBytes, end);
    }
#pragma unroll
    for (uint32_t i = 0; i < Unroll; ++i) a[i] = load_chunk<Aligned, false, Whole>(source.x, first + i * Warps * BlockBytes, end);
#pragma unroll
    for (uint32_t i = 0; i < Unroll; ++i) {
        if (!Whole && block + i * Warps * BlockBytes >= end) break;  // no product of zeros
        mma<Bf16>(acc, w0[i].x, w1[i].x, w0[i].y, w1[i].y, a[i].x, a[i].y);
        mma<Bf16>(acc, w0[i].z, w1[i].z, w0[i].w, w1[i].w, a[i].z, a[i].w);
    }
}

// This warp's part of the sums.
template <bool Bf16, bool Aligned>
MOE_DEVICE void accumulate(const GroupedGemmParams& p, const Tile& tile, uint32_t warp, float (&acc)[4]) {
    constexpr uint32_t Step = Warps * Unroll * BlockBytes;
    const uint32_t g = ptx::lane_id() / 4;
    const int64_t row = grouped::source_row(p, tile.first_row + (g < tile.rows ? g : 0));
    const Source source = {row_of_w(p, tile, g), row_of_w(p, tile, g + 8), static_cast<const unsigned char*>(p.a) + row * p.a_row_stride * 2};
    const uint32_t end = p.k * 2;
    uint32_t block = warp * BlockBytes;
#pragma unroll 1
    for (; block + Step - (Warps - 1) * BlockBytes <= end; block += Step) add_blocks<Bf16, Aligned, true>(source, block, end, acc);
    if (block < end) add_blocks<Bf16, Aligned, false>(source, block, end, acc);
}

// The four parts' sum of row `row` of W and row `r` of A.
MOE_DEVICE float total(const float* partial, uint32_t row, uint32_t r) {
    float sum = partial[row * Pitch + r];
#pragma unroll
    for (uint32_t w = 1; w < Warps; ++w) sum = __fadd_rn(sum, partial[(w * 16 + row) * Pitch + r]);
    return sum;
}

template <bool Bf16, bool Aligned>
MOE_DEVICE void decode(const GroupedGemmParams& p, float* partial) {
    const uint32_t lane = ptx::lane_id(), warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const bool gated = p.activation.gated != 0;
    const uint32_t columns = gated ? 8 : 16;  // outputs of a tile
    const uint32_t column_tiles = (p.n + columns - 1) / columns;
    grouped::TileFinder<Rows> finder;
    Tile tile;
    for (uint32_t number = blockIdx.x; finder.find(p, column_tiles, number, tile); number += gridDim.x) {
        if (tile.rows == 0) continue;
        float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        accumulate<Bf16, Aligned>(p, tile, warp, acc);
        float* const mine = partial + warp * 16 * Pitch;
        mine[g * Pitch + 2 * t] = acc[0];
        mine[g * Pitch + 2 * t + 1] = acc[1];
        mine[(g + 8) * Pitch + 2 * t] = acc[2];
        mine[(g + 8) * Pitch + 2 * t + 1] = acc[3];
        __syncthreads();
        const uint32_t r = threadIdx.x / columns, c = threadIdx.x % columns, column = tile.column_tile * columns + c;
        if (r < tile.rows && column < p.n) {
            float first[1] = {total(partial, c, r)}, up[1] = {gated ? total(partial, c + 8, r) : 0.0f};
            grouped::finish<true>(p, tile.expert, tile.first_row + r, column, first, up);
        }
        __syncthreads();
    }
}

}  // namespace

#define KERNEL(name, Bf16, Aligned, BlocksPerSm)                                                                 \
    extern "C" __global__ void __launch_bounds__(32 * Warps, BlocksPerSm) name(const __grid_constant__ GroupedGemmParams p) { \
        MOE_SHARED(float[Warps * 16 * Pitch], partial);                                                           \
        decode<Bf16, Aligned>(p, partial);                                                                        \
    }                                                                                                             \
    MOE_KERNEL(name)

KERNEL(moe_grouped_gemm_decode_bf16, true, true, 6);
KERNEL(moe_grouped_gemm_decode_f16, false, true, 6);
// Rows that do not begin on 16 bytes: the same sums, element by element.
KERNEL(moe_grouped_gemm_decode_bf16_unaligned, true, false, 4);
KERNEL(moe_grouped_gemm_decode_f16_unaligned, false, false, 4);
