//! What is timed. Each has its operands in device memory, mostly in several sets that take turns, and can check its own answer.

mod combine;
mod copy;
mod grouped_gemm;
mod moe;
mod permute;
mod routing;

pub use combine::Combine;
pub use copy::Copy;
pub use grouped_gemm::{Product, ProductShape};
pub use moe::{Layer, LayerShape};
pub use permute::{CopyOfRows, Sort};
pub use routing::Route;

use super::Result;
use super::gpu::Gpu;
use moe_kernels::cuda::{DeviceInfo, Launch};

/// What one call has to do at least.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct Work {
    pub flops: f64,
    /// Bytes read once and written once; see each subject for how rows count that are read several times.
    pub bytes: f64,
}

/// One thing that is timed.
pub trait Subject {
    /// Sets of operands that take turns.
    fn sets(&self) -> usize;

    /// The mean of the sets' least work.
    fn work(&self) -> Work;

    /// The launches of a call on a set; none where it is the driver's own copy.
    fn plan(&self, device: &DeviceInfo, set: usize) -> Result<Vec<Launch>>;

    /// Queues a call.
    fn queue(&self, gpu: &Gpu, device: &DeviceInfo, set: usize) -> Result<()> {
        gpu.launch(&self.plan(device, set)?)
    }

    /// Fills a set's outputs with what no answer holds.
    fn poison(&self, gpu: &Gpu, set: usize) -> Result<()>;

    /// Compares a set's outputs with the host's.
    fn check(&self, gpu: &Gpu, set: usize) -> Result<()>;
}

/// How many sets of `bytes` it takes until none is left in the L2 when its turn comes again.
fn sets_beyond_l2(gpu: &Gpu, bytes: usize) -> usize {
    let cached = 3 * gpu.info().l2_bytes as usize;
    cached.div_ceil(bytes.max(1)).clamp(1, gpu.most_sets)
}

/// An error with the place when `found` is not within `tolerance` of `expected`.
fn near(place: &str, found: f64, expected: f64, tolerance: f64) -> Result<()> {
    // Not `>`: NaN is an error, too.
    if (found - expected).abs() <= tolerance {
        return Ok(());
    }
    Err(format!("{place}: {found}, expected {expected} within {tolerance:e}").into())
}

/// An error with the place when two slices of integers differ.
fn same<T: PartialEq + core::fmt::Debug>(what: &str, found: &[T], expected: &[T]) -> Result<()> {
    if found.len() != expected.len() {
        return Err(format!(
            "{what}: {} values, expected {}",
            found.len(),
            expected.len()
        )
        .into());
    }
    match found.iter().zip(expected).position(|(f, e)| f != e) {
        None => Ok(()),
        Some(i) => Err(format!("{what}[{i}]: {:?}, expected {:?}", found[i], expected[i]).into()),
    }
}
