// Shared memory of a block: one dynamic array and static ones, each allocated to its exact size so that AddressSanitizer
// bounds it, filled with poison, and reachable by a 32-bit shared address whose bounds are always checked.
//
// Shared addresses: bits 0..17 the offset, bits 24.. the block's rank in the cluster plus one (0: the own block).
#include <stdlib.h>
#include <string.h>

#include "ptx_types.h"
#include "state.h"

namespace emu {

constexpr uint32_t kRankShift = 24;

static bool track_proxy();

static unsigned char* allocate(size_t bytes, size_t alignment) {
    void* pointer = nullptr;
    if (posix_memalign(&pointer, alignment < sizeof(void*) ? sizeof(void*) : alignment, bytes) != 0) abort();
    memset(pointer, kPoison, bytes);
    return static_cast<unsigned char*>(pointer);
}

void poison_block(Block& block, size_t dynamic_bytes) {
    for (const StaticArray& array : block.statics) free(array.pointer);
    block.statics.clear();
    if (block.dynamic_bytes != dynamic_bytes) {
        free(block.dynamic);
        block.dynamic = dynamic_bytes ? allocate(dynamic_bytes, 1024) : nullptr;
        block.dynamic_bytes = dynamic_bytes;
    } else if (dynamic_bytes) {
        memset(block.dynamic, kPoison, dynamic_bytes);
    }
    block.async_view.assign(track_proxy() ? dynamic_bytes : 0, kPoison);
    block.next_static_address = static_cast<uint32_t>(kDynamicAddress + (dynamic_bytes + 1023) / 1024 * 1024);
}

void* static_shared(const void* tag, size_t bytes, size_t alignment) {
    Block& block = *current()->home;
    for (const StaticArray& array : block.statics) {
        if (array.tag == tag) return array.pointer;
    }
    const uint32_t address = static_cast<uint32_t>((block.next_static_address + alignment - 1) / alignment * alignment);
    block.next_static_address = static_cast<uint32_t>(address + bytes);
    size_t total = bytes;
    for (const StaticArray& array : block.statics) total += array.bytes;
    if (total > 48 * 1024) fail("static shared memory: %zu bytes; 48 KiB is the limit", total);
    block.statics.push_back({tag, allocate(bytes, alignment), bytes, address});
    return block.statics.back().pointer;
}

unsigned char* dynamic_shared() { return current()->home->dynamic; }

uint32_t shared_address(const void* pointer) {
    const Block& block = *current()->home;
    const auto* byte = static_cast<const unsigned char*>(pointer);
    // One past the end is an address, too.
    if (byte >= block.dynamic && byte <= block.dynamic + block.dynamic_bytes && block.dynamic) {
        return static_cast<uint32_t>(kDynamicAddress + (byte - block.dynamic));
    }
    for (const StaticArray& array : block.statics) {
        if (byte >= array.pointer && byte <= array.pointer + array.bytes) {
            return static_cast<uint32_t>(array.address + (byte - array.pointer));
        }
    }
    fail("shared_address: %p does not point into this block's shared memory", pointer);
}

uint32_t map_shared(uint32_t address, uint32_t rank) {
    const Cluster& cluster = *current()->cluster;
    if (rank >= cluster.blocks.size()) fail("mapa: block %u of a cluster of %zu", rank, cluster.blocks.size());
    return (address & ((1u << kRankShift) - 1)) | (rank + 1) << kRankShift;
}

Block* shared_block(uint32_t address) {
    const Cluster& cluster = *current()->cluster;
    const uint32_t rank = address >> kRankShift;
    if (rank > cluster.blocks.size()) fail("0x%08x is no shared address", address);
    return rank ? cluster.blocks[rank - 1] : current()->home;
}

void* block_pointer(const Block& block, uint32_t offset, size_t bytes, size_t alignment, const char* what) {
    if (offset % alignment != 0) fail("%s: shared address 0x%x is not a multiple of %zu", what, offset, alignment);
    if (offset >= kDynamicAddress && offset - kDynamicAddress + bytes <= block.dynamic_bytes) {
        return block.dynamic + (offset - kDynamicAddress);
    }
    for (const StaticArray& array : block.statics) {
        if (offset >= array.address && offset - array.address + bytes <= array.bytes) return array.pointer + (offset - array.address);
    }
    fail("%s: %zu bytes at shared address 0x%x: outside of the block's shared memory (dynamic: %zu bytes from 0x%x%s)", what, bytes,
         offset, block.dynamic_bytes, kDynamicAddress, block.statics.empty() ? "" : "; static arrays behind");
}

void* shared_pointer(uint32_t address, size_t bytes, size_t alignment, const char* what) {
    return block_pointer(*shared_block(address), address & ((1u << kRankShift) - 1), bytes, alignment, what);
}

// ---- the async proxy (TMA, wgmma): with MOE_EMULATED_PROXY=1 it sees what threads wrote only after a fence.proxy.async ----

static bool track_proxy() {
    static const char* text = getenv("MOE_EMULATED_PROXY");
    return text && *text == '1';
}

void fence_proxy_async() {
    Block& block = *current()->home;
    if (!block.async_view.empty()) memcpy(block.async_view.data(), block.dynamic, block.dynamic_bytes);
}

const void* async_view(const Block& block, const void* pointer) {
    const auto* byte = static_cast<const unsigned char*>(pointer);
    if (block.async_view.empty() || byte < block.dynamic || byte >= block.dynamic + block.dynamic_bytes) return pointer;
    return block.async_view.data() + (byte - block.dynamic);
}

void async_write(Block& block, void* target, const void* bytes, size_t count) {
    memcpy(target, bytes, count);
    void* view = const_cast<void*>(async_view(block, target));
    if (view != target) memcpy(view, bytes, count);
}

void check_alignment(const void* pointer, size_t alignment, const char* what) {
    if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) fail("%s: address %p is not a multiple of %zu", what, pointer, alignment);
}

}  // namespace emu
