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

use super::permute::check_pointer;
use super::plan::{DeviceInfo, DevicePtr, Launch, Module};
use crate::element::DType;
use crate::error::{Error, Result, checked_mul};
use bytemuck::{Pod, Zeroable};

/// Threads of a block (`THREADS` there).
const THREADS: u32 = 256;
/// The most blocks along y.
const MAX_GRID_Y: u32 = 65535;

/// `CombineParams` of `kernels/combine.cu`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct CombineParams {
    ys: DevicePtr,
    weights: DevicePtr,
    row_of_pair: DevicePtr,
    ids: DevicePtr,
    x: DevicePtr,
    shared: DevicePtr,
    gate: DevicePtr,
    norm: DevicePtr,
    bias: DevicePtr,
    residual: DevicePtr,
    out: DevicePtr,
    ys_stride: u64,
    x_stride: u64,
    shared_stride: u64,
    residual_stride: u64,
    out_stride: u64,
    tokens: u64,
    hidden: u64,
    rows: u32,
    slots: u32,
    experts: u32,
    threads: u32,
    tiles: u32,
    sum: u32,
    ys_format: u32,
    x_format: u32,
    shared_format: u32,
    residual_format: u32,
    out_format: u32,
    shared_mode: u32,
    scale: f32,
    eps: f32,
    mul: f32,
    unused: u32,
}
const _: () = assert!(size_of::<CombineParams>() == 208);

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
    /// Step 3.
    pub shared: Option<Shared>,
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
            shared: None,
            norm: None,
            bias: DevicePtr::NULL,
            residual: None,
            out,
        }
    }
}

/// Collects the parameters, and whether everything lies at multiples of 16 bytes.
struct Builder {
    params: CombineParams,
    tokens: usize,
    hidden: usize,
    aligned: bool,
}

impl Builder {
    /// Address, row stride in bytes and format of a matrix of `rows` rows.
    fn matrix(
        &mut self,
        name: &'static str,
        m: DeviceRows,
        rows: usize,
    ) -> Result<(DevicePtr, u64, u32)> {
        if rows > 1 && m.stride < self.hidden {
            return Err(Error::value(
                name,
                format_args!("a row stride of at least {}", self.hidden),
                m.stride,
            ));
        }
        let size = m.dtype.size();
        let stride = checked_mul(m.stride, size, "row stride in bytes")? as u64;
        checked_mul(stride as usize, rows, "matrix in bytes")?;
        check_pointer(name, m.ptr, size as u64, rows.min(self.hidden))?;
        self.aligned &= (m.ptr.0 | stride).is_multiple_of(16);
        Ok((m.ptr, stride, format(m.dtype)))
    }

    /// A row of H numbers.
    fn row(&mut self, name: &'static str, ptr: DevicePtr) -> Result<DevicePtr> {
        check_pointer(name, ptr, 4, self.hidden)?;
        self.aligned &= ptr.is_aligned(16);
        Ok(ptr)
    }

    fn routed(&mut self, routed: &Routed) -> Result<()> {
        let tokens = self.tokens;
        let (ys, rows, slots, weights, row_of_pair, identity) = match *routed {
            Routed::Sum(sum) => {
                let p = self.matrix("routed sum", sum, tokens)?;
                (self.params.ys, self.params.ys_stride, self.params.ys_format) = p;
                self.params.sum = 1;
                return Ok(());
            }
            Routed::Pairs {
                ys,
                rows,
                slots,
                weights,
                row_of_pair,
                identity,
            } => (ys, rows, slots, weights, row_of_pair, identity),
        };
        let pairs = crate::shape::pairs(tokens, slots)?;
        if rows > i32::MAX as usize {
            return Err(Error::Overflow {
                what: "rows as i32",
            });
        }
        let p = self.matrix("ys", ys, rows)?;
        (self.params.ys, self.params.ys_stride, self.params.ys_format) = p;
        check_pointer("weights", weights, 4, 0)?;
        check_pointer("row_of_pair", row_of_pair, 4, pairs)?;
        self.params.weights = weights;
        self.params.row_of_pair = row_of_pair;
        self.params.rows = rows as u32;
        // Without tokens the number of slots may be anything, and is not used.
        self.params.slots = slots.min(u32::MAX as usize) as u32;
        let Some(identity) = identity else {
            return Ok(());
        };
        if weights.is_null() {
            return Err(Error::value(
                "weights",
                "some, with identity experts",
                "none",
            ));
        }
        if identity.num_experts > i32::MAX as usize {
            return Err(Error::value(
                "num_experts",
                "up to 2^31 - 1, since ids are i32",
                identity.num_experts,
            ));
        }
        check_pointer("ids", identity.ids, 4, pairs)?;
        self.params.ids = identity.ids;
        self.params.experts = identity.num_experts as u32;
        let p = self.matrix("x", identity.x, tokens)?;
        (self.params.x, self.params.x_stride, self.params.x_format) = p;
        Ok(())
    }

    fn shared(&mut self, shared: Option<Shared>) -> Result<()> {
        let (mode, matrix) = match shared {
            None => return Ok(()),
            Some(Shared::Add(m)) => (1, m),
            Some(Shared::SigmoidGate(m, gate)) => {
                check_pointer("shared gate", gate, 4, self.tokens)?;
                self.params.gate = gate;
                (2, m)
            }
            Some(Shared::Average(m)) => (3, m),
        };
        let (ptr, stride, format) = self.matrix("shared", matrix, self.tokens)?;
        self.params.shared = ptr;
        self.params.shared_stride = stride;
        self.params.shared_format = format;
        self.params.shared_mode = mode;
        Ok(())
    }

    fn rest(&mut self, operands: &CombineOperands) -> Result<()> {
        let scale = operands.routed_scale;
        if !scale.is_finite() {
            return Err(Error::value("routed_scale", "a finite number", scale));
        }
        self.params.scale = scale;
        if let Some(norm) = operands.norm {
            if !(norm.eps.is_finite() && norm.eps >= 0.0) {
                return Err(Error::value(
                    "eps",
                    "a finite number of at least 0",
                    norm.eps,
                ));
            }
            if !norm.multiplier.is_finite() {
                return Err(Error::value(
                    "multiplier",
                    "a finite number",
                    norm.multiplier,
                ));
            }
            self.params.norm = self.row("norm", norm.weight)?;
            self.params.eps = norm.eps;
            self.params.mul = norm.multiplier;
        }
        if !operands.bias.is_null() {
            self.params.bias = self.row("bias", operands.bias)?;
        }
        if let Some(residual) = operands.residual {
            let (ptr, stride, format) = self.matrix("residual", residual, self.tokens)?;
            self.params.residual = ptr;
            self.params.residual_stride = stride;
            self.params.residual_format = format;
        }
        let (ptr, stride, format) = self.matrix("out", operands.out, self.tokens)?;
        self.params.out = ptr;
        self.params.out_stride = stride;
        self.params.out_format = format;
        Ok(())
    }
}

/// `Format` of the kernels.
fn format(dtype: DType) -> u32 {
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
/// that is not finite; [`Error::Overflow`] when rows or bytes do not fit.
pub fn plan_combine(operands: &CombineOperands, device: &DeviceInfo) -> Result<Launch> {
    let mut b = Builder {
        params: CombineParams::zeroed(),
        tokens: operands.tokens,
        hidden: operands.hidden,
        aligned: true,
    };
    b.routed(&operands.routed)?;
    b.shared(operands.shared)?;
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
