//! Root-mean-square normalisation (Zhang and Sennrich 2019), where a published layer has one.

use crate::error::{Error, Result};

/// `x / √(mean(x²) + eps) · weight · mul`
///
/// The sum of squares is taken in 32 lane-strided chains of fused multiply-adds and a fixed butterfly, in f32; the operations follow in the order
/// written. So the bits depend on neither ISA nor batch.
#[derive(Clone, Debug, PartialEq)]
pub struct RmsNorm {
    weight: Vec<f32>,
    eps: f32,
    mul: f32,
}

impl RmsNorm {
    /// A norm with a factor for each column, as it is applied (a model that stores w for a factor of 1 + w passes 1 + w).
    ///
    /// # Errors
    /// [`Error::Value`] when `eps` is negative or not finite.
    pub fn new(weight: &[f32], eps: f32) -> Result<Self> {
        if !(eps.is_finite() && eps >= 0.0) {
            return Err(Error::value("eps", "a finite number of at least 0", eps));
        }
        Ok(Self {
            weight: weight.to_vec(),
            eps,
            mul: 1.0,
        })
    }

    /// The same norm with one more factor on every column (Gemma 4's router has 1/√H).
    ///
    /// # Errors
    /// [`Error::Value`] when it is not finite.
    pub fn with_multiplier(self, mul: f32) -> Result<Self> {
        if !mul.is_finite() {
            return Err(Error::value("multiplier", "a finite number", mul));
        }
        Ok(Self { mul, ..self })
    }

    /// Columns.
    pub fn width(&self) -> usize {
        self.weight.len()
    }

    /// The factors.
    pub fn weight(&self) -> &[f32] {
        &self.weight
    }

    /// The number under the root.
    pub fn eps(&self) -> f32 {
        self.eps
    }

    /// The factor on all columns.
    pub fn multiplier(&self) -> f32 {
        self.mul
    }

    /// [`Error::Shape`] unless it has `width` columns.
    pub(crate) fn check(&self, argument: &'static str, width: usize) -> Result<()> {
        if self.width() == width {
            Ok(())
        } else {
            Err(Error::shape(argument, [width], [self.width()]))
        }
    }
}
