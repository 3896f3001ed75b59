// The grouped product on Hopper (sm_90a): out[r] = act( A[src(r)] · W[e]ᵀ + b[e] ) in bf16 or f16 with f32 sums.
//
// The easy version: for each expert, each tile of 128 of its rows and 192 of W's: for k in steps of 64 { copy both tiles to shared memory; multiply };
// bias, activation, store. What makes it fast, in order of effect:
//
//  1. wgmma: four warps multiply 64 x 192 x 16 straight from shared memory, asynchronously; one batch is in flight while the next is issued.
//  2. Specialised warps: a producer fills a ring of five stages (sm90_ring.cuh, sm90_producer.cuh), consumers multiply (sm90_consumer.cuh). The producer
//     gives its registers away (setmaxnreg: 40), so that a consumer's thread holds 192 sums (232).
//  3. Two consumers take tiles in turn: one multiplies while the other applies the activation and stores.
//  4. Persistent blocks that find their tiles on the device (sm90_schedule.cuh). Loads run across the border of two tiles.
//  5. Clusters of two blocks that share each tile of B: less traffic from L2.
//  6. Rows of A gathered in the load; gate and up of a column in one thread's sums, wherever the weights lie in memory.
//
// The budget, for an H100 or H200: 132 SMs, 4096 FLOP a cycle and SM (989 TFLOP/s at 1.83 GHz; dense products reach some 790, at lower clocks).
//
//   tensor cores   a product 64 x 192 x 16 takes 96 cycles, a stage (8 of them, 3.1 MFLOP) 768
//   registers      40 + 2 · 232 = 504 a thread of each warpgroup, all that a launch with 168 has; no spills
//   shared memory  200 KiB of stages + 5 KiB of the rest, of 227. Port: 8 products read 2 KiB of A and 6 KiB of B each, 64 KiB, and 40 KiB are written: at
//                  128 bytes a cycle 832 cycles a stage, so this, not the tensor cores, is the first limit: 92% of the peak
//   L2             40 KiB a stage are 53 bytes a cycle and SM, of about 40 that the L2 gives; as a pair of blocks 28 KiB, 37 bytes. Hence clusters
//   latency        the ring holds 4 stages ahead, 3000 cycles; an access to HBM takes under 1000, the lag of the gathered rows' announcement two stages
//   issue slots    gathering: 8 passes of some 20 instructions a stage and scheduler, of 768. Epilogue of a gated tile: 96 elements a thread of about 45
//                  instructions, 2100 moves, stores: 7000 slots a scheduler; hidden behind the other consumer's product from K = 600 on (at K = 2048: 24576
//                  cycles). Plain: 1200 slots; hidden from K = 128 on
//
// The layer T 32768, H 2048, I 768, E 128, K 8, bf16 (2.47 TFLOP, 4.4 ms at 560 TFLOP/s, 3.1 ms at 790):
//
//   gate and up    8192 units of a cluster, 124.1 rounds of 66 clusters: 0.7% idle. 64 units an expert: all clusters work on one expert, whose 6 MiB of weights
//                  and 8 MiB of rows come from HBM once and then from L2. HBM: 0.8 GB weights + 1.1 GB gathered rows + 0.4 GB h: 0.5 to 0.7 ms of 2.1
//   down           11 column tiles of 192 for 2048 columns: 3% of the work is outside. HBM: 0.4 GB h + 0.4 GB weights + 1.1 GB ys in bf16, 2.1 in f32: 0.4 to
//                  0.9 ms of 1.0: ys in f32 is near the limit of an H100
//   ragged rows    half a tile of 128 is empty in each expert on average: 3% at 2048 rows
//
// None of this has run on a GPU yet: the counts are of the machine code (MANIFEST, scripts/build_ptx.py), the rest is arithmetic.
//
// What lost, on paper or in the compiler:
//   - 128 x 256, both consumers on one tile: 48 bytes a cycle from L2 instead of 53, but the epilogue stands still: 17% at K = 2048 with SwiGLU.
//   - An epilogue through shared memory and a TMA store: 24 KiB that the ring would miss; four lanes' shuffles give 16-byte stores, too.
//   - Each consumer computing the schedule: it spilled. So did any copy of sums in the epilogue.
//   - Waiting for a stage without taking turns: a wait by parity passes when the barrier is two phases behind. The emulator found it.
//   - Arrivals at the other block's barrier with release at cluster scope: a memory barrier of the whole GPU in each step.
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
    if (threadIdx.x == 0) {
        s.ring.init(s.p.pair_of_row != nullptr, cluster);
        ptx::tma_prefetch_map(s.map_a);
        ptx::tma_prefetch_map(s.map_gate);
        ptx::tma_prefetch_map(s.map_up);
    }
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
