//! Grouped GEMM, what happens between two of them, and the weighted sum.

use super::math::{at_most, erfc, linear, rows_of, sigmoid, softcap, within};
use std::f64::consts::{FRAC_1_SQRT_2, PI};

/// `out[r] = a[r] · w[e]ᵀ + bias[e]` for the rows r of each expert e: a `[rows, n_in]`,
/// w `[E, n_out, n_in]`, bias `[E, n_out]` or empty, offsets `[E+1]` → `[rows, n_out]`.
pub fn grouped_gemm(
    a: &[f64],
    n_in: usize,
    w: &[f64],
    bias: &[f64],
    offsets: &[usize],
) -> Vec<f64> {
    let experts = offsets.len() - 1;
    assert_eq!(
        rows_of(a, n_in, "grouped_gemm: a"),
        offsets[experts],
        "grouped_gemm: offsets do not cover a"
    );
    assert_eq!(
        rows_of(w, n_in, "grouped_gemm: w") % experts.max(1),
        0,
        "grouped_gemm: w is not [E,N,K]"
    );
    let mut out = Vec::new();
    for e in 0..experts {
        let rows = &a[offsets[e] * n_in..offsets[e + 1] * n_in];
        out.extend(linear(
            rows,
            n_in,
            nth(w, e, experts),
            nth(bias, e, experts),
        ));
    }
    out
}

/// [`grouped_gemm`] of absolute values: `Σ|a||w| + |bias|` for each output, the size against which its
/// rounding error is to be judged. Any order of n additions and multiplications in a precision of unit
/// roundoff u ends within [`gamma`]`(n, u)` times this of the exact result.
pub fn grouped_gemm_abs(
    a: &[f64],
    n_in: usize,
    w: &[f64],
    bias: &[f64],
    offsets: &[usize],
) -> Vec<f64> {
    let abs = |v: &[f64]| v.iter().map(|x| x.abs()).collect::<Vec<_>>();
    grouped_gemm(&abs(a), n_in, &abs(w), &abs(bias), offsets)
}

/// `n·u / (1 − n·u)`: the relative growth of n roundings of at most u each (Higham, *Accuracy and Stability
/// of Numerical Algorithms*, lemma 3.1). u is 2⁻²⁴ for f32, which is half of `f32::EPSILON`.
pub fn gamma(n: usize, u: f64) -> f64 {
    let nu = n as f64 * u;
    assert!(nu < 1.0, "gamma: n·u = {nu}");
    nu / (1.0 - nu)
}

/// Part e of a slice that holds `count` equal parts; empty if the slice is.
pub(super) fn nth(stacked: &[f64], e: usize, count: usize) -> &[f64] {
    assert_eq!(
        stacked.len() % count,
        0,
        "{} elements are not {count} equal parts",
        stacked.len()
    );
    let size = stacked.len() / count;
    &stacked[e * size..(e + 1) * size]
}

/// The nonlinearity of an expert.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// `x · Φ(x) = ½ x (1 + erf(x/√2))`.
    Gelu,
    /// `½ x (1 + tanh(√(2/π) (x + 0.044715 x³)))`.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)²`.
    Relu2,
    /// `x`.
    Identity,
}

