// Applies one function of `include/numerics.cuh` to many numbers, for tests/cuda_numerics.rs. Not part of the crate: its PTX lies beside it and is
// read by that test alone. Made by
//     nvcc -std=c++17 -O3 --ptx --fmad=false -arch=compute_80 -I kernels/include kernels/probes/numerics_probe.cu -o kernels/probes/numerics_probe.ptx
// with the .version lowered to 7.4.
#include "numerics.cuh"

struct ProbeParams {
    const float* x;
    float* y;
    uint32_t n;
    uint32_t function;  // place in tests/cuda_numerics.rs
};
static_assert(sizeof(ProbeParams) == 24, "ProbeParams in tests/cuda_numerics.rs");

MOE_DEVICE float apply(uint32_t function, float x) {
    using namespace numerics;
    switch (function) {
        case 0: return numerics::exp(x);
        case 1: return numerics::ln(x);
        case 2: return numerics::log1p(x);
        case 3: return numerics::sigmoid(x);
        case 4: return numerics::silu(x);
        case 5: return numerics::softplus(x);
        case 6: return numerics::tanh(x);
        case 7: return numerics::erf(x);
        case 8: return numerics::gelu_erf(x);
        case 9: return numerics::gelu_tanh(x);
        case 10: return numerics::relu(x);
        case 11: return numerics::relu2(x);
        case 12: return numerics::normal_quantile(x);
        case 13: return from_bits(numerics::f32_to_bf16(x));
        case 14: return from_bits(numerics::f32_to_f16(x));
        case 15: return numerics::bf16_to_f32(static_cast<uint16_t>(bits_of(x)));
        case 16: return numerics::f16_to_f32(static_cast<uint16_t>(bits_of(x)));
        case 17: return x >= -87.0f && x <= 88.0f ? exp_normal(x) : numerics::exp(x);
        default: return quiet_nan();
    }
}

extern "C" __global__ void __launch_bounds__(64) moe_numerics_probe(const __grid_constant__ ProbeParams p) {
    for (uint32_t i = blockIdx.x * 64 + threadIdx.x; i < p.n; i += gridDim.x * 64) p.y[i] = apply(p.function, p.x[i]);
}
MOE_KERNEL(moe_numerics_probe)
