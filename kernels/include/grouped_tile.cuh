// The tensor-core tile of the sm_80 products: cp.async stages, swizzled shared memory, ldmatrix, mma.sync. Easy version first:
//
//     for each of my tiles (persistent block):
//         for kb in 0 .. ceil(K / block):   copy A[rows, kb] and W[columns, kb] to shared memory; acc += A · Wᵀ
//         out = act(acc + bias)
//
// 1. Copies run Stages − 1 blocks ahead of the products, straight from global to shared memory (LDGSTS, no registers), and across tiles: the
//    first blocks of the next tile are on their way during this tile's last products and its epilogue. One commit group a block, empty ones at
//    the end, so that the count to wait for is a constant.
// 2. Rows of A are gathered by the copy itself: each thread keeps the row numbers of the (at most four) rows that it copies from.
// 3. A row of a block is 64 or 128 bytes. Its 16-byte chunks are permuted by the row number, chunk ^ row % 8 (or row / 2 % 4), so that the eight
//    rows that one ldmatrix phase reads, and the chunks that eight threads write, lie in different banks.
// 4. Gated products: eight rows of W's gate alternate with eight of its up matrix in the tile, so one warp has both sums of an output column.
// 5. Fragments are double-buffered in registers: the ldmatrix of step s + 1 are issued before the mma of step s.
// 6. The epilogue goes through a strip of eight rows in shared memory, private to the warp (no block barrier): 16-byte stores, and the
//    activation's code stands once however many accumulators there are.
//
// Bits (D1, D2). Element (r, c) is ONE accumulator to which mma.sync m16n8k16 (m16n8k8 for TF32) adds 32 bytes of k at a time, k ascending from 0
// to K rounded up to 64 bytes, the rest zeros. That sequence depends on K alone: not on the tile's shape, the row's place in its tile, the other
// rows, the number of blocks, or the stage count. What the tensor core does inside one instruction is its own affair, but it treats every
// row and column of the fragment alike. So every shape of this file gives the same bits, and a plan may choose by the number of rows.
//
// What was decided against: swapping A and W for few rows (n8 instead of m16 for the rows) would halve the padding, but ties the bits
// to what the hardware does with transposed operands; the decode kernel does that, as a class of its own.
#pragma once

#include "grouped.cuh"

namespace grouped {

// What a step of 32 bytes of k does: mma.sync of one format.
struct Bf16 {
    static constexpr uint32_t ElementBytes = 2;
    MOE_DEVICE static uint32_t w_bytes(const GroupedGemmParams&) { return 2; }
    MOE_DEVICE static void prepare(uint32_t (&)[4]) {}
    MOE_DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::mma_m16n8k16_bf16(d, a, b); }
};

struct F16 {
    static constexpr uint32_t ElementBytes = 2;
    MOE_DEVICE static uint32_t w_bytes(const GroupedGemmParams&) { return 2; }
    MOE_DEVICE static void prepare(uint32_t (&)[4]) {}
    MOE_DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::mma_m16n8k16_f16(d, a, b); }
};

// ldmatrix moves 32-bit elements as pairs of 16-bit ones; the lanes get exactly the fragment of m16n8k8. Rounded, not truncated, to TF32.
struct Tf32 {
    static constexpr uint32_t ElementBytes = 4;
    MOE_DEVICE static uint32_t w_bytes(const GroupedGemmParams&) { return 4; }
    MOE_DEVICE static void prepare(uint32_t (&r)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) r[i] = ptx::f32_to_tf32(__uint_as_float(r[i]));
    }
    MOE_DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::mma_m16n8k8_tf32(d, a, b); }
};

