//! The raw level: stages on a raw stream of the context that is current on the calling thread, with addresses. For frameworks with bindings of their own.
//!
//! Each function plans, loads what is not loaded yet, and queues. Nothing is queued when planning or loading fails. Texts are loaded once for each
//! context and stay loaded; the first call of a kernel loads it, which is not allowed during graph capture: make one call before capturing.
//!
//! ```no_run
//! use moe_kernels::cuda::permute::PermutePointers;
//! use moe_kernels::cuda::{DevicePtr, RawStream, raw};
//! use moe_kernels::permute::PermuteOptions;
//! # fn stream_of_my_framework() -> *mut core::ffi::c_void { core::ptr::null_mut() }
//! # fn alloc(_: usize) -> u64 { 0 }
//! let (tokens, k, experts) = (512, 8, 128);
//! let pointers = PermutePointers {
//!     ids: DevicePtr(alloc(tokens * k * 4)), counts: DevicePtr(alloc(experts * 4)), offsets: DevicePtr(alloc(experts * 4 + 4)),
//!     pair_of_row: DevicePtr(alloc(tokens * k * 4)), row_of_pair: DevicePtr(alloc(tokens * k * 4)), workspace: DevicePtr::NULL,
//! };
//! let stream = RawStream(stream_of_my_framework()); // a CUstream or cudaStream_t
//! // SAFETY: the memory is as long as the plan's documentation says, and stays alive until the stream has run.
//! unsafe { raw::permute_raw(stream, tokens * k, experts, &PermuteOptions::default(), &pointers)? };
//! # Ok::<(), moe_kernels::Error>(())
//! ```
#![allow(unsafe_code)]

use super::combine::{CombineOperands, plan_combine};
use super::grouped_gemm::{GroupedGemm, plan_grouped_gemm};
use super::launch::RawStream;
use super::module::Kernels;
use super::moe::{CudaMoeLayer, MoePointers};
use super::norm::{NormRows, plan_norm_rows};
use super::permute::{CopyRows, PermutePointers, plan_copy_rows, plan_permute};
use super::routing::{RoutePointers, plan_route};
use super::{Cuda, Launch};
use crate::element::DType;
use crate::error::Result;
use crate::permute::PermuteOptions;
use crate::routing::RouterConfig;
use cudarc::driver::CudaStream;

impl Kernels {
    /// Loads everything that the launches need, then queues them in order; a launch whose grid has a zero is passed over.
    ///
    /// # Safety
    /// The context of these kernels is current, `stream` belongs to it, and for each launch what [`Cuda::launch`] asks for.
    unsafe fn queue<'a>(
        &self,
        stream: RawStream,
        launches: impl Iterator<Item = &'a Launch> + Clone,
    ) -> Result<()> {
        let wanted = launches.filter(|l| !l.is_empty());
        wanted
            .clone()
            .try_for_each(|launch| self.function(launch).map(drop))?;
        for launch in wanted {
            // SAFETY: the caller's promise.
            unsafe { self.function(launch)?.launch(stream, launch)? };
        }
        Ok(())
    }
}

impl Cuda {
    /// Queues `launch` on `stream`. Allocates nothing and waits for nothing once the kernel has been loaded.
    ///
    /// # Safety
    /// `launch` comes from a plan of this crate, unchanged in its parameters; the addresses in it are device memory of the extents that the plan states, alive until
    /// the kernel has run, and no other work touches what it writes meanwhile.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) for a stream of another context; as [`Cuda::prepare`]; what the driver says.
    pub unsafe fn launch(&self, stream: &CudaStream, launch: &Launch) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_all(stream, core::iter::once(launch)) }
    }

    /// Queues launches in order; none of them when one cannot be loaded.
    ///
    /// # Safety
    /// As [`Cuda::launch`], for each.
    ///
    /// # Errors
    /// As [`Cuda::launch`].
    pub unsafe fn launch_all<'a>(
        &self,
        stream: &CudaStream,
        launches: impl Iterator<Item = &'a Launch> + Clone,
    ) -> Result<()> {
        self.check_context("stream", stream.context())?;
        self.bind()?;
        // SAFETY: the context was just made current, the stream belongs to it, and the rest is the caller's promise.
        unsafe {
            self.kernels()
                .queue(RawStream(stream.cu_stream().cast()), launches)
        }
    }
}

/// Queues one launch of a plan.
///
/// # Safety
/// As [`Cuda::launch`], and `stream` is a live stream of the current context.
///
/// # Errors
/// [`Error::CudaUnavailable`](crate::Error::CudaUnavailable) without a driver or current context; as [`Cuda::launch`].
pub unsafe fn launch_raw(stream: RawStream, launch: &Launch) -> Result<()> {
    let kernels = Kernels::of_current_context()?;
    // SAFETY: these are the current context's kernels; the rest is the caller's promise.
    unsafe { kernels.queue(stream, core::iter::once(launch)) }
}

