//! Candle's CUDA storages and layouts as the addresses of a plan. No element moves.

use crate::view::rows_of;
use candle_core::backend::BackendStorage;
use candle_core::cuda::CudaStorageSlice as Slice;
use candle_core::cuda::cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr as Read, DevicePtrMut as Write, SyncOnDrop,
};
use candle_core::{CudaStorage, Layout, Result, bail};
use moe_kernels::DType as Format;
use moe_kernels::cuda::DevicePtr;
use moe_kernels::cuda::combine::DeviceRows;
use moe_kernels::cuda::grouped_gemm::Placement;
use moe_kernels::cuda::moe::WeightPointers;

/// The storages of one call, and cudarc's note of their use: what other streams do with them waits for this call, and this call for them, where cudarc keeps track.
/// To be dropped when everything is queued.
pub(super) struct Operands<'a> {
    stream: &'a CudaStream,
    used: Vec<SyncOnDrop<'a>>,
}

/// All elements of a storage.
struct Elements {
    ptr: DevicePtr,
    len: usize,
    format: Format,
}

impl Elements {
    /// The address of the first element that a layout sees, once the last one is inside.
    fn at(&self, argument: &str, layout: &Layout, extent: Option<usize>) -> Result<DevicePtr> {
        let start = layout.start_offset();
        let end = extent.and_then(|n| start.checked_add(n));
        if end.is_none_or(|end| end > self.len) {
            bail!(
                "{argument}: shape {:?} with strides {:?} at {start} is outside its storage of {} elements",
                layout.dims(),
                layout.stride(),
                self.len
            );
        }
        Ok(self.ptr.add((start * self.format.size()) as u64))
    }

    /// `[.., C]` as a matrix of all its rows, and their number.
    fn rows(&self, argument: &str, layout: &Layout) -> Result<(usize, DeviceRows)> {
        let r = rows_of(argument, layout)?;
        if r.cols > 1 && r.rows > 0 && r.col_stride != 1 {
            bail!(
                "{argument}: expected rows without gaps on a GPU, got strides {:?}; call contiguous() on it first",
                layout.stride()
            );
        }
        if r.rows > 1 && r.row_stride < r.cols {
            bail!(
                "{argument}: expected rows that do not overlap on a GPU, got strides {:?}; call contiguous() on it first",
                layout.stride()
            );
        }
        let rows = DeviceRows {
            ptr: self.at(
                argument,
                layout,
                extent([(r.rows, r.row_stride), (r.cols, 1)]),
            )?,
            stride: r.row_stride,
            dtype: self.format,
        };
        Ok((r.rows, rows))
    }
}

/// Elements from the first to behind the last of so many in each dimension, so far apart; 0 when there are none.
fn extent<const N: usize>(dims: [(usize, usize); N]) -> Option<usize> {
    if dims.iter().any(|&(size, _)| size == 0) {
        return Some(0);
    }
    dims.iter().try_fold(1usize, |n, &(size, stride)| {
        n.checked_add((size - 1).checked_mul(stride)?)
    })
}

impl<'a> Operands<'a> {
    pub fn new(stream: &'a CudaStream) -> Self {
        Self {
            stream,
            used: Vec::with_capacity(12),
        }
    }

    fn slice<T>(&mut self, slice: &'a CudaSlice<T>) -> (DevicePtr, usize) {
        let (address, used) = slice.device_ptr(self.stream);
        self.used.push(used);
        (DevicePtr(address), slice.len())
    }

    fn slice_mut<T>(&mut self, slice: &'a mut CudaSlice<T>) -> (DevicePtr, usize) {
        let len = slice.len();
        let (address, used) = slice.device_ptr_mut(self.stream);
        self.used.push(used);
        (DevicePtr(address), len)
    }