// Rows and columns (rows of W) of a tile, bytes of k in a block, warps along each, blocks of k in shared memory.
template <int Rows_, int Columns_, int BlockBytes_, int WarpsM_, int WarpsN_, int Stages_>
struct TileShape {
    static constexpr int Rows = Rows_, Columns = Columns_, BlockBytes = BlockBytes_, WarpsM = WarpsM_, WarpsN = WarpsN_, Stages = Stages_;
    static constexpr int Threads = 32 * WarpsM * WarpsN;
    static constexpr int WarpRows = Rows / WarpsM, WarpColumns = Columns / WarpsN;
    static constexpr int Mi = WarpRows / 16, Ni = WarpColumns / 8;  // fragments of a warp
    static constexpr int Chunks = BlockBytes / 16;                  // of a row of a block
    static constexpr int Steps = BlockBytes / 32;
    static constexpr int RowsPerPass = Threads / Chunks;  // rows that one cp.async of each thread covers
    static constexpr int PassesA = Rows / RowsPerPass, PassesB = Columns / RowsPerPass;
    static constexpr int StageBytes = (Rows + Columns) * BlockBytes;
    static constexpr int StripFloats = WarpColumns + 8;  // rows 8 banks apart: float2 stores of four rows meet no conflict
    static constexpr int StripBytes = 8 * StripFloats * 4;
    static constexpr int SharedBytes = Stages * StageBytes + WarpsM * WarpsN * StripBytes + (Stages + 1) * 16;
    static_assert(BlockBytes == 64 || BlockBytes == 128, "64 bytes are the unit that K is rounded up to");
    static_assert(Mi >= 1 && Ni % 2 == 0 && PassesA >= 1 && RowsPerPass % 16 == 0, "one of the loops would be empty");
};

template <class Shape>
MOE_DEVICE uint32_t swizzle(uint32_t row, uint32_t chunk) {
    return Shape::Chunks == 8 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3);
}

// Copies blocks of k of this block's tiles, one after the other, each thread its chunk of the same rows.
template <class Format, class Shape, bool Aligned>
struct TileLoader {
    TileFinder<Shape::Rows> finder;
    uint32_t next_tile;     // number of the tile after the open one
    uint32_t opened = 0;    // how many were opened
    uint32_t k_byte = 0;    // where the next block begins
    bool more = true;
    uint32_t rows_of_a[Shape::PassesA];
    uint32_t a_valid = 0;   // bit i: rows_of_a[i] exists
    const unsigned char* w = nullptr;
    int64_t w_step = 0;     // from one pass's row of W to the next
    uint32_t w_left = 0;    // columns of N from this thread's first one on
    uint32_t first_row = 0;  // of the open tile

    MOE_DEVICE void open(const GroupedGemmParams& p, uint32_t column_tiles, Tile* ring) {
        const uint32_t row = threadIdx.x / Shape::Chunks;
        Tile tile = {};
        more = finder.find(p, column_tiles, next_tile, tile);
        if (!more) tile.expert = Tile::None;
        // The tiles from the one in work to the one opened here are Stages + 1 at most: with one place less, a warp that is late in reading
        // the tile in work would find this one (the emulator did, under two of its seeds).
        if (threadIdx.x == 0) ring[opened % (Shape::Stages + 1)] = tile;
        ++opened;
        next_tile += gridDim.x;
        k_byte = 0;
        a_valid = 0;
        w_left = 0;
        if (!more) return;
        first_row = tile.first_row;
#pragma unroll
        for (int i = 0; i < Shape::PassesA; ++i) {
            const uint32_t r = row + i * Shape::RowsPerPass;
            const bool valid = r < tile.rows;
            rows_of_a[i] = valid ? source_row(p, tile.first_row + r) : 0;
            a_valid |= static_cast<uint32_t>(valid) << i;
        }
        // Row of the tile → matrix and column of it. RowsPerPass is a multiple of 16, so all passes of a thread are in the same matrix.
        const bool gated = p.activation.gated != 0;
        const bool gate = gated && (row / 8) % 2 == 0;
        const uint32_t column = gated ? tile.column_tile * (Shape::Columns / 2) + row / 16 * 8 + row % 8 : tile.column_tile * Shape::Columns + row;
        const int64_t row_bytes = (gate ? p.gate_row_stride : p.up_row_stride) * static_cast<int64_t>(Format::w_bytes(p));
        w = matrix_of(p, gate, tile.expert, Format::w_bytes(p)) + column * row_bytes;
        w_step = row_bytes * (gated ? Shape::RowsPerPass / 2 : Shape::RowsPerPass);
        w_left = p.n > column ? p.n - column : 0;
    }

