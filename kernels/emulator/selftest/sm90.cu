// TMA, mbarriers, wgmma, clusters against plain loops; what breaks the protocol shows.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"
#include "ptx.cuh"

using selftest::expect;
using selftest::expect_report;
using selftest::kSeeds;
using selftest::run;
using selftest::Test;
using selftest::value;

extern "C" int cuTensorMapEncodeTiled(void*, int, unsigned, void*, const uint64_t*, const uint64_t*, const uint32_t*, const uint32_t*, int,
                                      int, int, int);

struct Product90 {
    uint32_t steps, mode, multicast;
};

constexpr uint32_t kN = 32, kStages = 2, kStageBytes = 64 * 128 + kN * 128;

// 64 x 32 output, K in steps of 64: one producer warp, one consumer warpgroup; stored by TMA. With `multicast` the two
// blocks of a cluster share B: each loads half of its rows for both.
// Modes: 1 the consumer does not wait for the data; 2 it frees a stage before the products are done; 3 no wgmma.wait;
// 4 no wgmma.fence; 5 the producer expects too many bytes; 6 no wait for the store; 7 no fence.proxy.async before the store.
extern "C" __global__ void __launch_bounds__(160) selftest_wgmma(const __grid_constant__ Product90 p, const __grid_constant__ TensorMap a_map,
                                                                  const __grid_constant__ TensorMap b_map, const __grid_constant__ TensorMap c_map) {
    MOE_DYNAMIC_SHARED(bytes);
    MOE_SHARED(uint64_t[2 * kStages], barriers);
    const uint32_t base = ptx::shared_address(bytes), full = ptx::shared_address(barriers), empty = full + 8 * kStages;
    const uint32_t blocks = p.multicast ? 2 : 1;
    float d[kN / 2];  // here, so that mode 3 does not write to a variable that is gone
    if (threadIdx.x == 0) {
        for (uint32_t s = 0; s < kStages; ++s) {
            ptx::mbarrier_init(full + 8 * s, 1);
            ptx::mbarrier_init(empty + 8 * s, blocks);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    ptx::cluster_arrive();
    ptx::cluster_wait();
    if (threadIdx.x >= 128) {
        if (threadIdx.x == 128) {
            for (uint32_t i = 0; i < p.steps; ++i) {
                const uint32_t s = i % kStages, a = base + s * kStageBytes, b = a + 64 * 128;
                if (i >= kStages) ptx::mbarrier_wait_cluster(empty + 8 * s, (i / kStages - 1) % 2);
                ptx::mbarrier_arrive_expect_tx(full + 8 * s, kStageBytes + (p.mode == 5 ? 16 : 0));
                ptx::tma_load_2d(a, a_map, full + 8 * s, static_cast<int>(i * 64), static_cast<int>(blockIdx.x * 64));
                if (p.multicast) {
                    const uint32_t half = ptx::cluster_rank() * (kN / 2);
                    ptx::tma_load_2d_multicast(b + half * 128, b_map, full + 8 * s, 3, static_cast<int>(i * 64), static_cast<int>(half));
                } else {
                    ptx::tma_load_2d(b, b_map, full + 8 * s, static_cast<int>(i * 64), 0);
                    ptx::tma_load_2d(b + kN / 2 * 128, b_map, full + 8 * s, static_cast<int>(i * 64), kN / 2);
                }
            }
        }
    } else {
        for (uint32_t i = 0; i < p.steps; ++i) {
            const uint32_t s = i % kStages, a = base + s * kStageBytes, b = a + 64 * 128;
            if (p.mode != 1) ptx::mbarrier_wait(full + 8 * s, i / kStages % 2);
            if (p.mode != 4) ptx::wgmma_fence();
            for (uint32_t k = 0; k < 4; ++k) {
                ptx::wgmma_bf16(d, ptx::wgmma_descriptor(a + 32 * k, 16, 1024, ptx::Swizzle::Bytes128),
                                ptx::wgmma_descriptor(b + 32 * k, 16, 1024, ptx::Swizzle::Bytes128), i + k != 0);
            }
            ptx::wgmma_commit();
            if (p.mode == 0 || p.mode > 3) ptx::wgmma_wait<0>();
            if (p.mode == 1) ptx::wgmma_wait<0>();
            if (threadIdx.x == 0) {
                for (uint32_t block = 0; block < blocks; ++block) {
                    p.multicast ? ptx::mbarrier_arrive_cluster(ptx::map_shared(empty + 8 * s, block)) : ptx::mbarrier_arrive(empty + 8 * s);
                }
            }
            if (p.mode == 2) ptx::wgmma_wait<0>();
        }
        ptx::barrier_sync(1, 128);
        // Into shared memory as [64][32] f32, 128-byte rows, and out by TMA; its stage is free only in the whole cluster.
        const uint32_t row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, out = base + kStages * kStageBytes;
        for (uint32_t i = 0; i < kN / 2; ++i) {
            const uint32_t r = row + i / 2 % 2 * 8, c = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
            ptx::store_shared_32(out + r * 128 + c * 4, __float_as_uint(d[i]));
        }
        if (p.mode != 7) ptx::fence_proxy_async();
        ptx::barrier_sync(1, 128);
        if (threadIdx.x == 0) {
            ptx::tma_store_2d(c_map, out, 0, static_cast<int>(blockIdx.x * 64));
            ptx::bulk_commit();
            if (p.mode != 6) ptx::bulk_wait_read<0>();
        }
    }
    ptx::cluster_arrive();
    ptx::cluster_wait();
}
MOE_KERNEL(selftest_wgmma)

namespace {

TensorMap encode(int type, std::vector<uint64_t> dims, std::vector<uint64_t> strides, std::vector<uint32_t> box, void* data, int swizzle) {
    TensorMap map;
    const uint32_t ones[5] = {1, 1, 1, 1, 1};
    const int result = cuTensorMapEncodeTiled(&map, type, static_cast<unsigned>(dims.size()), data, dims.data(), strides.data(), box.data(), ones, 0,
                                              swizzle, 0, 0);
    expect(result == 0, "cuTensorMapEncodeTiled");
    return map;
}

struct Problem {
    uint32_t rows, depth;
    std::vector<uint16_t> a, b;
    std::vector<float> out;
    std::vector<double> expected;

    Problem(uint32_t m, uint32_t k) : rows(m), depth(k), a(m * k + 8), b(kN * k + 8), out(m * kN + 8), expected(m * kN) {
        for (uint32_t i = 0; i < m * k; ++i) a[i] = emu::f32_to_bf16(value(i));
        for (uint32_t i = 0; i < kN * k; ++i) b[i] = emu::f32_to_bf16(value(i + 31337));
        for (uint32_t r = 0; r < m; ++r) {
            for (uint32_t n = 0; n < kN; ++n) {
                for (uint32_t i = 0; i < k; ++i) expected[r * kN + n] += double(value(r * k + i)) * value(n * k + i + 31337);
            }
        }
    }
    template <class T>
    static T* aligned(std::vector<T>& v) {
        return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(v.data()) + 15) / 16 * 16);
    }
    // The report; `right` says whether the values are.
    std::string run_mode(uint32_t mode, bool multicast, uint64_t seed, bool& right) {
        std::fill(out.begin(), out.end(), -1e30f);
        float* c = aligned(out);
        alignas(64) TensorMap maps[3] = {encode(9, {depth, rows}, {depth * 2}, {64, 64}, aligned(a), 3),
                                         encode(9, {depth, kN}, {depth * 2}, {64, kN / 2}, aligned(b), 3),
                                         encode(7, {kN, rows}, {kN * 4}, {kN, 64}, c, 0)};
        const Product90 p = {(depth + 63) / 64, mode, multicast};
        const std::string report =
            run("selftest_wgmma", {(rows + 63) / 64, 160, kStages * kStageBytes + 64 * 128, multicast ? 2u : 1u}, &p, seed, maps);
        right = true;
        for (uint32_t i = 0; i < rows * kN; ++i) right &= fabs(c[i] - expected[i]) <= 1e-4;
        return report;
    }
};

// Vectors are aligned to 16 by malloc; `aligned` makes sure.
const Test product("TMA, mbarriers, wgmma, TMA store: ragged rows and depth", [] {
    Problem whole(128, 256), ragged(100, 200);
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        for (Problem* problem : {&whole, &ragged}) {
            for (bool multicast : {false, true}) {
                bool right = false;
                const std::string report = problem->run_mode(0, multicast, seed, right);
                expect(report.empty(), report.c_str(), seed);
                expect(right, "values", seed);
            }
        }
    }
});

