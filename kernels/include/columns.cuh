#pragma once
// Neighbouring columns of a row, in a format known when the kernel is compiled or when it is launched: as bits and as f32.
#include "numerics.cuh"

namespace columns {

enum Format : uint32_t { F32 = 0, F16 = 1, BF16 = 2 };

template <uint32_t N>
struct Bytes {
    uint32_t words[N < 4 ? 1 : N / 4];
};

// Once read, not read again: past the L1.
template <uint32_t N>
MOE_DEVICE Bytes<N> load_once(const unsigned char* at) {
    Bytes<N> v;
    if constexpr (N == 2) v.words[0] = ptx::load_nc_16(at);
    if constexpr (N == 4) v.words[0] = ptx::load_nc_32(at);
    if constexpr (N >= 16) {
#pragma unroll
        for (uint32_t i = 0; i < N / 16; ++i) {
            const uint4 part = ptx::load_nc_128(at + 16 * i);
            v.words[4 * i] = part.x, v.words[4 * i + 1] = part.y, v.words[4 * i + 2] = part.z, v.words[4 * i + 3] = part.w;
        }
    }
    return v;
}

// What may be overwritten by this very thread afterwards.
template <uint32_t N>
MOE_DEVICE Bytes<N> load(const unsigned char* at) {
    Bytes<N> v;
    if constexpr (N == 2) v.words[0] = *reinterpret_cast<const uint16_t*>(at);
    if constexpr (N == 4) v.words[0] = *reinterpret_cast<const uint32_t*>(at);
    if constexpr (N == 8) {
        const uint2 part = *reinterpret_cast<const uint2*>(at);
        v.words[0] = part.x, v.words[1] = part.y;
    }
    if constexpr (N >= 16) {
#pragma unroll
        for (uint32_t i = 0; i < N / 16; ++i) {
            const uint4 part = ptx::load_128(at + 16 * i);
            v.words[4 * i] = part.x, v.words[4 * i + 1] = part.y, v.words[4 * i + 2] = part.z, v.words[4 * i + 3] = part.w;
        }
    }
    return v;
}

template <uint32_t N>
MOE_DEVICE void store(unsigned char* at, const Bytes<N>& v) {
    if constexpr (N == 2) *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(v.words[0]);
    if constexpr (N == 4) *reinterpret_cast<uint32_t*>(at) = v.words[0];
    if constexpr (N == 8) ptx::store_64(at, make_uint2(v.words[0], v.words[1]));
    if constexpr (N >= 16) {
#pragma unroll
        for (uint32_t i = 0; i < N / 16; ++i) {
            ptx::store_128(at + 16 * i, make_uint4(v.words[4 * i], v.words[4 * i + 1], v.words[4 * i + 2], v.words[4 * i + 3]));
        }
    }
}

template <Format T>
constexpr uint32_t SIZE = T == F32 ? 4 : 2;

template <Format T, int C>
MOE_DEVICE void widen(const Bytes<C * SIZE<T>>& bits, float (&v)[C]) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
        if constexpr (T == F32) {
            v[c] = numerics::from_bits(bits.words[c]);
        } else {
            const auto half = static_cast<uint16_t>(bits.words[c / 2] >> 16 * (c % 2));
            v[c] = T == F16 ? numerics::f16_to_f32(half) : numerics::bf16_to_f32(half);
        }
    }
}

template <Format T, int C>
MOE_DEVICE Bytes<C * SIZE<T>> narrow(const float (&v)[C]) {
    Bytes<C * SIZE<T>> bits = {};
#pragma unroll
    for (int c = 0; c < C; ++c) {
        if constexpr (T == F32) {
            bits.words[c] = numerics::bits_of(v[c]);
        } else {
            const uint32_t half = T == F16 ? numerics::f32_to_f16(v[c]) : numerics::f32_to_bf16(v[c]);
            bits.words[c / 2] |= half << 16 * (c % 2);
        }
    }
    return bits;
}

template <Format T, int C>
MOE_DEVICE void load_as(const unsigned char* row, uint64_t column, float (&v)[C]) {
    widen<T, C>(load<C * SIZE<T>>(row + column * SIZE<T>), v);
}

template <int C>
MOE_DEVICE void load_any(uint32_t format, const unsigned char* row, uint64_t column, float (&v)[C]) {
    if (format == F32) {
        load_as<F32, C>(row, column, v);
    } else if (format == F16) {
        load_as<F16, C>(row, column, v);
    } else {
        load_as<BF16, C>(row, column, v);
    }
}

// A format known when the kernel is compiled, and one known when it is launched.
template <Format T>
struct Known {
    template <int C>
    using Raw = Bytes<C * SIZE<T>>;
    template <int C>
    static MOE_DEVICE Raw<C> load_raw(uint32_t, const unsigned char* row, uint64_t column) {
        return load_once<C * SIZE<T>>(row + column * SIZE<T>);
    }
    // The same for what the kernel overwrites.
    template <int C>
    static MOE_DEVICE Raw<C> load_mutable(uint32_t, const unsigned char* row, uint64_t column) {
        return load<C * SIZE<T>>(row + column * SIZE<T>);
    }
    template <int C>
    static MOE_DEVICE void values(const Raw<C>& raw, float (&v)[C]) {
        widen<T, C>(raw, v);
    }
    template <int C>
    static MOE_DEVICE void write(uint32_t, unsigned char* row, uint64_t column, const float (&v)[C]) {
        store(row + column * SIZE<T>, narrow<T, C>(v));
    }
};

struct Any {
    template <int C>
    struct Raw {
        float values[C];
    };
    template <int C>
    static MOE_DEVICE Raw<C> load_raw(uint32_t format, const unsigned char* row, uint64_t column) {
        Raw<C> raw;
        load_any<C>(format, row, column, raw.values);
        return raw;
    }
    template <int C>
    static MOE_DEVICE Raw<C> load_mutable(uint32_t format, const unsigned char* row, uint64_t column) {
        return load_raw<C>(format, row, column);
    }
    template <int C>
    static MOE_DEVICE void values(const Raw<C>& raw, float (&v)[C]) {
#pragma unroll
        for (int c = 0; c < C; ++c) v[c] = raw.values[c];
    }
    template <int C>
    static MOE_DEVICE void write(uint32_t format, unsigned char* row, uint64_t column, const float (&v)[C]) {
        if (format == F32) {
            Known<F32>::write<C>(format, row, column, v);
        } else if (format == F16) {
            Known<F16>::write<C>(format, row, column, v);
        } else {
            Known<BF16>::write<C>(format, row, column, v);
        }
    }
};

}  // namespace columns
