//! What a layer is given after it is made: gate, shared experts, norms, factors.

use super::super::combine::{InNorm, moe_rms_norm};
use super::super::cpu::moe_cpu;
use super::super::experts::moe_experts;
use super::super::grouped_gemm::{bias, packed_bytes};
use super::super::handle::{exclusive, shared, take};
use super::super::memory::{Regions, moe_matrix, probe};
use super::super::router::flag;
use super::super::status::*;
use super::{given, moe_layer};
use crate::DType;
use crate::moe::{Gate, PostNorm, SharedCombine, SharedExperts};

/// Gives the layer its gate: logits = norm(x) * w^T + b in f32, w [R, H] of any dtype, bias[bias_len] = [R] or NULL; noise [R, H] for a router with a noise seed, else
/// NULL; input_norm over H, or NULL.
///
/// Errors: MOE_ERROR_SHAPE, MOE_ERROR_VALUE; the layer is unchanged then. So it is for all functions moe_layer_set_*.
///
/// # Safety
/// Handles: NULL or living. Matrices, norm and arrays: NULL or valid, as long as they say.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_layer_set_gate(
    cpu: *const moe_cpu,
    layer: *mut moe_layer,
    w: *const moe_matrix,
    gate_bias: *const f32,
    bias_len: usize,
    noise: *const moe_matrix,
    input_norm: *const moe_rms_norm,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let (cpu, mut layer) = (unsafe { shared(cpu) }?, unsafe { exclusive(layer) }?);
        let mut regions = Regions::new();
        // SAFETY: the caller's contract.
        let (w, gate_bias, noise, norm) = unsafe {
            (
                regions.matrix("w", w)?,
                bias(&mut regions, "bias", gate_bias, bias_len)?,
                regions.optional_matrix("noise", noise)?,
                match input_norm.is_null() {
                    true => None,
                    false => Some(InNorm::read(&mut regions, "input_norm", input_norm)?),
                },
            )
        };
        let apart = regions.apart()?;
        let expected = [layer.router().config().num_logits(), layer.hidden()];
        if [w.rows(), w.cols()] != expected {
            return Err(crate::Error::shape("w", expected, [w.rows(), w.cols()]).into());
        }
        let bytes = packed_bytes(w.rows(), w.cols());
        probe("gate", bytes.and_then(|n| n.checked_mul(2)))?;
        let view = w.view(&apart)?;
        let noise = noise.map(|n| n.view(&apart)).transpose()?;
        let gate_bias = gate_bias.map(|b| b.get(&apart));
        let mut gate = cpu.run(|cpu| {
            let gate = Gate::new(cpu, view, gate_bias)?;
            match noise {
                Some(noise) => gate.with_noise(cpu, noise),
                None => Ok(gate),
            }
        })?;
        if let Some(norm) = norm {
            gate = gate.with_input_norm(norm.norm(&apart)?)?;
        }
        Ok(layer.set_gate(gate)?)
    })
}

/// moe_layer_set_shared: y + sum of S(x).
pub const MOE_JOIN_ADD: u32 = 0;
/// y + sigmoid(x * gate) * sum of S(x), gate [1, H].
pub const MOE_JOIN_SIGMOID_GATE: u32 = 1;
/// (y + sum of S(x)) / 2
pub const MOE_JOIN_AVERAGE: u32 = 2;
/// y + sum of gamma * S(x) with the router's joint shared weights.
pub const MOE_JOIN_ROUTER_WEIGHTED: u32 = 3;

/// Adds experts that every token visits. experts are taken over: *experts becomes NULL, and stays the caller's on error. gate: [1, H] for MOE_JOIN_SIGMOID_GATE, else
/// NULL.
///
/// # Safety
/// Handles: NULL or living. gate: NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_layer_set_shared(
    cpu: *const moe_cpu,
    layer: *mut moe_layer,
    experts: *mut *mut moe_experts,
    join: u32,
    gate: *const moe_matrix,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let (cpu, mut layer) = (unsafe { shared(cpu) }?, unsafe { exclusive(layer) }?);
        // SAFETY: the caller's contract.
        let handle = unsafe { given(experts) }?;
        let mut regions = Regions::new();
        // SAFETY: the caller's contract.
        let gate = unsafe { regions.optional_matrix("gate", gate) }?;
        let apart = regions.apart()?;
        let combine = match (join, gate) {
            (MOE_JOIN_ADD, None) => SharedCombine::Add,
            (MOE_JOIN_AVERAGE, None) => SharedCombine::Average,
            (MOE_JOIN_ROUTER_WEIGHTED, None) => SharedCombine::RouterWeighted,
            (MOE_JOIN_SIGMOID_GATE, Some(gate)) => {
                let w = gate.view(&apart)?;
                w.expect("gate", 1, layer.hidden())?;
                probe("gate", packed_bytes(1, layer.hidden()))?;
                let mut packed =
                    crate::grouped_gemm::PackedMatrices::new(&cpu.cpu, 1, w.cols(), DType::F32)?;
                cpu.run(|cpu| packed.push(cpu, w, None))?;
                SharedCombine::SigmoidGate(packed)
            }
            (join, _) => {
                let expected = "MOE_JOIN_*, with a gate for a sigmoid gate only";
                return Err(Fault::value("join", expected, join));
            }
        };
        {
            // SAFETY: the caller's contract.
            let experts = unsafe { shared(handle) }?;
            if experts.is_empty() {
                return Err(Fault::value("shared experts", "at least one", 0));
            }
            layer.check_shared(&experts, matches!(combine, SharedCombine::RouterWeighted))?;
        }
        // SAFETY: a living handle, by the contract and the check above. Nothing below fails.
        let taken = unsafe { take(handle) }?;
        // SAFETY: `given` found the place usable.
        unsafe { experts.write(core::ptr::null_mut()) };
        layer.set_shared(SharedExperts::new(taken, combine)?);
        Ok(())
    })
}

