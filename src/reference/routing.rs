//! Routing: logits to experts and weights.

use super::math::{
    at_or, linear, log_sigmoid, rms_norm, rows_of, sigmoid, softcap, softmax, softplus,
};
use super::router::{
    Capacity, Fill, GroupScore, Groups, KeyLayout, Method, NullKind, Renorm, RouterSpec, Score,
    SelectOn, WeightsFrom,
};

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

/// The indices of the k best values, the best first.
///
/// Larger is better; −0 equals +0; equal values go to the lower index; NaN is worse than −inf; and an
/// index that is not allowed is worse than any that is, whatever its value (an empty `allowed` allows
/// all). The k indices are always distinct: of a row of NaN they are 0..k.
///
/// ```
/// use moe_kernels::reference::top_k;
/// assert_eq!(top_k(&[1.0, 3.0, 3.0, f64::NAN, f64::NEG_INFINITY], &[], 4), [1, 2, 0, 4]);
/// assert_eq!(top_k(&[-0.0, 0.0, f64::NAN], &[false, false, true], 2), [2, 0]);
/// ```
pub fn top_k(values: &[f64], allowed: &[bool], k: usize) -> Vec<usize> {
    assert!(k <= values.len(), "top_k: k = {k} of {}", values.len());
    assert!(
        allowed.is_empty() || allowed.len() == values.len(),
        "top_k: allowed has a wrong length"
    );
    let is_allowed = |i: usize| allowed.is_empty() || allowed[i];
    let beats = |a: usize, b: usize| match (is_allowed(a), is_allowed(b)) {
        (true, true) => values[a] > values[b] || (!values[a].is_nan() && values[b].is_nan()),
        (a_allowed, b_allowed) => a_allowed && !b_allowed,
    };
    let mut taken = vec![false; values.len()];
    let mut chosen = Vec::new();
    while chosen.len() < k {
        let mut rest = (0..values.len()).filter(|i| !taken[*i]);
        let first = rest.next().expect("k <= len");
        let best = rest.fold(first, |best, i| if beats(i, best) { i } else { best });
        taken[best] = true;
        chosen.push(best);
    }
    chosen
}

/// Which candidates lie in the chosen groups. Groups are ranked like experts: see [`top_k`].
pub fn group_mask(groups: &Groups, values: &[f64]) -> Vec<bool> {
    assert!(
        groups.n_group > 0 && values.len().is_multiple_of(groups.n_group),
        "n_group does not divide C"
    );
    assert!(
        (1..=groups.n_group).contains(&groups.topk_group),
        "topk_group is not in 1..=n_group"
    );
    let size = values.len() / groups.n_group;
    let group_scores: Vec<f64> = values
        .chunks_exact(size)
        .map(|members| match groups.score {
            GroupScore::Max => members[top_k(members, &[], 1)[0]],
            GroupScore::Top2Sum => top_k(members, &[], size.min(2))
                .iter()
                .map(|&i| members[i])
                .sum(),
        })
        .collect();
    let kept = top_k(&group_scores, &[], groups.topk_group);
    (0..values.len())
        .map(|i| kept.contains(&(i / size)))
        .collect()
}

/// The K candidates of one token by selection value: (score or logit) + correction bias, limited to
/// groups. Both slices have C elements.
pub fn select(spec: &RouterSpec, logits: &[f64], scores: &[f64]) -> Vec<usize> {
    let base = match spec.select_on {
        SelectOn::Score => scores,
        SelectOn::Logit => logits,
    };
    let mut values: Vec<f64> = base
        .iter()
        .enumerate()
        .map(|(i, v)| v + at_or(&spec.correction_bias, i, 0.0))
        .collect();
    let mut allowed = Vec::new();
    if let Some(groups) = &spec.groups {
        let mask = group_mask(groups, &values);
        match groups.fill {
            Fill::NegInf => allowed = mask,
            Fill::Zero => {
                for (value, in_group) in values.iter_mut().zip(mask) {
                    if !in_group && !value.is_nan() {
                        *value = 0.0;
                    }
                }
            }
        }
    }
    top_k(&values, &allowed, spec.top_k)
}

