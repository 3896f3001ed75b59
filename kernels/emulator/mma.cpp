// ldmatrix, stmatrix, mma.sync: collectives of a converged warp.
//
// A product is summed in f64 and rounded once to f32: within the tolerance of any order that the hardware may use, and
// closer than it. TF32 operands are cut to ten bits of mantissa, as the hardware reads them.
#include <string.h>

#include "ptx_types.h"
#include "state.h"

namespace emu {

namespace {

constexpr uint32_t kWarp = 0xffffffffu;

void check_whole(void* const* slots, const char* what) {
    for (int lane = 0; lane < 32; ++lane) {
        if (!slots[lane]) fail("%s: lane %d has ended; the whole warp must come", what, lane);
    }
}

struct MatrixSlot {
    unsigned char* row;
    uint32_t* registers;
    uint32_t count;
    bool transposed;
};

uint16_t& half(uint32_t* registers, uint32_t index, uint32_t which) {
    return reinterpret_cast<uint16_t*>(registers + index)[which];
}

// Calls f(the element in shared memory, the element in a register) for each element of each 8 x 8 matrix.
template <class F>
void each_element(void* const* slots, F f) {
    const auto* first = static_cast<const MatrixSlot*>(slots[0]);
    for (uint32_t m = 0; m < first->count; ++m) {
        for (uint32_t i = 0; i < 8; ++i) {
            auto* row = reinterpret_cast<uint16_t*>(static_cast<const MatrixSlot*>(slots[8 * m + i])->row);
            for (uint32_t j = 0; j < 8; ++j) {
                const uint32_t r = first->transposed ? j : i, c = first->transposed ? i : j;
                f(row[j], half(static_cast<const MatrixSlot*>(slots[4 * r + c / 2])->registers, m, c % 2));
            }
        }
    }
}

const Collective kLoadMatrix = {"ldmatrix", [](uint32_t, void* const* slots) {
    check_whole(slots, "ldmatrix");
    each_element(slots, [](const uint16_t& shared, uint16_t& element) { element = shared; });
}};
const Collective kStoreMatrix = {"stmatrix", [](uint32_t, void* const* slots) {
    check_whole(slots, "stmatrix");
    each_element(slots, [](uint16_t& shared, const uint16_t& element) { shared = element; });
}};

struct MmaSlot {
    float* d;
    const uint32_t *a, *b;
};

float widen(MmaKind kind, uint32_t bits) {
    if (kind == kMmaF16) return f16_to_f32(static_cast<uint16_t>(bits));
    if (kind == kMmaBf16) bits <<= 16;
    if (kind == kMmaTf32) bits &= ~uint32_t(0x1fff);
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

// Gathers the warp's fragments into A[16][depth] and B[8][depth], multiplies, adds to the accumulators.
template <MmaKind Kind>
void run_mma(uint32_t, void* const* slots) {
    check_whole(slots, "mma.sync");
    constexpr uint32_t kDepth = Kind == kMmaTf32 ? 8 : 16;
    float a[16][kDepth], b[8][kDepth];
    for (uint32_t lane = 0; lane < 32; ++lane) {
        const auto* slot = static_cast<const MmaSlot*>(slots[lane]);
        const uint32_t g = lane / 4, t = lane % 4;
        for (uint32_t r = 0; r < 4; ++r) {
            const uint32_t row = g + 8 * (r % 2);
            if (Kind == kMmaTf32) {
                a[row][t + 4 * (r / 2)] = widen(Kind, slot->a[r]);
            } else {
                a[row][2 * t + 8 * (r / 2)] = widen(Kind, slot->a[r] & 0xffff);
                a[row][2 * t + 8 * (r / 2) + 1] = widen(Kind, slot->a[r] >> 16);
            }
        }
        for (uint32_t r = 0; r < 2; ++r) {
            if (Kind == kMmaTf32) {
                b[g][t + 4 * r] = widen(Kind, slot->b[r]);
            } else {
                b[g][2 * t + 8 * r] = widen(Kind, slot->b[r] & 0xffff);
                b[g][2 * t + 8 * r + 1] = widen(Kind, slot->b[r] >> 16);
            }
        }
    }
    for (uint32_t lane = 0; lane < 32; ++lane) {
        float* d = static_cast<const MmaSlot*>(slots[lane])->d;
        for (uint32_t i = 0; i < 4; ++i) {
            const float *row = a[lane / 4 + 8 * (i / 2)], *column = b[2 * (lane % 4) + i % 2];
            double sum = 0;
            for (uint32_t k = 0; k < kDepth; ++k) sum += static_cast<double>(row[k]) * static_cast<double>(column[k]);
            d[i] = static_cast<float>(static_cast<double>(d[i]) + sum);
        }
    }
}

const Collective kMma[] = {{"mma.sync.m16n8k16.f16", run_mma<kMmaF16>}, {"mma.sync.m16n8k16.bf16", run_mma<kMmaBf16>},
                           {"mma.sync.m16n8k8.tf32", run_mma<kMmaTf32>}};

// Only the first 8 `count` lanes' addresses are used; a row is 16 bytes.
unsigned char* row_of_lane(uint32_t row, uint32_t count, const char* what) {
    return self->lane < 8 * count ? static_cast<unsigned char*>(shared_pointer(row, 16, 16, what)) : nullptr;
}

}  // namespace

void ldmatrix(uint32_t* registers, uint32_t count, bool transposed, uint32_t row) {
    MatrixSlot slot = {row_of_lane(row, count, "ldmatrix"), registers, count, transposed};
    collective(kLoadMatrix, kWarp, count * 2 + transposed, &slot);
}

void stmatrix(const uint32_t* registers, uint32_t count, bool transposed, uint32_t row) {
    MatrixSlot slot = {row_of_lane(row, count, "stmatrix"), const_cast<uint32_t*>(registers), count, transposed};
    collective(kStoreMatrix, kWarp, count * 2 + transposed, &slot);
}

void mma(MmaKind kind, float* d, const uint32_t* a, const uint32_t* b) {
    MmaSlot slot = {d, a, b};
    collective(kMma[kind], kWarp, 0, &slot);
}

}  // namespace emu
