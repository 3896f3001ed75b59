// Runs a grid: clusters one after another, a cluster's threads as fibers that take turns in a seeded random order.
//
// A thread runs until it waits: at a barrier, a collective, an mbarrier. What it did before is then seen by all, so a
// missing barrier shows only when the wrong thread comes first. Hence the order is random, and of different kinds: lanes
// of a warp never run in a fixed order; warps alternate finely, or one runs as far ahead as it can while others starve.
#include <algorithm>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "warpgroup.h"

namespace emu {

__thread ThreadView* self;

namespace {

// Per OS thread: the fibers and their stacks are kept from launch to launch.
struct Engine {
    Context main;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<std::unique_ptr<Warp>> warps;
    std::vector<std::unique_ptr<Block>> blocks;
    Cluster cluster;
    std::string failure;
};

Engine& engine() {
    static thread_local Engine instance;
    return instance;
}

struct Failed {};

constexpr uint64_t kIdleYields = 2'000'000;  // that many in a row without progress are a livelock

void set_ready(Warp& warp, uint32_t lane) {
    warp.ready |= 1u << lane;
    warp.block->cluster->ready_warps[warp.index / 64] |= 1ull << warp.index % 64;
}

void clear_ready(Warp& warp, uint32_t lane) {
    warp.ready &= ~(1u << lane);
    if (warp.ready == 0) warp.block->cluster->ready_warps[warp.index / 64] &= ~(1ull << warp.index % 64);
}

// Index of a set bit of `bits`, the first at or after a random position.
uint32_t random_bit(uint32_t bits, uint32_t start) {
    const uint32_t turned = bits >> start | (start ? bits << (32 - start) : 0);
    return (static_cast<uint32_t>(__builtin_ctz(turned)) + start) & 31;
}

// A warp with a ready lane, or -1.
int pick_warp(Cluster& cluster) {
    const size_t words = cluster.ready_warps.size();
    const uint32_t count = static_cast<uint32_t>(cluster.warps.size());
    if (cluster.ordered || !cluster.strategy.ranked) {
        const uint32_t start = cluster.ordered ? 0 : cluster.random.below(count);
        for (size_t step = 0; step <= words; ++step) {
            const size_t word = (start / 64 + step) % words;
            uint64_t bits = cluster.ready_warps[word];
            if (step == 0) bits &= ~0ull << start % 64;
            if (bits) return static_cast<int>(word * 64 + static_cast<size_t>(__builtin_ctzll(bits)));
        }
        return -1;
    }
    int best = -1;
    for (size_t word = 0; word < words; ++word) {
        for (uint64_t bits = cluster.ready_warps[word]; bits; bits &= bits - 1) {
            const int warp = static_cast<int>(word * 64 + static_cast<size_t>(__builtin_ctzll(bits)));
            if (best < 0 || cluster.ranks[warp] > cluster.ranks[best]) best = warp;
        }
    }
    return best;
}

// The next thread to run; null when there is none and nothing pending could wake one.
// `leave`: another warp may come even where the strategy would stay, since what the running one spins for has to happen there.
Fiber* pick(Cluster& cluster, bool leave = false) {
    Random& random = cluster.random;
    if (!cluster.ordered && has_async(cluster) && random.once_in(cluster.strategy.async_eager)) run_async(cluster);
    for (;;) {
        Warp* warp = cluster.warps[cluster.last_warp];
        if (warp->ready == 0 || leave || (!cluster.ordered && random.once_in(cluster.strategy.leave_warp))) {
            if (cluster.strategy.ranked && random.once_in(cluster.strategy.change_ranks)) {
                cluster.ranks[random.below(static_cast<uint32_t>(cluster.ranks.size()))] = static_cast<uint32_t>(random.next());
            }
            const int picked = pick_warp(cluster);
            if (picked < 0) {
                if (run_async(cluster)) continue;
                return nullptr;
            }
            cluster.last_warp = static_cast<uint32_t>(picked);
            warp = cluster.warps[picked];
        }
        const uint32_t lane = cluster.ordered ? static_cast<uint32_t>(__builtin_ctz(warp->ready))
                                              : random_bit(warp->ready, random.below(32));
        return warp->fibers[lane];
    }
}

void resume_main(Fiber& from, bool last) {
    self = nullptr;
    switch_context(from.context, engine().main, last);
}

// Leaves the running fiber, which is parked, done, or wants to let others run.
void schedule(Fiber& from, bool last) {
    Cluster& cluster = *from.cluster;
    Fiber* next = cluster.alive ? pick(cluster) : nullptr;
    if (next == &from) return;
    if (!next) {
        if (cluster.alive) {
            fail("deadlock: no thread can run, and nothing is under way that could wake one.\n%s",
                 describe_threads(cluster).c_str());
        }
        resume_main(from, last);
    } else {
        self = next;
        switch_context(from.context, next->context, last);
    }
}

void fiber_main(void* argument) {
    Fiber& fiber = *static_cast<Fiber*>(argument);
    entered_context(fiber.context);
    fiber.cluster->kernel->invoke(fiber.cluster->arguments);
    check_finished(&fiber);
    fiber.state = State::Done;
    fiber.clean_exit = true;
    clear_ready(*fiber.warp, fiber.lane);
    fiber.warp->alive &= ~(1u << fiber.lane);
    --fiber.home->alive;
    --fiber.cluster->alive;
    fiber.cluster->idle_yields = 0;
    lane_exits(&fiber);
    thread_leaves_barriers(&fiber);
    schedule(fiber, true);
    abort();
}

Strategy draw_strategy(Random& random) {
    static const uint32_t kLeave[] = {5, 8, 64, 3};
    static const uint32_t kEager[] = {64, 12, 7, 3};
    const uint64_t bits = random.next();
    return {kLeave[bits & 3], 4 + static_cast<uint32_t>(bits >> 2 & 7), kEager[bits >> 5 & 3], (bits >> 7 & 1) != 0};
}

template <class T>
T& nth(std::vector<std::unique_ptr<T>>& pool, size_t index) {
    while (pool.size() <= index) pool.push_back(std::make_unique<T>());
    return *pool[index];
}

void start_fiber(Fiber& fiber, Cluster& cluster, Block& block, Warp& warp, uint32_t linear, const LaunchShape& shape) {
    if (!fiber.context.stack) {
        fiber.context.stack = map_stack();
        fiber.context.stack_bytes = kStackBytes;
    }
#if EMU_ASAN
    if (!fiber.clean_exit) __asan_unpoison_memory_region(fiber.context.stack, fiber.context.stack_bytes);
#endif
    fiber.thread = {linear % shape.block.x, linear / shape.block.x % shape.block.y, linear / (shape.block.x * shape.block.y)};
    fiber.block = block.index;
    fiber.block_dim = shape.block;
    fiber.grid_dim = shape.grid;
    fiber.lane = linear % 32;
    fiber.cluster_rank = block.rank;
    fiber.cluster_size = static_cast<uint32_t>(cluster.blocks.size());
    fiber.cluster = &cluster;
    fiber.home = &block;
    fiber.warp = &warp;
    fiber.linear = linear;
    fiber.state = State::Ready;
    fiber.clean_exit = false;
    fiber.wait = {};
    fiber.copies.clear();
    fiber.copies_done = 0;
    fiber.bulk_groups.clear();
    fiber.bulk_open.clear();
    fiber.cluster_arrivals = 0;
    prepare_context(fiber.context, fiber_main, &fiber);
    warp.fibers[fiber.lane] = &fiber;
    warp.alive |= 1u << fiber.lane;
    set_ready(warp, fiber.lane);
}

void run_cluster(Engine& engine, const Kernel& kernel, const LaunchShape& shape, void* const* arguments, uint3 origin, uint64_t seed) {
    Cluster& cluster = engine.cluster;
    const uint32_t threads = shape.block.x * shape.block.y * shape.block.z;
    const uint32_t warps_per_block = (threads + 31) / 32;
    const uint32_t blocks = shape.cluster.x * shape.cluster.y * shape.cluster.z;
    cluster.kernel = &kernel;
    cluster.arguments = arguments;
    cluster.ordered = seed == 0;
    cluster.random.state = seed;
    cluster.strategy = draw_strategy(cluster.random);
    cluster.alive = blocks * threads;
    cluster.blocks.clear();
    cluster.warps.clear();
    cluster.ready_warps.assign((blocks * warps_per_block + 63) / 64, 0);
    cluster.ranks.resize(blocks * warps_per_block);
    for (uint32_t& rank : cluster.ranks) rank = static_cast<uint32_t>(cluster.random.next());
    cluster.pending.clear();
    cluster.copying.clear();
    cluster.mbarrier_waiting.clear();
    cluster.cluster_waiting.clear();
    cluster.cluster_arrived = cluster.cluster_phase = 0;
    cluster.idle_yields = 0;
    for (uint32_t b = 0; b < blocks; ++b) cluster.blocks.push_back(&nth(engine.blocks, b));
    for (uint32_t b = 0; b < blocks; ++b) {
        Block& block = *cluster.blocks[b];
        block.cluster = &cluster;
        block.rank = b;
        block.index = {origin.x + b % shape.cluster.x, origin.y + b / shape.cluster.x % shape.cluster.y,
                       origin.z + b / (shape.cluster.x * shape.cluster.y)};
        block.alive = threads;
        for (NamedBarrier& barrier : block.barriers) {
            barrier.expected = barrier.arrived = barrier.holding = 0;
            barrier.waiting.clear();
        }
        block.warps.clear();
        block.warpgroups.clear();
        poison_block(block, shape.dynamic_bytes);
        for (uint32_t w = 0; w < warps_per_block; ++w) {
            Warp& warp = nth(engine.warps, b * warps_per_block + w);
            warp.block = &block;
            warp.index = b * warps_per_block + w;
            warp.ready = warp.alive = 0;
            warp.groups.clear();
            warp.warpgroup = nullptr;
            cluster.warps.push_back(&warp);
            block.warps.push_back(&warp);
        }
        for (uint32_t t = 0; t < threads; ++t) {
            start_fiber(nth(engine.fibers, b * threads + t), cluster, block, *block.warps[t / 32], t, shape);
        }
    }
    cluster.last_warp = cluster.ordered ? 0 : cluster.random.below(static_cast<uint32_t>(cluster.warps.size()));
    Fiber* first = pick(cluster);
    self = first;
    switch_context(engine.main, first->context, false);
    self = nullptr;
    if (!engine.failure.empty()) return;
    try {
        finish_async(cluster);
    } catch (const Failed&) {
    }
}

}  // namespace

void park(const Wait& wait) {
    Fiber& fiber = *current();
    fiber.state = State::Waiting;
    fiber.wait = wait;
    clear_ready(*fiber.warp, fiber.lane);
    schedule(fiber, false);
}

void wake(Fiber* fiber) {
    fiber->state = State::Ready;
    fiber->cluster->idle_yields = 0;
    set_ready(*fiber->warp, fiber->lane);
}

void yield(const char* what) {
    Fiber& fiber = *current();
    Cluster& cluster = *fiber.cluster;
    cluster.yielding = what;
    if (++cluster.idle_yields > kIdleYields) {
        fail("livelock: threads spin (last: %s) and nothing changes. Blocks run one cluster after another here: a block must "
             "not wait for one that has not started.\n%s", what, describe_threads(cluster).c_str());
    }
    // The others first, else a spinning thread could be picked for ever.
    clear_ready(*fiber.warp, fiber.lane);
    Fiber* next = pick(cluster, true);
    set_ready(*fiber.warp, fiber.lane);
    if (!next) return;
    self = next;
    switch_context(fiber.context, next->context, false);
}

void progress() {
    if (self) current()->cluster->idle_yields = 0;
}

void fail(const char* format, ...) {
    va_list list;
    va_start(list, format);
    char* text = nullptr;
    if (vasprintf(&text, format, list) < 0) abort();
    va_end(list);
    Engine& here = engine();
    here.failure = describe_position() + text;
    free(text);
    if (!self) throw Failed();  // an effect that outlived its threads
    resume_main(*current(), true);
    abort();
}

std::string run_grid(const Kernel& kernel, const LaunchShape& shape, void* const* arguments, uint64_t seed) {
    Engine& here = engine();
    if (self) return "a kernel was launched from inside a kernel";
    here.failure.clear();
    const uint32_t clusters[3] = {shape.grid.x / shape.cluster.x, shape.grid.y / shape.cluster.y, shape.grid.z / shape.cluster.z};
    const uint64_t total = uint64_t(clusters[0]) * clusters[1] * clusters[2];
    // The clusters in a random order: a start, and a step that is coprime to their number.
    Random random{seed};
    uint64_t position = 0, step = 1;
    if (seed != 0 && total > 1) {
        position = random.next() % total;
        do step = 1 + random.next() % total;
        while (std::__gcd(step, total) != 1);
    }
    for (uint64_t i = 0; i < total && here.failure.empty(); ++i, position = (position + step) % total) {
        const uint3 origin = {static_cast<unsigned>(position % clusters[0]) * shape.cluster.x,
                              static_cast<unsigned>(position / clusters[0] % clusters[1]) * shape.cluster.y,
                              static_cast<unsigned>(position / clusters[0] / clusters[1]) * shape.cluster.z};
        run_cluster(here, kernel, shape, arguments, origin, seed == 0 ? 0 : random.next() | 1);
    }
    return here.failure;
}

}  // namespace emu
