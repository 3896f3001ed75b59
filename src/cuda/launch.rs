//! Every call into the driver, and with them all `unsafe` that this backend needs below its entry points.
//!
//! The driver is looked for once, with `libloading`, before cudarc may touch it: cudarc panics where libcuda is missing. Calls that old drivers lack
//! (clusters, tensor maps) are made only after the text that needs them has been loaded, which an old driver refuses.
#![allow(unsafe_code)]

use super::plan::{DeviceInfo, DevicePtr, Launch, Swizzle, TensorMap};
use crate::element::DType;
use crate::error::{Error, Result};
use core::ffi::{CStr, c_int, c_void};
use cudarc::driver::{DriverError, result, sys};
use std::mem::MaybeUninit;
use std::sync::OnceLock;

/// A stream as the driver knows it: a `CUstream`, or a `cudaStream_t`, which is the same. Null is the legacy default stream, 2 the per-thread one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct RawStream(pub *mut c_void);

impl RawStream {
    /// The legacy default stream, which waits for and is waited for by every other blocking stream. It cannot be captured.
    pub const LEGACY: Self = Self(core::ptr::null_mut());
}

/// The oldest driver that is asked to do anything: the oldest that cudarc knows.
const OLDEST_DRIVER: u32 = 11_040;

/// What the probe found.
pub(super) struct Driver {
    /// The CUDA version it supports: 12040 for 12.4.
    pub(super) version: u32,
    /// `cuCtxGetId`, where the driver has it (12.0).
    context_id: Option<ContextId>,
}

type ContextId = unsafe extern "C" fn(sys::CUcontext, *mut u64) -> c_int;

/// Names under which the driver's library goes, as cudarc tries them.
const LIBRARIES: [&str; 4] = ["libcuda.so.1", "libcuda.so", "nvcuda.dll", "cuda.dll"];

/// The driver, probed and initialised on the first call.
pub(super) fn driver() -> Result<&'static Driver> {
    static DRIVER: OnceLock<Result<Driver>> = OnceLock::new();
    DRIVER.get_or_init(probe).as_ref().map_err(Error::clone)
}

fn probe() -> Result<Driver> {
    // SAFETY: loading the NVIDIA driver runs its initialisers, which is what every CUDA program does at its start.
    let library = LIBRARIES
        .iter()
        .find_map(|name| unsafe { libloading::Library::new(*name) }.ok());
    let Some(library) = library else {
        return Err(Error::CudaUnavailable {
            reason: "no NVIDIA driver: libcuda.so.1 was not found; install the driver (no CUDA toolkit is needed), in a container pass the GPU \
                     through, or use the CPU"
                .into(),
        });
    };
    result::init().map_err(|e| match e.0 {
        sys::CUresult::CUDA_ERROR_NO_DEVICE => no_device(),
        _ => Error::CudaUnavailable {
            reason: format!(
                "the driver does not start: {}; see whether nvidia-smi works",
                describe(e)
            ),
        },
    })?;
    let mut version: c_int = 0;
    // SAFETY: the driver is initialised and the pointer is to a live c_int.
    check("cuDriverGetVersion", unsafe {
        sys::cuDriverGetVersion(&mut version)
    })?;
    let version = version.try_into().unwrap_or(0);
    if version < OLDEST_DRIVER {
        return Err(Error::CudaDriverTooOld {
            what: "this crate",
            needed: version_name(OLDEST_DRIVER),
            found: version_name(version),
        });
    }
    // SAFETY: the type is that of the driver's documentation; the function stays, since the library is never unloaded.
    let context_id = unsafe { library.get::<ContextId>(b"cuCtxGetId\0") }
        .ok()
        .map(|f| *f);
    core::mem::forget(library); // cudarc keeps its own handle for the rest of the process, too
    Ok(Driver {
        version,
        context_id,
    })
}

fn no_device() -> Error {
    Error::CudaUnavailable {
        reason: "the driver sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES, or use the CPU"
            .into(),
    }
}

