// The producer warpgroup of grouped_gemm_sm90.cu: fills the ring's stages, tile after tile, as far ahead as the ring is long.
//
// B always comes by TMA (one thread, two boxes a stage; a cluster's CTAs fetch one box each and multicast it). A comes by TMA
// where its rows are contiguous, else it is gathered: TMA on sm_90 has no row gather, so 128 threads copy 16-byte chunks with
// cp.async, swizzled by hand to the pattern that TMA would have made. Warp w fetches rows 32w .. 32w + 31, four a pass: eight
// lanes read the 128 contiguous bytes of one row, in global memory a full line and in shared memory all 32 banks. A lane keeps
// the source of one row and the passes exchange it by shuffle: one register instead of eight pointers (setmaxnreg leaves 40).
//
// Ordering. cp.async writes through the generic proxy, wgmma reads through the async proxy. Only the writer can order the two:
// its copies have to land (cp.async.wait_group), then fence.proxy.async, then it may arrive. A warp therefore announces step n
// after it has issued step n + LAG, when n has landed long ago, and waits for nothing. cp.async.mbarrier.arrive would save the
// lag, but arrives before any fence could run.
//
// Issue slots of a step: 8 passes of about 6 instructions a warp, one warp on each of the SM's four schedulers: some 60 of the
// 768 cycles in which the tensor cores work on a stage.
#pragma once

#include "grouped.cuh"
#include "sm90_ring.cuh"
#include "sm90_schedule.cuh"

namespace sm90 {

constexpr uint32_t LAG = 2;
static_assert(LAG + 2 < STAGES, "the consumers free a stage one step late, and must not wait for a stage that waits for them");
constexpr uint32_t NO_ROW = 0xffffffffu;

// What every loader of a stage needs.
struct Source {
    const grouped::GroupedGemmParams& p;
    const TensorMap& map_a;
    const TensorMap& map_gate;
    const TensorMap& map_up;
    Ring ring;
};

// Announces and starts the copies of one stage that TMA makes. One thread.
template <bool Gated, bool Gather>
MOE_DEVICE void load_by_tma(const Source& s, const Tile& tile, uint32_t stage, uint32_t k, uint32_t rank) {
    const uint32_t full = s.ring.full(stage), b = s.ring.b(stage);
    ptx::mbarrier_arrive_expect_tx(full, 2 * BOX_BYTES + (Gather ? 0 : A_BYTES));
    if (!Gather) ptx::tma_load_2d(s.ring.a(stage), s.map_a, full, static_cast<int32_t>(k), static_cast<int32_t>(tile.row));
    const int32_t x = static_cast<int32_t>(k), e = static_cast<int32_t>(tile.expert);
    const int32_t y = static_cast<int32_t>(tile.column * (Gated ? BOX_ROWS : TILE_N));
    const int32_t y1 = Gated ? y : y + static_cast<int32_t>(BOX_ROWS);
    if (tile.pair == 0) {
        ptx::tma_load_3d(b, Gated ? s.map_gate : s.map_up, full, x, y, e);
        ptx::tma_load_3d(b + BOX_BYTES, s.map_up, full, x, y1, e);
    } else if (rank == 0) {
        ptx::tma_load_3d_multicast(b, Gated ? s.map_gate : s.map_up, full, 3, x, y, e);
    } else {
        ptx::tma_load_3d_multicast(b + BOX_BYTES, s.map_up, full, 3, x, y1, e);
    }
}

// Waits until the stage may be written. All lanes have seen it before one of them fills the stage: a lane that looked later could find
// the barrier two phases on, and would wait for ever.
MOE_DEVICE void wait_empty(const Ring& ring, const Place& place) {
    ptx::mbarrier_wait(ring.empty(place.stage), place.parity ^ 1);
    __syncwarp();
}

// Leaves a tile's place in the next mailbox, or Tile::END, which ends a consumer's work. One thread.
MOE_DEVICE void post(const Ring& ring, Place& turn, const Tile& tile) {
    ptx::mbarrier_wait(ring.taken(turn.stage), turn.parity ^ 1);
    ptx::store_shared_128(ring.mail(turn.stage), make_uint4(tile.expert, tile.row, tile.rows, tile.column));
    ptx::mbarrier_arrive(ring.posted(turn.stage));
    turn.next<MAILBOXES>();
}

// The pair of row 32·warp + lane of a tile; for rows that are not there one that no row of A belongs to.
MOE_DEVICE uint32_t pair_of_lane(const grouped::GroupedGemmParams& p, const Tile& tile) {
    const uint32_t r = threadIdx.x & 127;
    return r < tile.rows ? __ldg(p.pair_of_row + tile.row + r) : NO_ROW;
}

// Starts this warp's copies of A's rows for one stage. `source`: the row of A for row 32·warp + lane, or NO_ROW.
MOE_DEVICE void gather(const Source& s, uint32_t stage, uint32_t k, uint32_t source) {
    const uint32_t lane = ptx::lane_id(), warp = (threadIdx.x & 127) / 32;
    const uint32_t chunk = lane % 8, row = lane / 8;
    const uint32_t column = k + chunk * 8;
    const uint32_t inside = column < s.p.k ? 16 : 0;
    const unsigned char* const from = static_cast<const unsigned char*>(s.p.a) + static_cast<uint64_t>(column) * 2;
    const uint32_t row_bytes = static_cast<uint32_t>(s.p.a_row_stride) * 2;
    // Rows 4i + row: r mod 8 is `row`, and 4 more in odd passes, which flips bit 2 of the chunk.
    const uint32_t to = s.ring.a(stage) + (warp * 32 + row) * ROW_BYTES + ((chunk ^ row) << 4);
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
        const uint32_t r = __shfl_sync(0xffffffffu, source, i * 4 + row);
        const bool real = r != NO_ROW && inside != 0;
        const unsigned char* const at = real ? from + static_cast<uint64_t>(r) * row_bytes : static_cast<const unsigned char*>(s.p.a);
        ptx::cp_async_16((to + i * 4 * ROW_BYTES) ^ (i % 2 * 64), at, real ? 16 : 0);
    }
    ptx::cp_async_commit();
}

