//! Routing: logits to experts and weights.

mod capacity;
mod select;
mod weigh;

pub use capacity::apply_capacity;
pub use select::{expert_choice, group_mask, product_keys, select, sparsemixer, top_k};
pub use weigh::{raw_weights, renormalize};

use super::math::{at_or, linear, rms_norm, rows_of, sigmoid, softcap, softmax, softplus};
use super::router::{Method, NullKind, RouterSpec, Score, SelectOn};

/// The logits that enter the score function: `softcap(mul · (norm(x) · wᵀ + bias))`.
///
/// x `[T,H]`, w `[R,H]`, bias `[R]` or empty, in_scale `[H]` or empty (used with `input_norm` only).
pub fn router_logits(
    spec: &RouterSpec,
    x: &[f64],
    hidden: usize,
    w: &[f64],
    bias: &[f64],
    in_scale: &[f64],
) -> Vec<f64> {
    assert_eq!(
        w.len(),
        spec.router_rows() * hidden,
        "router_w is not [R,H]"
    );
    let seen: Vec<f64> = match spec.input_norm {
        None => x.to_vec(),
        Some(n) => x
            .chunks_exact(hidden)
            .flat_map(|x| rms_norm(x, in_scale, n.eps))
            .map(|v| v * n.mul)
            .collect(),
    };
    finish_logits(spec, &linear(&seen, hidden, w, &[]), bias)
}

/// The bias, multiplier and softcap of a router, on raw logits `[T,R]`.
pub fn finish_logits(spec: &RouterSpec, raw: &[f64], bias: &[f64]) -> Vec<f64> {
    let r = spec.router_rows();
    assert!(bias.is_empty() || bias.len() == r, "router_b is not [R]");
    let finish = |(i, z): (usize, &f64)| {
        softcap(
            (z + at_or(bias, i % r, 0.0)) * spec.logit_mul,
            spec.logit_softcap,
        )
    };
    raw.iter().enumerate().map(finish).collect()
}

/// Noisy top-k (Shazeer et al. 2017, eq. 4): `logit + normal · softplus(noise_logit)`, where
/// `noise_logits = x · W_noiseᵀ` and the normals are drawn from N(0,1) by the caller. All `[T,R]`.
pub fn noisy_logits(logits: &[f64], noise_logits: &[f64], normals: &[f64]) -> Vec<f64> {
    assert_eq!(
        logits.len(),
        noise_logits.len(),
        "noise_logits is not [T,R]"
    );
    assert_eq!(logits.len(), normals.len(), "normals is not [T,R]");
    let noise = noise_logits
        .iter()
        .zip(normals)
        .map(|(s, n)| n * softplus(*s));
    logits.iter().zip(noise).map(|(z, n)| z + n).collect()
}

/// The scores of one token.
pub fn score(kind: Score, logits: &[f64]) -> Vec<f64> {
    match kind {
        Score::Softmax => softmax(logits),
        Score::Sigmoid => logits.iter().map(|z| sigmoid(*z)).collect(),
        Score::SqrtSoftplus => logits.iter().map(|z| softplus(*z).sqrt()).collect(),
        Score::Identity => logits.to_vec(),
    }
}

/// What [`route`] answers.
#[derive(Clone, Debug, PartialEq)]
pub struct RouteResult {
    /// K: the width of the two matrices.
    pub slots: usize,
    /// `[T,K]`, the best first. −1 = dropped, or no choice; E..E+N = a null expert.
    pub ids: Vec<i32>,
    /// `[T,K]`, exactly what multiplies the expert; 0 where the id is −1.
    pub weights: Vec<f64>,
    /// `[T, num_joint_shared]`: what multiplies the jointly scored shared experts.
    pub shared_weights: Vec<f64>,
}

