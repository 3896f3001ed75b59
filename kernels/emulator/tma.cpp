// Bulk copies: tensor maps (TMA) and plain ones. A load has read global memory when it is issued and lands in shared memory
// some time later, with its bytes on the mbarrier; a store reads shared memory some time later, at the wait at last.
#include <string.h>

#include "ptx_types.h"
#include "tensor_map.h"
#include "warpgroup.h"

namespace emu {

namespace {

// The box of a tensor map at given coordinates, rows of the innermost dimension one by one.
struct Box {
    EncodedMap map;
    int64_t origin[5] = {};
    uint32_t row_bytes, rows;

    Box(const TensorMap& encoded, uint32_t rank, const int32_t* coordinates, const char* what) {
        memcpy(&map, &encoded, sizeof map);
        if (map.magic != kTensorMapMagic) fail("%s: the tensor map was not made by cuTensorMapEncodeTiled", what);
        if (map.rank != rank) fail("%s: %u coordinates for a tensor map of rank %u", what, rank, map.rank);
        rows = 1;
        for (uint32_t i = 0; i < rank; ++i) {
            origin[i] = coordinates[i];
            if (i) rows *= map.box[i];
        }
        row_bytes = map.box[0] * map.element_bytes;
    }

    size_t bytes() const { return size_t(row_bytes) * rows; }

    // Calls f(offset in the box, address in the tensor, bytes) for the part of each row that lies in the tensor.
    template <class F>
    void each_row(F f) const {
        const int64_t first = origin[0] < 0 ? -origin[0] : 0;
        const int64_t beyond = int64_t(map.last_index[0]) + 1 - origin[0];
        const int64_t end = beyond < map.box[0] ? beyond : map.box[0];
        if (first >= end) return;
        for (uint32_t row = 0; row < rows; ++row) {
            uint64_t address = map.address + static_cast<uint64_t>((origin[0] + first) * map.element_bytes);
            bool inside = true;
            for (uint32_t i = 1, rest = row; i < map.rank; ++i) {
                const int64_t at = origin[i] + rest % map.box[i];
                rest /= map.box[i];
                inside &= at >= 0 && at <= int64_t(map.last_index[i]);
                address += static_cast<uint64_t>(at) * map.strides[i - 1];
            }
            if (inside) f(size_t(row) * row_bytes + first * map.element_bytes, reinterpret_cast<unsigned char*>(address), (end - first) * map.element_bytes);
        }
    }

    // Where byte `offset` of the box lies in shared memory, relative to the box's start at shared address `base`.
    size_t swizzled(uint32_t base, size_t offset) const {
        const uint32_t mask = (1u << map.swizzle) - 1;
        const uint32_t address = base + static_cast<uint32_t>(offset);
        return (address ^ (address >> 7 & mask) << 4) - base;
    }

