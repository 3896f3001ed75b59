//! Losses of the router and the bias update.

use super::cpu::moe_cpu;
use super::handle::shared;
use super::memory::{OutSlice, Regions, moe_matrix, probe};
use super::status::*;
use crate::losses::{LossScratch, load_balancing, router_z, switch_load_balancing, update_bias};
use crate::{AnyMatRef, Cpu};

/// Describes the gradient, if it is wanted.
///
/// # Safety
/// `data` is null or has `len` writable floats until the C function returns.
unsafe fn gradient(
    regions: &mut Regions,
    data: *mut f32,
    len: usize,
) -> Checked<Option<OutSlice<f32>>> {
    if data.is_null() {
        return Ok(None);
    }
    // SAFETY: this function's contract.
    unsafe { regions.slice_mut("grad", data, len) }.map(Some)
}

/// Refuses rows whose scratch memory cannot be had: a row for each chunk of at least 16.
fn check_memory(logits: &AnyMatRef<'_>) -> Checked {
    let chunks = logits.rows().div_ceil(16);
    let bytes = chunks
        .checked_mul(logits.cols())
        .and_then(|n| n.checked_mul(40));
    probe("loss", bytes)
}

/// Load balancing as in HF transformers: E * sum over e of f_e * P_e; logits [L * T, E], mask [T] or NULL, grad [L * T, E] or NULL. *value receives the loss.
///
/// Errors: MOE_ERROR_VALUE, MOE_ERROR_SHAPE, those of pointers; nothing is written then. Allocates scratch.
///
/// # Safety
/// cpu: NULL or living. Matrices and arrays: NULL or valid, as long as they say.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_load_balancing_loss(
    cpu: *const moe_cpu,
    logits: *const moe_matrix,
    top_k: usize,
    mask: *const f32,
    mask_len: usize,
    grad: *mut f32,
    grad_len: usize,
    value: *mut f64,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let cpu = unsafe { shared(cpu) }?;
        let mut regions = Regions::new();
        // SAFETY: the caller's contract.
        let (logits, mask, grad, value) = unsafe {
            (
                regions.matrix("logits", logits)?,
                regions.optional_slice("mask", mask, mask_len)?,
                gradient(&mut regions, grad, grad_len)?,
                regions.slice_mut("value", value, 1)?,
            )
        };
        let apart = regions.apart()?;
        let logits = logits.view(&apart)?;
        let mask = mask.map(|m| m.get(&apart));
        let grad = grad.map(|g| g.get(&apart));
        check_memory(&logits)?;
        let loss = cpu.run(|cpu| {
            load_balancing(cpu, logits, top_k, mask, grad, &mut LossScratch::default())
        })?;
        value.get(&apart)[0] = loss;
        Ok(())
    })
}

/// Load balancing as in Switch Transformers: K = 1 within each group of group_tokens tokens, averaged. As moe_load_balancing_loss otherwise.
///
/// # Safety
/// As moe_load_balancing_loss.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_switch_load_balancing_loss(
    cpu: *const moe_cpu,
    logits: *const moe_matrix,
    group_tokens: usize,
    grad: *mut f32,
    grad_len: usize,
    value: *mut f64,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        unsafe {
            of_logits(cpu, logits, grad, grad_len, value, |cpu, logits, grad| {
                switch_load_balancing(cpu, logits, group_tokens, grad, &mut LossScratch::default())
            })
        }
    })
}

/// Router z-loss: mean over rows of logsumexp^2. As moe_load_balancing_loss otherwise.
///
/// # Safety
/// As moe_load_balancing_loss.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_router_z_loss(
    cpu: *const moe_cpu,
    logits: *const moe_matrix,
    grad: *mut f32,
    grad_len: usize,
    value: *mut f64,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        unsafe {
            of_logits(cpu, logits, grad, grad_len, value, |cpu, logits, grad| {
                router_z(cpu, logits, grad, &mut LossScratch::default())
            })
        }
    })
}

/// A loss that reads nothing but logits.
///
/// # Safety
/// As moe_load_balancing_loss.
unsafe fn of_logits(
    cpu: *const moe_cpu,
    logits: *const moe_matrix,
    grad: *mut f32,
    grad_len: usize,
    value: *mut f64,
    loss: impl FnOnce(&Cpu, AnyMatRef<'_>, Option<&mut [f32]>) -> crate::Result<f64> + Send,
) -> Checked {
    // SAFETY: the caller's contract.
    let cpu = unsafe { shared(cpu) }?;
    let mut regions = Regions::new();
    // SAFETY: the caller's contract.
    let (logits, grad, value) = unsafe {
        (
            regions.matrix("logits", logits)?,
            gradient(&mut regions, grad, grad_len)?,
            regions.slice_mut("value", value, 1)?,
        )
    };
    let apart = regions.apart()?;
    let logits = logits.view(&apart)?;
    let grad = grad.map(|g| g.get(&apart));
    check_memory(&logits)?;
    value.get(&apart)[0] = cpu.run(|cpu| loss(cpu, logits, grad))?;
    Ok(())
}

/// Balancing without a loss: bias[e] += rate * sign(mean load - load[e]), both of len elements; load as the permutation's counts.
///
/// # Safety
/// Arrays: NULL or len elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_update_bias(
    bias: *mut f32,
    load: *const usize,
    len: usize,
    rate: f32,
) -> moe_status {
    guard(|| {
        let mut regions = Regions::new();
        // SAFETY: the caller's contract.
        let (bias, load) = unsafe {
            (
                regions.slice_mut("bias", bias, len)?,
                regions.slice("load", load, len)?,
            )
        };
        let apart = regions.apart()?;
        Ok(update_bias(bias.get(&apart), load.get(&apart), rate)?)
    })
}