/// Sparsemixer at inference (Liu et al. 2024, as in Phi-3.5-MoE): (ids, weights) of one token.
///
/// K times: take the best logit m that is left; its weight is its softmax over the logits that are left
/// and close to it, that is, not `(m − z) / max(|z|, m) > 2·jitter_eps`.
pub fn sparsemixer(logits: &[f64], k: usize, jitter_eps: f64) -> (Vec<usize>, Vec<f64>) {
    let ids = top_k(logits, &[], k);
    let mut left = logits.to_vec();
    let mut weights = Vec::new();
    for &id in &ids {
        let m = logits[id];
        let close: Vec<f64> = left
            .iter()
            .zip(logits)
            .map(|(z, logit)| {
                if (m - logit) / logit.abs().max(m) > 2.0 * jitter_eps {
                    f64::NEG_INFINITY
                } else {
                    *z
                }
            })
            .collect();
        weights.push(softmax(&close)[id]);
        left[id] = f64::NEG_INFINITY;
    }
    (ids, weights)
}

/// Product keys (Lample et al. 2019): the n² logits of each token's experts from its 2n key logits;
/// expert `i·n + j` has `first[i] + second[j]`. `[T, 2n]` → `[T, n²]`.
pub fn product_keys(logits: &[f64], n: usize, layout: KeyLayout) -> Vec<f64> {
    let tokens = rows_of(logits, 2 * n, "product keys");
    let mut pairs = Vec::new();
    for t in 0..tokens {
        let (first, second) = match layout {
            KeyLayout::PerToken => (t * 2 * n, t * 2 * n + n),
            KeyLayout::BatchHalves => (t * n, (tokens + t) * n),
        };
        for i in 0..n {
            pairs.extend((0..n).map(|j| logits[first + i] + logits[second + j]));
        }
    }
    pairs
}

/// Expert choice (Zhou et al. 2022): each expert takes its `capacity` best tokens (ties to the lower
/// token), from values `[T,C]`. A token's takers, in falling order of value and then index, fill its first
/// slots; the other slots are −1. → ids `[T,C]`.
pub fn expert_choice(values: &[f64], candidates: usize, capacity: usize) -> Vec<i32> {
    let tokens = rows_of(values, candidates, "expert choice");
    let mut taken = vec![false; values.len()];
    for e in 0..candidates {
        let column: Vec<f64> = (0..tokens).map(|t| values[t * candidates + e]).collect();
        for t in top_k(&column, &[], capacity.min(tokens)) {
            taken[t * candidates + e] = true;
        }
    }
    let mut ids = Vec::new();
    for (row, taken) in values
        .chunks_exact(candidates)
        .zip(taken.chunks_exact(candidates))
    {
        let takers = taken.iter().filter(|t| **t).count();
        let best_first = top_k(row, taken, takers);
        ids.extend((0..candidates).map(|slot| best_first.get(slot).map_or(-1, |&e| e as i32)));
    }
    ids
}

/// The weights of one token's choices before renormalisation, and those of the jointly scored shared
/// experts. `logits` and `scores` have all R rows (n² for product keys); an id of −1 gets 0.
pub fn raw_weights(
    spec: &RouterSpec,
    logits: &[f64],
    scores: &[f64],
    ids: &[i32],
) -> (Vec<f64>, Vec<f64>) {
    let chosen: Vec<usize> = ids
        .iter()
        .filter(|id| **id >= 0)
        .map(|id| *id as usize)
        .collect();
    let (of_chosen, of_shared) = match spec.weights {
        WeightsFrom::Score => (chosen.iter().map(|&e| scores[e]).collect(), Vec::new()),
        WeightsFrom::SoftmaxSelectedLogits => (
            softmax(&chosen.iter().map(|&e| logits[e]).collect::<Vec<_>>()),
            Vec::new(),
        ),
        WeightsFrom::JointWithShared => {
            // sigmoid / Σ sigmoid, through logarithms: far below zero, sigmoids vanish but ratios do not.
            let routed = chosen.iter().map(|&e| logits[e]);
            let joint = routed.chain(logits[spec.candidates()..].iter().copied());
            let mut weights = softmax(&joint.map(log_sigmoid).collect::<Vec<_>>());
            let shared = weights.split_off(chosen.len());
            (weights, shared)
        }
    };
    let mut next = of_chosen.into_iter();
    let weights = ids
        .iter()
        .map(|id| if *id < 0 { 0.0 } else { next.next().unwrap() })
        .collect();
    (weights, of_shared)
}

