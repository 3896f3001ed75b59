//! Status codes, the text of a thread's last error, and the guard around every entry point.

use crate::Error;
use core::ffi::{CStr, c_char};
use core::fmt::Display;
use std::cell::RefCell;
use std::ffi::CString;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What a call came to: MOE_OK, or one of MOE_ERROR_*. After an error (but for MOE_ERROR_INTERNAL and MOE_ERROR_DRIVER) nothing has been written, and
/// moe_last_error() names the argument.
pub type moe_status = i32;

/// Done.
pub const MOE_OK: moe_status = 0;
/// A matrix or array has the wrong number of rows, columns or elements.
pub const MOE_ERROR_SHAPE: moe_status = 1;
/// A number is outside its range: a negative stride, an id that names no expert, a constant that means nothing.
pub const MOE_ERROR_VALUE: moe_status = 2;
/// A buffer is too short.
pub const MOE_ERROR_BUFFER_TOO_SMALL: moe_status = 3;
/// A product of sizes does not fit its type.
pub const MOE_ERROR_OVERFLOW: moe_status = 4;
/// Weights were packed on another instruction set than the one that was asked to run.
pub const MOE_ERROR_PACKED_FOR: moe_status = 5;
/// This CPU, this GPU or its driver, or this build, lacks what was asked for.
pub const MOE_ERROR_UNSUPPORTED: moe_status = 6;
/// A name means nothing here.
pub const MOE_ERROR_UNKNOWN_NAME: moe_status = 7;
/// A pointer is NULL that may not be.
pub const MOE_ERROR_NULL: moe_status = 8;
/// A pointer is not a multiple of its element's size.
pub const MOE_ERROR_MISALIGNED: moe_status = 9;
/// Memory that would be written overlaps other memory of the call.
pub const MOE_ERROR_OVERLAP: moe_status = 10;
/// A struct's struct_size is none that this library knows.
pub const MOE_ERROR_STRUCT_SIZE: moe_status = 11;
/// A handle is of another kind or was destroyed. Found by luck, not by promise: a destroyed handle's memory may hold anything.
pub const MOE_ERROR_HANDLE: moe_status = 12;
/// A handle is in use by another call that changes it, or would be changed while in use.
pub const MOE_ERROR_BUSY: moe_status = 13;
/// Memory (the GPU's included) or threads could not be had.
pub const MOE_ERROR_OUT_OF_RESOURCES: moe_status = 14;
/// A bug in this library was caught; outputs of the call hold anything. Please report the text.
pub const MOE_ERROR_INTERNAL: moe_status = 15;
/// The CUDA driver refused a call; the text has the call, the CUresult and its meaning. Earlier work of the stream that went wrong may show here, too.
pub const MOE_ERROR_DRIVER: moe_status = 16;

/// `CUresult` of the driver when the GPU's memory is used up.
const CUDA_ERROR_OUT_OF_MEMORY: u32 = 2;

/// Why a call is refused.
pub(super) struct Fault {
    status: moe_status,
    text: String,
}

pub(super) type Checked<T = ()> = Result<T, Fault>;

impl Fault {
    pub(super) fn new(status: moe_status, text: impl Display) -> Self {
        let text = text.to_string();
        Self { status, text }
    }

