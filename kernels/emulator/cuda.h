// CUDA C++ for a host compiler: qualifiers, vector types, and the builtins that the kernels use, under their own names.
// Included by `ptx/platform.cuh` when nvcc is not the compiler.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "engine.h"

#define MOE_EMULATED 1

// ---- qualifiers ----

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// Plain __shared__ would escape the checks: MOE_SHARED and MOE_DYNAMIC_SHARED only.
#define __shared__ MOE_SHARED_must_be_used_instead

#define MOE_DEVICE inline __attribute__((always_inline))
#define MOE_KERNEL(name) static const ::emu::Registrar<&name> moe_registrar_##name(#name);

#define MOE_SHARED(type, name)                                                                                \
    static const char name##_tag = 0;                                                                         \
    ::ptx::Type<type>& name = *static_cast<std::remove_reference_t<::ptx::Type<type>>*>(                      \
        ::emu::static_shared(&name##_tag, sizeof(::ptx::Type<type>), alignof(::ptx::Type<type>)));            \
    static_assert(std::is_trivial_v<std::remove_all_extents_t<::ptx::Type<type>>>, "shared memory is not constructed")

#define MOE_DYNAMIC_SHARED(name) unsigned char* const name = ::emu::dynamic_shared()

// ---- identity ----

#define threadIdx (::emu::self->thread)
#define blockIdx (::emu::self->block)
#define blockDim (::emu::self->block_dim)
#define gridDim (::emu::self->grid_dim)
constexpr int warpSize = 32;

// ---- vector types ----

#define EMU_VECTOR2(type, name, alignment)           \
    struct alignas(alignment) name {                 \
        type x, y;                                   \
    };                                               \
    inline name make_##name(type x, type y) { return {x, y}; }
#define EMU_VECTOR4(type, name, alignment)           \
    struct alignas(alignment) name {                 \
        type x, y, z, w;                             \
    };                                               \
    inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }
EMU_VECTOR2(float, float2, 8)
EMU_VECTOR2(int, int2, 8)
EMU_VECTOR2(unsigned, uint2, 8)
EMU_VECTOR2(unsigned short, ushort2, 4)
EMU_VECTOR2(unsigned long long, ulonglong2, 16)
EMU_VECTOR4(float, float4, 16)
EMU_VECTOR4(int, int4, 16)
EMU_VECTOR4(unsigned, uint4, 16)
EMU_VECTOR4(unsigned short, ushort4, 8)
#undef EMU_VECTOR2
#undef EMU_VECTOR4

struct int3 {
    int x, y, z;
};
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

// ---- barriers and fences ----

#define EMU_OUT_OF_LINE __attribute__((noinline))

inline void __syncthreads() { ::emu::sync_threads(false); }
inline int __syncthreads_count(int predicate) { return static_cast<int>(::emu::sync_threads(predicate != 0)); }
inline int __syncthreads_or(int predicate) { return ::emu::sync_threads(predicate != 0) != 0; }
inline int __syncthreads_and(int predicate) { return ::emu::sync_threads(predicate == 0) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { ::emu::sync_warp(mask); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __nanosleep(unsigned) { ::emu::yield("__nanosleep"); }
[[noreturn]] inline void __trap() { ::emu::fail("__trap()"); }

// ---- exchanges within a warp: any type of 4 or 8 bytes ----

namespace emu {
template <class T>
inline T shuffle_value(int mode, unsigned mask, T value, unsigned parameter, int width) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle exchanges 4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = shuffle(mode, mask, bits, parameter, static_cast<uint32_t>(width));
    memcpy(&value, &bits, sizeof(T));
    return value;
}
}  // namespace emu

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    return ::emu::shuffle_value(::emu::kShuffleIndex, mask, value, static_cast<unsigned>(source), width);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    return ::emu::shuffle_value(::emu::kShuffleUp, mask, value, delta, width);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    return ::emu::shuffle_value(::emu::kShuffleDown, mask, value, delta, width);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
    return ::emu::shuffle_value(::emu::kShuffleXor, mask, value, static_cast<unsigned>(lane_mask), width);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) { return ::emu::vote(::emu::kVoteBallot, mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return ::emu::vote(::emu::kVoteAny, mask, predicate != 0) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return ::emu::vote(::emu::kVoteAll, mask, predicate != 0) != 0; }
// The lanes that happen to run together: promised is only the caller itself, so that is all it gets.
inline unsigned __activemask() { return 1u << ::emu::self->lane; }

template <class T>
inline unsigned __match_any_sync(unsigned mask, T value) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    return ::emu::match(false, mask, bits, nullptr);
}
template <class T>
inline unsigned __match_all_sync(unsigned mask, T value, int* predicate) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    return ::emu::match(true, mask, bits, predicate);
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned v) { return ::emu::reduce(::emu::kReduceAddUnsigned, mask, v); }
inline unsigned __reduce_min_sync(unsigned mask, unsigned v) { return ::emu::reduce(::emu::kReduceMinUnsigned, mask, v); }
inline unsigned __reduce_max_sync(unsigned mask, unsigned v) { return ::emu::reduce(::emu::kReduceMaxUnsigned, mask, v); }
inline int __reduce_add_sync(unsigned mask, int v) {
    return static_cast<int>(::emu::reduce(::emu::kReduceAddUnsigned, mask, static_cast<unsigned>(v)));
}
inline int __reduce_min_sync(unsigned mask, int v) {
    return static_cast<int>(::emu::reduce(::emu::kReduceMinSigned, mask, static_cast<unsigned>(v)));
}
inline int __reduce_max_sync(unsigned mask, int v) {
    return static_cast<int>(::emu::reduce(::emu::kReduceMaxSigned, mask, static_cast<unsigned>(v)));
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned v) { return ::emu::reduce(::emu::kReduceAnd, mask, v); }
inline unsigned __reduce_or_sync(unsigned mask, unsigned v) { return ::emu::reduce(::emu::kReduceOr, mask, v); }
inline unsigned __reduce_xor_sync(unsigned mask, unsigned v) { return ::emu::reduce(::emu::kReduceXor, mask, v); }

