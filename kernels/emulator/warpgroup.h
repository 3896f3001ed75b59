// The products under way in a warpgroup (wgmma.cpp).
#pragma once

#include <deque>

#include "state.h"

namespace emu {

// The variable `d` of the 128 threads while products on it are under way: its true value is kept here, and the variable
// itself holds poison until the last of them is done.
struct Accumulator {
    uint32_t registers = 0;
    bool gathered[4] = {};
    float* d[128] = {};
    uint32_t uses = 0;          // products not yet executed
    std::vector<float> values;  // [64][2 * registers]
};

// What all four warps must agree on.
struct ProductKey {
    uint64_t a, b;
    uint32_t registers, group;
    bool bf16, a_in_registers, accumulate, transpose_b;
    bool operator==(const ProductKey& o) const {
        return a == o.a && b == o.b && registers == o.registers && group == o.group && bf16 == o.bf16 &&
               a_in_registers == o.a_in_registers && accumulate == o.accumulate && transpose_b == o.transpose_b;
    }
};

struct Product {
    ProductKey key;
    uint32_t warps = 0;  // how many have issued it
    Accumulator* accumulator = nullptr;
    uint32_t a[128][4];
};

struct WarpProgress {
    uint64_t issued = 0;
    uint32_t committed = 0;
    bool fenced = false;
};

struct Warpgroup {
    Block* block = nullptr;
    uint32_t index = 0;
    uint32_t registers = 0;  // per thread, by setmaxnreg
    uint64_t executed = 0;   // products done since the start; products[0] is the next
    std::deque<Product> products;
    std::vector<std::unique_ptr<Accumulator>> accumulators;
    WarpProgress progress[4];
    std::vector<Fiber*> waiting;  // for another warp to issue
};

// The running thread's warpgroup.
Warpgroup& warpgroup();

}  // namespace emu
