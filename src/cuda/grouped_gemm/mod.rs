//! The ragged grouped product on the GPU: which kernel computes it, as plain data.
//!
//! ```text
//! out[r] = act( A[src(r)] · W[e]ᵀ + b[e] )     rows r of expert e: offsets[e] .. offsets[e] + counts[e];  src(r) = pair_of_row[r] / slots, or r
//! ```
//!
//! Nothing is read by the host: each block finds its tiles from the counts on the device. Kernels bound what they touch by the number of rows and of A's rows,
//! whatever offsets and pairs say.
//!
//! # Classes of bits
//! A row's result has the same bits in every call of one class (D1, D2), whatever the other rows. The classes of [`Numerics::TensorCores`] in 16 bits are
//!
//! | class | when | sums |
//! |---|---|---|
//! | `decode` | at most [`DECODE_ROWS`] rows for each expert on average, and not strict | four partial sums, see `kernels/grouped_gemm_decode.cu` |
//! | `sm90` | compute capability 9.0, layouts that TMA takes | one chain of wgmma in ascending k |
//! | `sm80` | everything else | one chain of mma.sync in ascending k |
//!
//! so that a strict product has one class on a given device for given weights. [`Numerics::Exact`], which is what f32 gets, has one class and the CPU's bits, on every
//! device and for every format.

pub mod decode;
pub mod f32;
pub mod params;
pub mod sm80;
pub mod sm90;

use super::combine::DeviceRows;
use super::permute::check_pointer;
use super::plan::{DeviceInfo, DevicePtr, Launch};
use crate::element::DType;
use crate::error::{Error, Result, checked_mul};
use crate::grouped_gemm::{Activation, ActivationFunction, Clamp};
use params::{ActivationParams, Flags, GroupedGemmParams};

/// The most rows for each expert on average with which the kernels for few rows are taken.
pub const DECODE_ROWS: usize = 4;

/// How products are summed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Numerics {
    /// f16 and bf16 on tensor cores with f32 sums; f32 (and mixed formats) exactly.
    #[default]
    TensorCores,
    /// The same, but f32 on tensor cores with inputs rounded to TF32's ten bits of mantissa.
    Tf32,
    /// Every format by chains of f32 fused multiply-adds: the CPU's bits.
    Exact,
}

/// Matrices `[experts, N, K]` in device memory, out-features first, the K in-features of a row neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightPointers {
    /// The first element. Fastest at a multiple of 16 bytes, as the strides are.
    pub ptr: DevicePtr,
    /// Format of the elements.
    pub dtype: DType,
    /// Elements from one out-feature to the next.
    pub row_stride: usize,
    /// Elements from one expert to the next.
    pub expert_stride: usize,
}

/// Biases `[experts, N]` in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BiasPointers {
    /// The first element.
    pub ptr: DevicePtr,
    /// Format of the elements; one for all biases of a product.
    pub dtype: DType,
    /// Elements from one out-feature to the next.
    pub stride: usize,
    /// Elements from one expert to the next.
    pub expert_stride: usize,
}

/// Which rows belong to which expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GroupPointers {
    /// `offsets` i32 `[experts + 1]` and `counts` i32 `[experts]`, from a sort.
    Ragged {
        /// `[experts + 1]`
        offsets: DevicePtr,
        /// `[experts]`
        counts: DevicePtr,
        /// How many.
        experts: usize,
    },
    /// All rows are the first matrix's.
    Single,
}

/// Rows of A by pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatherPointers {
    /// u32 `[rows]`
    pub pair_of_row: DevicePtr,
    /// Pairs of a token.
    pub slots: usize,
    /// f32 `[pairs]`, a factor on each pair's input; [`DevicePtr::NULL`] for none.
    pub input_scale: DevicePtr,
}

