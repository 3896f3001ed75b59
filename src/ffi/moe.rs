//! `moe_layer`: the whole layer.

use super::combine::{InNorm, moe_rms_norm};
use super::cpu::moe_cpu;
use super::experts::moe_experts;
use super::grouped_gemm::{bias, packed_bytes};
use super::handle::{Handle, check_place, destroy, exclusive, give, handle, shared, take};
use super::memory::{
    InMatrix, Regions, Versioned, dtype, moe_dtype, moe_matrix, moe_matrix_mut, probe, read_struct,
};
use super::router::{flag, moe_router};
use super::routing::{moe_routing, probe_routing};
use super::status::*;
use crate::moe::{
    Forward, Gate, Latent, MoeLayer, PostNorm, RouteFrom, SharedCombine, SharedExperts,
};
use crate::{AnyMatMut, DType};
use bytemuck::Zeroable;

/// A layer: router, gate, experts, and what a family adds. Calls that take it as const may run at the same time in several threads, each with its own moe_routing.
pub struct moe_layer {
    _opaque: (),
}

handle!(moe_layer, MoeLayer, b"moelayr1");

/// A handle that a call takes over: `*place`, a living one.
///
/// # Safety
/// `place` is null or readable.
unsafe fn given<H: Handle>(place: *mut *mut H) -> Checked<*mut H> {
    // SAFETY: this function's contract.
    unsafe { check_place(place) }?;
    // SAFETY: not null, aligned, readable.
    Ok(unsafe { place.read() })
}

/// Makes a layer of a router (copied) and experts (taken over: *experts becomes NULL, and stays the caller's on error). Give it a gate unless every call brings logits
/// or routing.
///
/// Errors: MOE_ERROR_VALUE when there are no experts, or more than the router knows.
///
/// # Safety
/// Handles: NULL or living. experts, out: writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_layer_create(
    router: *const moe_router,
    experts: *mut *mut moe_experts,
    out: *mut *mut moe_layer,
) -> moe_status {
    // SAFETY: the caller's contract.
    guard(|| unsafe { create(router, experts, None, out) })
}

/// # Safety
/// As [`moe_layer_create`].
unsafe fn create(
    router: *const moe_router,
    experts: *mut *mut moe_experts,
    latent: Option<Latent>,
    out: *mut *mut moe_layer,
) -> Checked {
    // SAFETY: this function's contract.
    let (router, handle) = unsafe {
        check_place(out)?;
        (shared(router)?.clone(), given(experts)?)
    };
    {
        // SAFETY: this function's contract.
        let experts = unsafe { shared(handle) }?;
        MoeLayer::check_experts(&router, &experts)?;
        if let Some(latent) = &latent
            && latent.width() != experts.hidden()
        {
            return Err(crate::Error::shape("w_in", [experts.hidden()], [latent.width()]).into());
        }
    }
    // SAFETY: a living handle, by the contract and the check above. Nothing below fails.
    let taken = unsafe { take(handle) }?;
    // SAFETY: `given` found the place usable.
    unsafe { experts.write(core::ptr::null_mut()) };
    let layer = match latent {
        Some(latent) => MoeLayer::new_latent(router, taken, latent)?,
        None => MoeLayer::new(router, taken)?,
    };
    // SAFETY: this function's contract.
    unsafe { give(out, layer) }
}

/// As moe_layer_create, with experts that work in a latent space: w_in [L, H], w_out [H, L], kept in dtype; L is the experts' hidden size. norm [L] normalises the latent
/// input, or is NULL.
///
/// # Safety
/// As moe_layer_create. Matrices and norm: NULL or valid, with memory as long as they say.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_layer_create_latent(
    cpu: *const moe_cpu,
    router: *const moe_router,
    experts: *mut *mut moe_experts,
    w_in: *const moe_matrix,
    w_out: *const moe_matrix,
    format: moe_dtype,
    norm: *const moe_rms_norm,
    out: *mut *mut moe_layer,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let cpu = unsafe { shared(cpu) }?;
        let format = dtype("dtype", format)?;
        let mut regions = Regions::new();
        // SAFETY: the caller's contract.
        let (w_in, w_out, norm) = unsafe {
            (
                regions.matrix("w_in", w_in)?,
                regions.matrix("w_out", w_out)?,
                match norm.is_null() {
                    true => None,
                    false => Some(InNorm::read(&mut regions, "norm", norm)?),
                },
            )
        };
        let apart = regions.apart()?;
        for w in [&w_in, &w_out] {
            probe("latent projection", packed_bytes(w.rows(), w.cols()))?;
        }
        let (w_in, w_out) = (w_in.view(&apart)?, w_out.view(&apart)?);
        let mut latent = cpu.run(|cpu| Latent::new(cpu, w_in, w_out, format))?;
        if let Some(norm) = norm {
            latent = latent.with_norm(norm.norm(&apart)?)?;
        }
        // SAFETY: the caller's contract.
        unsafe { create(router, experts, Some(latent), out) }
    })
}

