// Named barriers, __syncthreads, cluster barriers, mbarriers.
#include <stdio.h>

#include "state.h"

namespace emu {

// ---- named barriers ----

namespace {

void release_barrier(NamedBarrier& barrier) {
    barrier.result = barrier.holding;
    barrier.arrived = barrier.holding = barrier.expected = 0;
    Fiber* me = current();
    for (Fiber* fiber : barrier.waiting) {
        if (fiber != me) wake(fiber);
    }
    barrier.waiting.clear();
    me->cluster->idle_yields = 0;
}

void check_barrier(NamedBarrier& barrier, uint32_t id, uint32_t threads) {
    const uint32_t block = current()->block_dim.x * current()->block_dim.y * current()->block_dim.z;
    if (id >= 16) fail("barrier %u: there are 16", id);
    if (threads == 0 || threads % 32 != 0 || threads > (block + 31) / 32 * 32) {
        fail("barrier %u: %u threads; a multiple of 32, at most the block's %u, is needed", id, threads, block);
    }
    if (barrier.arrived == 0) barrier.expected = threads;
    if (barrier.expected != threads) {
        fail("barrier %u: this thread counts %u threads, those that wait there count %u", id, threads, barrier.expected);
    }
}

}  // namespace

void barrier_sync(uint32_t id, uint32_t threads) {
    Fiber& fiber = *current();
    NamedBarrier& barrier = fiber.home->barriers[id & 15];
    check_barrier(barrier, id, threads);
    if (++barrier.arrived == threads) {
        release_barrier(barrier);
        return;
    }
    barrier.waiting.push_back(&fiber);
    park({"bar.sync %llu for %llu threads", id, threads, &barrier});
}

void barrier_arrive(uint32_t id, uint32_t threads) {
    NamedBarrier& barrier = current()->home->barriers[id & 15];
    check_barrier(barrier, id, threads);
    if (++barrier.arrived == threads) release_barrier(barrier);
}

uint32_t sync_threads(bool predicate) {
    Fiber& fiber = *current();
    NamedBarrier& barrier = fiber.home->barriers[0];
    barrier.holding += predicate;
    if (++barrier.arrived >= fiber.home->alive) {
        release_barrier(barrier);
    } else {
        barrier.waiting.push_back(&fiber);
        park({"__syncthreads", 0, 0, &barrier});
    }
    return barrier.result;
}

// A thread that has ended counts no more for __syncthreads and for the cluster's barrier.
static void release_cluster(Cluster& cluster);

void thread_leaves_barriers(Fiber* fiber) {
    NamedBarrier& barrier = fiber->home->barriers[0];
    if (barrier.arrived != 0 && barrier.expected == 0 && barrier.arrived >= fiber->home->alive) release_barrier(barrier);
    Cluster& cluster = *fiber->cluster;
    cluster.cluster_arrived -= fiber->cluster_arrivals > cluster.cluster_phase;
    if (cluster.alive != 0 && cluster.cluster_arrived >= cluster.alive && cluster.cluster_arrived != 0) release_cluster(cluster);
}

// ---- the cluster's barrier ----

static void release_cluster(Cluster& cluster) {
    cluster.cluster_arrived = 0;
    ++cluster.cluster_phase;
    for (Fiber* fiber : cluster.cluster_waiting) wake(fiber);
    cluster.cluster_waiting.clear();
    cluster.idle_yields = 0;
}

void cluster_arrive() {
    Fiber& fiber = *current();
    Cluster& cluster = *fiber.cluster;
    if (fiber.cluster_arrivals != cluster.cluster_phase) fail("barrier.cluster.arrive twice without a wait between");
    ++fiber.cluster_arrivals;
    if (++cluster.cluster_arrived >= cluster.alive) release_cluster(cluster);
}

void cluster_wait() {
    Fiber& fiber = *current();
    Cluster& cluster = *fiber.cluster;
    if (fiber.cluster_arrivals == 0) fail("barrier.cluster.wait before barrier.cluster.arrive");
    while (cluster.cluster_phase < fiber.cluster_arrivals) {
        cluster.cluster_waiting.push_back(&fiber);
        park({"barrier.cluster.wait (phase %llu)", cluster.cluster_phase, 0, &cluster});
    }
}

// ---- mbarriers: the state lies in the eight bytes themselves, so that what overwrites it is noticed ----
//
// bits 0..1 tag, 2 phase, 3..22 arrivals still expected, 23..42 arrivals of a phase, 43..63 transaction bytes (signed)

namespace {

constexpr uint64_t kTag = 1;
constexpr uint32_t kMaxArrivals = (1u << 20) - 1;

struct Mbarrier {
    uint32_t phase, pending, expected;
    int64_t transactions;
};

Mbarrier unpack(uint64_t bits) {
    return {static_cast<uint32_t>(bits >> 2 & 1), static_cast<uint32_t>(bits >> 3 & kMaxArrivals),
            static_cast<uint32_t>(bits >> 23 & kMaxArrivals), static_cast<int64_t>(bits) >> 43};
}

uint64_t pack(const Mbarrier& b) {
    return kTag | uint64_t(b.phase) << 2 | uint64_t(b.pending) << 3 | uint64_t(b.expected) << 23 |
           static_cast<uint64_t>(b.transactions) << 43;
}

Mbarrier load(const uint64_t* mbarrier, const char* what) {
    if ((*mbarrier & 3) != kTag) {
        fail("%s: no mbarrier was initialised at this address, or it was overwritten (it holds 0x%016llx)", what,
             static_cast<unsigned long long>(*mbarrier));
    }
    return unpack(*mbarrier);
}

void store(uint64_t* mbarrier, Mbarrier b) {
    if (b.pending != 0 || b.transactions != 0) {
        *mbarrier = pack(b);
        return;
    }
    b.phase ^= 1;
    b.pending = b.expected;
    *mbarrier = pack(b);
    if (!self) return;  // every thread has ended
    auto& waiting = current()->cluster->mbarrier_waiting;
    for (size_t i = 0; i < waiting.size();) {
        if (waiting[i]->wait.object == mbarrier) {
            wake(waiting[i]);
            waiting[i] = waiting.back();
            waiting.pop_back();
        } else {
            ++i;
        }
    }
}

}  // namespace

void mbarrier_init(uint32_t address, uint32_t arrivals) {
    auto* mbarrier = static_cast<uint64_t*>(shared_pointer(address, 8, 8, "mbarrier.init"));
    if (arrivals == 0 || arrivals > kMaxArrivals) fail("mbarrier.init: %u arrivals; 1 to %u are possible", arrivals, kMaxArrivals);
    *mbarrier = pack({0, arrivals, arrivals, 0});
}

void mbarrier_inval(uint32_t address) {
    auto* mbarrier = static_cast<uint64_t*>(shared_pointer(address, 8, 8, "mbarrier.inval"));
    load(mbarrier, "mbarrier.inval");
    *mbarrier = ~uint64_t(0);
}

void mbarrier_arrive(uint64_t* mbarrier, uint32_t count, uint32_t expected_bytes) {
    Mbarrier b = load(mbarrier, "mbarrier.arrive");
    b.transactions += expected_bytes;
    if (b.transactions > kMaxArrivals) fail("mbarrier: %lld transaction bytes; at most %u fit", static_cast<long long>(b.transactions), kMaxArrivals);
    if (count > b.pending) {
        fail("mbarrier.arrive: one arrival more than the %u that this phase expects (transaction bytes still to come: %lld)", b.expected,
             static_cast<long long>(b.transactions));
    }
    b.pending -= count;
    store(mbarrier, b);
    progress();
}

void mbarrier_add_transactions(uint64_t* mbarrier, int64_t bytes) {
    Mbarrier b = load(mbarrier, bytes < 0 ? "mbarrier.complete_tx" : "mbarrier.expect_tx");
    b.transactions += bytes;
    if (b.transactions > kMaxArrivals || b.transactions < -static_cast<int64_t>(kMaxArrivals)) {
        fail("mbarrier: %lld transaction bytes; at most %u fit", static_cast<long long>(b.transactions), kMaxArrivals);
    }
    store(mbarrier, b);
    progress();
}

bool mbarrier_try_wait(uint32_t address, uint32_t parity) {
    auto* mbarrier = static_cast<uint64_t*>(shared_pointer(address, 8, 8, "mbarrier.try_wait"));
    if (load(mbarrier, "mbarrier.try_wait").phase != (parity & 1)) return true;
    Fiber& fiber = *current();
    if (!fiber.cluster->ordered && fiber.cluster->random.once_in(4)) {  // false without cause is allowed
        yield("mbarrier.try_wait");
        return false;
    }
    fiber.cluster->mbarrier_waiting.push_back(&fiber);
    park({"mbarrier.try_wait at shared address 0x%llx for parity %llu", address, parity & 1, mbarrier});
    return load(mbarrier, "mbarrier.try_wait").phase != (parity & 1);
}

void mbarrier_arrive_at(uint32_t address, uint32_t expected_bytes) {
    mbarrier_arrive(static_cast<uint64_t*>(shared_pointer(address, 8, 8, "mbarrier.arrive")), 1, expected_bytes);
}

void mbarrier_expect(uint32_t address, uint32_t bytes) {
    mbarrier_add_transactions(static_cast<uint64_t*>(shared_pointer(address, 8, 8, "mbarrier.expect_tx")), bytes);
}

std::string describe_mbarrier(const void* pointer) {
    const uint64_t bits = *static_cast<const uint64_t*>(pointer);
    const Mbarrier b = unpack(bits);
    char text[160];
    if ((bits & 3) != kTag) return "overwritten";
    snprintf(text, sizeof text, "phase parity %u, %u of %u arrivals missing, %lld transaction bytes missing", b.phase, b.pending, b.expected,
             static_cast<long long>(b.transactions));
    return text;
}

}  // namespace emu