/// Renormalises the K weights of one token.
pub fn renormalize(kind: Renorm, weights: &mut [f64]) {
    let sum: f64 = weights.iter().sum();
    let divisor = match kind {
        Renorm::None => return,
        Renorm::Sum => sum,
        Renorm::SumPlusEps(eps) => sum + eps,
        // Not `sum.max(eps)`, which would turn a NaN into eps.
        Renorm::SumClampMin(eps) => {
            if sum < eps {
                eps
            } else {
                sum
            }
        }
        Renorm::PNorm(p) => weights
            .iter()
            .map(|w| w.abs().powf(p))
            .sum::<f64>()
            .powf(1.0 / p),
    };
    for w in weights {
        *w /= divisor;
    }
}

/// Drops what exceeds the capacity of an expert: such ids become −1.
///
/// Within each scope, first choices are served before second choices, and so on; among equals, tokens in
/// order, or by falling `importance[T]` (ties to the earlier token). Null experts are never full.
///
/// ```
/// use moe_kernels::reference::{Capacity, apply_capacity};
/// let one = Capacity { per_expert: 1, scope_tokens: None, batch_prioritized: false, normalize_before_drop: false };
/// let mut ids = [0, 1, 0, 2, 1, 0]; // three tokens, two choices each
/// apply_capacity(&one, &mut ids, 2, 3, &[]);
/// assert_eq!(ids, [0, -1, -1, 2, 1, -1]);
/// ```
pub fn apply_capacity(
    capacity: &Capacity,
    ids: &mut [i32],
    k: usize,
    num_experts: usize,
    importance: &[f64],
) {
    let tokens = ids.len() / k;
    let scope = capacity.scope_tokens.unwrap_or(tokens).max(1);
    for start in (0..tokens).step_by(scope) {
        let end = (start + scope).min(tokens);
        let order: Vec<usize> = if capacity.batch_prioritized {
            top_k(&importance[start..end], &[], end - start)
                .iter()
                .map(|i| start + i)
                .collect()
        } else {
            (start..end).collect()
        };
        let mut accepted = vec![0; num_experts];
        for slot in 0..k {
            for &t in &order {
                let id = &mut ids[t * k + slot];
                if *id < 0 || *id as usize >= num_experts {
                    continue;
                }
                if accepted[*id as usize] < capacity.per_expert {
                    accepted[*id as usize] += 1;
                } else {
                    *id = -1;
                }
            }
        }
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
mod tests {
    use super::super::router::InputNorm;
    use super::super::{assert_close, noise};
    use super::*;

    const NAN: f64 = f64::NAN;
    const INF: f64 = f64::INFINITY;

    /// A router whose scores are its logits, so that examples can be read.
    fn plain(e: usize, k: usize) -> RouterSpec {
        RouterSpec {
            score: Score::Identity,
            ..RouterSpec::top_k(e, k)
        }
    }

    #[test]
    fn top_k_orders() {
        assert_eq!(top_k(&[1.0, 2.0, 2.0, 3.0], &[], 4), [3, 1, 2, 0]);
        assert_eq!(top_k(&[-0.0, 0.0], &[], 2), [0, 1]);
        assert_eq!(top_k(&[NAN, -INF, INF, NAN], &[], 4), [2, 1, 0, 3]);
        assert_eq!(top_k(&[NAN; 4], &[], 3), [0, 1, 2]);
        assert_eq!(
            top_k(&[9.0, NAN, 8.0, -INF], &[false, true, false, true], 4),
            [3, 1, 0, 2]
        );
    }

    #[test]
    fn mixtral_by_hand() {
        let logits = [1f64.ln(), 2f64.ln(), 5f64.ln()]; // probabilities 1/8, 2/8, 5/8
        let spec = RouterSpec {
            renorm: Renorm::Sum,
            ..RouterSpec::top_k(3, 2)
        };
        let r = route(&spec, &logits);
        assert_eq!(r.ids, [2, 1]);
        assert_close(&r.weights, &[5.0 / 7.0, 2.0 / 7.0], 1e-15);
        // The softmax over the selected logits is the same thing.
        let gpt_oss = RouterSpec {
            select_on: SelectOn::Logit,
            weights: WeightsFrom::SoftmaxSelectedLogits,
            ..RouterSpec::top_k(3, 2)
        };
        assert_close(&route(&gpt_oss, &logits).weights, &r.weights, 1e-15);
    }

    #[test]
    fn every_renormalisation() {
        let with = |kind| {
            let mut w = [3.0, 1.0];
            renormalize(kind, &mut w);
            w
        };
        assert_eq!(with(Renorm::None), [3.0, 1.0]);
        assert_eq!(with(Renorm::Sum), [0.75, 0.25]);
        assert_eq!(with(Renorm::SumPlusEps(4.0)), [0.375, 0.125]);
        assert_eq!(with(Renorm::SumClampMin(1.0)), [0.75, 0.25]);
        assert_eq!(with(Renorm::SumClampMin(8.0)), [0.375, 0.125]);
        assert_eq!(with(Renorm::PNorm(1.0)), [0.75, 0.25]);
        let mut nan = [NAN, 1.0];
        renormalize(Renorm::SumClampMin(1.0), &mut nan);
        assert!(nan.iter().all(|w| w.is_nan()));
        assert_close(
            &with(Renorm::PNorm(2.0)),
            &[3.0 / 10f64.sqrt(), 1.0 / 10f64.sqrt()],
            1e-15,
        );
    }

    #[test]
    fn groups_by_hand() {
        let logits = [0.5, 0.1, 0.4, 0.3];
        let groups = |score, fill| {
            Some(Groups {
                n_group: 2,
                topk_group: 1,
                score,
                fill,
            })
        };
        // Sums 0.6 and 0.7: the second group wins, though the best expert is in the first.
        let mut spec = plain(4, 2);
        spec.groups = groups(GroupScore::Top2Sum, Fill::NegInf);
        assert_eq!(route(&spec, &logits).ids, [2, 3]);
        spec.groups = groups(GroupScore::Max, Fill::NegInf);
        assert_eq!(route(&spec, &logits).ids, [0, 1]);
        // More choices than the kept group holds: the others follow, in index order.
        spec.top_k = 3;
        assert_eq!(route(&spec, &logits).ids, [0, 1, 2]);
        // Zero fill: a masked expert beats a kept one whose value is negative; its weight is its score.
        let zero = RouterSpec {
            groups: groups(GroupScore::Max, Fill::Zero),
            ..plain(4, 2)
        };
        let r = route(&zero, &[0.5, -0.1, 0.4, 0.3]);
        assert_eq!((r.ids, r.weights), (vec![0, 2], vec![0.5, 0.4]));
        // Equal groups: the lower one. NaN: masked members stay below a kept NaN, or NaN themselves.
        assert_eq!(
            route(
                &RouterSpec {
                    top_k: 2,
                    ..spec.clone()
                },
                &[1.0, 0.0, 1.0, 0.0]
            )
            .ids,
            [0, 1]
        );
        assert_eq!(route(&spec, &[0.5, NAN, 0.4, 0.3]).ids, [0, 1, 2]);
        let zero3 = RouterSpec { top_k: 4, ..zero };
        assert_eq!(route(&zero3, &[0.5, -INF, NAN, 0.3]).ids, [0, 3, 1, 2]);
    }

    #[test]
    fn the_bias_chooses_but_does_not_weigh() {
        let spec = RouterSpec {
            correction_bias: vec![0.0, 0.0, 1.0],
            scale: 10.0,
            ..plain(3, 2)
        };
        let r = route(&spec, &[0.3, 0.2, 0.1]);
        assert_eq!(r.ids, [2, 0]);
        assert_close(&r.weights, &[1.0, 3.0], 1e-15);
        // On the logit, as Kolibri does: 0 + 0.2 < 0.1 + 0.2, weights are sigmoids.
        let spec = RouterSpec {
            score: Score::Sigmoid,
            select_on: SelectOn::Logit,
            correction_bias: vec![0.2, 0.2],
            ..plain(2, 2)
        };
        let r = route(&spec, &[0.0, 0.1]);
        assert_eq!(r.ids, [1, 0]);
        assert_close(&r.weights, &[sigmoid(0.1), 0.5], 1e-15);
    }

    #[test]
    fn null_experts() {
        let mut spec = RouterSpec {
            num_null: 1,
            per_expert_scale: vec![2.0, 4.0],
            ..plain(2, 2)
        };
        let logits = [0.1, 0.2, 0.3];
        let r = route(&spec, &logits);
        assert_eq!((r.ids, r.weights), (vec![2, 1], vec![0.3, 0.8]));
        spec.null_kind = NullKind::Zero;
        assert_eq!(route(&spec, &logits).weights, [0.0, 0.8]);
    }

    #[test]
    fn sparsemixer_by_hand() {
        // The best is 10; within 2·0.1 of it, relatively: 9 (0.1), not 7 (0.3).
        let (ids, w) = sparsemixer(&[7.0, 10.0, 9.0], 2, 0.1);
        assert_eq!(ids, [1, 2]);
        assert_close(&w[..1], &softmax(&[10.0, 9.0])[..1], 1e-15);
        // The second is 9; 7 is (9 − 7)/9 = 0.22 away, so 9 is alone.
        assert_eq!(w[1], 1.0);
        // All zero: 0/0 masks nothing.
        let (ids, w) = sparsemixer(&[0.0; 4], 2, 0.1);
        assert_eq!(ids, [0, 1]);
        assert_close(&w, &[0.25, 1.0 / 3.0], 1e-15);
        let (ids, w) = sparsemixer(&[NAN; 3], 2, 0.1);
        assert_eq!(ids, [0, 1]);
        assert!(w.iter().all(|w| w.is_nan()));
    }

    #[test]
    fn product_keys_by_hand() {
        let logits = [1.0, 2.0, 10.0, 20.0, 3.0, 4.0, 30.0, 40.0]; // two tokens, n = 2
        let per_token = [11.0, 21.0, 12.0, 22.0, 33.0, 43.0, 34.0, 44.0];
        assert_eq!(product_keys(&logits, 2, KeyLayout::PerToken), per_token);
        // [2,T,n]: first keys 1 2 | 10 20, second keys 3 4 | 30 40.
        let halves = [4.0, 5.0, 5.0, 6.0, 40.0, 50.0, 50.0, 60.0];
        assert_eq!(product_keys(&logits, 2, KeyLayout::BatchHalves), halves);
        let spec = RouterSpec {
            select_on: SelectOn::Logit,
            weights: WeightsFrom::SoftmaxSelectedLogits,
            method: Method::ProductKey {
                layout: KeyLayout::PerToken,
            },
            ..RouterSpec::top_k(4, 2)
        };
        let r = route(&spec, &logits);
        assert_eq!(r.ids, [3, 1, 3, 1]);
        assert_close(&r.weights[..2], &softmax(&[22.0, 21.0]), 1e-15);
    }

    #[test]
    fn expert_choice_by_hand() {
        // Three tokens, two experts; each takes two tokens. The tie of expert 1 goes to token 0.
        let values = [0.9, 0.5, 0.1, 0.8, 0.2, 0.5];
        assert_eq!(expert_choice(&values, 2, 2), [0, 1, 1, -1, 0, -1]);
        let spec = RouterSpec {
            method: Method::ExpertChoice { capacity: 2 },
            ..plain(2, 1)
        };
        let r = route(&spec, &values);
        assert_eq!(
            (r.slots, r.weights),
            (2, vec![0.9, 0.5, 0.8, 0.0, 0.2, 0.0])
        );
    }

    #[test]
    fn dense_and_given() {
        let logits = [1f64.ln(), 2f64.ln(), 5f64.ln()];
        let dense = RouterSpec {
            method: Method::Dense,
            ..RouterSpec::top_k(3, 1)
        };
        let r = route(&dense, &logits);
        assert_eq!(r.ids, [0, 1, 2]);
        assert_close(&r.weights, &[0.125, 0.25, 0.625], 1e-15);
        let given = |ids: &[i32], weights: &[f64]| RouterSpec {
            method: Method::Given {
                ids: ids.to_vec(),
                weights: weights.to_vec(),
            },
            renorm: Renorm::Sum,
            ..RouterSpec::top_k(3, 2)
        };
        let r = route(&given(&[0, -1], &[]), &logits);
        assert_eq!((r.ids, r.weights), (vec![0, -1], vec![1.0, 0.0]));
        let r = route(&given(&[0, 2], &[7.0, 8.0]), &[]);
        assert_eq!((r.ids, r.weights), (vec![0, 2], vec![7.0, 8.0]));
    }

    #[test]
    fn joint_with_shared_by_hand() {
        let spec = RouterSpec {
            score: Score::Sigmoid,
            num_joint_shared: 1,
            weights: WeightsFrom::JointWithShared,
            scale: 2.0,
            ..RouterSpec::top_k(2, 1)
        };
        let (a, b) = (sigmoid(1.0), sigmoid(0.5));
        let r = route(&spec, &[1.0, -1.0, 0.5]);
        assert_eq!(r.ids, [0]);
        assert_close(&r.weights, &[2.0 * a / (a + b)], 1e-15);
        assert_close(&r.shared_weights, &[2.0 * b / (a + b)], 1e-15);
        // Sigmoids that vanish still have a ratio.
        assert_close(
            &route(&spec, &[-2000.0, -2001.0, -2000.0]).weights,
            &[1.0],
            1e-12,
        );
    }

    #[test]
    fn capacity_by_hand() {
        let capacity = |scope_tokens, batch_prioritized| Capacity {
            per_expert: 1,
            scope_tokens,
            batch_prioritized,
            normalize_before_drop: false,
        };
        let dropped = |capacity: &Capacity, importance: &[f64]| {
            let mut ids = [0, 1, 0, 1, 0, 1];
            apply_capacity(capacity, &mut ids, 2, 2, importance);
            ids
        };
        assert_eq!(dropped(&capacity(None, false), &[]), [0, 1, -1, -1, -1, -1]);
        assert_eq!(
            dropped(&capacity(Some(2), false), &[]),
            [0, 1, -1, -1, 0, 1]
        );
        assert_eq!(
            dropped(&capacity(None, true), &[0.1, 0.3, 0.3]),
            [-1, -1, 0, 1, -1, -1]
        );
        // A second choice waits for all first choices.
        let mut ids = [0, 1, 1, 0];
        apply_capacity(&capacity(None, false), &mut ids, 2, 2, &[]);
        assert_eq!(ids, [0, -1, 1, -1]);
        // Null experts are never full.
        let mut ids = [2, 0, 2, 0];
        apply_capacity(&capacity(None, false), &mut ids, 2, 2, &[]);
        assert_eq!(ids, [2, 0, 2, -1]);
    }

    #[test]
    fn renormalising_before_or_after_dropping() {
        let mut spec = RouterSpec {
            renorm: Renorm::SumClampMin(1e-12),
            capacity: Some(Capacity {
                per_expert: 1,
                scope_tokens: None,
                batch_prioritized: false,
                normalize_before_drop: false,
            }),
            ..plain(3, 2)
        };
        let logits = [0.6, 0.2, 0.0, 0.6, 0.0, 0.2, 0.6, 0.2, 0.0];
        let r = route(&spec, &logits);
        assert_eq!(r.ids, [0, 1, -1, 2, -1, -1]);
        assert_close(&r.weights, &[0.75, 0.25, 0.0, 1.0, 0.0, 0.0], 1e-15);
        spec.capacity.as_mut().unwrap().normalize_before_drop = true;
        assert_close(
            &route(&spec, &logits).weights,
            &[0.75, 0.25, 0.0, 0.25, 0.0, 0.0],
            1e-15,
        );
    }

    #[test]
    fn logits_by_hand() {
        let spec = RouterSpec {
            input_norm: Some(InputNorm { eps: 0.0, mul: 2.0 }),
            logit_mul: 3.0,
            logit_softcap: 5.0,
            ..RouterSpec::top_k(1, 1)
        };
        // rms of [3, 4] is √12.5; scaled by [1, 2] and 2, summed, + 1, · 3, capped.
        let z = (3.0 / 12.5f64.sqrt() * 2.0 + 8.0 / 12.5f64.sqrt() * 2.0 + 1.0) * 3.0;
        let found = router_logits(&spec, &[3.0, 4.0], 2, &[1.0, 1.0], &[1.0], &[1.0, 2.0]);
        assert_close(&found, &[5.0 * (z / 5.0).tanh()], 1e-15);
        let noisy = noisy_logits(&[1.0, 1.0], &[0.0, -1000.0], &[-1.0, 5.0]);
        assert_close(&noisy, &[1.0 - 2f64.ln(), 1.0], 1e-15);
    }

    #[test]
    fn one_nan_token_harms_no_other() {
        let spec = RouterSpec {
            renorm: Renorm::Sum,
            ..RouterSpec::top_k(4, 2)
        };
        let mut logits = noise(1, 12);
        let clean = route(&spec, &logits);
        logits[5] = NAN;
        let r = route(&spec, &logits);
        assert_eq!(r.ids[2..4], [0, 1]);
        assert!(r.weights[2..4].iter().all(|w| w.is_nan()));
        assert_eq!(
            (&r.ids[..2], &r.ids[4..]),
            (&clean.ids[..2], &clean.ids[4..])
        );
        assert_eq!(
            (&r.weights[..2], &r.weights[4..]),
            (&clean.weights[..2], &clean.weights[4..])
        );
    }

    #[test]
    fn ids_are_distinct_and_in_range_whatever_the_logits() {
        let bad = [NAN, INF, -INF, 0.0, -0.0, 1.0, 1.0, -1.0, 1e308, 5e-324];
        for seed in 0..400 {
            let r = noise(seed + 1, 40);
            let pick = |i: usize, n: usize| ((r[i] + 1.0) / 2.0 * n as f64) as usize;
            let fill = [Fill::NegInf, Fill::Zero][pick(1, 2)];
            let score = [GroupScore::Max, GroupScore::Top2Sum][pick(2, 2)];
            let groups = Groups {
                n_group: 4,
                topk_group: 1 + pick(3, 4),
                score,
                fill,
            };
            let sparse = Method::Sparsemixer { jitter_eps: 0.1 };
            let spec = RouterSpec {
                score: [
                    Score::Softmax,
                    Score::Sigmoid,
                    Score::SqrtSoftplus,
                    Score::Identity,
                ][pick(4, 4)],
                select_on: [SelectOn::Score, SelectOn::Logit][pick(5, 2)],
                groups: (pick(6, 2) == 0).then_some(groups),
                method: if pick(7, 4) == 0 {
                    sparse
                } else {
                    Method::TopK
                },
                renorm: [Renorm::Sum, Renorm::None, Renorm::PNorm(2.0)][pick(8, 3)],
                ..RouterSpec::top_k(8, 1 + pick(9, 8))
            };
            let logits: Vec<f64> = (0..24).map(|i| bad[pick(10 + i, bad.len())]).collect();
            let result = route(&spec, &logits);
            for ids in result.ids.chunks(spec.top_k) {
                assert!(ids.iter().all(|id| (0..8).contains(id)));
                assert!(
                    (0..ids.len()).all(|i| !ids[..i].contains(&ids[i])),
                    "{ids:?}"
                );
            }
        }
    }

    #[test]
    fn no_tokens() {
        let r = route(&RouterSpec::top_k(4, 2), &[]);
        assert!(r.ids.is_empty() && r.weights.is_empty());
    }
}
