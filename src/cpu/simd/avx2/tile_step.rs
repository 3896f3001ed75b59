//! A step of the matrix tile, register by register.
//!
//! ```text
//! sixteen registers:   12 sums   left, right: 8 columns each   x: a word of A in all lanes   odd (bf16): a mask
//! ```
//!
//! Nothing is left over, and a compiler that moves one load forward has to put a vector on the stack. It did so in the tiles of bf16 and in those of two panels: on a Zen 3 core 3 rows × 2 panels
//! ran at 37% (f32) and 42% (f16) of the peak, bf16 with 5 rows at 32%; with these steps at 76, 79 and 82%. Barriers between the loads
//! only moved the trouble: the loads stay, and multiply-adds sink past them. bf16 reads its columns twice rather than keep them, which leaves room for a sixth row.

use crate::cpu::simd::Columns;
use core::arch::asm;
use core::arch::x86_64::*;

/// The lines for each row: a word of A to all lanes, two multiply-adds.
macro_rules! rows {
    ($word:literal, $($offset:literal $left:ident $right:ident)*) => {
        concat!($(
            "vbroadcastss {x}, dword ptr [{a} + ", $offset, " + ", $word, "]\n",
            "vfmadd231ps {", stringify!($left), "}, {x}, {left}\n",
            "vfmadd231ps {", stringify!($right), "}, {x}, {right}\n",
        )*)
    };
}

/// `asm!` of these lines with the registers of a step, and `$mask` besides.
macro_rules! block {
    ([$($line:expr),*] [$($mask:tt)*] $acc:ident $a:ident $b:ident $($i:literal $left:ident $right:ident)*) => {
        asm!(
            $($line,)*
            a = in(reg) $a,
            b = in(reg) $b,
            $($left = inout(ymm_reg) $acc[$i][0], $right = inout(ymm_reg) $acc[$i][1],)*
            left = out(ymm_reg) _,
            right = out(ymm_reg) _,
            x = out(ymm_reg) _,
            $($mask)*
            options(nostack, preserves_flags, readonly),
        )
    };
}

/// A step of the rows listed: index in `acc`, bytes from `a`, names of the two sums.
macro_rules! step {
    ($columns:ident $acc:ident $a:ident $b:ident $($i:literal $offset:literal $left:ident $right:ident)*) => {
        match $columns {
            Columns::F32 => block!(
                [
                    "vmovups {left}, ymmword ptr [{b}]",
                    "vmovups {right}, ymmword ptr [{b} + 32]",
                    rows!("0", $($offset $left $right)*)
                ]
                [] $acc $a $b $($i $left $right)*
            ),
            Columns::F16 => block!(
                [
                    "vcvtph2ps {left}, xmmword ptr [{b}]",
                    "vcvtph2ps {right}, xmmword ptr [{b} + 16]",
                    rows!("0", $($offset $left $right)*)
                ]
                [] $acc $a $b $($i $left $right)*
            ),
            Columns::Bf16Pairs => block!(
                [
                    "vandps {left}, {odd}, ymmword ptr [{b}]",
                    "vandps {right}, {odd}, ymmword ptr [{b} + 32]",
                    rows!("4", $($offset $left $right)*),
                    "vmovdqu {left}, ymmword ptr [{b}]",
                    "vmovdqu {right}, ymmword ptr [{b} + 32]",
                    "vpslld {left}, {left}, 16",
                    "vpslld {right}, {right}, 16",
                    rows!("0", $($offset $left $right)*)
                ]
                [odd = in(ymm_reg) _mm256_set1_epi32(0xffff_0000_u32 as i32),]
                $acc $a $b $($i $left $right)*
            ),
        }
    };
}

