//! `cargo run --release --example roofline`: time and share of the machine's roof against the number of tokens, as a picture and a table.
//!
//! Without arguments: Qwen3-30B-A3B's and OLMoE's experts in f32, bf16 and f16, T = 1 to 2048, on one thread and on all; written to `benches/record/`. The roof of a call
//! is the longer of two times: reading the weights of the experts that it touches, and its FLOPs; both at ceilings that are measured in the same run. `--help` lists
//! the options. The work is in `support/roofline/`.

#[path = "support/roofline/mod.rs"]
mod roofline;
#[path = "../benches/support/mod.rs"]
mod support;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    match roofline::run(&roofline::Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::FAILURE
        }
    }
}
