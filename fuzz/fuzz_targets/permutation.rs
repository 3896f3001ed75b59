//! See `calls/permutation.rs`.
#![no_main]

#[path = "../calls/mod.rs"]
mod calls;

libfuzzer_sys::fuzz_target!(|data: &[u8]| calls::permutation::run(data));