    /// [`MOE_ERROR_VALUE`] in the words of [`Error::Value`].
    pub(super) fn value(
        argument: &'static str,
        expected: impl Display,
        found: impl Display,
    ) -> Self {
        Error::value(argument, expected, found).into()
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        let status = match &error {
            Error::Shape { .. } => MOE_ERROR_SHAPE,
            Error::Value { .. } => MOE_ERROR_VALUE,
            Error::BufferTooSmall { .. } => MOE_ERROR_BUFFER_TOO_SMALL,
            Error::Overflow { .. } => MOE_ERROR_OVERFLOW,
            Error::PackedFor { .. } => MOE_ERROR_PACKED_FOR,
            Error::UnsupportedIsa { .. } => MOE_ERROR_UNSUPPORTED,
            Error::UnknownName { .. } => MOE_ERROR_UNKNOWN_NAME,
            Error::CudaUnavailable { .. }
            | Error::CudaDriverTooOld { .. }
            | Error::CudaUnsupportedGpu { .. } => MOE_ERROR_UNSUPPORTED,
            Error::CudaDriver { code, .. } if *code == CUDA_ERROR_OUT_OF_MEMORY => {
                MOE_ERROR_OUT_OF_RESOURCES
            }
            Error::CudaDriver { .. } => MOE_ERROR_DRIVER,
        };
        Self::new(status, error)
    }
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// Runs an entry point. An error leaves its text for the thread; a panic, which would be a bug, becomes [`MOE_ERROR_INTERNAL`].
pub(super) fn guard(body: impl FnOnce() -> Checked) -> moe_status {
    let fault = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return MOE_OK,
        Ok(Err(fault)) => fault,
        Err(payload) => {
            let text = payload
                .downcast_ref::<&str>()
                .map(|s| (*s).to_owned())
                .or_else(|| payload.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "no message".into());
            // Dropping a payload runs code that may panic in its turn.
            core::mem::forget(payload);
            Fault::new(
                MOE_ERROR_INTERNAL,
                format_args!("a bug in moe-kernels: {text}"),
            )
        }
    };
    let text = CString::new(fault.text.replace('\0', "\\0")).unwrap_or_default();
    // A thread that is ending has no place for the text any more.
    let _ = LAST.try_with(|last| last.replace(text));
    fault.status
}

/// The text of this thread's last error, in English and UTF-8; "" when there was none. Successful calls leave it. Valid until the next error of this thread;
/// not to be freed.
#[unsafe(no_mangle)]
pub extern "C" fn moe_last_error() -> *const c_char {
    LAST.try_with(|last| last.borrow().as_ptr())
        .unwrap_or(c"".as_ptr())
}

/// A status in one word, such as "shape". Never NULL; lives for ever.
#[unsafe(no_mangle)]
pub extern "C" fn moe_status_name(status: moe_status) -> *const c_char {
    let name: &CStr = match status {
        MOE_OK => c"ok",
        MOE_ERROR_SHAPE => c"shape",
        MOE_ERROR_VALUE => c"value",
        MOE_ERROR_BUFFER_TOO_SMALL => c"buffer-too-small",
        MOE_ERROR_OVERFLOW => c"overflow",
        MOE_ERROR_PACKED_FOR => c"packed-for",
        MOE_ERROR_UNSUPPORTED => c"unsupported",
        MOE_ERROR_UNKNOWN_NAME => c"unknown-name",
        MOE_ERROR_NULL => c"null",
        MOE_ERROR_MISALIGNED => c"misaligned",
        MOE_ERROR_OVERLAP => c"overlap",
        MOE_ERROR_STRUCT_SIZE => c"struct-size",
        MOE_ERROR_HANDLE => c"handle",
        MOE_ERROR_BUSY => c"busy",
        MOE_ERROR_OUT_OF_RESOURCES => c"out-of-resources",
        MOE_ERROR_INTERNAL => c"internal",
        MOE_ERROR_DRIVER => c"driver",
        _ => c"unknown",
    };
    name.as_ptr()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_gpu_have_their_status() {
        let status = |error| Fault::from(error).status;
        let (what, needed, found) = ("routing", "12.0".to_string(), "11.4".to_string());
        let reason = "no driver".to_string();
        let driver = |code| Error::CudaDriver {
            call: "cuLaunchKernel",
            code,
            message: "why".into(),
        };
        for (error, expected) in [
            (Error::CudaUnavailable { reason }, MOE_ERROR_UNSUPPORTED),
            (
                Error::CudaDriverTooOld {
                    what,
                    needed,
                    found,
                },
                MOE_ERROR_UNSUPPORTED,
            ),
            (
                Error::CudaUnsupportedGpu {
                    what,
                    needed: "8.0 or later",
                    found: (7, 5),
                },
                MOE_ERROR_UNSUPPORTED,
            ),
            (driver(2), MOE_ERROR_OUT_OF_RESOURCES),
            (driver(700), MOE_ERROR_DRIVER),
        ] {
            assert_eq!(status(error.clone()), expected, "{error}");
        }
    }

    #[test]
    fn a_panic_becomes_a_status() {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| ()));
        let status = guard(|| panic!("planned \0 here"));
        std::panic::set_hook(hook);
        assert_eq!(status, MOE_ERROR_INTERNAL);
        // SAFETY: the text is this thread's and no call comes between.
        let text = unsafe { CStr::from_ptr(moe_last_error()) };
        assert_eq!(text, c"a bug in moe-kernels: planned \\0 here");
    }
}
