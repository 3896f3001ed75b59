//! Device memory at the safe level: slices of cudarc, borrowed for one call on one stream.
//!
//! Every operand of a call is a view that was made for the call's stream from whatever is a cudarc slice (`CudaSlice`, `CudaView`, `CudaViewMut`):
//! [`DeviceVec`] for ids, weights and the like, [`DeviceMat`] for matrices of any number format, like the crate's [`MatRef`](crate::MatRef).
//!
//! # Streams and events
//! cudarc, and candle with it, records an event for each read and write of a slice once a context has several streams, and lets a stream wait for the others'
//! events. The views here take part: memory last written on another stream is waited for (on the device), and what a call writes is waited for by the next user. A
//! graph capture cannot wait for events from outside the capture: switch tracking off
//! (`CudaContext::disable_event_tracking`) before capturing, and order the streams yourself.
//!
//! The per-thread default stream, which candle may use, belongs to the calling thread: call from the thread that owns the work.

use super::combine::DeviceRows;
use super::{Cuda, DevicePtr};
use crate::element::{DType, Element};
use crate::error::{Error, Result, checked_mul};
use cudarc::driver::{CudaStream, DevicePtr as Read, DevicePtrMut as Write, SyncOnDrop};
use std::marker::PhantomData;

/// A slice in device memory that a call reads: ids, weights, a bias.
pub struct DeviceVec<'a, T> {
    ptr: DevicePtr,
    len: usize,
    stream: &'a CudaStream,
    _used: SyncOnDrop<'a>,
    kind: PhantomData<&'a T>,
}

/// A slice in device memory that a call writes, or uses as workspace.
pub struct DeviceVecMut<'a, T> {
    ptr: DevicePtr,
    len: usize,
    stream: &'a CudaStream,
    _used: SyncOnDrop<'a>,
    kind: PhantomData<&'a mut T>,
}

impl<'a, T> DeviceVec<'a, T> {
    /// A whole slice, for a call on `stream`.
    pub fn new(stream: &'a CudaStream, slice: &'a impl Read<T>) -> Self {
        let (ptr, used) = slice.device_ptr(stream);
        Self {
            ptr: DevicePtr(ptr),
            len: slice.len(),
            stream,
            _used: used,
            kind: PhantomData,
        }
    }
}

impl<'a, T> DeviceVecMut<'a, T> {
    /// A whole slice, for a call on `stream`.
    pub fn new(stream: &'a CudaStream, slice: &'a mut impl Write<T>) -> Self {
        let len = slice.len();
        let (ptr, used) = slice.device_ptr_mut(stream);
        Self {
            ptr: DevicePtr(ptr),
            len,
            stream,
            _used: used,
            kind: PhantomData,
        }
    }
}

/// What one can ask either kind of slice.
macro_rules! slice_accessors {
    ($slice:ident) => {
        impl<T> $slice<'_, T> {
            /// Its address.
            pub fn ptr(&self) -> DevicePtr {
                self.ptr
            }

            /// Elements.
            pub fn len(&self) -> usize {
                self.len
            }

            /// Whether there are none.
            pub fn is_empty(&self) -> bool {
                self.len == 0
            }

            /// Its address, when it has at least `needed` elements and belongs to the call's stream.
            pub(crate) fn expect(
                &self,
                cuda: &Cuda,
                argument: &'static str,
                stream: &CudaStream,
                needed: usize,
            ) -> Result<DevicePtr> {
                check_len(argument, needed, self.len)?;
                check_stream(cuda, argument, self.stream, stream)?;
                Ok(self.ptr)
            }
        }

        impl<T> core::fmt::Debug for $slice<'_, T> {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(
                    f,
                    "{}({} elements at {:#x})",
                    stringify!($slice),
                    self.len,
                    self.ptr.0
                )
            }
        }
    };
}

slice_accessors!(DeviceVec);
slice_accessors!(DeviceVecMut);

/// Refuses a view of another device or for another stream than the call's.
fn check_stream(
    cuda: &Cuda,
    argument: &'static str,
    found: &CudaStream,
    stream: &CudaStream,
) -> Result<()> {
    cuda.check_context(argument, found.context())?;
    if found.cu_stream() != stream.cu_stream() {
        return Err(Error::value(
            argument,
            "a view made for the stream of the call",
            "one for another stream",
        ));
    }
    Ok(())
}

fn check_len(argument: &'static str, needed: usize, found: usize) -> Result<()> {
    if found < needed {
        return Err(Error::BufferTooSmall {
            argument,
            needed,
            found,
        });
    }
    Ok(())
}

/// What both kinds of view have: `rows` rows of `cols` neighbouring elements, `stride` elements apart.
struct View<'a> {
    ptr: DevicePtr,
    dtype: DType,
    rows: usize,
    cols: usize,
    stride: usize,
    stream: &'a CudaStream,
    _used: SyncOnDrop<'a>,
}

