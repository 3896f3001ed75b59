// Warp intrinsics, barriers, shared memory, atomics: right code gives right answers under every seed, wrong code is caught.
#include <stdio.h>

#include "harness.h"
#include "ptx.cuh"

using selftest::expect;
using selftest::expect_report;
using selftest::kSeeds;
using selftest::run;
using selftest::Test;

struct Params {
    uint32_t* out;
    const uint32_t* in;
    uint32_t n, mode;
};

// ---- right code ----

extern "C" __global__ void selftest_warp(const __grid_constant__ Params p) {
    const uint32_t lane = threadIdx.x % 32, v = p.in[threadIdx.x];
    uint32_t* out = p.out + threadIdx.x * 16;
    out[0] = __shfl_sync(0xffffffff, v, 5);
    out[1] = __shfl_sync(0xffffffff, v, lane + 3, 8);
    out[2] = __shfl_up_sync(0xffffffff, v, 2);
    out[3] = __shfl_down_sync(0xffffffff, v, 7, 16);
    out[4] = __shfl_xor_sync(0xffffffff, v, 9);
    out[5] = __ballot_sync(0xffffffff, v & 1);
    out[6] = __any_sync(0xffffffff, v == 77) + 2 * __all_sync(0xffffffff, v != 0);
    out[7] = __match_any_sync(0xffffffff, v % 4);
    out[8] = __reduce_add_sync(0xffffffff, v);
    out[9] = __reduce_max_sync(0xffffffff, static_cast<int>(v) - 50);
    out[10] = __reduce_min_sync(0xffffffff, v);
    // Two halves of the warp in different code.
    if (lane < 16) {
        out[11] = __shfl_xor_sync(0x0000ffff, v, 1);
    } else {
        out[11] = __reduce_add_sync(0xffff0000, v);
    }
    const double wide = __shfl_sync(0xffffffff, static_cast<double>(v) * 0.5, 31);
    out[12] = static_cast<uint32_t>(2 * wide);
    out[13] = ptx::elect_one();
    __syncwarp();
}
MOE_KERNEL(selftest_warp)

extern "C" __global__ void selftest_reverse(const __grid_constant__ Params p) {
    MOE_SHARED(uint32_t[256], shared);
    MOE_SHARED(uint32_t, total);
    if (threadIdx.x == 0) total = 0;
    shared[threadIdx.x] = p.in[threadIdx.x];
    if (p.mode != 1) __syncthreads();
    p.out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
    atomicAdd(&total, threadIdx.x);
    __syncthreads();
    p.out[blockDim.x + threadIdx.x] = total + static_cast<uint32_t>(__syncthreads_count(threadIdx.x % 3 == 0));
}
MOE_KERNEL(selftest_reverse)

// Lanes hand values on through shared memory; mode 1 forgets __syncwarp.
extern "C" __global__ void selftest_syncwarp(const __grid_constant__ Params p) {
    MOE_DYNAMIC_SHARED(bytes);
    uint32_t* shared = reinterpret_cast<uint32_t*>(bytes);
    shared[threadIdx.x] = p.in[threadIdx.x];
    if (p.mode != 1) __syncwarp();
    p.out[threadIdx.x] = shared[threadIdx.x ^ 1];
}
MOE_KERNEL(selftest_syncwarp)

// Named barriers between two producers and two consumers.
extern "C" __global__ void selftest_named(const __grid_constant__ Params p) {
    MOE_SHARED(uint32_t[64], shared);
    for (uint32_t i = 0; i < p.n; ++i) {
        if (threadIdx.x < 64) {
            if (i) ptx::barrier_sync(2, 128);
            shared[threadIdx.x] = i * 64 + threadIdx.x;
            ptx::barrier_arrive(1, 128);
        } else {
            ptx::barrier_sync(1, 128);
            p.out[i * 64 + threadIdx.x - 64] = shared[threadIdx.x - 64];
            if (i + 1 < p.n) ptx::barrier_arrive(2, 128);
        }
    }
}
MOE_KERNEL(selftest_named)

// A ticket per block, and the last block adds up what the others wrote.
extern "C" __global__ void selftest_last_block(const __grid_constant__ Params p) {
    MOE_SHARED(uint32_t, ticket);
    p.out[2 + blockIdx.x * blockDim.x + threadIdx.x] = p.in[threadIdx.x] + blockIdx.x;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) ticket = ptx::atomic_add_acq_rel(p.out, 1);
    __syncthreads();
    if (ticket != gridDim.x - 1 || threadIdx.x != 0) return;
    uint32_t sum = 0;
    for (uint32_t i = 0; i < gridDim.x * blockDim.x; ++i) sum += p.out[2 + i];
    p.out[1] = sum;
}
MOE_KERNEL(selftest_last_block)

