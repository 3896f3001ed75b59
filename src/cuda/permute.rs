//! Ids to offsets and both permutations on the GPU, and copies of rows: plans for `kernels/permute.cu`.
//!
//! The answer is that of [`crate::permute`], bit for bit, whatever the GPU: the sort is stable, and nothing is decided by an atomic. Two things differ,
//! because a kernel can neither return an error nor choose the length of an array:
//!
//! * an id that the CPU refuses (below −1, or beyond the null experts) gets no row;
//! * `pair_of_row` has [`max_rows`] elements, and those from `offsets[E]` on are [`NO_PAIR`](crate::permute::NO_PAIR).
//!
//! Up to [`ONE_LAUNCH_PAIRS`] pairs take one launch and no workspace, more take three. Everything stays on the device, so that the launches can be captured
//! in a CUDA graph and replayed with other ids.
//!
//! ```
//! use moe_kernels::cuda::{DeviceInfo, DevicePtr};
//! use moe_kernels::cuda::permute::{PermutePointers, max_rows, plan_permute};
//! use moe_kernels::permute::PermuteOptions;
//! let options = PermuteOptions { block: 128, ..Default::default() };
//! assert_eq!(max_rows(8 * 2, 4, &options)?, 16 + 4 * 127);
//! let pointers = PermutePointers { // addresses of device memory
//!     ids: DevicePtr(0x1000), counts: DevicePtr(0x2000), offsets: DevicePtr(0x3000),
//!     pair_of_row: DevicePtr(0x4000), row_of_pair: DevicePtr(0x8000), workspace: DevicePtr::NULL,
//! };
//! let plan = plan_permute(8 * 2, 4, &options, &pointers, &DeviceInfo::H100)?;
//! assert_eq!(plan.len(), 1);
//! assert_eq!((plan[0].kernel, plan[0].grid), ("moe_permute_one", [1, 1, 1]));
//! # Ok::<(), moe_kernels::Error>(())
//! ```

use super::plan::{DeviceInfo, DevicePtr, Launch, Module};
use crate::element::DType;
use crate::error::{Error, Result, checked_mul};
use crate::permute::{PermuteOptions, check_options};
use bytemuck::{Pod, Zeroable};
use core::ops::Deref;

/// The most experts that the GPU sorts by: each has 24 bytes in a block's shared memory.
pub const MAX_EXPERTS: usize = 4096;

/// The most pairs that are sorted in one launch, in which each block counts all pairs for itself. Beyond, three launches do less work.
pub const ONE_LAUNCH_PAIRS: usize = 65536;

/// How pairs are sorted. Both ways give the same; which is faster depends on their number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PermutePath {
    /// Every block counts all pairs for itself, then places its own.
    OneLaunch,
    /// Count, add up, place.
    ThreeLaunches,
}

impl PermutePath {
    /// The faster one: one launch up to [`ONE_LAUNCH_PAIRS`].
    pub fn for_pairs(pairs: usize) -> Self {
        match pairs <= ONE_LAUNCH_PAIRS {
            true => Self::OneLaunch,
            false => Self::ThreeLaunches,
        }
    }
}

/// Threads of a block of the kernels that count and place (`THREADS` there).
const THREADS: u32 = 512;
/// Pairs that a block ranks at a time (`ROUND` there).
const ROUND: usize = 1024;
/// Bytes of shared memory for each local expert.
const BYTES_PER_EXPERT: usize = 24;
/// Blocks of the copies for each multiprocessor: a full one.
const COPY_BLOCKS_PER_SM: u32 = 8;

/// `PermuteParams` of `kernels/permute.cu`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct PermuteParams {
    ids: DevicePtr,
    counts: DevicePtr,
    offsets: DevicePtr,
    pair_of_row: DevicePtr,
    row_of_pair: DevicePtr,
    partial: DevicePtr,
    totals: DevicePtr,
    pairs: u32,
    experts: u32,
    first: u32,
    local: u32,
    block: u32,
    capacity: u32,
    chunk: u32,
    chunks: u32,
}
const _: () = assert!(size_of::<PermuteParams>() == 88);

