//! `moe_matrices`: packed weights; and the grouped product.

use super::cpu::moe_cpu;
use super::handle::{check_place, destroy, exclusive, give, handle, shared};
use super::memory::{
    Apart, InMatrix, InSlice, Regions, Versioned, dtype, moe_dtype, moe_matrix, moe_matrix_mut,
    probe, read_struct,
};
use super::router::flag;
use super::status::*;
use crate::grouped_gemm::{
    Activation, ActivationFunction, Clamp, Gather, Groups, PackedMatrices, grouped_gemm_into,
};
use bytemuck::Zeroable;

/// moe_activation.function: z.
pub const MOE_ACT_IDENTITY: u32 = 0;
/// z * sigmoid(z)
pub const MOE_ACT_SILU: u32 = 1;
/// z / 2 * (1 + erf(z / sqrt 2))
pub const MOE_ACT_GELU: u32 = 2;
/// GELU by tanh
pub const MOE_ACT_GELU_TANH: u32 = 3;
/// max(z, 0)
pub const MOE_ACT_RELU: u32 = 4;
/// max(z, 0)^2
pub const MOE_ACT_RELU2: u32 = 5;

/// moe_activation.clamp: none.
pub const MOE_CLAMP_NONE: u32 = 0;
/// act(min(g, limit)) * clamp(u, +-limit)
pub const MOE_CLAMP_PRE: u32 = 1;
/// min(act(g), limit) * clamp(u, +-limit)
pub const MOE_CLAMP_POST: u32 = 2;
/// gpt-oss: (u + 1) * g * sigmoid(alpha * g) after clamping g to limit and u to +-limit.
pub const MOE_CLAMP_GPT_OSS: u32 = 3;
/// cap(g) * sigmoid(g) * cap(u), cap(z) = c * tanh(z / c) with c = limit for g and alpha for u; a cap of 0 leaves its side alone.
pub const MOE_CLAMP_SOFTCAP: u32 = 4;

/// What happens between an expert's two products: act(gate) * up if gated, else act(up). SwiGLU: MOE_ACT_SILU, gated.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_activation {
    /// sizeof(moe_activation)
    pub struct_size: usize,
    /// MOE_ACT_*
    pub function: u32,
    /// 1 for a gate and an up projection, 0 for one projection.
    pub gated: u32,
    /// MOE_CLAMP_*
    pub clamp: u32,
    /// The clamp's limit.
    pub limit: f32,
    /// The clamp's second number.
    pub alpha: f32,
}

// SAFETY: repr(C), begins with its size, numbers.
unsafe impl Versioned for moe_activation {}

/// Reads an activation.
///
/// # Safety
/// `p` is null or valid.
pub(super) unsafe fn activation(p: *const moe_activation) -> Checked<Activation> {
    // SAFETY: this function's contract.
    let a = unsafe { read_struct("activation", p) }?;
    let function = match a.function {
        MOE_ACT_IDENTITY => ActivationFunction::Identity,
        MOE_ACT_SILU => ActivationFunction::Silu,
        MOE_ACT_GELU => ActivationFunction::Gelu,
        MOE_ACT_GELU_TANH => ActivationFunction::GeluTanh,
        MOE_ACT_RELU => ActivationFunction::Relu,
        MOE_ACT_RELU2 => ActivationFunction::Relu2,
        other => return Err(Fault::value("activation.function", "MOE_ACT_*", other)),
    };
    let (limit, alpha) = (a.limit, a.alpha);
    let clamp = match a.clamp {
        MOE_CLAMP_NONE => Clamp::None,
        MOE_CLAMP_PRE => Clamp::Pre { limit },
        MOE_CLAMP_POST => Clamp::Post { limit },
        MOE_CLAMP_GPT_OSS => Clamp::GptOss { limit, alpha },
        MOE_CLAMP_SOFTCAP => Clamp::Softcap {
            gate: limit,
            up: alpha,
        },
        other => return Err(Fault::value("activation.clamp", "MOE_CLAMP_*", other)),
    };
    let gated = flag("activation.gated", a.gated)?;
    Ok(Activation {
        function,
        gated,
        clamp,
    })
}

/// Bytes that packing matrices of `rows` x `cols` may ask for: panels are at most 32 columns wide, and k is padded to pairs.
pub(super) fn packed_bytes(rows: usize, cols: usize) -> Option<usize> {
    let rows = rows.checked_next_multiple_of(32)?;
    rows.checked_mul(cols.checked_add(2)?)?
        .checked_mul(size_of::<f32>())
}

/// Equally shaped matrices [N, K], one for each expert, packed (copied) for one instruction set.
pub struct moe_matrices {
    _opaque: (),
}

handle!(moe_matrices, PackedMatrices, b"moematr1");

