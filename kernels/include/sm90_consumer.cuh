// A consumer warpgroup of grouped_gemm_sm90.cu: multiplies the stages of every second tile, then finishes and stores that tile
// while the other warpgroup multiplies the next.
//
// A tile's sums are 128 x 192, 192 registers a thread: two products m64n192k16 (rows 0..63 and 64..127) for each 16 of k. Each sum is
// one chain over k in steps of 16, ascending, whatever the tile's place, so it does not depend on the batch.
//
// The epilogue uses no shared memory and no barrier: bias, activation and rounding in registers, then the four lanes of a quad
// exchange their pairs of columns by shuffle, after which each holds eight neighbours: 16-byte stores, 64 contiguous bytes a
// row. It runs as six rounds of one rolled loop (the activation's code stands once); between rounds the remaining sums move
// down by 32 registers, since a register cannot be addressed by a counter.
#pragma once

#include "grouped.cuh"
#include "sm90_ring.cuh"
#include "sm90_schedule.cuh"

namespace sm90 {

// The sums of a tile: [0] rows 0..63, [1] rows 64..127; wgmma's layout (ptx/wgmma.cuh).
struct Sums {
    float d[2][TILE_N / 2];
};

// One stage: 4 steps of k16 for both halves. The descriptors' low word counts 16 bytes: k16 is 2, 64 rows are 512.
template <uint32_t DType>
MOE_DEVICE void multiply_stage(Sums& sums, uint64_t a, uint64_t b, bool accumulate) {
#pragma unroll
    for (uint32_t k = 0; k < TILE_K / 16; ++k) {
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half) {
            const uint64_t rows = a + half * (64 * ROW_BYTES / 16) + k * 2, columns = b + k * 2;
            if (DType == epilogue::BF16) {
                ptx::wgmma_bf16(sums.d[half], rows, columns, accumulate || k != 0);
            } else {
                ptx::wgmma_f16(sums.d[half], rows, columns, accumulate || k != 0);
            }
        }
    }
}

// This warp has read the stage: one arrival in each CTA of the cluster.
MOE_DEVICE void release(const Ring& ring, uint32_t stage) {
    const uint32_t lane = ptx::lane_id();
    if (lane < ptx::cluster_size()) ptx::mbarrier_arrive_cluster(ptx::map_shared(ring.empty(stage), lane));
}

// A tile's product: leaves the sums complete, the stages released and `place` behind the tile. One batch of products is in
// flight while the next is issued, so the tensor cores never wait for a barrier.
template <uint32_t DType>
MOE_DEVICE void multiply(Sums& sums, const Ring& ring, Place& place, uint32_t steps) {
    const uint64_t a = ptx::wgmma_descriptor(ring.a(0), 16, 8 * ROW_BYTES, ptx::Swizzle::Bytes128);
    const uint64_t b = ptx::wgmma_descriptor(ring.b(0), 16, 8 * ROW_BYTES, ptx::Swizzle::Bytes128);
    uint32_t previous = 0;
    for (uint32_t step = 0; step < steps; ++step) {
        ptx::mbarrier_wait(ring.full(place.stage), place.parity);
        const uint64_t at = place.stage * (STAGE_BYTES / 16);
        ptx::wgmma_fence();
        multiply_stage<DType>(sums, a + at, b + at, step != 0);
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        if (step != 0) release(ring, previous);
        previous = place.stage;
        place.next<STAGES>();
    }
    ptx::wgmma_wait<0>();
    release(ring, previous);
}

// The next 32 sums, and the rest moved down. Gated: 16 of gate, then the 16 of up in the same columns. Plain: 64 columns' worth.
template <bool Gated>
MOE_DEVICE void take(Sums& sums, float (&v)[32]) {
    constexpr int PARTS = Gated ? 2 : 1, PART = 96 / PARTS, STEP = 32 / PARTS;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        float* const low = sums.d[0] + part * PART;
        float* const high = sums.d[1] + part * PART;
#pragma unroll
        for (int i = 0; i < STEP; ++i) v[part * STEP + i] = low[i];
#pragma unroll
        for (int i = 0; i < PART - STEP; ++i) low[i] = low[i + STEP];
#pragma unroll
        for (int i = 0; i < STEP; ++i) low[PART - STEP + i] = high[i];
#pragma unroll
        for (int i = 0; i < PART - STEP; ++i) high[i] = high[i + STEP];
    }
}

