//! Texts loaded once per context, kernels looked up once.

use super::launch::{self, LoadedFunction, LoadedModule};
use super::plan::{ComputeCapability, DeviceInfo, Launch, Module};
use super::ptx::ptx;
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::ffi::CString;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// Above this much dynamic shared memory a kernel has to opt in, once.
const SHARED_WITHOUT_OPT_IN: u32 = 48 * 1024;

/// The kernels of one context.
pub(super) struct Kernels {
    pub(super) info: DeviceInfo,
    modules: Mutex<HashMap<Module, LoadedModule>>,
    functions: Functions<LoadedFunction>,
}

/// A context and its kernels.
type Entry = (launch::ContextKey, Arc<Kernels>);

/// Kernels by name, each looked up once and allowed as much dynamic shared memory as any of its launches has wanted.
struct Functions<F>(RwLock<HashMap<&'static str, Function<F>>>);

#[derive(Clone, Copy)]
struct Function<F> {
    handle: F,
    /// Dynamic shared memory that it may have by now.
    shared: u32,
}

impl<F: Copy> Functions<F> {
    /// The kernel `name`, allowed `shared` bytes at least: `find` looks it up, `allow` sets what it may have.
    fn get(
        &self,
        name: &'static str,
        shared: u32,
        find: impl FnOnce() -> Result<F>,
        allow: impl FnOnce(F, u32) -> Result<()>,
    ) -> Result<F> {
        let known = self
            .0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(name)
            .copied();
        if let Some(function) = known.filter(|f| f.shared >= shared) {
            return Ok(function.handle);
        }
        // Not under the lock: the driver may compile for seconds, and other kernels are launched meanwhile.
        let handle = match known {
            Some(function) => function.handle,
            None => find()?,
        };
        let mut functions = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let function = functions.entry(name).or_insert(Function {
            handle,
            shared: SHARED_WITHOUT_OPT_IN,
        });
        // Asked again, set and noted under one lock. The attribute is the last value set, not the largest: of two threads that want different amounts, the one
        // that wants less could otherwise set it last, and the other's launch, or a later one that trusts the note, would be refused.
        if function.shared < shared {
            allow(function.handle, shared)?;
            function.shared = shared;
        }
        Ok(function.handle)
    }
}

impl Kernels {
    /// Those of the calling thread's current context.
    ///
    /// # Errors
    /// [`Error::CudaUnavailable`] without driver or current context; [`Error::CudaUnsupportedGpu`] for a device older than any text.
    pub(super) fn of_current_context() -> Result<Arc<Self>> {
        /// Few contexts ever exist in a process.
        static ALL: Mutex<Vec<Entry>> = Mutex::new(Vec::new());
        let current = launch::current()?;
        let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, kernels)) = all.iter().find(|(key, _)| *key == current.key) {
            return Ok(kernels.clone());
        }
        let info = launch::device_info(current.device)?;
        check_device(info.compute_capability)?;
        let kernels = Arc::new(Self {
            info,
            modules: Mutex::default(),
            functions: Functions(RwLock::default()),
        });
        all.push((current.key, kernels.clone()));
        Ok(kernels)
    }

    /// Loads the kernel of a launch and whatever it needs, unless that has been done. The context is current.
    ///
    /// # Errors
    /// Those of loading; [`Error::Value`] for more shared memory or more tensor maps than there can be.
    pub(super) fn function(&self, launch: &Launch) -> Result<LoadedFunction> {
        if launch.has_too_many_maps() {
            return Err(Error::value(
                "tensor maps",
                format_args!("at most {}", Launch::MAX_MAPS),
                "more",
            ));
        }
        if launch.shared_bytes > self.info.shared_per_block.max(SHARED_WITHOUT_OPT_IN) {
            return Err(Error::value(
                "shared memory",
                format_args!(
                    "at most {} bytes for {}",
                    self.info.shared_per_block, launch.kernel
                ),
                launch.shared_bytes,
            ));
        }
        self.functions.get(
            launch.kernel,
            launch.shared_bytes,
            || self.module(launch.module)?.function(launch.kernel),
            LoadedFunction::allow_shared,
        )
    }

    /// Loads a text unless it is loaded. The context is current.
    pub(super) fn module(&self, module: Module) -> Result<LoadedModule> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&loaded) = modules.get(&module) {
            return Ok(loaded);
        }
        let text = ptx(module, self.info.compute_capability)?;
        check_driver(module, text)?;
        let c_text =
            CString::new(text).map_err(|_| Error::value("ptx", "text without NUL", module))?;
        let loaded = LoadedModule::load(&c_text)
            .map_err(|e| load_error(module, text, self.info.compute_capability, e))?;
        modules.insert(module, loaded);
        Ok(loaded)
    }
}

pub(super) fn check_device(compute_capability: ComputeCapability) -> Result<()> {
    if compute_capability < super::ptx::OLDEST {
        return Err(Error::CudaUnsupportedGpu {
            what: "every kernel",
            needed: "8.0 or later",
            found: compute_capability,
        });
    }
    Ok(())
}

/// Refuses a text that is newer than the driver before the driver does, with better advice.
fn check_driver(module: Module, text: &str) -> Result<()> {
    let found = launch::driver()?.version;
    match needed_cuda(text) {
        Some(needed) if needed > found => Err(Error::CudaDriverTooOld {
            what: module.stem(),
            needed: launch::version_name(needed),
            found: launch::version_name(found),
        }),
        _ => Ok(()),
    }
}