/// `12.4` for 12040.
pub(super) fn version_name(version: u32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// The driver's name and description of an error.
fn describe(error: DriverError) -> String {
    let text = |s: Result<&CStr, DriverError>| {
        s.map(|s| s.to_string_lossy().into_owned())
            .unwrap_or_default()
    };
    format!(
        "{}: {}",
        text(error.error_name()),
        text(error.error_string())
    )
}

/// `error` as this crate's.
pub(super) fn driver_error(call: &'static str, error: DriverError) -> Error {
    Error::CudaDriver {
        call,
        code: error.0 as u32,
        message: describe(error),
    }
}

fn check(call: &'static str, code: sys::CUresult) -> Result<()> {
    code.result().map_err(|e| driver_error(call, e))
}

/// How many devices there are: at least one.
pub(super) fn device_count() -> Result<c_int> {
    driver()?;
    let count = result::device::get_count().map_err(|e| driver_error("cuDeviceGetCount", e))?;
    if count <= 0 {
        return Err(no_device());
    }
    Ok(count)
}

/// The device of an ordinal, if there is one.
pub(super) fn device(ordinal: usize) -> Result<sys::CUdevice> {
    let count = device_count()?;
    let found = c_int::try_from(ordinal).ok().filter(|&i| i < count);
    let Some(index) = found else {
        return Err(Error::value(
            "ordinal",
            format_args!("a GPU from 0 to {}", count - 1),
            ordinal,
        ));
    };
    result::device::get(index).map_err(|e| driver_error("cuDeviceGet", e))
}

/// What plans have to know of a device.
pub(super) fn device_info(device: sys::CUdevice) -> Result<DeviceInfo> {
    use sys::CUdevice_attribute as A;
    let get = |attribute| {
        // SAFETY: `device` came from the driver.
        let value = unsafe { result::device::get_attribute(device, attribute) };
        value
            .map(|v| v.max(0) as u32)
            .map_err(|e| driver_error("cuDeviceGetAttribute", e))
    };
    Ok(DeviceInfo {
        compute_capability: (
            get(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            get(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        sm_count: get(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_per_block: get(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        l2_bytes: u64::from(get(A::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?),
    })
}

/// A context's address and number: no other context, before or after, has the same, on drivers that number them.
pub(super) type ContextKey = (usize, u64);

/// The calling thread's current context and its device.
pub(super) struct Current {
    pub(super) key: ContextKey,
    pub(super) device: sys::CUdevice,
}

pub(super) fn current() -> Result<Current> {
    let driver = driver()?;
    let context = result::ctx::get_current().map_err(|e| driver_error("cuCtxGetCurrent", e))?;
    let Some(context) = context else {
        return Err(Error::CudaUnavailable {
            reason: "no context is current on this thread; make one current first (cuCtxSetCurrent, or any call of the framework)".into(),
        });
    };
    let mut id = 0;
    if let Some(get) = driver.context_id {
        // SAFETY: the context is current, so it is alive; the pointer is to a live u64. A failure leaves 0, and the address alone tells contexts apart.
        unsafe { get(context, &mut id) };
    }
    let mut device = 0;
    // SAFETY: a context is current and the pointer is to a live CUdevice.
    check("cuCtxGetDevice", unsafe {
        sys::cuCtxGetDevice(&mut device)
    })?;
    Ok(Current {
        key: (context as usize, id),
        device,
    })
}

/// A loaded text. Never unloaded: it goes with its context.
#[derive(Clone, Copy)]
pub(super) struct LoadedModule(sys::CUmodule);

/// A kernel of a loaded text.
#[derive(Clone, Copy)]
pub(super) struct LoadedFunction(sys::CUfunction);

// SAFETY: handles of the driver, which may be used from any thread to which their context is bound.
unsafe impl Send for LoadedModule {}
// SAFETY: as above; the driver synchronises.
unsafe impl Sync for LoadedModule {}
// SAFETY: as above.
unsafe impl Send for LoadedFunction {}
// SAFETY: as above.
unsafe impl Sync for LoadedFunction {}

impl LoadedModule {
    /// Loads PTX into the current context.
    pub(super) fn load(text: &CStr) -> Result<Self, DriverError> {
        // SAFETY: the text ends with a NUL and the driver copies what it needs.
        unsafe { result::module::load_data(text.as_ptr().cast()) }.map(Self)
    }

    pub(super) fn function(self, name: &str) -> Result<LoadedFunction> {
        let c_name = std::ffi::CString::new(name)
            .map_err(|_| Error::value("kernel", "a name without NUL", name))?;
        // SAFETY: the module is loaded and stays so.
        unsafe { result::module::get_function(self.0, c_name) }
            .map(LoadedFunction)
            .map_err(|e| Error::CudaDriver {
                call: "cuModuleGetFunction",
                code: e.0 as u32,
                message: format!("{} for kernel {name}", describe(e)),
            })
    }
}

impl LoadedFunction {
    /// Lets a block have so much dynamic shared memory.
    pub(super) fn allow_shared(self, bytes: u32) -> Result<()> {
        use sys::CUfunction_attribute as A;
        let bytes = c_int::try_from(bytes).unwrap_or(c_int::MAX);
        // SAFETY: the function's module is loaded and stays so.
        unsafe {
            result::function::set_function_attribute(
                self.0,
                A::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                bytes,
            )
        }
        .map_err(|e| driver_error("cuFuncSetAttribute(MAX_DYNAMIC_SHARED_SIZE_BYTES)", e))
    }

    /// Queues the launch.
    ///
    /// # Safety
    /// The function's context is current, `stream` belongs to it, and the launch's parameters fit the kernel and point to device memory of the extents that the
    /// kernel reads and writes, which stays alive and free of races until the kernel has run.
    pub(super) unsafe fn launch(self, stream: RawStream, launch: &Launch) -> Result<()> {
        let mut maps = [const { MaybeUninit::<sys::CUtensorMap>::uninit() }; Launch::MAX_MAPS];
        let mut arguments = [core::ptr::null_mut::<c_void>(); 1 + Launch::MAX_MAPS];
        // The driver reads arguments and writes none; its signature merely has no const.
        arguments[0] = launch.params().as_ptr().cast_mut().cast();
        for ((map, slot), argument) in launch
            .tensor_maps()
            .iter()
            .zip(&mut maps)
            .zip(&mut arguments[1..])
        {
            encode(map, slot)?;
            *argument = slot.as_mut_ptr().cast();
        }
        let [x, y, z] = launch.cluster;
        let mut cluster = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue {
                clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x, y, z },
            },
        };
        let stream = stream.0.cast();
        let [grid_x, grid_y, grid_z] = launch.grid;
        let [block_x, block_y, block_z] = launch.block;
        let code = if launch.cluster == [1; 3] {
            // The older call, which every driver has.
            let (grid, block) = ((grid_x, grid_y, grid_z), (block_x, block_y, block_z));
            // SAFETY: the caller's promise; `arguments` and what it points to live until the call returns, by when the driver has copied them.
            return unsafe {
                result::launch_kernel(
                    self.0,
                    grid,
                    block,
                    launch.shared_bytes,
                    stream,
                    &mut arguments,
                )
            }
            .map_err(|e| launch_error(launch, e));
        } else {
            let config = sys::CUlaunchConfig {
                gridDimX: grid_x,
                gridDimY: grid_y,
                gridDimZ: grid_z,
                blockDimX: block_x,
                blockDimY: block_y,
                blockDimZ: block_z,
                sharedMemBytes: launch.shared_bytes,
                hStream: stream,
                attrs: &mut cluster,
                numAttrs: 1,
            };
            // SAFETY: as above; `config` and `cluster` live as long.
            unsafe {
                sys::cuLaunchKernelEx(
                    &config,
                    self.0,
                    arguments.as_mut_ptr(),
                    core::ptr::null_mut(),
                )
            }
        };
        code.result().map_err(|e| launch_error(launch, e))
    }
}

fn launch_error(launch: &Launch, error: DriverError) -> Error {
    Error::CudaDriver {
        call: launch.kernel,
        code: error.0 as u32,
        message: format!(
            "{} at grid {:?}, block {:?}, cluster {:?}, {} bytes of shared memory",
            describe(error),
            launch.grid,
            launch.block,
            launch.cluster,
            launch.shared_bytes
        ),
    }
}

/// Encodes a tensor map, which computes on the host alone.
fn encode(map: &TensorMap, into: &mut MaybeUninit<sys::CUtensorMap>) -> Result<()> {
    if !(1..=5).contains(&map.rank) {
        return Err(Error::value("tensor map rank", "1 to 5", map.rank));
    }
    let dtype = match map.dtype {
        DType::F32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        DType::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        DType::BF16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    };
    let swizzle = match map.swizzle {
        Swizzle::None => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
        Swizzle::Bytes32 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B,
        Swizzle::Bytes64 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
        Swizzle::Bytes128 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
    };
    let DevicePtr(address) = map.address;
    // SAFETY: all pointers are to live arrays of five (strides: four) entries, of which the driver reads `rank` (one fewer) ; it writes the whole map. The
    // address is not followed.
    let code = unsafe {
        sys::cuTensorMapEncodeTiled(
            into.as_mut_ptr(),
            dtype,
            map.rank,
            address as *mut c_void,
            map.dims.as_ptr(),
            map.strides.as_ptr(),
            map.boxes.as_ptr(),
            [1u32; 5].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    code.result().map_err(|e| Error::CudaDriver {
        call: "cuTensorMapEncodeTiled",
        code: e.0 as u32,
        message: format!("{} for {map:?}", describe(e)),
    })
}
