// The grouped product on Hopper (sm_90a).
#include "grouped.cuh"
#include "ptx.cuh"
#include "sm90_consumer.cuh"
#include "sm90_producer.cuh"
#include "sm90_ring.cuh"

namespace sm90 {

constexpr uint32_t THREADS = 384;

template <uint32_t DType, bool Gated>
MOE_DEVICE void run(const Source& s) {
    const uint32_t role = threadIdx.x / 128;
    const uint32_t cluster = ptx::cluster_size();
    const uint32_t first_unit = blockIdx.x / cluster, unit_step = gridDim.x / cluster;
    if (threadIdx.x == 0) s.ring.init(s.p.pair_of_row != nullptr, cluster);
    __syncwarp();
    ptx::cluster_arrive();
    ptx::cluster_wait();
    if (role == 0) {
        ptx::registers_decrease<40>();
        if (s.p.pair_of_row != nullptr) {
            produce_gathering<Gated>(s, first_unit, unit_step);
        } else if (threadIdx.x < 32) {
            produce_by_tma<Gated>(s, first_unit, unit_step);
        }
    } else {
        ptx::registers_increase<232>();
        consume<DType, Gated>(s.p, s.ring, role - 1);
    }
    // A CTA's shared memory must outlive the copies and arrivals that the other one sends to it.
    __syncwarp();
    ptx::cluster_arrive();
    ptx::cluster_wait();
}

}  // namespace sm90

#define MOE_SM90(NAME, DTYPE, GATED)                                                                                    \
    extern "C" __global__ void __launch_bounds__(sm90::THREADS, 1)                                                      \
        NAME(const __grid_constant__ grouped::GroupedGemmParams p, const __grid_constant__ TensorMap a,                 \
             const __grid_constant__ TensorMap gate, const __grid_constant__ TensorMap up) {                            \
        MOE_DYNAMIC_SHARED(shared);                                                                                     \
        const sm90::Source source{p, a, gate, up, sm90::Ring{ptx::shared_address(shared)}};                             \
        sm90::run<epilogue::DTYPE, GATED>(source);                                                                      \
    }                                                                                                                   \
    MOE_KERNEL(NAME)

MOE_SM90(moe_grouped_gemm_sm90_bf16_gated, BF16, true)
MOE_SM90(moe_grouped_gemm_sm90_bf16_plain, BF16, false)
MOE_SM90(moe_grouped_gemm_sm90_f16_gated, F16, true)
MOE_SM90(moe_grouped_gemm_sm90_f16_plain, F16, false)
