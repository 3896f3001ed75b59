//! Memory that several threads write, each its own part.
#![allow(unsafe_code)] // the one shim for disjoint parallel writes

use crate::element::Element;
use crate::matrix::MatMut;
use core::marker::PhantomData;
use core::ops::Range;

/// A mutable slice that can be copied to every worker. Workers promise, by `unsafe`, to touch disjoint elements.
pub(crate) struct SharedSlice<'a, T> {
    first: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: a SharedSlice only hands out elements through unsafe functions whose contract is that no two threads touch the same one.
unsafe impl<T: Send> Send for SharedSlice<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedSlice<'_, T> {}

impl<'a, T> SharedSlice<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self {
            first: slice.as_mut_ptr(),
            len: slice.len(),
            borrow: PhantomData,
        }
    }

    /// The elements of `range`; panics when it is outside.
    ///
    /// # Safety
    /// While the result lives, nobody else uses an element of `range`.
    #[allow(clippy::mut_from_ref)] // the point of the type
    pub(crate) unsafe fn range(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: inside the borrowed slice by the assertion, and unshared by the caller's contract.
        unsafe {
            core::slice::from_raw_parts_mut(self.first.add(range.start), range.end - range.start)
        }
    }

    /// Sets element `i`; panics when it is outside.
    ///
    /// # Safety
    /// Nobody else uses element `i` at the same time.
    #[inline(always)]
    pub(crate) unsafe fn set(&self, i: usize, value: T) {
        assert!(i < self.len);
        // SAFETY: inside the borrowed slice by the assertion, and unshared by the caller's contract.
        unsafe { *self.first.add(i) = value }
    }
}

/// A writable matrix that can be copied to every worker; each writes its own rows.
pub(crate) struct SharedRows<'a, T> {
    first: *mut T,
    rows: usize,
    cols: usize,
    row_stride: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: rows are only handed out by `row`, whose contract is that no two threads hold the same one.
unsafe impl<T: Send> Send for SharedRows<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedRows<'_, T> {}

impl<'a, T: Element> SharedRows<'a, T> {
    pub(crate) fn new(mut matrix: MatMut<'a, T>) -> Self {
        let (first, row_stride) = matrix.as_raw();
        Self {
            first,
            rows: matrix.rows(),
            cols: matrix.cols(),
            row_stride,
            borrow: PhantomData,
        }
    }

    /// Row `i`; panics when it is outside.
    ///
    /// # Safety
    /// While the result lives, nobody else uses row `i`.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)] // the point of the type
    pub(crate) unsafe fn row(&self, i: usize) -> &mut [T] {
        assert!(i < self.rows);
        if self.cols == 0 {
            return &mut [];
        }
        // SAFETY: MatMut checked that every row lies inside its memory and that rows do not overlap; the caller has row i alone.
        unsafe { core::slice::from_raw_parts_mut(self.first.add(i * self.row_stride), self.cols) }
    }
}