/// See [`Simd::tile_step`](super::Simd::tile_step). To be inlined, so its features are those of [`call`](super::call).
///
/// # Safety
/// As there; the CPU has these features.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,popcnt,bmi1,bmi2")]
pub(super) unsafe fn tile_step<const M: usize>(
    columns: Columns,
    acc: &mut [[__m256; 2]; M],
    a: *const f32,
    b: *const u8,
) {
    macro_rules! tiles {
        ($([$m:literal: $($row:tt)*])*) => {$(
            // A constant, so that rows which this tile has not are not compiled.
            if const { M == $m } {
                // SAFETY: it reads what the caller says is there, and writes registers.
                return unsafe { step!(columns acc a b $($row)*) };
            }
        )*};
    }
    tiles!(
        [1: 0 "0" l0 r0]
        [2: 0 "0" l0 r0 1 "64" l1 r1]
        [3: 0 "0" l0 r0 1 "64" l1 r1 2 "128" l2 r2]
        [4: 0 "0" l0 r0 1 "64" l1 r1 2 "128" l2 r2 3 "192" l3 r3]
        [5: 0 "0" l0 r0 1 "64" l1 r1 2 "128" l2 r2 3 "192" l3 r3 4 "256" l4 r4]
        [6: 0 "0" l0 r0 1 "64" l1 r1 2 "128" l2 r2 3 "192" l3 r3 4 "256" l4 r4 5 "320" l5 r5]
    );
    unreachable!("a tile of {M} rows has no registers");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::Isa;
    use crate::cpu::simd::{Op, Simd, dispatch};
    use half::{bf16, f16};

    /// Finite words: as f32 and as two halves of either format the exponent is not full.
    fn words(seed: u32, n: usize) -> Vec<u32> {
        let word = |i: u32| {
            (seed ^ i)
                .wrapping_mul(0x9e37_79b9)
                .rotate_left(13)
                .wrapping_mul(0x85eb_ca6b)
        };
        (0..n as u32).map(|i| word(i) & 0xbbff_bbff).collect()
    }

    fn floats(seed: u32, n: usize) -> Vec<f32> {
        words(seed, n).into_iter().map(f32::from_bits).collect()
    }

    struct Step<'a, const M: usize> {
        columns: Columns,
        sums: &'a mut [f32],
        a: &'a [f32],
        b: &'a [u32],
    }

    impl<const M: usize> Op for Step<'_, M> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            assert!(S::TILE_STEP && self.a.len() >= 16 * M && self.b.len() >= 16);
            let mut acc = [[s.splat(0.0); 2]; M];
            for (row, sums) in acc.iter_mut().zip(self.sums.chunks_exact(16)) {
                *row = [s.load_slice(sums), s.load_slice(&sums[8..])];
            }
            // SAFETY: the assertion.
            unsafe {
                s.tile_step(
                    self.columns,
                    &mut acc,
                    self.a.as_ptr(),
                    self.b.as_ptr().cast(),
                )
            };
            for (row, sums) in acc.iter().zip(self.sums.chunks_exact_mut(16)) {
                s.store_slice(sums, row[0]);
                s.store_slice(&mut sums[8..], row[1]);
            }
        }
    }

    /// The definition in [`Simd::tile_step`].
    fn defined(columns: Columns, sum: f32, a: &[f32], b: &[u32], j: usize) -> f32 {
        let half = |j: usize| (b[j / 2] >> (16 * (j % 2))) as u16;
        match columns {
            Columns::F32 => a[0].mul_add(f32::from_bits(b[j]), sum),
            Columns::F16 => a[0].mul_add(f16::from_bits(half(j)).to_f32(), sum),
            Columns::Bf16Pairs => [1, 0].into_iter().fold(sum, |sum, odd| {
                a[odd].mul_add(bf16::from_bits(half(2 * j + odd)).to_f32(), sum)
            }),
        }
    }

    fn check<const M: usize>() {
        for columns in [Columns::F32, Columns::F16, Columns::Bf16Pairs] {
            for seed in 0..50 {
                let (a, b) = (floats(3 * seed, 16 * M), words(3 * seed + 1, 16));
                let before = floats(3 * seed + 2, 16 * M);
                let mut sums = before.clone();
                let step = Step::<M> {
                    columns,
                    sums: &mut sums,
                    a: &a,
                    b: &b,
                };
                dispatch(Isa::Avx2, step);
                for (at, (&found, &sum)) in sums.iter().zip(&before).enumerate() {
                    let expected = defined(columns, sum, &a[at / 16 * 16..], &b, at % 16);
                    assert_eq!(
                        found.to_bits(),
                        expected.to_bits(),
                        "{M} rows, {columns:?}, {at}"
                    );
                }
            }
        }
    }

    #[test]
    fn each_sum_is_a_fused_multiply_add() {
        if Isa::Avx2.is_available() {
            check::<1>();
            check::<2>();
            check::<3>();
            check::<4>();
            check::<5>();
            check::<6>();
        }
    }
}