// This warp's part of A of the step at `place` has landed.
MOE_DEVICE void announce(const Ring& ring, Place& place) {
    ptx::fence_proxy_async();
    __syncwarp();
    if (ptx::lane_id() == 0) ptx::mbarrier_arrive(ring.full(place.stage));
    place.next<STAGES>();
}

// A gathered: all four warps.
template <bool Gated>
MOE_DEVICE void produce_gathering(const Source& s, uint32_t first_unit, uint32_t unit_step) {
    Schedule schedule(s.p, Gated ? BOX_ROWS : TILE_N);
    const bool leader = (threadIdx.x & 127) == 0;
    Place place{0, 0}, landed{0, 0}, turn{0, 0};
    uint32_t in_flight = 0;
    Tile tile = schedule.find(first_unit);
    uint32_t pair = pair_of_lane(s.p, tile);
    for (uint32_t unit = first_unit + unit_step; tile.exists(); unit += unit_step) {
        if (leader) post(s.ring, turn, tile);
        __syncwarp();
        const uint32_t row = pair / s.p.slots, source = row < s.p.a_rows ? row : NO_ROW;
        // The next tile's row numbers travel while this tile's stages are filled.
        const Tile next = schedule.find(unit);
        pair = pair_of_lane(s.p, next);
        for (uint32_t k = 0; k < s.p.k; k += TILE_K) {
            wait_empty(s.ring, place);
            if (leader) load_by_tma<Gated, true>(s, tile, place.stage, k, schedule.rank);
            __syncwarp();
            gather(s, place.stage, k, source);
            place.next<STAGES>();
            if (in_flight == LAG) {
                ptx::cp_async_wait<LAG>();
                announce(s.ring, landed);
            } else {
                ++in_flight;
            }
        }
        tile = next;
    }
    ptx::cp_async_wait_all();
    for (; in_flight != 0; --in_flight) announce(s.ring, landed);
    if (leader) {
        post(s.ring, turn, tile);
        post(s.ring, turn, tile);
    }
}

// A contiguous: one warp.
template <bool Gated>
MOE_DEVICE void produce_by_tma(const Source& s, uint32_t first_unit, uint32_t unit_step) {
    Schedule schedule(s.p, Gated ? BOX_ROWS : TILE_N);
    Place place{0, 0}, turn{0, 0};
    Tile tile = schedule.find(first_unit);
    for (uint32_t unit = first_unit + unit_step; tile.exists(); unit += unit_step) {
        if (ptx::lane_id() == 0) post(s.ring, turn, tile);
        __syncwarp();
        for (uint32_t k = 0; k < s.p.k; k += TILE_K) {
            wait_empty(s.ring, place);
            if (ptx::lane_id() == 0) load_by_tma<Gated, false>(s, tile, place.stage, k, schedule.rank);
            __syncwarp();
            place.next<STAGES>();
        }
        tile = schedule.find(unit);
    }
    if (ptx::lane_id() == 0) {
        post(s.ring, turn, tile);
        post(s.ring, turn, tile);
    }
}

}  // namespace sm90
