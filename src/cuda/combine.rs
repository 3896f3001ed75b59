//! The weighted sum on the GPU: plans for `kernels/combine.cu`.
//!
//! The steps and their order are those of [`crate::combine`], and so are the bits: given the same inputs, and rows in 16 bits widened to f32 (which is exact),
//! a GPU gives what [`combine_into`](crate::combine::combine_into) gives; only sign and payload of a NaN may differ. Nothing depends on the batch. Beyond the
//! CPU, ys, the routed sum and the shared experts' output may be f16 or bf16.
//!
//! ```
//! use moe_kernels::DType;
//! use moe_kernels::cuda::combine::{CombineOperands, DeviceRows, Routed, plan_combine};
//! use moe_kernels::cuda::{DeviceInfo, DevicePtr};
//! // T = 3, K = 2, H = 4096: bf16 rows from the experts, bf16 out. The addresses are device memory.
//! let rows = |address| DeviceRows { ptr: DevicePtr(address), stride: 4096, dtype: DType::BF16 };
//! let operands = CombineOperands::new(3, 4096, Routed::Pairs {
//!     ys: rows(0x10000), rows: 6, slots: 2,
//!     weights: DevicePtr(0x2000), row_of_pair: DevicePtr(0x3000), identity: None,
//! }, rows(0x80000));
//! let launch = plan_combine(&operands, &DeviceInfo::H100)?;
//! assert_eq!(launch.kernel, "moe_combine_bf16_bf16");
//! # Ok::<(), moe_kernels::Error>(())
//! ```

mod params;

use super::plan::{DeviceInfo, DevicePtr, Launch, Module};
use crate::element::DType;
use crate::error::{Error, Result};
use bytemuck::Zeroable;
use params::{Builder, CombineParams};

/// Threads of a block (`THREADS` there).
const THREADS: u32 = 256;
/// The most blocks along y.
const MAX_GRID_Y: u32 = 65535;

/// A matrix in device memory whose rows are contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceRows {
    /// Its first element. Fastest at a multiple of 16 bytes.
    pub ptr: DevicePtr,
    /// Elements from one row to the next. Fastest at a multiple of 16 bytes.
    pub stride: usize,
    /// Format of its elements.
    pub dtype: DType,
}

/// Experts that return their input: ids from `num_experts` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// `[T, slots]` i32; a pair without a row whose id is E or more is an identity expert's.
    pub ids: DevicePtr,
    /// E
    pub num_experts: usize,
    /// The layer's input `[T, H]`.
    pub x: DeviceRows,
}

/// Where the routed sum comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Routed {
    /// The experts' output rows and where each pair's row is.
    Pairs {
        /// `[rows, H]`
        ys: DeviceRows,
        /// Rows of ys.
        rows: usize,
        /// Pairs of a token.
        slots: usize,
        /// `[T, slots]` f32; [`DevicePtr::NULL`] counts as all ones.
        weights: DevicePtr,
        /// `[T, slots]` u32; `rows` or more, [`NO_ROW`](crate::permute::NO_ROW) for one: no row, passed over.
        row_of_pair: DevicePtr,
        /// Experts without weights that return their input; needs `weights`.
        identity: Option<Identity>,
    },
    /// The sum itself, `[T, H]`.
    Sum(DeviceRows),
}

/// The shared experts' output `[T, H]` and how it joins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Shared {
    /// `a + s`
    Add(DeviceRows),
    /// `a + σ(g) · s` with a logit g for each token, `[T]` f32.
    SigmoidGate(DeviceRows, DevicePtr),
    /// `(a + s) / 2`
    Average(DeviceRows),
}

/// Several shared experts in place of one: `S(x) = Σ_j γ_j · S_j(x)`, each operation rounded, in the experts' order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedSum {
    /// How many; the rows of the first are those that [`Shared`] names.
    pub experts: usize,
    /// Elements from one expert's first row to the next one's.
    pub expert_stride: usize,
    /// γ `[T, experts]` f32; [`DevicePtr::NULL`] counts as all ones.
    pub weights: DevicePtr,
}

