// What happens to finished sums: bias, activation, rounding, store. The CUDA twin of src/cpu/grouped_gemm/epilogue.rs, operation for
// operation: given equal sums, h has the CPU's bits.
//
// The choice of activation is made once for N pairs (`activate`), not once an element, and its code stands once in a kernel: call it from a
// loop that is not unrolled. The three clamps that are only limits cost two or three comparisons with infinity where there is none.
#pragma once

#include "numerics.cuh"
#include "ptx.cuh"

namespace epilogue {

// The number formats, as in `DType` of src/element.rs.
enum DType : uint32_t { F32 = 0, F16 = 1, BF16 = 2 };

enum Kind : uint32_t {
    Identity = 0,
    Silu = 1,
    Gelu = 2,
    GeluTanh = 3,
    Relu = 4,
    Relu2 = 5,
    GptOss = 6,   // (u + 1) · g · σ(alpha·g)
    Softcap = 7,  // cap(g) · σ(g) · cap(u)
};

// act(min(g, gate_max)) → min(·, result_max); u → clamp(u, ±up_limit); the product if gated. No limit is +∞; it leaves every bit alone.
struct Activation {
    uint32_t kind;
    uint32_t gated;
    float gate_max;
    float result_max;
    float up_limit;
    float alpha;     // GptOss
    float gate_cap;  // Softcap; 0 leaves its side alone
    float up_cap;
};
static_assert(sizeof(Activation) == 32, "mirrored in src/cuda/grouped_gemm/params.rs");

MOE_DEVICE float softcap(float v, float cap) { return cap == 0.0f ? v : numerics::softcap(v, cap); }

template <uint32_t K>
MOE_DEVICE float gate_value(const Activation& a, float g) {
    if (K == Softcap) return __fmul_rn(softcap(g, a.gate_cap), numerics::sigmoid(g));
    g = numerics::min(a.gate_max, g);  // the second argument where one is NaN
    if (K == Silu) g = numerics::silu(g);
    if (K == Gelu) g = numerics::gelu_erf(g);
    if (K == GeluTanh) g = numerics::gelu_tanh(g);
    if (K == Relu) g = numerics::relu(g);
    if (K == Relu2) g = numerics::relu2(g);
    if (K == GptOss) return __fmul_rn(g, numerics::sigmoid(__fmul_rn(a.alpha, g)));
    return numerics::min(a.result_max, g);
}

template <uint32_t K>
MOE_DEVICE float up_value(const Activation& a, float u) {
    if (K == Softcap) return softcap(u, a.up_cap);
    u = numerics::max(-a.up_limit, numerics::min(a.up_limit, u));
    return K == GptOss ? __fadd_rn(u, 1.0f) : u;
}

template <uint32_t K, int N>
MOE_DEVICE void activate_as(const Activation& a, float (&g)[N], const float (&u)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float v = gate_value<K>(a, g[i]);
        g[i] = a.gated ? __fmul_rn(v, up_value<K>(a, u[i])) : v;
    }
}

// g ← the activation of (g, u), or of g alone where it is not gated (u is then ignored, but must be initialised). Uniform over the block.
template <int N>
MOE_DEVICE void activate(const Activation& a, float (&g)[N], const float (&u)[N]) {
    switch (a.kind) {
        case Silu: activate_as<Silu>(a, g, u); break;
        case Gelu: activate_as<Gelu>(a, g, u); break;
        case GeluTanh: activate_as<GeluTanh>(a, g, u); break;
        case Relu: activate_as<Relu>(a, g, u); break;
        case Relu2: activate_as<Relu2>(a, g, u); break;
        case GptOss: activate_as<GptOss>(a, g, u); break;
        case Softcap: activate_as<Softcap>(a, g, u); break;
        default: activate_as<Identity>(a, g, u); break;
    }
}

// Element i of an array of any format, exactly.
MOE_DEVICE float load_element(const void* base, uint32_t dtype, int64_t i) {
    if (dtype == F32) return static_cast<const float*>(base)[i];
    const uint16_t bits = static_cast<const uint16_t*>(base)[i];
    return dtype == F16 ? numerics::f16_to_f32(bits) : numerics::bf16_to_f32(bits);
}

// Rounds to nearest, ties to even, and stores element i of an array of any format.
MOE_DEVICE void store_element(void* base, uint32_t dtype, int64_t i, float v) {
    if (dtype == F32) {
        static_cast<float*>(base)[i] = v;
    } else {
        static_cast<uint16_t*>(base)[i] = dtype == F16 ? ptx::f32_to_f16(v) : ptx::f32_to_bf16(v);
    }
}

// Two neighbours, `low` in the low half.
MOE_DEVICE uint32_t pack_pair(uint32_t dtype, float low, float high) {
    return dtype == F16 ? ptx::f32_to_f16x2(low, high) : ptx::f32_to_bf16x2(low, high);
}

// Rounds and stores v[0 .. valid) at element i of an array. `aligned`: that element lies on 16 bytes, whatever the valid count.
MOE_DEVICE void store(void* base, uint32_t dtype, int64_t i, const float (&v)[8], uint32_t valid, bool aligned) {
    if (valid >= 8 && aligned) {
        if (dtype == F32) {
            float* const p = static_cast<float*>(base) + i;
            ptx::store_128(p, make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])));
            ptx::store_128(p + 4, make_uint4(__float_as_uint(v[4]), __float_as_uint(v[5]), __float_as_uint(v[6]), __float_as_uint(v[7])));
        } else {
            ptx::store_128(static_cast<uint16_t*>(base) + i,
                           make_uint4(pack_pair(dtype, v[0], v[1]), pack_pair(dtype, v[2], v[3]),
                                      pack_pair(dtype, v[4], v[5]), pack_pair(dtype, v[6], v[7])));
        }
        return;
    }
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        if (c < valid) store_element(base, dtype, i + c, v[c]);
    }
}

MOE_DEVICE void store(void* base, uint32_t dtype, int64_t i, const float (&v)[1], uint32_t, bool) { store_element(base, dtype, i, v[0]); }

}  // namespace epilogue
