//! AArch64 Advanced SIMD: four lanes, thirty-two registers. `fmax` and `fmin` propagate NaN, so `max` and `min` are comparisons here.

use super::{Op, Simd};
use core::arch::aarch64::*;

/// Proof that the CPU has neon.
#[derive(Clone, Copy)]
pub(crate) struct Neon(());

/// Runs `op` compiled with neon.
///
/// # Safety
/// The CPU has these features.
#[inline(never)]
#[target_feature(enable = "neon")]
pub(super) unsafe fn call<O: Op>(op: O) -> O::Output {
    op.run(Neon(()))
}

/// Runs `op` compiled with bf16 too.
///
/// # Safety
/// The CPU has these features.
#[inline(never)]
#[target_feature(enable = "neon,bf16")]
unsafe fn call_bf16_dot<O: Op>(op: O) -> O::Output {
    op.run(Neon(()))
}

// Every `unsafe` below rests on the token: a `Neon` is only made in `call`, whose caller has checked the CPU.
impl Simd for Neon {
    const LANES: usize = 4;
    // 10 × 2 accumulators + 8 vectors of B (four k) + 2 of A by whose elements is multiplied = 30 of 32 registers. 20 chains cover latency 4 × 4 FMA a cycle.
    // An eleventh row spills. Eleven rows that broadcast each word of A instead need 1.61 instructions for each multiply-add of f32, these ten 1.32
    // (scripts/check_tiles.py).
    const MR: usize = 10;

    const BF16_DOT: bool = true;
    const BY_ELEMENT: bool = true;