/// Routes T tokens: logits `[T,R]`, as they come from [`router_logits`], to experts and weights.
///
/// In order: choose; weigh; renormalise and drop (or drop and renormalise); scale.
pub fn route(spec: &RouterSpec, logits: &[f64]) -> RouteResult {
    spec.check();
    let (e, c, k) = (spec.num_experts, spec.candidates(), spec.slots());
    if let Method::Given { ids, weights } = &spec.method {
        assert!(
            ids.iter().all(|id| (-1..c as i32).contains(id)),
            "a given id names no expert"
        );
        if !weights.is_empty() {
            assert_eq!(
                ids.len(),
                weights.len(),
                "given ids and weights differ in length"
            );
            return RouteResult {
                slots: k,
                ids: ids.clone(),
                weights: weights.clone(),
                shared_weights: vec![],
            };
        }
    }
    let tokens = rows_of(logits, spec.router_rows(), "route: logits");
    let logits: Vec<f64> = match spec.method {
        Method::ProductKey { layout } => product_keys(logits, spec.num_keys(), layout),
        _ => logits.to_vec(),
    };
    let width = c + spec.num_joint_shared;
    let scores: Vec<f64> = logits
        .chunks_exact(width)
        .flat_map(|row| score(spec.score, row))
        .collect();
    let row = |matrix: &[f64], t: usize| matrix[t * width..(t + 1) * width].to_vec();

    // Choose.
    let mut ids: Vec<i32> = Vec::new();
    let mut weights: Vec<f64> = Vec::new();
    let mut shared_weights: Vec<f64> = Vec::new();
    match &spec.method {
        Method::TopK | Method::ProductKey { .. } => {
            for t in 0..tokens {
                let chosen = select(spec, &row(&logits, t)[..c], &row(&scores, t)[..c]);
                ids.extend(chosen.iter().map(|&e| e as i32));
            }
        }
        Method::Given { ids: given, .. } => {
            assert_eq!(given.len(), tokens * k, "given ids are not [T,K]");
            ids = given.clone();
        }
        Method::Sparsemixer { jitter_eps } => {
            for t in 0..tokens {
                let (chosen, w) = sparsemixer(&row(&logits, t)[..c], k, *jitter_eps);
                ids.extend(chosen.iter().map(|&e| e as i32));
                weights.extend(w);
            }
        }
        Method::ExpertChoice { capacity } => {
            let values = match spec.select_on {
                SelectOn::Score => &scores,
                SelectOn::Logit => &logits,
            };
            let values: Vec<f64> = values
                .iter()
                .enumerate()
                .map(|(i, v)| v + at_or(&spec.correction_bias, i % c, 0.0))
                .collect();
            ids = expert_choice(&values, c, *capacity);
        }
        Method::Dense => ids = (0..tokens).flat_map(|_| 0..c as i32).collect(),
    }

    // Weigh.
    if !matches!(spec.method, Method::Sparsemixer { .. }) {
        for t in 0..tokens {
            let (w, s) = raw_weights(
                spec,
                &row(&logits, t),
                &row(&scores, t),
                &ids[t * k..(t + 1) * k],
            );
            weights.extend(w);
            shared_weights.extend(s);
        }
    }

    // Renormalise and drop.
    let normalize_first = spec.capacity.is_none_or(|c| c.normalize_before_drop);
    if normalize_first {
        weights
            .chunks_exact_mut(k)
            .for_each(|w| renormalize(spec.renorm, w));
    }
    if let Some(capacity) = &spec.capacity {
        let top_1 = |t: usize| {
            let scores = row(&scores, t);
            scores[top_k(&scores, &[], 1)[0]]
        };
        let importance: Vec<f64> = (0..tokens).map(top_1).collect();
        apply_capacity(capacity, &mut ids, k, e, &importance);
        for (w, id) in weights.iter_mut().zip(&ids) {
            if *id < 0 {
                *w = 0.0;
            }
        }
    }
    if !normalize_first {
        weights
            .chunks_exact_mut(k)
            .for_each(|w| renormalize(spec.renorm, w));
    }

    // Scale.
    for (w, id) in weights.iter_mut().zip(&ids) {
        let is_expert = (0..e as i32).contains(id);
        *w *= spec.scale;
        if is_expert {
            *w *= at_or(&spec.per_expert_scale, *id as usize, 1.0);
        }
        if *id < 0 || (!is_expert && spec.null_kind == NullKind::Zero) {
            *w = 0.0;
        }
    }
    shared_weights.iter_mut().for_each(|w| *w *= spec.scale);
    RouteResult {
        slots: k,
        ids,
        weights,
        shared_weights,
    }
}

#[cfg(test)]
mod tests;
