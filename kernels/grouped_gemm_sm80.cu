// The grouped product in bf16 and f16 on tensor cores by mma.sync: every NVIDIA GPU from Ampere on. How: include/grouped_tile.cuh.
//
// Four shapes, the same bits (see there); src/cuda/grouped_gemm/sm80.rs chooses by the mean number of rows of an expert and by the shared
// memory of the GPU. Columns are rows of W: half of them outputs where the product is gated.
//
//   shape  tile      block of k  warps  stages  shared   registers  blocks an SM (164 KiB, 227 KiB)
//   m128   128x128   32          2x2    4       73 KiB   <= 255     2, 2     64x64 a warp: 8 ldmatrix.x4 feed 32 mma
//   m64     64x128   32          2x2    3       45 KiB   <= 168     3, 3
//   m32     32x128   64          1x4    3       65 KiB   <= 168     2, 3
//   m16     16x128   64          1x4    3       59 KiB   <= 168     2, 3
//
// Roofline. A tile of R rows and 128 columns reads 2·(R + 128) bytes a step of k and makes 256·R FLOPs of them.
//   m128: 128·128/(128 + 128)·2 = 64 multiply-adds a byte from L2. An A100's SM makes 1024 a clock: 16 bytes a clock and SM, of the 40 or so that L2 gives.
//     Shared memory: a warp's step loads 4 KiB for 32 mma; four warps take 64 bytes a clock of 128. So the tensor pipes are the limit;
//     two blocks an SM cover each other's barriers and epilogues. The four stages of two blocks keep 96 KiB in flight.
//   m64: 43 multiply-adds a byte; m32: 26; m16: 14. At few rows the weights' way from memory is the limit: 2 bytes for R multiply-adds,
//     R FLOPs a byte, below the 150 (A100) to 250 (H100) FLOPs a byte of the machine. What counts is bytes in flight: m16 keeps 2 or 3 blocks x 36 KiB an SM,
//     and 132 SMs x 19 bytes a clock x 800 clocks of latency need 15 KiB each. Blocks of k are 128 bytes there: whole lines of W.
#include "grouped_tile.cuh"

using grouped::Bf16;
using grouped::F16;
using grouped::GroupedGemmParams;

using M128 = grouped::TileShape<128, 128, 64, 2, 2, 4>;
using M64 = grouped::TileShape<64, 128, 64, 2, 2, 3>;
using M32 = grouped::TileShape<32, 128, 128, 1, 4, 3>;
using M16 = grouped::TileShape<16, 128, 128, 1, 4, 3>;

// Mirrored in src/cuda/grouped_gemm/sm80.rs.
static_assert(M128::SharedBytes == 74832 && M64::SharedBytes == 46144 && M32::SharedBytes == 66624 && M16::SharedBytes == 60480, "");

#define KERNEL(name, Format, Shape, Aligned, BlocksPerSm)                                                                              \
    extern "C" __global__ void __launch_bounds__(Shape::Threads, BlocksPerSm) name(const __grid_constant__ GroupedGemmParams p) {      \
        MOE_DYNAMIC_SHARED(shared);                                                                                                    \
        grouped::tile_product<Format, Shape, Aligned>(p, shared);                                                                      \
    }                                                                                                                                  \
    MOE_KERNEL(name)

KERNEL(moe_grouped_gemm_sm80_bf16_m128, Bf16, M128, true, 2);
KERNEL(moe_grouped_gemm_sm80_bf16_m64, Bf16, M64, true, 3);
KERNEL(moe_grouped_gemm_sm80_bf16_m32, Bf16, M32, true, 3);
KERNEL(moe_grouped_gemm_sm80_bf16_m16, Bf16, M16, true, 3);
KERNEL(moe_grouped_gemm_sm80_f16_m128, F16, M128, true, 2);
KERNEL(moe_grouped_gemm_sm80_f16_m64, F16, M64, true, 3);
KERNEL(moe_grouped_gemm_sm80_f16_m32, F16, M32, true, 3);
KERNEL(moe_grouped_gemm_sm80_f16_m16, F16, M16, true, 3);
// Rows that do not begin on 16 bytes: element by element into the same stages, the same bits.
KERNEL(moe_grouped_gemm_sm80_bf16_m32_unaligned, Bf16, M32, false, 3);
KERNEL(moe_grouped_gemm_sm80_f16_m32_unaligned, F16, M32, false, 3);