const Test broken("a broken pipeline shows", [] {
    Problem problem(128, 320);
    int caught[8] = {};
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        for (uint32_t mode = 1; mode < 7; ++mode) {
            bool right = false;
            const std::string report = problem.run_mode(mode, mode == 2 && seed % 2, seed, right);
            caught[mode] += !report.empty() || !right;
            if (mode == 4) expect_report(report, "no wgmma.fence");
            if (mode == 5) expect_report(report, "deadlock");
            if (mode == 5) expect_report(report, "16 transaction bytes missing");
        }
    }
    expect(caught[1] == static_cast<int>(kSeeds), "no wait for the data");
    expect(caught[2] > 0, "a stage freed too early");
    expect(caught[3] == static_cast<int>(kSeeds), "no wgmma.wait");
    expect(caught[6] > 0, "no wait for the store");
});

const Test proxy("a missing fence.proxy.async shows with MOE_EMULATED_PROXY=1", [] {
    if (!getenv("MOE_EMULATED_PROXY")) return printf("    not run: MOE_EMULATED_PROXY is not set\n"), void();
    Problem problem(64, 64);
    for (uint64_t seed = 0; seed < 4; ++seed) {
        bool right = false;
        expect(problem.run_mode(7, false, seed, right).empty() && !right, "stale data stored", seed);
    }
});

}  // namespace