/// The CUDA version whose driver reads a text's `.version`, as the driver numbers it: 12000 for 8.0.
fn needed_cuda(text: &str) -> Option<u32> {
    let line = text
        .lines()
        .find_map(|l| l.trim().strip_prefix(".version"))?;
    let (major, minor) = line.trim().split_once('.')?;
    let (major, minor): (u32, u32) = (major.parse().ok()?, minor.trim().parse().ok()?);
    // PTX x.y came with CUDA (x+4).y up to 8.5, then ran one release behind.
    let cuda_minor = match (major, minor) {
        (8, 6) => 7,
        (8, 7) => 8,
        (8, 8) => 9,
        (_, minor) => minor,
    };
    Some((major + 4) * 1000 + cuda_minor * 10)
}

fn load_error(
    module: Module,
    text: &str,
    compute_capability: ComputeCapability,
    error: cudarc::driver::DriverError,
) -> Error {
    use cudarc::driver::sys::CUresult as R;
    match error.0 {
        R::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => Error::CudaDriverTooOld {
            what: module.stem(),
            needed: needed_cuda(text)
                .map_or_else(|| "of a later version".into(), launch::version_name),
            found: launch::driver()
                .map_or_else(|_| "unknown".into(), |d| launch::version_name(d.version)),
        },
        R::CUDA_ERROR_NO_BINARY_FOR_GPU => Error::CudaUnsupportedGpu {
            what: module.stem(),
            needed: "of the text's .target",
            found: compute_capability,
        },
        _ => launch::driver_error("cuModuleLoadData", error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
    use std::time::{Duration, Instant};

    /// A kernel's attribute as the driver keeps it: the last value, larger or not.
    struct Attribute(AtomicU32);

    impl Attribute {
        fn get(&self, functions: &Functions<u32>, shared: u32, before: impl FnOnce()) {
            let allow = |handle, bytes| {
                assert_eq!(handle, 7);
                before();
                self.0.store(bytes, Ordering::SeqCst);
                Ok(())
            };
            assert_eq!(functions.get("k", shared, || Ok(7), allow).unwrap(), 7);
            let allowed = self.0.load(Ordering::SeqCst);
            assert!(allowed >= shared, "{allowed} bytes allowed, {shared} asked");
        }
    }

    /// Two threads want more than 48 KiB, and the one that wants less has begun to set its amount when the other comes. Whoever has been given the kernel may have
    /// its share from then on.
    #[test]
    fn what_a_thread_was_allowed_no_other_takes_away() {
        const LESS: u32 = 60 << 10;
        const MORE: u32 = 100 << 10;
        let functions = Functions::<u32>(RwLock::default());
        let attribute = Attribute(AtomicU32::new(SHARED_WITHOUT_OPT_IN));
        let (begun, done) = (AtomicBool::new(false), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                attribute.get(&functions, LESS, || {
                    begun.store(true, Ordering::SeqCst);
                    // Time for the other to overtake, which it must not.
                    let end = Instant::now() + Duration::from_millis(200);
                    while Instant::now() < end && !done.load(Ordering::SeqCst) {
                        std::thread::yield_now();
                    }
                });
            });
            scope.spawn(|| {
                while !begun.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
                attribute.get(&functions, MORE, || ());
                done.store(true, Ordering::SeqCst);
            });
        });
        attribute.get(&functions, MORE, || panic!("it has been allowed"));
        attribute.get(&functions, LESS, || panic!("more has been allowed"));
    }

    #[test]
    fn what_needs_no_leave_asks_for_none_and_a_refusal_is_asked_again() {
        let functions = Functions::<u32>(RwLock::default());
        let none = |_, _| panic!("below 48 KiB");
        let get = |name, allow: fn(u32, u32) -> Result<()>| {
            functions.get(name, 50 << 10, || Ok(3), allow)
        };
        assert_eq!(functions.get("k", 48 << 10, || Ok(3), none), Ok(3));
        assert_eq!(functions.get("k", 0, || panic!("known"), none), Ok(3));
        let refused = |_, bytes| Err(Error::value("shared memory", "less", bytes));
        assert!(get("k", refused).is_err());
        assert!(get("k", refused).is_err());
        assert_eq!(get("k", |_, _| Ok(())), Ok(3));
        assert_eq!(get("k", refused), Ok(3));
        // A kernel that cannot be found is looked for again.
        let missing = || Err(Error::value("kernel", "one", "none"));
        assert!(functions.get("other", 0, missing, |_, _| Ok(())).is_err());
        assert_eq!(functions.get("other", 0, || Ok(4), |_, _| Ok(())), Ok(4));
    }

    #[test]
    fn ptx_versions_and_the_cuda_that_reads_them() {
        let needed = |v: &str| needed_cuda(&format!("// header\n.version {v}\n.target sm_80\n"));
        assert_eq!(needed("7.0"), Some(11_000));
        assert_eq!(needed("7.8"), Some(11_080));
        assert_eq!(needed("8.0"), Some(12_000));
        assert_eq!(needed("8.5"), Some(12_050));
        assert_eq!(needed("8.7"), Some(12_080));
        assert_eq!(needed("9.0"), Some(13_000));
        assert_eq!(needed_cuda("nothing"), None);
    }
}
