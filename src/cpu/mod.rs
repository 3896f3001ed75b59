//! The CPU backend: one [`Cpu`] value says which instruction set runs and on how many threads.

pub(crate) mod caches;
pub(crate) mod combine;
pub(crate) mod grouped_gemm;
pub mod isa;
pub(crate) mod losses;
pub(crate) mod norm;
pub(crate) mod out_rows;
pub(crate) mod parallel;
pub(crate) mod permute;
pub mod roofline;
pub(crate) mod routing;
pub(crate) mod shared;
pub(crate) mod simd;

use crate::error::{Error, Result};
use isa::Isa;

/// A choice of instruction set and threads. Small and `Copy`; make one and keep it.
///
/// Results do not depend on the choice: every ISA and every thread count gives the same bits.
///
/// ```
/// use moe_kernels::{Cpu, Isa};
/// let cpu = Cpu::new();
/// assert!(cpu.isa().is_available());
/// let one_thread = Cpu::with_isa(Isa::Scalar)?.single_threaded();
/// assert_eq!(one_thread.threads(), 1);
/// # Ok::<(), moe_kernels::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    isa: Isa,
    single_threaded: bool,
    native_bf16: bool,
}

impl Default for Cpu {
    fn default() -> Self {
        Self::new()
    }
}

impl Cpu {
    /// The best ISA of this CPU, on the caller's current rayon pool.
    pub fn new() -> Self {
        Self::of(Isa::best())
    }

    /// `isa` is available.
    fn of(isa: Isa) -> Self {
        Self {
            isa,
            single_threaded: false,
            native_bf16: isa.has_bf16_dot() && roofline::bf16_dot_pays(isa),
        }
    }

    /// A given ISA.
    ///
    /// # Errors
    /// [`Error::UnsupportedIsa`] when this CPU or build lacks it.
    pub fn with_isa(isa: Isa) -> Result<Self> {
        if !isa.is_available() {
            return Err(Error::UnsupportedIsa {
                requested: isa,
                available: Isa::available(),
            });
        }
        Ok(Self::of(isa))
    }

    /// The ISA named by the environment variable `MOE_KERNELS_ISA`, or the best one when it is unset or empty.
    ///
    /// # Errors
    /// [`Error::UnknownName`] or [`Error::UnsupportedIsa`].
    pub fn from_env() -> Result<Self> {
        match std::env::var("MOE_KERNELS_ISA") {
            Ok(name) if !name.is_empty() => Self::with_isa(name.parse()?),
            _ => Ok(Self::new()),
        }
    }

    /// The same choice, but products of bf16 with bf16 widen both to f32 instead of using the CPU's bf16 instructions. Of the same bits: for tests
    /// and comparisons. See [`Isa::has_bf16_dot`].
    pub fn without_native_bf16(self) -> Self {
        Self {
            native_bf16: false,
            ..self
        }
    }

    /// The same choice, but products of bf16 with bf16 use the CPU's bf16 instructions wherever it has them, even where they are the slower way. Of the same
    /// bits: for tests and comparisons.
    pub fn with_native_bf16(self) -> Self {
        Self {
            native_bf16: self.isa.has_bf16_dot(),
            ..self
        }
    }

    /// Whether products of bf16 weights with bf16 rows use native bf16 instructions. By default they do where the CPU has them, they are what they should be, and
    /// they are faster than widening: `vdpbf16ps` does twice the work of an FMA on Zen 4 and Zen 5 and half of it on Emerald Rapids.
    pub fn native_bf16(&self) -> bool {
        self.native_bf16
    }

    /// The same choice, but every call runs on the calling thread alone.
    pub fn single_threaded(self) -> Self {
        Self {
            single_threaded: true,
            ..self
        }
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads that a call made here would use: those of the current rayon pool, or 1.
    pub fn threads(&self) -> usize {
        if self.single_threaded {
            1
        } else {
            parallel::pool_threads()
        }
    }
}