/// Ends a handle. NULL is allowed. MOE_ERROR_BUSY while a call uses it.
///
/// # Safety
/// layer: NULL or living, not used afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_layer_destroy(layer: *mut moe_layer) -> moe_status {
    // SAFETY: the caller's contract.
    guard(|| unsafe { destroy(layer) })
}

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

/// *bytes: what moe_layer_forward, moe_layer_route and moe_layer_logits need as workspace for up to max_tokens tokens on this handle.
///
/// # Safety
/// Handles: NULL or living. bytes: NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_layer_workspace_size(
    cpu: *const moe_cpu,
    layer: *const moe_layer,
    max_tokens: usize,
    bytes: *mut usize,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let (cpu, layer) = (unsafe { shared(cpu) }?, unsafe { shared(layer) }?);
        let mut regions = Regions::new();
        // SAFETY: the caller's contract.
        let bytes = unsafe { regions.slice_mut("bytes", bytes, 1) }?;
        let layer = &*layer;
        let needed = cpu.run(|cpu| layer.workspace_size(cpu, max_tokens))?;
        bytes.get(&regions.apart()?)[0] = needed;
        Ok(())
    })
}

/// One call of a layer. Zeros (with struct_size) are the defaults of all but x, y and the workspace.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_forward {
    /// sizeof(moe_forward)
    pub struct_size: usize,
    /// [T, H], any dtype.
    pub x: *const moe_matrix,
    /// [T, H], any dtype; for moe_layer_route NULL.
    pub y: *const moe_matrix_mut,
    /// [T, R] logits of the caller; NULL: the layer's gate makes them.
    pub logits: *const moe_matrix,
    /// [T, K] for a router of MOE_SELECT_GIVEN, else NULL.
    pub given_ids: *const i32,
    /// Elements of given_ids.
    pub given_ids_len: usize,
    /// Added to the result, [T, H], any dtype.
    pub residual: *const moe_matrix,
    /// Position of the first token, for noise.
    pub position: u64,
    /// Memory to work in, of any content and alignment; see moe_layer_workspace_size.
    pub workspace: *mut u8,
    /// Bytes of workspace.
    pub workspace_bytes: usize,
    /// 1: the routing as it is (moe_routing_set_given, or an earlier call on these tokens).
    pub use_routing: u32,
    /// 0
    pub reserved: u32,
}

// SAFETY: repr(C), begins with its size, numbers and pointers.
unsafe impl Versioned for moe_forward {}

/// The layer: y [T, H] from x [T, H]. routing receives ids, weights and the permutation. Once the routing has been as large, nothing is allocated.
///
/// The bits depend on neither instruction set, threads, nor the other tokens (routers that look at several tokens aside). y may not overlap x: a residual stream is given as residual,
/// and y is another buffer.
///
/// Errors: those of pointers, MOE_ERROR_SHAPE, MOE_ERROR_VALUE, MOE_ERROR_BUFFER_TOO_SMALL, MOE_ERROR_PACKED_FOR; y is untouched then.
///
/// # Safety
/// Handles: NULL or living. args: NULL or valid, with memory as long as it says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_layer_forward(
    cpu: *const moe_cpu,
    layer: *const moe_layer,
    routing: *mut moe_routing,
    args: *const moe_forward,
) -> moe_status {
    // SAFETY: the caller's contract.
    guard(|| unsafe { forward(cpu, layer, routing, args, true) })
}

/// The router's stage alone: logits through the gate, ids, weights and the permutation into routing. moe_layer_forward with use_routing finishes the layer.
///
/// # Safety
/// As moe_layer_forward.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_layer_route(
    cpu: *const moe_cpu,
    layer: *const moe_layer,
    routing: *mut moe_routing,
    args: *const moe_forward,
) -> moe_status {
    // SAFETY: the caller's contract.
    guard(|| unsafe { forward(cpu, layer, routing, args, false) })
}

