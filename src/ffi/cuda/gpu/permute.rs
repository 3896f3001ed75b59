//! Sorting pairs, and copies of rows.

use super::answer;
use super::memory::{Array, DeviceRegions};
use crate::cuda::permute::{
    CopyRows, PermutePointers, max_rows, plan_copy_rows, plan_permute, workspace_size,
};
use crate::cuda::raw::CurrentGpu;
use crate::cuda::{DevicePtr, RawStream};
use crate::ffi::cuda::{moe_cuda_copy_args, moe_cuda_permute_args};
use crate::ffi::memory::read_struct;
use crate::ffi::permute::{moe_permute_options, read_options};
use crate::ffi::status::*;
use core::ffi::c_void;

/// # Safety
/// As `moe_cuda_permute_sizes`.
pub(in crate::ffi::cuda) unsafe fn permute_sizes(
    num_pairs: usize,
    num_experts: usize,
    options: *const moe_permute_options,
    rows: *mut usize,
    bytes: *mut usize,
) -> Checked {
    // SAFETY: this function's contract.
    let options = unsafe { read_options(options) }?;
    let most = max_rows(num_pairs, num_experts, &options)?;
    let device = crate::cuda::current_device_info()?;
    let workspace = workspace_size(num_pairs, num_experts, &options, &device)?;
    let places = [("max_rows", rows), ("workspace_bytes", bytes)];
    // SAFETY: this function's contract.
    unsafe { answer(places, [most, workspace]) }
}

/// # Safety
/// As `moe_cuda_permute`.
pub(in crate::ffi::cuda) unsafe fn permute(
    stream: *mut c_void,
    args: *const moe_cuda_permute_args,
) -> Checked {
    // SAFETY: this function's contract.
    let a = unsafe { read_struct("args", args) }?;
    // SAFETY: this function's contract.
    let options = unsafe { read_options(a.options) }?;
    let (pairs, experts) = (a.ids_len, a.num_experts);
    let rows = max_rows(pairs, experts, &options)?;
    let mut regions = DeviceRegions::new();
    let r = &mut regions;
    let workspace = Array::bytes("workspace", a.workspace, a.workspace_bytes, 4);
    let pair_of_row = Array::of("pair_of_row", a.pair_of_row, a.pair_of_row_len);
    let row_of_pair = Array::of("row_of_pair", a.row_of_pair, a.row_of_pair_len);
    let pointers = PermutePointers {
        ids: Array::of("ids", a.ids, a.ids_len).exactly(r, pairs)?,
        counts: Array::of("counts", a.counts, a.counts_len).written(r, experts)?,
        offsets: Array::of("offsets", a.offsets, a.offsets_len).written(r, experts + 1)?,
        pair_of_row: pair_of_row.written(r, rows)?,
        row_of_pair: row_of_pair.written(r, pairs)?,
        workspace: workspace.scratch(r)?,
    };
    regions.apart()?;
    let gpu = CurrentGpu::get()?;
    workspace.check_len(workspace_size(pairs, experts, &options, gpu.info())?)?;
    let plan = plan_permute(pairs, experts, &options, &pointers, gpu.info())?;
    // SAFETY: the caller's promise for stream and memory, whose extents are what the caller says.
    Ok(unsafe { gpu.queue(RawStream(stream), plan.iter()) }?)
}

/// # Safety
/// As `moe_cuda_copy_rows`.
pub(in crate::ffi::cuda) unsafe fn copy_rows(
    stream: *mut c_void,
    args: *const moe_cuda_copy_args,
) -> Checked {
    // SAFETY: this function's contract.
    let a = unsafe { read_struct("args", args) }?;
    let mut regions = DeviceRegions::new();
    // SAFETY: this function's contract.
    let (src, out) = unsafe {
        (
            regions.matrix("src", a.src)?,
            regions.matrix_mut("out", a.out)?,
        )
    };
    let (from, to) = (src.expect(src.rows, out.cols)?, out.data());
    if from.dtype != to.dtype {
        let expected = format_args!("{}, as src is", from.dtype);
        return Err(Fault::value("out", expected, to.dtype));
    }
    let copy = CopyRows {
        src: from.ptr,
        src_rows: src.rows,
        src_stride: from.stride,
        out: to.ptr,
        out_stride: to.stride,
        index: Array::of("index", a.index, a.index_len).at_least(&mut regions, out.rows)?,
        rows: out.rows,
        used: match a.used {
            0 => DevicePtr::NULL,
            used => Array::of("used", used, 1).exactly(&mut regions, 1)?,
        },
        divisor: a.divisor,
        width: out.cols,
        dtype: to.dtype,
    };
    regions.apart()?;
    let gpu = CurrentGpu::get()?;
    let launch = plan_copy_rows(&copy, gpu.info())?;
    // SAFETY: the caller's promise for stream and memory, whose extents are what the caller says.
    Ok(unsafe { gpu.queue(RawStream(stream), core::iter::once(&launch)) }?)
}
