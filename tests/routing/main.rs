//! Routing: against the f64 oracle for every family, contracts under bad logits, bits, every error.

#[path = "../common/mod.rs"]
mod common;

mod bits;
mod contracts;
mod errors;
mod load;
mod oracle;
mod setups;
