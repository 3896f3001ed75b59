//! What happens between an expert's two products: scalar functions, gating, clamps.

use crate::error::{Error, Result};

/// The scalar function of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ActivationFunction {
    /// `z`
    Identity,
    /// `z · σ(z)`
    Silu,
    /// `z/2 · (1 + erf(z/√2))`
    Gelu,
    /// `z/2 · (1 + tanh(√(2/π)·(z + 0.044715·z³)))`
    GeluTanh,
    /// `max(z, 0)`
    Relu,
    /// `max(z, 0)²` (Nemotron-H)
    Relu2,
}

/// Limits around the activation. NaN passes through each of them.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Clamp {
    /// None.
    None,
    /// `act(min(g, limit)) · clamp(u, ±limit)`
    Pre {
        /// The limit.
        limit: f32,
    },
    /// `min(act(g), limit) · clamp(u, ±limit)`
    Post {
        /// The limit.
        limit: f32,
    },
    /// gpt-oss: `g ← min(g, limit)`, `u ← clamp(u, ±limit)`, `(u + 1) · g · σ(alpha·g)`, whatever the activation function.
    GptOss {
        /// The limit (7 in gpt-oss).
        limit: f32,
        /// The slope (1.702 in gpt-oss).
        alpha: f32,
    },
    /// `cap(g) · σ(g) · cap(u)` with `cap(z) = c·tanh(z/c)`, whatever the activation function: SiLU whose sigmoid sees the uncapped g (Inkling 2).
    /// A cap of 0 leaves its side alone.
    Softcap {
        /// Cap of the gate projection.
        gate: f32,
        /// Cap of the up projection.
        up: f32,
    },
}

/// What happens between an expert's two matrix products.
///
/// Gated: `h = act(g) · u` with g from the gate projection and u from the up projection. Not gated: `h = act(u)`, clamps
/// acting on u as they would on g.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Activation {
    /// The scalar function.
    pub function: ActivationFunction,
    /// Whether there are two projections.
    pub gated: bool,
    /// Limits.
    pub clamp: Clamp,
}

impl Activation {
    /// SwiGLU: `silu(g) · u` (Shazeer 2020), the activation of most families.
    pub const SWIGLU: Self = Self::gated(ActivationFunction::Silu);

    /// gpt-oss's clamped form, `(u + 1) · g · σ(1.702·g)` with a limit of 7.
    pub const GPT_OSS: Self = Self {
        function: ActivationFunction::Silu,
        gated: true,
        clamp: Clamp::GptOss {
            limit: 7.0,
            alpha: 1.702,
        },
    };

    /// A gated activation without clamps.
    pub const fn gated(function: ActivationFunction) -> Self {
        Self {
            function,
            gated: true,
            clamp: Clamp::None,
        }
    }

    /// An activation of a single projection, without clamps.
    pub const fn plain(function: ActivationFunction) -> Self {
        Self {
            function,
            gated: false,
            clamp: Clamp::None,
        }
    }

    pub(crate) fn validate(&self) -> Result<()> {
        let bad = |argument, value: f32, low: f32| {
            if value.is_finite() && value >= low {
                Ok(())
            } else {
                Err(Error::value(
                    argument,
                    format!("a finite number of at least {low}"),
                    value,
                ))
            }
        };
        match self.clamp {
            Clamp::None => Ok(()),
            Clamp::Pre { limit } | Clamp::Post { limit } => bad("clamp.limit", limit, 0.0),
            Clamp::GptOss { limit, alpha } => {
                bad("clamp.limit", limit, 0.0)?;
                bad("clamp.alpha", alpha, f32::MIN)?;
                if self.gated {
                    Ok(())
                } else {
                    Err(Error::value(
                        "clamp",
                        "a gated activation with Clamp::GptOss",
                        "a plain one",
                    ))
                }
            }
            Clamp::Softcap { gate, up } => {
                bad("clamp.gate", gate, 0.0)?;
                bad("clamp.up", up, 0.0)
            }
        }
    }
}
