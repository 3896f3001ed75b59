//! From the experts' rows back to tokens.
//!
//! For token t, in f32 and in this order:
//!
//! 1. `a = Σ_slot weight[t,slot] · ys[row_of_pair[t·slots + slot]]`, one chain of fused multiply-adds from +0 in slot order; a slot without a row (dropped, or
//!    an expert that lives elsewhere) is passed over; an identity expert contributes `weight · x[t]` in its slot;
//! 2. `a ← a · routed_scale`;
//! 3. shared experts: `a ← a + s`, or `fma(σ(g), s, a)`, or `(a + s) / 2`;
//! 4. RMS norm; 5. `+ bias`; 6. `+ residual`; 7. rounded once to the output's format.
//!
//! Steps that are not asked for do not happen. Nothing depends on the order in which rows were computed, so the bits are those of the token alone.

use crate::cpu::Cpu;
use crate::cpu::combine as kernel;
use crate::error::{Error, Result};
use crate::matrix::{AnyMatMut, AnyMatRef, MatRef};
use crate::norm::RmsNorm;
use crate::permute::NO_ROW;

/// Experts that return their input: ids from `num_experts` on.
#[derive(Clone, Copy, Debug)]
pub struct Identity<'a> {
    /// `[T, slots]`; an id of E or more is an identity expert.
    pub ids: &'a [i32],
    /// E
    pub num_experts: usize,
    /// The layer's input `[T, H]`.
    pub x: AnyMatRef<'a>,
}

/// Where the routed sum comes from.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Routed<'a> {
    /// The experts' output rows and where each pair's row is.
    Pairs {
        /// `[rows, H]`
        ys: MatRef<'a, f32>,
        /// `[T·slots]`; `None` counts as all ones (a weight that already acted on the input).
        weights: Option<&'a [f32]>,
        /// `[T·slots]`, [`NO_ROW`] for a pair without one.
        row_of_pair: &'a [u32],
        /// Pairs of a token.
        slots: usize,
        /// Experts without weights that return their input; needs `weights`.
        identity: Option<Identity<'a>>,
    },
    /// The sum itself, `[T, H]`, where something else came between (a latent projection).
    Sum(MatRef<'a, f32>),
}

/// The shared experts' output and how it joins.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Shared<'a> {
    /// `a + s`
    Add(MatRef<'a, f32>),
    /// `a + σ(g) · s` with a logit g for each token.
    SigmoidGate(MatRef<'a, f32>, &'a [f32]),
    /// `(a + s) / 2`
    Average(MatRef<'a, f32>),
}

impl<'a> Shared<'a> {
    pub(crate) fn matrix(&self) -> MatRef<'a, f32> {
        match self {
            Self::Add(s) | Self::SigmoidGate(s, _) | Self::Average(s) => *s,
        }
    }
}

/// The operands of [`combine_into`], in the order of the [module](self)'s steps.
#[derive(Clone, Copy, Debug)]
pub struct Combine<'a> {
    /// Step 1.
    pub routed: Routed<'a>,
    /// Step 2; 1 changes nothing.
    pub routed_scale: f32,
    /// Step 3.
    pub shared: Option<Shared<'a>>,
    /// Step 4.
    pub norm: Option<&'a RmsNorm>,
    /// Step 5, `[H]`.
    pub bias: Option<&'a [f32]>,
    /// Step 6, `[T, H]`.
    pub residual: Option<AnyMatRef<'a>>,
}

impl<'a> Combine<'a> {
    /// The routed sum alone.
    pub fn new(routed: Routed<'a>) -> Self {
        Self {
            routed,
            routed_scale: 1.0,
            shared: None,
            norm: None,
            bias: None,
            residual: None,
        }
    }
}

