//! What C says of a GPU's memory, checked on the host: null, alignment, strides, extents, overlap. Nothing is followed.

use crate::DType;
use crate::cuda::DevicePtr;
use crate::cuda::combine::DeviceRows;
use crate::cuda::grouped_gemm::{BiasPointers, Placement, WeightPointers};
use crate::error::Error;
use crate::ffi::cuda::{moe_device_matrix, moe_device_ptr, moe_device_weights};
use crate::ffi::memory::{check_pointer, dtype, null, read_plain};
use crate::ffi::ranges::Ranges;
use crate::ffi::status::*;
use crate::matrix::extent;

/// The memory of one call. A layer has the most: 29 ranges, those that it refuses included.
pub(super) struct DeviceRegions(Ranges<32>);

/// A matrix of checked extent, whose shape is still to be compared.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Matrix {
    argument: &'static str,
    pub(super) rows: usize,
    pub(super) cols: usize,
    data: DeviceRows,
}

impl Matrix {
    /// The matrix, which has to be `[rows, cols]`.
    pub(super) fn expect(&self, rows: usize, cols: usize) -> Checked<DeviceRows> {
        if (self.rows, self.cols) != (rows, cols) {
            let found = [self.rows, self.cols];
            return Err(Error::shape(self.argument, [rows, cols], found).into());
        }
        Ok(self.data)
    }

    pub(super) fn data(&self) -> DeviceRows {
        self.data
    }

    /// The matrix as biases `[experts, n]`.
    pub(super) fn biases(&self, experts: usize, n: usize) -> Checked<BiasPointers> {
        let rows = self.expect(experts, n)?;
        Ok(BiasPointers {
            ptr: rows.ptr,
            dtype: rows.dtype,
            stride: 1,
            placement: Placement::Strided {
                expert_stride: rows.stride,
            },
        })
    }

    /// Whether both are the very same memory in the same format.
    fn is(&self, other: &Self) -> bool {
        (self.rows, self.cols, self.data) == (other.rows, other.cols, other.data)
    }
}

/// Weights of checked extent, whose shape is still to be compared.
#[derive(Clone, Copy)]
pub(super) struct Weights {
    argument: &'static str,
    pub(super) experts: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
    data: WeightPointers,
}

impl Weights {
    /// The weights, which have to be `[experts, rows, cols]`.
    pub(super) fn expect(
        &self,
        experts: usize,
        rows: usize,
        cols: usize,
    ) -> Checked<WeightPointers> {
        let (expected, found) = ([experts, rows, cols], [self.experts, self.rows, self.cols]);
        if expected != found {
            return Err(Error::shape(self.argument, expected, found).into());
        }
        Ok(self.data)
    }
}

/// An array as C gives it: an address and a number of elements.
#[derive(Clone, Copy)]
pub(super) struct Array {
    pub(super) argument: &'static str,
    data: moe_device_ptr,
    len: usize,
    /// Bytes of an element.
    size: usize,
    align: usize,
}

impl Array {
    /// Elements of four bytes: f32, int32 or uint32.
    pub(super) fn of(argument: &'static str, data: moe_device_ptr, len: usize) -> Self {
        let (size, align) = (4, 4);
        Self {
            argument,
            data,
            len,
            size,
            align,
        }
    }

    /// Bytes that begin at a multiple of `align`.
    pub(super) fn bytes(
        argument: &'static str,
        data: moe_device_ptr,
        len: usize,
        align: usize,
    ) -> Self {
        Self {
            argument,
            data,
            len,
            size: 1,
            align,
        }
    }

    pub(super) fn is_absent(&self) -> bool {
        self.data == 0 && self.len == 0
    }

    /// Refuses an array that the call has no use for.
    pub(super) fn must_be_absent(&self, why: &'static str) -> Checked {
        match self.is_absent() {
            true => Ok(()),
            false => Err(Fault::value(self.argument, why, "an array")),
        }
    }

    /// An array that is read, of exactly `len` elements.
    pub(super) fn exactly(&self, regions: &mut DeviceRegions, len: usize) -> Checked<DevicePtr> {
        if self.len != len {
            return Err(Error::shape(self.argument, [len], [self.len]).into());
        }
        self.used(regions, len, false)
    }

    /// As [`Self::exactly`], or absent.
    pub(super) fn exactly_or_absent(
        &self,
        regions: &mut DeviceRegions,
        len: usize,
    ) -> Checked<DevicePtr> {
        match self.is_absent() {
            true => Ok(DevicePtr::NULL),
            false => self.exactly(regions, len),
        }
    }