    fn elements(&mut self, argument: &str, storage: &'a CudaStorage) -> Result<Elements> {
        let ((ptr, len), format) = match &storage.slice {
            Slice::F32(slice) => (self.slice(slice), Format::F32),
            Slice::F16(slice) => (self.slice(slice), Format::F16),
            Slice::BF16(slice) => (self.slice(slice), Format::BF16),
            _ => bail!(
                "{argument}: expected f32, f16 or bf16, got {:?}",
                storage.dtype()
            ),
        };
        Ok(Elements { ptr, len, format })
    }

    /// A tensor `[.., C]` as a matrix of all its rows, and their number.
    pub fn rows(
        &mut self,
        argument: &str,
        storage: &'a CudaStorage,
        layout: &Layout,
    ) -> Result<(usize, DeviceRows)> {
        self.elements(argument, storage)?.rows(argument, layout)
    }

    /// The same of a tensor to be written.
    pub fn rows_mut(
        &mut self,
        argument: &str,
        storage: &'a mut CudaStorage,
        layout: &Layout,
    ) -> Result<(usize, DeviceRows)> {
        let dtype = storage.dtype();
        let ((ptr, len), format) = match &mut storage.slice {
            Slice::F32(slice) => (self.slice_mut(slice), Format::F32),
            Slice::F16(slice) => (self.slice_mut(slice), Format::F16),
            Slice::BF16(slice) => (self.slice_mut(slice), Format::BF16),
            _ => bail!("{argument}: expected f32, f16 or bf16, got {dtype:?}"),
        };
        Elements { ptr, len, format }.rows(argument, layout)
    }

    /// A tensor `[E, N, K]` whose rows of K are without gaps.
    pub fn weights(
        &mut self,
        argument: &str,
        storage: &'a CudaStorage,
        layout: &Layout,
    ) -> Result<WeightPointers> {
        let (&[e, n, k], &[expert_stride, row_stride, step]) = (layout.dims(), layout.stride())
        else {
            bail!("{argument}: expected [E, N, K], got {:?}", layout.dims());
        };
        if (k > 1 && step != 1) || (n > 1 && row_stride < k) {
            bail!(
                "{argument}: expected in-features that are neighbours in memory, got strides {:?}; call contiguous() on it once",
                layout.stride()
            );
        }
        let elements = self.elements(argument, storage)?;
        let extent = extent([(e, expert_stride), (n, row_stride), (k, 1)]);
        Ok(WeightPointers {
            ptr: elements.at(argument, layout, extent)?,
            dtype: elements.format,
            row_stride,
            placement: Placement::Strided { expert_stride },
        })
    }

    /// A contiguous f32 tensor.
    pub fn floats(
        &mut self,
        argument: &str,
        storage: &'a CudaStorage,
        layout: &Layout,
    ) -> Result<DevicePtr> {
        let Slice::F32(slice) = &storage.slice else {
            bail!("{argument}: expected f32, got {:?}", storage.dtype());
        };
        let (ptr, len) = self.slice(slice);
        self.contiguous(argument, ptr, len, layout)
    }

    /// Expert ids of a contiguous u32 or i32 tensor, which are the same numbers to a kernel up to 2³¹.
    pub fn ids(
        &mut self,
        argument: &str,
        storage: &'a CudaStorage,
        layout: &Layout,
    ) -> Result<DevicePtr> {
        let (ptr, len) = match &storage.slice {
            Slice::U32(slice) => self.slice(slice),
            Slice::I32(slice) => self.slice(slice),
            _ => bail!(
                "{argument}: expected u32 or i32 on a GPU, got {:?}",
                storage.dtype()
            ),
        };
        self.contiguous(argument, ptr, len, layout)
    }

    /// Four-byte elements without gaps.
    fn contiguous(
        &self,
        argument: &str,
        ptr: DevicePtr,
        len: usize,
        layout: &Layout,
    ) -> Result<DevicePtr> {
        if !layout.is_contiguous() {
            bail!("{argument}: expected a contiguous tensor");
        }
        let format = Format::F32; // for its size
        let elements = Elements { ptr, len, format };
        elements.at(argument, layout, Some(layout.shape().elem_count()))
    }
}
