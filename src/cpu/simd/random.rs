//! Random numbers by counter: a number depends on (seed, token, expert) alone, not on batch, thread or backend.

use super::Simd;
use super::math::normal_quantile;
#[cfg(test)]
use super::math::normal_quantile1;

/// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011): four random words for a
/// counter under a key.
pub(crate) fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [
            key[0].wrapping_add(0x9E37_79B9),
            key[1].wrapping_add(0xBB67_AE85),
        ];
    }
    counter
}

/// The four words for experts 4·block … 4·block + 3 of a token: counter (block, 0, token low, token high), key (seed low, seed high).
fn words(seed: u64, token: u64, block: u32) -> [u32; 4] {
    philox4x32(
        [block, 0, token as u32, (token >> 32) as u32],
        [seed as u32, (seed >> 32) as u32],
    )
}

/// (2·⌊word / 2⁹⌋ + 1) / 2²⁴: uniform on 2²³ values strictly between 0 and 1, symmetric about ½, exact in f32.
pub(crate) fn uniform(word: u32) -> f32 {
    ((word >> 9) * 2 + 1) as f32 * (1.0 / 16_777_216.0)
}

/// The uniform number of (seed, token, expert): word expert mod 4 of counter (⌊expert / 4⌋, 0, token low, token high).
#[cfg(test)]
pub(crate) fn uniform_at(seed: u64, token: u64, expert: u32) -> f32 {
    uniform(words(seed, token, expert / 4)[expert as usize % 4])
}

/// The standard normal number of (seed, token, expert): [`normal_quantile`] of [`uniform_at`]. |z| ≤ 5.42.
#[cfg(test)]
pub(crate) fn normal_at(seed: u64, token: u64, expert: u32) -> f32 {
    normal_quantile1(uniform_at(seed, token, expert))
}

/// `out[e] = normal_at(seed, token, e)`, vectorised.
#[inline(always)]
pub(crate) fn fill_normal<S: Simd>(s: S, seed: u64, token: u64, out: &mut [f32]) {
    for (block, chunk) in (0..).zip(out.chunks_mut(4)) {
        for (o, word) in chunk.iter_mut().zip(words(seed, token, block)) {
            *o = uniform(word);
        }
    }
    for chunk in out.chunks_mut(S::LANES) {
        let u = s.load_partial(chunk, 0.5);
        s.store_partial(chunk, normal_quantile(s, u));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::Isa;
    use crate::cpu::simd::{Op, dispatch};

    #[test]
    fn philox_gives_the_published_words() {
        let all = u32::MAX;
        assert_eq!(
            philox4x32([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox4x32([all; 4], [all; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn uniform_stays_inside_the_open_interval() {
        assert_eq!(uniform(0), 1.0 / 16_777_216.0);
        assert_eq!(uniform(u32::MAX), 1.0 - 1.0 / 16_777_216.0);
        assert!(normal_quantile1(uniform(0)).is_finite());
        assert_eq!(
            normal_quantile1(uniform(0)),
            -normal_quantile1(uniform(u32::MAX))
        );
    }

    struct Fill<'a>(&'a mut [f32], u64);
    impl Op for Fill<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            fill_normal(s, 42, self.1, self.0);
        }
    }

    #[test]
    fn a_row_is_its_elements_on_every_isa() {
        for isa in Isa::available() {
            for n in [0, 1, 3, 4, 5, 15, 16, 17, 33, 130] {
                for token in [0, 7, u64::MAX] {
                    let mut row = vec![f32::NAN; n];
                    dispatch(isa, Fill(&mut row, token));
                    for (e, &z) in row.iter().enumerate() {
                        assert_eq!(z.to_bits(), normal_at(42, token, e as u32).to_bits());
                    }
                }
            }
        }
    }

    #[test]
    fn moments_are_those_of_a_standard_normal() {
        let n = 100_000;
        let mut row = vec![0.0; n];
        dispatch(Isa::best(), Fill(&mut row, 3));
        let mean = |p: i32| row.iter().map(|&z| f64::from(z).powi(p)).sum::<f64>() / n as f64;
        // Standard deviations of the four estimates: √(1, 2, 15, 96)/√n; five of them.
        assert!(mean(1).abs() < 0.016);
        assert!((mean(2) - 1.0).abs() < 0.023);
        assert!(mean(3).abs() < 0.062);
        assert!((mean(4) - 3.0).abs() < 0.16);
    }
}
