// What the emulated driver writes into a CUtensorMap, and the emulated TMA reads from it.
#pragma once

#include <stdint.h>

namespace emu {

constexpr uint32_t kTensorMapMagic = 0x4d454f4d;

struct EncodedMap {
    uint32_t magic;
    uint8_t element_bytes, rank, swizzle, nan_fill;
    uint64_t address;
    uint32_t last_index[5];  // dimension - 1
    uint16_t box[5];
    uint16_t reserved;
    uint64_t strides[4];     // bytes
    uint64_t padding[6];
};
static_assert(sizeof(EncodedMap) == 128, "a tensor map has 128 bytes");

}  // namespace emu
