// Warpgroup matrix products: sm_90a. d[64 x N] (+)= A[64 x 16] B[16 x N], f32 accumulators, 16-bit inputs.
//
// All 128 threads of a warpgroup call. Order: wgmma_fence, the products of a stage, wgmma_commit, later wgmma_wait.
// Between a product and the wait that covers it `d` (and A's registers) must not be touched, its shared memory not
// be overwritten, and `d` must stay the same variable.
//
// Accumulators: warp w of the warpgroup owns rows 16 w .. 16 w + 15; with lane = 4 g + t
//   d[4 j + 0] = D[g][8 j + 2t]      d[4 j + 1] = D[g][8 j + 2t + 1]
//   d[4 j + 2] = D[g + 8][8 j + 2t]  d[4 j + 3] = D[g + 8][8 j + 2t + 1]      j = 0 .. N/8 - 1
//
// Overloads exist for N = 8 16 32 48 64 80 96 112 128 160 192 224 256, chosen by the length N / 2 of `d`.
#pragma once

namespace ptx {

// The descriptor of an operand in shared memory. Offsets in bytes (multiples of 16, below 256 KiB).
// K-major (rows of K, the usual A and B = W[n][k]): `stride` from one group of 8 rows to the next; `leading` from one
//   core matrix to the next along K, without swizzle only (with a swizzle the row holds them all; give 0 or 16).
//   Advancing by 16 along K inside a swizzled row adds 32 bytes to `address`.
// MN-major (TransposeB): swizzled, `leading` from one atom (32, 64 or 128 bytes of N) to the next along N, and
//   `stride` from one group of 8 along K to the next. Without swizzle: `leading` along K, `stride` along N.
// The tile's base must be aligned to 8 rows of the swizzle (1024, 512, 256 bytes), so that the base offset is 0.
MOE_DEVICE uint64_t wgmma_descriptor(uint32_t address, uint32_t leading, uint32_t stride, Swizzle swizzle) {
    const uint64_t mode = swizzle == Swizzle::None ? 0 : 4 - static_cast<uint64_t>(swizzle);  // 128 B: 1, 64: 2, 32: 3
    return (static_cast<uint64_t>(address & 0x3ffff) >> 4) | (static_cast<uint64_t>(leading & 0x3ffff) >> 4) << 16 |
           (static_cast<uint64_t>(stride & 0x3ffff) >> 4) << 32 | mode << 62;
}

MOE_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

MOE_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `Pending` groups of this warpgroup are outstanding.
template <int Pending>
MOE_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Keeps the compiler from moving uses of an accumulator across this line (before the fence and after the wait).
MOE_DEVICE void wgmma_hold(float& accumulator) { asm volatile("" : "+f"(accumulator)::"memory"); }

// Register lists: S(i) names operands 8 i .. 8 i + 7, C(i) binds them to d.
#define MOE_S0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define MOE_S1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MOE_S2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define MOE_S3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define MOE_S4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define MOE_S5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define MOE_S6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define MOE_S7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define MOE_S8 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define MOE_S9 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define MOE_S10 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define MOE_S11 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define MOE_S12 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define MOE_S13 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define MOE_S14 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define MOE_S15 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define MOE_SN4 "%0, %1, %2, %3"
#define MOE_SN8 MOE_S0
#define MOE_SN16 MOE_SN8 MOE_S1
#define MOE_SN24 MOE_SN16 MOE_S2
#define MOE_SN32 MOE_SN24 MOE_S3
#define MOE_SN40 MOE_SN32 MOE_S4
#define MOE_SN48 MOE_SN40 MOE_S5
#define MOE_SN56 MOE_SN48 MOE_S6
#define MOE_SN64 MOE_SN56 MOE_S7
#define MOE_SN80 MOE_SN64 MOE_S8 MOE_S9
#define MOE_SN96 MOE_SN80 MOE_S10 MOE_S11
#define MOE_SN112 MOE_SN96 MOE_S12 MOE_S13
#define MOE_SN128 MOE_SN112 MOE_S14 MOE_S15
#define MOE_C4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MOE_C8(i) MOE_C4(i), MOE_C4(i + 4)
#define MOE_C16(i) MOE_C8(i), MOE_C8(i + 8)
#define MOE_CN4 MOE_C4(0)
#define MOE_CN8 MOE_C8(0)
#define MOE_CN16 MOE_C16(0)
#define MOE_CN24 MOE_CN16, MOE_C8(16)
#define MOE_CN32 MOE_CN16, MOE_C16(16)
#define MOE_CN40 MOE_CN32, MOE_C8(32)
#define MOE_CN48 MOE_CN32, MOE_C16(32)
#define MOE_CN56 MOE_CN48, MOE_C8(48)
#define MOE_CN64 MOE_CN48, MOE_C16(48)
#define MOE_CN80 MOE_CN64, MOE_C16(64)
#define MOE_CN96 MOE_CN80, MOE_C16(80)
#define MOE_CN112 MOE_CN96, MOE_C16(96)
#define MOE_CN128 MOE_CN112, MOE_C16(112)

// R = N / 2 accumulators; P0 .. P5 = the numbers of the operands after them.
#define MOE_WGMMA(TYPE, N, R, P0, P1, P2, P3, P4, P5, P6)                                                              \
    /* A and B in shared memory. `accumulate` = false starts from zero. */                                             \
    template <bool TransposeB = false>                                                                                 \
    MOE_DEVICE void wgmma_##TYPE(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {                             \
        asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" #P2 ", 0;\n"                                               \
                     " wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #TYPE "." #TYPE " {" MOE_SN##R "}, %" #P0      \
                     ", %" #P1 ", p, 1, 1, 0, %" #P3 ";\n}"                                                            \
                     : MOE_CN##R                                                                                       \
                     : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(TransposeB ? 1 : 0));                    \
    }                                                                                                                  \
    /* A in registers: the fragment of mma.m16n8k16 for the warp's 16 rows. */                                         \
    template <bool TransposeB = false>                                                                                 \
    MOE_DEVICE void wgmma_##TYPE(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate) {                 \
        asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" #P5 ", 0;\n"                                               \
                     " wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #TYPE "." #TYPE " {" MOE_SN##R "}, {%" #P0     \
                     ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4 ", p, 1, 1, %" #P6 ";\n}"                                \
                     : MOE_CN##R                                                                                       \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),          \
                       "n"(TransposeB ? 1 : 0));                                                                       \
    }

