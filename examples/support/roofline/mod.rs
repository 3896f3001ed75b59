//! The example `roofline`.
//!
//! | file | holds |
//! |---|---|
//! | `options.rs` | the command line |
//! | `sweep.rs` | the measurement |
//! | `table.rs` | the Markdown |
//! | `chart.rs`, `svg.rs` | the picture: its panels, and the strokes |

mod chart;
mod options;
mod svg;
mod sweep;
mod table;

pub use options::Options;

use crate::support::host::Host;
use crate::support::layer::{Failure, Result};
use std::path::{Path, PathBuf};

/// Measures, draws, writes.
///
/// # Errors
/// A wrong option, an answer that is not within rounding of the reference, a file that cannot be written.
pub fn run(options: &Options) -> Result<()> {
    let cpu = options.cpu()?;
    let host = Host::look("cargo run --release --example roofline");
    let stem = match &options.out {
        Some(stem) => stem.clone(),
        None => default_stem(options, &host),
    };
    let sweep = sweep::measure(&cpu, options)?;
    let picture = stem.with_extension("svg");
    let name = picture.file_name().unwrap_or_default().to_string_lossy();
    write(&picture, &chart::draw(&sweep, &host))?;
    write(
        &stem.with_extension("md"),
        &table::markdown(&sweep, &host, &name),
    )
}

/// `benches/record/<machine>/<date>-roofline`, seen from the repository.
fn default_stem(options: &Options, host: &Host) -> PathBuf {
    let machine = options.machine.clone().unwrap_or_else(|| host.slug());
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("benches/record")
        .join(machine)
        .join(format!("{}-roofline", host.date))
}

fn write(path: &Path, text: &str) -> Result<()> {
    let failed = |why| Failure(format!("{}: cannot be written: {why}", path.display()));
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(failed)?;
    }
    std::fs::write(path, text).map_err(failed)?;
    println!("{}", path.display());
    Ok(())
}
