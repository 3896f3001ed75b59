//! Whether the CPU's bf16 instructions are the two chained fused multiply-adds that the order of summation asks for.
//!
//! x86's `vdpbf16ps` is specified so: the odd product first, then the even one, each step rounded to nearest even, subnormals read and written as zeros. Zen 4
//! and Zen 5 were found to do it on hundreds of millions of random operands (`hunt` below); Intel's manual writes the same.
//!
//! Arm's `bfmlalt` and `bfmlalb` are a step each, so the order is ours. The architecture has them widen both numbers and do one fused multiply-add in f32, "without
//! intermediate rounding", under all control bits of FPCR as `fmla` is. With the FPCR that a Rust program runs under (all zeros) that is the widening path to
//! the last bit, subnormals included, and no exception is made for them here. What FPCR.FZ and the rounding mode change, they change for `fmla` too. FPCR.AH
//! (FEAT_AFP), which no Rust program may set, could part the two; that was not tried, for want of an emulator that has it. FPCR.EBF is about `bfdot` and
//! `bfmmla`, which round between the products or not at all: other bits, not used.
//!
//! A CPU that does otherwise is found out at start-up and takes the widening path, whose bits are the contract.

use super::{MAX_LANES, Op, Simd, dispatch};
use crate::cpu::isa::Isa;
use core::hint::black_box;
use std::sync::OnceLock;

/// Whether `isa` has a bf16 dot product here and it passed the test; found once.
pub(crate) fn usable(isa: Isa) -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    // At the most one instruction set of a build gets as far as the test.
    detected(isa) && *FOUND.get_or_init(|| hunt(isa, 0, 4096).is_none())
}

/// Whether the CPU says that it has the instruction.
fn detected(isa: Isa) -> bool {
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512 {
        return isa.is_available() && std::arch::is_x86_feature_detected!("avx512bf16");
    }
    #[cfg(target_arch = "aarch64")]
    if isa == Isa::Neon {
        return isa.is_available() && std::arch::is_aarch64_feature_detected!("bf16");
    }
    let _ = isa;
    false
}

/// A vector of operands for which native and chained results differ.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Difference {
    pub(crate) c: f32,
    pub(crate) a: u32,
    pub(crate) b: u32,
    pub(crate) native: f32,
    pub(crate) chained: f32,
}

/// Looks for a difference on `vectors` random vectors of operands. The CPU must have the instruction.
pub(crate) fn hunt(isa: Isa, seed: u64, vectors: usize) -> Option<Difference> {
    assert!(detected(isa));
    dispatch(isa, Hunt { seed, vectors })
}

/// FLOPs of `rounds` rounds of native dot products without dependencies, which are run; `None` where `isa` has none on this CPU.
pub(crate) fn run_rounds(isa: Isa, rounds: usize) -> Option<f64> {
    detected(isa).then(|| {
        let lanes = dispatch(isa, Rounds(rounds));
        // Two multiply-adds a lane.
        (rounds * CHAINS * lanes * 4) as f64
    })
}

/// More than a latency of 6 cycles × 2 a cycle (Zen 5). Of sixteen, the compiler spills some.
const CHAINS: usize = 14;

/// Returns the number of lanes.
struct Rounds(usize);

impl Op for Rounds {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> usize {
        // SAFETY: `run_rounds` has asked the CPU.
        unsafe { s.outline_bf16_dot(RoundsBelow(self.0)) }
        S::LANES
    }
}

/// The same, compiled with the instruction.
struct RoundsBelow(usize);

impl Op for RoundsBelow {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // The products of a pair cancel, so that sums stay what they are for ever.
        let plus_minus_one = s.splat_i(black_box(0xbf80_3f80_u32 as i32));
        let ones = s.splat_i(black_box(0x3f80_3f80));
        let mut chains = [s.splat(black_box(1.0)); CHAINS];
        for _ in 0..self.0 {
            for chain in &mut chains {
                // SAFETY: this runs below `outline_bf16_dot`.
                *chain = unsafe { s.dot_bf16(*chain, plus_minus_one, ones) };
            }
        }
        let mut lanes = [0.0; MAX_LANES];
        for chain in chains {
            s.store_slice(&mut lanes, chain);
            black_box(lanes);
        }
    }
}

struct Hunt {
    seed: u64,
    vectors: usize,
}

impl Op for Hunt {
    type Output = Option<Difference>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        // SAFETY: `hunt` has asked the CPU.
        unsafe { s.outline_bf16_dot(HuntBelow(self)) }
    }
}

