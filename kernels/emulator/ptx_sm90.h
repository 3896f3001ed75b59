// barrier.cuh, tma.cuh and wgmma.cuh, emulated. Bulk copies and warpgroup products take effect late.
#pragma once

namespace emu {

void mbarrier_init(uint32_t mbarrier, uint32_t arrivals);
void mbarrier_inval(uint32_t mbarrier);
void mbarrier_arrive_at(uint32_t mbarrier, uint32_t expected_bytes);
void mbarrier_expect(uint32_t mbarrier, uint32_t bytes);
bool mbarrier_try_wait(uint32_t mbarrier, uint32_t parity);

void tma_load(uint32_t target, const TensorMap& map, uint32_t mbarrier, uint32_t rank, const int32_t* coordinates, uint32_t blocks);
void tma_store(const TensorMap& map, uint32_t source, uint32_t rank, const int32_t* coordinates);
void bulk_load(uint32_t target, const void* source, uint32_t bytes, uint32_t mbarrier);
void bulk_store(void* target, uint32_t source, uint32_t bytes);
void bulk_commit();
void bulk_wait(uint32_t pending, bool read_only);

void fence_proxy_async();
void registers_change(uint32_t registers, bool increase);

void wgmma_fence();
void wgmma_commit();
void wgmma_wait(uint32_t pending);
void wgmma(bool bf16, uint32_t registers, float* d, const uint32_t* a_registers, uint64_t a, uint64_t b, bool accumulate, bool transpose_b);

constexpr uint32_t kOwnBlock = 0;  // `blocks` of a load without multicast

}  // namespace emu

