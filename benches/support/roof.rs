//! What a call must do at least, and how long the machine takes for it at its ceilings.

use super::layer::measure::Ceilings;
use super::layer::shapes::Architecture;
use moe_kernels::DType;

/// The least work of one call.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// Of the experts' three products.
    pub flops: f64,
    /// The weights of the experts that are touched, once. Tokens come on top and are few beside them.
    pub bytes: f64,
}

impl Work {
    /// Of `rows` (token, expert) pairs that visit `touched` experts.
    pub fn new(architecture: &Architecture, dtype: DType, rows: usize, touched: usize) -> Self {
        let elements = architecture.expert_elements() as f64;
        Self {
            flops: 2.0 * rows as f64 * elements,
            bytes: touched as f64 * elements * dtype.size() as f64,
        }
    }

    /// The time that the machine needs at its ceilings.
    pub fn roof(&self, ceilings: &Ceilings, dtype: DType) -> Roof {
        let bytes = self.bytes / ceilings.read_bandwidth;
        let flops = self.flops / ceilings.flop_peak(dtype);
        if bytes > flops {
            Roof {
                seconds: bytes,
                bound: Bound::Bytes,
            }
        } else {
            Roof {
                seconds: flops,
                bound: Bound::Flops,
            }
        }
    }
}

/// Which ceiling is the lower one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    Bytes,
    Flops,
}

impl Bound {
    pub fn name(self) -> &'static str {
        match self {
            Self::Bytes => "bytes",
            Self::Flops => "FLOPs",
        }
    }
}

/// No call can be faster.
#[derive(Clone, Copy, Debug)]
pub struct Roof {
    pub seconds: f64,
    pub bound: Bound,
}
