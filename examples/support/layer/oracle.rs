//! Sampled tokens against [`moe_kernels::reference`], in f64 from the same weights, with a tolerance that follows from the arithmetic.
//!
//! 1. The logits must be within `chain(H)·Σ|x||w|` of the exact ones.
//! 2. From the layer's logits on (so that a near tie is decided alike), ids must be equal, and weights within a few roundings.
//! 3. The output must be within what these errors, carried through the experts, can make of it:
//!
//! ```text
//! chain(n)  γ(n), or 6·√n·u₃₂ where that is less             rounding of a chain of n f32 operations
//! δg, δu    chain(H)·Σ|x||w|                                the sums of gate and up
//! δh        how far the activation moves when g, u move so  taken at the four corners; a few roundings of its own;
//!           + u·|h|                                         and h is rounded to the layer's format
//! δo        6·√Σ(δh·w)² + chain(I)·Σ|h||w|
//! δy        Σ weight·δo + |o|·δweight + chain(K)·Σ weight·|o| + u·|y|
//! ```
//!
//! Where many roundings add up they count as independent and of mean zero, and 6 standard deviations bound their sum (Higham and Mary 2019). The worst
//! case would be about √n times larger and would hide real errors.

use super::Result;
use super::measure::Sample;
use super::shapes::{Architecture, Join};
use super::source::{RouterTensors, SharedTensors, Source};
use super::tensor::{Expert, seen_as};
use moe_kernels::reference::{self as exact, linear};
use moe_kernels::{AnyMatRef, DType};
use rayon::prelude::*;

/// Unit roundoff of f32.
const U: f64 = 1.0 / (1u64 << 24) as f64;

/// The relative error of a chain of n f32 operations; see the top of this file.
fn chain(n: usize) -> f64 {
    // γ(36) and 6·√36·u meet.
    if n < 36 {
        exact::gamma(n, U)
    } else {
        6.0 * (n as f64).sqrt() * U
    }
}

/// What the check found.
#[derive(Clone, Debug, Default)]
pub struct Checked {
    /// Tokens looked at.
    pub tokens: Vec<usize>,
    pub logits: Worst,
    pub weights: Worst,
    pub y: Worst,
    /// Slots whose expert is not the reference's, and is no tie either.
    pub wrong_ids: usize,
    /// Slots where f32 and f64 disagree about a tie within rounding.
    pub near_ties: usize,
}

/// The element with the largest error for its tolerance.
#[derive(Clone, Copy, Debug, Default)]
pub struct Worst {
    pub ratio: f64,
    /// The largest error and the tolerance there.
    pub max_error: f64,
    pub tolerance: f64,
    /// The largest |expected|.
    pub scale: f64,
}

impl Worst {
    fn see(&mut self, found: f64, expected: f64, tolerance: f64) {
        let error = (found - expected).abs();
        // NaN is never within a tolerance.
        let ratio = if error <= tolerance {
            error / tolerance.max(f64::MIN_POSITIVE)
        } else {
            error / tolerance
        };
        self.ratio = if ratio.is_nan() {
            f64::INFINITY
        } else {
            self.ratio.max(ratio)
        };
        if error.is_nan() || error >= self.max_error {
            (self.max_error, self.tolerance) = (error, tolerance);
        }
        self.scale = self.scale.max(expected.abs());
    }
}

impl Checked {
    pub fn passed(&self) -> bool {
        let within = [self.logits, self.weights, self.y]
            .iter()
            .all(|w| w.ratio <= 1.0);
        within && self.wrong_ids == 0
    }
}

/// A vector and a bound on each element's error.
struct Bounded {
    value: Vec<f64>,
    error: Vec<f64>,
}

