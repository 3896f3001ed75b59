//! See `calls/readers.rs`.
#![no_main]

#[path = "../../examples/support/layer/mod.rs"]
mod layer;
#[path = "../calls/readers.rs"]
mod readers;
#[path = "../../examples/support/mod.rs"]
mod support;

libfuzzer_sys::fuzz_target!(|data: &[u8]| readers::run(data));