/// Combines the experts' rows into `out [T, H]`, of any format. See the [module](self) for the steps.
///
/// # Errors
/// An [`Error`] that names the operand; nothing is written then.
///
/// ```
/// use moe_kernels::combine::{Combine, Routed, combine_into};
/// use moe_kernels::permute::NO_ROW;
/// use moe_kernels::{Cpu, MatMut, MatRef};
/// let ys = [1.0f32, 10.0, 2.0, 20.0, 3.0, 30.0]; // three rows of H = 2
/// let routed = Routed::Pairs {
///     ys: MatRef::new(&ys, 3, 2)?,
///     weights: Some(&[0.5, 0.5, 1.0, 0.0]),
///     row_of_pair: &[2, 0, 1, NO_ROW],
///     slots: 2,
///     identity: None,
/// };
/// let mut y = [0.0f32; 4];
/// combine_into(&Cpu::new(), &Combine::new(routed), MatMut::new(&mut y, 2, 2)?.into())?;
/// assert_eq!(y, [2.0, 20.0, 2.0, 20.0]);
/// # Ok::<(), moe_kernels::Error>(())
/// ```
pub fn combine_into(cpu: &Cpu, operands: &Combine<'_>, out: AnyMatMut<'_>) -> Result<()> {
    let (tokens, hidden) = (out.rows(), out.cols());
    check_routed(&operands.routed, tokens, hidden)?;
    if !operands.routed_scale.is_finite() {
        return Err(Error::value(
            "routed_scale",
            "a finite number",
            operands.routed_scale,
        ));
    }
    if let Some(shared) = &operands.shared {
        check_matrix("shared", shared.matrix(), tokens, hidden)?;
        if let Shared::SigmoidGate(_, gate) = shared
            && gate.len() != tokens
        {
            return Err(Error::shape("shared gate", [tokens], [gate.len()]));
        }
    }
    if let Some(norm) = operands.norm {
        norm.check("norm", hidden)?;
    }
    if let Some(bias) = operands.bias
        && bias.len() != hidden
    {
        return Err(Error::shape("bias", [hidden], [bias.len()]));
    }
    if let Some(residual) = &operands.residual {
        residual.expect("residual", tokens, hidden)?;
    }
    kernel::run(cpu, operands, out);
    Ok(())
}

/// The kernel reads f32 operands as rows of neighbours.
fn check_matrix(
    argument: &'static str,
    m: MatRef<'_, f32>,
    rows: usize,
    cols: usize,
) -> Result<()> {
    AnyMatRef::F32(m).expect(argument, rows, cols)?;
    if rows > 0 && m.row_slice(0).is_none() {
        return Err(Error::value(argument, "a column stride of 1", "another"));
    }
    Ok(())
}

fn check_routed(routed: &Routed<'_>, tokens: usize, hidden: usize) -> Result<()> {
    let Routed::Pairs {
        ys,
        weights,
        row_of_pair,
        slots,
        identity,
    } = routed
    else {
        let Routed::Sum(sum) = routed else {
            return Ok(());
        };
        return check_matrix("routed sum", *sum, tokens, hidden);
    };
    check_matrix("ys", *ys, ys.rows(), hidden)?;
    let pairs = crate::shape::pairs(tokens, *slots)?;
    if row_of_pair.len() != pairs {
        return Err(Error::shape("row_of_pair", [pairs], [row_of_pair.len()]));
    }
    if let Some(&bad) = row_of_pair
        .iter()
        .find(|&&r| r != NO_ROW && r as usize >= ys.rows())
    {
        return Err(Error::value(
            "row_of_pair",
            format!("rows below {}", ys.rows()),
            bad,
        ));
    }
    if let Some(weights) = weights
        && weights.len() != pairs
    {
        return Err(Error::shape("weights", [pairs], [weights.len()]));
    }
    if let Some(identity) = identity {
        if weights.is_none() {
            return Err(Error::value(
                "weights",
                "some, with identity experts",
                "none",
            ));
        }
        if identity.ids.len() != pairs {
            return Err(Error::shape("ids", [pairs], [identity.ids.len()]));
        }
        identity.x.expect("x", tokens, hidden)?;
    }
    Ok(())
}