// v[at .. at + 16): four n8 blocks from `column` on. The lane's columns are 8j + 2t and the next one, of rows g and g + 8.
MOE_DEVICE void add_bias(const grouped::GroupedGemmParams& p, bool gate, uint32_t expert, uint32_t column, float* v) {
    if ((gate ? p.gate_bias : p.up_bias) == nullptr) return;
    column += ptx::lane_id() % 4 * 2;
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
        const uint32_t c = column + 8 * j;
        if (c >= p.n) continue;  // N is even: c + 1 is inside, too
        const float first = grouped::bias_of(p, gate, expert, c), second = grouped::bias_of(p, gate, expert, c + 1);
        v[4 * j] = __fadd_rn(v[4 * j], first), v[4 * j + 1] = __fadd_rn(v[4 * j + 1], second);
        v[4 * j + 2] = __fadd_rn(v[4 * j + 2], first), v[4 * j + 3] = __fadd_rn(v[4 * j + 3], second);
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

// Rounds and stores v[0 .. 16) as columns `column` .. + 32 of rows `row` and `row` + 8 of the tile, where they exist.
template <uint32_t DType>
MOE_DEVICE void store(const grouped::GroupedGemmParams& p, const Tile& tile, uint32_t row, uint32_t column, const float* v) {
    const uint32_t t = ptx::lane_id() % 4;
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
        const bool real = row + 8 * half < tile.rows;
        const int64_t at = static_cast<int64_t>(tile.row + row + 8 * half) * p.out_row_stride;
        if (p.out_dtype == epilogue::F32) {
            float* const out = static_cast<float*>(p.out) + at + column + 2 * t;
#pragma unroll
            for (uint32_t j = 0; j < 4; ++j) {
                const uint2 pair = make_uint2(__float_as_uint(v[4 * j + 2 * half]), __float_as_uint(v[4 * j + 2 * half + 1]));
                if (real && column + 8 * j < p.n) ptx::store_64(out + 8 * j, pair);
            }
        } else {
            uint32_t words[4];
#pragma unroll
            for (uint32_t j = 0; j < 4; ++j) words[j] = epilogue::pack_pair(DType, v[4 * j + 2 * half], v[4 * j + 2 * half + 1]);
            transpose_quad(words);
            uint16_t* const out = static_cast<uint16_t*>(p.out) + at + column + 8 * t;
            if (real && column + 8 * t < p.n) ptx::store_128(out, make_uint4(words[0], words[1], words[2], words[3]));
        }
    }
}

// Bias, activation, rounding, store of a whole tile; the sums are used up.
template <uint32_t DType, bool Gated>
MOE_DEVICE void finish(const grouped::GroupedGemmParams& p, const Tile& tile, Sums& sums) {
    const uint32_t warp = (threadIdx.x & 127) / 32, g = ptx::lane_id() / 4;
    constexpr uint32_t ROUND = Gated ? 32 : 64;  // columns of a round
#pragma unroll 1
    for (uint32_t round = 0; round < 6; ++round) {
        float v[32];
        take<Gated>(sums, v);
        const uint32_t first = round / 3 * 64 + warp * 16, row = first + g;
        const uint32_t column = tile.column * (3 * ROUND) + round % 3 * ROUND;
        if (first >= tile.rows || column >= p.n) continue;
        if (p.input_scale != nullptr) {
            const float low = row < tile.rows ? grouped::scale_of_row(p, tile.row + row) : 0.0f;
            const float high = row + 8 < tile.rows ? grouped::scale_of_row(p, tile.row + row + 8) : 0.0f;
#pragma unroll
            for (int i = 0; i < 32; ++i) v[i] = __fmul_rn(v[i], i & 2 ? high : low);
        }
        add_bias(p, Gated, tile.expert, column, v);
        add_bias(p, false, tile.expert, Gated ? column : column + 32, v + 16);
        if (Gated) {
            float gate[16], up[16];
#pragma unroll
            for (int i = 0; i < 16; ++i) gate[i] = v[i], up[i] = v[16 + i];
            epilogue::activate(p.activation, gate, up);
            store<DType>(p, tile, row, column, gate);
        } else {
            epilogue::activate(p.activation, v, v);
            store<DType>(p, tile, row, column, v);
            store<DType>(p, tile, row, column + 32, v + 16);
        }
    }
}

// Waits for this consumer's next tile.
MOE_DEVICE Tile receive(const Ring& ring, uint32_t which, uint32_t parity) {
    ptx::mbarrier_wait(ring.posted(which), parity);
    const uint4 mail = ptx::load_shared_128(ring.mail(which));
    __syncwarp();
    if (ptx::lane_id() == 0) ptx::mbarrier_arrive(ring.taken(which));
    return Tile{mail.x, mail.y, mail.z, mail.w, false};
}

// Consumer `which` (0 or 1) takes tiles which, which + 2, ... of this CTA.
template <uint32_t DType, bool Gated>
MOE_DEVICE void consume(const grouped::GroupedGemmParams& p, const Ring& ring, uint32_t which) {
    const uint32_t steps = (p.k + TILE_K - 1) / TILE_K;
    Place place;
    if (which == 1) place.skip<STAGES>(steps);
    for (uint32_t parity = 0;; parity ^= 1) {
        const Tile tile = receive(ring, which, parity);
        if (tile.rows == 0) break;
        Sums sums;
        multiply<DType>(sums, ring, place, steps);
        place.skip<STAGES>(steps);
        finish<DType, Gated>(p, tile, sums);
    }
}

}  // namespace sm90
