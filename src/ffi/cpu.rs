//! `moe_cpu`: which instruction set, how many threads.

use super::handle::{check_place, destroy, give, handle, shared};
use super::memory::{Versioned, read_struct};
use super::status::*;
use crate::grouped_gemm::scratch_bytes;
use crate::{Cpu, Isa};
use bytemuck::Zeroable;
use core::ffi::{CStr, c_char};

/// An instruction set and threads. Calls that take it as const may run at the same time in several threads and share its pool.
pub struct moe_cpu {
    _opaque: (),
}

handle!(moe_cpu, CpuAndPool, b"moecpu01");

/// What [`moe_cpu`] stands for.
pub(super) struct CpuAndPool {
    pub(super) cpu: Cpu,
    #[cfg(feature = "parallel")]
    pool: Option<rayon::ThreadPool>,
    threads: usize,
}

impl CpuAndPool {
    pub(super) fn threads(&self) -> usize {
        self.threads
    }

    /// Runs on the handle's threads, or right here where it has one.
    pub(super) fn run<R: Send>(&self, work: impl FnOnce(&Cpu) -> R + Send) -> R {
        #[cfg(feature = "parallel")]
        if let Some(pool) = &self.pool {
            return pool.install(|| work(&self.cpu));
        }
        work(&self.cpu)
    }
}

/// How to make a moe_cpu. Zeros (with struct_size) are the defaults.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_cpu_options {
    /// sizeof(moe_cpu_options)
    pub struct_size: usize,
    /// 0 or 1: each call runs on the thread that makes it. N > 1: the handle owns N threads, started here and ended by moe_cpu_destroy; the calling thread waits.
    pub threads: usize,
    /// "scalar", "avx2", "avx512" or "neon"; NULL for the best of this CPU. All give the same bits.
    pub isa: *const c_char,
}

// SAFETY: repr(C), begins with its size, integers and a pointer.
unsafe impl Versioned for moe_cpu_options {}

/// More threads than any machine has are a mistake.
const MOST_THREADS: usize = 4096;

/// Makes a handle; options may be NULL. No other function of this library starts threads. The threads do not survive fork(): make the handle in the child.
///
/// Errors: MOE_ERROR_UNKNOWN_NAME, MOE_ERROR_UNSUPPORTED (isa; threads > 1 in a library built without the feature `parallel`), MOE_ERROR_VALUE (threads > 4096),
/// MOE_ERROR_OUT_OF_RESOURCES.
///
/// # Safety
/// options: NULL or valid, isa NUL-terminated. out: writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_cpu_create(
    options: *const moe_cpu_options,
    out: *mut *mut moe_cpu,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        unsafe { check_place(out) }?;
        let options = match options.is_null() {
            true => moe_cpu_options::zeroed(),
            // SAFETY: the caller's contract.
            false => unsafe { read_struct("options", options) }?,
        };
        let cpu = match options.isa.is_null() {
            true => Cpu::new(),
            // SAFETY: the caller's contract: a NUL-terminated text.
            false => match unsafe { CStr::from_ptr(options.isa) }.to_str() {
                Ok(name) => Cpu::with_isa(name.parse::<Isa>()?)?,
                Err(_) => return Err(Fault::new(MOE_ERROR_UNKNOWN_NAME, "isa: not UTF-8")),
            },
        };
        let value = with_threads(cpu, options.threads)?;
        // SAFETY: the caller's contract.
        unsafe { give(out, value) }
    })
}

fn with_threads(cpu: Cpu, threads: usize) -> Checked<CpuAndPool> {
    if threads > MOST_THREADS {
        let expected = format_args!("at most {MOST_THREADS}");
        return Err(Fault::value("threads", expected, threads));
    }
    if threads <= 1 {
        return Ok(CpuAndPool {
            cpu: cpu.single_threaded(),
            #[cfg(feature = "parallel")]
            pool: None,
            threads: 1,
        });
    }
    #[cfg(feature = "parallel")]
    {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("moe-{i}"))
            .build()
            .map_err(|why| {
                Fault::new(MOE_ERROR_OUT_OF_RESOURCES, format_args!("threads: {why}"))
            })?;
        Ok(CpuAndPool {
            cpu,
            pool: Some(pool),
            threads,
        })
    }
    #[cfg(not(feature = "parallel"))]
    Err(Fault::new(
        MOE_ERROR_UNSUPPORTED,
        "threads: this library was built without the feature `parallel`",
    ))
}

/// Ends the handle and its threads. NULL is allowed. MOE_ERROR_BUSY while a call uses it.
///
/// # Safety
/// cpu: NULL or a living handle, not used afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_cpu_destroy(cpu: *mut moe_cpu) -> moe_status {
    // SAFETY: the caller's contract.
    guard(|| unsafe { destroy(cpu) })
}

/// The number of threads that calls run on; 0 for a handle that is none.
///
/// # Safety
/// cpu: NULL or a living handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_cpu_threads(cpu: *const moe_cpu) -> usize {
    let mut threads = 0;
    guard(|| {
        // SAFETY: the caller's contract.
        threads = unsafe { shared(cpu) }?.threads;
        Ok(())
    });
    threads
}

/// The instruction set's name; "" for a handle that is none. Lives for ever.
///
/// # Safety
/// cpu: NULL or a living handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_cpu_isa(cpu: *const moe_cpu) -> *const c_char {
    let mut name = c"";
    guard(|| {
        // SAFETY: the caller's contract.
        name = match unsafe { shared(cpu) }?.cpu.isa() {
            Isa::Scalar => c"scalar",
            Isa::Avx2 => c"avx2",
            Isa::Avx512 => c"avx512",
            Isa::Neon => c"neon",
        };
        Ok(())
    });
    name.as_ptr()
}

/// Bytes of scratch that the matrix products need on this handle; 0 for a handle that is none.
///
/// # Safety
/// cpu: NULL or a living handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_scratch_bytes(cpu: *const moe_cpu) -> usize {
    let mut bytes = 0;
    guard(|| {
        // SAFETY: the caller's contract.
        bytes = unsafe { shared(cpu) }?.run(scratch_bytes);
        Ok(())
    });
    bytes
}
