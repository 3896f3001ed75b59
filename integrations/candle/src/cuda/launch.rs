//! Plans on candle's device and stream: kernels loaded as candle loads custom ones, launched through cudarc's builder. With the workspaces' and outputs' memory all that is unsafe here.
#![allow(unsafe_code)]

use crate::view::refused;
use candle_core::cuda::cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, DeviceRepr, LaunchConfig, PushKernelArg, sys,
};
use candle_core::cuda::{CudaStorageSlice, WrapErr};
use candle_core::{Context, CudaDevice, CudaStorage, Result};
use moe_kernels::DType as Format;
use moe_kernels::cuda::moe::MoePlan;
use moe_kernels::cuda::{Cuda, Launch};
use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

/// Above this much dynamic shared memory a kernel has to opt in, once.
const SHARED_WITHOUT_OPT_IN: u32 = 48 * 1024;

/// A kernel's argument: a plan's bytes, in place and alignment as good as any struct.
#[repr(C, align(16))]
struct Params([u8; Launch::MAX_PARAM_BYTES]);

// SAFETY: plain bytes, of which the driver reads as many as the kernel's parameter has.
unsafe impl DeviceRepr for Params {}

impl Params {
    fn of(launch: &Launch) -> Self {
        let mut bytes = [0; Launch::MAX_PARAM_BYTES];
        bytes[..launch.params().len()].copy_from_slice(launch.params());
        Self(bytes)
    }
}

/// A loaded kernel.
#[derive(Clone)]
struct Function {
    function: CudaFunction,
    /// Dynamic shared memory that it may have by now.
    shared: u32,
}

/// The kernels of a layer that were used so far, on one GPU.
pub(super) struct Kernels {
    cuda: Cuda,
    device: CudaDevice,
    functions: RwLock<HashMap<&'static str, Function>>,
}

impl Kernels {
    /// # Errors
    /// A GPU or a driver that is too old.
    pub fn new(device: &CudaDevice) -> Result<Self> {
        let context = device.cuda_stream().context().clone();
        Ok(Self {
            cuda: Cuda::with_context(context).map_err(refused)?,
            device: device.clone(),
            functions: RwLock::default(),
        })
    }

    pub fn cuda(&self) -> &Cuda {
        &self.cuda
    }

    /// Whether cudarc's builder can launch it.
    fn is_plain(launch: &Launch) -> bool {
        launch.cluster == [1; 3] && launch.tensor_maps().is_empty()
    }

    /// The kernel of a launch, loaded by candle the first time.
    fn function(&self, launch: &Launch) -> Result<CudaFunction> {
        let known = self
            .functions
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(launch.kernel)
            .cloned();
        if let Some(known) = &known
            && known.shared >= launch.shared_bytes
        {
            return Ok(known.function.clone());
        }
        // One at a time: of two threads that set the attribute the one with less must not come last.
        let mut functions = self
            .functions
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let (function, shared) = match functions.get(launch.kernel) {
            Some(known) => (known.function.clone(), known.shared),
            None => (self.load(launch)?, SHARED_WITHOUT_OPT_IN),
        };
        if launch.shared_bytes > shared {
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = i32::try_from(launch.shared_bytes).unwrap_or(i32::MAX);
            function
                .set_attribute(attribute, bytes)
                .w()
                .with_context(|| format!("{bytes} bytes of shared memory for {}", launch.kernel))?;
        }
        let shared = launch.shared_bytes.max(shared);
        let loaded = Function {
            function: function.clone(),
            shared,
        };
        functions.insert(launch.kernel, loaded);
        Ok(function)
    }

    fn load(&self, launch: &Launch) -> Result<CudaFunction> {
        let compute_capability = self.cuda.device_info().compute_capability;
        let text = launch.module.ptx(compute_capability).map_err(refused)?;
        let name = format!("moe_kernels_{}", launch.module);
        self.device
            .get_or_load_custom_func(launch.kernel, &name, text)
            .with_context(|| format!("loading {} of {name}", launch.kernel))
            .map(|function| function.into_cuda_function())
    }

    /// Queues a plan; nothing of it when a kernel cannot be loaded.
    ///
    /// # Safety
    /// The plan's addresses are memory of this GPU of the extents that the plan states, alive until `stream` has run what is queued; nothing else uses what it writes meanwhile.
    pub unsafe fn queue(&self, stream: &CudaStream, plan: &MoePlan) -> Result<()> {
        let launches = plan.iter().filter(|launch| !launch.is_empty());
        for launch in launches.clone() {
            match Self::is_plain(launch) {
                true => self.function(launch).map(drop)?,
                false => self.cuda.prepare(launch).map_err(refused)?,
            }
        }
        for launch in launches {
            // SAFETY: the caller's promise; the launch is a plan's.
            unsafe {
                match Self::is_plain(launch) {
                    true => self.launch(stream, launch)?,
                    false => self.cuda.launch(stream, launch).map_err(refused)?,
                }
            }
        }
        Ok(())
    }

    /// # Safety
    /// As [`queue`](Self::queue), for a launch of a plan with neither clusters nor tensor maps.
    unsafe fn launch(&self, stream: &CudaStream, launch: &Launch) -> Result<()> {
        let function = self.function(launch)?;
        let params = Params::of(launch);
        let ([gx, gy, gz], [bx, by, bz]) = (launch.grid, launch.block);
        let config = LaunchConfig {
            grid_dim: (gx, gy, gz),
            block_dim: (bx, by, bz),
            shared_mem_bytes: launch.shared_bytes,
        };
        let mut builder = stream.launch_builder(&function);
        builder.arg(&params);
        // SAFETY: the kernel takes the plan's parameter struct and nothing more; for its addresses the caller answers.
        unsafe { builder.launch(config) }
            .w()
            .with_context(|| format!("launching {}", launch.kernel))?;
        Ok(())
    }
}

/// A new storage for an output, of any content: the caller's plan writes all of it, or the call fails and the storage is dropped. An empty one has an element, since drivers refuse to allocate none.
pub(super) fn output(device: &CudaDevice, format: Format, elements: usize) -> Result<CudaStorage> {
    let elements = elements.max(1);
    // SAFETY: plain numbers, which nobody reads before a kernel of this stream has written them.
    let slice = unsafe {
        match format {
            Format::F32 => CudaStorageSlice::F32(device.alloc(elements)?),
            Format::F16 => CudaStorageSlice::F16(device.alloc(elements)?),
            Format::BF16 => CudaStorageSlice::BF16(device.alloc(elements)?),
            other => candle_core::bail!("x: candle has no format {other}"),
        }
    };
    Ok(CudaStorage {
        slice,
        device: device.clone(),
    })
}

/// Memory of any content for a workspace.
pub(super) fn scratch(stream: &Arc<CudaStream>, bytes: usize) -> Result<CudaSlice<u8>> {
    // SAFETY: bytes, which kernels write before they read them.
    unsafe { stream.alloc(bytes.max(1)) }
        .w()
        .with_context(|| format!("{bytes} bytes of workspace"))
}
