//! Gating: from logits to expert ids and weights.

mod config;
mod families;
mod output;
mod router;
mod validate;

pub use config::*;
pub use output::*;
pub use router::*;

/// The id of a pair that no expert serves: dropped for lack of room, or never made. Its weight is 0.
pub const DROPPED: i32 = -1;
