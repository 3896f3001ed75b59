// Which tile a cluster works on: the ragged schedule of grouped_gemm_sm90.cu, found on the device from the experts' counts.
//
// Work is cut into units, numbered 0, 1, 2, ... expert by expert; cluster c of C takes units c, c + C, c + 2C, ...
// A unit is one tile [TILE_M, TILE_N] for each CTA of the cluster. With R = ceil(count / TILE_M) row tiles and
// C = ceil(N / columns of a tile) column tiles an expert has
//
//   cluster of 1:  R·C units, one tile each
//   cluster of 2:  floor(R/2)·C "pairs": both CTAs take the same columns of two neighbouring row tiles, so B is the same
//                  for both and is multicast;
//                  if R is odd, ceil(C/2) "halves": both take the last row tile, and neighbouring columns. No CTA idles
//                  for a row tile that is not there. If C is odd, too, one tile lies wholly outside N: it is computed
//                  from zeros and nothing of it is stored, which keeps the two rings of barriers in step.
//
// Pairs are ordered in bands of BAND row tiles (pairs), inside a band columns outermost: the units that run at one time
// (66 clusters on 132 SMs) form about a square of 8 x 8, which reads the fewest distinct bytes of A and B, so both come
// from L2. Weights of an expert are read from HBM once for each band, rows of A once for about 8 column tiles.
//
// A producing warp finds its tiles by itself: 128 experts a step, four a lane, one inclusive scan of their unit counts. The step
// in which the last unit was found is remembered, so that the experts are walked once in a launch.
#pragma once

#include "grouped.cuh"
#include "sm90_ring.cuh"

namespace sm90 {

constexpr uint32_t BAND = 8;

// One tile of one CTA.
struct Tile {
    uint32_t expert;  // END: there is no further tile
    uint32_t row;     // first row, in the packed order of rows
    uint32_t rows;    // valid rows from there, up to TILE_M; 0 only where counts reach beyond the output
    uint32_t column;  // index of the column tile; may be one past the last (see "halves")
    uint32_t pair;    // 1: both CTAs of the cluster read the same tile of B

    static constexpr uint32_t END = 0xffffffffu;
    MOE_DEVICE bool exists() const { return expert != END; }
};

// A walk over the units in ascending order. Its state is the same in all lanes of a warp.
struct Schedule {
    const grouped::GroupedGemmParams& p;
    const uint32_t column_tiles;
    const uint32_t cluster;  // CTAs in a cluster: 1 or 2
    const uint32_t rank;     // of this CTA in its cluster
    uint32_t chunk;          // first expert of the current 128
    uint32_t before;         // units of all experts before them

    static constexpr uint32_t PER_LANE = 4;
    static constexpr uint32_t ALL = 0xffffffffu;

    MOE_DEVICE Schedule(const grouped::GroupedGemmParams& p, uint32_t columns_per_tile)
        : p(p), column_tiles((p.n + columns_per_tile - 1) / columns_per_tile), cluster(ptx::cluster_size()),
          rank(ptx::cluster_rank()), chunk(0), before(0) {}

    MOE_DEVICE static uint32_t row_tiles(uint32_t count) { return (count + TILE_M - 1) / TILE_M; }

    MOE_DEVICE uint32_t units(uint32_t count) const {
        const uint32_t tiles = row_tiles(count);
        if (cluster == 1) return tiles * column_tiles;
        return (tiles >> 1) * column_tiles + (tiles & 1) * ((column_tiles + 1) >> 1);
    }

    // The tile of `unit`, which must not be below that of an earlier call. All lanes of the warp call together.
    MOE_DEVICE Tile find(uint32_t unit) {
        const uint32_t lane = ptx::lane_id();
        for (; chunk < p.experts; chunk += 32 * PER_LANE) {
            const uint32_t first = chunk + lane * PER_LANE;
            uint32_t count[PER_LANE];
#pragma unroll
            for (uint32_t i = 0; i < PER_LANE; ++i) {
                count[i] = first + i < p.experts ? grouped::count_of(p, first + i) : 0;
            }
            uint32_t own = 0;
#pragma unroll
            for (uint32_t i = 0; i < PER_LANE; ++i) own += units(count[i]);
            uint32_t end = own;  // inclusive sum over the lanes
#pragma unroll
            for (uint32_t d = 1; d < 32; d *= 2) {
                const uint32_t left = __shfl_up_sync(ALL, end, d);
                if (lane >= d) end += left;
            }
            const uint32_t holders = __ballot_sync(ALL, end > unit - before);
            if (holders != 0) {
                uint32_t rest = unit - before - (end - own);  // meaningful in the holder only, like what follows
                uint32_t which = 0, rows = count[0];
                bool found = rest < units(rows);
#pragma unroll
                for (uint32_t i = 1; i < PER_LANE; ++i) {
                    if (!found) rest -= units(rows), rows = count[i], which = i, found = rest < units(rows);
                }
                const int holder = __ffs(static_cast<int>(holders)) - 1;
                return place(__shfl_sync(ALL, first + which, holder), __shfl_sync(ALL, rows, holder),
                             __shfl_sync(ALL, rest, holder));
            }
            before += __shfl_sync(ALL, end, 31);
        }
        return Tile{Tile::END, 0, 0, 0, 0};
    }

private:
    // Unit `rest` of an expert with `count` rows.
    MOE_DEVICE Tile place(uint32_t expert, uint32_t count, uint32_t rest) const {
        const uint32_t tiles = row_tiles(count);
        const uint32_t groups = cluster == 1 ? tiles : tiles >> 1;  // row tiles, or pairs of them
        uint32_t row_tile, column;
        const bool whole = rest < groups * column_tiles;
        if (whole) {
            const uint32_t band = rest / (BAND * column_tiles);
            const uint32_t left = groups - band * BAND;
            const uint32_t height = left < BAND ? left : BAND;
            const uint32_t inside = rest - band * BAND * column_tiles;
            column = inside / height;
            row_tile = (band * BAND + inside - column * height) * cluster + rank;
        } else {
            column = 2 * (rest - groups * column_tiles) + rank;
            row_tile = tiles - 1;
        }
        const uint32_t begin = row_tile * TILE_M, start = grouped::start_of(p, expert);
        const uint32_t there = start < p.rows && begin < p.rows - start ? p.rows - start - begin : 0;
        uint32_t rows = count - begin < TILE_M ? count - begin : TILE_M;
        rows = rows < there ? rows : there;
        return Tile{expert, start + begin, rows, column, whole ? cluster - 1 : 0};
    }
};

}  // namespace sm90
