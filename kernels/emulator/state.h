// The engine's state: fibers in warps in blocks in a cluster. Private to the emulator's own files.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine.h"
#include "fiber.h"

namespace emu {

struct Block;
struct Cluster;
struct Warp;
struct Warpgroup;

// splitmix64: small, seeded, good enough to shuffle with.
struct Random {
    uint64_t state = 0;
    uint64_t next() {
        uint64_t z = (state += 0x9e3779b97f4a7c15ull);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return z ^ (z >> 31);
    }
    uint32_t below(uint32_t n) { return static_cast<uint32_t>((next() >> 32) * n >> 32); }
    // True once in 2^`shift` calls; never if `shift` > 63, always if 0.
    bool once_in(uint32_t shift) { return shift == 0 || (shift < 64 && (next() >> (64 - shift)) == 0); }
};

// What a parked thread waits for: a phrase, and up to two numbers in it.
struct Wait {
    const char* what = nullptr;  // printf format with two uint64_t (%llx) at most
    uint64_t first = 0, second = 0;
    const void* object = nullptr;
};

// An effect that happens some time after it was asked for.
struct AsyncOperation {
    virtual ~AsyncOperation() = default;
    virtual void complete() = 0;
};

// A bulk store of one thread: reads shared memory first, writes global memory later.
struct BulkStore {
    virtual ~BulkStore() = default;
    virtual void read() = 0;
    virtual void write() = 0;
    bool was_read = false;
};

// cp.async of one thread, in order: a copy, the end of a group, or an arrival.
struct CopyStep {
    enum Kind : uint8_t { kCopy, kCommit, kArrive } kind;
    uint8_t bytes;
    uint32_t mbarrier;
    void* target;
    unsigned char data[16];
};

enum class State : uint8_t { Ready, Waiting, Done };

struct Fiber : ThreadView {
    Context context;
    Cluster* cluster = nullptr;
    Block* home = nullptr;
    Warp* warp = nullptr;
    uint32_t linear = 0;
    State state = State::Done;
    bool clean_exit = true;  // the last run left no frames on the stack
    Wait wait;
    std::vector<CopyStep> copies;  // from copies_done on are pending
    size_t copies_done = 0;
    std::vector<std::vector<std::unique_ptr<BulkStore>>> bulk_groups;
    std::vector<std::unique_ptr<BulkStore>> bulk_open;
    uint32_t cluster_arrivals = 0;
};

// Lanes on their way into one collective.
struct Group {
    const Collective* kind;
    uint32_t mask, arrived, qualifier;
    void* slots[32];
};

struct Warp {
    Block* block = nullptr;
    uint32_t index = 0;           // in the cluster
    uint32_t ready = 0, alive = 0;  // bit per lane
    Fiber* fibers[32] = {};
    std::vector<Group> groups;
    Warpgroup* warpgroup = nullptr;
};

struct NamedBarrier {
    uint32_t expected = 0, arrived = 0, holding = 0;
    uint32_t result = 0;  // of the phase that ended last: how many predicates held
    std::vector<Fiber*> waiting;
};

struct StaticArray {
    const void* tag;
    unsigned char* pointer;
    size_t bytes;
    uint32_t address;
};

struct Block {
    Cluster* cluster = nullptr;
    uint32_t rank = 0;
    uint3 index = {};
    uint32_t alive = 0;
    NamedBarrier barriers[16];
    unsigned char* dynamic = nullptr;
    size_t dynamic_bytes = 0;
    std::vector<StaticArray> statics;
    uint32_t next_static_address = 0;
    std::vector<unsigned char> async_view;  // MOE_EMULATED_PROXY=1: the dynamic array as the async proxy sees it
    std::vector<Warp*> warps;
    std::vector<std::unique_ptr<Warpgroup>> warpgroups;
};

// How a cluster's threads take turns, drawn once per cluster.
struct Strategy {
    uint32_t leave_warp;     // another warp once in 2^this picks
    uint32_t change_ranks;   // the warps' priorities move once in 2^this picks
    uint32_t async_eager;    // an asynchronous effect happens once in 2^this picks
    bool ranked;             // prefer the warp with the highest priority over a random one
};

struct Cluster {
    const Kernel* kernel = nullptr;
    void* const* arguments = nullptr;
    Random random;
    bool ordered = false;  // seed 0: threads in order, effects as late as possible
    Strategy strategy = {};
    std::vector<Block*> blocks;
    std::vector<Warp*> warps;
    std::vector<uint64_t> ready_warps;  // bit per warp
    std::vector<uint32_t> ranks;        // a warp's priority
    uint32_t last_warp = 0;
    uint32_t alive = 0;
    std::vector<std::unique_ptr<AsyncOperation>> pending;
    std::vector<Fiber*> copying;          // fibers with pending cp.async steps
    std::vector<Fiber*> mbarrier_waiting;
    uint32_t cluster_arrived = 0, cluster_phase = 0;
    std::vector<Fiber*> cluster_waiting;
    uint64_t idle_yields = 0;
    const char* yielding = "";
};

inline Fiber* current() { return static_cast<Fiber*>(self); }

// ---- scheduler.cpp ----

struct LaunchShape {
    uint3 grid, block, cluster;
    size_t dynamic_bytes;
};

// Runs the whole grid on the calling OS thread. Empty if all went well, otherwise the report.
std::string run_grid(const Kernel& kernel, const LaunchShape& shape, void* const* arguments, uint64_t seed);

// Parks the running thread until `wake`; `what` and the numbers go into the report of a deadlock.
void park(const Wait& wait);
void wake(Fiber* fiber);

// ---- called by the scheduler ----

void lane_exits(Fiber* fiber);            // warp.cpp: collectives need not wait for it any more
void thread_leaves_barriers(Fiber* fiber);  // barrier.cpp
void poison_block(Block& block, size_t dynamic_bytes);  // shared.cpp
void check_finished(Fiber* fiber);        // async.cpp: a thread ends
bool run_async(Cluster& cluster);         // async.cpp: lets one pending effect happen; false if there is none
void finish_async(Cluster& cluster);      // async.cpp: the cluster ends
bool has_async(const Cluster& cluster);

void check_products(Fiber* fiber);        // wgmma.cpp: a thread ends

// ---- shared.cpp ----

Block* shared_block(uint32_t address);  // the block that a shared address lies in
void* block_pointer(const Block& block, uint32_t offset, size_t bytes, size_t alignment, const char* what);
// The async proxy's side of shared memory: where it reads what `pointer` names, and its writes.
const void* async_view(const Block& block, const void* pointer);
void async_write(Block& block, void* target, const void* bytes, size_t count);

// ---- barrier.cpp: mbarriers, by host pointer ----

void mbarrier_add_transactions(uint64_t* mbarrier, int64_t bytes);
void mbarrier_arrive(uint64_t* mbarrier, uint32_t count, uint32_t expected_bytes);
std::string describe_mbarrier(const void* mbarrier);

// ---- report.cpp ----

std::string describe_threads(const Cluster& cluster);
std::string describe_place(const Fiber& fiber);  // the line of the kernel where a parked thread waits
std::string describe_position();

constexpr uint32_t kDynamicAddress = 1024;  // shared address of the dynamic array
constexpr unsigned char kPoison = 0xff;     // a NaN in every float format, a large number as an integer

}  // namespace emu