    /// An array of at least `len` elements, of which so many are read.
    pub(super) fn at_least(&self, regions: &mut DeviceRegions, len: usize) -> Checked<DevicePtr> {
        self.check_len(len)?;
        self.used(regions, len, false)
    }

    /// An array of at least `len` elements, of which so many are written.
    pub(super) fn written(&self, regions: &mut DeviceRegions, len: usize) -> Checked<DevicePtr> {
        self.check_len(len)?;
        self.used(regions, len, true)
    }

    /// All of it, to be written; how much is needed is asked later, by [`Self::check_len`].
    pub(super) fn scratch(&self, regions: &mut DeviceRegions) -> Checked<DevicePtr> {
        self.used(regions, self.len, true)
    }

    pub(super) fn check_len(&self, needed: usize) -> Checked {
        let (argument, found) = (self.argument, self.len);
        match found < needed {
            true => Err(Error::BufferTooSmall {
                argument,
                needed,
                found,
            }
            .into()),
            false => Ok(()),
        }
    }

    fn used(&self, regions: &mut DeviceRegions, len: usize, written: bool) -> Checked<DevicePtr> {
        let what = self.argument;
        let bytes = len.checked_mul(self.size).ok_or(Error::Overflow { what })?;
        regions.add(what, self.data, bytes, self.align, written)?;
        Ok(DevicePtr(self.data))
    }
}

/// A stride of C, which has to be 0 or more.
fn stride(argument: &'static str, name: &'static str, stride: isize) -> Checked<usize> {
    usize::try_from(stride)
        .map_err(|_| Fault::value(argument, format_args!("{name} of 0 or more"), stride))
}

/// A stride that is walked; of a single element, which may have any, another that overflows nowhere.
fn walked(count: usize, stride: usize, otherwise: usize) -> usize {
    if count > 1 { stride } else { otherwise }
}

/// Elements from the first of `experts` matrices to one past the last.
fn extent_of(
    argument: &'static str,
    [experts, rows, cols]: [usize; 3],
    expert_stride: usize,
    row_stride: usize,
) -> Checked<usize> {
    let overflow = || Error::Overflow { what: argument };
    if rows > 1 && row_stride < cols {
        let expected = format_args!("row_stride of at least {cols}");
        return Err(Fault::value(argument, expected, row_stride));
    }
    let one = extent(rows, cols, row_stride, 1).map_err(|_| overflow())?;
    if experts == 0 || one == 0 {
        return Ok(0);
    }
    let before = (experts - 1).checked_mul(expert_stride);
    Ok(before
        .and_then(|n| n.checked_add(one))
        .ok_or_else(overflow)?)
}

impl DeviceRegions {
    pub(super) fn new() -> Self {
        Self(Ranges::new())
    }

    fn add(
        &mut self,
        argument: &'static str,
        data: moe_device_ptr,
        bytes: usize,
        align: usize,
        written: bool,
    ) -> Checked {
        let address = usize::try_from(data).map_err(|_| Error::Overflow { what: argument })?;
        check_pointer(argument, address, bytes, align)?;
        self.0.add(argument, address, bytes, written)
    }

    /// Checks the memory of a matrix or of several, and remembers it.
    fn elements(
        &mut self,
        argument: &'static str,
        data: moe_device_ptr,
        bytes: usize,
        extent: usize,
        dtype: DType,
        written: bool,
    ) -> Checked {
        let size = dtype.size();
        let needed = extent
            .checked_mul(size)
            .ok_or(Error::Overflow { what: argument })?;
        self.add(argument, data, needed, size, written)?;
        match needed > bytes {
            true => Err(Error::BufferTooSmall {
                argument,
                needed: extent,
                found: bytes / size,
            }
            .into()),
            false => Ok(()),
        }
    }