namespace ptx {

inline void barrier_sync(uint32_t id, uint32_t threads) { emu::barrier_sync(id, threads); }
inline void barrier_arrive(uint32_t id, uint32_t threads) { emu::barrier_arrive(id, threads); }
inline bool elect_one() { return emu::vote(emu::kVoteElect, 0xffffffffu, true) != 0; }

inline void mbarrier_init(uint32_t mbarrier, uint32_t arrivals) { emu::mbarrier_init(mbarrier, arrivals); }
inline void mbarrier_inval(uint32_t mbarrier) { emu::mbarrier_inval(mbarrier); }
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(uint32_t mbarrier) { emu::mbarrier_arrive_at(mbarrier, 0); }
inline void mbarrier_arrive_expect_tx(uint32_t mbarrier, uint32_t bytes) { emu::mbarrier_arrive_at(mbarrier, bytes); }
inline void mbarrier_expect_tx(uint32_t mbarrier, uint32_t bytes) { emu::mbarrier_expect(mbarrier, bytes); }
inline void mbarrier_arrive_cluster(uint32_t mapped) { emu::mbarrier_arrive_at(mapped, 0); }
inline void mbarrier_arrive_cluster_unordered(uint32_t mapped) { emu::mbarrier_arrive_at(mapped, 0); }
inline bool mbarrier_try_wait(uint32_t mbarrier, uint32_t parity) { return emu::mbarrier_try_wait(mbarrier, parity); }
inline bool mbarrier_try_wait_cluster(uint32_t mbarrier, uint32_t parity) { return emu::mbarrier_try_wait(mbarrier, parity); }
inline void mbarrier_wait(uint32_t mbarrier, uint32_t parity) {
    while (!mbarrier_try_wait(mbarrier, parity)) {
    }
}
inline void mbarrier_wait_cluster(uint32_t mbarrier, uint32_t parity) { mbarrier_wait(mbarrier, parity); }

inline uint32_t cluster_rank() { return emu::self->cluster_rank; }
inline uint32_t cluster_size() { return emu::self->cluster_size; }
inline void cluster_arrive() { emu::cluster_arrive(); }
inline void cluster_arrive_relaxed() { emu::cluster_arrive(); }
inline void cluster_wait() { emu::cluster_wait(); }
inline uint32_t map_shared(uint32_t address, uint32_t rank) { return emu::map_shared(address, rank); }
inline uint32_t load_cluster_32(uint32_t mapped) { return emu::load_shared<uint32_t>(mapped, "ld.shared::cluster.u32"); }
inline void store_cluster_32(uint32_t mapped, uint32_t v) { emu::store_shared(mapped, v, "st.shared::cluster.u32"); }

inline void fence_proxy_async() { emu::fence_proxy_async(); }
template <int Registers>
inline void registers_increase() { emu::registers_change(Registers, true); }
template <int Registers>
inline void registers_decrease() { emu::registers_change(Registers, false); }
inline void grid_dependency_wait() {}
inline void grid_dependency_launch() {}

inline uint64_t policy_evict_first() { return 1; }
inline uint64_t policy_evict_last() { return 2; }
inline void tma_prefetch_map(const TensorMap&) {}

inline void tma_load_2d(uint32_t target, const TensorMap& map, uint32_t mbarrier, int32_t c0, int32_t c1) {
    const int32_t c[] = {c0, c1};
    emu::tma_load(target, map, mbarrier, 2, c, emu::kOwnBlock);
}
inline void tma_load_2d_hint(uint32_t target, const TensorMap& map, uint32_t mbarrier, int32_t c0, int32_t c1, uint64_t) {
    tma_load_2d(target, map, mbarrier, c0, c1);
}
inline void tma_load_3d(uint32_t target, const TensorMap& map, uint32_t mbarrier, int32_t c0, int32_t c1, int32_t c2) {
    const int32_t c[] = {c0, c1, c2};
    emu::tma_load(target, map, mbarrier, 3, c, emu::kOwnBlock);
}
inline void tma_load_3d_hint(uint32_t target, const TensorMap& map, uint32_t mbarrier, int32_t c0, int32_t c1, int32_t c2, uint64_t) {
    tma_load_3d(target, map, mbarrier, c0, c1, c2);
}
inline void tma_load_4d(uint32_t target, const TensorMap& map, uint32_t mbarrier, int32_t c0, int32_t c1, int32_t c2, int32_t c3) {
    const int32_t c[] = {c0, c1, c2, c3};
    emu::tma_load(target, map, mbarrier, 4, c, emu::kOwnBlock);
}
inline void tma_load_5d(uint32_t target, const TensorMap& map, uint32_t mbarrier, int32_t c0, int32_t c1, int32_t c2, int32_t c3,
                        int32_t c4) {
    const int32_t c[] = {c0, c1, c2, c3, c4};
    emu::tma_load(target, map, mbarrier, 5, c, emu::kOwnBlock);
}
inline void tma_load_2d_multicast(uint32_t target, const TensorMap& map, uint32_t mbarrier, uint16_t blocks, int32_t c0, int32_t c1) {
    const int32_t c[] = {c0, c1};
    if (blocks == 0) emu::fail("cp.async.bulk.tensor multicast to no block");
    emu::tma_load(target, map, mbarrier, 2, c, blocks);
}
inline void tma_load_3d_multicast(uint32_t target, const TensorMap& map, uint32_t mbarrier, uint16_t blocks, int32_t c0, int32_t c1,
                                  int32_t c2) {
    const int32_t c[] = {c0, c1, c2};
    if (blocks == 0) emu::fail("cp.async.bulk.tensor multicast to no block");
    emu::tma_load(target, map, mbarrier, 3, c, blocks);
}
inline void tma_store_2d(const TensorMap& map, uint32_t source, int32_t c0, int32_t c1) {
    const int32_t c[] = {c0, c1};
    emu::tma_store(map, source, 2, c);
}
inline void tma_store_3d(const TensorMap& map, uint32_t source, int32_t c0, int32_t c1, int32_t c2) {
    const int32_t c[] = {c0, c1, c2};
    emu::tma_store(map, source, 3, c);
}
inline void bulk_load(uint32_t target, const void* source, uint32_t bytes, uint32_t mbarrier) {
    emu::bulk_load(target, source, bytes, mbarrier);
}
inline void bulk_store(void* target, uint32_t source, uint32_t bytes) { emu::bulk_store(target, source, bytes); }
inline void bulk_commit() { emu::bulk_commit(); }
template <int Pending>
inline void bulk_wait_read() { emu::bulk_wait(Pending, true); }
template <int Pending>
inline void bulk_wait() { emu::bulk_wait(Pending, false); }

inline uint64_t wgmma_descriptor(uint32_t address, uint32_t leading, uint32_t stride, Swizzle swizzle) {
    const uint64_t mode = swizzle == Swizzle::None ? 0 : 4 - static_cast<uint64_t>(swizzle);
    return (static_cast<uint64_t>(address & 0x3ffff) >> 4) | (static_cast<uint64_t>(leading & 0x3ffff) >> 4) << 16 |
           (static_cast<uint64_t>(stride & 0x3ffff) >> 4) << 32 | mode << 62;
}
inline void wgmma_fence() { emu::wgmma_fence(); }
inline void wgmma_commit() { emu::wgmma_commit(); }
template <int Pending>
inline void wgmma_wait() { emu::wgmma_wait(Pending); }
inline void wgmma_hold(float& accumulator) { asm volatile("" : "+m"(accumulator)::"memory"); }

template <bool TransposeB = false, int Registers>
inline void wgmma_f16(float (&d)[Registers], uint64_t a, uint64_t b, bool accumulate) {
    emu::wgmma(false, Registers, d, nullptr, a, b, accumulate, TransposeB);
}
template <bool TransposeB = false, int Registers>
inline void wgmma_f16(float (&d)[Registers], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    emu::wgmma(false, Registers, d, a, 0, b, accumulate, TransposeB);
}
template <bool TransposeB = false, int Registers>
inline void wgmma_bf16(float (&d)[Registers], uint64_t a, uint64_t b, bool accumulate) {
    emu::wgmma(true, Registers, d, nullptr, a, b, accumulate, TransposeB);
}
template <bool TransposeB = false, int Registers>
inline void wgmma_bf16(float (&d)[Registers], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    emu::wgmma(true, Registers, d, a, 0, b, accumulate, TransposeB);
}

}  // namespace ptx