impl Activation {
    /// The value at x.
    pub fn at(self, x: f64) -> f64 {
        match self {
            Self::Silu => x * sigmoid(x),
            Self::Gelu => 0.5 * x * erfc(-x * FRAC_1_SQRT_2),
            Self::GeluTanh => {
                0.5 * x * (1.0 + ((2.0 / PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
            }
            Self::Relu => relu(x),
            Self::Relu2 => relu(x) * relu(x),
            Self::Identity => x,
        }
    }
}

/// `max(x, 0)`, where a NaN stays NaN.
fn relu(x: f64) -> f64 {
    if x < 0.0 { 0.0 } else { x }
}

/// What holds the values inside an expert in bounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Clamp {
    /// Nothing: `act(g) · u`.
    None,
    /// Before: `act(min(g, limit)) · clamp(u, ±limit)`.
    Pre(f64),
    /// After: `min(act(g), limit) · clamp(u, ±limit)`.
    Post(f64),
    /// gpt-oss: with g ≤ limit and |u| ≤ limit, `(u + 1) · g · sigmoid(alpha·g)`. Has no `act`.
    Oai {
        /// The bound.
        limit: f64,
        /// The steepness of the sigmoid.
        alpha: f64,
    },
    /// Inkling 2: `cap(g) · sigmoid(g) · cap(u)` with `cap(v) = c·tanh(v/c)`, or v where c is 0. The sigmoid
    /// sees the gate before its cap. Has no `act`.
    Softcap {
        /// The cap of the gate.
        gate: f64,
        /// The cap of up.
        up: f64,
    },
}

/// The shape of an expert, routed or shared.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MlpSpec {
    /// Whether there is a gate: `act(gate) · up`, otherwise `act(up)`.
    pub gated: bool,
    /// The nonlinearity.
    pub act: Activation,
    /// What bounds the values.
    pub clamp: Clamp,
}

impl MlpSpec {
    /// What enters w_down, from one element of gate and up. Without a gate, `up` takes its place (clamps
    /// and caps of the gate included) and nothing is multiplied.
    pub fn activate(&self, gate: f64, up: f64) -> f64 {
        let (g, u) = if self.gated { (gate, up) } else { (up, 1.0) };
        let bounded = |limit: f64| if self.gated { within(u, limit) } else { u };
        match self.clamp {
            Clamp::None => self.act.at(g) * u,
            Clamp::Pre(limit) => self.act.at(at_most(g, limit)) * bounded(limit),
            Clamp::Post(limit) => at_most(self.act.at(g), limit) * bounded(limit),
            Clamp::Oai { limit, alpha } => {
                assert!(self.gated, "Clamp::Oai needs a gate");
                let g = at_most(g, limit);
                (within(u, limit) + 1.0) * g * sigmoid(alpha * g)
            }
            Clamp::Softcap { gate, up } => {
                assert!(self.gated, "Clamp::Softcap needs a gate");
                softcap(g, gate) * sigmoid(g) * softcap(u, up)
            }
        }
    }
}

/// `y[t] = Σ_slot weight · ys[row]` in slot order: ys `[rows, width]`, weights `[T,K]`, row_of_pair `[T·K]`,
/// where −1 contributes nothing → `[T, width]`.
pub fn combine(
    ys: &[f64],
    width: usize,
    weights: &[f64],
    row_of_pair: &[i64],
    k: usize,
) -> Vec<f64> {
    assert_eq!(
        weights.len(),
        row_of_pair.len(),
        "combine: weights and row_of_pair differ in length"
    );
    let mut y = vec![0.0; weights.len() / k * width];
    for (pair, &row) in row_of_pair.iter().enumerate().filter(|(_, row)| **row >= 0) {
        let t = pair / k;
        for h in 0..width {
            y[t * width + h] += weights[pair] * ys[row as usize * width + h];
        }
    }
    y
}

#[cfg(test)]
mod tests {
    use super::super::{assert_close, dot, noise};
    use super::*;

    #[test]
    fn grouped_gemm_by_hand() {
        let a = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]; // three rows: one of expert 0, two of expert 2
        let w = [1.0, 1.0, f64::NAN, f64::NAN, 1.0, -1.0];
        let bias = [10.0, 0.0, 20.0];
        let offsets = [0, 1, 1, 3];
        assert_eq!(grouped_gemm(&a, 2, &w, &bias, &offsets), [13.0, 19.0, 19.0]);
        assert_eq!(
            grouped_gemm_abs(&a, 2, &w, &bias, &offsets),
            [13.0, 27.0, 31.0]
        );
        assert!(grouped_gemm(&[], 2, &w, &bias, &[0; 4]).is_empty());
    }

    #[test]
    fn the_bound_holds_for_f32() {
        let n = 300;
        let (a, w) = (noise(1, n), noise(2, n));
        let a32: Vec<f32> = a.iter().map(|v| *v as f32).collect();
        let w32: Vec<f32> = w.iter().map(|v| *v as f32).collect();
        let wide = |v: &[f32]| v.iter().map(|v| *v as f64).collect::<Vec<_>>();
        let naive = a32.iter().zip(&w32).fold(0f32, |sum, (a, b)| sum + a * b);
        let bound = grouped_gemm_abs(&wide(&a32), n, &wide(&w32), &[], &[0, 1])[0];
        let error = (naive as f64 - dot(&wide(&a32), &wide(&w32))).abs();
        let u = f32::EPSILON as f64 / 2.0;
        assert!(error > 0.0 && error <= gamma(n, u) * bound);
    }

