//! The one error type. Everything is checked at the door, before anything is written.

use crate::Isa;
use core::fmt;

/// Why a call was refused. Nothing has been written when one of these comes back.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Error {
    /// A matrix or slice has the wrong number of rows, columns or elements.
    Shape {
        /// The argument at fault, as it is called in the documentation.
        argument: &'static str,
        /// What was expected, for example `[32, 2048]`.
        expected: String,
        /// What came.
        found: String,
    },
    /// A number is outside its range: `k > E`, a non-finite scale, an id that names no expert.
    Value {
        /// The argument at fault.
        argument: &'static str,
        /// What was expected.
        expected: String,
        /// What came.
        found: String,
    },
    /// A caller-owned buffer is too short.
    BufferTooSmall {
        /// The buffer at fault.
        argument: &'static str,
        /// Elements (bytes for a workspace) needed.
        needed: usize,
        /// Elements that it has.
        found: usize,
    },
    /// A product of sizes does not fit `usize`, or a pair index does not fit `u32`.
    Overflow {
        /// The quantity that does not fit.
        what: &'static str,
    },
    /// Weights were packed for another kernel than the one that was asked to run.
    PackedFor {
        /// The argument at fault.
        argument: &'static str,
        /// The ISA of the call.
        expected: Isa,
        /// The ISA that the weights were packed for.
        found: Isa,
    },
    /// This CPU, or this build, lacks the ISA that was asked for.
    UnsupportedIsa {
        /// The ISA that was asked for.
        requested: Isa,
        /// The ISAs that can run here.
        available: Vec<Isa>,
    },
    /// A name that means nothing here, such as an unknown ISA in an environment variable.
    UnknownName {
        /// Where the name came from.
        argument: &'static str,
        /// The names that are known.
        expected: String,
        /// What came.
        found: String,
    },
    /// The NVIDIA driver, or a GPU for it, is not there.
    CudaUnavailable {
        /// What is missing and what to do about it.
        reason: String,
    },
    /// The driver cannot take the kernels' text: it is older than the text's `.version`.
    CudaDriverTooOld {
        /// What was being loaded.
        what: &'static str,
        /// The CUDA version that the text needs, `12.0` for example.
        needed: String,
        /// The CUDA version that the driver supports.
        found: String,
    },
    /// The GPU cannot run the kernel: it is older than the kernel's target, or of a family that does not take it.
    CudaUnsupportedGpu {
        /// The kernel file.
        what: &'static str,
        /// The compute capability that it needs.
        needed: &'static str,
        /// The device's compute capability.
        found: (u32, u32),
    },
    /// The driver refused a call.
    CudaDriver {
        /// The driver's function, or the kernel that was launched.
        call: &'static str,
        /// The number of the `CUresult`.
        code: u32,
        /// What the driver calls it, and what it may mean here.
        message: String,
    },
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = core::result::Result<T, E>;

impl Error {
    /// A [`Error::Shape`], with both sides formatted.
    pub(crate) fn shape(
        argument: &'static str,
        expected: impl fmt::Debug,
        found: impl fmt::Debug,
    ) -> Self {
        Self::Shape {
            argument,
            expected: format!("{expected:?}"),
            found: format!("{found:?}"),
        }
    }

    /// A [`Error::Value`]; the expectation is prose, the finding is formatted.
    pub(crate) fn value(
        argument: &'static str,
        expected: impl fmt::Display,
        found: impl fmt::Display,
    ) -> Self {
        Self::Value {
            argument,
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shape {
                argument,
                expected,
                found,
            } => write!(f, "{argument}: expected shape {expected}, got {found}"),
            Self::Value {
                argument,
                expected,
                found,
            } => write!(f, "{argument}: expected {expected}, got {found}"),
            Self::BufferTooSmall {
                argument,
                needed,
                found,
            } => write!(
                f,
                "{argument}: needs at least {needed} elements, got {found}"
            ),
            Self::Overflow { what } => write!(f, "{what} does not fit the index type"),
            Self::PackedFor {
                argument,
                expected,
                found,
            } => write!(
                f,
                "{argument}: packed for {found}, but the call runs on {expected}; pack again with the same Cpu"
            ),
            Self::UnsupportedIsa {
                requested,
                available,
            } => write!(
                f,
                "isa: this CPU or build has no {requested}; available: {available:?}"
            ),
            Self::UnknownName {
                argument,
                expected,
                found,
            } => write!(f, "{argument}: unknown name {found:?}, expected {expected}"),
            Self::CudaUnavailable { reason } => write!(f, "cuda: {reason}"),
            Self::CudaDriverTooOld {
                what,
                needed,
                found,
            } => write!(
                f,
                "cuda: the driver supports CUDA {found}, but {what} needs CUDA {needed}; install a newer NVIDIA driver"
            ),
            Self::CudaUnsupportedGpu {
                what,
                needed,
                found: (major, minor),
            } => write!(
                f,
                "cuda: {what} needs a GPU of compute capability {needed}, this one has {major}.{minor}; use another kernel, another GPU or the CPU"
            ),
            Self::CudaDriver {
                call,
                code,
                message,
            } => write!(f, "cuda: {call} failed with {message} (CUresult {code})"),
        }
    }
}

impl std::error::Error for Error {}

/// `a * b`, or [`Error::Overflow`] that names the product.
pub(crate) fn checked_mul(a: usize, b: usize, what: &'static str) -> Result<usize> {
    a.checked_mul(b).ok_or(Error::Overflow { what })
}
