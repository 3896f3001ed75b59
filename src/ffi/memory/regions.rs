//! The memory of one call: described, proved to be apart, then lent as views.

use super::super::ranges::Ranges;
use super::super::status::*;
use super::{check_pointer, dtype, moe_matrix, moe_matrix_mut, null, read_plain};
use crate::error::Error;
use crate::matrix::extent;
use crate::{AnyMatMut, AnyMatRef, DType, MatMut, MatRef};
use bytemuck::AnyBitPattern;
use core::marker::PhantomData;
use core::slice;
use half::{bf16, f16};

/// The memory of one call. Sixteen ranges are more than any call has.
pub(in crate::ffi) struct Regions(Ranges<16>);

/// The proof that no range of a call that is written overlaps another. References into its memory live as long as this.
pub(in crate::ffi) struct Apart(());

/// A matrix to read: sound, but not yet known to be apart from what is written.
#[derive(Clone, Copy)]
pub(in crate::ffi) struct InMatrix {
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
pub(in crate::ffi) struct OutMatrix {
    data: *mut u8,
    extent: usize,
    rows: usize,
    cols: usize,
    row_stride: usize,
    dtype: DType,
}

/// An array to read.
#[derive(Clone, Copy)]
pub(in crate::ffi) struct InSlice<T> {
    data: *const T,
    len: usize,
}

/// An array to write. Not `Copy`: it becomes one reference.
pub(in crate::ffi) struct OutSlice<T> {
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
    pub(in crate::ffi) fn new() -> Self {
        Self(Ranges::new())
    }

    /// Describes a matrix to read.
    ///
    /// # Safety
    /// `m` is null or points to a [`moe_matrix`] whose memory may be read for the rest of the call of the C function.
    pub(in crate::ffi) unsafe fn matrix(
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
    pub(in crate::ffi) unsafe fn optional_matrix(
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
    pub(in crate::ffi) unsafe fn matrix_mut(
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
    pub(in crate::ffi) unsafe fn slice<T: AnyBitPattern>(
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
    pub(in crate::ffi) unsafe fn optional_slice<T: AnyBitPattern>(
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
    pub(in crate::ffi) unsafe fn slice_mut<T: AnyBitPattern>(
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
    pub(in crate::ffi) fn apart(&self) -> Checked<Apart> {
        self.0.check()?;
        Ok(Apart(()))
    }
}

impl InMatrix {
    pub(in crate::ffi) fn rows(&self) -> usize {
        self.rows
    }

    pub(in crate::ffi) fn cols(&self) -> usize {
        self.cols
    }

    /// The matrix. Its memory outlives `_apart`, which is part of the call.
    pub(in crate::ffi) fn view<'a>(&self, _apart: &'a Apart) -> Checked<AnyMatRef<'a>> {
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
    pub(in crate::ffi) fn f32<'a>(
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
    pub(in crate::ffi) fn view(self, _apart: &Apart) -> Checked<AnyMatMut<'_>> {
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
    pub(in crate::ffi) fn get<'a>(&self, _apart: &'a Apart) -> &'a [T] {
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
    pub(in crate::ffi) fn get(self, _apart: &Apart) -> &mut [T] {
        if self.len == 0 {
            return &mut [];
        }
        // SAFETY: as in `OutMatrix::view`, with the checks and the contract of `Regions::slice_mut`; every bit pattern is a T.
        unsafe { slice::from_raw_parts_mut(self.data, self.len) }
    }
}
