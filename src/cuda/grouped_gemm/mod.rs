//! The ragged grouped product on the GPU: which kernel computes it, as plain data.
//!
//! ```text
//! out[r] = act( A[src(r)] · W[e]ᵀ + b[e] )     rows r of expert e: offsets[e] .. offsets[e] + counts[e];  src(r) = pair_of_row[r] / slots, or r
//! ```
//!
//! Weights are one allocation or one for each expert, found through a table of addresses on the device ([`Placement`]). Three ways in: [`plan_grouped_gemm`],
//! [`raw::grouped_gemm_raw`](super::raw::grouped_gemm_raw), and from cudarc's slices [`Cuda::grouped_gemm_into`](super::Cuda::grouped_gemm_into).
//!
//! ```
//! use moe_kernels::cuda::combine::DeviceRows;
//! use moe_kernels::cuda::grouped_gemm::{GroupPointers, GroupedGemm, Numerics, WeightPointers, plan_grouped_gemm};
//! use moe_kernels::cuda::{DeviceInfo, DevicePtr};
//! use moe_kernels::grouped_gemm::{Activation, ActivationFunction};
//! use moe_kernels::DType;
//! // The down projection of 128 experts, 768 to 2048, for 4096 sorted rows; each expert a tensor of its own. (Addresses of one's own.)
//! let [h, table, ys, offsets, counts] = [1, 2, 3, 4, 5].map(|i| DevicePtr(i << 30));
//! let rows = |ptr, stride| DeviceRows { ptr, stride, dtype: DType::BF16 };
//! let product = GroupedGemm {
//!     a: rows(h, 768), a_rows: 4096, gather: None,
//!     groups: GroupPointers::Ragged { offsets, counts, experts: 128 },
//!     gate: None, up: WeightPointers::table(table, DType::BF16, 768, 256), gate_bias: None, up_bias: None,
//!     activation: Activation::plain(ActivationFunction::Identity),
//!     out: rows(ys, 2048), rows: 4096, n: 2048, k: 768, numerics: Numerics::TensorCores, strict: false,
//! };
//! let launch = plan_grouped_gemm(&product, &DeviceInfo::H100)?;
//! assert_eq!(launch.kernel, "moe_grouped_gemm_sm80_bf16_m32"); // 32 rows an expert on average
//! # Ok::<(), moe_kernels::Error>(())
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
//! | `sm90` | compute capability 9.0, layouts that TMA takes (no tables) | one chain of wgmma in ascending k |
//! | `sm80` | everything else | one chain of mma.sync in ascending k |
//!
//! so that a strict product has one class on a given device for given weights. [`Numerics::Exact`], which is what f32 gets, has one class and the CPU's bits, on every
//! device and for every format; [`Numerics::ExactWidened`] those of the CPU with the weights in f32.

pub mod decode;
pub mod f32;
mod operands;
pub mod params;
pub mod sm80;
pub mod sm90;
mod stage;

pub use operands::{
    BiasPointers, GatherPointers, GroupPointers, GroupedGemm, Numerics, Placement, WeightPointers,
};
pub use stage::{GatherViews, GroupViews, GroupedGemmViews};

use super::combine::DeviceRows;
use super::permute::check_pointer;
use super::plan::{DeviceInfo, DevicePtr, Launch};
use crate::element::DType;
use crate::error::{Error, Result, checked_mul};
use params::{ActivationParams, Flags, GroupedGemmParams};

/// The most rows for each expert on average with which the kernels for few rows are taken.
pub const DECODE_ROWS: usize = 4;

