// Every PTX instruction that the kernels use, one instruction per function, in namespace `ptx`.
//
// The same names exist twice: here as inline PTX, and in `../emulator/ptx.h` as plain C++ that runs on a CPU. A kernel
// includes this file, and nothing else decides between them than the compiler: nvcc takes the PTX, g++ the emulation.
//
//   ptx/platform.cuh   MOE_KERNEL, MOE_DEVICE, shared memory, TensorMap; what both sides spell differently
//   ptx/memory.cuh     loads and stores with cache hints, shared-memory access by 32-bit address, conversions, clocks
//   ptx/mma.cuh        sm_80: cp.async, ldmatrix, mma.sync (stmatrix: sm_90)
//   ptx/barrier.cuh    named barriers, mbarrier, clusters, proxies' fences, setmaxnreg
//   ptx/tma.cuh        sm_90: tensor maps and bulk copies
//   ptx/wgmma.cuh      sm_90a: warpgroup matrix products
//
// Conventions. A shared-memory operand is a 32-bit shared address (`shared_address(pointer)`), a global one a pointer.
// `template` arguments are immediates. Functions whose instruction is `.sync.aligned` need the whole warp (wgmma: the
// whole warpgroup) converged; the emulator checks that.
#pragma once

#include "ptx/platform.cuh"

#if defined(__CUDACC__)
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"
#include "ptx/barrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"
#else
#include "../emulator/ptx.h"
#endif
