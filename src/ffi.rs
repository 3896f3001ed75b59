//! The C ABI, behind the feature `capi`. `include/moe_kernels.h` is made from these files by `scripts/make_header.sh`.
//!
//! Each function does three things: it reads what C gave, checks it, and makes the one call of the Rust interface that it stands for. Nothing is computed here.
//!
//! ```text
//! raw pointers ──memory.rs──▶ sizes, strides, alignment, null, overlap ──▶ MatRef, slices ──▶ the crate
//! handles      ──handle.rs──▶ kind, use by one or many                 ──▶ &Cpu, &MoeLayer …
//! results      ◀──status.rs── a status and a text for the thread       ◀── Result, or a caught panic
//! ```
//!
//! * No call unwinds: `status::guard` catches whatever comes.
//! * On error nothing has been written but workspaces and scratch, which have no content to keep.
//! * Memory is borrowed for the time of a call, but for the weights, which are packed (copied) when they are pushed.
//! * Ranges that are written must not overlap any other range of the call, gaps between rows included; ranges that are read may overlap each other.
//! * Structs begin with their size, so that fields can be added at their end: see `memory::read_struct`. `moe_matrix` and `moe_matrix_mut` have no
//!   size, since they are embedded in the calls of every host; they stay as they are.
//!
//! The CPU's files follow the stems. The GPU's entry points (addresses and a stream) are in `ffi/cuda.rs`, the same in every build; routers serve both.
#![allow(unsafe_code)] // the room where memory that C describes becomes slices; see memory.rs and handle.rs
#![allow(non_camel_case_types)] // the names are those of the header
#![allow(rustdoc::broken_intra_doc_links)] // [T] is a shape: the comments are those of the header

// In the header's order.
mod status;

mod handle;
mod memory;
mod ranges;

mod cpu;

mod router;

mod routing;

mod permute;

mod grouped_gemm;

mod experts;

mod combine;

mod moe;

mod losses;

mod cuda;

pub use combine::*;
pub use cpu::*;
pub use cuda::*;
pub use experts::*;
pub use grouped_gemm::*;
pub use losses::*;
pub use memory::{MOE_DTYPE_BF16, MOE_DTYPE_F16, MOE_DTYPE_F32};
pub use memory::{moe_dtype, moe_matrix, moe_matrix_mut};
pub use moe::*;
pub use permute::*;
pub use router::*;
pub use routing::*;
pub use status::*;

use core::ffi::{CStr, c_char};

/// The version of this interface. It rises when a function or the meaning of a field changes; added functions, fields and constants leave it.
pub const MOE_ABI_VERSION: u32 = 1;

/// The MOE_ABI_VERSION of the library, to be compared with the header's when a program starts.
#[unsafe(no_mangle)]
pub extern "C" fn moe_abi_version() -> u32 {
    MOE_ABI_VERSION
}

/// The library's version, such as "0.1.0". Never NULL; lives for ever.
#[unsafe(no_mangle)]
pub extern "C" fn moe_version() -> *const c_char {
    const VERSION: &CStr =
        match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
            Ok(version) => version,
            Err(_) => c"unknown",
        };
    VERSION.as_ptr()
}
