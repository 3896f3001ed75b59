//! The thin room of vector instructions: one trait, one file per instruction set, no algorithm.
//!
//! An algorithm is written once, as an [`Op`] generic over [`Simd`], every function on its way `#[inline(always)]`.
//! [`dispatch`] picks the instruction set at run time and calls the op inside a `#[target_feature]` function, so that all of it is
//! compiled with those instructions. Closures are avoided in hot loops: one that is not inlined would lose the features.
//!
//! Each operation is exact or correctly rounded, so that every implementation returns the same bits. `max` and `min` are spelled
//! out as comparisons because the instruction sets disagree about NaN and about −0. NaN payloads may differ.
#![allow(unsafe_code)] // the room of intrinsics

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod bf16_dot;
pub(crate) mod math;
pub(crate) mod model;
#[cfg(target_arch = "aarch64")]
mod neon;
pub(crate) mod random;
mod scalar;

pub(crate) use scalar::Scalar;

use super::isa::Isa;

/// The most lanes that any implementation has.
pub(crate) const MAX_LANES: usize = 16;

/// What a step of the matrix tile reads of each column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Columns {
    /// One f32.
    F32,
    /// One f16, widened.
    F16,
    /// Two bf16 in a word, each widened; the odd one, in the upper half, is multiplied first.
    Bf16Pairs,
}

