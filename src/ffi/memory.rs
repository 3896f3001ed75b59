//! What C points at, checked and turned into views: null, alignment, strides, extents, overlap.
//!
//! A call describes all its memory to [`Regions`] first. [`Regions::apart`] then proves that nothing written overlaps anything else; only with that proof do
//! the descriptions become references, so that no two references ever contradict each other.

use super::ranges::Ranges;
use super::status::*;
use crate::error::Error;
use crate::matrix::extent;
use crate::{AnyMatMut, AnyMatRef, DType, MatMut, MatRef};
use bytemuck::{AnyBitPattern, Zeroable};
use core::ffi::c_void;
use core::marker::PhantomData;
use core::slice;
use half::{bf16, f16};

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

/// The memory of one call. Sixteen ranges are more than any call has.
pub(super) struct Regions(Ranges<16>);

/// The proof that no range of a call that is written overlaps another. References into its memory live as long as this.
pub(super) struct Apart(());

/// A matrix to read: sound, but not yet known to be apart from what is written.
#[derive(Clone, Copy)]
pub(super) struct InMatrix {
    data: *const u8,
    /// Elements from the first to one past the last.
    extent: usize,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
    dtype: DType,
}

/// A matrix to write. Not `Copy`: it becomes one reference.
pub(super) struct OutMatrix {
    data: *mut u8,
    extent: usize,
    rows: usize,
    cols: usize,
    row_stride: usize,
    dtype: DType,
}

/// An array to read.
#[derive(Clone, Copy)]
pub(super) struct InSlice<T> {
    data: *const T,
    len: usize,
}

/// An array to write. Not `Copy`: it becomes one reference.
pub(super) struct OutSlice<T> {
    data: *mut T,
    len: usize,
    owner: PhantomData<T>,
}

/// Sizes and strides of C's matrix, as the crate wants them.
struct Geometry {
    extent: usize,
    row_stride: usize,
    dtype: DType,
}

/// What both kinds of matrices have to fulfil.
fn geometry(argument: &'static str, m: &moe_matrix) -> Checked<(Geometry, usize)> {
    let dtype = dtype(argument, m.dtype)?;
    if m.reserved != 0 {
        return Err(Fault::value(argument, "reserved = 0", m.reserved));
    }
    let stride = |name, stride: isize| {
        usize::try_from(stride)
            .map_err(|_| Fault::value(argument, format_args!("{name} of 0 or more"), stride))
    };
    let row_stride = stride("row_stride", m.row_stride)?;
    let col_stride = stride("col_stride", m.col_stride)?;
    let overflow = Error::Overflow { what: argument };
    let extent = extent(m.rows, m.cols, row_stride, col_stride).map_err(|_| overflow.clone())?;
    let needed = extent.checked_mul(dtype.size()).ok_or(overflow)?;
    check_pointer(argument, m.data.addr(), needed, dtype.size())?;
    if needed > m.bytes {
        return Err(Error::BufferTooSmall {
            argument,
            needed: extent,
            found: m.bytes / dtype.size(),
        }
        .into());
    }
    let geometry = Geometry {
        extent,
        row_stride,
        dtype,
    };
    Ok((geometry, col_stride))
}

impl Regions {
    pub(super) fn new() -> Self {
        Self(Ranges::new())
    }

    /// Describes a matrix to read.
    ///
    /// # Safety
    /// `m` is null or points to a [`moe_matrix`] whose memory may be read for the rest of the call of the C function.
    pub(super) unsafe fn matrix(
        &mut self,
        argument: &'static str,
        m: *const moe_matrix,
    ) -> Checked<InMatrix> {
        // SAFETY: this function's contract.
        match unsafe { self.optional_matrix(argument, m) }? {
            Some(m) => Ok(m),
            None => Err(null(argument)),
        }
    }

