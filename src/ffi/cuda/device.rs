//! What lies in a GPU's memory, as C describes it.

use crate::ffi::memory::moe_dtype;
use bytemuck::Zeroable;

/// An address in a GPU's memory, 0 for none: a CUdeviceptr as it is, a pointer of the runtime API as (moe_device_ptr)(uintptr_t)p, a tensor's data_ptr(). An integer,
/// so that nobody follows it on the host.
pub type moe_device_ptr = u64;

/// A matrix in a GPU's memory, read or written: element (i, j) is data[i * row_stride + j].
///
/// data is aligned to its elements, and may be 0 where there are none. 16-byte alignment of data and of the rows is fastest. Set reserved to 0.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_device_matrix {
    /// The first element.
    pub data: moe_device_ptr,
    /// Bytes that may be used from data on; a matrix that would reach beyond is refused.
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

/// Equally shaped matrices in a GPU's memory, one for each expert: element (e, i, j) is data[e * expert_stride + i * row_stride + j]. Out-features are rows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_device_weights {
    /// The first element.
    pub data: moe_device_ptr,
    /// Bytes that may be read from data on; weights that would reach beyond are refused.
    pub bytes: usize,
    /// Number of matrices.
    pub experts: usize,
    /// Rows of each.
    pub rows: usize,
    /// Columns of each.
    pub cols: usize,
    /// Elements from one matrix to the next, 0 or more.
    pub expert_stride: isize,
    /// Elements from one row to the next, at least cols where there are several rows.
    pub row_stride: isize,
    /// MOE_DTYPE_*
    pub dtype: moe_dtype,
    /// 0
    pub reserved: u32,
}