/// Checks up to `count` tokens, spread over the call.
pub fn check(
    architecture: &Architecture,
    source: &mut dyn Source,
    dtype: DType,
    sample: &Sample,
    count: usize,
) -> Result<Checked> {
    let mut checked = check_from_logits(architecture, source, dtype, sample, count)?;
    let router = source.router()?;
    for t in checked.tokens.clone() {
        check_logits(&mut checked, architecture, &router, sample, t)?;
    }
    Ok(checked)
}

/// As [`check`], of a call whose logits came from the caller.
pub fn check_from_logits(
    architecture: &Architecture,
    source: &mut dyn Source,
    dtype: DType,
    sample: &Sample,
    count: usize,
) -> Result<Checked> {
    let mut checked = Checked {
        tokens: spread(sample.tokens, count),
        ..Checked::default()
    };
    let correction = source.router()?.correction;
    let shared = source.shared()?;
    let spec = exact::RouterSpec {
        correction_bias: correction.as_deref().map(widen).unwrap_or_default(),
        ..(&architecture.router).into()
    };
    for t in checked.tokens.clone() {
        let weights = check_routing(&mut checked, &spec, sample, t)?;
        let y = token(
            architecture,
            source,
            shared.as_ref(),
            dtype,
            sample,
            t,
            &weights,
        )?;
        let found = &sample.y[t * architecture.hidden..][..architecture.hidden];
        for (j, &found) in found.iter().enumerate() {
            checked.y.see(f64::from(found), y.value[j], y.error[j]);
        }
    }
    Ok(checked)
}

/// Up to `count` of `tokens` tokens, the first and the last among them.
fn spread(tokens: usize, count: usize) -> Vec<usize> {
    let count = count.min(tokens);
    (0..count)
        .map(|n| n * (tokens - 1) / (count - 1).max(1))
        .collect()
}

fn check_logits(
    checked: &mut Checked,
    architecture: &Architecture,
    router: &RouterTensors,
    sample: &Sample,
    t: usize,
) -> Result<()> {
    let hidden = architecture.hidden;
    let x = widen(&sample.x[t * hidden..][..hidden]);
    let bias = router.bias.as_deref().map(widen).unwrap_or_default();
    let logits = product(&x, &abs(&x), &router.weight.view()?, DType::F32, &bias);
    let found = &sample.logits[t * logits.value.len()..];
    for (r, (&z, &size)) in logits.value.iter().zip(&logits.error).enumerate() {
        checked.logits.see(
            f64::from(found[r]),
            z,
            chain(hidden + 1) * size + f64::from(f32::MIN_POSITIVE),
        );
    }
    Ok(())
}

/// The reference's weights for the layer's ids and logits.
fn check_routing(
    checked: &mut Checked,
    spec: &exact::RouterSpec,
    sample: &Sample,
    t: usize,
) -> Result<Vec<f64>> {
    let (k, r) = (spec.slots(), spec.router_rows());
    let logits = widen(&sample.logits[t * r..][..r]);
    let ids = &sample.ids[t * k..][..k];
    let expected = exact::route(spec, &logits);
    if expected.ids != ids {
        let scores = exact::score(spec.score, &logits);
        let value = |id: i32| {
            let id = id as usize;
            scores[id] + spec.correction_bias.get(id).copied().unwrap_or(0.0)
        };
        for (&found, &expected) in ids.iter().zip(&expected.ids) {
            if found != expected {
                let (a, b) = (value(found), value(expected));
                let tie = (a - b).abs() <= 64.0 * U * a.abs().max(b.abs());
                *(if tie {
                    &mut checked.near_ties
                } else {
                    &mut checked.wrong_ids
                }) += 1;
            }
        }
    }
    // Weights of the layer's own ids, so that a near tie counts once.
    let weights = match spec.method {
        exact::Method::TopK => {
            let given = exact::Method::Given {
                ids: ids.to_vec(),
                weights: Vec::new(),
            };
            exact::route(
                &exact::RouterSpec {
                    method: given,
                    ..spec.clone()
                },
                &logits,
            )
            .weights
        }
        _ => expected.weights,
    };
    // exp, sums and divisions: some tens of roundings; the exponent's own rounding grows with the logits.
    let spread = logits.iter().fold(0.0f64, |m, z| m.max(z.abs()));
    for (&found, &w) in sample.weights[t * k..][..k].iter().zip(&weights) {
        checked.weights.see(
            f64::from(found),
            w,
            (64.0 + 4.0 * spread) * U * w.abs() + f64::from(f32::MIN_POSITIVE),
        );
    }
    Ok(weights)
}

