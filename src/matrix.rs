//! Strided views of the caller's memory. Bounds are checked when a view is made, so that kernels need not check again.

use crate::element::{DType, Element};
use crate::error::{Error, Result};
use half::{bf16, f16};

/// A read-only matrix: element (i, j) is `data[i·row_stride + j·col_stride]`.
///
/// Any non-negative strides are allowed, zero and overlapping rows included.
#[derive(Clone, Copy, Debug)]
pub struct MatRef<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T: Element> MatRef<'a, T> {
    /// A row-major matrix without gaps.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`] or [`Error::Overflow`].
    ///
    /// ```
    /// use moe_kernels::MatRef;
    /// let m = MatRef::new(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], 2, 3)?;
    /// assert_eq!(m.get(1, 0), Some(4.0));
    /// assert_eq!(m.transposed().get(0, 1), Some(4.0));
    /// # Ok::<(), moe_kernels::Error>(())
    /// ```
    #[inline]
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Result<Self> {
        Self::with_strides(data, rows, cols, cols, 1)
    }

    /// A matrix with strides, in elements.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`] or [`Error::Overflow`].
    #[inline]
    pub fn with_strides(
        data: &'a [T],
        rows: usize,
        cols: usize,
        row_stride: usize,
        col_stride: usize,
    ) -> Result<Self> {
        let needed = extent(rows, cols, row_stride, col_stride)?;
        if data.len() < needed {
            return Err(Error::BufferTooSmall {
                argument: "matrix data",
                needed,
                found: data.len(),
            });
        }
        // The stride of a single row or column leads nowhere and may be anything: it is kept so small that no product with it overflows.
        let stride = |stride: usize| stride.min(needed);
        Ok(Self {
            data,
            rows,
            cols,
            row_stride: stride(row_stride),
            col_stride: stride(col_stride),
        })
    }

    /// Number of rows.
    #[inline]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    #[inline]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Element (i, j), or `None` outside the matrix.
    pub fn get(&self, i: usize, j: usize) -> Option<T> {
        (i < self.rows && j < self.cols)
            .then(|| self.data[i * self.row_stride + j * self.col_stride])
    }

    /// The transpose; no element moves.
    pub fn transposed(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// Rows `start, start + step, …`, `count` of them: halves of a fused matrix (`step` 1), or its interleaved rows (`step` 2).
    ///
    /// # Errors
    /// [`Error::Value`] when the last row is outside, or `step` is zero.
    pub fn rows_from(self, start: usize, step: usize, count: usize) -> Result<Self> {
        let inside = count == 0
            || (count - 1)
                .checked_mul(step)
                .and_then(|d| d.checked_add(start))
                .is_some_and(|last| last < self.rows);
        if step == 0 || !inside {
            return Err(Error::value(
                "rows",
                format!(
                    "{start} + i·{step} for i < {count} inside {} rows",
                    self.rows
                ),
                "a row outside",
            ));
        }
        let (offset, row_stride) = match count {
            0 => (0, 0),
            1 => (start * self.row_stride, self.row_stride),
            _ => (start * self.row_stride, self.row_stride * step),
        };
        Ok(Self {
            data: &self.data[offset..],
            rows: count,
            row_stride,
            ..self
        })
    }

    /// Row `i` as a slice when its elements are neighbours. Panics inside the crate only: `i` is checked by callers.
    #[inline]
    pub(crate) fn row_slice(&self, i: usize) -> Option<&'a [T]> {
        (self.col_stride == 1 || self.cols <= 1).then(|| {
            let start = i * self.row_stride;
            &self.data[start..start + self.cols]
        })
    }

    /// First element, row stride and column stride: what a kernel reads by.
    pub(crate) fn as_raw(&self) -> (*const u8, usize, usize) {
        (self.data.as_ptr().cast(), self.row_stride, self.col_stride)
    }

    /// Copies columns `start .. start + out.len()` of row `i`, widened to f32.
    #[inline]
    pub(crate) fn widen_row(&self, i: usize, start: usize, out: &mut [f32]) {
        if let Some(row) = self.row_slice(i) {
            widen(&row[start..start + out.len()], out);
        } else {
            let base = i * self.row_stride;
            for (j, o) in out.iter_mut().enumerate() {
                *o = self.data[base + (start + j) * self.col_stride].to_f32();
            }
        }
    }
}

