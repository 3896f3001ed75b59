// wgmma in every shape of operand: swizzles, K-major and MN-major B, A from registers, narrow and wide.
#include <math.h>
#include <string.h>

#include "harness.h"
#include "ptx.cuh"

using selftest::expect;
using selftest::run;
using selftest::Test;
using selftest::value;

struct Form {
    float* out;                // [64][N]
    const unsigned char *a, *b;  // the operands as they lie in shared memory
    uint32_t a_bytes, b_bytes;
    const uint16_t* rows;      // A [64][16], for A in registers
    uint32_t a_leading, a_stride, a_swizzle, b_leading, b_stride, b_swizzle, a_in_registers, reserved;
};

template <int N, bool Bf16, bool Transpose>
static void form(const Form& p) {
    MOE_DYNAMIC_SHARED(bytes);
    const uint32_t base = ptx::shared_address(bytes), b_base = base + (p.a_bytes + 1023) / 1024 * 1024;
    for (uint32_t i = threadIdx.x * 4; i < p.a_bytes; i += 512) ptx::store_shared_32(base + i, *reinterpret_cast<const uint32_t*>(p.a + i));
    for (uint32_t i = threadIdx.x * 4; i < p.b_bytes; i += 512) ptx::store_shared_32(b_base + i, *reinterpret_cast<const uint32_t*>(p.b + i));
    ptx::fence_proxy_async();
    __syncthreads();
    const uint32_t w = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float d[N / 2];
    for (float& v : d) v = 1.0f;
    uint32_t a[4];
    for (uint32_t i = 0; i < 4; ++i) memcpy(&a[i], p.rows + (16 * w + g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8, 4);
    const uint64_t a_descriptor = ptx::wgmma_descriptor(base, p.a_leading, p.a_stride, static_cast<ptx::Swizzle>(p.a_swizzle));
    const uint64_t b_descriptor = ptx::wgmma_descriptor(b_base, p.b_leading, p.b_stride, static_cast<ptx::Swizzle>(p.b_swizzle));
    ptx::wgmma_fence();
    for (uint32_t twice = 0; twice < 2; ++twice) {
        if constexpr (Bf16) {
            p.a_in_registers ? ptx::wgmma_bf16<Transpose>(d, a, b_descriptor, true) : ptx::wgmma_bf16<Transpose>(d, a_descriptor, b_descriptor, true);
        } else {
            p.a_in_registers ? ptx::wgmma_f16<Transpose>(d, a, b_descriptor, true) : ptx::wgmma_f16<Transpose>(d, a_descriptor, b_descriptor, true);
        }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    for (uint32_t i = 0; i < N / 2; ++i) p.out[(16 * w + g + i / 2 % 2 * 8) * N + i / 4 * 8 + 2 * t + i % 2] = d[i];
}

#define SELFTEST_FORM(n)                                                                             \
    extern "C" __global__ void selftest_form_k_##n(const __grid_constant__ Form p) { form<n, true, false>(p); } \
    MOE_KERNEL(selftest_form_k_##n)                                                                  \
    extern "C" __global__ void selftest_form_mn_##n(const __grid_constant__ Form p) { form<n, false, true>(p); } \
    MOE_KERNEL(selftest_form_mn_##n)
SELFTEST_FORM(64)
SELFTEST_FORM(256)

namespace {

// Byte address of 16-byte chunk after the swizzle of 16 << mode bytes.
uint32_t swizzled(uint32_t address, uint32_t mode) { return address ^ (address >> 7 & ((1u << mode) - 1)) << 4; }

// Writes [rows][16] K-major: groups of 8 rows, `span` bytes a row (16 and two core matrices without swizzle).
std::vector<unsigned char> k_major(const std::vector<uint16_t>& m, uint32_t rows, uint32_t mode, uint32_t& leading, uint32_t& stride) {
    const uint32_t span = mode ? 16u << mode : 16;
    leading = mode ? 16 : 128;
    stride = mode ? 8 * span : 256;
    std::vector<unsigned char> bytes(rows / 8 * stride, 0xff);
    for (uint32_t r = 0; r < rows; ++r) {
        for (uint32_t k = 0; k < 16; ++k) {
            const uint32_t chunk = r / 8 * stride + r % 8 * span + k / 8 * leading;
            memcpy(&bytes[swizzled(chunk, mode) + k % 8 * 2], &m[r * 16 + k], 2);
        }
    }
    return bytes;
}

// Writes [rows][16] MN-major: rows of `span` bytes along n, one per k.
std::vector<unsigned char> mn_major(const std::vector<uint16_t>& m, uint32_t rows, uint32_t mode, uint32_t& leading, uint32_t& stride) {
    const uint32_t per = mode ? 8u << mode : 8;  // elements along n in one atom
    const uint32_t atoms = rows / per, atom = per * 2 * 8;
    std::vector<unsigned char> bytes(atoms * 2 * atom, 0xff);
    // Atoms along n next to each other, then those of the second half of k; without swizzle the names are exchanged.
    const uint32_t along_n = atom, along_k = atoms * atom;
    leading = mode ? along_n : along_k;
    stride = mode ? along_k : along_n;
    for (uint32_t r = 0; r < rows; ++r) {
        for (uint32_t k = 0; k < 16; ++k) {
            const uint32_t chunk = r / per * along_n + k / 8 * along_k + k % 8 * per * 2 + r % per / 8 * 16;
            memcpy(&bytes[swizzled(chunk, mode) + r % 8 * 2], &m[r * 16 + k], 2);
        }
    }
    return bytes;
}

void check(const char* kernel, uint32_t n, bool bf16, bool transpose, uint32_t a_mode, uint32_t b_mode, bool registers) {
    std::vector<uint16_t> a(64 * 16), b(n * 16);
    for (uint32_t i = 0; i < a.size(); ++i) a[i] = bf16 ? emu::f32_to_bf16(value(i)) : emu::f32_to_f16(value(i));
    for (uint32_t i = 0; i < b.size(); ++i) b[i] = bf16 ? emu::f32_to_bf16(value(i + 5)) : emu::f32_to_f16(value(i + 5));
    Form p = {};
    const auto a_bytes = k_major(a, 64, a_mode, p.a_leading, p.a_stride);
    const auto b_bytes = transpose ? mn_major(b, n, b_mode, p.b_leading, p.b_stride) : k_major(b, n, b_mode, p.b_leading, p.b_stride);
    std::vector<float> out(64 * n);
    p.out = out.data();
    p.a = a_bytes.data();
    p.b = b_bytes.data();
    p.a_bytes = static_cast<uint32_t>(a_bytes.size());
    p.b_bytes = static_cast<uint32_t>(b_bytes.size());
    p.rows = a.data();
    p.a_swizzle = a_mode;
    p.b_swizzle = b_mode;
    p.a_in_registers = registers;
    for (uint64_t seed = 0; seed < 3; ++seed) {
        const unsigned shared = static_cast<unsigned>((a_bytes.size() + 1023) / 1024 * 1024 + b_bytes.size());
        const std::string report = run(kernel, {1, 128, shared}, &p, seed);
        expect(report.empty(), report.c_str(), seed);
        bool right = true;
        for (uint32_t i = 0; i < 64 * n; ++i) {
            double sum = 1;
            for (uint32_t k = 0; k < 16; ++k) sum += 2 * double(value(i / n * 16 + k)) * value(i % n * 16 + k + 5);
            right &= fabs(out[i] - sum) < 1e-5;
        }
        expect(right, kernel, seed);
    }
}

const Test forms("wgmma operands: swizzles, both majors, registers, N = 64 and 256", [] {
    for (uint32_t a_mode = 0; a_mode < 4; ++a_mode) {
        for (uint32_t b_mode = 0; b_mode < 4; ++b_mode) {
            for (bool registers : {false, true}) {
                check("selftest_form_k_64", 64, true, false, a_mode, b_mode, registers);
                check("selftest_form_mn_64", 64, false, true, a_mode, b_mode, registers);
            }
        }
    }
    check("selftest_form_k_256", 256, true, false, 3, 3, false);
    check("selftest_form_mn_256", 256, false, true, 3, 3, true);
});

}  // namespace
