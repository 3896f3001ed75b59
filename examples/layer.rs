//! `cargo run --release --example layer`: one real mixture-of-experts layer, timed stage by stage and checked against the f64 reference.
//!
//! Without arguments: a Qwen3-30B-A3B-shaped layer with seeded weights in bf16, for one token and for 512. `--shape` names other published
//! layers, `--weights` reads one from a checkpoint, `--backend cuda` (with feature `cuda`) takes it to a GPU; `--help` lists the rest. The work is in `support/layer/`.

mod support {
    pub mod layer;
}

use clap::Parser;
use std::process::ExitCode;
use support::layer::{Options, run};

fn main() -> ExitCode {
    let options = Options::parse();
    if let Err(failure) = options.check() {
        eprintln!("error: {failure}");
        return ExitCode::from(2); // as for the arguments that clap refuses
    }
    let (mut out, mut progress) = (std::io::stdout(), std::io::stderr());
    match run(&options, &mut out, &mut progress) {
        Ok(report) if report.passed() => ExitCode::SUCCESS,
        Ok(_) => {
            eprintln!("error: the layer is further from the f64 reference than rounding explains");
            ExitCode::FAILURE
        }
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::FAILURE
        }
    }
}
