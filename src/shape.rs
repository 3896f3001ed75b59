//! The sizes of a layer, multiplied once and checked.

use crate::error::{Error, Result, checked_mul};

/// The fixed sizes of a mixture-of-experts layer.
///
/// Products with a token count go through [`MoeShape::pairs`] and friends, which refuse what does not fit instead of
/// wrapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MoeShape {
    hidden: usize,
    intermediate: usize,
    experts: usize,
    top_k: usize,
}

impl MoeShape {
    /// Sizes H, I, E and K.
    ///
    /// # Errors
    /// [`Error::Value`] when one is zero or `top_k` exceeds `experts`; [`Error::Overflow`] when `E·2·I·H` does not fit.
    pub fn new(hidden: usize, intermediate: usize, experts: usize, top_k: usize) -> Result<Self> {
        for (argument, size) in [
            ("hidden", hidden),
            ("intermediate", intermediate),
            ("experts", experts),
            ("top_k", top_k),
        ] {
            if size == 0 {
                return Err(Error::value(argument, "at least 1", size));
            }
        }
        if top_k > experts {
            return Err(Error::value(
                "top_k",
                format!("at most E = {experts}"),
                top_k,
            ));
        }
        let per_expert = checked_mul(checked_mul(hidden, intermediate, "2·I·H")?, 2, "2·I·H")?;
        checked_mul(per_expert, experts, "E·2·I·H")?;
        Ok(Self {
            hidden,
            intermediate,
            experts,
            top_k,
        })
    }

    /// H: the width of a token.
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// I: the width inside an expert.
    pub fn intermediate(&self) -> usize {
        self.intermediate
    }

    /// E: how many experts there are.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// K: how many experts a token visits.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// T·K, the number of (token, expert) pairs; at most `u32::MAX`, since pairs are stored as `u32`.
    ///
    /// # Errors
    /// [`Error::Overflow`].
    pub fn pairs(&self, tokens: usize) -> Result<usize> {
        pairs(tokens, self.top_k)
    }
}

/// T·slots as a pair count that fits `u32`.
pub(crate) fn pairs(tokens: usize, slots: usize) -> Result<usize> {
    let n = checked_mul(tokens, slots, "T·K")?;
    // u32::MAX itself marks padding and dropped pairs.
    if n >= u32::MAX as usize {
        return Err(Error::Overflow {
            what: "T·K as u32"
        });
    }
    Ok(n)
}