/// The same, compiled with the instruction.
struct HuntBelow(Hunt);

impl Op for HuntBelow {
    type Output = Option<Difference>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let mut state = self.0.seed ^ 0x9e37_79b9_7f4a_7c15;
        let mut lanes = [[0i32; MAX_LANES]; 3];
        for vector in 0..self.0.vectors {
            for l in 0..S::LANES {
                let operands = operands(&mut state, vector);
                for (row, word) in lanes.iter_mut().zip(operands) {
                    row[l] = word as i32;
                }
            }
            let [a, b, c] = [0, 1, 2].map(|i| s.load_slice_i(&lanes[i]));
            let c = s.from_bits(c);
            // SAFETY: this runs below `outline_bf16_dot`.
            let native = unsafe { s.dot_bf16(c, a, b) };
            if let Some(found) = compare(s, &lanes, native, s.dot_bf16_by_fma(c, a, b)) {
                return Some(found);
            }
            if const { S::BY_ELEMENT } {
                macro_rules! by_element {
                    ($($word:literal)*) => {$({
                        // SAFETY: as above.
                        let native = unsafe {
                            let odd = s.fma_bf16_element::<{ 2 * $word + 1 }>(c, a, b);
                            s.fma_bf16_element::<{ 2 * $word }>(odd, a, b)
                        };
                        let word = lanes[0][$word];
                        let chained = s.dot_bf16_by_fma(c, s.splat_i(word), b);
                        let lanes = [[word; MAX_LANES], lanes[1], lanes[2]];
                        if let Some(found) = compare(s, &lanes, native, chained) {
                            return Some(found);
                        }
                    })*};
                }
                by_element!(0 1 2 3);
            }
        }
        None
    }
}

/// The first lane in which two results differ, for the words `[a, b, c]` that they came from.
#[inline(always)]
fn compare<S: Simd>(
    s: S,
    lanes: &[[i32; MAX_LANES]; 3],
    native: S::F,
    chained: S::F,
) -> Option<Difference> {
    let mut results = [[0.0f32; MAX_LANES]; 2];
    s.store_slice(&mut results[0], native);
    s.store_slice(&mut results[1], chained);
    for l in 0..S::LANES {
        let (native, chained) = (results[0][l], results[1][l]);
        let same = native.to_bits() == chained.to_bits() || (native.is_nan() && chained.is_nan());
        let [a, b, c] = [0, 1, 2].map(|i| lanes[i][l] as u32);
        let c = f32::from_bits(c);
        let excepted = S::BF16_DOT_FLUSHES && touches_subnormals(c, a, b, chained);
        if !(same || excepted) {
            return Some(Difference {
                c,
                a,
                b,
                native,
                chained,
            });
        }
    }
    None
}