/// Where the operands of a sort are, in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PermutePointers {
    /// In: `[T·K]` i32. Fastest at a multiple of 16 bytes.
    pub ids: DevicePtr,
    /// Out: `[E]` i32, the rows of each expert without padding.
    pub counts: DevicePtr,
    /// Out: `[E + 1]` i32: expert e has rows `offsets[e] .. offsets[e+1]`, padding included.
    pub offsets: DevicePtr,
    /// Out: `[max_rows]` u32, the pair of each row; [`NO_PAIR`](crate::permute::NO_PAIR) for padding and from `offsets[E]` on.
    pub pair_of_row: DevicePtr,
    /// Out: `[T·K]` u32, the row of each pair or [`NO_ROW`](crate::permute::NO_ROW).
    pub row_of_pair: DevicePtr,
    /// [`workspace_size`] bytes; [`DevicePtr::NULL`] where that is 0. Its contents do not matter before and mean nothing after.
    pub workspace: DevicePtr,
}

/// The launches of a sort, to be queued in order on one stream. Derefs to a slice.
#[derive(Clone, Debug)]
pub struct PermutePlan {
    launches: [Launch; 3],
    len: usize,
}

impl Deref for PermutePlan {
    type Target = [Launch];

    fn deref(&self) -> &[Launch] {
        &self.launches[..self.len]
    }
}

/// The most rows that `pairs` pairs can take, padding included: the length of `pair_of_row`.
///
/// # Errors
/// [`Error::Value`] for options that make no sense or more than [`MAX_EXPERTS`] experts; [`Error::Overflow`] when rows do not fit `i32`.
pub fn max_rows(pairs: usize, num_experts: usize, options: &PermuteOptions) -> Result<usize> {
    let local = check_options(pairs, num_experts, options)?.len();
    if num_experts > MAX_EXPERTS {
        return Err(Error::value(
            "num_experts",
            format_args!("1 to {MAX_EXPERTS} on a GPU"),
            num_experts,
        ));
    }
    // Fits usize, as `check_options` has seen. Without local experts there are no rows.
    let rows = match local {
        0 => 0,
        _ => pairs + (options.block - 1) * local.min(pairs),
    };
    match pairs.max(rows) {
        n if n <= i32::MAX as usize => Ok(rows),
        _ => Err(Error::Overflow {
            what: "rows as i32",
        }),
    }
}

/// Bytes of workspace for up to `max_pairs` pairs; 0 up to [`ONE_LAUNCH_PAIRS`]. Enough for any smaller number of pairs with the same experts and options.
///
/// # Errors
/// As [`max_rows`].
pub fn workspace_size(
    max_pairs: usize,
    num_experts: usize,
    options: &PermuteOptions,
    device: &DeviceInfo,
) -> Result<usize> {
    let path = PermutePath::for_pairs(max_pairs);
    workspace_size_by(path, max_pairs, num_experts, options, device)
}

/// [`workspace_size`] for a path of one's own choice.
///
/// # Errors
/// As [`max_rows`].
pub fn workspace_size_by(
    path: PermutePath,
    max_pairs: usize,
    num_experts: usize,
    options: &PermuteOptions,
    device: &DeviceInfo,
) -> Result<usize> {
    max_rows(max_pairs, num_experts, options)?;
    if path == PermutePath::OneLaunch {
        return Ok(0);
    }
    let local = options.local.clone().map_or(num_experts, |l| l.len());
    let chunks = max_pairs
        .div_ceil(min_chunk(local))
        .min(wanted_chunks(device));
    // A total for each expert, and a histogram for each chunk. No overflow: a few thousand chunks and experts.
    Ok((chunks + 1) * local * 4)
}

/// The fewest pairs of a chunk: its histogram is not longer than its ids and rows are.
fn min_chunk(local: usize) -> usize {
    (4 * local).next_multiple_of(ROUND).max(ROUND)
}

/// Two blocks for each multiprocessor, so that one counts while the other waits.
fn wanted_chunks(device: &DeviceInfo) -> usize {
    2 * device.sm_count.max(1) as usize
}

/// Pairs of a chunk in three launches: at most [`wanted_chunks`] of them.
fn chunk_len(pairs: usize, local: usize, device: &DeviceInfo) -> usize {
    let shared_out = pairs.div_ceil(wanted_chunks(device));
    shared_out.next_multiple_of(ROUND).max(min_chunk(local))
}

