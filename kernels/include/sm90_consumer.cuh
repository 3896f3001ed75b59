// A consumer warpgroup of grouped_gemm_sm90.cu: multiplies the stages of every second tile, then finishes and stores that tile
// while the other warpgroup multiplies the next.
//
// A tile's sums are 128 x 192, 192 registers a thread: two products m64n192k16 (rows 0..63 and 64..127) for each 16 of k. Each sum is
// one chain over k in steps of 16, ascending, whatever the tile's place, so it does not depend on the batch.
//
// The epilogue uses no shared memory and no barrier: bias, activation and rounding in registers, then the four lanes of a quad
// exchange their pairs of columns by shuffle, after which each holds eight neighbours: 16-byte stores, 64 contiguous bytes a
// row. Everything happens in place: 192 sums leave no room for copies.
#pragma once

#include "grouped.cuh"
#include "sm90_ring.cuh"
#include "sm90_schedule.cuh"

namespace sm90 {

// The sums of a tile: [0] rows 0..63, [1] rows 64..127; wgmma's layout (ptx/wgmma.cuh).
struct Sums {
    float d[2][TILE_N / 2];
};

// The high word of every descriptor: 128-byte swizzle, 1024 bytes from one group of 8 rows to the next. The low word holds the
// address in units of 16 bytes and is counted on in 32 bits: k16 is 2, 64 rows are 512; 200 KiB do not leave its 14 bits.
MOE_DEVICE uint64_t descriptor(uint32_t low) {
    return (ptx::wgmma_descriptor(0, 16, 8 * ROW_BYTES, ptx::Swizzle::Bytes128) & ~0xffffffffull) | low;
}

MOE_DEVICE uint32_t descriptor_low(uint32_t address) {
    return static_cast<uint32_t>(ptx::wgmma_descriptor(address, 16, 8 * ROW_BYTES, ptx::Swizzle::Bytes128));
}

// One stage: 4 steps of k16 for both halves.
template <uint32_t DType>
MOE_DEVICE void multiply_stage(Sums& sums, uint32_t a, uint32_t b, bool accumulate) {
#pragma unroll
    for (uint32_t k = 0; k < TILE_K / 16; ++k) {
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half) {
            const uint64_t rows = descriptor(a + half * (64 * ROW_BYTES / 16) + k * 2), columns = descriptor(b + k * 2);
            if (DType == epilogue::BF16) {
                ptx::wgmma_bf16(sums.d[half], rows, columns, accumulate || k != 0);
            } else {
                ptx::wgmma_f16(sums.d[half], rows, columns, accumulate || k != 0);
            }
        }
    }
}

// This warp has read the stage: one arrival in each CTA of the cluster. What was read is in the sums (wgmma_wait) and nothing was
// written, so the arrival has nothing to publish, and at cluster scope a release would cost a memory barrier of the whole GPU.
MOE_DEVICE void release(const Ring& ring, uint32_t stage) {
    const uint32_t lane = ptx::lane_id();
    if (lane < ptx::cluster_size()) ptx::mbarrier_arrive_cluster_unordered(ptx::map_shared(ring.empty(stage), lane));
}

// A tile's product from `place` on: leaves the sums complete and the stages released, and gives the turn away at `issued`. One batch of products is in
// flight while the next is issued, so the tensor cores never wait for a barrier.
template <uint32_t DType>
MOE_DEVICE void multiply(Sums& sums, const Ring& ring, Place place, uint32_t steps, uint32_t issued) {
    const uint32_t a = descriptor_low(ring.a(0)), b = descriptor_low(ring.b(0));
    uint32_t previous = 0;
    for (uint32_t step = 0; step < steps; ++step) {
        ptx::mbarrier_wait(ring.full(place.stage), place.parity);
        const uint32_t at = place.stage * (STAGE_BYTES / 16);
        ptx::wgmma_fence();
        multiply_stage<DType>(sums, a + at, b + at, step != 0);
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        if (step != 0) release(ring, previous);
        previous = place.stage;
        place.next<STAGES>();
    }
    if (ptx::lane_id() == 0) ptx::mbarrier_arrive(issued);
    __syncwarp();
    ptx::wgmma_wait<0>();
    release(ring, previous);
}

