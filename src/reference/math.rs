//! Elementary functions.

use std::f64::consts::{FRAC_2_SQRT_PI, PI};

/// `1 / (1 + e^−x)`.
pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `ln(1 + e^x)`, written so that a large x does not overflow.
pub fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// `ln sigmoid(x)`.
pub fn log_sigmoid(x: f64) -> f64 {
    -softplus(-x)
}

/// `ln Σ e^z`.
pub fn logsumexp(z: &[f64]) -> f64 {
    let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if max.is_infinite() {
        // All −inf: the sum is zero. A +inf: the sum is infinite, unless a NaN is there too.
        return if z.iter().any(|v| v.is_nan()) {
            f64::NAN
        } else {
            max
        };
    }
    max + z.iter().map(|v| (v - max).exp()).sum::<f64>().ln()
}

/// `e^z / Σ e^z`. A row that holds a NaN or a +inf, or nothing but −inf, is NaN throughout.
pub fn softmax(z: &[f64]) -> Vec<f64> {
    let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = z.iter().map(|v| (v - max).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.iter().map(|v| v / sum).collect()
}

/// The error function, `2/√π ∫₀ˣ e^−t² dt`, to a few ulp.
///
/// For |x| < 2 the series `2/√π · e^−x² · Σ 2ⁿ x²ⁿ⁺¹ / (1·3·5···(2n+1))`, all of whose terms have one
/// sign, so that nothing cancels; beyond, `1 − erfc(x)`.
pub fn erf(x: f64) -> f64 {
    if x.is_nan() {
        return x;
    }
    if x.abs() >= 2.0 {
        return x.signum() * (1.0 - erfc(x.abs()));
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..60 {
        term *= 2.0 * x * x / (2 * n + 1) as f64;
        sum += term;
    }
    FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

/// `1 − erf(x)`, accurate relative to its own (tiny) size for large x.
///
/// For x ≥ 2 the continued fraction `e^−x²/√π · 1/(x + ½/(x + 1/(x + 3⁄2/(x + …))))`, from the inside out.
pub fn erfc(x: f64) -> f64 {
    if x.is_nan() || x < 2.0 {
        return if x <= -2.0 {
            2.0 - erfc(-x)
        } else {
            1.0 - erf(x)
        };
    }
    let mut denominator = x;
    for n in (1..=200).rev() {
        denominator = x + 0.5 * n as f64 / denominator;
    }
    (-x * x).exp() / PI.sqrt() / denominator
}

/// `Σ a·b`, in increasing index.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len(), "dot: lengths differ");
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `x · wᵀ + bias`: x `[rows, n_in]`, w `[n_out, n_in]`, bias `[n_out]` or empty → `[rows, n_out]`.
pub fn linear(x: &[f64], n_in: usize, w: &[f64], bias: &[f64]) -> Vec<f64> {
    let n_out = rows_of(w, n_in, "linear: w");
    rows_of(x, n_in, "linear: x");
    assert!(
        bias.is_empty() || bias.len() == n_out,
        "linear: bias has {} elements, not {n_out}",
        bias.len()
    );
    let mut y = Vec::new();
    for x in x.chunks_exact(n_in) {
        for (o, w) in w.chunks_exact(n_in).enumerate() {
            y.push(dot(x, w) + at_or(bias, o, 0.0));
        }
    }
    y
}

/// `w · x / sqrt(mean(x²) + eps)` of one row; an empty w is all ones.
pub fn rms_norm(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    assert!(
        w.is_empty() || w.len() == x.len(),
        "rms_norm: w has {} elements, not {}",
        w.len(),
        x.len()
    );
    let rms = (dot(x, x) / x.len() as f64 + eps).sqrt();
    x.iter()
        .enumerate()
        .map(|(i, v)| v / rms * at_or(w, i, 1.0))
        .collect()
}

/// Rows of a matrix that is `width` wide.
pub(super) fn rows_of(matrix: &[f64], width: usize, what: &str) -> usize {
    assert!(width > 0, "{what}: zero width");
    assert_eq!(
        matrix.len() % width,
        0,
        "{what}: {} elements do not make rows of {width}",
        matrix.len()
    );
    matrix.len() / width
}

/// `v[i]`, or `absent` when v is empty.
pub(super) fn at_or(v: &[f64], i: usize, absent: f64) -> f64 {
    if v.is_empty() { absent } else { v[i] }
}

/// `min(x, limit)`, where a NaN stays NaN (`f64::min` would hide it).
pub(super) fn at_most(x: f64, limit: f64) -> f64 {
    if x > limit { limit } else { x }
}

/// x held between −limit and limit, where a NaN stays NaN.
pub(super) fn within(x: f64, limit: f64) -> f64 {
    -at_most(-at_most(x, limit), limit)
}

/// `cap · tanh(x / cap)`; a cap of 0 means no cap.
pub(super) fn softcap(x: f64, cap: f64) -> f64 {
    if cap > 0.0 { cap * (x / cap).tanh() } else { x }
}

#[cfg(test)]
mod tests {
    use super::super::assert_close;
    use super::*;

    #[test]
    fn erf_matches_tables() {
        let table = [
            (0.0, 0.0),
            (1e-10, 1.128_379_167_095_512_6e-10),
            (0.5, 0.520_499_877_813_046_5),
            (1.0, 0.842_700_792_949_714_9),
            (1.999, 0.995_301_556_651_370_5),
            (2.0, 0.995_322_265_018_952_7),
            (3.0, 0.999_977_909_503_001_4),
            (6.5, 1.0),
        ];
        for (x, expected) in table {
            assert!(
                (erf(x) - expected).abs() <= 4.0 * f64::EPSILON * expected,
                "erf({x}) = {}",
                erf(x)
            );
            assert_eq!(erf(-x), -erf(x));
        }
        for (x, expected) in [
            (3.0, 2.209_049_699_858_544e-5),
            (5.0, 1.537_459_794_428_035e-12),
        ] {
            assert!(
                (erfc(x) / expected - 1.0).abs() < 1e-14,
                "erfc({x}) = {}",
                erfc(x)
            );
        }
        assert_eq!(erfc(-5.0), 2.0 - erfc(5.0));
        assert!(erf(f64::NAN).is_nan() && erfc(f64::NAN).is_nan());
    }

    #[test]
    fn the_two_halves_of_erf_meet() {
        for x in [1.9, 1.99, 1.999_999] {
            let continued_fraction = {
                let mut denominator = x;
                for n in (1..=400).rev() {
                    denominator = x + 0.5 * n as f64 / denominator;
                }
                1.0 - f64::exp(-x * x) / PI.sqrt() / denominator
            };
            assert!((erf(x) - continued_fraction).abs() < 1e-15);
        }
    }

    #[test]
    fn softmax_and_logsumexp() {
        let z = [1f64.ln(), 2f64.ln(), 5f64.ln()];
        assert_close(&softmax(&z), &[0.125, 0.25, 0.625], 1e-15);
        assert_close(&[logsumexp(&z)], &[8f64.ln()], 1e-15);
        assert_eq!(softmax(&[1e308, -1e308]), [1.0, 0.0]);
        assert_eq!(softmax(&[f64::NEG_INFINITY, 3.0]), [0.0, 1.0]);
        assert!(softmax(&[0.0, f64::NAN]).iter().all(|p| p.is_nan()));
        assert!(softmax(&[0.0, f64::INFINITY]).iter().all(|p| p.is_nan()));
        assert!(softmax(&[f64::NEG_INFINITY; 2]).iter().all(|p| p.is_nan()));
        assert_eq!(logsumexp(&[f64::NEG_INFINITY; 2]), f64::NEG_INFINITY);
        assert_eq!(logsumexp(&[f64::INFINITY, 0.0]), f64::INFINITY);
        assert!(logsumexp(&[f64::INFINITY, f64::NAN]).is_nan());
    }

    #[test]
    fn softplus_at_both_ends() {
        assert_eq!(softplus(1000.0), 1000.0);
        assert_eq!(softplus(-1000.0), 0.0);
        assert_close(&[softplus(0.0)], &[2f64.ln()], 1e-16);
        assert_eq!(log_sigmoid(-1000.0), -1000.0);
        assert!(softplus(f64::NAN).is_nan());
    }

    #[test]
    fn clamps_keep_nan() {
        assert!(at_most(f64::NAN, 1.0).is_nan() && within(f64::NAN, 1.0).is_nan());
        assert_eq!(
            [within(-3.0, 2.0), within(3.0, 2.0), within(1.0, 2.0)],
            [-2.0, 2.0, 1.0]
        );
        assert_eq!([at_most(3.0, 2.0), at_most(-3.0, 2.0)], [2.0, -3.0]);
    }

    #[test]
    fn linear_and_rms_norm_by_hand() {
        let x = [1.0, 2.0, 3.0, 4.0];
        let w = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0];
        assert_eq!(
            linear(&x, 2, &w, &[10.0, 20.0, 30.0]),
            [11.0, 22.0, 33.0, 13.0, 24.0, 37.0]
        );
        // mean(x²) = 12.5 for [3, 4].
        let rms = 12.5f64.sqrt();
        assert_eq!(
            rms_norm(&[3.0, 4.0], &[2.0, 1.0], 0.0),
            [3.0 / rms * 2.0, 4.0 / rms]
        );
    }
}
