//! Training losses of the router: what keeps experts evenly loaded and logits small.
//!
//! Each function returns the loss and, if asked, writes its gradient with respect to the logits, which an optimiser multiplies by the loss's
//! coefficient and adds to the gradient of the model. p is `softmax(logits)` of a row throughout.
//!
//! | function | value | paper |
//! |---|---|---|
//! | [`load_balancing`] | `E · Σ_e f_e · P_e` over all layers' tokens | Fedus et al. 2021, eq. 4 to 6, for K choices, as in HF transformers |
//! | [`switch_load_balancing`] | the same with K = 1 within each sequence, averaged | Fedus et al. 2021 (Switch Transformers) |
//! | [`router_z`] | `mean(logsumexp(logits)²)` | Zoph et al. 2022 (ST-MoE), eq. 5 |
//! | [`update_bias`] | no loss: `bias += u · sign(mean load − load)` | Wang et al. 2024; DeepSeek-V3 |
//!
//! Probabilities are f32 by the crate's own exp, sums over tokens f64 in a fixed order: the same bits on every ISA and for any number of threads.

use crate::cpu::Cpu;
use crate::cpu::losses as kernel;
use crate::cpu::losses::Rows;
use crate::error::{Error, Result, checked_mul};
use crate::matrix::AnyMatRef;

/// Memory that the losses work in. It grows when first used and is then reused, so that later calls of the same size allocate nothing.
#[derive(Clone, Debug, Default)]
pub struct LossScratch {
    /// Partial sums of each chunk of rows.
    pub(crate) sums: Vec<f64>,
    /// A row for each chunk, where there is no gradient to hold it.
    pub(crate) rows: Vec<f32>,
    /// Ranking keys of a row for each chunk.
    pub(crate) keys: Vec<u64>,
    /// The fraction of tokens that chose each expert.
    pub(crate) f: Vec<f64>,
}

/// Load balancing as HF transformers computes it over one or many layers:
///
/// ```text
/// N   = Σ_rows m                     rows = L·T, m = mask[row mod T]
/// f_e = Σ_rows m · [e among the K best logits of the row] / N
/// P_e = Σ_rows m · p_e / N
/// value = E · Σ_e f_e · P_e          not divided by K: perfect balance gives K
/// ∂value/∂z_j = E · m / N · p_j · (f_j − Σ_e f_e·p_e)        f is constant
/// ```
///
/// * `logits`: `[L·T, E]`, the layers one after the other.
/// * `top_k`: K. Ties go to the lower index, NaN ranks last.
/// * `mask`: `[T]`, 1 for tokens that count and 0 for padding, the same for every layer. A row of mask 0 is not read, and its gradient is 0.
/// * `grad`: `[L·T, E]`, written whole.
///
/// The value is 0 where no token counts.
///
/// # Errors
/// [`Error::Value`] for K outside `1..=E`, or a mask value that is negative or not finite; [`Error::Shape`] when L·T is not a multiple of the mask's
/// length or `grad` is not `[L·T, E]`. Nothing is written then.
///
/// ```
/// use moe_kernels::losses::{LossScratch, load_balancing};
/// use moe_kernels::{Cpu, MatRef};
/// // Two tokens, two experts: both choose expert 0 with p = 3/4, so f = [1, 0], P = [3/4, 1/4].
/// let z = [3f32.ln(), 0.0, 3f32.ln(), 0.0];
/// let mut grad = [0.0; 4];
/// let logits = MatRef::new(&z, 2, 2)?.into();
/// let value = load_balancing(&Cpu::new(), logits, 1, None, Some(&mut grad), &mut LossScratch::default())?;
/// assert!((value - 2.0 * 0.75).abs() < 1e-6);
/// assert!((grad[0] - 2.0 / 2.0 * 0.75 * (1.0 - 0.75)).abs() < 1e-6);
/// # Ok::<(), moe_kernels::Error>(())
/// ```
pub fn load_balancing(
    cpu: &Cpu,
    logits: AnyMatRef<'_>,
    top_k: usize,
    mask: Option<&[f32]>,
    grad: Option<&mut [f32]>,
    scratch: &mut LossScratch,
) -> Result<f64> {
    let (rows, num_experts) = (logits.rows(), logits.cols());
    check_k(top_k, num_experts)?;
    check_grad(&grad, rows, num_experts)?;
    if let Some(mask) = mask {
        check_mask(mask, rows)?;
    }
    let data = Rows { logits, mask };
    Ok(kernel::balance(
        cpu,
        data,
        0..rows,
        top_k,
        1.0,
        grad,
        scratch,
    ))
}

