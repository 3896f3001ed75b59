//! The NVIDIA GPU backend: kernels that ship as PTX inside the crate. A driver is all that it needs to run; nothing but Rust to build.
//!
//! **The kernels have not run on a GPU yet.** They are tested on an emulator that executes their source; `docs/gpu.md` says more.
//!
//! Three ways in, from the barest:
//!
//! * plain data: [`ptx`] texts and pure `plan_*` functions that give [`Launch`]es ([`plan`], [`routing`], [`permute`], [`grouped_gemm`], [`norm`], [`combine`],
//!   [`moe::CudaMoeLayer::plan`]); no type of cudarc;
//! * [`raw`]: unsafe functions on a stream and addresses, in the context that is current;
//! * [`Cuda`] with [views](memory) of cudarc's slices: [stages], the [grouped product](grouped_gemm) and the whole layer ([`moe`]).
//!
//! No call allocates, waits for the device or copies anything back.

pub mod combine;
pub mod grouped_gemm;
mod launch;
pub mod memory;
mod module;
pub mod moe;
pub mod norm;
pub mod permute;
pub mod plan;
mod ptx;
pub mod raw;
pub mod routing;
pub mod stages;
pub mod table;
mod workspace;

pub use launch::RawStream;
pub use memory::{DeviceMat, DeviceMatMut, DeviceVec, DeviceVecMut};
pub use plan::{ComputeCapability, DeviceInfo, DevicePtr, Launch, Module, Swizzle, TensorMap};
pub use ptx::ptx;
pub use raw::launch_raw;
pub use stages::{CombineViews, JoinViews, PermuteViews, RouteViews, RoutedViews};
pub use table::{DeviceTable, TensorTable, WeightViews};

use crate::error::{Error, Result};
use cudarc::driver::CudaContext;
use module::Kernels;
use std::sync::Arc;

/// A GPU: its context, what it can do, and the kernels loaded so far. Cheap to clone; make one per device and keep it.
///
/// ```no_run
/// use moe_kernels::cuda::Cuda;
/// let cuda = Cuda::new(0)?; // an error that says what to do where there is no driver, no GPU or an old one
/// println!("{}: compute capability {:?}", cuda.name()?, cuda.device_info().compute_capability);
/// # Ok::<(), moe_kernels::Error>(())
/// ```
#[derive(Clone)]
pub struct Cuda {
    context: Arc<CudaContext>,
    kernels: Arc<Kernels>,
}

impl core::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Cuda")
            .field("ordinal", &self.context.ordinal())
            .field("info", &self.kernels.info)
            .finish()
    }
}

impl Cuda {
    /// The device of an ordinal, in its primary context, which is the one that frameworks use.
    ///
    /// # Errors
    /// [`Error::CudaUnavailable`] without a driver or a device, [`Error::CudaDriverTooOld`], [`Error::CudaUnsupportedGpu`] below compute capability 8.0, and
    /// [`Error::Value`] when there are fewer devices.
    pub fn new(ordinal: usize) -> Result<Self> {
        let device = launch::device(ordinal)?;
        module::check_device(launch::device_info(device)?.compute_capability)?;
        let context = CudaContext::new(ordinal)
            .map_err(|e| launch::driver_error("cuDevicePrimaryCtxRetain", e))?;
        Self::with_context(context)
    }

    /// A context that the caller has already, candle's for example.
    ///
    /// # Errors
    /// [`Error::CudaDriverTooOld`], [`Error::CudaUnsupportedGpu`], or what the driver says.
    pub fn with_context(context: Arc<CudaContext>) -> Result<Self> {
        bind(&context)?;
        let kernels = Kernels::of_current_context()?;
        Ok(Self { context, kernels })
    }

    /// The context.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// What plans have to know of the device.
    pub fn device_info(&self) -> &DeviceInfo {
        &self.kernels.info
    }

    /// The device's name.
    ///
    /// # Errors
    /// What the driver says.
    pub fn name(&self) -> Result<String> {
        self.context
            .name()
            .map_err(|e| launch::driver_error("cuDeviceGetName", e))
    }

    /// The CUDA version that the driver supports, major and minor.
    ///
    /// # Errors
    /// None once a `Cuda` exists.
    pub fn driver_version(&self) -> Result<(u32, u32)> {
        launch::driver().map(|d| (d.version / 1000, d.version % 1000 / 10))
    }

    /// Loads the text of `module` now instead of at its first launch, which takes the driver's compiler some time and is not allowed during graph capture.
    ///
    /// # Errors
    /// [`Error::CudaDriverTooOld`] or [`Error::CudaUnsupportedGpu`] when the text cannot run here.
    pub fn preload(&self, module: Module) -> Result<()> {
        self.bind()?;
        self.kernels.module(module).map(drop)
    }

    /// Loads what `launch` needs, its kernel and its share of shared memory, without launching: a launch then is one call of the driver.
    ///
    /// # Errors
    /// As [`Self::preload`]; [`Error::Value`] when the device has less shared memory.
    pub fn prepare(&self, launch: &Launch) -> Result<()> {
        self.bind()?;
        self.kernels.function(launch).map(drop)
    }

    fn bind(&self) -> Result<()> {
        bind(&self.context)
    }

    fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    /// Refuses what belongs to another context.
    pub(crate) fn check_context(
        &self,
        argument: &'static str,
        context: &Arc<CudaContext>,
    ) -> Result<()> {
        if Arc::ptr_eq(context, &self.context) || context == &self.context {
            return Ok(());
        }
        let ordinal = |c: &CudaContext| format!("a context of GPU {}", c.ordinal());
        Err(Error::value(
            argument,
            ordinal(&self.context),
            format_args!("another: {}", ordinal(context)),
        ))
    }
}

fn bind(context: &CudaContext) -> Result<()> {
    context
        .bind_to_thread()
        .map_err(|e| launch::driver_error("cuCtxSetCurrent", e))
}

/// What plans have to know of the current context's device.
///
/// # Errors
/// [`Error::CudaUnavailable`] without a driver or current context.
pub fn current_device_info() -> Result<DeviceInfo> {
    Kernels::of_current_context().map(|k| k.info)
}