/// One grouped product. Plain data.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupedGemm {
    /// `[a_rows, K]`
    pub a: DeviceRows,
    /// Rows of A.
    pub a_rows: usize,
    /// Rows of A by pair; `None`: row r is row r.
    pub gather: Option<GatherPointers>,
    /// Which rows are whose.
    pub groups: GroupPointers,
    /// `[experts, N, K]` of a gated product.
    pub gate: Option<WeightPointers>,
    /// `[experts, N, K]`
    pub up: WeightPointers,
    /// `[experts, N]`
    pub gate_bias: Option<BiasPointers>,
    /// `[experts, N]`
    pub up_bias: Option<BiasPointers>,
    /// What happens to the sums.
    pub activation: Activation,
    /// `[rows, N]`
    pub out: DeviceRows,
    /// The most rows that there may be.
    pub rows: usize,
    /// Columns of the output.
    pub n: usize,
    /// Columns of A.
    pub k: usize,
    /// How it is summed.
    pub numerics: Numerics,
    /// One class of bits for every number of rows.
    pub strict: bool,
}

impl GroupedGemm {
    fn experts(&self) -> usize {
        match self.groups {
            GroupPointers::Ragged { experts, .. } => experts,
            GroupPointers::Single => 1,
        }
    }

    /// Whether the operands are of one 16-bit format.
    fn is_16_bit(&self) -> bool {
        self.a.dtype != DType::F32 && self.up.dtype == self.a.dtype
    }

    /// Whether the kernels for few rows are taken.
    fn is_decode(&self) -> bool {
        !self.strict && self.rows <= DECODE_ROWS.saturating_mul(self.experts())
    }
}

/// Plans a grouped product: one launch, whose grid has a zero when there is nothing to do.
///
/// # Errors
/// [`Error::Value`] naming an operand that is absent though it has elements, misaligned, of a stride below its width, or a gate that the activation does not have;
/// [`Error::Overflow`] for sizes beyond 32 bits.
pub fn plan_grouped_gemm(product: &GroupedGemm, device: &DeviceInfo) -> Result<Launch> {
    let params = params(product)?;
    if product.numerics == Numerics::Exact
        || (product.numerics == Numerics::TensorCores && !product.is_16_bit())
    {
        return f32::plan_exact(&params, device);
    }
    if !product.is_16_bit() {
        return f32::plan_tf32(&params, device);
    }
    if product.is_decode() {
        return decode::plan_decode(&params, device);
    }
    // Layouts that Hopper's kernels refuse the sm_80 kernels take.
    if device.compute_capability == (9, 0)
        && let Ok(launch) = sm90::plan_grouped_gemm_sm90(&params, device)
    {
        return Ok(launch);
    }
    sm80::plan_sm80(&params, device)
}