/// Vector operations of one instruction set. A value of an implementing type proves that the CPU has it.
///
/// `F` holds [`Simd::LANES`] f32, `I` as many i32, `M` a truth value for each lane.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// Lanes of a vector: 4, 8 or 16.
    const LANES: usize;
    /// Rows of the matrix tile: as many as leave MR × 2 accumulators, two panel vectors and one broadcast in registers; with [`Simd::BY_ELEMENT`], eight panel
    /// vectors and two of A.
    const MR: usize;

    /// Vector of f32.
    type F: Copy;
    /// Vector of i32.
    type I: Copy;
    /// Truth values.
    type M: Copy;

    /// Runs `op` as a function of its own, with this instruction set: for hot loops whose registers should not be allocated together with
    /// everything around them, and whose machine code should be found by name.
    fn outline<O: Op>(self, op: O) -> O::Output;

    /// Whether this instruction set may come with a dot product of bf16 pairs, [`Simd::dot_bf16`]; whether this CPU has it is for
    /// [`Isa::has_bf16_dot`] to say.
    const BF16_DOT: bool = false;

    /// Whether that dot product reads subnormal bf16 as zeros. Where it does not, whoever packs its operands sees to it.
    const BF16_DOT_FLUSHES: bool = false;

    /// Whether [`Simd::fma_element`] and [`Simd::fma_bf16_element`] are instructions; vectors have four lanes then.
    const BY_ELEMENT: bool = false;

    /// Whether many tokens are routed at once, a token in each lane. In plain Rust one after the other is as fast (T = 64 and 4096, on an Emerald Rapids core: eight of 64 to 256
    /// experts 1.0 to 1.4 times, two of 8 1.6, one of 128 1.8 to 2.0, four of 128 0.6 times), and this was a sixth of the library's machine code.
    const BATCHES: bool = true;

    /// Whether [`Simd::tile_step`] is there, and better than what the compiler makes of single operations. It needs no registers beyond those that [`Simd::MR`] counts.
    const TILE_STEP: bool = false;
    /// Whether packed panels may lie in halves: see `halved` of the packed layout. Not where [`Simd::BY_ELEMENT`].
    const HALVES: bool = false;

    /// A step of the matrix tile of at most [`Simd::MR`] rows by hand: `acc[i] = fma(a[16 · i], b, acc[i])` for the two vectors of columns at `b`; of bf16 pairs
    /// `fma(a[16 · i + 1], odd(b), acc[i])`, then `fma(a[16 · i], even(b), acc[i])`.
    ///
    /// # Safety
    /// `a` is valid for reading these words, `b` for two vectors of columns; only where [`Simd::TILE_STEP`].
    #[inline(always)]
    unsafe fn tile_step<const M: usize>(
        self,
        columns: Columns,
        acc: &mut [[Self::F; 2]; M],
        a: *const f32,
        b: *const u8,
    ) {
        let _ = (acc, a, b);
        unreachable!("{columns:?} by the compiler here");
    }

    /// As [`Simd::outline`], with the bf16 dot product among the instructions.
    ///
    /// # Safety
    /// The CPU has it.
    #[inline(always)]
    unsafe fn outline_bf16_dot<O: Op>(self, op: O) -> O::Output {
        self.outline(op)
    }

    /// `fma(even(a), even(b), fma(odd(a), odd(b), c))` for the two bf16 numbers in each lane's word, the even one in its lower half. With
    /// [`Simd::BF16_DOT_FLUSHES`], subnormal inputs count as zeros and subnormal sums may.
    ///
    /// # Safety
    /// Only below [`Simd::outline_bf16_dot`].
    #[inline(always)]
    unsafe fn dot_bf16(self, c: Self::F, a: Self::I, b: Self::I) -> Self::F {
        self.dot_bf16_by_fma(c, a, b)
    }
    /// Half a step of [`Simd::dot_bf16`] by element: `fma(h, odd(b), c)` for an odd H, else `fma(h, even(b), c)`, where h is the bf16 number H of `a`.
    ///
    /// # Safety
    /// Only below [`Simd::outline_bf16_dot`].
    #[inline(always)]
    unsafe fn fma_bf16_element<const H: i32>(self, c: Self::F, a: Self::I, b: Self::I) -> Self::F {
        let mut lanes = [0; MAX_LANES];
        self.store_slice_i(&mut lanes, a);
        let word = self.splat_i(lanes[H as usize / 2]);
        if H % 2 == 1 {
            self.fma(self.odd_bf16(word), self.odd_bf16(b), c)
        } else {
            self.fma(self.even_bf16(word), self.even_bf16(b), c)
        }
    }

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::F;
    /// Asks for the cache line at `p`, which need not be valid.
    fn prefetch(self, p: *const u8);
    /// Whether [`Simd::prefetch_l2`] is another instruction than [`Simd::prefetch`].
    const PREFETCH_L2: bool = false;
    /// The same, no nearer than into the second cache.
    #[inline(always)]
    fn prefetch_l2(self, p: *const u8) {
        self.prefetch(p);
    }
    /// Keeps the compiler from moving loads across this place, where it would run out of registers.
    #[inline(always)]
    fn keep_order(self) {}
    /// `LANES` floats from memory, any alignment.
    ///
    /// # Safety
    /// `p` is valid for reading `LANES` floats.
    unsafe fn load(self, p: *const f32) -> Self::F;
    /// `LANES` floats to memory, any alignment.
    ///
    /// # Safety
    /// `p` is valid for writing `LANES` floats.
    unsafe fn store(self, p: *mut f32, v: Self::F);
    /// As `store`, past the caches where there is an instruction for it.
    ///
    /// # Safety
    /// As `store`; `p` is aligned to the vector; [`Simd::fence_streams`] comes before another thread is told.
    #[inline(always)]
    unsafe fn stream(self, p: *mut f32, v: Self::F) {
        // SAFETY: the caller's contract.
        unsafe { self.store(p, v) }
    }
    /// Orders what `stream` wrote before all later writes.
    #[inline(always)]
    fn fence_streams(self) {}
    /// `LANES` IEEE binary16 numbers, widened exactly.
    ///
    /// # Safety
    /// `p` is valid for reading `LANES` halves.
    unsafe fn load_f16(self, p: *const u16) -> Self::F;
    /// `LANES` floats as IEEE binary16, to nearest, ties to even.
    ///
    /// # Safety
    /// `p` is valid for writing `LANES` halves.
    unsafe fn store_f16(self, p: *mut u16, v: Self::F);
    /// `LANES` 16-bit numbers, filled up with zeros.
    ///
    /// # Safety
    /// `p` is valid for reading `LANES` of them.
    unsafe fn load_u16(self, p: *const u16) -> Self::I;
    /// The lower halves of `LANES` integers below 2¹⁶.
    ///
    /// # Safety
    /// `p` is valid for writing `LANES` of them.
    unsafe fn store_u16(self, p: *mut u16, v: Self::I);
    /// As `store_u16`, past the caches where there is an instruction for it.
    ///
    /// # Safety
    /// As `store_u16`; `p` is aligned to half a vector; [`Simd::fence_streams`] comes before another thread is told.
    #[inline(always)]
    unsafe fn stream_u16(self, p: *mut u16, v: Self::I) {
        // SAFETY: the caller's contract.
        unsafe { self.store_u16(p, v) }
    }

    /// a + b
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// a − b
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// a · b
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// a / b
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// √a
    fn sqrt(self, a: Self::F) -> Self::F;
    /// a · b + c, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `fma(a[L], b, c)`: lane L of a with all of b.
    #[inline(always)]
    fn fma_element<const L: i32>(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        let mut lanes = [0.0; MAX_LANES];
        self.store_slice(&mut lanes, a);
        self.fma(self.splat(lanes[L as usize]), b, c)
    }
    /// `if a > b { a } else { b }`: b when either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `if a < b { a } else { b }`: b when either is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// a < b; false for NaN.
    fn lt(self, a: Self::F, b: Self::F) -> Self::M;
    /// a == b; false for NaN.
    fn eq(self, a: Self::F, b: Self::F) -> Self::M;
    /// a where `m`, else b.
    fn select(self, m: Self::M, a: Self::F, b: Self::F) -> Self::F;

    /// The bits of each lane.
    fn to_bits(self, a: Self::F) -> Self::I;
    /// Lanes from bits.
    #[allow(clippy::wrong_self_convention)] // self is the token
    fn from_bits(self, a: Self::I) -> Self::F;

    /// All lanes `x`.
    fn splat_i(self, x: i32) -> Self::I;
    /// `LANES` integers from memory, any alignment.
    ///
    /// # Safety
    /// `p` is valid for reading `LANES` integers.
    unsafe fn load_i(self, p: *const i32) -> Self::I;
    /// `LANES` integers to memory, any alignment.
    ///
    /// # Safety
    /// `p` is valid for writing `LANES` integers.
    unsafe fn store_i(self, p: *mut i32, v: Self::I);
    /// a + b, wrapping.
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// a − b, wrapping.
    fn sub_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// a & b
    fn and_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// a | b
    fn or_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// a ^ b
    fn xor_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// a << N, 1 ≤ N ≤ 31
    fn shl<const N: i32>(self, a: Self::I) -> Self::I;
    /// a >> N filling with zeros, 1 ≤ N ≤ 31
    fn shr<const N: i32>(self, a: Self::I) -> Self::I;
    /// a >> N filling with the sign, 1 ≤ N ≤ 31
    fn sar<const N: i32>(self, a: Self::I) -> Self::I;
    /// a > b, signed.
    fn gt_i(self, a: Self::I, b: Self::I) -> Self::M;
    /// a where `m`, else b.
    fn select_i(self, m: Self::M, a: Self::I, b: Self::I) -> Self::I;
    /// Integers as floats, rounded to nearest.
    fn to_float(self, a: Self::I) -> Self::F;
    /// Lane l's truth value as bit l.
    fn mask_bits(self, m: Self::M) -> u32;

    // What follows is built from the above, once.

    /// The first `LANES` floats of a slice.
    #[inline(always)]
    fn load_slice(self, s: &[f32]) -> Self::F {
        assert!(s.len() >= Self::LANES);
        // SAFETY: the assertion above.
        unsafe { self.load(s.as_ptr()) }
    }
    /// Writes the first `LANES` floats of a slice.
    #[inline(always)]
    fn store_slice(self, s: &mut [f32], v: Self::F) {
        assert!(s.len() >= Self::LANES);
        // SAFETY: the assertion above.
        unsafe { self.store(s.as_mut_ptr(), v) }
    }
    /// The first `LANES` integers of a slice.
    #[inline(always)]
    fn load_slice_i(self, s: &[i32]) -> Self::I {
        assert!(s.len() >= Self::LANES);
        // SAFETY: the assertion above.
        unsafe { self.load_i(s.as_ptr()) }
    }
    /// Writes the first `LANES` integers of a slice.
    #[inline(always)]
    fn store_slice_i(self, s: &mut [i32], v: Self::I) {
        assert!(s.len() >= Self::LANES);
        // SAFETY: the assertion above.
        unsafe { self.store_i(s.as_mut_ptr(), v) }
    }
    /// As many floats as the slice has, at most `LANES`; the other lanes hold `fill`.
    #[inline(always)]
    fn load_partial(self, s: &[f32], fill: f32) -> Self::F {
        if s.len() >= Self::LANES {
            return self.load_slice(s);
        }
        let mut lanes = [fill; MAX_LANES];
        lanes[..s.len()].copy_from_slice(s);
        self.load_slice(&lanes)
    }
    /// Writes as many lanes as the slice has room for.
    #[inline(always)]
    fn store_partial(self, s: &mut [f32], v: Self::F) {
        if s.len() >= Self::LANES {
            return self.store_slice(s, v);
        }
        let mut lanes = [0.0; MAX_LANES];
        self.store_slice(&mut lanes, v);
        let n = s.len();
        s.copy_from_slice(&lanes[..n]);
    }
    /// −a, NaN included: flips the sign bit.
    #[inline(always)]
    fn neg(self, a: Self::F) -> Self::F {
        self.from_bits(self.xor_i(self.to_bits(a), self.splat_i(i32::MIN)))
    }
    /// |a|: clears the sign bit.
    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        self.from_bits(self.and_i(self.to_bits(a), self.splat_i(i32::MAX)))
    }
    /// Magnitude of `a`, sign of `sign`.
    #[inline(always)]
    fn copysign(self, a: Self::F, sign: Self::F) -> Self::F {
        let sign_bit = self.and_i(self.to_bits(sign), self.splat_i(i32::MIN));
        self.from_bits(self.or_i(self.to_bits(self.abs(a)), sign_bit))
    }
    /// The definition of [`Simd::dot_bf16`], for inputs that are not subnormal.
    #[inline(always)]
    fn dot_bf16_by_fma(self, c: Self::F, a: Self::I, b: Self::I) -> Self::F {
        let (odd_a, odd_b) = (self.odd_bf16(a), self.odd_bf16(b));
        let (even_a, even_b) = (self.even_bf16(a), self.even_bf16(b));
        self.fma(even_a, even_b, self.fma(odd_a, odd_b, c))
    }
    /// The bf16 in the upper half of each word.
    #[inline(always)]
    fn odd_bf16(self, words: Self::I) -> Self::F {
        self.from_bits(self.and_i(words, self.splat_i(0xffff_0000_u32 as i32)))
    }
    /// The bf16 in the lower half of each word.
    #[inline(always)]
    fn even_bf16(self, words: Self::I) -> Self::F {
        self.from_bits(self.shl::<16>(words))
    }
    /// Each float as bf16 in the lower half of a word, to nearest, ties to even; NaN stays NaN.
    #[inline(always)]
    fn to_bf16(self, v: Self::F) -> Self::I {
        let bits = self.to_bits(v);
        let upper = self.shr::<16>(bits);
        let lowest = self.and_i(upper, self.splat_i(1));
        let rounded = self.add_i(self.add_i(bits, self.splat_i(0x7fff)), lowest);
        let quiet = self.or_i(upper, self.splat_i(0x40));
        self.select_i(self.eq(v, v), self.shr::<16>(rounded), quiet)
    }
    /// The larger of two integers.
    #[inline(always)]
    fn max_i(self, a: Self::I, b: Self::I) -> Self::I {
        self.select_i(self.gt_i(a, b), a, b)
    }
    /// The smaller of two integers.
    #[inline(always)]
    fn min_i(self, a: Self::I, b: Self::I) -> Self::I {
        self.select_i(self.gt_i(a, b), b, a)
    }
    /// Whether [`Simd::scale_by_power`] gives 0 where it is told to, whatever a and n are.
    const SCALES_TO_ZERO: bool = false;

    /// a·2ⁿ, rounded once, for 0.5 ≤ |a| < 2 and −252 ≤ n ≤ 254; n comes as integers and as floats. Two exact halves, so that only the last
    /// multiplication rounds when the result is subnormal, and n = 128 needs no special case. Where `far`, the result rounds to 0.
    #[inline(always)]
    fn scale_by_power(
        self,
        a: Self::F,
        n: Self::I,
        _n_as_float: Self::F,
        _far: Self::M,
    ) -> Self::F {
        let half = self.sar::<1>(n);
        let rest = self.sub_i(n, half);
        let bias = self.splat_i(127);
        let half = self.from_bits(self.shl::<23>(self.add_i(half, bias)));
        let rest = self.from_bits(self.shl::<23>(self.add_i(rest, bias)));
        self.mul(self.mul(a, half), rest)
    }
    /// Interleaves: `[a0 b0 a1 b1 …]` up to the middle of both, and from there.
    #[inline(always)]
    fn zip(self, a: Self::F, b: Self::F) -> (Self::F, Self::F) {
        let (mut x, mut y, mut z) = ([0.0; MAX_LANES], [0.0; MAX_LANES], [0.0; 2 * MAX_LANES]);
        self.store_slice(&mut x, a);
        self.store_slice(&mut y, b);
        for l in 0..Self::LANES {
            (z[2 * l], z[2 * l + 1]) = (x[l], y[l]);
        }
        (self.load_slice(&z), self.load_slice(&z[Self::LANES..]))
    }
    /// Lane l of vector i becomes lane i of vector l, for the first `LANES` vectors.
    #[inline(always)]
    fn transpose(self, v: &mut [Self::F; MAX_LANES]) {
        let half = Self::LANES / 2;
        let mut done = 1;
        while done < Self::LANES {
            // The highest bit of the row's number becomes the lowest of the lane's, and the highest of the lane's the lowest of the row's.
            let old = *v;
            for i in 0..half {
                (v[2 * i], v[2 * i + 1]) = self.zip(old[i], old[i + half]);
            }
            done *= 2;
        }
    }
    /// The lanes where `m`, in their order, at the front; what follows them is unspecified.
    #[inline(always)]
    fn compress(self, m: Self::M, a: Self::I) -> Self::I {
        let (mut from, mut to) = ([0; MAX_LANES], [0; MAX_LANES]);
        self.store_slice_i(&mut from, a);
        let (bits, mut n) = (self.mask_bits(m), 0);
        for (l, &x) in from[..Self::LANES].iter().enumerate() {
            to[n] = x;
            n += (bits >> l & 1) as usize;
        }
        self.load_slice_i(&to)
    }
}

/// A computation that runs on any instruction set.
pub(crate) trait Op {
    /// What it returns.
    type Output;
    /// Runs it; implementations are `#[inline(always)]`.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// Runs `op` compiled for `isa`.
///
/// The caller holds `isa` from a [`crate::Cpu`], which only exists for an available one; the assertion makes a mistake here a panic instead
/// of undefined behaviour (the detection is cached by std: a load and a test).
#[inline]
pub(crate) fn dispatch<O: Op>(isa: Isa, op: O) -> O::Output {
    match isa {
        Isa::Scalar => op.run(Scalar::new()),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => {
            assert!(isa.is_available());
            // SAFETY: the assertion above.
            unsafe { avx2::call(op) }
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => {
            assert!(isa.is_available());
            // SAFETY: the assertion above.
            unsafe { avx512::call(op) }
        }
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => {
            assert!(isa.is_available());
            // SAFETY: the assertion above.
            unsafe { neon::call(op) }
        }
        #[allow(unreachable_patterns)] // which arms are left depends on the architecture
        other => unreachable!("{other} is not in this build"),
    }
}
