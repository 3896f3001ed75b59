// From expert ids to rows, stably: `ids` [T, K] to `counts`, `offsets`, `pair_of_row` and its inverse `row_of_pair`. One right answer, that of
// src/permute.rs, so nothing here may depend on the order in which threads run: atomics only count, and addition of integers commutes.
//
// The easy version:
//     for pair: count[ids[pair]] += 1;   offset = exclusive scan of count, each rounded up to `block`
//     for pair: row = next[ids[pair]]++;   pair_of_row[row] = pair;   row_of_pair[pair] = row
//
// ONE LAUNCH, moe_permute_one, up to 65536 pairs. A block owns a chunk of 1024 pairs and needs two things from all others: how many pairs of each
// expert there are, and how many of them come before its chunk. It counts both itself, over all ids, and so needs no other block: no grid-wide
// barrier, no workspace, no flag that somebody must reset. Reading everything in every block sounds wasteful and is not: 8192 x 8 pairs are
// 256 KB, which stay in the L2; 64 blocks read 16 MB of it, 3 us at 5.5 TB/s. Counting is one shared-memory atomic for 32 ids, 2048 of them, some 3.5
// cycles each where 32 random ids meet in 32 banks (ids that are the same are added up by the hardware: ATOMS.POPC.INC), 4 to 5 us; the rest, ranking
// and storing one chunk, is 2 us; with 2.5 us for a launch, below 12 us.
//   The floor is 768 KB of traffic, 0.2 us, and one launch: it is latency that costs. One block alone would have to read and write all 768 KB through
//   one multiprocessor, at 64 bytes a cycle 7 us, and rank 2048 warps' worth of pairs: above 20 us. Counting on three launches wins from here on.
//
// THREE LAUNCHES for more pairs: moe_permute_count (one histogram a chunk), moe_permute_columns (their prefix sums over the chunks, expert by
// expert), moe_permute_place (offsets, computed by each block for itself, and the rows of one chunk). Ids are read twice, both permutations
// written once: 16 bytes a pair, 1 M pairs in 16 MB, which the L2 holds; the scattered 4-byte stores are 1 M sectors, some 6 us.
//
// RANKING, the same in both: each of 16 warps takes 64 neighbouring pairs in two steps of 32. `__match_any_sync` tells a lane which lanes have its
// expert; the first of them adds their number to the byte table[expert][warp]. After a barrier a row of 16 bytes says for an expert how many pairs
// each warp has, and one 16-byte load gives a lane the number of those in earlier warps. Bytes suffice: a warp has 64 pairs.
// Memory: 16 + 8 bytes an expert, 96 KiB for 4096: what every GPU from sm_86 on gives a block.
#include "ptx.cuh"

namespace {

constexpr uint32_t NONE = 0xffffffffu;  // no pair, no row
constexpr uint32_t WARPS = 16, THREADS = WARPS * 32;
constexpr uint32_t STEPS = 2, ROUND = THREADS * STEPS;  // pairs that a block ranks at a time
constexpr uint32_t ALL = 0xffffffffu;

}  // namespace

// Mirrored in src/cuda/permute.rs.
struct PermuteParams {
    const int32_t* ids;     // [pairs]; those outside first .. first + local get no row
    int32_t* counts;        // [experts]
    int32_t* offsets;       // [experts + 1]
    uint32_t* pair_of_row;  // [capacity]; NONE in padding rows and from offsets[experts] on
    uint32_t* row_of_pair;  // [pairs]
    uint32_t* partial;      // [chunks, local], for three launches
    uint32_t* totals;       // [local], for three launches
    uint32_t pairs, experts, first, local;
    uint32_t block, capacity, chunk, chunks;  // chunk: pairs of a block, a multiple of ROUND
};
static_assert(sizeof(PermuteParams) == 88, "as in Rust");