/// The checked product as the kernels see it.
fn params(p: &GroupedGemm) -> Result<GroupedGemmParams> {
    p.activation.validate()?;
    if p.activation.gated != p.gate.is_some() {
        let expected = if p.activation.gated {
            "a matrix, with a gated activation"
        } else {
            "none, without a gate"
        };
        return Err(Error::value("gate", expected, "the opposite"));
    }
    let experts = p.experts();
    for (what, size) in [
        ("rows", p.rows),
        ("rows of a", p.a_rows),
        ("n", p.n),
        ("k", p.k),
        ("experts", experts),
    ] {
        if size > i32::MAX as usize {
            return Err(Error::Overflow { what });
        }
    }
    // Kernels count the bytes of a row of k in 32 bits.
    if p.k == 0 || p.k > 1 << 29 {
        return Err(Error::value("k", "1 to 2^29", p.k));
    }
    let gate = p.gate.unwrap_or(p.up);
    if gate.dtype != p.up.dtype {
        return Err(Error::value(
            "gate",
            format_args!("{}, as the up projection", p.up.dtype),
            gate.dtype,
        ));
    }
    let bias = p.up_bias.or(p.gate_bias);
    let bias_dtype = bias.map_or(DType::F32, |b| b.dtype);
    for b in [p.gate_bias, p.up_bias].into_iter().flatten() {
        if b.dtype != bias_dtype {
            return Err(Error::value("bias", bias_dtype, b.dtype));
        }
        check_pointer("bias", b.ptr, b.dtype.size() as u64, p.n)?;
    }
    check_matrix("a", p.a, p.a_rows, p.k)?;
    check_matrix("out", p.out, p.rows, p.n)?;
    for w in [gate, p.up] {
        check_weights(w, experts, p.n, p.k)?;
    }
    let (offsets, counts) = match p.groups {
        GroupPointers::Ragged {
            offsets,
            counts,
            experts,
        } => {
            check_pointer("offsets", offsets, 4, experts)?;
            check_pointer("counts", counts, 4, experts)?;
            (offsets, counts)
        }
        GroupPointers::Single => (DevicePtr::NULL, DevicePtr::NULL),
    };
    let gather = p.gather.unwrap_or(GatherPointers {
        pair_of_row: DevicePtr::NULL,
        slots: 1,
        input_scale: DevicePtr::NULL,
    });
    if p.gather.is_some() {
        check_pointer("pair_of_row", gather.pair_of_row, 4, p.rows)?;
    }
    check_pointer("input_scale", gather.input_scale, 4, 0)?;
    if gather.slots == 0 || gather.slots > u32::MAX as usize {
        return Err(Error::value("slots", "1 to 2^32 - 1", gather.slots));
    }
    let address = |b: Option<BiasPointers>| b.map_or(DevicePtr::NULL, |b| b.ptr);
    let stride = |b: Option<BiasPointers>| b.map_or(0, |b| b.stride as u32);
    let expert_stride = |b: Option<BiasPointers>| b.map_or(0, |b| b.expert_stride as i64);
    let out_bytes = p.out.stride.wrapping_mul(p.out.dtype.size()) as u64;
    let aligned_out = (p.out.ptr.0 | out_bytes).is_multiple_of(16);
    Ok(GroupedGemmParams {
        a: p.a.ptr,
        pair_of_row: gather.pair_of_row,
        input_scale: gather.input_scale,
        offsets,
        counts,
        gate: gate.ptr,
        up: p.up.ptr,
        gate_bias: if p.gate.is_some() {
            address(p.gate_bias)
        } else {
            DevicePtr::NULL
        },
        up_bias: address(p.up_bias),
        out: p.out.ptr,
        a_row_stride: p.a.stride as i64,
        gate_row_stride: gate.row_stride as i64,
        gate_expert_stride: gate.expert_stride as i64,
        up_row_stride: p.up.row_stride as i64,
        up_expert_stride: p.up.expert_stride as i64,
        gate_bias_expert_stride: expert_stride(p.gate_bias),
        up_bias_expert_stride: expert_stride(p.up_bias),
        out_row_stride: p.out.stride as i64,
        gate_bias_stride: stride(p.gate_bias),
        up_bias_stride: stride(p.up_bias),
        experts: experts as u32,
        rows: p.rows as u32,
        n: p.n as u32,
        k: p.k as u32,
        slots: gather.slots as u32,
        flags: if aligned_out { Flags::ALIGNED_OUT } else { 0 },
        a_dtype: p.a.dtype as u32,
        w_dtype: p.up.dtype as u32,
        bias_dtype: bias_dtype as u32,
        out_dtype: p.out.dtype as u32,
        a_rows: p.a_rows as u32,
        reserved: 0,
        activation: activation(&p.activation),
    })
}

fn check_matrix(argument: &'static str, m: DeviceRows, rows: usize, cols: usize) -> Result<()> {
    if rows > 1 && m.stride < cols {
        return Err(Error::value(
            argument,
            format_args!("a row stride of at least {cols}"),
            m.stride,
        ));
    }
    let bytes = checked_mul(m.stride.max(cols), m.dtype.size(), argument)?;
    checked_mul(bytes, rows, argument)?;
    check_pointer(argument, m.ptr, m.dtype.size() as u64, rows.min(cols))
}

fn check_weights(w: WeightPointers, experts: usize, n: usize, k: usize) -> Result<()> {
    if n > 1 && w.row_stride < k {
        return Err(Error::value(
            "weights",
            format_args!("a row stride of at least {k}"),
            w.row_stride,
        ));
    }
    let overflow = Error::Overflow { what: "weights" };
    let bytes =
        |stride: usize, count: usize| stride.checked_mul(count)?.checked_mul(w.dtype.size());
    let (rows, matrices) = (bytes(w.row_stride, n), bytes(w.expert_stride, experts));
    rows.zip(matrices)
        .and_then(|(r, m)| r.checked_add(m))
        .filter(|&b| b <= isize::MAX as usize)
        .ok_or(overflow)?;
    check_pointer(
        "weights",
        w.ptr,
        w.dtype.size() as u64,
        experts.min(n).min(k),
    )
}

