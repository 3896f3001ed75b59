//! One tensor for each expert: tables of addresses at the safe level, for frameworks that keep experts apart.
//!
//! A [`TensorTable`] is made once, at load: it copies the addresses of E tensors of one shape to the device and keeps the tensors. Calls then take a
//! [view](TensorTable::view) of it wherever they take all experts' weights as one matrix ([`WeightViews`]).
//!
//! # Streams and events
//! A table's events stand for those of its tensors (see [`memory`](super::memory)): its addresses are written behind whatever wrote the tensors, so a stream that waits for the
//! addresses waits for the tensors; and when the table ends, each tensor is marked as read behind the last call that read the addresses.

use super::{Cuda, DeviceMat, DevicePtr, DeviceVec};
use crate::cuda::launch::driver_error;
use crate::element::{DType, Element};
use crate::error::{Error, Result, checked_mul};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr as Read, DevicePtrMut as _};
use std::marker::PhantomData;
use std::sync::Arc;

/// E tensors `[N, K]` of one format, each in device memory of its own, and their addresses in device memory. `S` is a slice of cudarc: a `CudaSlice<T>` that the table owns, or a
/// `CudaView<T>` of one that it borrows.
///
/// ```no_run
/// use moe_kernels::cuda::{Cuda, TensorTable};
/// let cuda = Cuda::new(0)?;
/// let stream = cuda.context().default_stream();
/// # fn fine<T>(r: Result<T, cudarc::driver::DriverError>) -> T { r.unwrap() }
/// let (experts, n, k) = (8, 64, 32);
/// let tensors = (0..experts).map(|_| fine(stream.alloc_zeros::<f32>(n * k))).collect();
/// let table = TensorTable::new(&stream, tensors, n, k)?; // at load; calls take `table.view(&stream)`
/// assert_eq!(table.len(), experts);
/// # Ok::<(), moe_kernels::Error>(())
/// ```
pub struct TensorTable<T, S: Read<T>> {
    tensors: Vec<S>,
    /// `[max(E, 1)]`: the driver refuses an empty allocation.
    addresses: CudaSlice<u64>,
    stream: Arc<CudaStream>,
    dtype: DType,
    n: usize,
    k: usize,
    /// The largest power of two that divides all addresses, up to 256.
    alignment: usize,
    kind: PhantomData<fn(T)>,
}

impl<T: Element, S: Read<T>> TensorTable<T, S> {
    /// The table of `tensors`, each the first `n · k` elements of its slice, row after row. Allocates E · 8 bytes on the device and copies to them on `stream`: for load time, not
    /// for a call or a graph capture.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`] naming `tensors` when one is shorter; [`Error::Value`] when one belongs to another context than the stream; what the driver says.
    pub fn new(stream: &Arc<CudaStream>, tensors: Vec<S>, n: usize, k: usize) -> Result<Self> {
        Self::build(
            stream,
            tensors,
            T::DTYPE,
            n,
            k,
            checked_mul(n, k, "tensors")?,
        )
    }
}

impl<S: Read<u8>> TensorTable<u8, S> {
    /// The same for tensors of `dtype` in slices of bytes, for those who build cudarc without its feature `f16`.
    ///
    /// # Errors
    /// As [`new`](Self::new); [`Error::Value`] when an address is not a multiple of the element's size.
    pub fn from_bytes(
        stream: &Arc<CudaStream>,
        tensors: Vec<S>,
        dtype: DType,
        n: usize,
        k: usize,
    ) -> Result<Self> {
        let bytes = checked_mul(checked_mul(n, k, "tensors")?, dtype.size(), "tensors")?;
        Self::build(stream, tensors, dtype, n, k, bytes)
    }
}

impl<T, S: Read<T>> TensorTable<T, S> {
    /// `needed`: the elements that a slice must have.
    fn build(
        stream: &Arc<CudaStream>,
        tensors: Vec<S>,
        dtype: DType,
        n: usize,
        k: usize,
        needed: usize,
    ) -> Result<Self> {
        let mut addresses = Vec::with_capacity(tensors.len().max(1));
        for tensor in &tensors {
            if tensor.len() < needed {
                return Err(Error::BufferTooSmall {
                    argument: "tensors",
                    needed,
                    found: tensor.len(),
                });
            }
            if tensor.stream().context() != stream.context() {
                let expected = "slices of the stream's context";
                return Err(Error::value("tensors", expected, "one of another context"));
            }
            // The stream waits for the tensor's last write; the copy below is behind that.
            addresses.push(tensor.device_ptr(stream).0);
        }
        let bits = addresses.iter().fold(256, |all, address| all | address);
        let alignment = 1usize << bits.trailing_zeros();
        if alignment < dtype.size() {
            return Err(Error::value(
                "tensors",
                format_args!("addresses at multiples of {} bytes", dtype.size()),
                format_args!("multiples of {alignment}"),
            ));
        }
        if addresses.is_empty() {
            addresses.push(0);
        }
        let addresses = stream
            .clone_htod(&addresses)
            .map_err(|e| driver_error("cuMemcpyHtoDAsync", e))?;
        Ok(Self {
            tensors,
            addresses,
            stream: Arc::clone(stream),
            dtype,
            n,
            k,
            alignment,
            kind: PhantomData,
        })
    }