/// `out[j] = src[j]` in f32. Uses the conversion instructions of the CPU for f16 where it has them.
#[inline]
fn widen<T: Element>(src: &[T], out: &mut [f32]) {
    use half::slice::HalfFloatSliceExt;
    match T::DTYPE {
        DType::F32 => out.copy_from_slice(bytemuck::cast_slice(src)),
        DType::F16 => bytemuck::cast_slice::<T, f16>(src).convert_to_f32_slice(out),
        DType::BF16 => {
            for (o, s) in out.iter_mut().zip(bytemuck::cast_slice::<T, u16>(src)) {
                *o = f32::from_bits(u32::from(*s) << 16);
            }
        }
    }
}

/// Elements that a matrix spans from its first to one past its last.
#[inline]
pub(crate) fn extent(
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
) -> Result<usize> {
    if rows == 0 || cols == 0 {
        return Ok(0);
    }
    let overflow = Error::Overflow {
        what: "matrix extent",
    };
    let last_row = (rows - 1).checked_mul(row_stride);
    let last_col = (cols - 1).checked_mul(col_stride);
    last_row
        .zip(last_col)
        .and_then(|(r, c)| r.checked_add(c))
        .and_then(|last| last.checked_add(1))
        .filter(|&n| n <= isize::MAX as usize)
        .ok_or(overflow)
}

/// A writable matrix whose rows are contiguous and do not overlap.
#[derive(Debug)]
pub struct MatMut<'a, T> {
    data: &'a mut [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a, T: Element> MatMut<'a, T> {
    /// A row-major matrix without gaps.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`] or [`Error::Overflow`].
    pub fn new(data: &'a mut [T], rows: usize, cols: usize) -> Result<Self> {
        Self::with_row_stride(data, rows, cols, cols)
    }

    /// A row-major matrix whose rows begin `row_stride` elements apart.
    ///
    /// # Errors
    /// [`Error::Value`] when rows would overlap; [`Error::BufferTooSmall`] or [`Error::Overflow`].
    pub fn with_row_stride(
        data: &'a mut [T],
        rows: usize,
        cols: usize,
        row_stride: usize,
    ) -> Result<Self> {
        if rows > 1 && row_stride < cols {
            return Err(Error::value(
                "row_stride",
                format!("at least {cols}, so that rows do not overlap"),
                row_stride,
            ));
        }
        let needed = extent(rows, cols, row_stride, 1)?;
        if data.len() < needed {
            return Err(Error::BufferTooSmall {
                argument: "matrix data",
                needed,
                found: data.len(),
            });
        }
        Ok(Self {
            data,
            rows,
            cols,
            row_stride: row_stride.min(needed), // as in `MatRef`: that of a single row may be anything
        })
    }

    /// Number of rows.
    #[inline]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    #[inline]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Row `i`; panics when it is outside.
    pub fn row_mut(&mut self, i: usize) -> &mut [T] {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        let start = i * self.row_stride;
        &mut self.data[start..start + self.cols]
    }

    /// A shorter-lived view of the same matrix.
    pub fn reborrow(&mut self) -> MatMut<'_, T> {
        MatMut {
            data: self.data,
            rows: self.rows,
            cols: self.cols,
            row_stride: self.row_stride,
        }
    }

    /// First element and row stride: what a kernel that writes disjoint blocks from several threads needs.
    pub(crate) fn as_raw(&mut self) -> (*mut T, usize) {
        (self.data.as_mut_ptr(), self.row_stride)
    }
}

