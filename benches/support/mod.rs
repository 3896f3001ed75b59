//! What the benches, the roofline example and the crate in `benches/rivals` share: the layer of `examples/support/layer` with its router's logits given.
//!
//! | file | holds |
//! |---|---|
//! | `dense.rs` | dense products of other crates |
//! | `host.rs` | the machine in words |
//! | `shapes.rs` | the four layers that are measured, by name |
//! | `load.rs` | logits that load the experts evenly or by Zipf's law |
//! | `subject.rs` | our layer with its buffers, and one call's input |
//! | `roof.rs` | what a call must do, and the time that the machine needs for it at least |
#![allow(dead_code)] // each of them uses its own part

pub mod dense;
pub mod host;
#[path = "../../examples/support/layer/mod.rs"]
pub mod layer;
pub mod load;
pub mod roof;
pub mod shapes;
pub mod subject;

use layer::measure::{Ceilings, median};
use layer::{Result, fail};
use moe_kernels::DType;
use roof::Work;
use std::io::{IsTerminal, Write, sink, stderr};

/// Runs `work` on a pool of `threads` threads.
///
/// # Errors
/// Those of `work`; a pool that cannot be built.
pub fn on_threads<T: Send>(threads: usize, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    match rayon::ThreadPoolBuilder::new().num_threads(threads).build() {
        Ok(pool) => pool.install(work),
        Err(why) => fail(format!("{threads} threads: {why}")),
    }
}

/// An error if `bytes` more would not fit the memory that is left.
///
/// # Errors
/// With both numbers.
pub fn check_memory(what: &str, bytes: usize) -> Result<()> {
    match layer::machine::available_memory() {
        Some(available) if bytes as u64 > available / 20 * 19 => fail(format!(
            "{what} needs {:.1} GiB of memory, {:.1} GiB are available",
            bytes as f64 / f64::from(1 << 30),
            available as f64 / f64::from(1 << 30)
        )),
        _ => Ok(()),
    }
}

/// Whether the command line of a benchmark asks for this one: criterion's own rule, so that nothing is made for one that will not run.
pub fn wanted(id: &str) -> bool {
    let mut filters = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with('-') && arg.contains(char::is_alphabetic))
        .peekable();
    filters.peek().is_none() || filters.any(|filter| id.contains(&filter))
}

/// Whether `cargo test` runs a benchmark: to see that it works, not how fast.
pub fn only_testing() -> bool {
    std::env::args().any(|arg| arg == "--test")
}

/// A line below criterion's: the median of our own clock and its share of the roof at the ceilings of the same seconds.
pub fn say_share(ceilings: &Ceilings, dtype: DType, work: Work, times: Vec<f64>) {
    if times.is_empty() {
        return;
    }
    let roof = work.roof(ceilings, dtype);
    let seconds = median(times.into_iter());
    println!(
        "    median {:.3} ms, {:.1} GFLOP/s, {:.1} GB/s; roof {:.3} ms by {} at {ceilings}: {:.1}%",
        seconds * 1e3,
        work.flops / seconds / 1e9,
        work.bytes / seconds / 1e9,
        roof.seconds * 1e3,
        roof.bound.name(),
        100.0 * roof.seconds / seconds
    );
}

/// Where progress is shown: to somebody who watches, not to a file.
pub fn progress() -> Box<dyn Write> {
    match stderr().is_terminal() {
        true => Box::new(stderr()),
        false => Box::new(sink()),
    }
}