/// Makes an empty set of [n, k] matrices kept in dtype; gated = 1 for pairs of a gate and an up matrix.
///
/// Errors: MOE_ERROR_VALUE for a zero size, an unknown dtype or flag; MOE_ERROR_OVERFLOW.
///
/// # Safety
/// cpu: NULL or living. out: writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_matrices_create(
    cpu: *const moe_cpu,
    n: usize,
    k: usize,
    format: moe_dtype,
    gated: u32,
    out: *mut *mut moe_matrices,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        unsafe { check_place(out) }?;
        // SAFETY: the caller's contract.
        let cpu = unsafe { shared(cpu) }?;
        let format = dtype("dtype", format)?;
        let set = match flag("gated", gated)? {
            true => PackedMatrices::new_gated(&cpu.cpu, n, k, format)?,
            false => PackedMatrices::new(&cpu.cpu, n, k, format)?,
        };
        // SAFETY: the caller's contract.
        unsafe { give(out, set) }
    })
}

/// Ends a handle. NULL is allowed. MOE_ERROR_BUSY while a call uses it.
///
/// # Safety
/// set: NULL or living, not used afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_matrices_destroy(set: *mut moe_matrices) -> moe_status {
    // SAFETY: the caller's contract.
    guard(|| unsafe { destroy(set) })
}

/// Packs one more expert: up [N, K], with gate [N, K] in a gated set and gate = NULL in a plain one; biases [N] f32 or NULL. Rounded to the set's dtype.
///
/// Errors: MOE_ERROR_SHAPE, MOE_ERROR_VALUE, MOE_ERROR_PACKED_FOR, MOE_ERROR_OUT_OF_RESOURCES; the set is unchanged then.
///
/// # Safety
/// Handles: NULL or living. Matrices and arrays: NULL or valid, as long as they say.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_matrices_push(
    cpu: *const moe_cpu,
    set: *mut moe_matrices,
    gate: *const moe_matrix,
    up: *const moe_matrix,
    gate_bias: *const f32,
    up_bias: *const f32,
    bias_len: usize,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let (cpu, mut set) = (unsafe { shared(cpu) }?, unsafe { exclusive(set) }?);
        let mut regions = Regions::new();
        // SAFETY: the caller's contract.
        let (gate, up) = unsafe {
            (
                regions.optional_matrix("gate", gate)?,
                regions.matrix("up", up)?,
            )
        };
        // SAFETY: the caller's contract.
        let (gate_bias, up_bias) = unsafe {
            (
                bias(&mut regions, "gate_bias", gate_bias, bias_len)?,
                bias(&mut regions, "up_bias", up_bias, bias_len)?,
            )
        };
        let apart = regions.apart()?;
        if (up.rows(), up.cols()) == (set.n(), set.k()) {
            let each = packed_bytes(set.n(), set.k());
            probe("packed matrix", each.and_then(|n| n.checked_mul(2)))?;
        }
        let (gate, up) = (gate.map(|g| g.view(&apart)).transpose()?, up.view(&apart)?);
        let gate_bias = gate_bias.map(|b| b.get(&apart));
        let up_bias = up_bias.map(|b| b.get(&apart));
        let set = &mut *set;
        cpu.run(|cpu| match (gate, gate_bias) {
            (Some(gate), _) => set.push_gated(cpu, gate, up, gate_bias, up_bias),
            (None, None) => set.push(cpu, up, up_bias),
            (None, Some(_)) => Err(crate::Error::value(
                "gate_bias",
                "none without a gate",
                "one",
            )),
        })?;
        Ok(())
    })
}

/// A bias, or none: its length counts where there is one.
///
/// # Safety
/// `data` is null or has `len` readable floats until the C function returns.
pub(super) unsafe fn bias(
    regions: &mut Regions,
    argument: &'static str,
    data: *const f32,
    len: usize,
) -> Checked<Option<InSlice<f32>>> {
    if data.is_null() {
        return Ok(None);
    }
    // SAFETY: this function's contract.
    unsafe { regions.slice(argument, data, len) }.map(Some)
}

/// The number of experts in the set; 0 for a handle that is none.
///
/// # Safety
/// set: NULL or living.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_matrices_len(set: *const moe_matrices) -> usize {
    let mut n = 0;
    guard(|| {
        // SAFETY: the caller's contract.
        n = unsafe { shared(set) }?.len();
        Ok(())
    });
    n
}