namespace {

// The dynamic shared memory of the kernels that place pairs.
struct Tables {
    unsigned char* table;  // [local][16]: pairs of each warp in this round; all zero between rounds
    uint32_t* next;        // [local]: the row of the next pair of this chunk
    uint32_t* ends;        // [local]: counts, then the row after the expert's last
};

MOE_DEVICE Tables tables(unsigned char* shared, uint32_t local) {
    const auto words = reinterpret_cast<uint32_t*>(shared + size_t{16} * local);
    return {shared, words, words + local};
}

MOE_DEVICE uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

MOE_DEVICE uint32_t round_up(uint32_t n, uint32_t block) { return block == 1 ? n : (n + block - 1) / block * block; }

// The local expert of an id; `local` or more for an id that gets no row. Below `first`, and so below zero, it wraps to a large number.
MOE_DEVICE uint32_t expert_of(const PermuteParams& p, uint32_t id) { return id - p.first; }

MOE_DEVICE void tally(const PermuteParams& p, uint32_t* counts, uint32_t id) {
    const uint32_t expert = expert_of(p, id);
    if (expert < p.local) atomicAdd(&counts[expert], 1u);
}

// Counts the pairs begin .. end: those before `split` in `before`, the others in `rest`. `begin` and `split` are multiples of ROUND.
MOE_DEVICE void count(const PermuteParams& p, uint32_t begin, uint32_t end, uint32_t split, uint32_t* before, uint32_t* rest) {
    uint32_t done = begin;
    if (reinterpret_cast<uintptr_t>(p.ids) % 16 == 0) {
        constexpr uint32_t AT_ONCE = 4;  // loads of 16 bytes in flight
        const uint32_t quads = end / 4;
        for (uint32_t quad = begin / 4 + threadIdx.x; quad < quads; quad += AT_ONCE * THREADS) {
            uint4 ids[AT_ONCE];
#pragma unroll
            for (uint32_t i = 0; i < AT_ONCE; ++i) {
                const uint32_t q = quad + i * THREADS;
                ids[i] = q < quads ? ptx::load_nc_128(p.ids + size_t{4} * q) : make_uint4(NONE, NONE, NONE, NONE);
            }
#pragma unroll
            for (uint32_t i = 0; i < AT_ONCE; ++i) {
                uint32_t* const counts = (quad + i * THREADS) * 4 < split ? before : rest;
                tally(p, counts, ids[i].x);
                tally(p, counts, ids[i].y);
                tally(p, counts, ids[i].z);
                tally(p, counts, ids[i].w);
            }
        }
        done = end & ~3u;
    }
#pragma unroll 4
    for (uint32_t pair = done + threadIdx.x; pair < end; pair += THREADS) {
        tally(p, pair < split ? before : rest, ptx::load_nc_32(p.ids + pair));
    }
}

// From counts, in `ends`, to offsets: adds them to `next`, puts the row after each expert's last into `ends`, and writes both arrays in one block.
// Returns the number of rows. Each thread has neighbouring experts; warps scan by shuffles. All threads of the block call it.
MOE_DEVICE uint32_t place_experts(const PermuteParams& p, const Tables& t) {
    MOE_SHARED(uint32_t[WARPS], sums);
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t each = (p.local + THREADS - 1) / THREADS;
    const uint32_t begin = smaller(threadIdx.x * each, p.local), end = smaller(begin + each, p.local);
    uint32_t mine = 0;
#pragma unroll 1
    for (uint32_t e = begin; e < end; ++e) mine += round_up(t.ends[e], p.block);
    uint32_t offset = mine;
#pragma unroll
    for (uint32_t distance = 1; distance < 32; distance *= 2) {
        const uint32_t other = __shfl_up_sync(ALL, offset, distance);
        if (lane >= distance) offset += other;
    }
    if (lane == 31) sums[warp] = offset;
    __syncthreads();
    offset -= mine;
    uint32_t rows = 0;
#pragma unroll
    for (uint32_t w = 0; w < WARPS; ++w) {
        const uint32_t sum = sums[w];
        if (w < warp) offset += sum;
        rows += sum;
    }
    const bool writes = blockIdx.x == 0;
#pragma unroll 1
    for (uint32_t e = begin; e < end; ++e) {
        const uint32_t pairs = t.ends[e];
        if (writes) {
            p.counts[p.first + e] = static_cast<int32_t>(pairs);
            p.offsets[p.first + e] = static_cast<int32_t>(offset);
        }
        t.next[e] += offset;
        t.ends[e] = offset + pairs;
        offset += round_up(pairs, p.block);
    }
    if (writes) {
        const uint32_t last = p.first + p.local;
#pragma unroll 1
        for (uint32_t e = threadIdx.x; e < p.first; e += THREADS) p.counts[e] = p.offsets[e] = 0;
#pragma unroll 1
        for (uint32_t e = last + threadIdx.x; e < p.experts; e += THREADS) p.counts[e] = 0;
#pragma unroll 1
        for (uint32_t e = last + threadIdx.x; e <= p.experts; e += THREADS) p.offsets[e] = static_cast<int32_t>(rows);
    }
    __syncthreads();
    return rows;
}

// Marks the rows without a pair; the experts and the rows after the last are shared out over the whole grid.
MOE_DEVICE void mark_padding(const PermuteParams& p, const Tables& t, uint32_t rows) {
    const uint32_t thread = blockIdx.x * THREADS + threadIdx.x, threads = gridDim.x * THREADS;
    if (p.block > 1) {
#pragma unroll 1
        for (uint32_t e = thread / 32; e < p.local; e += threads / 32) {
            // An expert begins at a multiple of the block, so it ends at the next one.
            const uint32_t end = t.ends[e], next = round_up(end, p.block);
#pragma unroll 1
            for (uint32_t row = end + threadIdx.x % 32; row < next; row += 32) p.pair_of_row[row] = NONE;
        }
    }
#pragma unroll 1
    for (uint32_t row = rows + thread; row < p.capacity; row += threads) p.pair_of_row[row] = NONE;
}

// The sum of 16 bytes, of which each is below 128.
MOE_DEVICE uint32_t sum_of_bytes(uint4 v) {
    constexpr uint32_t EVEN = 0x00ff00ffu;
    const uint32_t sum = (v.x & EVEN) + (v.x >> 8 & EVEN) + (v.y & EVEN) + (v.y >> 8 & EVEN) + (v.z & EVEN) + (v.z >> 8 & EVEN) +
                         (v.w & EVEN) + (v.w >> 8 & EVEN);
    return (sum & 0xffffu) + (sum >> 16);
}

// The bytes of word `word` of a row of the table that belong to warps before `warp`.
MOE_DEVICE uint32_t bytes_before(uint32_t warp, uint32_t word) {
    return warp >= 4 * word + 4 ? ALL : warp <= 4 * word ? 0 : (1u << 8 * (warp - 4 * word)) - 1;
}

// Gives rows to the pairs begin .. end, ROUND at a time. `next` is the row of the chunk's first pair of each expert. All threads of the block call it.
MOE_DEVICE void place_pairs(const PermuteParams& p, const Tables& t, uint32_t begin, uint32_t end) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t below = (1u << lane) - 1;
    const uint4 before = make_uint4(bytes_before(warp, 0), bytes_before(warp, 1), bytes_before(warp, 2), bytes_before(warp, 3));
    for (uint32_t round = begin; round < end; round += ROUND) {
        const uint32_t first = round + warp * (32 * STEPS) + lane;
        uint32_t expert[STEPS], rank[STEPS];
#pragma unroll
        for (uint32_t s = 0; s < STEPS; ++s) {
            const uint32_t pair = first + 32 * s;
            expert[s] = pair < end ? smaller(expert_of(p, ptx::load_nc_32(p.ids + pair)), p.local) : p.local;
        }
#pragma unroll
        for (uint32_t s = 0; s < STEPS; ++s) {
            const bool placed = expert[s] < p.local;
            const uint32_t same = __match_any_sync(ALL, expert[s]);
            unsigned char* const mine = &t.table[size_t{16} * expert[s] + warp];
            const uint32_t earlier = placed ? *mine : 0;
            __syncwarp();
            if (placed && (same & below) == 0) *mine = static_cast<unsigned char>(earlier + __popc(same));
            __syncwarp();
            rank[s] = earlier + __popc(same & below);
        }
        __syncthreads();
        bool last[STEPS];
#pragma unroll
        for (uint32_t s = 0; s < STEPS; ++s) {
            const uint32_t pair = first + 32 * s;
            last[s] = false;
            if (expert[s] < p.local) {
                const uint4 v = ptx::load_shared_128(ptx::shared_address(&t.table[size_t{16} * expert[s]]));
                const uint4 w = make_uint4(v.x & before.x, v.y & before.y, v.z & before.z, v.w & before.w);
                rank[s] += sum_of_bytes(w);
                last[s] = rank[s] + 1 == sum_of_bytes(v);
                rank[s] += t.next[expert[s]];  // now the row
                p.pair_of_row[rank[s]] = pair;
                p.row_of_pair[pair] = rank[s];
            } else if (pair < end) {
                p.row_of_pair[pair] = NONE;
            }
        }
        if (end - round <= ROUND) break;
        __syncthreads();
#pragma unroll
        for (uint32_t s = 0; s < STEPS; ++s) {
            if (last[s]) {
                t.next[expert[s]] = rank[s] + 1;
                ptx::store_shared_128(ptx::shared_address(&t.table[size_t{16} * expert[s]]), make_uint4(0, 0, 0, 0));
            }
        }
        __syncthreads();
    }
}