// Looks up the biases of the tile's columns of B (gate's, then up's, where gated) and the factors of its rows, before the product
// begins: their latency hides behind the other consumer's work. Read after the next barrier of the warpgroup.
template <bool Gated>
MOE_DEVICE void fill_side(const grouped::GroupedGemmParams& p, const Tile& tile, uint32_t side) {
    const uint32_t thread = threadIdx.x & 127;
    if (p.up_bias != nullptr || p.gate_bias != nullptr) {
#pragma unroll 1
        for (uint32_t i = thread; i < TILE_N; i += 128) {
            const bool gate = Gated && i < BOX_ROWS;
            const uint32_t column = tile.column * (Gated ? BOX_ROWS : TILE_N) + (Gated && !gate ? i - BOX_ROWS : i);
            float bias = 0.0f;
            if (column < p.n && (gate ? p.gate_bias : p.up_bias) != nullptr) bias = grouped::bias_of(p, gate, tile.expert, column);
            ptx::store_shared_32(side + i * 4, __float_as_uint(bias));
        }
    }
    if (p.input_scale != nullptr) {
        const float factor = thread < tile.rows ? grouped::scale_of_row(p, tile.row + thread) : 1.0f;
        ptx::store_shared_32(side + (TILE_N + thread) * 4, __float_as_uint(factor));
    }
}

// The sums of block j (8 columns) are d[half][4j ..]: columns 2t and 2t + 1 of row g, then of row g + 8.

// Multiplies by the factors of the rows, at `side` (shared memory).
MOE_DEVICE void scale_rows(Sums& sums, uint32_t side) {
    const uint32_t from = side + (TILE_N + (threadIdx.x & 96) / 2 + ptx::lane_id() / 4) * 4;
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
        const float low = __uint_as_float(ptx::load_shared_32(from + half * 64 * 4));
        const float high = __uint_as_float(ptx::load_shared_32(from + half * 64 * 4 + 8 * 4));
#pragma unroll
        for (uint32_t i = 0; i < TILE_N / 2; ++i) sums.d[half][i] = __fmul_rn(sums.d[half][i], i & 2 ? high : low);
    }
}

// Adds the biases at `side` to blocks First .. Last.
template <uint32_t First, uint32_t Last>
MOE_DEVICE void add_bias(Sums& sums, uint32_t side) {
    const uint32_t from = side + ptx::lane_id() % 4 * 8;
#pragma unroll
    for (uint32_t j = First; j < Last; ++j) {
        const uint2 bias = ptx::load_shared_64(from + j * 32);
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half) {
#pragma unroll
            for (uint32_t i = 0; i < 4; ++i) {
                float& sum = sums.d[half][4 * j + i];
                sum = __fadd_rn(sum, __uint_as_float(i & 1 ? bias.y : bias.x));
            }
        }
    }
}

// The activation, in place: where gated, blocks 0 .. 12 become h. The loop is rolled, so that the code of each activation stands once;
// since a register cannot be addressed by a counter, the sums go round: a block of each half is taken at the front, the others move
// down, the results join at the back, and after a whole round all are in place again (2000 moves a tile where gated). Eight
// elements at a time are independent chains enough for a scheduler that has one such warp.
template <bool Gated>
MOE_DEVICE void activate(const epilogue::Activation& activation, Sums& sums) {
    constexpr int WIDTH = Gated ? TILE_N / 4 : TILE_N / 2;
    epilogue::Activation a = activation;
    a.gated = Gated;
#pragma unroll 1
    for (int block = 0; block < WIDTH / 4; ++block) {
        float x[8], up[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            x[i] = sums.d[i / 4][i % 4];
            up[i] = Gated ? sums.d[i / 4][WIDTH % (TILE_N / 2) + i % 4] : 0.0f;
        }
        epilogue::activate(a, x, up);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < WIDTH - 4; ++i) {
                sums.d[half][i] = sums.d[half][i + 4];
                if (Gated) sums.d[half][WIDTH + i] = sums.d[half][WIDTH + i + 4];
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) sums.d[half][WIDTH - 4 + i] = x[half * 4 + i];
        }
    }
}

// Transposes a 4 x 4 square of words over the quad: lane t gives word j of block j and gets the four words of block t.
MOE_DEVICE void transpose_quad(uint32_t (&w)[4]) {
    const bool odd = ptx::lane_id() & 1, upper = ptx::lane_id() & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? w[i] : w[i + 1], 1);
        if (odd) w[i] = got;
        else w[i + 1] = got;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? w[i] : w[i + 2], 2);
        if (upper) w[i] = got;
        else w[i + 2] = got;
    }
}

