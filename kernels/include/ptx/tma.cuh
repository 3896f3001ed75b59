// Tensor maps and bulk copies: sm_90. One thread issues; coordinates count elements, the innermost first.
#pragma once

namespace ptx {

// L2 cache policies for loads.
MOE_DEVICE uint64_t policy_evict_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
    return policy;
}

MOE_DEVICE uint64_t policy_evict_last() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0;" : "=l"(policy));
    return policy;
}

MOE_DEVICE void tma_prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// ---- loads: the box at the coordinates into shared memory (128-byte aligned), zeros outside the tensor; the whole
// box's bytes are credited to the mbarrier ----

MOE_DEVICE void tma_load_2d(uint32_t target, const TensorMap& map, uint32_t mbarrier, int32_t c0, int32_t c1) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4}], [%2];"
                 :: "r"(target), "l"(&map), "r"(mbarrier), "r"(c0), "r"(c1) : "memory");
}

MOE_DEVICE void tma_load_2d_hint(uint32_t target, const TensorMap& map, uint32_t mbarrier, int32_t c0, int32_t c1,
                                 uint64_t policy) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%3, %4}], [%2], %5;"
                 :: "r"(target), "l"(&map), "r"(mbarrier), "r"(c0), "r"(c1), "l"(policy) : "memory");
}

MOE_DEVICE void tma_load_3d(uint32_t target, const TensorMap& map, uint32_t mbarrier, int32_t c0, int32_t c1, int32_t c2) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5}], [%2];"
                 :: "r"(target), "l"(&map), "r"(mbarrier), "r"(c0), "r"(c1), "r"(c2) : "memory");
}

MOE_DEVICE void tma_load_3d_hint(uint32_t target, const TensorMap& map, uint32_t mbarrier, int32_t c0, int32_t c1,
                                 int32_t c2, uint64_t policy) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%3, %4, %5}], [%2], %6;"
                 :: "r"(target), "l"(&map), "r"(mbarrier), "r"(c0), "r"(c1), "r"(c2), "l"(policy) : "memory");
}

MOE_DEVICE void tma_load_4d(uint32_t target, const TensorMap& map, uint32_t mbarrier, int32_t c0, int32_t c1, int32_t c2,
                            int32_t c3) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6}], [%2];"
                 :: "r"(target), "l"(&map), "r"(mbarrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}

MOE_DEVICE void tma_load_5d(uint32_t target, const TensorMap& map, uint32_t mbarrier, int32_t c0, int32_t c1, int32_t c2,
                            int32_t c3, int32_t c4) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];"
                 :: "r"(target), "l"(&map), "r"(mbarrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory");
}

// ---- the same into every block of the cluster whose bit is set in `blocks`, at the same shared address, with the credit
// to the mbarrier at the same address there ----

MOE_DEVICE void tma_load_2d_multicast(uint32_t target, const TensorMap& map, uint32_t mbarrier, uint16_t blocks,
                                      int32_t c0, int32_t c1) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%4, %5}], [%2], %3;"
                 :: "r"(target), "l"(&map), "r"(mbarrier), "h"(blocks), "r"(c0), "r"(c1) : "memory");
}

MOE_DEVICE void tma_load_3d_multicast(uint32_t target, const TensorMap& map, uint32_t mbarrier, uint16_t blocks,
                                      int32_t c0, int32_t c1, int32_t c2) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%4, %5, %6}], [%2], %3;"
                 :: "r"(target), "l"(&map), "r"(mbarrier), "h"(blocks), "r"(c0), "r"(c1), "r"(c2) : "memory");
}

// ---- stores: the box from shared memory, clipped to the tensor; commit and wait by bulk group ----

MOE_DEVICE void tma_store_2d(const TensorMap& map, uint32_t source, int32_t c0, int32_t c1) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];"
                 :: "l"(&map), "r"(source), "r"(c0), "r"(c1) : "memory");
}

MOE_DEVICE void tma_store_3d(const TensorMap& map, uint32_t source, int32_t c0, int32_t c1, int32_t c2) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];"
                 :: "l"(&map), "r"(source), "r"(c0), "r"(c1), "r"(c2) : "memory");
}

// ---- plain bulk copies: addresses and size multiples of 16 bytes ----

MOE_DEVICE void bulk_load(uint32_t target, const void* source, uint32_t bytes, uint32_t mbarrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(target), "l"(source), "r"(bytes), "r"(mbarrier) : "memory");
}

MOE_DEVICE void bulk_store(void* target, uint32_t source, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
                 :: "l"(target), "r"(source), "r"(bytes) : "memory");
}

MOE_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// At most `Pending` of this thread's groups still read their shared memory.
template <int Pending>
MOE_DEVICE void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

// At most `Pending` of this thread's groups have not yet been written.
template <int Pending>
MOE_DEVICE void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory");
}

}  // namespace ptx