MOE_DEVICE void clear_table(const PermuteParams& p, const Tables& t) {
    for (uint32_t e = threadIdx.x; e < p.local; e += THREADS) {
        ptx::store_shared_128(ptx::shared_address(&t.table[size_t{16} * e]), make_uint4(0, 0, 0, 0));
    }
}

}  // namespace

// Everything in one launch. Grid: one block for each chunk of ROUND pairs, at least one. Shared: 24 bytes for each local expert.
extern "C" __global__ void __launch_bounds__(THREADS) moe_permute_one(const __grid_constant__ PermuteParams p) {
    MOE_DYNAMIC_SHARED(shared);
    const Tables t = tables(shared, p.local);
    const uint32_t begin = blockIdx.x * ROUND, end = smaller(begin + ROUND, p.pairs);
    clear_table(p, t);
    for (uint32_t e = threadIdx.x; e < p.local; e += THREADS) t.next[e] = t.ends[e] = 0;
    __syncthreads();
    count(p, 0, p.pairs, begin, t.next, t.ends);
    __syncthreads();
    // `next` has the pairs before the chunk; all of them make the counts.
    for (uint32_t e = threadIdx.x; e < p.local; e += THREADS) t.ends[e] += t.next[e];
    __syncthreads();
    const uint32_t rows = place_experts(p, t);
    mark_padding(p, t, rows);
    place_pairs(p, t, begin, end);
}
MOE_KERNEL(moe_permute_one)

