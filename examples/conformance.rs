//! `cargo run --release --example conformance -- --cases DIR --out OUT`: real layers through the public API.
//!
//! The work is in `support/conformance.rs`, where its options are described.

mod support;

use clap::Parser;
use std::io;
use std::process::ExitCode;
use support::conformance::{Args, conformance};

fn main() -> ExitCode {
    // Not locked: a worker thread that panics prints too.
    let (mut lines, mut notes) = (io::stdout(), io::stderr());
    match conformance(&Args::parse(), &mut lines, &mut notes) {
        Ok(counts) => ExitCode::from(counts.status()),
        Err(stop) => {
            eprintln!("error: {}", stop.why);
            ExitCode::from(stop.status)
        }
    }
}
