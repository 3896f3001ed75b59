// mma.cuh, emulated. cp.async lands late: until the wait its target holds poison.
#pragma once

namespace emu {

void cp_async(uint32_t target, const void* source, uint32_t size, uint32_t bytes);
void cp_async_commit();
void cp_async_wait(uint32_t pending);
void cp_async_wait_all();
void cp_async_arrive(uint32_t mbarrier);

void ldmatrix(uint32_t* registers, uint32_t count, bool transposed, uint32_t row);
void stmatrix(const uint32_t* registers, uint32_t count, bool transposed, uint32_t row);

enum MmaKind { kMmaF16, kMmaBf16, kMmaTf32 };
void mma(MmaKind kind, float* d, const uint32_t* a, const uint32_t* b);

}  // namespace emu

namespace ptx {

inline void cp_async_16(uint32_t target, const void* source, uint32_t bytes = 16) { emu::cp_async(target, source, 16, bytes); }
template <int Size>
inline void cp_async_ca(uint32_t target, const void* source, uint32_t bytes = Size) {
    static_assert(Size == 4 || Size == 8 || Size == 16, "cp.async copies 4, 8 or 16 bytes");
    emu::cp_async(target, source, Size, bytes);
}
inline void cp_async_commit() { emu::cp_async_commit(); }
template <int Pending>
inline void cp_async_wait() { emu::cp_async_wait(Pending); }
inline void cp_async_wait_all() { emu::cp_async_wait_all(); }
inline void cp_async_mbarrier_arrive_noinc(uint32_t mbarrier) { emu::cp_async_arrive(mbarrier); }

inline void ldmatrix_x1(uint32_t& r, uint32_t row) { emu::ldmatrix(&r, 1, false, row); }
inline void ldmatrix_x2(uint32_t (&r)[2], uint32_t row) { emu::ldmatrix(r, 2, false, row); }
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) { emu::ldmatrix(r, 4, false, row); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row) { emu::ldmatrix(r, 2, true, row); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) { emu::ldmatrix(r, 4, true, row); }

inline void stmatrix_x1(uint32_t row, uint32_t r) { emu::stmatrix(&r, 1, false, row); }
inline void stmatrix_x2(uint32_t row, uint32_t r0, uint32_t r1) {
    const uint32_t r[2] = {r0, r1};
    emu::stmatrix(r, 2, false, row);
}
inline void stmatrix_x4(uint32_t row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
    const uint32_t r[4] = {r0, r1, r2, r3};
    emu::stmatrix(r, 4, false, row);
}
inline void stmatrix_x4_trans(uint32_t row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
    const uint32_t r[4] = {r0, r1, r2, r3};
    emu::stmatrix(r, 4, true, row);
}

inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emu::mma(emu::kMmaF16, d, a, b); }
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emu::mma(emu::kMmaBf16, d, a, b); }
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emu::mma(emu::kMmaTf32, d, a, b); }

}  // namespace ptx