    /// E
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// The tensors.
    pub fn tensors(&self) -> &[S] {
        &self.tensors
    }

    /// The tensors, which are free again once the calls queued so far have run.
    pub fn into_tensors(mut self) -> Vec<S> {
        self.release();
        std::mem::take(&mut self.tensors)
    }

    /// The table for a call on `stream`.
    pub fn view<'a>(&'a self, stream: &'a CudaStream) -> DeviceTable<'a> {
        DeviceTable {
            addresses: DeviceVec::new(stream, &self.addresses),
            experts: self.tensors.len(),
            dtype: self.dtype,
            n: self.n,
            k: self.k,
            alignment: self.alignment,
        }
    }

    /// Marks each tensor as read behind everything that read the addresses.
    fn release(&mut self) {
        drop(self.addresses.device_ptr_mut(&self.stream)); // waits for the readers of the addresses
        for tensor in &self.tensors {
            drop(tensor.device_ptr(&self.stream)); // records the read
        }
    }
}

impl<T, S: Read<T>> Drop for TensorTable<T, S> {
    fn drop(&mut self) {
        self.release();
    }
}

impl<T, S: Read<T>> core::fmt::Debug for TensorTable<T, S> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let Self {
            tensors,
            dtype,
            n,
            k,
            alignment,
            ..
        } = self;
        write!(
            f,
            "TensorTable({} of {dtype} [{n}, {k}] at multiples of {alignment} bytes)",
            tensors.len()
        )
    }
}

/// A [`TensorTable`] that a call reads, with the tensors that it leads to.
#[derive(Debug)]
pub struct DeviceTable<'a> {
    addresses: DeviceVec<'a, u64>,
    experts: usize,
    dtype: DType,
    n: usize,
    k: usize,
    alignment: usize,
}

impl DeviceTable<'_> {
    /// The address of the addresses, u64 `[E]`.
    pub fn ptr(&self) -> DevicePtr {
        self.addresses.ptr()
    }

    /// E
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// The format of the tensors' elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// N: rows of a tensor.
    pub fn rows(&self) -> usize {
        self.n
    }

    /// K: columns of a tensor, and elements from one row to the next.
    pub fn cols(&self) -> usize {
        self.k
    }

    /// Bytes that all tensors' addresses are multiples of, a power of two.
    pub fn alignment(&self) -> usize {
        self.alignment
    }

    /// Refuses another number of tensors or another shape, another stream than the call's, another device.
    pub(super) fn expect(
        &self,
        cuda: &Cuda,
        argument: &'static str,
        stream: &CudaStream,
        shape: [usize; 3],
    ) -> Result<()> {
        let found = [self.experts, self.n, self.k];
        if found != shape {
            return Err(Error::shape(argument, shape, found));
        }
        self.addresses
            .expect(cuda, argument, stream, self.experts)
            .map(drop)
    }
}

/// All experts' weights, or their biases, in either form.
#[derive(Debug)]
#[non_exhaustive]
#[allow(clippy::large_enum_variant)] // made once for a call, on the stack; a box would allocate
pub enum WeightViews<'a> {
    /// One tensor `[E, N, K]`, given as the matrix `[E·N, K]` that it is in memory.
    Stacked(DeviceMat<'a>),
    /// A tensor `[N, K]` for each expert.
    Table(DeviceTable<'a>),
}

impl<'a> From<DeviceMat<'a>> for WeightViews<'a> {
    fn from(stacked: DeviceMat<'a>) -> Self {
        Self::Stacked(stacked)
    }
}

impl<'a> From<DeviceTable<'a>> for WeightViews<'a> {
    fn from(table: DeviceTable<'a>) -> Self {
        Self::Table(table)
    }
}
