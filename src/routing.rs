//! Gating: from logits to expert ids and weights.

mod config;
mod families;
mod validate;

pub use config::*;

/// The id of a pair that no expert serves: dropped for lack of room, or never made. Its weight is 0.
pub const DROPPED: i32 = -1;
