//! What happens to a finished block of sums: bias, activation, rounding to the output's format, store.

use super::packing::PanelLayout;
use crate::cpu::out_rows::OutRows;
use crate::cpu::simd::{Op, Simd, math};
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
/// Two passes over a block that lies in L1: the choice of the activation and that of the output's format are made once for each, not once a row.
pub(crate) struct FinishPanel<'a> {
    layout: &'a PanelLayout,
    panel: usize,
    c: &'a mut [f32],
    bias: Option<&'a [f32]>,
    activation: Option<&'a Activation>,
    out: OutRows,
    first_row: usize,
    stream: bool,
}

impl<'a> FinishPanel<'a> {
    /// # Safety
    /// As [`OutRows::write_block`], for the panel's columns of these rows, when it runs.
    #[inline(always)]
    pub(crate) unsafe fn new(
        layout: &'a PanelLayout,
        panel: usize,
        c: &'a mut [f32],
        bias: Option<&'a [f32]>,
        activation: Option<&'a Activation>,
        out: OutRows,
        first_row: usize,
        stream: bool,
    ) -> Self {
        Self {
            layout,
            panel,
            c,
            bias,
            activation,
            out,
            first_row,
            stream,
        }
    }
}

impl Op for FinishPanel<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { layout, c, .. } = self;
        let nr = 2 * S::LANES;
        let columns = layout.columns_per_panel();
        let col = self.panel * columns;
        if let Some(bias) = self.bias {
            add_bias(s, c, &bias[self.panel * nr..][..nr]);
        }
        match self.activation {
            None => {}
            Some(&Activation::SWIGLU) => swiglu(s, c),
            Some(activation) => activate_block(s, activation, c),
        }
        let valid = columns.min(layout.n - col);
        // SAFETY: `new`'s contract. A gated panel's right half is not among the valid columns.
        unsafe {
            self.out
                .write_block(s, self.first_row, col, valid, c, self.stream)
        };
    }
}

#[inline(always)]
fn add_bias<S: Simd>(s: S, c: &mut [f32], bias: &[f32]) {
    let (left, right) = (s.load_slice(bias), s.load_slice(&bias[S::LANES..]));
    for row in c.chunks_exact_mut(2 * S::LANES) {
        let (a, b) = row.split_at_mut(S::LANES);
        s.store_slice(a, s.add(s.load_slice(a), left));
        s.store_slice(b, s.add(s.load_slice(b), right));
    }
}

/// The usual activation, without a branch: `silu(g) · u` into the left half of each row.
#[inline(always)]
fn swiglu<S: Simd>(s: S, c: &mut [f32]) {
    for row in c.chunks_exact_mut(2 * S::LANES) {
        let (g, u) = (s.load_slice(row), s.load_slice(&row[S::LANES..]));
        s.store_slice(row, s.mul(math::silu(s, g), u));
    }
}

/// Any activation, in place.
#[inline(always)]
fn activate_block<S: Simd>(s: S, activation: &Activation, c: &mut [f32]) {
    for row in c.chunks_exact_mut(2 * S::LANES) {
        let (left, right) = (s.load_slice(row), s.load_slice(&row[S::LANES..]));
        if activation.gated {
            s.store_slice(row, activate(s, activation, left, right));
        } else {
            s.store_slice(row, activate(s, activation, left, left));
            s.store_slice(&mut row[S::LANES..], activate(s, activation, right, right));
        }
    }
}
