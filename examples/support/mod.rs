//! What the examples and their tests share.
#![allow(dead_code)] // each of them uses its own part

pub mod backend;
pub mod case;
pub mod check;
pub mod conformance;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device;
pub mod fields;
pub mod file;
pub mod mlp;
#[cfg(feature = "cuda")]
pub mod operands;
pub mod oracle;
pub mod out;
pub mod router;
pub mod run;
pub mod tensors;