    /// # Safety
    /// `m` is null or points to a struct.
    unsafe fn read_matrix(
        &mut self,
        argument: &'static str,
        m: *const moe_device_matrix,
        written: bool,
        same_as: Option<&Matrix>,
    ) -> Checked<Option<Matrix>> {
        // SAFETY: this function's contract.
        let Some(m) = unsafe { read_plain(argument, m) }? else {
            return Ok(None);
        };
        if m.reserved != 0 {
            return Err(Fault::value(argument, "reserved = 0", m.reserved));
        }
        let dtype = dtype(argument, m.dtype)?;
        let row_stride = stride(argument, "row_stride", m.row_stride)?;
        let extent = extent_of(argument, [1, m.rows, m.cols], 0, row_stride)?;
        let matrix = Matrix {
            argument,
            rows: m.rows,
            cols: m.cols,
            data: DeviceRows {
                ptr: DevicePtr(m.data),
                stride: walked(m.rows, row_stride, m.cols),
                dtype,
            },
        };
        if !same_as.is_some_and(|other| matrix.is(other)) {
            self.elements(argument, m.data, m.bytes, extent, dtype, written)?;
        }
        Ok(Some(matrix))
    }

    /// A matrix to read.
    ///
    /// # Safety
    /// `m` is null or points to a [`moe_device_matrix`]. So for all functions here.
    pub(super) unsafe fn matrix(
        &mut self,
        argument: &'static str,
        m: *const moe_device_matrix,
    ) -> Checked<Matrix> {
        // SAFETY: this function's contract.
        unsafe { self.read_matrix(argument, m, false, None) }?.ok_or_else(|| null(argument))
    }

    /// A matrix to read, if there is one.
    ///
    /// # Safety
    /// As [`Self::matrix`].
    pub(super) unsafe fn optional_matrix(
        &mut self,
        argument: &'static str,
        m: *const moe_device_matrix,
    ) -> Checked<Option<Matrix>> {
        // SAFETY: this function's contract.
        unsafe { self.read_matrix(argument, m, false, None) }
    }

    /// A matrix to write.
    ///
    /// # Safety
    /// As [`Self::matrix`].
    pub(super) unsafe fn matrix_mut(
        &mut self,
        argument: &'static str,
        m: *const moe_device_matrix,
    ) -> Checked<Matrix> {
        // SAFETY: this function's contract.
        unsafe { self.read_matrix(argument, m, true, None) }?.ok_or_else(|| null(argument))
    }

    /// A residual, if there is one: it may be `out` itself, element for element, but overlap it in no other way.
    ///
    /// # Safety
    /// As [`Self::matrix`].
    pub(super) unsafe fn residual(
        &mut self,
        m: *const moe_device_matrix,
        out: &Matrix,
    ) -> Checked<Option<DeviceRows>> {
        // SAFETY: this function's contract.
        unsafe { self.read_matrix("residual", m, false, Some(out)) }?
            .map(|m| m.expect(out.rows, out.cols))
            .transpose()
    }

    /// Weights, if there are any.
    ///
    /// # Safety
    /// As [`Self::matrix`], with [`moe_device_weights`].
    pub(super) unsafe fn optional_weights(
        &mut self,
        argument: &'static str,
        w: *const moe_device_weights,
    ) -> Checked<Option<Weights>> {
        // SAFETY: this function's contract.
        let Some(w) = unsafe { read_plain(argument, w) }? else {
            return Ok(None);
        };
        if w.reserved != 0 {
            return Err(Fault::value(argument, "reserved = 0", w.reserved));
        }
        let dtype = dtype(argument, w.dtype)?;
        let row_stride = stride(argument, "row_stride", w.row_stride)?;
        let expert_stride = stride(argument, "expert_stride", w.expert_stride)?;
        let shape = [w.experts, w.rows, w.cols];
        let extent = extent_of(argument, shape, expert_stride, row_stride)?;
        self.elements(argument, w.data, w.bytes, extent, dtype, false)?;
        Ok(Some(Weights {
            argument,
            experts: w.experts,
            rows: w.rows,
            cols: w.cols,
            data: WeightPointers {
                ptr: DevicePtr(w.data),
                dtype,
                row_stride: walked(w.rows, row_stride, w.cols),
                placement: Placement::Strided {
                    expert_stride: walked(w.experts, expert_stride, 0),
                },
            },
        }))
    }

    /// Weights.
    ///
    /// # Safety
    /// As [`Self::optional_weights`].
    pub(super) unsafe fn weights(
        &mut self,
        argument: &'static str,
        w: *const moe_device_weights,
    ) -> Checked<Weights> {
        // SAFETY: this function's contract.
        unsafe { self.optional_weights(argument, w) }?.ok_or_else(|| null(argument))
    }

    /// [`MOE_ERROR_OVERLAP`] when a range that is written overlaps another.
    pub(super) fn apart(&self) -> Checked {
        self.0.check()
    }
}
