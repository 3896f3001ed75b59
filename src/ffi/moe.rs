//! `moe_layer`: the whole layer.

// In the order in which the header has them.
mod settings;

mod call;

pub use call::*;
pub use settings::*;

use super::combine::{InNorm, moe_rms_norm};
use super::cpu::moe_cpu;
use super::experts::moe_experts;
use super::grouped_gemm::packed_bytes;
use super::handle::{Handle, check_place, destroy, give, handle, shared, take};
use super::memory::{Regions, dtype, moe_dtype, moe_matrix, probe};
use super::router::moe_router;
use super::status::*;
use crate::moe::{Latent, MoeLayer};

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
