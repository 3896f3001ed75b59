// What the emulation costs: run with the argument `speed`; printed, not judged.
#include <stdio.h>
#include <time.h>

#include "harness.h"
#include "ptx.cuh"

struct Loop {
    uint32_t* out;
    uint32_t rounds, kind;
};

extern "C" __global__ void selftest_speed(const __grid_constant__ Loop p) {
    uint32_t v = threadIdx.x;
    for (uint32_t i = 0; i < p.rounds; ++i) {
        if (p.kind == 0) v += __shfl_xor_sync(0xffffffff, v, 1);
        if (p.kind == 1) v += __reduce_max_sync(0xffffffff, v);
        if (p.kind == 2) __syncthreads();
    }
    p.out[threadIdx.x] = v;
}
MOE_KERNEL(selftest_speed)

namespace {

double seconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

const selftest::Test speed("speed", [] {
    std::vector<uint32_t> out(256);
    const char* names[] = {"__shfl_xor_sync", "__reduce_max_sync", "__syncthreads"};
    for (uint32_t kind = 0; kind < 3; ++kind) {
        const Loop p = {out.data(), 2000, kind};
        const double start = seconds();
        selftest::expect(selftest::run("selftest_speed", {1, 256}, &p, 5).empty(), "no report");
        printf("    %-18s %5.1f ns a thread\n", names[kind], (seconds() - start) / (256.0 * 2000) * 1e9);
    }
    const Loop p = {out.data(), 0, 0};
    const double start = seconds();
    selftest::run("selftest_speed", {1000, 256}, &p, 5);
    printf("    a block of 256     %5.1f us\n", (seconds() - start) / 1000 * 1e6);
});

}  // namespace