#define MOE_WGMMA_BOTH(N, R, ...) \
    MOE_WGMMA(f16, N, R, __VA_ARGS__) \
    MOE_WGMMA(bf16, N, R, __VA_ARGS__)

MOE_WGMMA_BOTH(8, 4, 4, 5, 6, 7, 8, 9, 10)
MOE_WGMMA_BOTH(16, 8, 8, 9, 10, 11, 12, 13, 14)
MOE_WGMMA_BOTH(32, 16, 16, 17, 18, 19, 20, 21, 22)
MOE_WGMMA_BOTH(48, 24, 24, 25, 26, 27, 28, 29, 30)
MOE_WGMMA_BOTH(64, 32, 32, 33, 34, 35, 36, 37, 38)
MOE_WGMMA_BOTH(80, 40, 40, 41, 42, 43, 44, 45, 46)
MOE_WGMMA_BOTH(96, 48, 48, 49, 50, 51, 52, 53, 54)
MOE_WGMMA_BOTH(112, 56, 56, 57, 58, 59, 60, 61, 62)
MOE_WGMMA_BOTH(128, 64, 64, 65, 66, 67, 68, 69, 70)
MOE_WGMMA_BOTH(160, 80, 80, 81, 82, 83, 84, 85, 86)
MOE_WGMMA_BOTH(192, 96, 96, 97, 98, 99, 100, 101, 102)
MOE_WGMMA_BOTH(224, 112, 112, 113, 114, 115, 116, 117, 118)
MOE_WGMMA_BOTH(256, 128, 128, 129, 130, 131, 132, 133, 134)

}  // namespace ptx
