// f16, bf16 and TF32 conversions as `cvt` does them: round to nearest even (TF32: ties away), NaN becomes 0x7fff.
#include <math.h>
#include <stdint.h>
#include <string.h>

namespace emu {

static uint32_t bits_of(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return bits;
}

static float float_of(uint32_t bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

uint16_t f32_to_bf16(float v) {
    const uint32_t bits = bits_of(v);
    if (isnan(v)) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t f32_to_f16(float v) {
    const uint32_t bits = bits_of(v), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7fff;
    if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above
    if (magnitude < 0x38800000) {  // below 2^-14: a multiple of 2^-24, which the addition of 2^-1 rounds to
        const uint32_t rounded = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
        return static_cast<uint16_t>(sign | rounded);
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return static_cast<uint16_t>(sign | (rounded - 0x38000000) >> 13);
}

float f16_to_f32(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude > 0x7c00 ? 0x400000 : 0) | (magnitude & 0x3ff) << 13);
    if (magnitude < 0x400) return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
    return float_of(sign | ((magnitude << 13) + 0x38000000));
}

uint32_t f32_to_tf32(float v) {
    const uint32_t bits = bits_of(v);
    if ((bits & 0x7f800000) == 0x7f800000) return isnan(v) ? 0x7fffffff : bits;
    return (bits + 0x1000) & ~uint32_t(0x1fff);
}

}  // namespace emu