    MOE_DEVICE void start(const GroupedGemmParams& p, uint32_t column_tiles, Tile* ring) {
        next_tile = blockIdx.x;
        open(p, column_tiles, ring);
    }

    // One chunk: `bytes` of the source (0 to 16), the rest zeros.
    MOE_DEVICE static void copy(uint32_t target, const unsigned char* source, uint32_t bytes) {
        if (Aligned) {
            ptx::cp_async_16(target, source, bytes);
            return;
        }
        uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
        for (uint32_t i = 0; i < 16 / Format::ElementBytes; ++i) {
            const uint32_t at = i * Format::ElementBytes;
            if (at >= bytes) continue;
            if (Format::ElementBytes == 4) {
                words[i] = *reinterpret_cast<const uint32_t*>(source + at);
            } else {
                words[i / 2] |= static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(source + at)) << (16 * (i % 2));
            }
        }
        ptx::store_shared_128(target, make_uint4(words[0], words[1], words[2], words[3]));
    }

    static constexpr int Parts = Shape::PassesA + Shape::PassesB;

    // Part i of the next block of k, into a stage: one chunk of this thread. Free of branches, so that it can stand between products: after the
    // last tile, zeros go where nobody reads.
    MOE_DEVICE void copy_part(const GroupedGemmParams& p, uint32_t k_bytes, uint32_t stage, int i) const {
        const uint32_t row = threadIdx.x / Shape::Chunks, chunk = threadIdx.x % Shape::Chunks;
        const uint32_t at = k_byte + chunk * 16;
        const uint32_t bytes = at >= k_bytes ? 0 : (k_bytes - at < 16 ? k_bytes - at : 16);
        const uint32_t target = stage + row * Shape::BlockBytes + swizzle<Shape>(row, chunk) * 16;
        if (i < Shape::PassesA) {
            const int64_t offset = rows_of_a[i % Shape::PassesA] * (p.a_row_stride * static_cast<int64_t>(Format::ElementBytes)) + at;
            copy(target + i * Shape::RowsPerPass * Shape::BlockBytes, static_cast<const unsigned char*>(p.a) + offset, (a_valid >> i) & 1 ? bytes : 0);
        } else {
            const int pass = i - Shape::PassesA;
            const uint32_t column = pass * (p.activation.gated != 0 ? Shape::RowsPerPass / 2 : Shape::RowsPerPass);
            copy(target + (Shape::Rows + pass * Shape::RowsPerPass) * Shape::BlockBytes, w + at + pass * w_step, column < w_left ? bytes : 0);
        }
    }

    // Behind a block's parts: opens the next tile when this one has been copied.
    MOE_DEVICE void advance(const GroupedGemmParams& p, uint32_t column_tiles, uint32_t k_bytes, Tile* ring) {
        k_byte += Shape::BlockBytes;
        if (more && k_byte >= k_bytes) open(p, column_tiles, ring);
    }
};

// The fragments of one step of a warp.
template <class Format, class Shape>
struct Fragments {
    uint32_t a[Shape::Mi][4];
    uint32_t b[Shape::Ni][2];