// ---- atomics ----

namespace emu {
template <class T, class Change>
inline T atomic_change(T* target, Change change, const char* name) {
    check_alignment(target, sizeof(T), name);
    T old;
    __atomic_load(target, &old, __ATOMIC_RELAXED);
    for (;;) {
        T next = change(old);
        if (__atomic_compare_exchange(target, &old, &next, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) break;
    }
    progress();
    return old;
}
template <class T>
using Same = std::common_type_t<T>;  // not deduced, so that atomicAdd(&unsigned, 1) works
}  // namespace emu

#define EMU_ATOMIC(name, expression)                                                                   \
    template <class T>                                                                                 \
    inline T name(T* target, ::emu::Same<T> v) {                                                       \
        return ::emu::atomic_change(target, [v](T old) { return static_cast<T>(expression); }, #name); \
    }
EMU_ATOMIC(atomicAdd, old + v)
EMU_ATOMIC(atomicSub, old - v)
EMU_ATOMIC(atomicMax, old > v ? old : v)
EMU_ATOMIC(atomicMin, old < v ? old : v)
EMU_ATOMIC(atomicAnd, old & v)
EMU_ATOMIC(atomicOr, old | v)
EMU_ATOMIC(atomicXor, old ^ v)
EMU_ATOMIC(atomicExch, (static_cast<void>(old), v))
EMU_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
#undef EMU_ATOMIC
template <class T>
inline T atomicCAS(T* target, ::emu::Same<T> compare, ::emu::Same<T> v) {
    return ::emu::atomic_change(target, [=](T old) { return old == compare ? v : old; }, "atomicCAS");
}

// ---- memory ----

template <class T>
inline T __ldg(const T* source) {
    ::emu::check_alignment(source, alignof(T), "__ldg");
    return *source;
}
template <class T>
inline T __ldcg(const T* source) { return __ldg(source); }
template <class T>
inline T __ldcs(const T* source) { return __ldg(source); }
template <class T>
inline void __stcs(T* target, T value) {
    ::emu::check_alignment(target, alignof(T), "__stcs");
    *target = value;
}
template <class T>
inline void __stcg(T* target, T value) { __stcs(target, value); }

#include "cuda_math.h"
