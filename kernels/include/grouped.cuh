// The grouped product's parameters and its schedule, shared by every kernel of the stem.
//
//     out[r] = act( A[src(r)] · W[e]ᵀ + b[e] )     for the rows r of expert e: offsets[e] .. offsets[e] + counts[e]
//
// Rows between the experts (block alignment) are neither read nor written. Nothing here is read by the host: each block finds its tiles
// from the counts on the device.
#pragma once

#include "epilogue.cuh"
#include "ptx.cuh"

namespace grouped {

// `flags` of the parameters.
enum Flags : uint32_t {
    WeightTables = 1,  // gate, up: arrays [E] of addresses; an expert's matrix begins expert_stride elements behind its address
    BiasTables = 2,    // gate_bias, up_bias: the same for biases
    AlignedOut = 4,    // out and its row stride are multiples of 16 bytes
    AlignedTables = 8,  // the addresses in tables of weights are multiples of 16: for the plan's choice of a kernel alone
    WidenedWeights = 16,  // exact products: bf16 weights count as f32, in the order of f32's chain
};

// Mirrored in src/cuda/grouped_gemm/params.rs. Strides are in elements. A plain product has `up` only. `rows` (of the output) and `a_rows` bound what is
// touched, whatever the offsets, counts and pairs on the device say.
struct GroupedGemmParams {
    const void* a;                // [rows or T, K], K contiguous
    const uint32_t* pair_of_row;  // src(r) = pair_of_row[r] / slots; absent: r
    const float* input_scale;     // a factor for each pair; absent: none
    const int32_t* offsets;       // [E + 1]; absent: one group, rows 0 .. rows, of expert 0
    const int32_t* counts;        // [E]; absent: offsets[e + 1] − offsets[e]
    const void* gate;             // [E, N, K], K contiguous, or a table
    const void* up;
    const void* gate_bias;        // [E, N]; absent: none
    const void* up_bias;
    void* out;                    // [rows, N]
    int64_t a_row_stride;
    int64_t gate_row_stride, gate_expert_stride;
    int64_t up_row_stride, up_expert_stride;
    int64_t gate_bias_expert_stride, up_bias_expert_stride;
    int64_t out_row_stride;
    uint32_t gate_bias_stride, up_bias_stride;  // from one column's bias to the next
    uint32_t experts, rows, n, k, slots;
    uint32_t flags;
    uint32_t a_dtype, w_dtype, bias_dtype, out_dtype;
    uint32_t a_rows;    // of A
    uint32_t reserved;
    epilogue::Activation activation;
};
static_assert(sizeof(GroupedGemmParams) == 232, "mirrored in src/cuda/grouped_gemm/params.rs");

// One block's share of the output: rows first_row .. first_row + rows of an expert, columns from column_tile · (columns of a tile) on.
struct Tile {
    uint32_t expert;
    uint32_t first_row;
    uint32_t rows;  // up to RowsPerTile; 0 only where counts reach beyond the output
    uint32_t column_tile;

    static constexpr uint32_t None = 0xffffffffu;  // as `expert`: no tile is left
};

MOE_DEVICE uint32_t count_of(const GroupedGemmParams& p, uint32_t expert) {
    if (p.offsets == nullptr) return p.rows;
    const int32_t count = p.counts != nullptr ? __ldg(p.counts + expert) : __ldg(p.offsets + expert + 1) - __ldg(p.offsets + expert);
    return count < 0 ? 0 : static_cast<uint32_t>(count) < p.rows ? static_cast<uint32_t>(count) : p.rows;
}

MOE_DEVICE uint32_t start_of(const GroupedGemmParams& p, uint32_t expert) {
    return p.offsets == nullptr ? 0u : static_cast<uint32_t>(__ldg(p.offsets + expert));
}

// Finds tile t for ascending t: the whole warp calls it with the same arguments and gets the same answer. Every warp of a block may have
// its own, so that no barrier is needed.
//
// Tiles are counted expert by expert. Inside an expert, `RowGroup` row tiles are a group; a group's tiles go column by column, its rows
// innermost: blocks that run together share a column of weights (read from memory once, then L2) while the group's rows of A stay in L2.
//
// 128 experts at a time, four a lane: their counts come in one round of independent loads, a warp's prefix sum says which expert holds t.
// The tiles before the chunk are remembered, so a walk over all tiles looks at each chunk a bounded number of times. 32-bit tile numbers:
// `plan` refuses products of more than 2³¹ tiles.
template <uint32_t RowsPerTile, uint32_t RowGroup = 16>
struct TileFinder {
    static constexpr uint32_t PerLane = 4;
    static constexpr uint32_t Chunk = 32 * PerLane;

