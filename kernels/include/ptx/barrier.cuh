// Named barriers (sm_80), mbarrier, clusters, fences between proxies, register reallocation (sm_90).
#pragma once

namespace ptx {

// ---- named barriers: id 0 to 15 (0 is __syncthreads), `threads` a multiple of 32 ----

MOE_DEVICE void barrier_sync(uint32_t id, uint32_t threads) {
    asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}

MOE_DEVICE void barrier_arrive(uint32_t id, uint32_t threads) {
    asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(threads) : "memory");
}

// True on exactly one lane of a converged warp (sm_90).
MOE_DEVICE bool elect_one() {
    uint32_t elected;
    asm volatile("{\n .reg .pred p;\n elect.sync _|p, 0xffffffff;\n selp.u32 %0, 1, 0, p;\n}" : "=r"(elected) :: "memory");
    return elected != 0;
}

// ---- mbarrier (8 bytes, aligned, in shared memory). Phases alternate parity, the first has parity 0: a consumer waits
// for parity 0 first; waiting for parity 1 on a fresh barrier returns at once. ----

MOE_DEVICE void mbarrier_init(uint32_t mbarrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(mbarrier), "r"(arrivals) : "memory");
}

MOE_DEVICE void mbarrier_inval(uint32_t mbarrier) {
    asm volatile("mbarrier.inval.shared::cta.b64 [%0];" :: "r"(mbarrier) : "memory");
}

// Makes initialisation visible to the async proxy and to the cluster; then synchronise the threads.
MOE_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

MOE_DEVICE void mbarrier_arrive(uint32_t mbarrier) {
    asm volatile("{\n .reg .b64 state;\n mbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(mbarrier) : "memory");
}

// One arrival, and `bytes` more to come by asynchronous copies before the phase ends.
MOE_DEVICE void mbarrier_arrive_expect_tx(uint32_t mbarrier, uint32_t bytes) {
    asm volatile("{\n .reg .b64 state;\n mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}"
                 :: "r"(mbarrier), "r"(bytes) : "memory");
}

MOE_DEVICE void mbarrier_expect_tx(uint32_t mbarrier, uint32_t bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" :: "r"(mbarrier), "r"(bytes) : "memory");
}

// Arrival at a barrier of another block of the cluster: `mapped` comes from `map_shared`.
MOE_DEVICE void mbarrier_arrive_cluster(uint32_t mapped) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(mapped) : "memory");
}

// The same with the default semantics, release at the scope of the own block: for arrivals that publish no memory to the other one.
MOE_DEVICE void mbarrier_arrive_cluster_unordered(uint32_t mapped) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(mapped) : "memory");
}

// True once the phase of that parity has ended. May suspend the thread for a while, and may be false without cause.
MOE_DEVICE bool mbarrier_try_wait(uint32_t mbarrier, uint32_t parity) {
    uint32_t done;
    asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done) : "r"(mbarrier), "r"(parity) : "memory");
    return done != 0;
}

// The same with acquire at cluster scope, for barriers on which other blocks arrive.
MOE_DEVICE bool mbarrier_try_wait_cluster(uint32_t mbarrier, uint32_t parity) {
    uint32_t done;
    asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
                 " selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done) : "r"(mbarrier), "r"(parity) : "memory");
    return done != 0;
}

MOE_DEVICE void mbarrier_wait(uint32_t mbarrier, uint32_t parity) {
    while (!mbarrier_try_wait(mbarrier, parity)) {
    }
}

MOE_DEVICE void mbarrier_wait_cluster(uint32_t mbarrier, uint32_t parity) {
    while (!mbarrier_try_wait_cluster(mbarrier, parity)) {
    }
}

// ---- clusters ----

MOE_DEVICE uint32_t cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

MOE_DEVICE uint32_t cluster_size() {
    uint32_t size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

MOE_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }

// Arrival that publishes no memory.
MOE_DEVICE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }

MOE_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The shared::cluster address that block `rank` of this cluster has for this block's shared address.
MOE_DEVICE uint32_t map_shared(uint32_t address, uint32_t rank) {
    uint32_t mapped;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
    return mapped;
}

MOE_DEVICE uint32_t load_cluster_32(uint32_t mapped) {
    uint32_t v;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(mapped) : "memory");
    return v;
}

MOE_DEVICE void store_cluster_32(uint32_t mapped, uint32_t v) {
    asm volatile("st.shared::cluster.u32 [%0], %1;" :: "r"(mapped), "r"(v) : "memory");
}

// ---- proxies: writes of this thread to shared memory become visible to TMA and wgmma ----

MOE_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- registers per thread of this warpgroup: 24 to 256, a multiple of 8; all its warps must call it ----

template <int Registers>
MOE_DEVICE void registers_increase() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <int Registers>
MOE_DEVICE void registers_decrease() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// ---- programmatic dependent launch ----

// Until the grids that this one depends on have finished and their writes are visible. Returns at once without one.
MOE_DEVICE void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The dependent grid may start.
MOE_DEVICE void grid_dependency_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

}  // namespace ptx
