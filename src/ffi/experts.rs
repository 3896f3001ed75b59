//! `moe_experts`: both projections of every expert.

use super::cpu::moe_cpu;
use super::grouped_gemm::{InGroups, activation, bias, moe_activation, moe_groups, packed_bytes};
use super::handle::{check_place, destroy, exclusive, give, handle, shared};
use super::memory::{
    InMatrix, Regions, Versioned, dtype, moe_dtype, moe_matrix, moe_matrix_mut, probe, read_struct,
};
use super::status::*;
use crate::AnyMatRef;
use crate::experts::{ExpertWeights, PackedExperts};
use bytemuck::Zeroable;

/// moe_expert_weights.layout: up [I, H] and, where experts are gated, gate [I, H].
pub const MOE_LAYOUT_SEPARATE: u32 = 0;
/// gate_up [2I, H]: gate rows, then up rows. With exchanged strides: [H, 2I], gate columns first (Llama 4).
pub const MOE_LAYOUT_FUSED: u32 = 1;
/// gate_up [2I, H]: rows alternate, gate first. With exchanged strides: gpt-oss.
pub const MOE_LAYOUT_INTERLEAVED: u32 = 2;

/// One expert's weights as the caller has them: out-features first. Biases are f32, or NULL.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_expert_weights {
    /// sizeof(moe_expert_weights)
    pub struct_size: usize,
    /// [I, H] (MOE_LAYOUT_SEPARATE, gated), else NULL.
    pub gate: *const moe_matrix,
    /// [I, H] (MOE_LAYOUT_SEPARATE), else NULL.
    pub up: *const moe_matrix,
    /// [2I, H] (the other layouts), else NULL.
    pub gate_up: *const moe_matrix,
    /// [H, I]
    pub down: *const moe_matrix,
    /// [I]
    pub gate_bias: *const f32,
    /// Elements of gate_bias.
    pub gate_bias_len: usize,
    /// [I]
    pub up_bias: *const f32,
    /// Elements of up_bias.
    pub up_bias_len: usize,
    /// [H]
    pub down_bias: *const f32,
    /// Elements of down_bias.
    pub down_bias_len: usize,
    /// MOE_LAYOUT_*
    pub layout: u32,
    /// 0
    pub reserved: u32,
}

// SAFETY: repr(C), begins with its size, integers and pointers.
unsafe impl Versioned for moe_expert_weights {}

/// All experts of a layer, packed (copied) for one instruction set.
pub struct moe_experts {
    _opaque: (),
}

handle!(moe_experts, PackedExperts, b"moeexpe1");

/// Makes an empty set of experts hidden -> intermediate -> hidden, with weights kept in dtype.
///
/// Errors: MOE_ERROR_VALUE for a zero size, an activation or dtype that is none; MOE_ERROR_OVERFLOW.
///
/// # Safety
/// cpu: NULL or living. act: NULL or valid. out: writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_experts_create(
    cpu: *const moe_cpu,
    hidden: usize,
    intermediate: usize,
    act: *const moe_activation,
    format: moe_dtype,
    out: *mut *mut moe_experts,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        unsafe { check_place(out) }?;
        // SAFETY: the caller's contract.
        let cpu = unsafe { shared(cpu) }?;
        // SAFETY: the caller's contract.
        let act = unsafe { activation(act) }?;
        let format = dtype("dtype", format)?;
        let experts = PackedExperts::new(&cpu.cpu, hidden, intermediate, act, format)?;
        // SAFETY: the caller's contract.
        unsafe { give(out, experts) }
    })
}

/// Ends a handle. NULL is allowed. MOE_ERROR_BUSY while a call uses it.
///
/// # Safety
/// experts: NULL or living, not used afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_experts_destroy(experts: *mut moe_experts) -> moe_status {
    // SAFETY: the caller's contract.
    guard(|| unsafe { destroy(experts) })
}

/// The matrices of an expert by their layout, described to the regions.
enum Projections {
    Separate(Option<InMatrix>, InMatrix),
    Fused(InMatrix),
    Interleaved(InMatrix),
}

impl Projections {
    /// # Safety
    /// The pointers of `w` are null or valid.
    unsafe fn read(regions: &mut Regions, w: &moe_expert_weights) -> Checked<Self> {
        let unused = |argument, m: *const moe_matrix| match m.is_null() {
            true => Ok(()),
            false => Err(Fault::value(argument, "NULL with this layout", "a matrix")),
        };
        if w.layout == MOE_LAYOUT_SEPARATE {
            unused("gate_up", w.gate_up)?;
            // SAFETY: this function's contract.
            let (gate, up) = unsafe {
                (
                    regions.optional_matrix("gate", w.gate)?,
                    regions.matrix("up", w.up)?,
                )
            };
            return Ok(Self::Separate(gate, up));
        }
        unused("gate", w.gate)?;
        unused("up", w.up)?;
        // SAFETY: this function's contract.
        let both = unsafe { regions.matrix("gate_up", w.gate_up) }?;
        match w.layout {
            MOE_LAYOUT_FUSED => Ok(Self::Fused(both)),
            MOE_LAYOUT_INTERLEAVED => Ok(Self::Interleaved(both)),
            other => Err(Fault::value("layout", "MOE_LAYOUT_*", other)),
        }
    }
}