    uint32_t chunk = 0;   // the first expert of the chunk
    uint32_t before = 0;  // tiles of all experts before it

    MOE_DEVICE bool find(const GroupedGemmParams& p, uint32_t column_tiles, uint32_t t, Tile& tile) {
        const uint32_t lane = ptx::lane_id();
        for (; chunk < p.experts; chunk += Chunk) {
            const uint32_t first = chunk + lane * PerLane;
            uint32_t counts[PerLane], ends[PerLane];
            uint32_t sum = 0;
#pragma unroll
            for (uint32_t i = 0; i < PerLane; ++i) {
                counts[i] = first + i < p.experts ? count_of(p, first + i) : 0;
            }
#pragma unroll
            for (uint32_t i = 0; i < PerLane; ++i) {
                sum += (counts[i] + RowsPerTile - 1) / RowsPerTile * column_tiles;
                ends[i] = sum;
            }
            uint32_t end = sum;  // inclusive prefix sum over the lanes
#pragma unroll
            for (uint32_t d = 1; d < 32; d *= 2) {
                const uint32_t left = __shfl_up_sync(0xffffffffu, end, d);
                if (lane >= d) end += left;
            }
            const uint32_t local = t - before;
            const uint32_t holders = __ballot_sync(0xffffffffu, end > local);
            if (holders != 0) {
                const uint32_t holder = static_cast<uint32_t>(__ffs(static_cast<int>(holders))) - 1;
                // Meaningful in the holder only.
                const uint32_t within = local - (end - sum);
                uint32_t which = 0, tile_in_expert = within, count = counts[0];
#pragma unroll
                for (uint32_t i = 1; i < PerLane; ++i) {
                    if (within >= ends[i - 1]) which = i, tile_in_expert = within - ends[i - 1], count = counts[i];
                }
                count = __shfl_sync(0xffffffffu, count, holder);
                tile_in_expert = __shfl_sync(0xffffffffu, tile_in_expert, holder);
                tile.expert = __shfl_sync(0xffffffffu, first + which, holder);
                place(tile, start_of(p, tile.expert), p.rows, count, tile_in_expert, column_tiles);
                return true;
            }
            before += __shfl_sync(0xffffffffu, end, 31);
        }
        return false;
    }

private:
    MOE_DEVICE static void place(Tile& tile, uint32_t start, uint32_t end, uint32_t count, uint32_t t, uint32_t column_tiles) {
        const uint32_t row_tiles = (count + RowsPerTile - 1) / RowsPerTile;
        const uint32_t group = t / (RowGroup * column_tiles);
        const uint32_t within = t - group * RowGroup * column_tiles;
        const uint32_t left = row_tiles - group * RowGroup;
        const uint32_t group_rows = left < RowGroup ? left : RowGroup;
        tile.column_tile = within / group_rows;
        const uint32_t row = (group * RowGroup + within % group_rows) * RowsPerTile;
        tile.first_row = start + row;
        tile.rows = count - row < RowsPerTile ? count - row : RowsPerTile;
        const uint32_t there = start < end && row < end - start ? end - start - row : 0;
        if (tile.rows > there) tile.rows = there;
    }
};

// The row of A that packed row r is a product of.
MOE_DEVICE uint32_t source_row(const GroupedGemmParams& p, uint32_t r) {
    const uint32_t row = p.pair_of_row == nullptr ? r : __ldg(p.pair_of_row + r) / p.slots;
    return row < p.a_rows ? row : p.a_rows - 1;
}

// The factor of packed row r, applied to its sums before the bias (`x·s` is not rounded to x's format as on the CPU).
MOE_DEVICE float scale_of_row(const GroupedGemmParams& p, uint32_t r) {
    if (p.input_scale == nullptr) return 1.0f;
    const uint32_t pair = p.pair_of_row == nullptr ? r : __ldg(p.pair_of_row + r);
    return pair / p.slots < p.a_rows ? __ldg(p.input_scale + pair) : 1.0f;
}

// Looks up an expert's address in a table. `expert` becomes 1: the expert stride is then the distance from that address, so that one table serves
// both halves of fused matrices.
MOE_DEVICE const void* from_table(const void* table, uint32_t& expert) {
    const unsigned long long address = __ldg(static_cast<const unsigned long long*>(table) + expert);
    expert = 1;
    return reinterpret_cast<const void*>(address);
}

// The first byte of an expert's matrix.
MOE_DEVICE const unsigned char* matrix_of(const GroupedGemmParams& p, bool gate, uint32_t expert, uint32_t element_bytes) {
    const void* base = gate ? p.gate : p.up;
    if (p.flags & WeightTables) base = from_table(base, expert);
    const int64_t stride = gate ? p.gate_expert_stride : p.up_expert_stride;
    return static_cast<const unsigned char*>(base) + static_cast<int64_t>(expert) * stride * element_bytes;
}

// The bias of one column, where there is one.
MOE_DEVICE float bias_of(const GroupedGemmParams& p, bool gate, uint32_t expert, uint32_t column) {
    const void* base = gate ? p.gate_bias : p.up_bias;
    if (p.flags & BiasTables) base = from_table(base, expert);
    const int64_t first = static_cast<int64_t>(expert) * (gate ? p.gate_bias_expert_stride : p.up_bias_expert_stride);
    return epilogue::load_element(base, p.bias_dtype, first + static_cast<int64_t>(column) * (gate ? p.gate_bias_stride : p.up_bias_stride));
}

// v[i] += bias of column + i, for the columns below N; nothing where there is no bias, so that −0 stays −0.
template <int N>
MOE_DEVICE void add_bias(const GroupedGemmParams& p, bool gate, uint32_t expert, uint32_t column, float (&v)[N]) {
    if ((gate ? p.gate_bias : p.up_bias) == nullptr) return;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (column + i < p.n) v[i] = __fadd_rn(v[i], bias_of(p, gate, expert, column + i));
    }
}

// Finishes N = 1 or 8 columns of packed row r, from `column` on (below N; a multiple of 8 where eight are stored): scale, bias, activation,
// rounding, store. `g` alone counts in a plain product, and is then its sum.
template <bool Scale, int N>
MOE_DEVICE void finish(const GroupedGemmParams& p, uint32_t expert, uint32_t r, uint32_t column, float (&g)[N], float (&u)[N]) {
    const bool gated = p.activation.gated != 0;
    if (Scale && p.input_scale != nullptr) {
        const float scale = scale_of_row(p, r);
#pragma unroll
        for (int i = 0; i < N; ++i) g[i] = __fmul_rn(g[i], scale), u[i] = __fmul_rn(u[i], scale);
    }
    add_bias(p, gated, expert, column, g);
    if (gated) add_bias(p, false, expert, column, u);
    epilogue::activate(p.activation, g, u);
    const int64_t at = static_cast<int64_t>(r) * p.out_row_stride + column;
    epilogue::store(p.out, p.out_dtype, at, g, p.n - column, (p.flags & AlignedOut) != 0);
}

}  // namespace grouped
