//! Structs of the caller's header, which may be older or newer than the library.

use super::super::status::*;
use super::{check_pointer, null};
use bytemuck::Zeroable;
use core::slice;

/// A struct without a size, if there is one.
///
/// # Safety
/// `p` is null or points to a T of any content.
pub(in crate::ffi) unsafe fn read_plain<T: Zeroable + Copy>(
    argument: &'static str,
    p: *const T,
) -> Checked<Option<T>> {
    if p.is_null() {
        return Ok(None);
    }
    check_pointer(argument, p.addr(), size_of::<T>(), align_of::<T>())?;
    // SAFETY: not null, aligned, and there by the contract.
    Ok(Some(unsafe { p.read() }))
}

/// A struct whose first field is its size in bytes, as the caller's header had it.
///
/// # Safety
/// `repr(C)`, begins with a `usize`, and any bit pattern is a value.
pub(in crate::ffi) unsafe trait Versioned: Zeroable + Copy {
    /// Its size in the first version. When a field is added at the end, this stays: `offset_of!(Self, that_field)`.
    const FIRST_SIZE: usize = size_of::<Self>();
}

/// A struct's size as its owner knows it.
///
/// # Safety
/// `p` is null or points to so many bytes as its first field says.
unsafe fn struct_size<T: Versioned>(argument: &'static str, p: *const T) -> Checked<usize> {
    /// No struct comes near; what claims more is no struct of ours.
    const MOST: usize = 4096;
    if p.is_null() {
        return Err(null(argument));
    }
    check_pointer(argument, p.addr(), size_of::<usize>(), align_of::<T>())?;
    // SAFETY: not null, aligned for T, which begins with a usize.
    let size = unsafe { p.cast::<usize>().read() };
    if size < T::FIRST_SIZE || size > MOST {
        return Err(Fault::new(
            MOE_ERROR_STRUCT_SIZE,
            format_args!(
                "{argument}.struct_size: expected its sizeof ({}), got {size}",
                size_of::<T>()
            ),
        ));
    }
    check_pointer(argument, p.addr(), size, align_of::<T>())?;
    Ok(size)
}

/// Reads a struct of an older, the same or a newer header: fields that it lacks are zero; fields that this library lacks must be.
///
/// # Safety
/// `p` is null or points to so many bytes as its first field says.
pub(in crate::ffi) unsafe fn read_struct<T: Versioned>(
    argument: &'static str,
    p: *const T,
) -> Checked<T> {
    // SAFETY: this function's contract.
    let size = unsafe { struct_size(argument, p) }?;
    let known = size.min(size_of::<T>());
    let mut value = T::zeroed();
    // SAFETY: `known` bytes are there on both sides, and any bits are a value by the contract of `Versioned`.
    unsafe { core::ptr::copy_nonoverlapping(p.cast::<u8>(), (&raw mut value).cast::<u8>(), known) };
    // SAFETY: the caller's struct has `size` bytes.
    let rest = unsafe { slice::from_raw_parts(p.cast::<u8>().wrapping_add(known), size - known) };
    if rest.iter().any(|&b| b != 0) {
        return Err(Fault::new(
            MOE_ERROR_STRUCT_SIZE,
            format_args!(
                "{argument}: sets fields that this library does not know; it is older than the header"
            ),
        ));
    }
    Ok(value)
}

/// Writes a struct that the caller reads: as much of it as the caller's header knows. `struct_size` stays the caller's.
///
/// # Safety
/// `p` is null or points to so many writable bytes as its first field says.
pub(in crate::ffi) unsafe fn write_struct<T: Versioned>(
    argument: &'static str,
    p: *mut T,
    value: &T,
) -> Checked {
    // SAFETY: this function's contract.
    let size = unsafe { struct_size(argument, p.cast_const()) }?;
    let head = size_of::<usize>();
    let known = size.min(size_of::<T>()) - head;
    let from = (&raw const *value).cast::<u8>().wrapping_add(head);
    // SAFETY: `known` bytes after the first field are there on both sides; `value` is the library's own, so they are apart.
    unsafe { core::ptr::copy_nonoverlapping(from, p.cast::<u8>().wrapping_add(head), known) };
    Ok(())
}
