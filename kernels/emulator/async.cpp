// Asynchronous effects: cp.async here, bulk copies in tma.cpp. They happen when something waits for them, or earlier at
// random; what is not waited for reads as poison.
#include <string.h>

#include "state.h"

namespace emu {

bool has_async(const Cluster& cluster) { return !cluster.pending.empty() || !cluster.copying.empty(); }

// Lets the oldest cp.async step of a thread happen.
static void copy_step(Fiber& fiber) {
    CopyStep& step = fiber.copies[fiber.copies_done++];
    if (step.kind == CopyStep::kCopy) memcpy(step.target, step.data, step.bytes);
    if (step.kind == CopyStep::kArrive) mbarrier_arrive(static_cast<uint64_t*>(step.target), 1, 0);
    if (fiber.copies_done < fiber.copies.size()) return;
    fiber.copies.clear();
    fiber.copies_done = 0;
    auto& copying = fiber.cluster->copying;
    for (Fiber*& other : copying) {
        if (other == &fiber) {
            other = copying.back();
            copying.pop_back();
            break;
        }
    }
}

static void add_step(const CopyStep& step) {
    Fiber& fiber = *current();
    if (fiber.copies.empty()) fiber.cluster->copying.push_back(&fiber);
    fiber.copies.push_back(step);
}

bool run_async(Cluster& cluster) {
    const uint32_t choices = static_cast<uint32_t>(cluster.pending.size() + cluster.copying.size());
    if (choices == 0) return false;
    uint32_t choice = cluster.ordered ? 0 : cluster.random.below(choices);
    if (choice < cluster.pending.size()) {
        std::unique_ptr<AsyncOperation> operation = std::move(cluster.pending[choice]);
        cluster.pending.erase(cluster.pending.begin() + choice);
        operation->complete();
    } else {
        copy_step(*cluster.copying[choice - cluster.pending.size()]);
    }
    return true;
}

void finish_async(Cluster& cluster) {
    while (run_async(cluster)) {
    }
}

void cp_async(uint32_t target, const void* source, uint32_t size, uint32_t bytes) {
    if (bytes > size) fail("cp.async: %u bytes of the source for a copy of %u", bytes, size);
    CopyStep step = {};
    step.kind = CopyStep::kCopy;
    step.bytes = static_cast<uint8_t>(size);
    step.target = shared_pointer(target, size, size, "cp.async target");
    if (bytes != 0) {
        check_alignment(source, size, "cp.async source");
        memcpy(step.data, source, bytes);
    }
    memset(step.target, kPoison, size);
    add_step(step);
}

void cp_async_commit() {
    CopyStep step = {};
    step.kind = CopyStep::kCommit;
    add_step(step);
}

void cp_async_arrive(uint32_t mbarrier) {
    CopyStep step = {};
    step.kind = CopyStep::kArrive;
    step.target = shared_pointer(mbarrier, 8, 8, "cp.async.mbarrier.arrive");
    add_step(step);
}

void cp_async_wait(uint32_t pending) {
    Fiber& fiber = *current();
    uint32_t groups = 0;
    for (size_t i = fiber.copies_done; i < fiber.copies.size(); ++i) groups += fiber.copies[i].kind == CopyStep::kCommit;
    while (groups > pending) {
        groups -= fiber.copies[fiber.copies_done].kind == CopyStep::kCommit;
        copy_step(fiber);
    }
}

void cp_async_wait_all() {
    Fiber& fiber = *current();
    while (!fiber.copies.empty()) copy_step(fiber);
}

void check_finished(Fiber* fiber) {
    check_products(fiber);
    if (!fiber->bulk_open.empty()) fail("the thread ends with bulk stores that were not committed (cp.async.bulk.commit_group)");
    for (auto& group : fiber->bulk_groups) {
        for (auto& store : group) {
            if (!store->was_read) {
                fail("the thread ends while a bulk store may still read its shared memory (cp.async.bulk.wait_group.read is missing)");
            }
            store->write();
        }
    }
    fiber->bulk_groups.clear();
}

}  // namespace emu
