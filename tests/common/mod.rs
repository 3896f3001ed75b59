//! What the test files share: seeded data, every ISA in turn, thread pools, comparisons.
#![allow(dead_code)] // each test file uses its own part

pub mod layers;
pub mod product;

use moe_kernels::{Cpu, Isa};
use proptest::test_runner::Config;

/// `default` proptest cases, or as many as `PROPTEST_CASES` says (emulators want fewer). Failures are not written to files.
pub fn cases(default: u32) -> Config {
    let cases = match std::env::var("PROPTEST_CASES") {
        Ok(n) => n.parse().expect("PROPTEST_CASES"),
        Err(_) => default,
    };
    Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    }
}

/// A small generator (SplitMix64): the same numbers on every machine.
pub struct Rng(pub u64);

impl Rng {
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1), a multiple of 2⁻²⁴.
    pub fn unit(&mut self) -> f32 {
        (self.next_u64() >> 40) as f32 / (1u32 << 24) as f32
    }

    /// Roughly normal (the sum of four uniforms), mean 0, variance 1: the same bits on every machine.
    pub fn normal(&mut self) -> f32 {
        let sum = self.unit() + self.unit() + self.unit() + self.unit();
        (sum - 2.0) * 1.732_050_8
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next_u64() % n as u64) as usize
    }

    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }
}

/// The ISAs to test: all that this CPU has, or the one that `MOE_KERNELS_ISA` names.
///
/// `MOE_KERNELS_REQUIRE` is a comma-separated list of ISAs that must be among them; a missing one fails the test instead of being skipped.
pub fn isas() -> Vec<Isa> {
    let isas = match std::env::var("MOE_KERNELS_ISA") {
        Ok(name) if !name.is_empty() => vec![Cpu::from_env().expect("MOE_KERNELS_ISA").isa()],
        _ => Isa::available(),
    };
    for name in std::env::var("MOE_KERNELS_REQUIRE")
        .unwrap_or_default()
        .split(',')
    {
        // Other words (a GPU backend, say) are other tests' business.
        if let Ok(isa) = name.trim().parse::<Isa>() {
            assert!(
                isas.contains(&isa),
                "{isa} is required but cannot run here: {isas:?}"
            );
        }
    }
    isas
}

/// One `Cpu` for each ISA under test; two where the CPU has native instructions for bf16, one of which widens instead.
pub fn cpus() -> Vec<Cpu> {
    isas()
        .into_iter()
        .map(|isa| Cpu::with_isa(isa).unwrap())
        .flat_map(|cpu| {
            let native = cpu.isa().has_bf16_dot().then(|| cpu.with_native_bf16());
            [Some(cpu.without_native_bf16()), native]
        })
        .flatten()
        .collect()
}

/// Runs `f` inside a pool of `threads` threads.
pub fn with_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .unwrap()
        .install(f)
}

/// Bits of a slice, with every NaN made the same (payloads are outside the contract).
pub fn bits(v: &[f32]) -> Vec<u32> {
    v.iter()
        .map(|x| if x.is_nan() { 0x7fc0_0000 } else { x.to_bits() })
        .collect()
}

/// Fails with the first place where the bits differ.
#[track_caller]
pub fn assert_same_bits(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: lengths");
    for (i, (f, e)) in bits(found).iter().zip(bits(expected)).enumerate() {
        assert_eq!(
            *f, e,
            "{what}: element {i} is {:e} ({f:08x}), expected {:e} ({e:08x})",
            found[i], expected[i]
        );
    }
}

/// FNV-1a over bits: one number that stands for a whole output, so that architectures can be compared.
pub fn hash_bits(v: &[f32]) -> u64 {
    bits(v)
        .iter()
        .flat_map(|b| b.to_le_bytes())
        .fold(0xcbf2_9ce4_8422_2325, |h, byte| {
            (h ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        })
}