/// Load balancing as in Switch Transformers: [`load_balancing`] with K = 1 and without mask within each group of `group_tokens` tokens (a sequence; T for
/// the whole batch), averaged over the groups. Perfect balance gives 1.
///
/// * `logits`: `[T, E]`, T a multiple of `group_tokens`.
/// * `grad`: `[T, E]`, written whole.
///
/// # Errors
/// [`Error::Value`] for E = 0 or `group_tokens` = 0; [`Error::Shape`] when T is not a multiple of `group_tokens` or `grad` is not `[T, E]`. Nothing is
/// written then.
pub fn switch_load_balancing(
    cpu: &Cpu,
    logits: AnyMatRef<'_>,
    group_tokens: usize,
    mut grad: Option<&mut [f32]>,
    scratch: &mut LossScratch,
) -> Result<f64> {
    let (rows, num_experts) = (logits.rows(), logits.cols());
    check_k(1, num_experts)?;
    if group_tokens == 0 {
        return Err(Error::value("group_tokens", "at least 1", 0));
    }
    if !rows.is_multiple_of(group_tokens) {
        return Err(Error::shape(
            "logits",
            format!("a multiple of {group_tokens} rows"),
            [rows, num_experts],
        ));
    }
    check_grad(&grad, rows, num_experts)?;
    let data = Rows { logits, mask: None };
    let scale = group_tokens as f64 / rows as f64;
    let mut value = 0.0;
    for first in (0..rows).step_by(group_tokens) {
        let range = first..first + group_tokens;
        let part = range.start * num_experts..range.end * num_experts;
        let grad = grad.as_deref_mut().map(|g| &mut g[part]);
        value += kernel::balance(cpu, data, range, 1, scale, grad, scratch);
    }
    Ok(value)
}

/// Router z-loss: `mean over rows of lse²` with `lse = ln Σ_e exp(z_e)`; gradient `2 · lse · p_j / rows`.
///
/// * `logits`: `[rows, E]`, of one or many layers or groups.
/// * `grad`: `[rows, E]`, written whole.
///
/// The value is 0 where there are no rows. Logits that are not finite give a value that is not finite.
///
/// # Errors
/// [`Error::Value`] for E = 0; [`Error::Shape`] when `grad` is not `[rows, E]`. Nothing is written then.
pub fn router_z(
    cpu: &Cpu,
    logits: AnyMatRef<'_>,
    grad: Option<&mut [f32]>,
    scratch: &mut LossScratch,
) -> Result<f64> {
    let (rows, num_experts) = (logits.rows(), logits.cols());
    check_k(1, num_experts)?;
    check_grad(&grad, rows, num_experts)?;
    if rows == 0 {
        return Ok(0.0);
    }
    Ok(kernel::router_z(cpu, logits, grad, scratch))
}

/// Balancing without a loss: `bias[e] += rate · sign(mean load − load[e])`, after each training step.
///
/// `load` counts the pairs that each expert got in the step ([`Permutation::counts`](crate::permute::Permutation::counts)); an expert at the mean exactly (compared in
/// integers) keeps its bias. DeepSeek-V3 uses a rate of 0.001.
///
/// # Errors
/// [`Error::Shape`] when lengths differ; [`Error::Value`] when the rate is not finite. `bias` is then untouched.
///
/// ```
/// let mut bias = [0.0f32, 0.5, 0.0];
/// moe_kernels::losses::update_bias(&mut bias, &[4, 0, 2], 0.25)?;
/// assert_eq!(bias, [-0.25, 0.75, 0.0]);
/// # Ok::<(), moe_kernels::Error>(())
/// ```
pub fn update_bias(bias: &mut [f32], load: &[usize], rate: f32) -> Result<()> {
    if bias.len() != load.len() {
        return Err(Error::shape("load", [bias.len()], [load.len()]));
    }
    if !rate.is_finite() {
        return Err(Error::value("rate", "a finite number", rate));
    }
    // Neither product can overflow 128 bits.
    let total: u128 = load.iter().map(|&n| n as u128).sum();
    for (bias, &n) in bias.iter_mut().zip(load) {
        match (n as u128 * load.len() as u128).cmp(&total) {
            core::cmp::Ordering::Less => *bias += rate,
            core::cmp::Ordering::Equal => {}
            core::cmp::Ordering::Greater => *bias -= rate,
        }
    }
    Ok(())
}

fn check_k(top_k: usize, num_experts: usize) -> Result<()> {
    if num_experts == 0 || num_experts > u32::MAX as usize {
        return Err(Error::value("logits", "1 to 2^32 - 1 columns", num_experts));
    }
    if top_k == 0 || top_k > num_experts {
        return Err(Error::value(
            "top_k",
            format!("1 to E = {num_experts}"),
            top_k,
        ));
    }
    Ok(())
}

fn check_grad(grad: &Option<&mut [f32]>, rows: usize, num_experts: usize) -> Result<()> {
    let needed = checked_mul(rows, num_experts, "rows·E")?;
    match grad {
        Some(grad) if grad.len() != needed => Err(Error::shape("grad", [needed], [grad.len()])),
        _ => Ok(()),
    }
}

fn check_mask(mask: &[f32], rows: usize) -> Result<()> {
    let fits = match mask.len() {
        0 => rows == 0,
        tokens => rows.is_multiple_of(tokens),
    };
    if !fits {
        return Err(Error::shape(
            "mask",
            format!("[T], where {rows} rows are L·T"),
            [mask.len()],
        ));
    }
    match mask.iter().find(|m| !(m.is_finite() && **m >= 0.0)) {
        Some(bad) => Err(Error::value("mask", "finite numbers from 0 on", bad)),
        None => Ok(()),
    }
}