// Rounds and stores one row's share of four blocks: `v` as columns `column` .. + 32, where they exist. `out` points to the row.
template <uint32_t DType>
MOE_DEVICE void store_row(const grouped::GroupedGemmParams& p, unsigned char* out, bool real, uint32_t column, const float (&v)[8]) {
    const uint32_t t = ptx::lane_id() % 4;
    if (p.out_dtype == epilogue::F32) {
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) {
            const uint32_t c = column + 8 * j + 2 * t;
            const uint2 pair = make_uint2(__float_as_uint(v[2 * j]), __float_as_uint(v[2 * j + 1]));
            if (real && c < p.n) ptx::store_64(out + static_cast<uint64_t>(c) * 4, pair);
        }
    } else {
        uint32_t words[4];
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) words[j] = epilogue::pack_pair(DType, v[2 * j], v[2 * j + 1]);
        transpose_quad(words);
        const uint32_t c = column + 8 * t;
        if (real && c < p.n) ptx::store_128(out + static_cast<uint64_t>(c) * 2, make_uint4(words[0], words[1], words[2], words[3]));
    }
}

// Rounds and stores the tile's finished values: the first `Columns` / 8 blocks.
template <uint32_t DType, uint32_t Columns>
MOE_DEVICE void store(const grouped::GroupedGemmParams& p, const Tile& tile, const Sums& sums) {
    const uint32_t bytes = p.out_dtype == epilogue::F32 ? 4 : 2;
#pragma unroll
    for (uint32_t half = 0; half < 4; ++half) {  // rows g, g + 8, g + 64, g + 72 of the warp's
        const uint32_t row = half / 2 * 64 + half % 2 * 8 + (threadIdx.x & 96) / 2 + ptx::lane_id() / 4;
        unsigned char* const out = static_cast<unsigned char*>(p.out) + static_cast<int64_t>(tile.row + row) * p.out_row_stride * bytes;
#pragma unroll
        for (uint32_t group = 0; group < Columns / 32; ++group) {
            float v[8];
#pragma unroll
            for (uint32_t i = 0; i < 8; ++i) v[i] = sums.d[half / 2][16 * group + i / 2 * 4 + half % 2 * 2 + i % 2];
            store_row<DType>(p, out, row < tile.rows, tile.column * Columns + group * 32, v);
        }
    }
}

// The place of the tile in a mailbox.
MOE_DEVICE Tile read_mail(const Ring& ring, uint32_t box) {
    const uint4 mail = ptx::load_shared_128(ring.mail(box));
    return Tile{mail.x, mail.y, mail.z, mail.w, 0};
}

// Factor, bias, activation, rounding, store of the tile in `box`; the sums are used up.
template <uint32_t DType, bool Gated>
MOE_DEVICE void finish(const grouped::GroupedGemmParams& p, const Ring& ring, uint32_t box, Sums& sums) {
    constexpr uint32_t BLOCKS = TILE_N / 8;
    const epilogue::Activation& a = p.activation;
    if (p.input_scale != nullptr) scale_rows(sums, ring.side(box));
    if (Gated && p.gate_bias != nullptr) add_bias<0, BLOCKS / 2>(sums, ring.side(box));
    if (p.up_bias != nullptr) add_bias<Gated ? BLOCKS / 2 : 0, BLOCKS>(sums, ring.side(box));
    // A bare product has nothing to do here.
    if (Gated || a.kind != epilogue::Identity || a.gate_max < numerics::infinity() || a.result_max < numerics::infinity()) {
        activate<Gated>(a, sums);
    }
    store<DType, Gated ? TILE_N / 2 : TILE_N>(p, read_mail(ring, box), sums);
}

// Consumer `which` (0 or 1) takes tiles which, which + 2, ... of this CTA.
template <uint32_t DType, bool Gated>
MOE_DEVICE void consume(const grouped::GroupedGemmParams& p, const Ring& ring, uint32_t which) {
    const uint32_t steps = (p.k + TILE_K - 1) / TILE_K;
    for (uint32_t index = which;; index += CONSUMERS) {
        const Place mail = Place::after<MAILBOXES>(index);
        ptx::mbarrier_wait(ring.posted(mail.stage), mail.parity);
        const Tile tile = read_mail(ring, mail.stage);
        if (!tile.exists()) break;
        fill_side<Gated>(p, tile, ring.side(mail.stage));
        ptx::barrier_sync(1 + which, 128);
        // The turn: the products of the tile before are issued.
        if (index != 0) ptx::mbarrier_wait(ring.issued(1 - which), (index - 1) / CONSUMERS & 1);
        Sums sums;
        multiply<DType>(sums, ring, Place::after<STAGES>(index % (2 * STAGES) * (steps % (2 * STAGES))), steps, ring.issued(which));
        finish<DType, Gated>(p, ring, mail.stage, sums);
        __syncwarp();
        if (ptx::lane_id() == 0) ptx::mbarrier_arrive(ring.taken(index % MAILBOXES));
    }
}

}  // namespace sm90
