// memory.cuh, emulated. Vector accesses must be aligned; shared addresses are bounds-checked.
#pragma once

#include <time.h>

namespace emu {

template <class T>
inline T load(const void* source, const char* what) {
    check_alignment(source, sizeof(T), what);
    T v;
    memcpy(&v, source, sizeof(T));
    return v;
}

template <class T>
inline void store(void* target, T v, const char* what) {
    check_alignment(target, sizeof(T), what);
    memcpy(target, &v, sizeof(T));
}

template <class T>
inline T load_shared(uint32_t source, const char* what) {
    T v;
    memcpy(&v, shared_pointer(source, sizeof(T), sizeof(T), what), sizeof(T));
    return v;
}

template <class T>
inline void store_shared(uint32_t target, T v, const char* what) {
    memcpy(shared_pointer(target, sizeof(T), sizeof(T), what), &v, sizeof(T));
}

// IEEE conversions, in convert.cpp.
uint16_t f32_to_f16(float v);
float f16_to_f32(uint16_t bits);
uint16_t f32_to_bf16(float v);
uint32_t f32_to_tf32(float v);

}  // namespace emu

namespace ptx {

inline uint32_t shared_address(const void* pointer) { return emu::shared_address(pointer); }
inline uint32_t lane_id() { return emu::self->lane; }

inline uint64_t global_timer() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<uint64_t>(now.tv_sec) * 1000000000u + static_cast<uint64_t>(now.tv_nsec);
}
inline uint64_t clock() { return global_timer(); }
inline float reciprocal(float v) { return 1.0f / v; }
inline void nanosleep(uint32_t) { emu::yield("nanosleep"); }
[[noreturn]] inline void trap() { emu::fail("trap"); }

inline uint4 load_128(const void* source) { return emu::load<uint4>(source, "ld.global.v4.u32"); }
inline uint4 load_nc_128(const void* source) { return emu::load<uint4>(source, "ld.global.nc.v4.u32"); }
inline uint2 load_nc_64(const void* source) { return emu::load<uint2>(source, "ld.global.nc.v2.u32"); }
inline uint32_t load_nc_32(const void* source) { return emu::load<uint32_t>(source, "ld.global.nc.u32"); }
inline uint16_t load_nc_16(const void* source) { return emu::load<uint16_t>(source, "ld.global.nc.u16"); }
inline void store_128(void* target, uint4 v) { emu::store(target, v, "st.global.v4.u32"); }
inline void store_64(void* target, uint2 v) { emu::store(target, v, "st.global.v2.u32"); }
inline void store_cs_128(void* target, uint4 v) { emu::store(target, v, "st.global.cs.v4.u32"); }
inline void store_cs_64(void* target, uint2 v) { emu::store(target, v, "st.global.cs.v2.u32"); }
inline void store_cs_32(void* target, uint32_t v) { emu::store(target, v, "st.global.cs.u32"); }
inline void prefetch_l2(const void*) {}

// A thread may spin on an acquiring load, so others run first.
inline uint32_t load_acquire(const uint32_t* source) {
    emu::check_alignment(source, 4, "ld.acquire.u32");
    emu::yield("ld.acquire");
    return __atomic_load_n(source, __ATOMIC_ACQUIRE);
}
inline uint64_t load_acquire(const uint64_t* source) {
    emu::check_alignment(source, 8, "ld.acquire.u64");
    emu::yield("ld.acquire");
    return __atomic_load_n(source, __ATOMIC_ACQUIRE);
}
inline void store_release(uint32_t* target, uint32_t v) {
    emu::check_alignment(target, 4, "st.release.u32");
    __atomic_store_n(target, v, __ATOMIC_RELEASE);
    emu::progress();
}
inline void store_release(uint64_t* target, uint64_t v) {
    emu::check_alignment(target, 8, "st.release.u64");
    __atomic_store_n(target, v, __ATOMIC_RELEASE);
    emu::progress();
}
inline uint32_t atomic_add_acq_rel(uint32_t* target, uint32_t v) {
    emu::check_alignment(target, 4, "atom.acq_rel.add.u32");
    const uint32_t old = __atomic_fetch_add(target, v, __ATOMIC_ACQ_REL);
    emu::progress();
    return old;
}

inline uint4 load_shared_128(uint32_t source) { return emu::load_shared<uint4>(source, "ld.shared.v4.u32"); }
inline uint2 load_shared_64(uint32_t source) { return emu::load_shared<uint2>(source, "ld.shared.v2.u32"); }
inline uint32_t load_shared_32(uint32_t source) { return emu::load_shared<uint32_t>(source, "ld.shared.u32"); }
inline void store_shared_128(uint32_t target, uint4 v) { emu::store_shared(target, v, "st.shared.v4.u32"); }
inline void store_shared_64(uint32_t target, uint2 v) { emu::store_shared(target, v, "st.shared.v2.u32"); }
inline void store_shared_32(uint32_t target, uint32_t v) { emu::store_shared(target, v, "st.shared.u32"); }
inline void store_shared_16(uint32_t target, uint16_t v) { emu::store_shared(target, v, "st.shared.u16"); }

inline uint16_t f32_to_bf16(float v) { return emu::f32_to_bf16(v); }
inline uint16_t f32_to_f16(float v) { return emu::f32_to_f16(v); }
inline float f16_to_f32(uint16_t bits) { return emu::f16_to_f32(bits); }
inline uint32_t f32_to_tf32(float v) { return emu::f32_to_tf32(v); }
inline uint32_t f32_to_bf16x2(float low, float high) {
    return emu::f32_to_bf16(low) | static_cast<uint32_t>(emu::f32_to_bf16(high)) << 16;
}
inline uint32_t f32_to_f16x2(float low, float high) {
    return emu::f32_to_f16(low) | static_cast<uint32_t>(emu::f32_to_f16(high)) << 16;
}

}  // namespace ptx
