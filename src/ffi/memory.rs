//! What C points at, checked and turned into views: null, alignment, strides, extents, overlap.
//!
//! A call describes all its memory to [`Regions`] first. [`Regions::apart`] then proves that nothing written overlaps anything else; only with that proof do
//! the descriptions become references, so that no two references ever contradict each other.

mod regions;
mod structs;

pub(super) use regions::{Apart, InMatrix, InSlice, OutSlice, Regions};
pub(super) use structs::{Versioned, read_plain, read_struct, write_struct};

use super::status::*;
use crate::DType;
use crate::error::Error;
use bytemuck::Zeroable;
use core::ffi::c_void;

/// A number format: one of MOE_DTYPE_*. 0 is none, so that a forgotten field is an error.
pub type moe_dtype = u32;

/// IEEE binary32.
pub const MOE_DTYPE_F32: moe_dtype = 1;
/// IEEE binary16.
pub const MOE_DTYPE_F16: moe_dtype = 2;
/// bfloat16: the upper half of a binary32.
pub const MOE_DTYPE_BF16: moe_dtype = 3;

/// A matrix that is read: element (i, j) is data[i * row_stride + j * col_stride], strides counted in elements.
///
/// Strides are 0 or more (0 repeats a row or column); exchange them, and rows with cols, for the transpose. data is aligned to its elements, and may be NULL where
/// there are none. Set reserved to 0.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_matrix {
    /// The first element.
    pub data: *const c_void,
    /// Bytes that may be read from data on; a matrix that would reach beyond is refused.
    pub bytes: usize,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// Elements from one row to the next.
    pub row_stride: isize,
    /// Elements from one column to the next.
    pub col_stride: isize,
    /// MOE_DTYPE_*
    pub dtype: moe_dtype,
    /// 0
    pub reserved: u32,
}

/// A matrix that is written: element (i, j) is data[i * row_stride + j]. Rows may not overlap. What lies between rows is neither read nor written, but must not be
/// part of the call's other memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_matrix_mut {
    /// The first element.
    pub data: *mut c_void,
    /// Bytes that may be written from data on.
    pub bytes: usize,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// Elements from one row to the next, at least cols where there are several rows.
    pub row_stride: isize,
    /// MOE_DTYPE_*
    pub dtype: moe_dtype,
    /// 0
    pub reserved: u32,
}

pub(super) fn dtype(argument: &'static str, dtype: moe_dtype) -> Checked<DType> {
    match dtype {
        MOE_DTYPE_F32 => Ok(DType::F32),
        MOE_DTYPE_F16 => Ok(DType::F16),
        MOE_DTYPE_BF16 => Ok(DType::BF16),
        other => Err(Fault::value(argument, "a dtype, MOE_DTYPE_*", other)),
    }
}

pub(super) fn null(argument: &'static str) -> Fault {
    Fault::new(
        MOE_ERROR_NULL,
        format_args!("{argument}: expected a pointer, got NULL"),
    )
}

/// A pointer that may be used for elements of this size and alignment. `bytes` fit `isize`, which is what a slice may have.
pub(super) fn check_pointer(
    argument: &'static str,
    address: usize,
    bytes: usize,
    align: usize,
) -> Checked {
    if bytes == 0 {
        return Ok(());
    }
    if address == 0 {
        return Err(null(argument));
    }
    if !address.is_multiple_of(align) {
        return Err(Fault::new(
            MOE_ERROR_MISALIGNED,
            format_args!("{argument}: expected a multiple of {align}, got address {address:#x}"),
        ));
    }
    if bytes > isize::MAX as usize || address.checked_add(bytes).is_none() {
        return Err(Error::Overflow { what: argument }.into());
    }
    Ok(())
}

/// Asks for memory and gives it back: a size that cannot be had is refused here, where a later allocation would end the process. Small sizes are taken for granted,
/// so that calls that reuse their memory do not pay for it.
pub(super) fn probe(what: &'static str, bytes: Option<usize>) -> Checked {
    const LARGE: usize = 16 << 20;
    let bytes = bytes.ok_or(Error::Overflow { what })?;
    if bytes < LARGE {
        return Ok(());
    }
    let mut memory = Vec::<u8>::new();
    match memory.try_reserve_exact(bytes) {
        Ok(()) => {
            core::hint::black_box(&memory);
            Ok(())
        }
        Err(_) => Err(Fault::new(
            MOE_ERROR_OUT_OF_RESOURCES,
            format_args!("{what}: {bytes} bytes of memory cannot be had"),
        )),
    }
}
