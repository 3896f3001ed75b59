// Integer, bit and IEEE builtins of CUDA, as one host instruction or a few. Built with -ffp-contract=off, each rounds once.
#pragma once

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __clzll(long long v) { return v == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(v)); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline unsigned __brev(unsigned v) {
    v = (v >> 1 & 0x55555555u) | (v & 0x55555555u) << 1;
    v = (v >> 2 & 0x33333333u) | (v & 0x33333333u) << 2;
    v = (v >> 4 & 0x0f0f0f0fu) | (v & 0x0f0f0f0fu) << 4;
    return __builtin_bswap32(v);
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}

namespace emu {
template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}
}  // namespace emu

inline int __float_as_int(float v) { return ::emu::bit_cast<int>(v); }
inline unsigned __float_as_uint(float v) { return ::emu::bit_cast<unsigned>(v); }
inline float __int_as_float(int v) { return ::emu::bit_cast<float>(v); }
inline float __uint_as_float(unsigned v) { return ::emu::bit_cast<float>(v); }
inline long long __double_as_longlong(double v) { return ::emu::bit_cast<long long>(v); }
inline double __longlong_as_double(long long v) { return ::emu::bit_cast<double>(v); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }

// Conversions saturate, and a NaN becomes 0 (PTX cvt).
namespace emu {
template <class To>
inline To to_integer(float rounded) {
    constexpr float kLow = static_cast<float>(std::is_signed_v<To> ? -2147483648.0 : 0.0);
    constexpr float kHigh = static_cast<float>(std::is_signed_v<To> ? 2147483648.0 : 4294967296.0);
    if (!(rounded >= kLow)) return rounded < kLow ? static_cast<To>(kLow) : To(0);
    if (rounded >= kHigh) return static_cast<To>(std::is_signed_v<To> ? 0x7fffffffu : 0xffffffffu);
    return static_cast<To>(rounded);
}
}  // namespace emu
inline int __float2int_rn(float v) { return ::emu::to_integer<int>(__builtin_rintf(v)); }
inline int __float2int_rz(float v) { return ::emu::to_integer<int>(__builtin_truncf(v)); }
inline int __float2int_rd(float v) { return ::emu::to_integer<int>(__builtin_floorf(v)); }
inline unsigned __float2uint_rn(float v) { return ::emu::to_integer<unsigned>(__builtin_rintf(v)); }
inline unsigned __float2uint_rz(float v) { return ::emu::to_integer<unsigned>(__builtin_truncf(v)); }
inline float __int2float_rn(int v) { return static_cast<float>(v); }
inline float __uint2float_rn(unsigned v) { return static_cast<float>(v); }

#define EMU_MIN_MAX(type)                                            \
    inline type min(type a, type b) { return b < a ? b : a; }        \
    inline type max(type a, type b) { return a < b ? b : a; }
EMU_MIN_MAX(int)
EMU_MIN_MAX(unsigned)
EMU_MIN_MAX(long)
EMU_MIN_MAX(unsigned long)
EMU_MIN_MAX(long long)
EMU_MIN_MAX(unsigned long long)
#undef EMU_MIN_MAX
inline float min(float a, float b) { return __builtin_fminf(a, b); }
inline float max(float a, float b) { return __builtin_fmaxf(a, b); }
