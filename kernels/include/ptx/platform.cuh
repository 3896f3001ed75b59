// What nvcc and the emulator spell differently: qualifiers, shared memory, registration of kernels.
#pragma once

#include <stddef.h>
#include <stdint.h>

// A tensor map as the driver encodes it (CUtensorMap). A kernel takes it as `const __grid_constant__ TensorMap`.
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};
static_assert(sizeof(TensorMap) == 128, "CUtensorMap has 128 bytes");

namespace ptx {

// A type that can be an array: `Type<float[32]> name` declares what `float name[32]` does.
template <class T>
using Type = T;

enum class Swizzle : uint32_t { None = 0, Bytes32 = 1, Bytes64 = 2, Bytes128 = 3 };

}  // namespace ptx

#if defined(__CUDACC__)

#define MOE_DEVICE __device__ __forceinline__

// After each kernel. The emulator registers it; nvcc has nothing to do.
#define MOE_KERNEL(name)

// Static shared memory: MOE_SHARED(float[32], partial); Uninitialised, below 48 KiB a kernel, plain types only.
#define MOE_SHARED(type, name) __shared__ ::ptx::Type<type> name

// The launch's dynamic shared memory, as `unsigned char* name`, aligned to 1024 bytes.
#define MOE_DYNAMIC_SHARED(name)                                       \
    extern __shared__ __align__(1024) unsigned char moe_dynamic_shared[]; \
    unsigned char* const name = moe_dynamic_shared

#else
#include "../../emulator/cuda.h"
#endif
