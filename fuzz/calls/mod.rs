//! What the fuzz targets do with a fuzzer's bytes. Tests of the crate run the same on seeded bytes, so that stable Rust and every CI run see it too.
#![allow(dead_code, missing_docs)]

pub mod bytes;
pub mod capi;
pub mod memory;
pub mod permutation;
pub mod routing;