/// y of token t from its ids and the reference's weights.
fn token(
    architecture: &Architecture,
    source: &mut dyn Source,
    shared: Option<&SharedTensors>,
    dtype: DType,
    sample: &Sample,
    t: usize,
    weights: &[f64],
) -> Result<Bounded> {
    let (hidden, k) = (architecture.hidden, weights.len());
    let x = widen(&sample.x[t * hidden..][..hidden]);
    let mlp = architecture.activation.into();
    let mut y = Bounded {
        value: vec![0.0; hidden],
        error: vec![0.0; hidden],
    };
    let mut size = vec![0.0; hidden];
    // y += factor · o, where the factor is known to within `factor_error`.
    let mut add = |y: &mut Bounded, factor: f64, factor_error: f64, o: &Bounded| {
        for (j, (&value, &error)) in o.value.iter().zip(&o.error).enumerate() {
            y.value[j] += factor * value;
            y.error[j] += factor.abs() * error + factor_error * (value.abs() + error);
            size[j] += (factor * value).abs();
        }
    };
    for (slot, &weight) in weights.iter().enumerate() {
        let Ok(id) = usize::try_from(sample.ids[t * k + slot]) else {
            continue;
        };
        let expert = source.expert(id)?;
        if architecture.weight_on_input {
            // x · weight is rounded to the layer's format, too.
            let scaled: Vec<f64> = x.iter().map(|v| v * weight).collect();
            let o = expert_output(&mlp, &expert, &scaled, dtype, unit(dtype))?;
            add(&mut y, 1.0, 0.0, &o);
        } else {
            let o = expert_output(&mlp, &expert, &x, dtype, 0.0)?;
            add(&mut y, weight, 128.0 * U * weight.abs(), &o);
        }
    }
    if let (Some(tensors), Some(shape)) = (shared, architecture.shared) {
        let s = expert_output(&mlp, &tensors.expert, &x, dtype, 0.0)?;
        let (gate, gate_error) = match (&tensors.gate, shape.join) {
            (Some(gate), Join::SigmoidGate) => {
                let z = product(&x, &abs(&x), &gate.view()?, DType::F32, &[]);
                (
                    exact::sigmoid(z.value[0]),
                    0.25 * chain(hidden) * z.error[0] + 64.0 * U,
                )
            }
            _ => (1.0, 0.0),
        };
        add(&mut y, gate, gate_error, &s);
    }
    for (j, size) in size.iter().enumerate() {
        y.error[j] += chain(k + 3) * size;
        y.error[j] += unit(dtype) * (y.value[j].abs() + y.error[j]) + smallest(dtype);
    }
    Ok(y)
}

