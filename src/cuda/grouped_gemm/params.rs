//! The parameters of every grouped product's kernel, byte for byte as `kernels/include/grouped.cuh` and `epilogue.cuh` have them.

use crate::cuda::plan::DevicePtr;
use crate::grouped_gemm::{Activation, ActivationFunction, Clamp};
use bytemuck::{Pod, Zeroable};

/// Bits of [`GroupedGemmParams::flags`].
#[derive(Clone, Copy, Debug)]
pub struct Flags;

impl Flags {
    /// `gate` and `up` are arrays of addresses; an expert's matrix begins its expert stride behind its address.
    pub const WEIGHT_TABLES: u32 = 1;
    /// `gate_bias` and `up_bias` are arrays of addresses in the same way.
    pub const BIAS_TABLES: u32 = 2;
    /// `out` and its row stride are multiples of 16 bytes.
    pub const ALIGNED_OUT: u32 = 4;
    /// The addresses in the tables of weights are multiples of 16: chooses the kernel, which does not look at it.
    pub const ALIGNED_TABLES: u32 = 8;
    /// Exact products: bf16 weights count as f32, in the order of f32's chain.
    pub const WIDENED_WEIGHTS: u32 = 16;
}

/// `epilogue::Activation`: `min(act(min(g, gate_max)), result_max)`, times `clamp(u, ±up_limit)` where gated. No limit is +∞.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct ActivationParams {
    /// The function: `epilogue::Kind`.
    pub kind: u32,
    /// 1 where there is a gate.
    pub gated: u32,
    /// Upper limit of g.
    pub gate_max: f32,
    /// Upper limit of the activated value.
    pub result_max: f32,
    /// Limit of |u|.
    pub up_limit: f32,
    /// Slope of gpt-oss's sigmoid.
    pub alpha: f32,
    /// Cap of g, 0 for none.
    pub gate_cap: f32,
    /// Cap of u, 0 for none.
    pub up_cap: f32,
}
const _: () = assert!(size_of::<ActivationParams>() == 32);

impl ActivationParams {
    /// An activation as the kernels have it; `None` leaves the sums alone.
    pub fn new(activation: Option<Activation>) -> Self {
        let mut p = Self {
            kind: 0,
            gated: 0,
            gate_max: f32::INFINITY,
            result_max: f32::INFINITY,
            up_limit: f32::INFINITY,
            alpha: 0.0,
            gate_cap: 0.0,
            up_cap: 0.0,
        };
        let Some(activation) = activation else {
            return p;
        };
        p.gated = activation.gated.into();
        p.kind = match activation.function {
            ActivationFunction::Identity => 0,
            ActivationFunction::Silu => 1,
            ActivationFunction::Gelu => 2,
            ActivationFunction::GeluTanh => 3,
            ActivationFunction::Relu => 4,
            ActivationFunction::Relu2 => 5,
        };
        match activation.clamp {
            Clamp::None => {}
            Clamp::Pre { limit } => (p.gate_max, p.up_limit) = (limit, limit),
            Clamp::Post { limit } => (p.result_max, p.up_limit) = (limit, limit),
            Clamp::GptOss { limit, alpha } => {
                (p.kind, p.gate_max, p.up_limit, p.alpha) = (6, limit, limit, alpha);
            }
            Clamp::Softcap { gate, up } => (p.kind, p.gate_cap, p.up_cap) = (7, gate, up),
        }
        p
    }
}

/// `grouped::GroupedGemmParams`: `out[r] = act(scale · A[src(r)] · W[e]ᵀ + b[e])`. Strides are in elements, formats are those of [`DType`](crate::DType) by
/// number. A plain product has `up` only.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct GroupedGemmParams {
    /// `[a_rows, K]`
    pub a: DevicePtr,
    /// src(r) = `pair_of_row[r] / slots`; absent: r.
    pub pair_of_row: DevicePtr,
    /// A factor for each pair (each row where `pair_of_row` is absent); absent: none.
    pub input_scale: DevicePtr,
    /// `[E + 1]`; absent: rows `0..rows` all belong to expert 0.
    pub offsets: DevicePtr,
    /// `[E]`; absent: `offsets[e + 1] − offsets[e]`.
    pub counts: DevicePtr,
    /// `[E, N, K]`, or a table of addresses.
    pub gate: DevicePtr,
    /// As `gate`.
    pub up: DevicePtr,
    /// `[E, N]`; absent: none.
    pub gate_bias: DevicePtr,
    /// As `gate_bias`.
    pub up_bias: DevicePtr,
    /// `[rows, N]`
    pub out: DevicePtr,
    /// From one row of A to the next.
    pub a_row_stride: i64,
    /// From one out-feature of gate to the next.
    pub gate_row_stride: i64,
    /// From one expert's gate to the next; from the table's address to the gate.
    pub gate_expert_stride: i64,
    /// From one out-feature of up to the next.
    pub up_row_stride: i64,
    /// From one expert's up to the next; from the table's address to the up matrix.
    pub up_expert_stride: i64,
    /// From one expert's gate bias to the next.
    pub gate_bias_expert_stride: i64,
    /// From one expert's up bias to the next.
    pub up_bias_expert_stride: i64,
    /// From one row of the output to the next.
    pub out_row_stride: i64,
    /// From one column's gate bias to the next.
    pub gate_bias_stride: u32,
    /// From one column's up bias to the next.
    pub up_bias_stride: u32,
    /// E
    pub experts: u32,
    /// Rows of the output, the most that are written.
    pub rows: u32,
    /// N
    pub n: u32,
    /// K
    pub k: u32,
    /// Pairs of a token.
    pub slots: u32,
    /// [`Flags`]
    pub flags: u32,
    /// Format of A.
    pub a_dtype: u32,
    /// Format of gate and up.
    pub w_dtype: u32,
    /// Format of the biases.
    pub bias_dtype: u32,
    /// Format of the output.
    pub out_dtype: u32,
    /// Rows of A, the most that are read.
    pub a_rows: u32,
    /// 0
    pub reserved: u32,
    /// What is applied to the sums.
    pub activation: ActivationParams,
}
const _: () = assert!(size_of::<GroupedGemmParams>() == 232);