/// Words for a, b and c. Exponents that lie close together make the two roundings matter; every eighth vector has any bits at all, every eighth operands, products and
/// sums around the smallest normal number, every eighth of them any mixture of zeros, infinities and NaN.
fn operands(state: &mut u64, vector: usize) -> [u32; 3] {
    let mut next = || {
        // SplitMix64 (Steele, Lea, Flood 2014).
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let words = [next() as u32, next() as u32, next() as u32];
    match vector % 8 {
        5 => return words.map(special),
        6 => return tiny(words),
        7 => return words,
        _ => {}
    }
    // Exponents 2⁻⁷ … 2⁸ of the products' factors, 2⁻¹⁵ … 2¹⁶ of the sum.
    let half = |h: u32| h & 0x807f | (120 + (h >> 7 & 15)) << 7;
    let pair = |w: u32| half(w & 0xffff) | half(w >> 16) << 16;
    let sum = words[2] & 0x807f_ffff | (112 + (words[2] >> 23 & 31)) << 23;
    [pair(words[0]), pair(words[1]), sum]
}

/// Both halves of a word replaced by zeros, infinities, NaN or left alone, as their lower bits say. As an f32 it is one of those, too.
fn special(word: u32) -> u32 {
    let half = |h: u32| match h & 7 {
        0 => h & 0x8000,
        1 => h & 0x8000 | 0x7f80,
        2 => h & 0x8000 | 0x7fc0 | h & 0x3f,
        _ => h,
    };
    half(word & 0xffff) | half(word >> 16) << 16
}

/// Operands whose products and sums lie around the smallest normal number, 2⁻¹²⁶: halves of a that are subnormal or below 2⁻¹¹⁹, of b from 2⁻⁸ to 2⁸, c below 2⁻¹¹⁹.
fn tiny([a, b, c]: [u32; 3]) -> [u32; 3] {
    let small = |h: u32| match h & 3 {
        0 => h & 0x807f,
        _ => h & 0x807f | (h >> 7 & 7) << 7,
    };
    let usual = |h: u32| h & 0x807f | (119 + (h >> 7 & 15)) << 7;
    let pair = |w: u32, half: &dyn Fn(u32) -> u32| half(w & 0xffff) | half(w >> 16) << 16;
    [
        pair(a, &small),
        pair(b, &usual),
        c & 0x807f_ffff | (c >> 23 & 7) << 23,
    ]
}

/// The exception of the contract: an operand or a partial sum is subnormal (or so small that the flush of the first step shows).
fn touches_subnormals(c: f32, a: u32, b: u32, chained: f32) -> bool {
    let tiny = |v: f32| v != 0.0 && v.abs() < f32::MIN_POSITIVE * 2.0;
    let halves = |w: u32| [f32::from_bits(w & 0xffff_0000), f32::from_bits(w << 16)];
    let ([odd_a, even_a], [odd_b, even_b]) = (halves(a), halves(b));
    let first = odd_a.mul_add(odd_b, c);
    [odd_a, even_a, odd_b, even_b, c, first, chained]
        .into_iter()
        .any(tiny)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fails on a CPU whose instruction is not what we say it is; says so where there is none.
    #[test]
    fn no_operands_tell_the_native_dot_from_two_chained_fmas() {
        // `MOE_KERNELS_HUNT` gives more; the default is some four million sums with sixteen lanes, five times as many vectors of four by element.
        let vectors = match std::env::var("MOE_KERNELS_HUNT") {
            Ok(n) => n.parse().expect("MOE_KERNELS_HUNT is a number of vectors"),
            Err(_) => 1 << 18,
        };
        for isa in Isa::ALL {
            if !detected(isa) {
                println!("not run: {isa} has no bf16 instructions here");
                assert!(!isa.has_bf16_dot() && run_rounds(isa, 1).is_none());
                continue;
            }
            assert_eq!(hunt(isa, 1, vectors), None);
            assert!(isa.has_bf16_dot());
        }
    }

    /// The hunt can find something: with the halves of one operand swapped, the order of the two steps differs.
    #[test]
    fn the_order_of_the_two_steps_shows_on_these_operands() {
        let mut state = 5;
        let differ = (0..1000).filter(|_| {
            let [a, b, c] = operands(&mut state, 0).map(|w| w);
            let c = f32::from_bits(c);
            let halves = |w: u32| [f32::from_bits(w & 0xffff_0000), f32::from_bits(w << 16)];
            let ([odd_a, even_a], [odd_b, even_b]) = (halves(a), halves(b));
            even_a.mul_add(even_b, odd_a.mul_add(odd_b, c))
                != odd_a.mul_add(odd_b, even_a.mul_add(even_b, c))
        });
        assert!(differ.count() > 50);
    }

    /// The hunt would find instructions that flush subnormals (read, or written after each step), or that fuse all three terms. (Products of two bf16 are exact
    /// in f32: rounding them first would show only where they are subnormal.)
    #[test]
    fn the_hunt_would_show_other_arithmetic() {
        let flush = |v: f32| {
            if v.is_subnormal() {
                0.0f32.copysign(v)
            } else {
                v
            }
        };
        let same = |v: f32, w: f32| v.to_bits() == w.to_bits() || (v.is_nan() && w.is_nan());
        let (mut state, mut differ) = (7, [0; 3]);
        for vector in 0..4096 {
            let [a, b, c] = operands(&mut state, vector);
            let c = f32::from_bits(c);
            let halves = |w: u32| [f32::from_bits(w & 0xffff_0000), f32::from_bits(w << 16)];
            let ([oa, ea], [ob, eb]) = (halves(a), halves(b));
            let right = ea.mul_add(eb, oa.mul_add(ob, c));
            let wrong = [
                flush(ea).mul_add(flush(eb), flush(oa).mul_add(flush(ob), c)),
                flush(ea.mul_add(eb, flush(oa.mul_add(ob, c)))),
                (f64::from(ea) * f64::from(eb) + (f64::from(oa) * f64::from(ob) + f64::from(c)))
                    as f32,
            ];
            for (differ, wrong) in differ.iter_mut().zip(wrong) {
                *differ += u32::from(!same(right, wrong));
            }
        }
        assert!(differ.iter().all(|&n| n >= 20), "{differ:?}");
    }
}