/// A read-only matrix of any [`DType`].
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum AnyMatRef<'a> {
    /// f32 elements.
    F32(MatRef<'a, f32>),
    /// f16 elements.
    F16(MatRef<'a, f16>),
    /// bf16 elements.
    BF16(MatRef<'a, bf16>),
}

/// A writable matrix of any [`DType`].
#[derive(Debug)]
#[non_exhaustive]
pub enum AnyMatMut<'a> {
    /// f32 elements.
    F32(MatMut<'a, f32>),
    /// f16 elements.
    F16(MatMut<'a, f16>),
    /// bf16 elements.
    BF16(MatMut<'a, bf16>),
}

/// Runs one expression for whichever element type an [`AnyMatRef`] or [`AnyMatMut`] holds.
macro_rules! with_matrix {
    ($any:expr, $m:ident => $body:expr) => {
        match $any {
            Self::F32($m) => $body,
            Self::F16($m) => $body,
            Self::BF16($m) => $body,
        }
    };
}

impl<'a> AnyMatRef<'a> {
    /// Number of rows.
    #[inline]
    pub fn rows(&self) -> usize {
        with_matrix!(self, m => m.rows())
    }

    /// Number of columns.
    #[inline]
    pub fn cols(&self) -> usize {
        with_matrix!(self, m => m.cols())
    }

    /// The element format.
    pub fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::F16(_) => DType::F16,
            Self::BF16(_) => DType::BF16,
        }
    }

    /// The transpose; no element moves.
    pub fn transposed(self) -> Self {
        match self {
            Self::F32(m) => m.transposed().into(),
            Self::F16(m) => m.transposed().into(),
            Self::BF16(m) => m.transposed().into(),
        }
    }

    /// See [`MatRef::rows_from`].
    ///
    /// # Errors
    /// As there.
    pub fn rows_from(self, start: usize, step: usize, count: usize) -> Result<Self> {
        Ok(match self {
            Self::F32(m) => m.rows_from(start, step, count)?.into(),
            Self::F16(m) => m.rows_from(start, step, count)?.into(),
            Self::BF16(m) => m.rows_from(start, step, count)?.into(),
        })
    }

    /// Columns `start .. start + out.len()` of row `i` in f32.
    #[inline]
    pub(crate) fn widen_row(&self, i: usize, start: usize, out: &mut [f32]) {
        with_matrix!(self, m => m.widen_row(i, start, out))
    }

    /// See [`MatRef::as_raw`].
    pub(crate) fn as_raw(&self) -> (*const u8, usize, usize) {
        with_matrix!(self, m => m.as_raw())
    }

    /// [`Error::Shape`] unless the matrix is `rows × cols`.
    #[inline]
    pub(crate) fn expect(&self, argument: &'static str, rows: usize, cols: usize) -> Result<()> {
        if (self.rows(), self.cols()) == (rows, cols) {
            Ok(())
        } else {
            Err(Error::shape(
                argument,
                [rows, cols],
                [self.rows(), self.cols()],
            ))
        }
    }
}

impl AnyMatMut<'_> {
    /// Number of rows.
    #[inline]
    pub fn rows(&self) -> usize {
        with_matrix!(self, m => m.rows())
    }

    /// Number of columns.
    #[inline]
    pub fn cols(&self) -> usize {
        with_matrix!(self, m => m.cols())
    }

    /// The element format.
    pub fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::F16(_) => DType::F16,
            Self::BF16(_) => DType::BF16,
        }
    }

    /// A shorter-lived view of the same matrix.
    pub fn reborrow(&mut self) -> AnyMatMut<'_> {
        match self {
            Self::F32(m) => AnyMatMut::F32(m.reborrow()),
            Self::F16(m) => AnyMatMut::F16(m.reborrow()),
            Self::BF16(m) => AnyMatMut::BF16(m.reborrow()),
        }
    }

    /// [`Error::Shape`] unless the matrix is `rows × cols`.
    #[inline]
    pub(crate) fn expect(&self, argument: &'static str, rows: usize, cols: usize) -> Result<()> {
        if (self.rows(), self.cols()) == (rows, cols) {
            Ok(())
        } else {
            Err(Error::shape(
                argument,
                [rows, cols],
                [self.rows(), self.cols()],
            ))
        }
    }
}

macro_rules! any_from {
    ($t:ty, $variant:ident) => {
        impl<'a> From<MatRef<'a, $t>> for AnyMatRef<'a> {
            #[inline]
            fn from(m: MatRef<'a, $t>) -> Self {
                Self::$variant(m)
            }
        }
        impl<'a> From<MatMut<'a, $t>> for AnyMatMut<'a> {
            #[inline]
            fn from(m: MatMut<'a, $t>) -> Self {
                Self::$variant(m)
            }
        }
    };
}
any_from!(f32, F32);
any_from!(f16, F16);
any_from!(bf16, BF16);