// ---- wrong code ----

extern "C" __global__ void selftest_wrong(const __grid_constant__ Params p) {
    MOE_SHARED(uint32_t[32], shared);
    MOE_DYNAMIC_SHARED(dynamic);
    const uint32_t lane = threadIdx.x % 32;
    switch (p.mode) {
        case 0: p.out[threadIdx.x] = shared[lane]; break;                                // uninitialised
        case 1: __shfl_sync(lane == 3 ? 0x7fffffff : 0xffffffff, lane, 0); break;        // masks differ
        case 2: __shfl_sync(0xfffffff0, lane, 4); break;                                 // the caller is not in its mask
        case 3: if (lane < 31) __ballot_sync(0xffffffff, 1); else __syncwarp(); break;   // different operations
        case 4: if (lane != 7) __syncwarp(); else __syncthreads(); break;                // nobody can go on
        case 5: ptx::store_shared_32(ptx::shared_address(dynamic) + 60 + 4 * (lane == 9), 1); break;
        case 6: ptx::load_shared_128(ptx::shared_address(dynamic) + 4 * (lane == 9)); break;
        case 7: ptx::barrier_sync(1, lane & 1 ? 64 : 32); break;       
        case 8: if (lane == 0) while (ptx::load_acquire(p.out) != 5) {} break;           // for a value that never comes
        case 9: shared[lane + p.n] = 1; break;                                           // out of bounds: AddressSanitizer
        case 10: p.out[lane + p.n] = 1; break;
        case 11: if (lane == 9) p.out[0] = ptx::load_nc_128(p.in + 1).x; break;          // misaligned
        default: ptx::trap();
    }
}
MOE_KERNEL(selftest_wrong)

// ---- tests ----

namespace {

const Test warp("warp intrinsics", [] {
    std::vector<uint32_t> in(64), out(64 * 16);
    for (uint32_t i = 0; i < 64; ++i) in[i] = (i * 37 + 11) % 101 + 1;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        const Params p = {out.data(), in.data(), 0, 0};
        const std::string report = run("selftest_warp", {1, 64}, &p, seed);
        expect(report.empty(), report.c_str(), seed);
        for (uint32_t w = 0; w < 2; ++w) {
            const uint32_t* v = &in[32 * w];
            uint32_t odd = 0, any = 0, sum = 0, high = 0, most = 0, least = ~0u;
            for (uint32_t i = 0; i < 32; ++i) {
                odd |= (v[i] & 1) << i;
                any |= v[i] == 77;
                sum += v[i];
                high += i >= 16 ? v[i] : 0;
                most = v[i] > most ? v[i] : most;
                least = v[i] < least ? v[i] : least;
            }
            uint32_t elected = 0;
            for (uint32_t i = 0; i < 32; ++i) {
                const uint32_t* o = &out[(32 * w + i) * 16];
                uint32_t same = 0;
                for (uint32_t j = 0; j < 32; ++j) same |= static_cast<uint32_t>(v[j] % 4 == v[i] % 4) << j;
                expect(o[0] == v[5] && o[1] == v[i / 8 * 8 + (i + 3) % 8], "shfl", seed);
                expect(o[2] == (i >= 2 ? v[i - 2] : v[i]), "shfl_up", seed);
                expect(o[3] == (i % 16 + 7 < 16 ? v[i + 7] : v[i]), "shfl_down, width 16", seed);
                expect(o[4] == v[i ^ 9], "shfl_xor", seed);
                expect(o[5] == odd && o[6] == any + 2, "votes", seed);
                expect(o[7] == same, "match", seed);
                expect(o[8] == sum && o[9] == most - 50 && o[10] == least, "reductions", seed);
                expect(o[11] == (i < 16 ? v[i ^ 1] : high), "half a warp each", seed);
                expect(o[12] == v[31], "8 bytes", seed);
                elected += o[13];
            }
            expect(elected == 1, "elect.sync", seed);
        }
    }
});

