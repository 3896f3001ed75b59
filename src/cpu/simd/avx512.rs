//! AVX-512 F: sixteen lanes, thirty-two registers. Shifts take their count in a register because the immediate forms want another
//! const type than the trait has; the compiler folds it.

use super::{Op, Simd};
use core::arch::x86_64::*;

/// Proof that the CPU has avx512f,avx2,fma,f16c,popcnt,bmi1,bmi2.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

/// Runs `op` compiled with avx512f,avx2,fma,f16c,popcnt,bmi1,bmi2.
///
/// # Safety
/// The CPU has these features.
#[inline(never)]
#[target_feature(enable = "avx512f,avx2,fma,f16c,popcnt,bmi1,bmi2")]
pub(super) unsafe fn call<O: Op>(op: O) -> O::Output {
    op.run(Avx512(()))
}

/// Runs `op` compiled with avx512bf16 too.
///
/// # Safety
/// The CPU has these features.
#[inline(never)]
#[target_feature(enable = "avx512bf16,avx512f,avx2,fma,f16c")]
unsafe fn call_bf16_dot<O: Op>(op: O) -> O::Output {
    op.run(Avx512(()))
}

// Every `unsafe` below rests on the token: a `Avx512` is only made in `call`, whose caller has checked the CPU.
impl Simd for Avx512 {
    const LANES: usize = 16;
    // 14 × 2 accumulators + 2 panel vectors + 1 broadcast = 31 of 32 registers.
    const MR: usize = 14;

    const BF16_DOT: bool = true;
    const BF16_DOT_FLUSHES: bool = true;

    type F = __m512;
    type I = __m512i;
    type M = __mmask16;