/// The layer holds experts first, first + 1, ... of the router's; pairs of others are skipped (expert parallelism: the layers' outputs add up).
///
/// # Safety
/// layer: NULL or living.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_layer_set_first_expert(
    layer: *mut moe_layer,
    first: usize,
) -> moe_status {
    // SAFETY: the caller's contract.
    guard(|| Ok(unsafe { exclusive(layer) }?.set_first_expert(first)?))
}

/// 1: a pair's weight multiplies the expert's input instead of its output (Llama 4). 0: the output.
///
/// # Safety
/// layer: NULL or living.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_layer_set_weight_on_input(
    layer: *mut moe_layer,
    on: u32,
) -> moe_status {
    guard(|| {
        let on = flag("on", on)?;
        // SAFETY: the caller's contract.
        unsafe { exclusive(layer) }?.set_weight_on_input(on);
        Ok(())
    })
}

/// A finite factor on the routed sum, before shared experts.
///
/// # Safety
/// layer: NULL or living.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_layer_set_routed_scale(
    layer: *mut moe_layer,
    scale: f32,
) -> moe_status {
    // SAFETY: the caller's contract.
    guard(|| Ok(unsafe { exclusive(layer) }?.set_routed_scale(scale)?))
}

/// Normalises each expert's output before its weight; scale_first = 1: o * weight / sqrt(mean((o * weight)^2) + eps) (Muse Spark).
///
/// # Safety
/// layer: NULL or living. norm: NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_layer_set_post_norm(
    layer: *mut moe_layer,
    norm: *const moe_rms_norm,
    scale_first: u32,
) -> moe_status {
    guard(|| {
        let scale_first = flag("scale_first", scale_first)?;
        let mut regions = Regions::new();
        // SAFETY: the caller's contract.
        let norm = unsafe { InNorm::read(&mut regions, "norm", norm) }?.norm(&regions.apart()?)?;
        let norm = match scale_first {
            true => PostNorm::ScaleFirst(norm),
            false => PostNorm::NormFirst(norm),
        };
        // SAFETY: the caller's contract.
        Ok(unsafe { exclusive(layer) }?.set_post_norm(norm)?)
    })
}

/// Normalises the layer's output, after shared experts.
///
/// # Safety
/// layer: NULL or living. norm: NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_layer_set_out_norm(
    layer: *mut moe_layer,
    norm: *const moe_rms_norm,
) -> moe_status {
    guard(|| {
        let mut regions = Regions::new();
        // SAFETY: the caller's contract.
        let norm = unsafe { InNorm::read(&mut regions, "norm", norm) }?.norm(&regions.apart()?)?;
        // SAFETY: the caller's contract.
        Ok(unsafe { exclusive(layer) }?.set_out_norm(norm)?)
    })
}

/// Adds bias[len], len = H, to the output, after the norm.
///
/// # Safety
/// layer: NULL or living. bias: NULL or len readable floats.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_layer_set_out_bias(
    layer: *mut moe_layer,
    out_bias: *const f32,
    len: usize,
) -> moe_status {
    guard(|| {
        let mut regions = Regions::new();
        // SAFETY: the caller's contract.
        let out_bias = unsafe { regions.slice("bias", out_bias, len) }?;
        // SAFETY: the caller's contract.
        let mut layer = unsafe { exclusive(layer) }?;
        Ok(layer.set_out_bias(out_bias.get(&regions.apart()?))?)
    })
}

/// Replaces the router's correction bias, as after a step of training: bias[len], len = E + num_null.
///
/// # Safety
/// layer: NULL or living. bias: NULL or len readable floats.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_layer_set_correction_bias(
    layer: *mut moe_layer,
    correction_bias: *const f32,
    len: usize,
) -> moe_status {
    guard(|| {
        let mut regions = Regions::new();
        // SAFETY: the caller's contract.
        let values = unsafe { regions.slice("correction_bias", correction_bias, len) }?;
        // SAFETY: the caller's contract.
        let mut layer = unsafe { exclusive(layer) }?;
        Ok(layer
            .router_mut()
            .set_correction_bias(values.get(&regions.apart()?))?)
    })
}