/// Ids and weights from logits; see [`plan_route`].
///
/// # Safety
/// `stream` is a live stream of the current context, the pointers are device memory of the extents that [`RoutePointers`] states, alive until the stream has run what
/// is queued, and no other work touches what is written meanwhile.
///
/// # Errors
/// As [`plan_route`] and [`launch_raw`].
pub unsafe fn route_raw(
    stream: RawStream,
    config: &RouterConfig,
    tokens: usize,
    dtype: DType,
    position: u64,
    pointers: &RoutePointers,
) -> Result<()> {
    let kernels = Kernels::of_current_context()?;
    let plan = plan_route(config, tokens, dtype, position, pointers, &kernels.info)?;
    // SAFETY: the current context's kernels, a plan's launches; the rest is the caller's promise.
    unsafe { kernels.queue(stream, plan.iter()) }
}

/// Sorts pairs by expert; see [`plan_permute`].
///
/// # Safety
/// As [`route_raw`], with the extents of [`PermutePointers`].
///
/// # Errors
/// As [`plan_permute`] and [`launch_raw`].
pub unsafe fn permute_raw(
    stream: RawStream,
    pairs: usize,
    num_experts: usize,
    options: &PermuteOptions,
    pointers: &PermutePointers,
) -> Result<()> {
    let kernels = Kernels::of_current_context()?;
    let plan = plan_permute(pairs, num_experts, options, pointers, &kernels.info)?;
    // SAFETY: as in `route_raw`.
    unsafe { kernels.queue(stream, plan.iter()) }
}

/// Copies rows; see [`plan_copy_rows`].
///
/// # Safety
/// As [`route_raw`], with the extents of [`CopyRows`].
///
/// # Errors
/// As [`plan_copy_rows`] and [`launch_raw`].
pub unsafe fn copy_rows_raw(stream: RawStream, copy: &CopyRows) -> Result<()> {
    let kernels = Kernels::of_current_context()?;
    let launch = plan_copy_rows(copy, &kernels.info)?;
    // SAFETY: as in `route_raw`.
    unsafe { kernels.queue(stream, core::iter::once(&launch)) }
}

/// The grouped product; see [`plan_grouped_gemm`].
///
/// # Safety
/// As [`route_raw`], with the extents that [`GroupedGemm`] states; and every address in a [table](super::grouped_gemm::Placement::Table) is device memory of such a matrix, at
/// the multiple that the table promises.
///
/// # Errors
/// As [`plan_grouped_gemm`] and [`launch_raw`].
pub unsafe fn grouped_gemm_raw(stream: RawStream, product: &GroupedGemm) -> Result<()> {
    let kernels = Kernels::of_current_context()?;
    let launch = plan_grouped_gemm(product, &kernels.info)?;
    // SAFETY: as in `route_raw`.
    unsafe { kernels.queue(stream, core::iter::once(&launch)) }
}

/// The weighted sum; see [`plan_combine`].
///
/// # Safety
/// As [`route_raw`], with the extents of [`CombineOperands`].
///
/// # Errors
/// As [`plan_combine`] and [`launch_raw`].
pub unsafe fn combine_raw(stream: RawStream, operands: &CombineOperands) -> Result<()> {
    let kernels = Kernels::of_current_context()?;
    let launch = plan_combine(operands, &kernels.info)?;
    // SAFETY: as in `route_raw`.
    unsafe { kernels.queue(stream, core::iter::once(&launch)) }
}

/// RMS norms of rows; see [`plan_norm_rows`].
///
/// # Safety
/// As [`route_raw`], with the extents of [`NormRows`].
///
/// # Errors
/// As [`plan_norm_rows`] and [`launch_raw`].
pub unsafe fn norm_rows_raw(stream: RawStream, rows: &NormRows) -> Result<()> {
    let kernels = Kernels::of_current_context()?;
    let launch = plan_norm_rows(rows)?;
    // SAFETY: as in `route_raw`.
    unsafe { kernels.queue(stream, core::iter::once(&launch)) }
}

/// The whole layer; see [`CudaMoeLayer::plan`].
///
/// # Safety
/// As [`route_raw`], with the extents of [`MoePointers`].
///
/// # Errors
/// As [`CudaMoeLayer::plan`] and [`launch_raw`].
pub unsafe fn moe_raw(
    stream: RawStream,
    layer: &CudaMoeLayer,
    tokens: usize,
    pointers: &MoePointers,
) -> Result<()> {
    let kernels = Kernels::of_current_context()?;
    let plan = layer.plan(tokens, pointers, &kernels.info)?;
    // SAFETY: as in `route_raw`.
    unsafe { kernels.queue(stream, plan.iter()) }
}