// First of three: partial[chunk][e] = pairs of e in the chunk. Grid: chunks. Shared: 4 bytes for each local expert.
extern "C" __global__ void __launch_bounds__(THREADS) moe_permute_count(const __grid_constant__ PermuteParams p) {
    MOE_DYNAMIC_SHARED(shared);
    const auto counts = reinterpret_cast<uint32_t*>(shared);
    const uint32_t begin = blockIdx.x * p.chunk, end = begin + smaller(p.chunk, p.pairs - begin);
    for (uint32_t e = threadIdx.x; e < p.local; e += THREADS) counts[e] = 0;
    __syncthreads();
    count(p, begin, end, begin, counts, counts);
    __syncthreads();
    uint32_t* const partial = p.partial + size_t{blockIdx.x} * p.local;
    for (uint32_t e = threadIdx.x; e < p.local; e += THREADS) partial[e] = counts[e];
}
MOE_KERNEL(moe_permute_count)

// Second of three: partial[chunk][e] becomes the pairs of e in earlier chunks; totals[e] = all of them. Grid: local / 32, rounded up. A lane has an
// expert, a warp a 32nd of the chunks: it adds them up, learns what the warps before it have, and goes through them again.
extern "C" __global__ void __launch_bounds__(1024) moe_permute_columns(const __grid_constant__ PermuteParams p) {
    MOE_SHARED(uint32_t[32 * 32], sums);
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, expert = blockIdx.x * 32 + lane;
    const uint32_t each = (p.chunks + 31) / 32;
    const uint32_t begin = smaller(warp * each, p.chunks), end = smaller(begin + each, p.chunks);
    const bool inside = expert < p.local;
    uint32_t* const column = p.partial + expert;
    uint32_t sum = 0;
    if (inside) {
#pragma unroll 8
        for (uint32_t c = begin; c < end; ++c) sum += column[size_t{c} * p.local];
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    uint32_t before = 0;
    for (uint32_t w = 0; w < warp; ++w) before += sums[w * 32 + lane];
    if (!inside) return;
    if (warp == 31) p.totals[expert] = before + sum;
    constexpr uint32_t AT_ONCE = 8;  // loads in flight: the compiler may not move them over the stores
    for (uint32_t c = begin; c < end; c += AT_ONCE) {
        uint32_t pairs[AT_ONCE];
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; ++i) pairs[i] = c + i < end ? column[size_t{c + i} * p.local] : 0;
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; ++i) {
            if (c + i < end) column[size_t{c + i} * p.local] = before;
            before += pairs[i];
        }
    }
}
MOE_KERNEL(moe_permute_columns)

// Third of three: offsets, counts, both permutations. Grid: chunks. Shared: 24 bytes for each local expert.
extern "C" __global__ void __launch_bounds__(THREADS) moe_permute_place(const __grid_constant__ PermuteParams p) {
    MOE_DYNAMIC_SHARED(shared);
    const Tables t = tables(shared, p.local);
    const uint32_t begin = blockIdx.x * p.chunk, end = begin + smaller(p.chunk, p.pairs - begin);
    clear_table(p, t);
    const uint32_t* const partial = p.partial + size_t{blockIdx.x} * p.local;
    for (uint32_t e = threadIdx.x; e < p.local; e += THREADS) {
        t.next[e] = begin < p.pairs ? partial[e] : 0;  // a block without pairs has no histogram
        t.ends[e] = p.totals[e];
    }
    __syncthreads();
    const uint32_t rows = place_experts(p, t);
    mark_padding(p, t, rows);
    place_pairs(p, t, begin, end);
}
MOE_KERNEL(moe_permute_place)