    void check_shared(uint32_t address, const char* what) const {
        if (address % 128 != 0) fail("%s: shared address 0x%x is not a multiple of 128", what, address);
        if (map.swizzle && bytes() % 128 != 0) fail("%s: a swizzled box of %zu bytes; whole lines of 128 are needed", what, bytes());
    }
};

// A landing place: the block's memory, and what the async proxy sees of it.
struct Landing {
    Block* block;
    unsigned char* target;
    uint64_t* mbarrier;
};

struct BulkLoad : AsyncOperation {
    std::vector<unsigned char> bytes;  // as they lie in shared memory
    std::vector<Landing> landings;
    void complete() override {
        for (const Landing& landing : landings) {
            async_write(*landing.block, landing.target, bytes.data(), bytes.size());
            mbarrier_add_transactions(landing.mbarrier, -static_cast<int64_t>(bytes.size()));
        }
    }
    void start() {
        const std::vector<unsigned char> poison(bytes.size(), kPoison);
        for (const Landing& landing : landings) async_write(*landing.block, landing.target, poison.data(), poison.size());
    }
};

Landing landing(uint32_t target, size_t bytes, uint32_t mbarrier, const char* what) {
    Block* block = shared_block(target);
    return {block, static_cast<unsigned char*>(shared_pointer(target, bytes, 16, what)),
            static_cast<uint64_t*>(shared_pointer(mbarrier, 8, 8, what))};
}

void issue(std::unique_ptr<BulkLoad> load) {
    load->start();
    current()->cluster->pending.push_back(std::move(load));
}

struct TensorStore : BulkStore {
    Box box;
    Block* block;
    uint32_t address;
    const unsigned char* source;
    std::vector<unsigned char> bytes;
    TensorStore(const Box& b, uint32_t a) : box(b), block(current()->home), address(a) {
        box.check_shared(address, "cp.async.bulk.tensor store");
        source = static_cast<const unsigned char*>(shared_pointer(address, box.bytes(), 128, "cp.async.bulk.tensor store"));
    }
    void read() override {
        if (was_read) return;
        was_read = true;
        bytes.resize(box.bytes());
        const auto* view = static_cast<const unsigned char*>(async_view(*block, source));
        for (size_t offset = 0; offset < bytes.size(); offset += 16) memcpy(&bytes[offset], view + box.swizzled(address, offset), 16);
    }
    void write() override {
        read();
        box.each_row([this](size_t offset, unsigned char* target, size_t count) { memcpy(target, &bytes[offset], count); });
    }
};

struct PlainStore : BulkStore {
    Block* block;
    void* target;
    const unsigned char* source;
    std::vector<unsigned char> bytes;
    void read() override {
        if (was_read) return;
        was_read = true;
        memcpy(bytes.data(), async_view(*block, source), bytes.size());
    }
    void write() override {
        read();
        memcpy(target, bytes.data(), bytes.size());
    }
};

void check_bulk(const void* global, uint32_t bytes, const char* what) {
    check_alignment(global, 16, what);
    if (bytes == 0 || bytes % 16 != 0) fail("%s: %u bytes; a multiple of 16 is needed", what, bytes);
}

}  // namespace

void tma_load(uint32_t target, const TensorMap& encoded, uint32_t mbarrier, uint32_t rank, const int32_t* coordinates, uint32_t blocks) {
    const char* what = "cp.async.bulk.tensor load";
    const Box box(encoded, rank, coordinates, what);
    box.check_shared(target, what);
    auto load = std::make_unique<BulkLoad>();
    load->bytes.assign(box.bytes(), box.map.nan_fill ? kPoison : 0);
    std::vector<unsigned char> dense(load->bytes);
    box.each_row([&](size_t offset, const unsigned char* source, size_t count) { memcpy(&dense[offset], source, count); });
    for (size_t offset = 0; offset < dense.size(); offset += 16) memcpy(&load->bytes[box.swizzled(target, offset)], &dense[offset], 16);
    if (blocks == kOwnBlock) {
        load->landings.push_back(landing(target, box.bytes(), mbarrier, what));
    } else {
        for (uint32_t rest = blocks; rest; rest &= rest - 1) {
            const uint32_t block = static_cast<uint32_t>(__builtin_ctz(rest));
            load->landings.push_back(landing(map_shared(target, block), box.bytes(), map_shared(mbarrier, block), what));
        }
    }
    issue(std::move(load));
}

void bulk_load(uint32_t target, const void* source, uint32_t bytes, uint32_t mbarrier) {
    check_bulk(source, bytes, "cp.async.bulk load");
    auto load = std::make_unique<BulkLoad>();
    const auto* from = static_cast<const unsigned char*>(source);
    load->bytes.assign(from, from + bytes);
    load->landings.push_back(landing(target, bytes, mbarrier, "cp.async.bulk load"));
    issue(std::move(load));
}

void tma_store(const TensorMap& encoded, uint32_t source, uint32_t rank, const int32_t* coordinates) {
    current()->bulk_open.push_back(std::make_unique<TensorStore>(Box(encoded, rank, coordinates, "cp.async.bulk.tensor store"), source));
}

void bulk_store(void* target, uint32_t source, uint32_t bytes) {
    check_bulk(target, bytes, "cp.async.bulk store");
    auto store = std::make_unique<PlainStore>();
    store->block = current()->home;
    store->target = target;
    store->source = static_cast<const unsigned char*>(shared_pointer(source, bytes, 16, "cp.async.bulk store"));
    store->bytes.resize(bytes);
    current()->bulk_open.push_back(std::move(store));
}

void bulk_commit() {
    Fiber& fiber = *current();
    fiber.bulk_groups.push_back(std::move(fiber.bulk_open));
    fiber.bulk_open.clear();
    if (fiber.cluster->ordered || !fiber.cluster->random.once_in(2)) return;
    for (auto& store : fiber.bulk_groups.back()) store->read();
}

void bulk_wait(uint32_t pending, bool read_only) {
    auto& groups = current()->bulk_groups;
    const size_t complete = groups.size() > pending ? groups.size() - pending : 0;
    for (size_t i = 0; i < complete; ++i) {
        for (auto& store : groups[i]) read_only ? store->read() : store->write();
    }
    if (!read_only) groups.erase(groups.begin(), groups.begin() + static_cast<std::ptrdiff_t>(complete));
}

}  // namespace emu