/// One expert's output; each element of x is known to a relative error of `x_error`.
fn expert_output(
    mlp: &exact::MlpSpec,
    expert: &Expert,
    x: &[f64],
    dtype: DType,
    x_error: f64,
) -> Result<Bounded> {
    let weights = expert.views()?;
    let bias = |b: Option<&[f32]>| b.map(widen).unwrap_or_default();
    let sums = |w: &AnyMatRef<'_>, b: Option<&[f32]>| {
        let mut sum = product(x, &abs(x), w, dtype, &bias(b));
        let rounding = chain(x.len() + 1);
        sum.error.iter_mut().for_each(|size| *size *= rounding);
        if x_error > 0.0 {
            let rms = root_of_squares(x, w, dtype);
            sum.error
                .iter_mut()
                .zip(rms)
                .for_each(|(e, rms)| *e += 6.0 * x_error * rms);
        }
        sum
    };
    let u = sums(&weights.up, weights.up_bias);
    let g = match &weights.gate {
        Some(gate) => sums(gate, weights.gate_bias),
        None => Bounded {
            value: u.value.clone(),
            error: u.error.clone(),
        },
    };
    let mut h = Bounded {
        value: Vec::new(),
        error: Vec::new(),
    };
    for i in 0..u.value.len() {
        let at = |dg: f64, du: f64| {
            mlp.activate(g.value[i] + dg * g.error[i], u.value[i] + du * u.error[i])
        };
        let value = at(0.0, 0.0);
        let moved = [(1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0)]
            .iter()
            .fold(0.0f64, |m, &(dg, du)| m.max((at(dg, du) - value).abs()));
        h.value.push(value);
        let rounded = (32.0 * U + unit(dtype)) * value.abs() + smallest(dtype);
        h.error.push(1.0625 * moved + rounded);
    }
    let mut o = product(
        &h.value,
        &abs(&h.value),
        &weights.down,
        dtype,
        &bias(weights.down_bias),
    );
    let carried = root_of_squares(&h.error, &weights.down, dtype);
    for (error, carried) in o.error.iter_mut().zip(carried) {
        *error = chain(h.value.len() + 1) * *error + 6.0 * carried;
    }
    Ok(o)
}

/// `value = x · wᵀ + b` and, as `error`, the size `Σ|x||w| + |b|` that its rounding is measured by. w as the kernels see it.
fn product(x: &[f64], x_abs: &[f64], w: &AnyMatRef<'_>, dtype: DType, bias: &[f64]) -> Bounded {
    let rows = by_rows(w, dtype, |row| {
        let sizes: Vec<f64> = abs(row);
        (
            linear(x, x.len(), row, &[])[0],
            linear(x_abs, x.len(), &sizes, &[])[0],
        )
    });
    let b = |i: usize| bias.get(i).copied().unwrap_or(0.0);
    Bounded {
        value: rows.iter().enumerate().map(|(i, r)| r.0 + b(i)).collect(),
        error: rows
            .iter()
            .enumerate()
            .map(|(i, r)| r.1 + b(i).abs())
            .collect(),
    }
}

/// `√Σ(x·w)²`
fn root_of_squares(x: &[f64], w: &AnyMatRef<'_>, dtype: DType) -> Vec<f64> {
    by_rows(w, dtype, |row| {
        x.iter()
            .zip(row)
            .map(|(x, w)| (x * w) * (x * w))
            .sum::<f64>()
            .sqrt()
    })
}

fn by_rows<T: Send>(w: &AnyMatRef<'_>, dtype: DType, of: impl Fn(&[f64]) -> T + Sync) -> Vec<T> {
    (0..w.rows())
        .into_par_iter()
        .map_init(
            || vec![0.0; w.cols()],
            |row, i| {
                row.iter_mut()
                    .enumerate()
                    .for_each(|(j, v)| *v = seen_as(w, dtype, i, j));
                of(row)
            },
        )
        .collect()
}

fn widen(v: &[f32]) -> Vec<f64> {
    v.iter().map(|&v| f64::from(v)).collect()
}

fn abs(v: &[f64]) -> Vec<f64> {
    v.iter().map(|v| v.abs()).collect()
}

/// Unit roundoff of a format.
fn unit(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 1.0 / f64::from(1 << 8),
        DType::F16 => 1.0 / f64::from(1 << 11),
        _ => U,
    }
}

/// Half the distance of its subnormals; for bf16, whose subnormals are flushed, its smallest normal number.
fn smallest(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 1.0 / f64::from(1 << 25),
        _ => f64::from(f32::MIN_POSITIVE),
    }
}