    // `a_row`, `b_row`: this lane's row of the first fragment; `a_chunk`, `b_chunk`: its swizzled chunk in step 0, in bytes.
    MOE_DEVICE void load(uint32_t a_row, uint32_t a_chunk, uint32_t b_row, uint32_t b_chunk, uint32_t step) {
#pragma unroll
        for (int i = 0; i < Shape::Mi; ++i) {
            ptx::ldmatrix_x4(a[i], a_row + i * 16 * Shape::BlockBytes + (a_chunk ^ (step * 32)));
        }
#pragma unroll
        for (int j = 0; j < Shape::Ni; j += 2) {
            uint32_t r[4];
            ptx::ldmatrix_x4(r, b_row + j * 8 * Shape::BlockBytes + (b_chunk ^ (step * 32)));
            Format::prepare(r);
            b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
        }
#pragma unroll
        for (int i = 0; i < Shape::Mi; ++i) Format::prepare(a[i]);
    }

    // The products with column fragment j.
    MOE_DEVICE void multiply(float (&acc)[Shape::Mi][Shape::Ni][4], int j) const {
#pragma unroll
        for (int i = 0; i < Shape::Mi; ++i) Format::mma(acc[i][j], a[i], b[j]);
    }
};

// Scale, bias, activation and store of a warp's sums, eight rows at a time through `strip`.
template <class Shape>
MOE_DEVICE void finish_warp(const GroupedGemmParams& p, const Tile& tile, const float (&acc)[Shape::Mi][Shape::Ni][4], float* strip) {
    const uint32_t lane = ptx::lane_id(), warp = threadIdx.x / 32;
    const uint32_t warp_row = warp / Shape::WarpsN * Shape::WarpRows;
    const bool gated = p.activation.gated != 0;
    const uint32_t vectors = gated ? Shape::Ni / 2 : Shape::Ni;  // of eight outputs, in a row
    const uint32_t first_column = (tile.column_tile * Shape::WarpsN + warp % Shape::WarpsN) * vectors * 8;
#pragma unroll 1
    for (uint32_t s = 0; s < 2 * Shape::Mi && warp_row + s * 8 < tile.rows; ++s) {
        __syncwarp();  // the strip has been read
#pragma unroll
        for (uint32_t q = 0; q < 2 * Shape::Mi; ++q) {
            if (q != s) continue;  // register numbers must be constants
#pragma unroll
            for (int j = 0; j < Shape::Ni; ++j) {
                const float2 pair = make_float2(acc[q / 2][j][q % 2 * 2], acc[q / 2][j][q % 2 * 2 + 1]);
                *reinterpret_cast<float2*>(strip + lane / 4 * Shape::StripFloats + j * 8 + lane % 4 * 2) = pair;
            }
        }
        __syncwarp();
#pragma unroll 1
        for (uint32_t v = lane; v < 8 * vectors; v += 32) {
            const uint32_t row = v / vectors, c = v % vectors, column = first_column + c * 8;
            if (warp_row + s * 8 + row >= tile.rows || column >= p.n) continue;
            const uint32_t r = tile.first_row + warp_row + s * 8 + row;
            const float* const sums = strip + row * Shape::StripFloats + (gated ? c * 16 : c * 8);
            float g[8], u[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) g[i] = sums[i], u[i] = gated ? sums[8 + i] : 0.0f;
            finish<true>(p, tile.expert, r, column, g, u);
        }
    }
}

