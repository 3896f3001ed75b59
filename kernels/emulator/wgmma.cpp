// Warpgroup products. Each of the four warps issues; once all have, the product may happen at any time until the wait. Until
// then `d` holds poison and the operands in shared memory are not read, so that a missing wait or an early overwrite shows.
#include <string.h>

#include "ptx_types.h"
#include "warpgroup.h"

namespace emu {

Warpgroup& warpgroup() {
    Warp& warp = *current()->warp;
    if (warp.warpgroup) return *warp.warpgroup;
    Block& block = *warp.block;
    const uint32_t index = (warp.index - block.warps[0]->index) / 4;
    if (block.warps.size() < 4 * index + 4) fail("wgmma: the block's last warps are no whole warpgroup (4 warps)");
    const uint32_t groups = static_cast<uint32_t>(block.warps.size() / 4);
    auto fresh = std::make_unique<Warpgroup>();
    fresh->block = &block;
    fresh->index = index;
    const uint32_t share = 512 / groups / 8 * 8;  // of 65536 registers, per thread
    fresh->registers = share > 248 ? 248 : share;
    for (uint32_t w = 0; w < 4; ++w) block.warps[4 * index + w]->warpgroup = fresh.get();
    block.warpgroups.push_back(std::move(fresh));
    return *warp.warpgroup;
}

namespace {

constexpr uint32_t kWarp = 0xffffffffu;

uint32_t warp_of_group() {
    Warp& warp = *current()->warp;
    return (warp.index - warp.block->warps[0]->index) % 4;
}

float widen(bool bf16, uint32_t bits) {
    if (!bf16) return f16_to_f32(static_cast<uint16_t>(bits));
    bits <<= 16;
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

// ---- operands in shared memory ----

struct Descriptor {
    uint32_t start, leading, stride, mask, span;  // mask: of the address bits 7.. that are xored onto 4..; span: bytes of a row
};

Descriptor decode(uint64_t bits) {
    const uint32_t mode = static_cast<uint32_t>(bits >> 62);
    if (bits >> 49 & 7) fail("wgmma descriptor 0x%016llx: base offsets are not emulated", static_cast<unsigned long long>(bits));
    const uint32_t shift = mode == 0 ? 0 : 4 - mode;  // 1: 128 bytes, 2: 64, 3: 32
    return {static_cast<uint32_t>(bits & 0x3fff) << 4, static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4,
            static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4, (1u << shift) - 1, 16u << shift};
}

// Address of the 16 bytes with elements (row, 8 k8 ..) of a K-major operand, or (8 row8 .., k) of an MN-major one.
uint32_t k_major(const Descriptor& d, uint32_t row, uint32_t k8) {
    if (d.mask == 0) return d.start + row / 8 * d.stride + k8 * d.leading + row % 8 * 16;
    return d.start + row / 8 * d.stride + row % 8 * d.span + k8 * 16;
}
uint32_t mn_major(const Descriptor& d, uint32_t row8, uint32_t k) {
    if (d.mask == 0) return d.start + row8 * d.stride + k / 8 * d.leading + k % 8 * 16;
    const uint32_t chunks = d.span / 16;
    return d.start + row8 / chunks * d.leading + row8 % chunks * 16 + k / 8 * d.stride + k % 8 * d.span;
}

const uint16_t* chunk(const Block& block, const Descriptor& d, uint32_t address, const char* what) {
    address ^= (address >> 7 & d.mask) << 4;
    return static_cast<const uint16_t*>(async_view(block, block_pointer(block, address, 16, 16, what)));
}

// The operand as floats: [k][row].
void read_operand(const Block& block, uint64_t bits, bool bf16, bool transposed, uint32_t rows, float* out, const char* what) {
    const Descriptor d = decode(bits);
    if (transposed) {
        for (uint32_t k = 0; k < 16; ++k) {
            for (uint32_t row8 = 0; row8 < rows / 8; ++row8) {
                const uint16_t* from = chunk(block, d, mn_major(d, row8, k), what);
                for (uint32_t i = 0; i < 8; ++i) out[k * rows + 8 * row8 + i] = widen(bf16, from[i]);
            }
        }
        return;
    }
    for (uint32_t row = 0; row < rows; ++row) {
        for (uint32_t k8 = 0; k8 < 2; ++k8) {
            const uint16_t* from = chunk(block, d, k_major(d, row, k8), what);
            for (uint32_t i = 0; i < 8; ++i) out[(8 * k8 + i) * rows + row] = widen(bf16, from[i]);
        }
    }
}

// ---- execution ----

// c[64][n] += a[16][64]^T b[16][n], each element summed in f64 and rounded once.
__attribute__((optimize("O3"))) void multiply(const float* a, const float* b, float* c, uint32_t n) {
    double sums[256];
    for (uint32_t row = 0; row < 64; ++row) {
        for (uint32_t j = 0; j < n; ++j) sums[j] = 0;
        for (uint32_t k = 0; k < 16; ++k) {
            const double factor = a[k * 64 + row];
            for (uint32_t j = 0; j < n; ++j) sums[j] += factor * b[k * n + j];
        }
        for (uint32_t j = 0; j < n; ++j) c[row * n + j] = static_cast<float>(c[row * n + j] + sums[j]);
    }
}

// Calls f(thread of the warpgroup, its register, row, column) for the accumulators of warp `w`.
template <class F>
void each_accumulator(uint32_t w, uint32_t registers, F f) {
    for (uint32_t lane = 0; lane < 32; ++lane) {
        for (uint32_t r = 0; r < registers; ++r) {
            f(32 * w + lane, r, 16 * w + lane / 4 + 8 * (r / 2 % 2), 8 * (r / 4) + 2 * (lane % 4) + r % 2);
        }
    }
}

void execute_one(Warpgroup& group) {
    Product product = std::move(group.products.front());
    group.products.pop_front();
    ++group.executed;
    const ProductKey& key = product.key;
    const uint32_t n = 2 * key.registers;
    float a[16 * 64], b[16 * 256];
    if (key.a_in_registers) {
        for (uint32_t thread = 0; thread < 128; ++thread) {
            const uint32_t lane = thread % 32;
            for (uint32_t r = 0; r < 4; ++r) {
                const uint32_t row = thread / 32 * 16 + lane / 4 + 8 * (r % 2), k = 2 * (lane % 4) + 8 * (r / 2);
                a[k * 64 + row] = widen(key.bf16, product.a[thread][r] & 0xffff);
                a[(k + 1) * 64 + row] = widen(key.bf16, product.a[thread][r] >> 16);
            }
        }
    } else {
        read_operand(*group.block, key.a, key.bf16, false, 64, a, "wgmma A");
    }
    read_operand(*group.block, key.b, key.bf16, key.transpose_b, n, b, "wgmma B");
    Accumulator& accumulator = *product.accumulator;
    if (!key.accumulate) std::fill(accumulator.values.begin(), accumulator.values.end(), 0.0f);
    multiply(a, b, accumulator.values.data(), n);
    if (--accumulator.uses) return;
    for (uint32_t w = 0; w < 4; ++w) {
        each_accumulator(w, key.registers, [&](uint32_t thread, uint32_t r, uint32_t row, uint32_t column) {
            accumulator.d[thread][r] = accumulator.values[row * n + column];
        });
    }
    for (auto& slot : group.accumulators) {
        if (slot.get() != &accumulator) continue;
        slot = std::move(group.accumulators.back());
        group.accumulators.pop_back();
        break;
    }
}

// Executes what has been issued by all four warps, up to the product before `end`.
void execute_until(Warpgroup& group, uint64_t end) {
    while (group.executed < end && !group.products.empty() && group.products.front().warps == 4) execute_one(group);
}

struct ProductInFlight : AsyncOperation {
    Warpgroup* group;
    uint64_t end;
    ProductInFlight(Warpgroup* g, uint64_t e) : group(g), end(e) {}
    void complete() override { execute_until(*group, end); }
};

// ---- issue ----

struct IssueSlot {
    float* d;
    const uint32_t* a;
    ProductKey key;
};

Accumulator& find_accumulator(Warpgroup& group, Product& product, uint32_t w, void* const* slots) {
    const auto* first = static_cast<const IssueSlot*>(slots[0]);
    for (auto& live : group.accumulators) {
        if (live->gathered[w] && live->d[32 * w] == first->d) return *live;
    }
    if (product.accumulator) return *product.accumulator;
    group.accumulators.push_back(std::make_unique<Accumulator>());
    Accumulator& fresh = *group.accumulators.back();
    fresh.registers = first->key.registers;
    fresh.values.assign(64 * 2 * fresh.registers, 0.0f);
    return fresh;
}

void gather(Warpgroup& group, Accumulator& accumulator, uint32_t w, void* const* slots) {
    const auto* first = static_cast<const IssueSlot*>(slots[0]);
    if (!group.progress[w].fenced) fail("wgmma: no wgmma.fence since the accumulator was last touched");
    accumulator.gathered[w] = true;
    for (uint32_t lane = 0; lane < 32; ++lane) accumulator.d[32 * w + lane] = static_cast<const IssueSlot*>(slots[lane])->d;
    const uint32_t n = 2 * accumulator.registers;
    if (first->key.accumulate) {
        each_accumulator(w, accumulator.registers, [&](uint32_t thread, uint32_t r, uint32_t row, uint32_t column) {
            accumulator.values[row * n + column] = accumulator.d[thread][r];
        });
    }
    for (uint32_t lane = 0; lane < 32; ++lane) memset(accumulator.d[32 * w + lane], kPoison, accumulator.registers * sizeof(float));
}

void run_issue(uint32_t, void* const* slots) {
    Warpgroup& group = warpgroup();
    const uint32_t w = warp_of_group();
    for (uint32_t lane = 0; lane < 32; ++lane) {
        const auto* slot = static_cast<const IssueSlot*>(slots[lane]);
        if (!slot) fail("wgmma: lane %u has ended; the whole warpgroup must come", lane);
        if (!(slot->key == static_cast<const IssueSlot*>(slots[0])->key)) fail("wgmma: the lanes of a warp give different operands");
    }
    const ProductKey& key = static_cast<const IssueSlot*>(slots[0])->key;
    const uint64_t number = group.progress[w].issued++;
    if (number < group.executed) fail("wgmma: internal: product executed before it was issued");
    const bool is_new = number - group.executed == group.products.size();
    if (is_new) {
        group.products.emplace_back();
        group.products.back().key = key;
    }
    Product& product = group.products[number - group.executed];
    if (!(product.key == key)) fail("wgmma: the warps of the warpgroup issue different products (warp %u differs)", w);
    Accumulator& accumulator = find_accumulator(group, product, w, slots);
    if (product.accumulator && product.accumulator != &accumulator) fail("wgmma: the warps of the warpgroup give different accumulators");
    if (accumulator.registers != key.registers) fail("wgmma: two products under way use one accumulator with different shapes");
    if (!product.accumulator) {
        product.accumulator = &accumulator;
        ++accumulator.uses;
    }
    if (!accumulator.gathered[w]) gather(group, accumulator, w, slots);
    if (key.a_in_registers) {
        if (!group.progress[w].fenced) fail("wgmma: no wgmma.fence since A's registers were written");
        for (uint32_t lane = 0; lane < 32; ++lane) memcpy(product.a[32 * w + lane], static_cast<const IssueSlot*>(slots[lane])->a, 16);
    }
    if (++product.warps < 4) return;
    current()->cluster->pending.push_back(std::make_unique<ProductInFlight>(&group, number + 1));
    for (Fiber* fiber : group.waiting) wake(fiber);
    group.waiting.clear();
}

const Collective kIssue = {"wgmma.mma_async", run_issue};
const Collective kFence = {"wgmma.fence", [](uint32_t, void* const*) { warpgroup().progress[warp_of_group()].fenced = true; }};
const Collective kCommit = {"wgmma.commit_group", [](uint32_t, void* const*) { ++warpgroup().progress[warp_of_group()].committed; }};
const Collective kWait = {"wgmma.wait_group", [](uint32_t, void* const*) { warpgroup().progress[warp_of_group()].fenced = false; }};

}  // namespace

void wgmma_fence() {
    char nothing = 0;
    collective(kFence, kWarp, 0, &nothing);
}

void wgmma_commit() {
    char nothing = 0;
    collective(kCommit, kWarp, 0, &nothing);
}

void wgmma(bool bf16, uint32_t registers, float* d, const uint32_t* a_registers, uint64_t a, uint64_t b, bool accumulate, bool transpose_b) {
    if (registers % 4 != 0 || registers > 128) fail("wgmma: n = %u; a multiple of 8 up to 256 is needed", 2 * registers);
    Warpgroup& group = warpgroup();
    IssueSlot slot = {d, a_registers, {a, b, registers, group.progress[warp_of_group()].committed, bf16, a_registers != nullptr, accumulate, transpose_b}};
    collective(kIssue, kWarp, 0, &slot);
}

void wgmma_wait(uint32_t pending) {
    char nothing = 0;
    collective(kWait, kWarp, pending, &nothing);
    Warpgroup& group = warpgroup();
    const WarpProgress& mine = group.progress[warp_of_group()];
    if (mine.committed <= pending) return;
    // The products before `end` lie in groups that must be complete.
    const uint32_t complete = mine.committed - pending;
    for (;;) {
        uint64_t end = group.executed;
        for (const Product& product : group.products) {
            if (product.key.group >= complete || end >= mine.issued) break;
            ++end;
        }
        execute_until(group, end);
        if (group.executed >= end) return;
        group.waiting.push_back(current());
        park({"wgmma.wait_group %llu, for other warps of the warpgroup to issue product %llu", pending, group.executed, &group});
    }
}

void registers_change(uint32_t registers, bool increase) {
    if (registers < 24 || registers > 256 || registers % 8) fail("setmaxnreg: %u registers; a multiple of 8 from 24 to 256 is needed", registers);
    Warpgroup& group = warpgroup();
    if (group.registers == registers) return;  // another warp of the group did it
    // The groups of this block share what a multiprocessor has: 512 a thread of a warpgroup.
    for (;;) {
        uint32_t others = 0;
        for (const auto& other : group.block->warpgroups) others += other.get() != &group ? other->registers : 0;
        const uint32_t untouched = static_cast<uint32_t>(group.block->warps.size() / 4 - group.block->warpgroups.size());
        others += untouched * (512 / static_cast<uint32_t>(group.block->warps.size() / 4) / 8 * 8);
        if (!increase || others + registers <= 512 || group.registers == registers) break;
        yield("setmaxnreg.inc: the block's other warpgroups hold too many registers");
    }
    group.registers = registers;
    progress();
}

void check_products(Fiber* fiber) {
    const Warpgroup* group = fiber->warp->warpgroup;
    if (!group) return;
    const uint32_t w = (fiber->warp->index - fiber->home->warps[0]->index) % 4;
    if (group->progress[w].issued > group->executed) fail("the thread ends while wgmma products are under way (wgmma.wait_group is missing)");
}

}  // namespace emu
