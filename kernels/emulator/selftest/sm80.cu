// cp.async, ldmatrix, stmatrix, mma.sync against plain loops; a missing wait shows.
#include <math.h>

#include "harness.h"
#include "ptx.cuh"

using selftest::expect;
using selftest::expect_report;
using selftest::kSeeds;
using selftest::run;
using selftest::Test;
using selftest::value;

struct Product80 {
    float* out;          // [16][8]
    const uint16_t *a, *b;  // [16][depth], [8][depth]; f32 for TF32
    uint32_t depth, kind, mode;
};

// One warp: two stages of 16 along K by cp.async, ldmatrix, mma. Mode 1 does not wait, mode 2 waits for one group less.
extern "C" __global__ void selftest_mma(const __grid_constant__ Product80 p) {
    MOE_DYNAMIC_SHARED(bytes);
    const uint32_t lane = ptx::lane_id(), base = ptx::shared_address(bytes);
    const uint32_t steps = p.depth / 16;
    auto load = [&](uint32_t step) {  // A: 16 rows of 32 bytes, B: 8 rows of 32 bytes
        const uint32_t stage = base + step % 2 * 768;
        ptx::cp_async_16(stage + lane * 16, p.a + (lane / 2) * p.depth + step * 16 + lane % 2 * 8);
        if (lane < 16) ptx::cp_async_16(stage + 512 + lane * 16, p.b + (lane / 2) * p.depth + step * 16 + lane % 2 * 8);
        ptx::cp_async_commit();
    };
    float d[4] = {};
    load(0);
    for (uint32_t step = 0; step < steps; ++step) {
        if (step + 1 < steps) {
            load(step + 1);
            if (p.mode == 0) ptx::cp_async_wait<1>();
            if (p.mode == 2) ptx::cp_async_wait<2>();
        } else if (p.mode == 0) {
            ptx::cp_async_wait<0>();
        }
        __syncwarp();
        const uint32_t stage = base + step % 2 * 768;
        uint32_t a[4], b[2];
        ptx::ldmatrix_x4(a, stage + (lane % 16) * 32 + lane / 16 * 16);
        ptx::ldmatrix_x2(b, stage + 512 + (lane % 8) * 32 + lane / 8 % 2 * 16);
        if (p.kind == 0) ptx::mma_m16n8k16_f16(d, a, b);
        if (p.kind == 1) ptx::mma_m16n8k16_bf16(d, a, b);
        __syncwarp();
    }
    for (uint32_t i = 0; i < 4; ++i) p.out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}
MOE_KERNEL(selftest_mma)