/// Identity experts that do not have their place in the sum over slots, because weights have acted on the experts' inputs, or because the sum is given: a sum of
/// their own, `scale · Σ_slot weight · x` over the slots whose id is E or more, comes to the routed one once that has its scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct IdentityApart {
    /// `[T, slots]` i32
    pub ids: DevicePtr,
    /// `[T, slots]` f32
    pub weights: DevicePtr,
    /// Pairs of a token; those of [`Routed::Pairs`].
    pub slots: usize,
    /// E
    pub num_experts: usize,
    /// The layer's input `[T, H]`.
    pub x: DeviceRows,
    /// A factor on their sum.
    pub scale: f32,
}

/// RMS norm of the whole row; see [`RmsNorm`](crate::norm::RmsNorm).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// `[H]` f32
    pub weight: DevicePtr,
    /// The number under the root.
    pub eps: f32,
    /// One more factor on every column.
    pub multiplier: f32,
}

impl Norm {
    /// The numbers make sense.
    pub(super) fn check(&self) -> Result<()> {
        if !(self.eps.is_finite() && self.eps >= 0.0) {
            let expected = "a finite number of at least 0";
            return Err(Error::value("eps", expected, self.eps));
        }
        if !self.multiplier.is_finite() {
            let expected = "a finite number";
            return Err(Error::value("multiplier", expected, self.multiplier));
        }
        Ok(())
    }
}

/// The operands of a combine, in the order of the steps of [`crate::combine`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CombineOperands {
    /// T
    pub tokens: usize,
    /// H
    pub hidden: usize,
    /// Step 1.
    pub routed: Routed,
    /// Step 2; 1 changes nothing.
    pub routed_scale: f32,
    /// After step 2; not together with [`Routed::Pairs`]' own.
    pub identity_apart: Option<IdentityApart>,
    /// Step 3.
    pub shared: Option<Shared>,
    /// Several shared experts; only with [`shared`](Self::shared).
    pub shared_sum: Option<SharedSum>,
    /// Step 4.
    pub norm: Option<Norm>,
    /// Step 5, `[H]` f32 or [`DevicePtr::NULL`].
    pub bias: DevicePtr,
    /// Step 6, `[T, H]`; may be `out` itself.
    pub residual: Option<DeviceRows>,
    /// Step 7, `[T, H]`.
    pub out: DeviceRows,
}

impl CombineOperands {
    /// The routed sum alone.
    pub fn new(tokens: usize, hidden: usize, routed: Routed, out: DeviceRows) -> Self {
        Self {
            tokens,
            hidden,
            routed,
            routed_scale: 1.0,
            identity_apart: None,
            shared: None,
            shared_sum: None,
            norm: None,
            bias: DevicePtr::NULL,
            residual: None,
            out,
        }
    }
}

/// `Format` of the kernels.
pub(super) fn format(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 2,
    }
}

/// The kernel and the columns of a thread, for operands that are all aligned or not.
fn kernel(operands: &CombineOperands, aligned: bool) -> (&'static str, u32) {
    let (ys, identity) = match operands.routed {
        Routed::Pairs { ys, identity, .. } => (ys.dtype, identity.is_some()),
        Routed::Sum(sum) => (sum.dtype, false),
    };
    let identity = identity || operands.identity_apart.is_some();
    let fits = |columns: usize| aligned && operands.hidden.is_multiple_of(columns);
    if operands.norm.is_some() {
        return match fits(4) {
            true => ("moe_combine_norm_4", 4),
            false => ("moe_combine_norm_1", 1),
        };
    }
    if !identity {
        match (ys, operands.out.dtype) {
            (DType::F32, DType::F32) if fits(4) => return ("moe_combine_f32_f32", 4),
            (DType::F32, DType::F16) if fits(4) => return ("moe_combine_f32_f16", 4),
            (DType::F32, DType::BF16) if fits(4) => return ("moe_combine_f32_bf16", 4),
            (DType::F16, DType::F32) if fits(8) => return ("moe_combine_f16_f32", 8),
            (DType::F16, DType::F16) if fits(8) => return ("moe_combine_f16_f16", 8),
            (DType::BF16, DType::F32) if fits(8) => return ("moe_combine_bf16_f32", 8),
            (DType::BF16, DType::BF16) if fits(8) => return ("moe_combine_bf16_bf16", 8),
            _ => {}
        }
    }
    match fits(4) {
        true => ("moe_combine_any_4", 4),
        false => ("moe_combine_any_1", 1),
    }
}

