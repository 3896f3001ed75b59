//! Instruction sets: which exist, which this CPU has, which one to use.

use crate::error::{Error, Result};
use core::fmt;
use core::str::FromStr;

/// An instruction set that the CPU kernels are written for. All give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// Plain Rust, on every target; eight lanes that the compiler may or may not vectorise.
    Scalar,
    /// x86-64 AVX2 with FMA and F16C: eight lanes.
    Avx2,
    /// x86-64 AVX-512 F: sixteen lanes.
    Avx512,
    /// AArch64 Advanced SIMD: four lanes.
    Neon,
}

impl Isa {
    /// Every ISA that the crate knows, the most capable last within an architecture.
    pub const ALL: [Self; 4] = [Self::Scalar, Self::Avx2, Self::Avx512, Self::Neon];

    /// The name used on command lines and in `MOE_KERNELS_ISA`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Neon => "neon",
        }
    }

    /// Whether this CPU, in this build, can run it.
    #[inline]
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                std::arch::is_x86_feature_detected!("avx2")
                    && std::arch::is_x86_feature_detected!("fma")
                    && std::arch::is_x86_feature_detected!("f16c")
                    // Scalar instructions that came with AVX2 or before: masks of lanes are counted and walked with them.
                    && std::arch::is_x86_feature_detected!("popcnt")
                    && std::arch::is_x86_feature_detected!("bmi1")
                    && std::arch::is_x86_feature_detected!("bmi2")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available() && std::arch::is_x86_feature_detected!("avx512f")
            }
            #[cfg(target_arch = "aarch64")]
            Self::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            #[allow(unreachable_patterns)] // which arms are left depends on the architecture
            _ => false,
        }
    }

    /// Whether this CPU has bf16 instructions beside this ISA that compute two chained fused multiply-adds for a pair, the odd element first: x86's
    /// `vdpbf16ps`, or Arm's `bfmlalt` and then `bfmlalb`. They do so by their makers' manuals, and the first on Zen 4, Zen 5 and Emerald Rapids; a test at the first call
    /// makes sure of it.
    pub fn has_bf16_dot(self) -> bool {
        super::simd::bf16_dot::usable(self)
    }

    /// The ISAs that can run here, the fastest last.
    pub fn available() -> Vec<Self> {
        Self::ALL
            .into_iter()
            .filter(|isa| isa.is_available())
            .collect()
    }

    /// The fastest ISA that can run here.
    pub fn best() -> Self {
        Self::ALL
            .into_iter()
            .rfind(|isa| isa.is_available())
            .unwrap_or(Self::Scalar)
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|isa| isa.name() == name)
            .ok_or_else(|| Error::UnknownName {
                argument: "isa",
                expected: Self::ALL.map(Self::name).join(", "),
                found: name.into(),
            })
    }
}
