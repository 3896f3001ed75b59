//! Which rows go to which expert's matrix.

use crate::error::{Error, Result};
use core::ops::Range;

/// Which rows belong to which expert.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Groups<'a> {
    /// Rows `offsets[e] .. offsets[e] + counts[e]` for expert e; the rows between are padding, neither read nor written.
    Ragged {
        /// Where each expert's rows begin, `[E + 1]`, ascending.
        offsets: &'a [usize],
        /// How many there are, `[E]`.
        counts: &'a [usize],
    },
    /// All rows belong to one expert: an ordinary matrix product.
    Single {
        /// Number of rows.
        rows: usize,
        /// The matrix to use.
        expert: usize,
    },
}

impl Groups<'_> {
    pub(crate) fn experts(&self) -> usize {
        match self {
            Self::Ragged { counts, .. } => counts.len(),
            Self::Single { expert, .. } => expert + 1,
        }
    }

    pub(crate) fn rows_of(&self, expert: usize) -> Range<usize> {
        match self {
            Self::Ragged { offsets, counts } => offsets[expert]..offsets[expert] + counts[expert],
            Self::Single { rows, expert: only } if expert == *only => 0..*rows,
            Self::Single { .. } => 0..0,
        }
    }

    /// Rows of A and of the output, padding included.
    pub(crate) fn total_rows(&self) -> usize {
        match self {
            Self::Ragged { offsets, .. } => offsets.last().copied().unwrap_or(0),
            Self::Single { rows, .. } => *rows,
        }
    }

    pub(super) fn validate(&self, experts: usize) -> Result<()> {
        let (offsets, counts) = match self {
            Self::Ragged { offsets, counts } => (offsets, counts),
            Self::Single { expert, .. } if *expert < experts => return Ok(()),
            Self::Single { expert, .. } => {
                return Err(Error::value(
                    "groups",
                    format!("an expert below {experts}"),
                    expert,
                ));
            }
        };
        if counts.len() != experts || offsets.len() != experts + 1 {
            return Err(Error::shape(
                "groups",
                format!("offsets [{}], counts [{experts}]", experts + 1),
                format!("offsets [{}], counts [{}]", offsets.len(), counts.len()),
            ));
        }
        for e in 0..experts {
            let fits = offsets[e]
                .checked_add(counts[e])
                .is_some_and(|end| end <= offsets[e + 1]);
            if !fits {
                return Err(Error::value(
                    "groups",
                    "offsets[e] + counts[e] ≤ offsets[e + 1]",
                    format!(
                        "{} + {} and {} at e = {e}",
                        offsets[e],
                        counts[e],
                        offsets[e + 1]
                    ),
                ));
            }
        }
        Ok(())
    }
}