// This block's tiles of the product. `shared`: Shape::SharedBytes, 1024-byte aligned.
template <class Format, class Shape, bool Aligned>
MOE_DEVICE void tile_product(const GroupedGemmParams& p, unsigned char* shared) {
    constexpr int LastStep = Shape::Steps - 1;
    const uint32_t lane = ptx::lane_id(), warp = threadIdx.x / 32;
    float* const strip = reinterpret_cast<float*>(shared + Shape::Stages * Shape::StageBytes + warp * Shape::StripBytes);
    Tile* const ring = reinterpret_cast<Tile*>(shared + Shape::Stages * Shape::StageBytes + Shape::WarpsM * Shape::WarpsN * Shape::StripBytes);
    const uint32_t stages = ptx::shared_address(shared);
    const uint32_t output_columns = p.activation.gated != 0 ? Shape::Columns / 2 : Shape::Columns;
    const uint32_t column_tiles = (p.n + output_columns - 1) / output_columns;
    const uint32_t k_bytes = p.k * Format::ElementBytes;

    using Loader = TileLoader<Format, Shape, Aligned>;
    Loader loader;
    loader.start(p, column_tiles, ring);
#pragma unroll 1
    for (int s = 0; s < Shape::Stages - 1; ++s) {
#pragma unroll
        for (int i = 0; i < Loader::Parts; ++i) loader.copy_part(p, k_bytes, stages + s * Shape::StageBytes, i);
        ptx::cp_async_commit();
        loader.advance(p, column_tiles, k_bytes, ring);
    }

    // This lane's row and chunk for ldmatrix: A's four matrices are (rows 0–7, 8–15) × (low, high half of the step), W's the other way round.
    const uint32_t a_at = warp / Shape::WarpsN * Shape::WarpRows + lane % 16;
    const uint32_t b_at = warp % Shape::WarpsN * Shape::WarpColumns + lane / 16 * 8 + lane % 8;
    const uint32_t a_offset = a_at * Shape::BlockBytes, b_offset = (Shape::Rows + b_at) * Shape::BlockBytes;
    const uint32_t a_chunk = swizzle<Shape>(a_at, lane / 16) * 16, b_chunk = swizzle<Shape>(b_at, lane / 8 % 2) * 16;

    uint32_t read = 0, write = (Shape::Stages - 1) * Shape::StageBytes;
    auto advance = [](uint32_t stage) { return stage == (Shape::Stages - 1) * Shape::StageBytes ? 0u : stage + Shape::StageBytes; };
    for (uint32_t done = 0;; ++done) {
        ptx::cp_async_wait<Shape::Stages - 2>();
        __syncthreads();
        const Tile tile = ring[done % (Shape::Stages + 1)];
        if (tile.expert == Tile::None) break;
        float acc[Shape::Mi][Shape::Ni][4] = {};
        Fragments<Format, Shape> fragments[2];
        fragments[0].load(stages + read + a_offset, a_chunk, stages + read + b_offset, b_chunk, 0);
#pragma unroll 1
        for (uint32_t k_byte = 0; k_byte < k_bytes; k_byte += Shape::BlockBytes) {
            const bool last = k_byte + Shape::BlockBytes >= k_bytes;
#pragma unroll
            for (int step = 0; step < Shape::Steps; ++step) {
                if (step < LastStep) {
                    fragments[(step + 1) % 2].load(stages + read + a_offset, a_chunk, stages + read + b_offset, b_chunk, step + 1);
                } else {
                    read = advance(read);
                    if (!last) {
                        ptx::cp_async_wait<Shape::Stages - 2>();
                        __syncthreads();
                        fragments[(step + 1) % 2].load(stages + read + a_offset, a_chunk, stages + read + b_offset, b_chunk, 0);
                    }
                }
                // Blocks of 128 bytes stop where blocks of 64 would: the same additions in every shape.
                if (step >= 2 && k_byte + 64 >= k_bytes) continue;
#pragma unroll
                for (int j = 0; j < Shape::Ni; ++j) {
                    fragments[step % 2].multiply(acc, j);
                    if (step != 0) continue;
                    // Copies between products. Everybody has left the stage before this one: they passed the barrier behind its last ldmatrix.
                    constexpr int Share = (Loader::Parts + Shape::Ni - 1) / Shape::Ni;
#pragma unroll
                    for (int i = j * Share; i < (j + 1) * Share && i < Loader::Parts; ++i) loader.copy_part(p, k_bytes, stages + write, i);
                }
                if (step == 0) ptx::cp_async_commit();
            }
            write = advance(write);
            loader.advance(p, column_tiles, k_bytes, ring);
        }
        finish_warp<Shape>(p, tile, acc, strip);
    }
    ptx::cp_async_wait_all();
}

}  // namespace grouped