impl<'a> View<'a> {
    fn new(
        (ptr, used): (u64, SyncOnDrop<'a>),
        stream: &'a CudaStream,
        elements: usize,
        dtype: DType,
        [rows, cols, stride]: [usize; 3],
    ) -> Result<Self> {
        if stride < cols && rows > 1 {
            return Err(Error::value(
                "row stride",
                format_args!("at least {cols} columns"),
                stride,
            ));
        }
        let needed = match (rows, cols) {
            (0, _) | (_, 0) => 0,
            _ => checked_mul(rows - 1, stride, "a device matrix")?
                .checked_add(cols)
                .ok_or(Error::Overflow {
                    what: "a device matrix",
                })?,
        };
        check_len("device matrix", needed, elements)?;
        let ptr = DevicePtr(ptr);
        if !ptr.is_aligned(dtype.size() as u64) {
            return Err(Error::value(
                "device matrix",
                format_args!("an address that is a multiple of {}", dtype.size()),
                ptr.0,
            ));
        }
        Ok(Self {
            ptr,
            dtype,
            rows,
            cols,
            stride,
            stream,
            _used: used,
        })
    }
}

/// A matrix in device memory that a call reads, of any format. Rows are `stride` elements apart, columns are neighbours.
pub struct DeviceMat<'a>(View<'a>);

/// A matrix in device memory that a call writes, of any format.
pub struct DeviceMatMut<'a>(View<'a>);

impl<'a> DeviceMat<'a> {
    /// The first `rows · cols` elements of a slice, row after row, for a call on `stream`.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`].
    pub fn new<T: Element>(
        stream: &'a CudaStream,
        slice: &'a impl Read<T>,
        rows: usize,
        cols: usize,
    ) -> Result<Self> {
        Self::strided(stream, slice, rows, cols, cols)
    }

    /// The same with rows `stride` elements apart.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`]; [`Error::Value`] when rows would overlap.
    pub fn strided<T: Element>(
        stream: &'a CudaStream,
        slice: &'a impl Read<T>,
        rows: usize,
        cols: usize,
        stride: usize,
    ) -> Result<Self> {
        let at = slice.device_ptr(stream);
        View::new(at, stream, slice.len(), T::DTYPE, [rows, cols, stride]).map(Self)
    }

    /// A matrix of `dtype` in a slice of bytes, for those who build cudarc without its feature `f16`.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`]; [`Error::Value`] when the address is not a multiple of the element's size.
    pub fn from_bytes(
        stream: &'a CudaStream,
        slice: &'a impl Read<u8>,
        dtype: DType,
        rows: usize,
        cols: usize,
    ) -> Result<Self> {
        let at = slice.device_ptr(stream);
        View::new(
            at,
            stream,
            slice.len() / dtype.size(),
            dtype,
            [rows, cols, cols],
        )
        .map(Self)
    }
}

impl<'a> DeviceMatMut<'a> {
    /// The first `rows · cols` elements of a slice, row after row, for a call on `stream`.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`].
    pub fn new<T: Element>(
        stream: &'a CudaStream,
        slice: &'a mut impl Write<T>,
        rows: usize,
        cols: usize,
    ) -> Result<Self> {
        Self::strided(stream, slice, rows, cols, cols)
    }

    /// The same with rows `stride` elements apart.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`]; [`Error::Value`] when rows would overlap.
    pub fn strided<T: Element>(
        stream: &'a CudaStream,
        slice: &'a mut impl Write<T>,
        rows: usize,
        cols: usize,
        stride: usize,
    ) -> Result<Self> {
        let elements = slice.len();
        let at = slice.device_ptr_mut(stream);
        View::new(at, stream, elements, T::DTYPE, [rows, cols, stride]).map(Self)
    }

    /// A matrix of `dtype` in a slice of bytes, for those who build cudarc without its feature `f16`.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`]; [`Error::Value`] when the address is not a multiple of the element's size.
    pub fn from_bytes(
        stream: &'a CudaStream,
        slice: &'a mut impl Write<u8>,
        dtype: DType,
        rows: usize,
        cols: usize,
    ) -> Result<Self> {
        let elements = slice.len() / dtype.size();
        let at = slice.device_ptr_mut(stream);
        View::new(at, stream, elements, dtype, [rows, cols, cols]).map(Self)
    }
}

/// What one can ask either kind of view.
macro_rules! accessors {
    ($view:ident) => {
        impl $view<'_> {
            /// Its address.
            pub fn ptr(&self) -> DevicePtr {
                self.0.ptr
            }

            /// The format of its elements.
            pub fn dtype(&self) -> DType {
                self.0.dtype
            }

            /// Rows.
            pub fn rows(&self) -> usize {
                self.0.rows
            }

            /// Columns.
            pub fn cols(&self) -> usize {
                self.0.cols
            }

            /// Elements from one row to the next.
            pub fn stride(&self) -> usize {
                self.0.stride
            }

            /// The same as plain data.
            pub fn as_rows(&self) -> DeviceRows {
                DeviceRows {
                    ptr: self.0.ptr,
                    stride: self.0.stride,
                    dtype: self.0.dtype,
                }
            }

            /// Refuses another shape, another stream than the call's, another device.
            pub(crate) fn expect(
                &self,
                cuda: &Cuda,
                argument: &'static str,
                stream: &CudaStream,
                rows: usize,
                cols: usize,
            ) -> Result<()> {
                if (self.0.rows, self.0.cols) != (rows, cols) {
                    return Err(Error::shape(
                        argument,
                        [rows, cols],
                        [self.0.rows, self.0.cols],
                    ));
                }
                check_stream(cuda, argument, self.0.stream, stream)
            }
        }

        impl core::fmt::Debug for $view<'_> {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                let View {
                    ptr,
                    dtype,
                    rows,
                    cols,
                    stride,
                    ..
                } = &self.0;
                write!(
                    f,
                    "{}({dtype} [{rows}, {cols}], stride {stride}, at {:#x})",
                    stringify!($view),
                    ptr.0
                )
            }
        }
    };
}

accessors!(DeviceMat);
accessors!(DeviceMatMut);
