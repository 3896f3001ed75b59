//! Which experts a token gets.

use super::super::math::{at_or, rows_of, softmax};
use super::super::router::{Fill, GroupScore, Groups, KeyLayout, RouterSpec, SelectOn};

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

#[cfg(test)]
mod tests {
    use super::super::super::assert_close;
    use super::*;

    const NAN: f64 = f64::NAN;
    const INF: f64 = f64::INFINITY;

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
}