/// Plans the stable sort of `pairs` = T·K ids by expert. The outputs hold what [`Permutation::sort`](crate::permute::Permutation::sort) gives, see the
/// [module](self) for what differs. Any number of pairs, 0 included.
///
/// # Errors
/// As [`max_rows`]; [`Error::Value`] for an operand that is absent though it has elements, or not at a multiple of 4 bytes.
pub fn plan_permute(
    pairs: usize,
    num_experts: usize,
    options: &PermuteOptions,
    pointers: &PermutePointers,
    device: &DeviceInfo,
) -> Result<PermutePlan> {
    let path = PermutePath::for_pairs(pairs);
    plan_permute_by(path, pairs, num_experts, options, pointers, device)
}

/// [`plan_permute`] on a path of one's own choice; the workspace has [`workspace_size_by`] bytes.
///
/// # Errors
/// As [`plan_permute`].
pub fn plan_permute_by(
    path: PermutePath,
    pairs: usize,
    num_experts: usize,
    options: &PermuteOptions,
    pointers: &PermutePointers,
    device: &DeviceInfo,
) -> Result<PermutePlan> {
    let capacity = max_rows(pairs, num_experts, options)?;
    let local = options.local.clone().unwrap_or(0..num_experts);
    let workspace = workspace_size_by(path, pairs, num_experts, options, device)?;
    for (name, pointer, len) in [
        ("ids", pointers.ids, pairs),
        ("counts", pointers.counts, num_experts),
        ("offsets", pointers.offsets, num_experts + 1),
        ("pair_of_row", pointers.pair_of_row, capacity),
        ("row_of_pair", pointers.row_of_pair, pairs),
        ("workspace", pointers.workspace, workspace),
    ] {
        check_pointer(name, pointer, 4, len)?;
    }
    let chunk = match path {
        PermutePath::OneLaunch => ROUND,
        PermutePath::ThreeLaunches => chunk_len(pairs, local.len(), device),
    };
    let chunks = pairs.div_ceil(chunk);
    let [totals, partial] = match workspace {
        0 => [DevicePtr::NULL; 2],
        _ => [0, local.len() as u64 * 4].map(|bytes| pointers.workspace.add(bytes)),
    };
    // All of these are below 2³¹: rows and pairs by `max_rows`; so is the block, unless it pads nothing.
    let params = PermuteParams {
        ids: pointers.ids,
        counts: pointers.counts,
        offsets: pointers.offsets,
        pair_of_row: pointers.pair_of_row,
        row_of_pair: pointers.row_of_pair,
        totals,
        partial,
        pairs: pairs as u32,
        experts: num_experts as u32,
        first: local.start as u32,
        local: local.len() as u32,
        block: options.block.min(i32::MAX as usize) as u32,
        capacity: capacity as u32,
        chunk: chunk as u32,
        chunks: chunks as u32,
    };
    let launch = |kernel, blocks: usize, threads, bytes_per_expert: usize| {
        Launch::new(Module::Permute, kernel, &params)
            .grid([blocks as u32, 1, 1])
            .block([threads, 1, 1])
            .shared((bytes_per_expert * local.len()) as u32)
    };
    let one = launch("moe_permute_one", chunks.max(1), THREADS, BYTES_PER_EXPERT);
    if path == PermutePath::OneLaunch {
        return Ok(PermutePlan {
            launches: [one.clone(), one.clone(), one],
            len: 1,
        });
    }
    Ok(PermutePlan {
        launches: [
            launch("moe_permute_count", chunks, THREADS, 4),
            launch("moe_permute_columns", local.len().div_ceil(32), 1024, 0),
            launch(
                "moe_permute_place",
                chunks.max(1),
                THREADS,
                BYTES_PER_EXPERT,
            ),
        ],
        len: 3,
    })
}

/// An operand of `len` elements must be there, and at a multiple of `align` bytes.
pub(super) fn check_pointer(
    argument: &'static str,
    pointer: DevicePtr,
    align: u64,
    len: usize,
) -> Result<()> {
    if len > 0 && pointer.is_null() {
        return Err(Error::value(
            argument,
            format_args!("device memory for {len} elements"),
            "no pointer",
        ));
    }
    if !pointer.is_aligned(align) {
        return Err(Error::value(
            argument,
            format_args!("an address at a multiple of {align} bytes"),
            format_args!("{:#x}", pointer.0),
        ));
    }
    Ok(())
}

