// The ring of shared-memory stages between the producer and the consumers of grouped_gemm_sm90.cu.
//
// A stage holds 64 elements (128 bytes) of k for a tile's 128 rows of A and 192 rows of B, as TMA's 128-byte swizzle lays them
// out and wgmma reads them: row r at 128·r, its 16-byte chunk c at chunk c xor (r mod 8).
//
//   A  16384 bytes   rows of the packed order, gathered or contiguous
//   B  24576 bytes   two boxes of 96 rows. Gated: 96 rows of gate, then the same 96 of up, so that column c of both products
//                    lies in one thread's accumulators (wgmma's n8 blocks j and j + 12). Plain: 192 rows of W.
//
// 40960 bytes a stage, five stages: 200 KiB of the 227 that a block may have. `full[s]`: the stage may be read; arrivals: the
// thread that announces TMA's bytes, and where A is gathered each of the producer's 4 warps. `empty[s]`: it may be written
// again; arrivals: the 4 warps of the warpgroup that read it, in each CTA of the cluster, because a CTA's half of B goes to
// both CTAs. Both count phases by parity; a stage's parity flips each time the ring wraps.
//
// Beside the ring lie four mailboxes, in which the producer leaves the places of the next tiles: tile i of this CTA in box i mod 4,
// for consumer i mod 2. The schedule is thus computed once, by warps that have registers to spare, and the consumers keep a
// tile's place in the box, not in registers. `posted[m]`: one arrival, of the thread that wrote it; `taken[m]`: one of each of the
// consumer's 4 warps, when the tile is stored. `issued[c]`: one of each warp of consumer c, when all products of its tile are
// issued; the other consumer waits for that before its own, since a wait by parity cannot tell a phase from the last but one,
// so nobody may look at a stage that is two phases behind. It keeps the tensor cores on one tile at a time, too. Each box has a side table for its consumer: the biases of the tile's 192
// columns of B and the factors of its 128 rows.
#pragma once

#include "ptx.cuh"

namespace sm90 {

constexpr uint32_t TILE_M = 128, TILE_N = 192, TILE_K = 64;
constexpr uint32_t STAGES = 5;
constexpr uint32_t ROW_BYTES = TILE_K * 2;
constexpr uint32_t A_BYTES = TILE_M * ROW_BYTES, BOX_ROWS = TILE_N / 2, BOX_BYTES = BOX_ROWS * ROW_BYTES;
constexpr uint32_t STAGE_BYTES = A_BYTES + 2 * BOX_BYTES;
constexpr uint32_t CONSUMERS = 2, MAILBOXES = 2 * CONSUMERS, MAIL_BYTES = 16;
constexpr uint32_t SIDE_BYTES = (TILE_N + TILE_M) * 4;
constexpr uint32_t MAIL = STAGES * STAGE_BYTES, SIDES = MAIL + MAILBOXES * MAIL_BYTES;
constexpr uint32_t BARRIERS = SIDES + MAILBOXES * SIDE_BYTES;
constexpr uint32_t SHARED_BYTES = BARRIERS + (2 * STAGES + 2 * MAILBOXES + CONSUMERS) * 8;
static_assert(SHARED_BYTES <= 227 * 1024, "one block's limit on sm_90");
static_assert(A_BYTES % 1024 == 0 && BOX_BYTES % 1024 == 0, "the swizzle repeats every 1024 bytes");

// The addresses of a stage. All are 32-bit shared addresses.
struct Ring {
    uint32_t base;

    MOE_DEVICE uint32_t a(uint32_t stage) const { return base + stage * STAGE_BYTES; }
    MOE_DEVICE uint32_t b(uint32_t stage) const { return a(stage) + A_BYTES; }
    MOE_DEVICE uint32_t full(uint32_t stage) const { return base + BARRIERS + stage * 8; }
    MOE_DEVICE uint32_t empty(uint32_t stage) const { return full(stage) + STAGES * 8; }
    MOE_DEVICE uint32_t mail(uint32_t box) const { return base + MAIL + box * MAIL_BYTES; }
    MOE_DEVICE uint32_t side(uint32_t box) const { return base + SIDES + box * SIDE_BYTES; }
    MOE_DEVICE uint32_t posted(uint32_t box) const { return base + BARRIERS + (2 * STAGES + box) * 8; }
    MOE_DEVICE uint32_t taken(uint32_t box) const { return posted(box) + MAILBOXES * 8; }

    MOE_DEVICE uint32_t issued(uint32_t consumer) const { return taken(MAILBOXES) + consumer * 8; }

    // Sets up the barriers of a CTA in a cluster of `cluster`. One thread; the threads then synchronise.
    MOE_DEVICE void init(bool gather, uint32_t cluster) const {
        for (uint32_t i = 0; i < STAGES; ++i) {
            ptx::mbarrier_init(full(i), gather ? 1 + 4 : 1);
            ptx::mbarrier_init(empty(i), 4 * cluster);
        }
        for (uint32_t i = 0; i < MAILBOXES; ++i) {
            ptx::mbarrier_init(posted(i), 1);
            ptx::mbarrier_init(taken(i), 4);
        }
        for (uint32_t i = 0; i < CONSUMERS; ++i) ptx::mbarrier_init(issued(i), 4);
        ptx::fence_mbarrier_init();
    }
};

// A place in a ring of `Size`: index and parity of its phase.
struct Place {
    uint32_t stage;
    uint32_t parity;

    template <uint32_t Size>
    MOE_DEVICE void next() {
        if (++stage == Size) stage = 0, parity ^= 1;
    }

    // The place after `steps` times next from the start.
    template <uint32_t Size>
    MOE_DEVICE static Place after(uint32_t steps) {
        return Place{steps % Size, steps / Size & 1};
    }
};

}  // namespace sm90
