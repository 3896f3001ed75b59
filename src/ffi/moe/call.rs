//! Calls of a layer: the whole of it, its router's stage, its logits.

use super::super::cpu::moe_cpu;
use super::super::handle::{exclusive, shared};
use super::super::memory::{InMatrix, Regions, Versioned, moe_matrix, moe_matrix_mut, read_struct};
use super::super::router::flag;
use super::super::routing::{moe_routing, probe_routing};
use super::super::status::*;
use super::moe_layer;
use crate::AnyMatMut;
use crate::moe::{Forward, RouteFrom};
use bytemuck::Zeroable;

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
