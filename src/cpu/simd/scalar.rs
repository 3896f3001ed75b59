//! Plain Rust: eight lanes as an array. Runs anywhere, and is the definition that the other files are tested against.
//!
//! Where there are vector instructions, this is hardly used, and was two fifths of the library's machine code: so what takes many instructions without them is a
//! function there ([`apart`]), and not repeated wherever it is used.

use super::{Op, Simd};
use half::f16;

const N: usize = 8;

/// The scalar implementation; there is nothing to prove.
#[derive(Clone, Copy)]
pub(crate) struct Scalar(());

impl Scalar {
    pub(crate) fn new() -> Self {
        Self(())
    }
}

#[inline(always)]
fn map<A: Copy, B>(a: [A; N], f: impl Fn(A) -> B) -> [B; N] {
    core::array::from_fn(|l| f(a[l]))
}

#[inline(always)]
fn zip<A: Copy, B: Copy, C>(a: [A; N], b: [B; N], f: impl Fn(A, B) -> C) -> [C; N] {
    core::array::from_fn(|l| f(a[l], b[l]))
}

/// `f()` as a function of its own; inlined on architectures for which this is all there is.
#[cfg_attr(any(target_arch = "x86_64", target_arch = "aarch64"), inline(never))]
#[cfg_attr(
    not(any(target_arch = "x86_64", target_arch = "aarch64")),
    inline(always)
)]
fn apart<R>(f: impl FnOnce() -> R) -> R {
    f()
}

impl Simd for Scalar {
    const LANES: usize = N;
    const MR: usize = 4;
    const BATCHES: bool = false;

    type F = [f32; N];
    type I = [i32; N];
    type M = [bool; N];

    #[inline(never)]
    fn outline<O: Op>(self, op: O) -> O::Output {
        op.run(self)
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; N]
    }
    #[inline(always)]
    fn prefetch(self, _p: *const u8) {
        // Nothing to ask with.
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::F {
        // SAFETY: the caller's contract; arrays of f32 read unaligned here.
        unsafe { p.cast::<Self::F>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Self::F) {
        // SAFETY: the caller's contract.
        unsafe { p.cast::<Self::F>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Self::F {
        // SAFETY: the caller's contract.
        let bits = unsafe { p.cast::<[u16; N]>().read_unaligned() };
        apart(|| map(bits, |b| f16::from_bits(b).to_f32_const()))
    }

    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, v: Self::F) {
        let bits = apart(|| map(v, |x| f16::from_f32_const(x).to_bits()));
        // SAFETY: the caller's contract.
        unsafe { p.cast::<[u16; N]>().write_unaligned(bits) }
    }
    #[inline(always)]
    unsafe fn load_u16(self, p: *const u16) -> Self::I {
        // SAFETY: the caller's contract.
        map(unsafe { p.cast::<[u16; N]>().read_unaligned() }, i32::from)
    }
    #[inline(always)]
    unsafe fn store_u16(self, p: *mut u16, v: Self::I) {
        // SAFETY: the caller's contract.
        unsafe { p.cast::<[u16; N]>().write_unaligned(map(v, |x| x as u16)) }
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn sqrt(self, a: Self::F) -> Self::F {
        map(a, f32::sqrt)
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        apart(|| core::array::from_fn(|l| a[l].mul_add(b[l], c[l])))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn lt(self, a: Self::F, b: Self::F) -> Self::M {
        zip(a, b, |a, b| a < b)
    }
    #[inline(always)]
    fn eq(self, a: Self::F, b: Self::F) -> Self::M {
        zip(a, b, |a, b| a == b)
    }
    #[inline(always)]
    fn select(self, m: Self::M, a: Self::F, b: Self::F) -> Self::F {
        core::array::from_fn(|l| if m[l] { a[l] } else { b[l] })
    }
    #[inline(always)]
    fn to_bits(self, a: Self::F) -> Self::I {
        map(a, |x| x.to_bits() as i32)
    }
    #[inline(always)]
    fn from_bits(self, a: Self::I) -> Self::F {
        map(a, |x| f32::from_bits(x as u32))
    }

    #[inline(always)]
    fn splat_i(self, x: i32) -> Self::I {
        [x; N]
    }
    #[inline(always)]
    unsafe fn load_i(self, p: *const i32) -> Self::I {
        // SAFETY: the caller's contract.
        unsafe { p.cast::<Self::I>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_i(self, p: *mut i32, v: Self::I) {
        // SAFETY: the caller's contract.
        unsafe { p.cast::<Self::I>().write_unaligned(v) }
    }
    #[inline(always)]
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, i32::wrapping_add)
    }
    #[inline(always)]
    fn sub_i(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, i32::wrapping_sub)
    }
    #[inline(always)]
    fn and_i(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, |a, b| a & b)
    }
    #[inline(always)]
    fn or_i(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, |a, b| a | b)
    }
    #[inline(always)]
    fn xor_i(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, |a, b| a ^ b)
    }
    #[inline(always)]
    fn shl<const S: i32>(self, a: Self::I) -> Self::I {
        map(a, |x| x << S)
    }
    #[inline(always)]
    fn shr<const S: i32>(self, a: Self::I) -> Self::I {
        map(a, |x| ((x as u32) >> S) as i32)
    }
    #[inline(always)]
    fn sar<const S: i32>(self, a: Self::I) -> Self::I {
        map(a, |x| x >> S)
    }
    #[inline(always)]
    fn gt_i(self, a: Self::I, b: Self::I) -> Self::M {
        zip(a, b, |a, b| a > b)
    }
    #[inline(always)]
    fn select_i(self, m: Self::M, a: Self::I, b: Self::I) -> Self::I {
        core::array::from_fn(|l| if m[l] { a[l] } else { b[l] })
    }
    #[inline(always)]
    fn to_float(self, a: Self::I) -> Self::F {
        map(a, |x| x as f32)
    }
    #[inline(always)]
    fn mask_bits(self, m: Self::M) -> u32 {
        m.iter().rev().fold(0, |bits, &b| bits << 1 | u32::from(b))
    }
}
