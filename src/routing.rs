//! Gating: from logits to expert ids and weights.

mod config;

pub use config::*;