/// Packs one more expert. Its weights may be freed afterwards. They are rounded to the set's dtype where theirs differs.
///
/// Errors: those of pointers, MOE_ERROR_SHAPE, MOE_ERROR_VALUE, MOE_ERROR_PACKED_FOR, MOE_ERROR_OUT_OF_RESOURCES; the set is unchanged then.
///
/// # Safety
/// Handles: NULL or living. weights: NULL or valid, with memory as long as it says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_experts_push(
    cpu: *const moe_cpu,
    experts: *mut moe_experts,
    weights: *const moe_expert_weights,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let (cpu, mut experts) = (unsafe { shared(cpu) }?, unsafe { exclusive(experts) }?);
        // SAFETY: the caller's contract.
        let w = unsafe { read_struct("weights", weights) }?;
        if w.reserved != 0 {
            return Err(Fault::value("weights", "reserved = 0", w.reserved));
        }
        let mut regions = Regions::new();
        // SAFETY: the caller's contract.
        let (projections, down, gate_bias, up_bias, down_bias) = unsafe {
            (
                Projections::read(&mut regions, &w)?,
                regions.matrix("down", w.down)?,
                bias(&mut regions, "gate_bias", w.gate_bias, w.gate_bias_len)?,
                bias(&mut regions, "up_bias", w.up_bias, w.up_bias_len)?,
                bias(&mut regions, "down_bias", w.down_bias, w.down_bias_len)?,
            )
        };
        let apart = regions.apart()?;
        let down = down.view(&apart)?;
        let expert = match projections {
            Projections::Separate(None, up) => ExpertWeights::plain(up.view(&apart)?, down),
            Projections::Separate(Some(gate), up) => {
                ExpertWeights::gated(gate.view(&apart)?, up.view(&apart)?, down)
            }
            Projections::Fused(both) => ExpertWeights::fused(both.view(&apart)?, down)?,
            Projections::Interleaved(both) => ExpertWeights::interleaved(both.view(&apart)?, down)?,
        };
        let expert = expert.with_biases(
            gate_bias.map(|b| b.get(&apart)),
            up_bias.map(|b| b.get(&apart)),
            down_bias.map(|b| b.get(&apart)),
        );
        check_sizes(&experts, &expert.up, &expert.down)?;
        let experts = &mut *experts;
        cpu.run(|cpu| experts.push(cpu, &expert))?;
        Ok(())
    })
}

/// Refuses experts whose packed memory cannot be had, once their shapes are known to be right.
fn check_sizes(experts: &PackedExperts, up: &AnyMatRef<'_>, down: &AnyMatRef<'_>) -> Checked {
    let (h, i) = (experts.hidden(), experts.intermediate());
    up.expect("up", i, h)?;
    down.expect("down", h, i)?;
    let both =
        packed_bytes(i, h).and_then(|up| up.checked_mul(2)?.checked_add(packed_bytes(h, i)?));
    probe("packed expert", both)
}

/// The number of experts in the set; 0 for a handle that is none.
///
/// # Safety
/// experts: NULL or living.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_experts_len(experts: *const moe_experts) -> usize {
    let mut n = 0;
    guard(|| {
        // SAFETY: the caller's contract.
        n = unsafe { shared(experts) }?.len();
        Ok(())
    });
    n
}

/// Bytes of the packed weights; 0 for a handle that is none.
///
/// # Safety
/// experts: NULL or living.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_experts_bytes(experts: *const moe_experts) -> usize {
    let mut n = 0;
    guard(|| {
        // SAFETY: the caller's contract.
        n = unsafe { shared(experts) }?.bytes();
        Ok(())
    });
    n
}

/// Both products: h = act(A * W_gate_up^T + b) [rows, I], ys = h * W_down^T + b [rows, H], for the rows of each expert. h is usually of x's dtype. scratch as in
/// moe_grouped_gemm.
///
/// Errors: those of pointers, MOE_ERROR_SHAPE, MOE_ERROR_VALUE, MOE_ERROR_PACKED_FOR; nothing is written then.
///
/// # Safety
/// Handles: NULL or living. Structs and arrays: NULL or valid, as long as they say.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_experts_forward(
    cpu: *const moe_cpu,
    experts: *const moe_experts,
    x: *const moe_matrix,
    groups: *const moe_groups,
    h: *const moe_matrix_mut,
    ys: *const moe_matrix_mut,
    scratch: *mut u8,
    scratch_bytes: usize,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let (cpu, experts) = (unsafe { shared(cpu) }?, unsafe { shared(experts) }?);
        let mut regions = Regions::new();
        // SAFETY: the caller's contract.
        let (x, groups, h, ys, scratch) = unsafe {
            (
                regions.matrix("x", x)?,
                InGroups::read(&mut regions, groups)?,
                regions.matrix_mut("h", h)?,
                regions.matrix_mut("ys", ys)?,
                regions.slice_mut("scratch", scratch, scratch_bytes)?,
            )
        };
        let apart = regions.apart()?;
        let (gather, groups) = (groups.gather(&apart)?, groups.groups(&apart));
        let x = x.view(&apart)?;
        let (h, ys) = (h.view(&apart)?, ys.view(&apart)?);
        let (scratch, experts) = (scratch.get(&apart), &*experts);
        Ok(cpu.run(|cpu| experts.forward_into(cpu, x, gather, groups, h, ys, scratch))?)
    })
}