    /// Describes a matrix to read, if there is one.
    ///
    /// # Safety
    /// As [`Regions::matrix`].
    pub(super) unsafe fn optional_matrix(
        &mut self,
        argument: &'static str,
        m: *const moe_matrix,
    ) -> Checked<Option<InMatrix>> {
        // SAFETY: this function's contract.
        let Some(m) = unsafe { read_plain(argument, m) }? else {
            return Ok(None);
        };
        let (geometry, col_stride) = geometry(argument, &m)?;
        let Geometry {
            extent,
            row_stride,
            dtype,
        } = geometry;
        self.0
            .add(argument, m.data.addr(), extent * dtype.size(), false)?;
        Ok(Some(InMatrix {
            data: m.data.cast(),
            extent,
            rows: m.rows,
            cols: m.cols,
            row_stride,
            col_stride,
            dtype,
        }))
    }

    /// Describes a matrix to write.
    ///
    /// # Safety
    /// `m` is null or points to a [`moe_matrix_mut`] whose memory is the call's alone until the C function returns.
    pub(super) unsafe fn matrix_mut(
        &mut self,
        argument: &'static str,
        m: *const moe_matrix_mut,
    ) -> Checked<OutMatrix> {
        // SAFETY: this function's contract.
        let Some(m) = unsafe { read_plain(argument, m) }? else {
            return Err(null(argument));
        };
        let as_read = moe_matrix {
            data: m.data,
            bytes: m.bytes,
            rows: m.rows,
            cols: m.cols,
            row_stride: m.row_stride,
            col_stride: 1,
            dtype: m.dtype,
            reserved: m.reserved,
        };
        let (geometry, _) = geometry(argument, &as_read)?;
        let Geometry {
            extent,
            row_stride,
            dtype,
        } = geometry;
        if m.rows > 1 && row_stride < m.cols {
            let expected = format_args!(
                "row_stride of at least {}, so that rows do not overlap",
                m.cols
            );
            return Err(Fault::value(argument, expected, row_stride));
        }
        self.0
            .add(argument, m.data.addr(), extent * dtype.size(), true)?;
        Ok(OutMatrix {
            data: m.data.cast(),
            extent,
            rows: m.rows,
            cols: m.cols,
            row_stride,
            dtype,
        })
    }

    /// Describes an array to read; null stands for none, if there are no elements.
    ///
    /// # Safety
    /// `data` is null or points to `len` readable elements, until the C function returns.
    pub(super) unsafe fn slice<T: AnyBitPattern>(
        &mut self,
        argument: &'static str,
        data: *const T,
        len: usize,
    ) -> Checked<InSlice<T>> {
        let bytes = len
            .checked_mul(size_of::<T>())
            .ok_or(Error::Overflow { what: argument })?;
        check_pointer(argument, data.addr(), bytes, align_of::<T>())?;
        self.0.add(argument, data.addr(), bytes, false)?;
        Ok(InSlice { data, len })
    }

    /// Describes an array to read, if there is one: null without elements is none.
    ///
    /// # Safety
    /// As [`Regions::slice`].
    pub(super) unsafe fn optional_slice<T: AnyBitPattern>(
        &mut self,
        argument: &'static str,
        data: *const T,
        len: usize,
    ) -> Checked<Option<InSlice<T>>> {
        if data.is_null() && len == 0 {
            return Ok(None);
        }
        // SAFETY: this function's contract.
        unsafe { self.slice(argument, data, len) }.map(Some)
    }

    /// Describes an array to write.
    ///
    /// # Safety
    /// `data` is null or points to `len` elements that are the call's alone until the C function returns.
    pub(super) unsafe fn slice_mut<T: AnyBitPattern>(
        &mut self,
        argument: &'static str,
        data: *mut T,
        len: usize,
    ) -> Checked<OutSlice<T>> {
        let bytes = len
            .checked_mul(size_of::<T>())
            .ok_or(Error::Overflow { what: argument })?;
        check_pointer(argument, data.addr(), bytes, align_of::<T>())?;
        self.0.add(argument, data.addr(), bytes, true)?;
        let owner = PhantomData;
        Ok(OutSlice { data, len, owner })
    }