// Copies of rows, `out[i] = src[index[i] / divisor]`, zeros where the index is NONE: rows for tokens (index = pair_of_row, divisor = K) and back
// (index = row_of_pair, divisor = 1). Bytes, so for every format. Mirrored in src/cuda/permute.rs.
struct PermuteRowsParams {
    const unsigned char* src;  // [src_rows]
    unsigned char* out;        // [rows]
    const uint32_t* index;     // [rows]
    const int32_t* used;       // one number: rows from there on are left as they are; null: none are
    uint64_t src_stride, out_stride, row_bytes;
    uint32_t rows, src_rows, divisor, unused;
};
static_assert(sizeof(PermuteRowsParams) == 72, "as in Rust");

namespace {

struct Access16 {
    using Value = uint4;
    static MOE_DEVICE Value zero() { return make_uint4(0, 0, 0, 0); }
    static MOE_DEVICE Value load(const unsigned char* at) { return ptx::load_nc_128(at); }
    static MOE_DEVICE void store(unsigned char* at, Value v) { ptx::store_128(at, v); }
};

template <class T>
struct Access {
    using Value = T;
    static MOE_DEVICE Value zero() { return 0; }
    static MOE_DEVICE Value load(const unsigned char* at) { return __ldg(reinterpret_cast<const T*>(at)); }
    static MOE_DEVICE void store(unsigned char* at, Value v) { *reinterpret_cast<T*>(at) = v; }
};

// A warp copies AT_ONCE·32 values of a row, all loads before the first store: 2 KiB on the way for each warp, 128 KiB on a full multiprocessor, where
// 30 KiB cover the latency at 4.8 TB/s. The floor is the bytes: T rows read (K times, K − 1 of them from the L2), T·K rows written.
template <class A>
MOE_DEVICE void copy_rows(const PermuteRowsParams& p) {
    using Value = typename A::Value;
    constexpr uint32_t AT_ONCE = 4, LEN = AT_ONCE * 32 * sizeof(Value);
    const uint32_t rows = p.used == nullptr ? p.rows : smaller(p.rows, static_cast<uint32_t>(__ldg(p.used)));
    const uint64_t parts = (p.row_bytes + LEN - 1) / LEN;
    const uint64_t warp = (uint64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32, warps = uint64_t{gridDim.x} * blockDim.x / 32;
    const uint64_t row_step = warps / parts, part_step = warps % parts;  // one division here, none in the loop
    uint64_t row = warp / parts, part = warp % parts;
    while (row < rows) {
        const uint32_t from = __ldg(p.index + row);
        const uint32_t src = p.divisor == 1 ? from : from / p.divisor;
        const bool there = from != NONE && src < p.src_rows;
        const unsigned char* const source = p.src + src * p.src_stride;
        unsigned char* const target = p.out + row * p.out_stride;
        const uint64_t begin = part * LEN + threadIdx.x % 32 * sizeof(Value);
        Value values[AT_ONCE];
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; ++i) {
            const uint64_t at = begin + i * 32 * sizeof(Value);
            values[i] = there && at < p.row_bytes ? A::load(source + at) : A::zero();
        }
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; ++i) {
            const uint64_t at = begin + i * 32 * sizeof(Value);
            if (at < p.row_bytes) A::store(target + at, values[i]);
        }
        row += row_step;
        part += part_step;
        if (part >= parts) {
            part -= parts;
            ++row;
        }
    }
}

}  // namespace

// Addresses, strides and row_bytes must be multiples of the bytes in the name. Grid: any number of blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(256) moe_permute_rows_16(const __grid_constant__ PermuteRowsParams p) { copy_rows<Access16>(p); }
MOE_KERNEL(moe_permute_rows_16)
extern "C" __global__ void __launch_bounds__(256) moe_permute_rows_4(const __grid_constant__ PermuteRowsParams p) { copy_rows<Access<uint32_t>>(p); }
MOE_KERNEL(moe_permute_rows_4)
extern "C" __global__ void __launch_bounds__(256) moe_permute_rows_2(const __grid_constant__ PermuteRowsParams p) { copy_rows<Access<uint16_t>>(p); }
MOE_KERNEL(moe_permute_rows_2)