    type F = float32x4_t;
    type I = int32x4_t;
    type M = uint32x4_t;

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
    // The intrinsics of bf16 are not stable. The instructions are fused multiply-adds into f32 (see `bf16_dot.rs`): "top" is the odd element.
    #[inline(always)]
    unsafe fn dot_bf16(self, mut c: Self::F, a: Self::I, b: Self::I) -> Self::F {
        // SAFETY: the caller's contract.
        unsafe {
            core::arch::asm!("bfmlalt {c:v}.4s, {a:v}.8h, {b:v}.8h", "bfmlalb {c:v}.4s, {a:v}.8h, {b:v}.8h",
                c = inout(vreg) c, a = in(vreg) a, b = in(vreg) b, options(pure, nomem, nostack, preserves_flags));
        }
        c
    }
    #[inline(always)]
    unsafe fn fma_bf16_element<const H: i32>(
        self,
        mut c: Self::F,
        a: Self::I,
        b: Self::I,
    ) -> Self::F {
        // SAFETY: the caller's contract. An element can be taken of the first sixteen registers only.
        unsafe {
            if const { H % 2 == 1 } {
                core::arch::asm!("bfmlalt {c:v}.4s, {b:v}.8h, {a:v}.h[{h}]", h = const H,
                    c = inout(vreg) c, b = in(vreg) b, a = in(vreg_low16) a, options(pure, nomem, nostack, preserves_flags));
            } else {
                core::arch::asm!("bfmlalb {c:v}.4s, {b:v}.8h, {a:v}.h[{h}]", h = const H,
                    c = inout(vreg) c, b = in(vreg) b, a = in(vreg_low16) a, options(pure, nomem, nostack, preserves_flags));
            }
        }
        c
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        // SAFETY: the token.
        unsafe { vdupq_n_f32(x) }
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch never faults. (The intrinsic is not stable.)
        unsafe {
            core::arch::asm!("prfm pldl1keep, [{p}]", p = in(reg) p, options(nostack, readonly, preserves_flags));
        }
    }
    #[inline(always)]
    fn keep_order(self) {
        // SAFETY: no instruction. What matters is that it might touch memory, for all that the compiler knows.
        unsafe { core::arch::asm!("", options(nostack, preserves_flags)) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::F {
        // SAFETY: the caller's contract on `p`, and the token.
        unsafe { vld1q_f32(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Self::F) {
        // SAFETY: the caller's contract on `p`, and the token.
        unsafe { vst1q_f32(p, v) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Self::F {
        // SAFETY: the caller's contract on `p`, and the token.
        unsafe {
            let bits = vld1_u16(p);
            let wide: float32x4_t;
            // The intrinsic would want Rust's own f16 type; the instruction is part of base Advanced SIMD.
            core::arch::asm!("fcvtl {w:v}.4s, {h:v}.4h", w = lateout(vreg) wide, h = in(vreg) bits,
                options(pure, nomem, nostack, preserves_flags));
            wide
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, v: Self::F) {
        // SAFETY: the caller's contract on `p`, and the token.
        unsafe {
            let narrow: uint16x4_t;
            // As for `load_f16`.
            core::arch::asm!("fcvtn {h:v}.4h, {w:v}.4s", h = lateout(vreg) narrow, w = in(vreg) v,
                options(pure, nomem, nostack, preserves_flags));
            vst1_u16(p, narrow);
        }
    }
    #[inline(always)]
    unsafe fn load_u16(self, p: *const u16) -> Self::I {
        // SAFETY: the caller's contract on `p`, and the token.
        unsafe { vreinterpretq_s32_u32(vmovl_u16(vld1_u16(p))) }
    }
    #[inline(always)]
    unsafe fn store_u16(self, p: *mut u16, v: Self::I) {
        // SAFETY: the caller's contract on `p`, and the token.
        unsafe { vst1_u16(p, vmovn_u32(vreinterpretq_u32_s32(v))) }
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token.
        unsafe { vaddq_f32(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token.
        unsafe { vsubq_f32(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token.
        unsafe { vmulq_f32(a, b) }
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token.
        unsafe { vdivq_f32(a, b) }
    }
    #[inline(always)]
    fn sqrt(self, a: Self::F) -> Self::F {
        // SAFETY: the token.
        unsafe { vsqrtq_f32(a) }
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: the token.
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    fn fma_element<const L: i32>(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: the token.
        unsafe { vfmaq_laneq_f32::<L>(c, b, a) }
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token.
        unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token.
        unsafe { vbslq_f32(vcltq_f32(a, b), a, b) }
    }
    #[inline(always)]
    fn lt(self, a: Self::F, b: Self::F) -> Self::M {
        // SAFETY: the token.
        unsafe { vcltq_f32(a, b) }
    }
    #[inline(always)]
    fn eq(self, a: Self::F, b: Self::F) -> Self::M {
        // SAFETY: the token.
        unsafe { vceqq_f32(a, b) }
    }
    #[inline(always)]
    fn select(self, m: Self::M, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token.
        unsafe { vbslq_f32(m, a, b) }
    }
    #[inline(always)]
    fn to_bits(self, a: Self::F) -> Self::I {
        // SAFETY: the token.
        unsafe { vreinterpretq_s32_f32(a) }
    }
    #[inline(always)]
    fn from_bits(self, a: Self::I) -> Self::F {
        // SAFETY: the token.
        unsafe { vreinterpretq_f32_s32(a) }
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> Self::I {
        // SAFETY: the token.
        unsafe { vdupq_n_s32(x) }
    }
    #[inline(always)]
    unsafe fn load_i(self, p: *const i32) -> Self::I {
        // SAFETY: the caller's contract on `p`, and the token.
        unsafe { vld1q_s32(p) }
    }
    #[inline(always)]
    unsafe fn store_i(self, p: *mut i32, v: Self::I) {
        // SAFETY: the caller's contract on `p`, and the token.
        unsafe { vst1q_s32(p, v) }
    }
    #[inline(always)]
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token.
        unsafe { vaddq_s32(a, b) }
    }
    #[inline(always)]
    fn sub_i(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token.
        unsafe { vsubq_s32(a, b) }
    }
    #[inline(always)]
    fn and_i(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token.
        unsafe { vandq_s32(a, b) }
    }
    #[inline(always)]
    fn or_i(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token.
        unsafe { vorrq_s32(a, b) }
    }
    #[inline(always)]
    fn xor_i(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token.
        unsafe { veorq_s32(a, b) }
    }
    #[inline(always)]
    fn shl<const N: i32>(self, a: Self::I) -> Self::I {
        // SAFETY: the token.
        unsafe { vshlq_n_s32::<N>(a) }
    }
    #[inline(always)]
    fn shr<const N: i32>(self, a: Self::I) -> Self::I {
        // SAFETY: the token.
        unsafe { vreinterpretq_s32_u32(vshrq_n_u32::<N>(vreinterpretq_u32_s32(a))) }
    }
    #[inline(always)]
    fn sar<const N: i32>(self, a: Self::I) -> Self::I {
        // SAFETY: the token.
        unsafe { vshrq_n_s32::<N>(a) }
    }
    #[inline(always)]
    fn gt_i(self, a: Self::I, b: Self::I) -> Self::M {
        // SAFETY: the token.
        unsafe { vcgtq_s32(a, b) }
    }
    #[inline(always)]
    fn select_i(self, m: Self::M, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token.
        unsafe { vbslq_s32(m, a, b) }
    }
    #[inline(always)]
    fn to_float(self, a: Self::I) -> Self::F {
        // SAFETY: the token.
        unsafe { vcvtq_f32_s32(a) }
    }
    #[inline(always)]
    fn mask_bits(self, m: Self::M) -> u32 {
        // SAFETY: the token.
        unsafe {
            {
                let weights = vld1q_u32([1, 2, 4, 8].as_ptr());
                vaddvq_u32(vandq_u32(m, weights))
            }
        }
    }
    #[inline(always)]
    fn max_i(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token.
        unsafe { vmaxq_s32(a, b) }
    }
    #[inline(always)]
    fn min_i(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token.
        unsafe { vminq_s32(a, b) }
    }
    #[inline(always)]
    fn zip(self, a: Self::F, b: Self::F) -> (Self::F, Self::F) {
        // SAFETY: the token.
        unsafe { (vzip1q_f32(a, b), vzip2q_f32(a, b)) }
    }
}