/// `PermuteRowsParams` of `kernels/permute.cu`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct RowsParams {
    src: DevicePtr,
    out: DevicePtr,
    index: DevicePtr,
    used: DevicePtr,
    src_stride: u64,
    out_stride: u64,
    row_bytes: u64,
    rows: u32,
    src_rows: u32,
    divisor: u32,
    unused: u32,
}
const _: () = assert!(size_of::<RowsParams>() == 72);

/// A copy of rows, `out[i] = src[index[i] / divisor]`, with zeros where the index is `NO_PAIR` or leads beyond `src`.
///
/// Tokens to rows: `index` = `pair_of_row`, `divisor` = K, `rows` = [`max_rows`], `used` = the address of `offsets[E]`. Rows back to pairs:
/// `index` = `row_of_pair`, `divisor` = 1, `rows` = T·K, `used` absent. The grouped products gather their rows by themselves: this is for those who want
/// the rows in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CopyRows {
    /// `[src_rows, width]`
    pub src: DevicePtr,
    /// Rows of `src`.
    pub src_rows: usize,
    /// Elements from one row of `src` to the next.
    pub src_stride: usize,
    /// `[rows, width]`
    pub out: DevicePtr,
    /// Elements from one row of `out` to the next.
    pub out_stride: usize,
    /// `[rows]` u32
    pub index: DevicePtr,
    /// Rows of `out`.
    pub rows: usize,
    /// One i32: rows of `out` from this one on are left as they are. [`DevicePtr::NULL`]: all are written.
    pub used: DevicePtr,
    /// What indices are divided by.
    pub divisor: usize,
    /// H
    pub width: usize,
    /// Of `src` and `out`.
    pub dtype: DType,
}

/// Plans a copy of rows. Moves 16 bytes at a time where addresses, strides and widths are multiples of 16 bytes, else one element.
///
/// # Errors
/// [`Error::Value`] for a divisor of 0, a stride below the width, an operand that is absent though it has elements or is not at a multiple of its element's size;
/// [`Error::Overflow`] when rows or bytes do not fit.
pub fn plan_copy_rows(copy: &CopyRows, device: &DeviceInfo) -> Result<Launch> {
    let size = copy.dtype.size();
    if copy.divisor == 0 {
        return Err(Error::value("divisor", "at least 1", 0));
    }
    let row_bytes = checked_mul(copy.width, size, "H in bytes")?;
    let matrix = |name, pointer, rows: usize, stride: usize| {
        if rows > 1 && stride < copy.width {
            return Err(Error::value(
                name,
                format_args!("a row stride of at least {}", copy.width),
                stride,
            ));
        }
        if rows > i32::MAX as usize {
            return Err(Error::Overflow {
                what: "rows as i32",
            });
        }
        let bytes = checked_mul(stride, size, "row stride in bytes")?;
        checked_mul(bytes, rows, "matrix in bytes")?;
        check_pointer(name, pointer, size as u64, rows.min(copy.width))?;
        Ok(bytes as u64)
    };
    let src_stride = matrix("src", copy.src, copy.src_rows, copy.src_stride)?;
    let out_stride = matrix("out", copy.out, copy.rows, copy.out_stride)?;
    check_pointer("index", copy.index, 4, copy.rows)?;
    check_pointer("used", copy.used, 4, 0)?;
    let params = RowsParams {
        src: copy.src,
        out: copy.out,
        index: copy.index,
        used: copy.used,
        src_stride,
        out_stride,
        row_bytes: row_bytes as u64,
        rows: copy.rows as u32,
        src_rows: copy.src_rows as u32,
        divisor: copy.divisor.min(u32::MAX as usize) as u32,
        unused: 0,
    };
    let all = copy.src.0 | copy.out.0 | src_stride | out_stride | row_bytes as u64;
    let (kernel, bytes) = match (all % 16, size) {
        (0, _) => ("moe_permute_rows_16", 16),
        (_, 4) => ("moe_permute_rows_4", 4),
        _ => ("moe_permute_rows_2", 2),
    };
    // A warp takes 4 · 32 values at a time.
    let warps = copy.rows as u64 * params.row_bytes.div_ceil(4 * 32 * bytes);
    let blocks = u64::from(device.sm_count.max(1) * COPY_BLOCKS_PER_SM).min(warps.div_ceil(8));
    Ok(Launch::new(Module::Permute, kernel, &params)
        .grid([blocks as u32, 1, 1])
        .block([256, 1, 1]))
}