/// Plans a grouped product: one launch, whose grid has a zero when there is nothing to do.
///
/// # Errors
/// [`Error::Value`] naming an operand that is absent though it has elements, misaligned, of a stride below its width, or a gate that the activation does not have;
/// [`Error::Overflow`] for sizes beyond 32 bits.
pub fn plan_grouped_gemm(product: &GroupedGemm, device: &DeviceInfo) -> Result<Launch> {
    let params = params(product)?;
    match product.numerics {
        Numerics::Exact | Numerics::ExactWidened => return f32::plan_exact(&params, device),
        Numerics::TensorCores if !product.is_16_bit() => return f32::plan_exact(&params, device),
        Numerics::TensorCores | Numerics::Tf32 => {}
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
    sm80::plan_grouped_gemm_sm80(&params, device)
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
    same_kind("gate", gate.placement, p.up.placement)?;
    let bias = check_biases(p)?;
    let bias_dtype = bias.map_or(DType::F32, |b| b.dtype);
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
    let expert_stride = |b: Option<BiasPointers>| b.map_or(0, |b| b.placement.stride() as i64);
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
        gate_expert_stride: gate.placement.stride() as i64,
        up_row_stride: p.up.row_stride as i64,
        up_expert_stride: p.up.placement.stride() as i64,
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
        flags: flags(p, gate, bias),
        a_dtype: p.a.dtype as u32,
        w_dtype: p.up.dtype as u32,
        bias_dtype: bias_dtype as u32,
        out_dtype: p.out.dtype as u32,
        a_rows: p.a_rows as u32,
        reserved: 0,
        activation: ActivationParams::new(Some(p.activation)),
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
    // A table's distance counts once.
    let steps = if w.placement.is_table() { 1 } else { experts };
    let (rows, matrices) = (bytes(w.row_stride, n), bytes(w.placement.stride(), steps));
    rows.zip(matrices)
        .and_then(|(r, m)| r.checked_add(m))
        .filter(|&b| b <= isize::MAX as usize)
        .ok_or(overflow)?;
    check_placement("weights", w.ptr, w.placement, w.dtype, experts, n.min(k))
}

/// The address of `experts` times `len` elements, or of the table that leads to them.
fn check_placement(
    argument: &'static str,
    ptr: DevicePtr,
    placement: Placement,
    dtype: DType,
    experts: usize,
    len: usize,
) -> Result<()> {
    let element = dtype.size();
    match placement {
        Placement::Strided { .. } => check_pointer(argument, ptr, element as u64, experts.min(len)),
        Placement::Table { offset, alignment } => {
            if !alignment.is_power_of_two() || alignment < element {
                return Err(Error::value(
                    argument,
                    format_args!(
                        "a table of addresses at multiples of a power of two from {element} on"
                    ),
                    alignment,
                ));
            }
            checked_mul(offset, element, argument)?;
            check_pointer(argument, ptr, 8, experts.min(len))
        }
    }
}

/// One of the biases, if there are any: what both have in common.
fn check_biases(p: &GroupedGemm) -> Result<Option<BiasPointers>> {
    let Some(one) = p.up_bias.or(p.gate_bias) else {
        return Ok(None);
    };
    for b in [p.gate_bias, p.up_bias].into_iter().flatten() {
        if b.dtype != one.dtype {
            return Err(Error::value("bias", one.dtype, b.dtype));
        }
        if b.stride > u32::MAX as usize {
            return Err(Error::Overflow { what: "bias" });
        }
        same_kind("bias", b.placement, one.placement)?;
        check_placement("bias", b.ptr, b.placement, b.dtype, p.experts(), p.n)?;
    }
    Ok(Some(one))
}

/// A launch has one flag for both matrices of a gated product, and one for both biases.
fn same_kind(argument: &'static str, found: Placement, expected: Placement) -> Result<()> {
    if found.is_table() == expected.is_table() {
        return Ok(());
    }
    let name = |p: Placement| {
        if p.is_table() {
            "a table"
        } else {
            "one allocation"
        }
    };
    let expected = format!("{}, as the up projection's", name(expected));
    Err(Error::value(argument, expected, name(found)))
}

fn flags(p: &GroupedGemm, gate: WeightPointers, bias: Option<BiasPointers>) -> u32 {
    let out_bytes = p.out.stride.wrapping_mul(p.out.dtype.size()) as u64;
    let aligned_table = |w: WeightPointers| matches!(w.placement, Placement::Table { alignment, .. } if alignment.is_multiple_of(16));
    let mut flags = 0;
    let mut set = |yes: bool, flag: u32| flags |= if yes { flag } else { 0 };
    set(
        (p.out.ptr.0 | out_bytes).is_multiple_of(16),
        Flags::ALIGNED_OUT,
    );
    set(p.up.placement.is_table(), Flags::WEIGHT_TABLES);
    set(
        aligned_table(gate) && aligned_table(p.up),
        Flags::ALIGNED_TABLES,
    );
    set(
        bias.is_some_and(|b| b.placement.is_table()),
        Flags::BIAS_TABLES,
    );
    set(p.numerics == Numerics::ExactWidened, Flags::WIDENED_WEIGHTS);
    flags
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
        let resident = u64::from(device.sm_count.max(1)) * u64::from(self.blocks_per_sm);
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
    let tables = p.flags & Flags::WEIGHT_TABLES != 0;
    if tables && p.flags & Flags::ALIGNED_TABLES == 0 {
        return false;
    }
    // A table's distance counts for every expert, a stride from the second one on.
    let several = i64::from(tables || p.experts > 1);
    let expert_strides = (p.gate_expert_stride | p.up_expert_stride) * several;
    let strides = p.a_row_stride | p.gate_row_stride | p.up_row_stride | expert_strides;
    let weights = if tables { 0 } else { p.gate.0 | p.up.0 };
    (p.a.0 | weights | (strides as u64).wrapping_mul(element)).is_multiple_of(16)
}

/// Rows of an expert on average.
fn mean_rows(p: &GroupedGemmParams) -> u32 {
    p.rows.div_ceil(p.experts.max(1))
}