    #[inline(always)]
    fn outline<O: Op>(self, op: O) -> O::Output {
        // SAFETY: the token.
        unsafe { call(op) }
    }
    #[inline(always)]
    unsafe fn outline_bf16_dot<O: Op>(self, op: O) -> O::Output {
        // SAFETY: the token, and the caller's contract.
        unsafe { call_bf16_dot(op) }
    }
    #[inline(always)]
    unsafe fn dot_bf16(self, c: Self::F, a: Self::I, b: Self::I) -> Self::F {
        // SAFETY: the caller's contract; both types are 512 bits of anything.
        unsafe {
            let a = core::mem::transmute::<__m512i, __m512bh>(a);
            let b = core::mem::transmute::<__m512i, __m512bh>(b);
            _mm512_dpbf16_ps(c, a, b)
        }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        // SAFETY: the token.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    const PREFETCH_L2: bool = true;
    #[inline(always)]
    fn prefetch_l2(self, p: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::F {
        // SAFETY: the caller's contract on `p`, and the token.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Self::F) {
        // SAFETY: the caller's contract on `p`, and the token.
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn stream(self, p: *mut f32, v: Self::F) {
        // SAFETY: the caller's contract on `p`, and the token.
        unsafe { _mm512_stream_ps(p, v) }
    }
    #[inline(always)]
    fn fence_streams(self) {
        // SAFETY: every x86-64 has it.
        unsafe { _mm_sfence() }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Self::F {
        // SAFETY: the caller's contract on `p`, and the token.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, v: Self::F) {
        // SAFETY: the caller's contract on `p`, and the token.
        unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)) }
    }
    #[inline(always)]
    unsafe fn load_u16(self, p: *const u16) -> Self::I {
        // SAFETY: the caller's contract on `p`, and the token.
        unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn store_u16(self, p: *mut u16, v: Self::I) {
        // SAFETY: the caller's contract on `p`, and the token.
        unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(v)) }
    }
    #[inline(always)]
    unsafe fn stream_u16(self, p: *mut u16, v: Self::I) {
        // SAFETY: the caller's contract on `p`, and the token.
        unsafe { _mm256_stream_si256(p.cast(), _mm512_cvtepi32_epi16(v)) }
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn sqrt(self, a: Self::F) -> Self::F {
        // SAFETY: the token.
        unsafe { _mm512_sqrt_ps(a) }
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: the token.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn lt(self, a: Self::F, b: Self::F) -> Self::M {
        // SAFETY: the token.
        unsafe { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b) }
    }
    #[inline(always)]
    fn eq(self, a: Self::F, b: Self::F) -> Self::M {
        // SAFETY: the token.
        unsafe { _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, b) }
    }
    #[inline(always)]
    fn select(self, m: Self::M, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token.
        unsafe { _mm512_mask_blend_ps(m, b, a) }
    }
    #[inline(always)]
    fn to_bits(self, a: Self::F) -> Self::I {
        // SAFETY: the token.
        unsafe { _mm512_castps_si512(a) }
    }
    #[inline(always)]
    fn from_bits(self, a: Self::I) -> Self::F {
        // SAFETY: the token.
        unsafe { _mm512_castsi512_ps(a) }
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> Self::I {
        // SAFETY: the token.
        unsafe { _mm512_set1_epi32(x) }
    }
    #[inline(always)]
    unsafe fn load_i(self, p: *const i32) -> Self::I {
        // SAFETY: the caller's contract on `p`, and the token.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store_i(self, p: *mut i32, v: Self::I) {
        // SAFETY: the caller's contract on `p`, and the token.
        unsafe { _mm512_storeu_si512(p.cast(), v) }
    }
    #[inline(always)]
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token.
        unsafe { _mm512_add_epi32(a, b) }
    }
    #[inline(always)]
    fn sub_i(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token.
        unsafe { _mm512_sub_epi32(a, b) }
    }
    #[inline(always)]
    fn and_i(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token.
        unsafe { _mm512_and_si512(a, b) }
    }
    #[inline(always)]
    fn or_i(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token.
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    fn xor_i(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token.
        unsafe { _mm512_xor_si512(a, b) }
    }
    #[inline(always)]
    fn shl<const N: i32>(self, a: Self::I) -> Self::I {
        // SAFETY: the token.
        unsafe { _mm512_sll_epi32(a, _mm_cvtsi32_si128(N)) }
    }
    #[inline(always)]
    fn shr<const N: i32>(self, a: Self::I) -> Self::I {
        // SAFETY: the token.
        unsafe { _mm512_srl_epi32(a, _mm_cvtsi32_si128(N)) }
    }
    #[inline(always)]
    fn sar<const N: i32>(self, a: Self::I) -> Self::I {
        // SAFETY: the token.
        unsafe { _mm512_sra_epi32(a, _mm_cvtsi32_si128(N)) }
    }
    #[inline(always)]
    fn gt_i(self, a: Self::I, b: Self::I) -> Self::M {
        // SAFETY: the token.
        unsafe { _mm512_cmpgt_epi32_mask(a, b) }
    }
    #[inline(always)]
    fn select_i(self, m: Self::M, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token.
        unsafe { _mm512_mask_blend_epi32(m, b, a) }
    }
    #[inline(always)]
    fn to_float(self, a: Self::I) -> Self::F {
        // SAFETY: the token.
        unsafe { _mm512_cvtepi32_ps(a) }
    }
    #[inline(always)]
    fn mask_bits(self, m: Self::M) -> u32 {
        u32::from(m)
    }
    #[inline(always)]
    fn max_i(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token.
        unsafe { _mm512_max_epi32(a, b) }
    }
    #[inline(always)]
    fn min_i(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token.
        unsafe { _mm512_min_epi32(a, b) }
    }
    const SCALES_TO_ZERO: bool = true;

    // One instruction, rounded once: the bits of the two halves. Masked lanes are 0 and cannot underflow, for which Intel's processors would call
    // their microcode.
    #[inline(always)]
    fn scale_by_power(self, a: Self::F, _n: Self::I, n_as_float: Self::F, far: Self::M) -> Self::F {
        // SAFETY: the token.
        unsafe { _mm512_maskz_scalef_ps(!far, a, n_as_float) }
    }
    #[inline(always)]
    fn zip(self, a: Self::F, b: Self::F) -> (Self::F, Self::F) {
        // Lane l of a is number l, lane l of b number 16 + l.
        const LOW: [i32; 16] = [0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23];
        const HIGH: [i32; 16] = [8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31];
        let (low, high) = (self.load_slice_i(&LOW), self.load_slice_i(&HIGH));
        // SAFETY: the token.
        unsafe {
            (
                _mm512_permutex2var_ps(a, low, b),
                _mm512_permutex2var_ps(a, high, b),
            )
        }
    }
    #[inline(always)]
    fn compress(self, m: Self::M, a: Self::I) -> Self::I {
        // SAFETY: the token.
        unsafe { _mm512_maskz_compress_epi32(m, a) }
    }
    #[inline(always)]
    fn load_partial(self, s: &[f32], fill: f32) -> Self::F {
        let n = s.len().min(16) as u32;
        if n == 0 {
            // A load from nowhere does not fault, but the processor needs hundreds of cycles to see that.
            return self.splat(fill);
        }
        // SAFETY: the token; lanes beyond the slice are masked, and masked lanes are not read.
        unsafe { _mm512_mask_loadu_ps(_mm512_set1_ps(fill), ((1u32 << n) - 1) as u16, s.as_ptr()) }
    }
    #[inline(always)]
    fn store_partial(self, s: &mut [f32], v: Self::F) {
        let n = s.len().min(16) as u32;
        if n == 0 {
            return;
        }
        // SAFETY: the token; lanes beyond the slice are masked, and masked lanes are not written.
        unsafe { _mm512_mask_storeu_ps(s.as_mut_ptr(), ((1u32 << n) - 1) as u16, v) }
    }
}
