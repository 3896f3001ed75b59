//! RMS norms of rows on the GPU: plans for `kernels/norm.cu`.
//!
//! ```text
//! y = x / √(mean(x²) + eps) · weight · multiplier          with `scale_first`: y = q / √(mean(q²) + eps) · multiplier,  q = x · weight
//! ```
//!
//! in f32, the bits of the CPU's norms ([`Gate`](crate::moe::Gate), [`Latent`](crate::moe::Latent), [`PostNorm`](crate::moe::PostNorm)) for input in f32, and for 16
//! bits widened, which is exact; only sign and payload of a NaN may differ. A row's bits depend on nothing but the row. The norm of a layer's output is a step of
//! [`combine`](super::combine).
//!
//! ```
//! use moe_kernels::DType;
//! use moe_kernels::cuda::combine::{DeviceRows, Norm};
//! use moe_kernels::cuda::norm::{NormRows, plan_norm_rows};
//! use moe_kernels::cuda::DevicePtr;
//! // T = 3, H = 4096: bf16 in, f32 out. The addresses are device memory.
//! let norm = Norm { weight: DevicePtr(0x8000), eps: 1e-6, multiplier: 1.0 };
//! let rows = |address, dtype| DeviceRows { ptr: DevicePtr(address), stride: 4096, dtype };
//! let plan = plan_norm_rows(&NormRows::new(3, 4096, rows(0x10000, DType::BF16), norm, rows(0x20000, DType::F32)))?;
//! assert_eq!((plan.kernel, plan.grid), ("moe_norm_bf16", [3, 1, 1]));
//! # Ok::<(), moe_kernels::Error>(())
//! ```

use super::combine::{DeviceRows, Norm, format};
use super::permute::check_pointer;
use super::plan::{DevicePtr, Launch, Module};
use crate::element::DType;
use crate::error::{Error, Result, checked_mul};
use bytemuck::{Pod, Zeroable};

/// Threads of a block (`THREADS` there).
const THREADS: u32 = 256;
/// The most columns that stay in shared memory, a multiple of a warp's: 44 of the 48 KiB that a block has without asking.
const MAX_STAGED: usize = 11 * 1024;

/// `NormParams` of `kernels/norm.cu`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct NormParams {
    x: DevicePtr,
    weight: DevicePtr,
    out: DevicePtr,
    used: DevicePtr,
    x_stride: u64,
    out_stride: u64,
    rows: u32,
    width: u32,
    staged: u32,
    x_format: u32,
    out_format: u32,
    scale_first: u32,
    eps: f32,
    mul: f32,
}
const _: () = assert!(size_of::<NormParams>() == 80);

/// Rows to be normalised, each by itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormRows {
    /// How many.
    pub rows: usize,
    /// Columns.
    pub width: usize,
    /// `[rows, width]`
    pub x: DeviceRows,
    /// The weight `[width]` and its numbers.
    pub norm: Norm,
    /// The weight multiplies before the mean is taken, not after.
    pub scale_first: bool,
    /// `[rows, width]`; may be x itself.
    pub out: DeviceRows,
    /// One i32: rows from this one on are left as they are. [`DevicePtr::NULL`]: all are normalised.
    pub used: DevicePtr,
}

impl NormRows {
    /// All rows, the weight last.
    pub fn new(rows: usize, width: usize, x: DeviceRows, norm: Norm, out: DeviceRows) -> Self {
        Self {
            rows,
            width,
            x,
            norm,
            scale_first: false,
            out,
            used: DevicePtr::NULL,
        }
    }
}

/// Plans the norms: one launch, whose grid has a zero when there is nothing to do. Sixteen bytes a thread where all addresses and strides are multiples of 16 bytes and
/// the width is one of 8 (x in f32: of 4); a column a thread else.
///
/// # Errors
/// [`Error::Value`] for an operand that is absent though it has elements or is not at a multiple of its element's size, a stride below the width, an eps or
/// multiplier that is not finite; [`Error::Overflow`] when rows, columns or bytes do not fit.
pub fn plan_norm_rows(n: &NormRows) -> Result<Launch> {
    for (what, size) in [("rows as i32", n.rows), ("columns as i32", n.width)] {
        if size > i32::MAX as usize {
            return Err(Error::Overflow { what });
        }
    }
    n.norm.check()?;
    let x_stride = check_rows("x", n.x, n)?;
    let out_stride = check_rows("out", n.out, n)?;
    check_pointer("norm", n.norm.weight, 4, n.width.min(n.rows))?;
    check_pointer("used", n.used, 4, 0)?;
    let addresses = n.x.ptr.0 | n.out.ptr.0 | n.norm.weight.0 | x_stride | out_stride;
    let (kernel, columns) = match n.x.dtype {
        DType::F32 => ("moe_norm_f32", 4),
        DType::F16 => ("moe_norm_f16", 8),
        DType::BF16 => ("moe_norm_bf16", 8),
    };
    let fits = addresses.is_multiple_of(16) && n.width.is_multiple_of(columns);
    let staged = n.width.min(MAX_STAGED) as u32;
    let params = NormParams {
        x: n.x.ptr,
        weight: n.norm.weight,
        out: n.out.ptr,
        used: n.used,
        x_stride,
        out_stride,
        rows: n.rows as u32,
        width: n.width as u32,
        staged,
        x_format: format(n.x.dtype),
        out_format: format(n.out.dtype),
        scale_first: u32::from(n.scale_first),
        eps: n.norm.eps,
        mul: n.norm.multiplier,
    };
    let blocks = if n.width == 0 { 0 } else { n.rows as u32 };
    let kernel = if fits { kernel } else { "moe_norm_any" };
    Ok(Launch::new(Module::Norm, kernel, &params)
        .grid([blocks, 1, 1])
        .block([THREADS, 1, 1])
        .shared(staged * 4))
}

/// The row stride in bytes.
fn check_rows(argument: &'static str, m: DeviceRows, n: &NormRows) -> Result<u64> {
    if n.rows > 1 && m.stride < n.width {
        let expected = format_args!("a row stride of at least {}", n.width);
        return Err(Error::value(argument, expected, m.stride));
    }
    let size = m.dtype.size();
    let stride = checked_mul(m.stride, size, "row stride in bytes")?;
    checked_mul(stride, n.rows, "matrix in bytes")?;
    check_pointer(argument, m.ptr, size as u64, n.rows.min(n.width))?;
    Ok(stride as u64)
}