/// Which rows belong to which expert, and where they come from.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_groups {
    /// sizeof(moe_groups)
    pub struct_size: usize,
    /// [experts + 1], ascending: where each expert's rows begin.
    pub offsets: *const usize,
    /// [experts]: how many there are; offsets[e] + counts[e] <= offsets[e + 1].
    pub counts: *const usize,
    /// As many as are packed.
    pub experts: usize,
    /// For each row its pair t * slots + slot; NULL: row r is row r of x.
    pub pair_of_row: *const u32,
    /// Elements of pair_of_row.
    pub pair_of_row_len: usize,
    /// Pairs of a token.
    pub slots: usize,
    /// [T * slots]: a factor on each pair's input; NULL for none.
    pub input_scale: *const f32,
    /// Elements of input_scale.
    pub input_scale_len: usize,
}

// SAFETY: repr(C), begins with its size, integers and pointers.
unsafe impl Versioned for moe_groups {}

/// [`moe_groups`], described to the regions.
pub(super) struct InGroups {
    offsets: InSlice<usize>,
    counts: InSlice<usize>,
    pair_of_row: Option<InSlice<u32>>,
    slots: usize,
    input_scale: Option<InSlice<f32>>,
}

impl InGroups {
    /// # Safety
    /// `p` is null or valid, with arrays as long as it says, until the C function returns.
    pub(super) unsafe fn read(regions: &mut Regions, p: *const moe_groups) -> Checked<Self> {
        // SAFETY: this function's contract.
        let g = unsafe { read_struct("groups", p) }?;
        let ends = g.experts.checked_add(1).ok_or(crate::Error::Overflow {
            what: "groups.experts",
        })?;
        // SAFETY: this function's contract.
        unsafe {
            Ok(Self {
                offsets: regions.slice("groups.offsets", g.offsets, ends)?,
                counts: regions.slice("groups.counts", g.counts, g.experts)?,
                pair_of_row: regions.optional_slice(
                    "groups.pair_of_row",
                    g.pair_of_row,
                    g.pair_of_row_len,
                )?,
                slots: g.slots,
                input_scale: regions.optional_slice(
                    "groups.input_scale",
                    g.input_scale,
                    g.input_scale_len,
                )?,
            })
        }
    }

    pub(super) fn groups<'a>(&self, apart: &'a Apart) -> Groups<'a> {
        Groups::Ragged {
            offsets: self.offsets.get(apart),
            counts: self.counts.get(apart),
        }
    }

    pub(super) fn gather<'a>(&self, apart: &'a Apart) -> Checked<Option<Gather<'a>>> {
        let input_scale = self.input_scale.map(|s| s.get(apart));
        match self.pair_of_row {
            Some(pairs) => Ok(Some(Gather {
                pair_of_row: pairs.get(apart),
                slots: self.slots,
                input_scale,
            })),
            None if input_scale.is_some() => Err(Fault::value(
                "groups.input_scale",
                "none without pair_of_row",
                "some",
            )),
            None => Ok(None),
        }
    }
}

/// The grouped product: out[r] = act(A[r] * W[e]^T + b[e]) for each row r of each expert e, A[r] = x[pair_of_row[r] / slots], or x[r].
///
/// out is [rows, N] of any dtype, rows = offsets[experts]; padding rows are left as they are. activation: as the set is gated or not; NULL for a plain product. scratch: moe_scratch_bytes(cpu) bytes of any
/// content and alignment.
///
/// Errors: those of pointers, MOE_ERROR_SHAPE, MOE_ERROR_VALUE, MOE_ERROR_PACKED_FOR; nothing is written then.
///
/// # Safety
/// Handles: NULL or living. Structs and arrays: NULL or valid, as long as they say.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_grouped_gemm(
    cpu: *const moe_cpu,
    weights: *const moe_matrices,
    x: *const moe_matrix,
    groups: *const moe_groups,
    act: *const moe_activation,
    out: *const moe_matrix_mut,
    scratch: *mut u8,
    scratch_bytes: usize,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let (cpu, weights) = (unsafe { shared(cpu) }?, unsafe { shared(weights) }?);
        let act = match act.is_null() {
            true => None,
            // SAFETY: the caller's contract.
            false => Some(unsafe { activation(act) }?),
        };
        let mut regions = Regions::new();
        // SAFETY: the caller's contract.
        let (x, groups, out, scratch): (InMatrix, _, _, _) = unsafe {
            (
                regions.matrix("x", x)?,
                InGroups::read(&mut regions, groups)?,
                regions.matrix_mut("out", out)?,
                regions.slice_mut("scratch", scratch, scratch_bytes)?,
            )
        };
        let apart = regions.apart()?;
        let (x, out, scratch) = (x.view(&apart)?, out.view(&apart)?, scratch.get(&apart));
        let (gather, groups) = (groups.gather(&apart)?, groups.groups(&apart));
        let weights = &*weights;
        Ok(cpu.run(|cpu| grouped_gemm_into(cpu, x, gather, weights, groups, act, out, scratch))?)
    })
}
