// What the emulated CUDA and PTX functions call. The engine runs the blocks of a grid one cluster after another; the
// threads of a cluster are fibers of one scheduler that picks the next by a seeded random order.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <type_traits>
#include <utility>

struct uint3 {
    unsigned x, y, z;
};

namespace emu {

// ---- the running thread ----

// What kernels see of themselves. Read on every use of threadIdx, so it lies at the head of the fiber.
struct ThreadView {
    uint3 thread, block, block_dim, grid_dim;
    uint32_t lane;
    uint32_t cluster_rank, cluster_size;
};

extern __thread ThreadView* self __attribute__((tls_model("initial-exec"), visibility("hidden")));

// Ends the launch with a report of what is wrong and where. For use inside kernels and what they call.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Lets other threads run. `what` names the operation in a report of a livelock.
void yield(const char* what);

// Something happened that a spinning thread may wait for.
void progress();

// ---- collectives of a warp ----

// One kind of operation in which lanes exchange values. `slots[lane]` is that lane's operand; null if it has exited.
struct Collective {
    const char* name;
    void (*run)(uint32_t mask, void* const* slots);
};

// Waits until every live lane of `mask` has come with the same operation and qualifier, runs it once, then returns.
void collective(const Collective& kind, uint32_t mask, uint32_t qualifier, void* slot);

uint64_t shuffle(int mode, uint32_t mask, uint64_t value, uint32_t parameter, uint32_t width);
uint32_t vote(int mode, uint32_t mask, bool predicate);
uint32_t match(bool all, uint32_t mask, uint64_t value, int* predicate);
uint32_t reduce(int mode, uint32_t mask, uint32_t value);
void sync_warp(uint32_t mask);

enum ShuffleMode { kShuffleIndex, kShuffleUp, kShuffleDown, kShuffleXor };
enum VoteMode { kVoteBallot, kVoteAny, kVoteAll, kVoteElect };
enum ReduceMode {
    kReduceAddUnsigned, kReduceMinUnsigned, kReduceMaxUnsigned, kReduceMinSigned, kReduceMaxSigned,
    kReduceAnd, kReduceOr, kReduceXor,
};

// ---- barriers of a block and of a cluster ----

void barrier_sync(uint32_t id, uint32_t threads);
void barrier_arrive(uint32_t id, uint32_t threads);
// __syncthreads and its kin: the number of threads whose predicate holds.
uint32_t sync_threads(bool predicate);
void cluster_arrive();
void cluster_wait();

// ---- shared memory ----

void* static_shared(const void* tag, size_t bytes, size_t alignment);
unsigned char* dynamic_shared();
uint32_t shared_address(const void* pointer);
uint32_t map_shared(uint32_t address, uint32_t rank);
// The host pointer behind a shared address, bounds and alignment checked.
void* shared_pointer(uint32_t address, size_t bytes, size_t alignment, const char* what);
void check_alignment(const void* pointer, size_t alignment, const char* what);

// ---- kernels ----

struct Kernel {
    const char* name;
    void (*invoke)(void* const* arguments);
    uint32_t argument_count;
    uint32_t argument_bytes[8];
};

void register_kernel(const Kernel& kernel);

template <class... Arguments>
struct KernelAdapter {
    static_assert(sizeof...(Arguments) <= 8, "a kernel takes at most 8 arguments here");
    static_assert((std::is_trivially_copyable_v<Arguments> && ...), "kernel arguments are plain data");

    template <void (*Function)(Arguments...)>
    static void invoke(void* const* arguments) {
        invoke_with<Function>(arguments, std::index_sequence_for<Arguments...>{});
    }
    template <void (*Function)(Arguments...), size_t... Index>
    static void invoke_with([[maybe_unused]] void* const* arguments, std::index_sequence<Index...>) {
        Function(*static_cast<const std::remove_cv_t<Arguments>*>(arguments[Index])...);
    }
};

// Deduces a kernel's argument types from its address.
template <auto Function>
struct Registrar;
template <class... Arguments, void (*Function)(Arguments...)>
struct Registrar<Function> {
    explicit Registrar(const char* name) {
        register_kernel({name, &KernelAdapter<Arguments...>::template invoke<Function>, sizeof...(Arguments),
                         {static_cast<uint32_t>(sizeof(Arguments))...}});
    }
};

}  // namespace emu