extern "C" __global__ void selftest_tf32(const __grid_constant__ Product80 p) {
    const float *x = reinterpret_cast<const float*>(p.a), *y = reinterpret_cast<const float*>(p.b);
    const uint32_t g = threadIdx.x / 4, t = threadIdx.x % 4;
    float d[4] = {};
    for (uint32_t k = 0; k < p.depth; k += 8) {
        uint32_t a[4], b[2];
        for (uint32_t i = 0; i < 4; ++i) a[i] = ptx::f32_to_tf32(x[(g + i % 2 * 8) * p.depth + k + t + i / 2 * 4]);
        for (uint32_t i = 0; i < 2; ++i) b[i] = ptx::f32_to_tf32(y[g * p.depth + k + t + i * 4]);
        ptx::mma_m16n8k8_tf32(d, a, b);
    }
    for (uint32_t i = 0; i < 4; ++i) p.out[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = d[i];
}
MOE_KERNEL(selftest_tf32)

struct Transpose {
    uint16_t* out;  // [3][4][8][8]
    const uint16_t* in;
};

// Four matrices: read and stored; read transposed; stored transposed.
extern "C" __global__ void selftest_matrices(const __grid_constant__ Transpose p) {
    MOE_SHARED(uint4[32], in);
    MOE_SHARED(uint4[32], out);
    const uint32_t lane = threadIdx.x;
    in[lane] = ptx::load_nc_128(p.in + lane * 8);
    __syncwarp();
    const uint32_t from = ptx::shared_address(&in[lane]), to = ptx::shared_address(&out[lane]);
    for (uint32_t form = 0; form < 3; ++form) {
        uint32_t r[4];
        form == 1 ? ptx::ldmatrix_x4_trans(r, from) : ptx::ldmatrix_x4(r, from);
        form == 2 ? ptx::stmatrix_x4_trans(to, r[0], r[1], r[2], r[3]) : ptx::stmatrix_x4(to, r[0], r[1], r[2], r[3]);
        __syncwarp();
        ptx::store_128(p.out + form * 256 + lane * 8, out[lane]);
        __syncwarp();
    }
}
MOE_KERNEL(selftest_matrices)

// Sizes and zero fill: thread i copies with cp_async_ca<4, 8, 16> and i % (size + 1) bytes of the source.
struct Fill {
    uint32_t* out;
    const uint32_t* in;
};
extern "C" __global__ void selftest_fill(const __grid_constant__ Fill p) {
    MOE_SHARED(uint4[96], shared);
    const uint32_t i = threadIdx.x, at = ptx::shared_address(shared) + i * 48;
    ptx::cp_async_ca<4>(at, p.in + i * 4, i % 5);
    ptx::cp_async_ca<8>(at + 16, p.in + i * 4, i % 9);
    ptx::cp_async_16(at + 32, p.in + i * 4, i % 17);
    ptx::cp_async_wait_all();
    __syncwarp();
    for (uint32_t k = 0; k < 3; ++k) ptx::store_128(p.out + i * 12 + k * 4, shared[i * 3 + k]);
}
MOE_KERNEL(selftest_fill)

namespace {

bool close(const std::vector<float>& out, const std::vector<double>& expected, double eps) {
    bool all = true;
    for (size_t i = 0; i < out.size(); ++i) all &= fabs(out[i] - expected[i]) <= eps;
    return all;
}

const Test mma("cp.async, ldmatrix and mma.sync", [] {
    constexpr uint32_t kDepth = 80;
    for (uint32_t kind = 0; kind < 2; ++kind) {
        std::vector<uint16_t> a(16 * kDepth), b(8 * kDepth);
        for (uint32_t i = 0; i < a.size(); ++i) a[i] = kind ? emu::f32_to_bf16(value(i)) : emu::f32_to_f16(value(i));
        for (uint32_t i = 0; i < b.size(); ++i) b[i] = kind ? emu::f32_to_bf16(value(i + 9999)) : emu::f32_to_f16(value(i + 9999));
        std::vector<double> expected(128);
        for (uint32_t m = 0; m < 16; ++m) {
            for (uint32_t n = 0; n < 8; ++n) {
                for (uint32_t k = 0; k < kDepth; ++k) expected[m * 8 + n] += double(value(m * kDepth + k)) * value(n * kDepth + k + 9999);
            }
        }
        int wrong[3] = {};
        for (uint64_t seed = 0; seed < kSeeds; ++seed) {
            for (uint32_t mode = 0; mode < 3; ++mode) {
                std::vector<float> out(128);
                const Product80 p = {out.data(), a.data(), b.data(), kDepth, kind, mode};
                expect(run("selftest_mma", {1, 32, 1536}, &p, seed).empty(), "no report", seed);
                wrong[mode] += !close(out, expected, 1e-5);
            }
        }
        expect(wrong[0] == 0, "values");
        expect(wrong[1] > 0 && wrong[2] > 0, "a missing wait shows under some seed");
    }
});

const Test tf32("mma.sync tf32", [] {
    std::vector<float> a(16 * 24), b(8 * 24), out(128);
    for (uint32_t i = 0; i < a.size(); ++i) a[i] = value(i);
    for (uint32_t i = 0; i < b.size(); ++i) b[i] = value(i + 777);
    std::vector<double> expected(128);
    for (uint32_t i = 0; i < 128; ++i) {
        for (uint32_t k = 0; k < 24; ++k) expected[i] += double(a[i / 8 * 24 + k]) * b[i % 8 * 24 + k];
    }
    const Product80 p = {out.data(), reinterpret_cast<uint16_t*>(a.data()), reinterpret_cast<uint16_t*>(b.data()), 24, 2, 0};
    expect(run("selftest_tf32", {1, 32}, &p, 3).empty(), "no report");
    expect(close(out, expected, 1e-5), "values");
});

const Test matrices("ldmatrix and stmatrix, transposed", [] {
    alignas(16) uint16_t in[256], out[768];
    for (uint32_t i = 0; i < 256; ++i) in[i] = static_cast<uint16_t>(i * 3);
    const Transpose p = {out, in};
    for (uint64_t seed = 0; seed < 4; ++seed) {
        expect(run("selftest_matrices", {1, 32}, &p, seed).empty(), "no report", seed);
        for (uint32_t i = 0; i < 256; ++i) {
            const uint32_t flipped = i / 64 * 64 + i % 8 * 8 + i / 8 % 8;
            expect(out[i] == in[i] && out[256 + i] == in[flipped] && out[512 + i] == in[flipped], "elements", seed);
        }
    }
});

const Test fill("cp.async sizes and zero fill", [] {
    alignas(16) uint32_t in[128], out[384];
    for (uint32_t i = 0; i < 128; ++i) in[i] = 0x01010101u * (i + 1);
    const Fill p = {out, in};
    for (uint64_t seed = 0; seed < 4; ++seed) {
        expect(run("selftest_fill", {1, 32}, &p, seed).empty(), "no report", seed);
        const auto* bytes = reinterpret_cast<const unsigned char*>(out);
        const auto* source = reinterpret_cast<const unsigned char*>(in);
        for (uint32_t i = 0; i < 32; ++i) {
            const uint32_t sizes[3] = {4, 8, 16};
            for (uint32_t k = 0; k < 3; ++k) {
                for (uint32_t j = 0; j < 16; ++j) {
                    const unsigned char want = j >= sizes[k] ? 0xff : j < i % (sizes[k] + 1) ? source[i * 16 + j] : 0;
                    expect(bytes[i * 48 + k * 16 + j] == want, "bytes", seed);
                }
            }
        }
    }
});

const Test convert("conversions of f16 and bf16", [] {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
        const float wide = emu::f16_to_f32(static_cast<uint16_t>(bits));
        if (wide == wide) expect(emu::f32_to_f16(wide) == bits, "f16 there and back");
        const float up = bits < 0x7bff ? (double(wide) + emu::f16_to_f32(static_cast<uint16_t>(bits + 1))) / 2 : 0;
        if (bits < 0x7bff) expect(emu::f32_to_f16(up) == bits + bits % 2, "a tie goes to even");
    }
    expect(emu::f32_to_f16(65519.0f) == 0x7bff && emu::f32_to_f16(65520.0f) == 0x7c00 && emu::f32_to_f16(NAN) == 0x7fff, "f16 ends");
    expect(emu::f32_to_bf16(1.00390625f) == 0x3f80 && emu::f32_to_bf16(1.01171875f) == 0x3f82 && emu::f32_to_bf16(NAN) == 0x7fff, "bf16");
    expect(emu::f32_to_tf32(1.00048828125f) == 0x3f802000, "a tie of TF32 goes away from zero");
});

}  // namespace
