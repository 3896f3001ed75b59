//! Sizes that are multiplied once, and checked.

use crate::error::{Error, Result, checked_mul};

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