/// # Safety
/// As [`moe_layer_forward`].
unsafe fn forward(
    cpu: *const moe_cpu,
    layer: *const moe_layer,
    routing: *mut moe_routing,
    args: *const moe_forward,
    whole: bool,
) -> Checked {
    // SAFETY: this function's contract, here and below.
    let (cpu, layer, mut routing, a) = unsafe {
        (
            shared(cpu)?,
            shared(layer)?,
            exclusive(routing)?,
            read_struct("args", args)?,
        )
    };
    if a.reserved != 0 {
        return Err(Fault::value("args", "reserved = 0", a.reserved));
    }
    let mut regions = Regions::new();
    // SAFETY: as above.
    let (x, logits, ids, residual, workspace): (InMatrix, _, _, _, _) = unsafe {
        (
            regions.matrix("x", a.x)?,
            regions.optional_matrix("logits", a.logits)?,
            regions.optional_slice("given_ids", a.given_ids, a.given_ids_len)?,
            regions.optional_matrix("residual", a.residual)?,
            regions.slice_mut("workspace", a.workspace, a.workspace_bytes)?,
        )
    };
    let y = match whole {
        // SAFETY: as above.
        true => Some(unsafe { regions.matrix_mut("y", a.y) }?),
        false if !a.y.is_null() => return Err(Fault::value("y", "NULL", "a matrix")),
        false => None,
    };
    let apart = regions.apart()?;
    let logits = logits.map(|l| l.view(&apart)).transpose()?;
    let ids = ids.map(|ids| ids.get(&apart));
    let route = match (flag("use_routing", a.use_routing)?, logits, ids) {
        (true, None, None) => RouteFrom::Routing,
        (true, ..) => {
            let expected = "0 with logits or given_ids";
            return Err(Fault::value("use_routing", expected, a.use_routing));
        }
        (false, None, None) => RouteFrom::Gate,
        (false, None, Some(ids)) => RouteFrom::GateAndIds(ids),
        (false, Some(logits), None) => RouteFrom::Logits(logits),
        (false, Some(logits), Some(ids)) => RouteFrom::LogitsAndIds(logits, ids),
    };
    let call = Forward {
        route,
        residual: residual.map(|r| r.view(&apart)).transpose()?,
        position: a.position,
    };
    // A workspace that is long enough bounds the tokens; the routing's own memory is asked for before anything is written.
    if a.use_routing == 0 && x.cols() == layer.hidden() {
        probe_routing(&cpu, layer.router().config(), x.rows(), 1)?;
    }
    let x = x.view(&apart)?;
    let y: Option<AnyMatMut<'_>> = y.map(|y| y.view(&apart)).transpose()?;
    let (layer, routing, workspace) = (&*layer, &mut *routing, workspace.get(&apart));
    Ok(cpu.run(|cpu| match y {
        Some(y) => layer.forward_with(cpu, x, &call, y, routing, workspace),
        None => layer.route_into(cpu, x, &call, routing, workspace),
    })?)
}

/// The gate's logits [T, R] in f32, before multiplier, softcap and noise.
///
/// Errors: as moe_layer_forward; MOE_ERROR_VALUE when the layer has no gate.
///
/// # Safety
/// Handles: NULL or living. Matrices and workspace: NULL or valid, as long as they say.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_layer_logits(
    cpu: *const moe_cpu,
    layer: *const moe_layer,
    x: *const moe_matrix,
    logits: *const moe_matrix_mut,
    workspace: *mut u8,
    workspace_bytes: usize,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let (cpu, layer) = (unsafe { shared(cpu) }?, unsafe { shared(layer) }?);
        let mut regions = Regions::new();
        // SAFETY: the caller's contract.
        let (x, logits, workspace) = unsafe {
            (
                regions.matrix("x", x)?,
                regions.matrix_mut("logits", logits)?,
                regions.slice_mut("workspace", workspace, workspace_bytes)?,
            )
        };
        let apart = regions.apart()?;
        let x = x.view(&apart)?;
        let AnyMatMut::F32(logits) = logits.view(&apart)? else {
            return Err(Fault::value("logits", "dtype f32", "another"));
        };
        let (layer, workspace) = (&*layer, workspace.get(&apart));
        Ok(cpu.run(|cpu| layer.logits_into(cpu, x, logits, workspace))?)
    })
}