    #[test]
    fn activations_by_hand() {
        assert_close(
            &[Activation::Silu.at(1.0)],
            &[0.731_058_578_630_004_9],
            1e-15,
        );
        assert_close(
            &[Activation::Gelu.at(1.0)],
            &[0.841_344_746_068_542_9],
            1e-15,
        );
        assert_close(
            &[Activation::Gelu.at(-1.0)],
            &[-0.158_655_253_931_457_1],
            1e-15,
        );
        assert_close(
            &[Activation::GeluTanh.at(1.0)],
            &[0.841_191_990_608_276_8],
            1e-14,
        );
        assert_eq!(
            [Activation::Relu.at(-2.0), Activation::Relu.at(2.0)],
            [0.0, 2.0]
        );
        assert_eq!(
            [Activation::Relu2.at(-2.0), Activation::Relu2.at(3.0)],
            [0.0, 9.0]
        );
        assert_eq!(Activation::Identity.at(-2.0), -2.0);
        // The far tail keeps its relative accuracy: −8 · Φ(−8).
        assert!(
            (Activation::Gelu.at(-8.0) / (-8.0 * 6.220_960_574_271_785e-16) - 1.0).abs() < 1e-12
        );
        for act in [
            Activation::Silu,
            Activation::Gelu,
            Activation::GeluTanh,
            Activation::Relu,
            Activation::Relu2,
        ] {
            assert!(act.at(f64::NAN).is_nan());
        }
    }

    #[test]
    fn clamps_by_hand() {
        let with = |clamp| MlpSpec {
            gated: true,
            act: Activation::Identity,
            clamp,
        };
        assert_eq!(with(Clamp::None).activate(5.0, -6.0), -30.0);
        assert_eq!(with(Clamp::Pre(2.0)).activate(5.0, -6.0), -4.0);
        assert_eq!(with(Clamp::Pre(2.0)).activate(-5.0, 6.0), -10.0);
        let relu2 = MlpSpec {
            act: Activation::Relu2,
            ..with(Clamp::Post(7.0))
        };
        assert_eq!(relu2.activate(5.0, 8.0), 49.0);
        assert_eq!(
            MlpSpec {
                clamp: Clamp::Pre(7.0),
                ..relu2
            }
            .activate(5.0, 8.0),
            175.0
        );
        let oai = with(Clamp::Oai {
            limit: 7.0,
            alpha: 1.702,
        });
        assert_close(
            &[oai.activate(9.0, -9.0)],
            &[-6.0 * 7.0 * sigmoid(1.702 * 7.0)],
            1e-15,
        );
        let caps = with(Clamp::Softcap { gate: 4.0, up: 0.0 });
        assert_close(
            &[caps.activate(3.0, 2.0)],
            &[4.0 * 0.75f64.tanh() * sigmoid(3.0) * 2.0],
            1e-15,
        );
        for clamp in [
            Clamp::Pre(1.0),
            Clamp::Post(1.0),
            Clamp::Oai {
                limit: 1.0,
                alpha: 1.0,
            },
        ] {
            assert!(with(clamp).activate(f64::NAN, 1.0).is_nan());
            assert!(with(clamp).activate(1.0, f64::NAN).is_nan());
        }
        let bare = MlpSpec {
            gated: false,
            act: Activation::Relu2,
            clamp: Clamp::None,
        };
        assert_eq!(bare.activate(f64::NAN, 3.0), 9.0);
    }

    #[test]
    fn combine_by_hand() {
        let ys = [1.0, 2.0, 10.0, 20.0, 100.0, 200.0];
        let y = combine(&ys, 2, &[1.0, 0.5, 2.0, f64::NAN], &[2, 0, 1, -1], 2);
        assert_eq!(y, [100.5, 201.0, 20.0, 40.0]);
    }
}