/// Threads of a token's tile: as many as have work, and fewer while that leaves multiprocessors without any.
fn threads_of_tile(tokens: usize, vectors: usize, device: &DeviceInfo) -> u32 {
    let idle = |threads: usize| vectors.next_multiple_of(threads) - vectors;
    // At most an eighth of the threads without work, if any choice allows.
    let mut threads = [256, 128, 64]
        .into_iter()
        .find(|&n| idle(n) * 8 <= vectors)
        .unwrap_or(32);
    let wanted = 2 * device.sm_count as usize;
    while threads > 32 && tokens.saturating_mul(vectors.div_ceil(threads)) < wanted {
        threads /= 2;
    }
    threads as u32
}

/// Plans a combine. Sixteen bytes a thread where all addresses and strides are multiples of 16 bytes and H is one of 8 (ys in f32: of 4); a column a
/// thread else. f16 rows with bf16 output or the reverse, and identity experts, take a kernel of their own that moves 4 columns a thread.
///
/// # Errors
/// [`Error::Value`] for an operand that is absent though it has elements or is not at a multiple of its element's size, a stride below H, a scale, eps or multiplier
/// that is not finite, several shared experts without one, identity experts twice or with another number of slots; [`Error::Overflow`] when rows or bytes do not fit.
pub fn plan_combine(operands: &CombineOperands, device: &DeviceInfo) -> Result<Launch> {
    let mut b = Builder {
        params: CombineParams::zeroed(),
        tokens: operands.tokens,
        hidden: operands.hidden,
        aligned: true,
    };
    b.routed(&operands.routed)?;
    b.identity_apart(operands)?;
    b.shared(operands.shared)?;
    b.shared_sum(operands)?;
    b.rest(operands)?;
    let (kernel, columns) = kernel(operands, b.aligned);
    let mut params = b.params;
    params.tokens = operands.tokens as u64;
    params.hidden = operands.hidden as u64;
    let launch = |params: &CombineParams, grid, threads| {
        let grid = if operands.hidden == 0 { [0; 3] } else { grid };
        Launch::new(Module::Combine, kernel, params)
            .grid(grid)
            .block([threads, 1, 1])
    };
    if operands.norm.is_some() {
        let blocks = operands.tokens.min(i32::MAX as usize) as u32;
        return Ok(launch(&params, [blocks, 1, 1], THREADS));
    }
    let vectors = operands.hidden.div_ceil(columns as usize);
    params.threads = threads_of_tile(operands.tokens, vectors, device);
    params.tiles = vectors
        .div_ceil(params.threads as usize)
        .min(u32::MAX as usize) as u32;
    // Several tokens share a block where that leaves enough blocks.
    let mut groups = THREADS / params.threads;
    let items = operands.tokens.saturating_mul(params.tiles as usize);
    while groups > 1 && items / (groups as usize) < 2 * device.sm_count as usize {
        groups /= 2;
    }
    let x = params.tiles.min(i32::MAX as u32);
    let y = operands
        .tokens
        .div_ceil(groups as usize)
        .min(MAX_GRID_Y as usize) as u32;
    Ok(launch(&params, [x, y, 1], params.threads * groups))
}
