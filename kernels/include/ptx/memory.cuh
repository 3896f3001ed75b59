// Loads and stores with cache hints, shared memory by 32-bit address, conversions, clocks. sm_80 unless said.
#pragma once

namespace ptx {

// ---- addresses ----

// The 32-bit shared address of a pointer into this block's shared memory.
MOE_DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- identity ----

MOE_DEVICE uint32_t lane_id() {
    uint32_t lane;
    asm("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

MOE_DEVICE uint64_t clock() {
    uint64_t ticks;
    asm volatile("mov.u64 %0, %%clock64;" : "=l"(ticks));
    return ticks;
}

MOE_DEVICE uint64_t global_timer() {
    uint64_t nanoseconds;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds));
    return nanoseconds;
}

MOE_DEVICE void nanosleep(uint32_t nanoseconds) { asm volatile("nanosleep.u32 %0;" ::"r"(nanoseconds)); }

// Ends the kernel with an error (illegal instruction) for the host.
MOE_DEVICE void trap() { asm volatile("trap;"); }

// ---- global memory: plain, read-only for the whole kernel (nc), evict-first (cs). Naturally aligned. ----

MOE_DEVICE uint4 load_128(const void* source) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(source) : "memory");
    return v;
}

// Weights and other data that is read once: past the L1, and with a 128-byte sector prefetch into the L2.
MOE_DEVICE uint4 load_nc_128(const void* source) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(source));
    return v;
}

MOE_DEVICE uint2 load_nc_64(const void* source) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
                 : "=r"(v.x), "=r"(v.y) : "l"(source));
    return v;
}

MOE_DEVICE uint32_t load_nc_32(const void* source) {
    uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(v) : "l"(source));
    return v;
}

MOE_DEVICE uint16_t load_nc_16(const void* source) {
    uint16_t v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.u16 %0, [%1];" : "=h"(v) : "l"(source));
    return v;
}

MOE_DEVICE void store_128(void* target, uint4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "l"(target), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

MOE_DEVICE void store_64(void* target, uint2 v) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" :: "l"(target), "r"(v.x), "r"(v.y) : "memory");
}

MOE_DEVICE void store_cs_128(void* target, uint4 v) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "l"(target), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

MOE_DEVICE void store_cs_64(void* target, uint2 v) {
    asm volatile("st.global.cs.v2.u32 [%0], {%1, %2};" :: "l"(target), "r"(v.x), "r"(v.y) : "memory");
}

MOE_DEVICE void store_cs_32(void* target, uint32_t v) {
    asm volatile("st.global.cs.u32 [%0], %1;" :: "l"(target), "r"(v) : "memory");
}

// Any address of global memory; no fault if it does not exist.
MOE_DEVICE void prefetch_l2(const void* source) { asm volatile("prefetch.global.L2 [%0];" ::"l"(source)); }

// ---- synchronisation between blocks through global memory (scope: the GPU) ----

MOE_DEVICE uint32_t load_acquire(const uint32_t* source) {
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(source) : "memory");
    return v;
}

MOE_DEVICE uint64_t load_acquire(const uint64_t* source) {
    uint64_t v;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(source) : "memory");
    return v;
}

MOE_DEVICE void store_release(uint32_t* target, uint32_t v) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" :: "l"(target), "r"(v) : "memory");
}

MOE_DEVICE void store_release(uint64_t* target, uint64_t v) {
    asm volatile("st.release.gpu.global.u64 [%0], %1;" :: "l"(target), "l"(v) : "memory");
}

// Returns the value before the addition; release for what came before, acquire for what follows.
MOE_DEVICE uint32_t atomic_add_acq_rel(uint32_t* target, uint32_t v) {
    uint32_t old;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(target), "r"(v) : "memory");
    return old;
}

// ---- shared memory by 32-bit address ----

MOE_DEVICE uint4 load_shared_128(uint32_t source) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(source) : "memory");
    return v;
}

MOE_DEVICE uint2 load_shared_64(uint32_t source) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(source) : "memory");
    return v;
}

MOE_DEVICE uint32_t load_shared_32(uint32_t source) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(source) : "memory");
    return v;
}

MOE_DEVICE void store_shared_128(uint32_t target, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "r"(target), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

MOE_DEVICE void store_shared_64(uint32_t target, uint2 v) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" :: "r"(target), "r"(v.x), "r"(v.y) : "memory");
}

MOE_DEVICE void store_shared_32(uint32_t target, uint32_t v) {
    asm volatile("st.shared.u32 [%0], %1;" :: "r"(target), "r"(v) : "memory");
}

MOE_DEVICE void store_shared_16(uint32_t target, uint16_t v) {
    asm volatile("st.shared.u16 [%0], %1;" :: "r"(target), "h"(v) : "memory");
}

// ---- arithmetic ----

// 1 / v within 1 ulp.
MOE_DEVICE float reciprocal(float v) {
    float r;
    asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

// ---- conversions, round to nearest even; a NaN becomes 0x7fff (bf16, f16) ----

MOE_DEVICE uint16_t f32_to_bf16(float v) {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    return bits;
}

// `low` lands in bits 0 to 15.
MOE_DEVICE uint32_t f32_to_bf16x2(float low, float high) {
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

MOE_DEVICE uint16_t f32_to_f16(float v) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    return bits;
}

MOE_DEVICE uint32_t f32_to_f16x2(float low, float high) {
    uint32_t bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

// Exact. A signalling NaN comes out quiet.
MOE_DEVICE float f16_to_f32(uint16_t bits) {
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
    return v;
}

// Rounds to TF32's ten bits of mantissa, ties away from zero; the result is an f32's bits.
MOE_DEVICE uint32_t f32_to_tf32(float v) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
    return bits;
}

}  // namespace ptx
