//! The layer in f64, with the error that each element may have.

use super::*;

/// A `plain` layer in f64 from given ids and weights, with bounds for what f32 sums in any order and roundings to the layer's format may change: each dot product by its
/// length and the sum of its terms' sizes, h by its rounding to 16 bits, which then goes through W_down element by element, and so on to y (see `common/near.rs`).
pub fn near(case: &Case, w: &Weights, x: &[f32], residual: &[f32], routed: &Answer) -> Vec<Near> {
    let (h, slots) = (case.hidden, case.config.slots());
    x.chunks(h)
        .enumerate()
        .flat_map(|(t, x)| {
            let pairs = t * slots..(t + 1) * slots;
            let (ids, weights) = (&routed.ids[pairs.clone()], &routed.weights[pairs]);
            let x: Vec<Near> = x.iter().map(|&v| v.into()).collect();
            near_token(case, w, &x, &residual[t * h..][..h], ids, weights)
        })
        .collect()
}

fn near_token(
    case: &Case,
    w: &Weights,
    x: &[Near],
    residual: &[f32],
    ids: &[i32],
    weights: &[f32],
) -> Vec<Near> {
    let mut y = near_routed(case, w, x, ids, weights);
    let mut each = |f: &dyn Fn(Near, usize) -> Near| {
        y = y.iter().enumerate().map(|(c, &v)| f(v, c)).collect();
    };
    each(&|v, _| v.times(case.routed_scale.into()));
    if let Some(shared) = case.shared {
        let (up, down) = (&w.matrices[SHARED_UP], &w.matrices[SHARED_DOWN]);
        let s = near_expert(case, w, up, down, None).of(x);
        let gate = near::dot(x, &w.matrices[SHARED_GATE]).sigmoid();
        each(&|v, c| match shared.join {
            SharedJoin::SigmoidGate => v.plus(s[c].times(gate)),
            SharedJoin::Average => v.plus(s[c]).times(0.5.into()),
            _ => v.plus(s[c]),
        });
    }
    if case.output_steps {
        y = near::rms_norm(&y, &w.vectors[OUT_NORM], EPS.into());
        let last = y.iter().zip(&w.vectors[OUT_BIAS]).zip(residual);
        y = last
            .map(|((v, &b), &r)| v.times(MULTIPLIER.into()).plus(b.into()).plus(r.into()))
            .collect();
    }
    y
}

/// The sum over a token's pairs.
fn near_routed(case: &Case, w: &Weights, x: &[Near], ids: &[i32], weights: &[f32]) -> Vec<Near> {
    let (h, e) = (case.hidden, case.config.num_experts);
    let mut y = vec![Near::default(); h];
    for (&id, &weight) in ids.iter().zip(weights) {
        let Ok(id) = usize::try_from(id) else {
            continue;
        };
        let weight = Near::from(weight);
        if id >= e {
            // An identity expert.
            y = y
                .iter()
                .zip(x)
                .map(|(y, &x)| y.plus(weight.times(x)))
                .collect();
            continue;
        }
        let part = |place: usize| {
            let all = &w.matrices[place];
            &all[id * all.len() / e..][..all.len() / e]
        };
        let (up, down) = (part(UP), part(DOWN));
        let expert = near_expert(case, w, up, down, Some(id));
        let output = match case.weight_on_input {
            // The CPU rounds the product to the format, a tensor-core kernel multiplies the sums.
            true => expert.of(&x
                .iter()
                .map(|v| v.times(weight).rounded(w.dtype))
                .collect::<Vec<_>>()),
            false => expert.of(x).iter().map(|v| v.times(weight)).collect(),
        };
        y = y.iter().zip(output).map(|(y, v)| y.plus(v)).collect();
    }
    y
}

/// An expert, with the biases of expert `id` where there are some.
fn near_expert<'a>(
    case: &Case,
    w: &'a Weights,
    up: &'a [f32],
    down: &'a [f32],
    id: Option<usize>,
) -> near::Mlp<'a> {
    let bias = |all: &'a [f32]| {
        let width = all.len() / case.config.num_experts;
        id.filter(|_| case.biases)
            .map(|id| &all[id * width..][..width])
    };
    near::Mlp {
        activation: case.activation,
        dtype: w.dtype,
        up,
        up_bias: bias(&w.matrices[UP_BIAS]),
        down,
        down_bias: bias(&w.matrices[DOWN_BIAS]),
    }
}

/// Fails for an element that is further from its value in f64 than the roundings on the way to it allow, or when many are near that bound: a rounding error is spread over its
/// bound, with a root mean square of 1/√3 of it, and sums of several have less.
pub fn check_near(found: &[f32], near: &[Near], what: &str) {
    assert_eq!(found.len(), near.len(), "{what}");
    let (mut squares, mut bounds) = (0.0, 0.0);
    for (i, (&f, n)) in found.iter().zip(near).enumerate() {
        let difference = (f64::from(f) - n.value).abs();
        assert!(
            difference <= n.error,
            "{what}: element {i} is {f:e}, {:e} within {:e} expected",
            n.value,
            n.error
        );
        squares += difference * difference;
        bounds += n.error * n.error;
    }
    if found.len() >= 64 {
        let share = (squares / bounds).sqrt();
        assert!(share <= 0.58, "{what}: errors are {share} of their bounds");
    }
}
