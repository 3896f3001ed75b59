//! Whole mixture-of-experts layers by other Rust crates beside ours, turn about in one process.
//!
//! ```sh
//! cargo run --release --locked -- --record rivals.md      # in benches/rivals: all shapes, formats, loads, on one thread and on all
//! cargo run --release --locked -- --help
//! ```
//!
//! Router logits are given; top-k, experts and combine are part of the call. Weights are prepared beforehand, the batches are seeded and take turns, the caches are
//! swept before every call, and all answers are compared before anything is timed.
//!
//! | file | holds |
//! |---|---|
//! | `options.rs` | the command line |
//! | `engine.rs` | what every engine gets and must do; ours |
//! | `weights.rs` | the experts' weights in row-major order, one copy for all rivals |
//! | `per_expert.rs` | a loop over experts with the `gemm` crate or `matrixmultiply` |
//! | `candle_block.rs` | candle's block |
//! | `compare.rs` | checks, turns, medians |
//! | `serve.rs` | ours alone, called by other processes: `benches/peers` |

mod candle_block;
mod compare;
mod engine;
mod options;
mod per_expert;
mod serve;
mod weights;

#[path = "../../support/mod.rs"]
mod support;

use clap::Parser;
use options::Options;
use std::process::ExitCode;

fn main() -> ExitCode {
    let options = Options::parse();
    let done = match (options.serve, options.in_process) {
        (true, _) => serve::run(&options),
        (false, true) => compare::run(&options),
        (false, false) => options.threads().and_then(|_| compare::spawn(&options)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::FAILURE
        }
    }
}