    /// [`MOE_ERROR_OVERLAP`] when a range that is written overlaps another.
    pub(super) fn apart(&self) -> Checked<Apart> {
        self.0.check()?;
        Ok(Apart(()))
    }
}

impl InMatrix {
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn cols(&self) -> usize {
        self.cols
    }

    /// The matrix. Its memory outlives `_apart`, which is part of the call.
    pub(super) fn view<'a>(&self, _apart: &'a Apart) -> Checked<AnyMatRef<'a>> {
        fn typed<'a, T: crate::Element>(m: &InMatrix) -> Checked<MatRef<'a, T>> {
            let data: &'a [T] = match m.extent {
                0 => &[],
                // SAFETY: `geometry` checked null, alignment and size; the contract of `Regions::matrix` says that it may be read during the
                // call, and an `Apart` that nothing of the call writes there.
                len => unsafe { slice::from_raw_parts(m.data.cast(), len) },
            };
            Ok(MatRef::with_strides(
                data,
                m.rows,
                m.cols,
                m.row_stride,
                m.col_stride,
            )?)
        }
        Ok(match self.dtype {
            DType::F32 => typed::<f32>(self)?.into(),
            DType::F16 => typed::<f16>(self)?.into(),
            DType::BF16 => typed::<bf16>(self)?.into(),
        })
    }

    /// The matrix, which has to be f32.
    pub(super) fn f32<'a>(
        &self,
        argument: &'static str,
        apart: &'a Apart,
    ) -> Checked<MatRef<'a, f32>> {
        match self.view(apart)? {
            AnyMatRef::F32(m) => Ok(m),
            other => Err(Fault::value(argument, "dtype f32", other.dtype())),
        }
    }
}

impl OutMatrix {
    /// The matrix. As [`InMatrix::view`].
    pub(super) fn view(self, _apart: &Apart) -> Checked<AnyMatMut<'_>> {
        fn typed<'a, T: crate::Element>(m: OutMatrix) -> Checked<MatMut<'a, T>> {
            let data: &'a mut [T] = match m.extent {
                0 => &mut [],
                // SAFETY: `geometry` checked null, alignment and size; the contract of `Regions::matrix_mut` says that it is the call's alone, an
                // `Apart` that no other range of the call overlaps it, and `self` is used up, so that there is one reference.
                len => unsafe { slice::from_raw_parts_mut(m.data.cast(), len) },
            };
            Ok(MatMut::with_row_stride(data, m.rows, m.cols, m.row_stride)?)
        }
        Ok(match self.dtype {
            DType::F32 => typed::<f32>(self)?.into(),
            DType::F16 => typed::<f16>(self)?.into(),
            DType::BF16 => typed::<bf16>(self)?.into(),
        })
    }
}

impl<T: AnyBitPattern> InSlice<T> {
    /// The array. As [`InMatrix::view`].
    pub(super) fn get<'a>(&self, _apart: &'a Apart) -> &'a [T] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: as in `InMatrix::view`, with the checks and the contract of `Regions::slice`; every bit pattern is a T.
        unsafe { slice::from_raw_parts(self.data, self.len) }
    }
}

impl<T: AnyBitPattern> OutSlice<T> {
    /// The array. As [`OutMatrix::view`].
    #[allow(clippy::mut_from_ref)] // `_apart` only lends its lifetime; `self` is used up
    pub(super) fn get(self, _apart: &Apart) -> &mut [T] {
        if self.len == 0 {
            return &mut [];
        }
        // SAFETY: as in `OutMatrix::view`, with the checks and the contract of `Regions::slice_mut`; every bit pattern is a T.
        unsafe { slice::from_raw_parts_mut(self.data, self.len) }
    }
}

/// A struct without a size, if there is one.
///
/// # Safety
/// `p` is null or points to a T of any content.
pub(super) unsafe fn read_plain<T: Zeroable + Copy>(
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
pub(super) unsafe trait Versioned: Zeroable + Copy {
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
pub(super) unsafe fn read_struct<T: Versioned>(argument: &'static str, p: *const T) -> Checked<T> {
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
pub(super) unsafe fn write_struct<T: Versioned>(
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