/// `epilogue::Activation` of an activation.
fn activation(a: &Activation) -> ActivationParams {
    let kind = match a.function {
        ActivationFunction::Identity => 0,
        ActivationFunction::Silu => 1,
        ActivationFunction::Gelu => 2,
        ActivationFunction::GeluTanh => 3,
        ActivationFunction::Relu => 4,
        ActivationFunction::Relu2 => 5,
    };
    let mut p = ActivationParams {
        kind,
        gated: u32::from(a.gated),
        gate_max: f32::INFINITY,
        result_max: f32::INFINITY,
        up_limit: f32::INFINITY,
        alpha: 0.0,
        gate_cap: 0.0,
        up_cap: 0.0,
    };
    match a.clamp {
        Clamp::None => {}
        Clamp::Pre { limit } => (p.gate_max, p.up_limit) = (limit, limit),
        Clamp::Post { limit } => (p.result_max, p.up_limit) = (limit, limit),
        Clamp::GptOss { limit, alpha } => {
            p.kind = 6;
            (p.gate_max, p.up_limit, p.alpha) = (limit, limit, alpha);
        }
        Clamp::Softcap { gate, up } => {
            p.kind = 7;
            (p.gate_cap, p.up_cap) = (gate, up);
        }
    }
    p
}

/// The most tiles that there can be, whatever the counts: full row tiles, and a last one for each expert that has rows.
fn most_tiles(p: &GroupedGemmParams, tile_rows: u32, tile_columns: u32) -> Result<u64> {
    let columns = if p.activation.gated != 0 {
        tile_columns / 2
    } else {
        tile_columns
    };
    let rows = u64::from(p.rows);
    let row_tiles = rows / u64::from(tile_rows) + u64::from(p.experts).min(rows);
    match row_tiles.checked_mul(u64::from(p.n.div_ceil(columns))) {
        Some(tiles) if tiles < 1 << 31 => Ok(tiles),
        _ => Err(Error::Overflow {
            what: "tiles of the product",
        }),
    }
}

/// A kernel of the stem: its name, tile, threads, dynamic shared memory and the blocks of it that fit a multiprocessor.
struct Shape {
    kernel: &'static str,
    rows: u32,
    columns: u32,
    threads: u32,
    shared: u32,
    blocks_per_sm: u32,
}

impl Shape {
    /// Persistent blocks: as many as fit the device, or as there can be tiles.
    fn launch(
        &self,
        module: super::plan::Module,
        p: &GroupedGemmParams,
        device: &DeviceInfo,
    ) -> Result<Launch> {
        let tiles = most_tiles(p, self.rows, self.columns)?;
        // A block costs 1 KiB more than it asks for, and a multiprocessor has 1 KiB more than one block may have.
        let fit = (device.shared_per_block + 1024) / (self.shared + 1024);
        let per_sm = self.blocks_per_sm.min(fit.max(1));
        let resident = u64::from(device.sm_count.max(1)) * u64::from(per_sm);
        let blocks = if p.a_rows == 0 {
            0
        } else {
            tiles.min(resident) as u32
        };
        Ok(Launch::new(module, self.kernel, p)
            .grid([blocks, 1, 1])
            .block([self.threads, 1, 1])
            .shared(self.shared))
    }
}

/// Whether A and the weights can be read 16 bytes at a time: rows begin on 16 bytes. (K itself may be anything.)
fn is_aligned(p: &GroupedGemmParams, element: u64) -> bool {
    let between_experts = match p.experts {
        0 | 1 => 0,
        _ => p.gate_expert_stride | p.up_expert_stride,
    };
    let strides = p.a_row_stride | p.gate_row_stride | p.up_row_stride | between_experts;
    (p.a.0 | p.gate.0 | p.up.0 | (strides as u64).wrapping_mul(element)).is_multiple_of(16)
}

/// Rows of an expert on average.
fn mean_rows(p: &GroupedGemmParams) -> u32 {
    p.rows.div_ceil(p.experts.max(1))
}