const Test block("shared memory and __syncthreads; a missing barrier shows", [] {
    std::vector<uint32_t> in(256), out(512);
    for (uint32_t i = 0; i < 256; ++i) in[i] = i * i + 1;
    int wrong_without = 0;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        for (uint32_t mode = 0; mode < 2; ++mode) {
            const Params p = {out.data(), in.data(), 0, mode};
            expect(run("selftest_reverse", {1, 256}, &p, seed).empty(), "no report", seed);
            bool right = true;
            for (uint32_t i = 0; i < 256; ++i) right &= out[i] == in[255 - i];
            if (mode == 0) expect(right && out[256] == 255 * 128 + 86, "values", seed);
            if (mode == 1) wrong_without += !right;
        }
    }
    expect(wrong_without == static_cast<int>(kSeeds), "the missing __syncthreads shows under every seed");
});

const Test syncwarp("a missing __syncwarp shows", [] {
    std::vector<uint32_t> in(32), out(32);
    for (uint32_t i = 0; i < 32; ++i) in[i] = i + 100;
    int wrong_without = 0;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        for (uint32_t mode = 0; mode < 2; ++mode) {
            const Params p = {out.data(), in.data(), 0, mode};
            expect(run("selftest_syncwarp", {1, 32, 128}, &p, seed).empty(), "no report", seed);
            bool right = true;
            for (uint32_t i = 0; i < 32; ++i) right &= out[i] == in[i ^ 1];
            if (mode == 0) expect(right, "values", seed);
            if (mode == 1) wrong_without += !right;
        }
    }
    expect(wrong_without == static_cast<int>(kSeeds), "the missing __syncwarp shows under every seed");
});

const Test named("named barriers", [] {
    std::vector<uint32_t> out(640);
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        std::fill(out.begin(), out.end(), 0);
        const Params p = {out.data(), nullptr, 10, 0};
        expect(run("selftest_named", {1, 128}, &p, seed).empty(), "no report", seed);
        bool right = true;
        for (uint32_t i = 0; i < 640; ++i) right &= out[i] == i;
        expect(right, "values", seed);
    }
});

const Test grid("blocks in any order, the last one sums", [] {
    std::vector<uint32_t> in(32), out(2 + 7 * 32);
    for (uint32_t i = 0; i < 32; ++i) in[i] = i;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        out[0] = out[1] = 0;
        const Params p = {out.data(), in.data(), 0, 0};
        expect(run("selftest_last_block", {7, 32}, &p, seed).empty(), "no report", seed);
        expect(out[1] == 7 * 496 + 21 * 32, "sum", seed);
    }
});

std::string wrong(uint32_t mode, uint64_t seed) {
    alignas(16) static uint32_t data[128] = {};
    const Params p = {data, data, 4, mode};
    return run("selftest_wrong", {1, 64, 64}, &p, seed);
}

const Test caught("wrong code is reported", [] {
    for (uint64_t seed = 0; seed < 4; ++seed) {
        expect_report(wrong(1, seed), "all lanes of a mask must come to the same operation");
        expect_report(wrong(2, seed), "does not name the calling lane");
        expect_report(wrong(3, seed), "all lanes of a mask must come to the same operation");
        expect_report(wrong(4, seed), "deadlock");
        expect_report(wrong(4, seed), "__syncwarp");
        expect_report(wrong(5, seed), "outside of the block's shared memory");
        expect_report(wrong(6, seed), "is not a multiple of 16");
        expect_report(wrong(7, seed), "this thread counts");
        expect_report(wrong(11, seed), "is not a multiple of 16");
        expect_report(wrong(12, seed), "trap");
    }
    expect_report(wrong(8, 1), "livelock");
    expect_report(wrong(4, 1), "selftest_wrong kernels/emulator/selftest/basics.cu");  // names the line
});

const Test uninitialised("uninitialised shared memory reads as poison", [] {
    std::vector<uint32_t> out(64);
    const Params p = {out.data(), nullptr, 0, 0};
    expect(run("selftest_wrong", {1, 64, 64}, &p, 1).empty(), "no report");
    for (uint32_t v : out) expect(v == 0xffffffff, "poison");
});

const Test bounds("AddressSanitizer sees accesses beyond shared and global memory", [] {
    for (uint32_t mode = 9; mode < 11; ++mode) {
        expect(selftest::sanitizer_stops([mode] {
            uint32_t* data = new uint32_t[32];  // mode 10 writes to the elements 4 to 35
            const Params p = {data, data, 4, mode};
            run("selftest_wrong", {1, 64, 64}, &p, 1);
        }), mode == 9 ? "shared" : "global");
    }
});

}  // namespace
