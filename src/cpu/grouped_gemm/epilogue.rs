//! What happens to a finished block of sums: bias, activation, rounding to the output's format, store.

use super::packing::PanelLayout;
use crate::cpu::out_rows::OutRows;
use crate::cpu::simd::{MAX_LANES, Simd, math};
use crate::grouped_gemm::{Activation, ActivationFunction, Clamp};

/// `clamp(v, −limit, limit)`; NaN passes, since `min` and `max` return their second operand for it.
#[inline(always)]
fn clamp<S: Simd>(s: S, v: S::F, limit: f32) -> S::F {
    s.max(s.splat(-limit), s.min(s.splat(limit), v))
}

/// `c·tanh(v/c)`, or v for a cap of 0.
#[inline(always)]
fn softcap<S: Simd>(s: S, v: S::F, cap: f32) -> S::F {
    if cap == 0.0 {
        return v;
    }
    let cap = s.splat(cap);
    s.mul(cap, math::tanh(s, s.div(v, cap)))
}

#[inline(always)]
fn scalar_function<S: Simd>(s: S, function: ActivationFunction, z: S::F) -> S::F {
    match function {
        ActivationFunction::Identity => z,
        ActivationFunction::Silu => math::silu(s, z),
        ActivationFunction::Gelu => math::gelu_erf(s, z),
        ActivationFunction::GeluTanh => math::gelu_tanh(s, z),
        ActivationFunction::Relu => math::relu(s, z),
        ActivationFunction::Relu2 => math::relu2(s, z),
    }
}

/// The activation of one vector: g and u when gated, g alone when not (u is ignored).
#[inline(always)]
fn activate<S: Simd>(s: S, activation: &Activation, g: S::F, u: S::F) -> S::F {
    let f = activation.function;
    let (g, u) = match activation.clamp {
        Clamp::None => (scalar_function(s, f, g), u),
        Clamp::Pre { limit } => {
            let g = s.min(s.splat(limit), g);
            (scalar_function(s, f, g), clamp(s, u, limit))
        }
        Clamp::Post { limit } => {
            let g = s.min(s.splat(limit), scalar_function(s, f, g));
            (g, clamp(s, u, limit))
        }
        Clamp::GptOss { limit, alpha } => {
            let g = s.min(s.splat(limit), g);
            let u = s.add(clamp(s, u, limit), s.splat(1.0));
            (s.mul(g, math::sigmoid(s, s.mul(s.splat(alpha), g))), u)
        }
        Clamp::Softcap { gate, up } => {
            let g = s.mul(softcap(s, g, gate), math::sigmoid(s, g));
            (g, softcap(s, u, up))
        }
    };
    if activation.gated { s.mul(g, u) } else { g }
}

/// Finishes one panel's block of sums `c [rows][NR]` and stores it at output rows `first_row ..`.
///
/// # Safety
/// As [`OutRows::write`], for the panel's columns of these rows.
#[inline(always)]
pub(crate) unsafe fn finish_panel<S: Simd>(
    s: S,
    layout: &PanelLayout,
    panel: usize,
    c: &[f32],
    bias: Option<&[f32]>,
    activation: Option<&Activation>,
    out: OutRows,
    first_row: usize,
) {
    let nr = 2 * S::LANES;
    let columns = layout.columns_per_panel();
    let col = panel * columns;
    let valid = columns.min(layout.n - col);
    let bias = bias.map(|b| {
        let b = &b[panel * nr..][..nr];
        (s.load_slice(b), s.load_slice(&b[S::LANES..]))
    });
    let mut values = [0.0f32; 2 * MAX_LANES];
    for (i, row) in c.chunks_exact(nr).enumerate() {
        let mut left = s.load_slice(row);
        let mut right = s.load_slice(&row[S::LANES..]);
        if let Some((bias_left, bias_right)) = bias {
            left = s.add(left, bias_left);
            right = s.add(right, bias_right);
        }
        if let Some(activation) = activation {
            if activation.gated {
                left = activate(s, activation, left, right);
            } else {
                left = activate(s, activation, left, left);
                right = activate(s, activation, right, right);
            }
        }
        s.store_slice(&mut values, left);
        s.store_slice(&mut values[S::LANES..], right);
        // SAFETY: the caller's contract. A gated panel's right half is not among the valid columns.
        unsafe { out.write(first_row + i, col, &values[..valid]) };
    }
}
