//! Losses with their gradients, and the load statistics that they exist for.

use super::math::{dot, logsumexp, rows_of, softmax};
use super::routing::top_k;

/// The value of a loss and its gradient with respect to the logits, in their shape.
#[derive(Clone, Debug, PartialEq)]
pub struct Loss {
    /// The loss.
    pub value: f64,
    /// `∂value / ∂logits`.
    pub grad_logits: Vec<f64>,
}

/// Load balancing as HF transformers computes it (after Fedus et al. 2021, eq. 4 to 6):
/// `E · Σ_e f_e · P_e`, not divided by k, so perfect balance gives k.
///
/// logits `[L,T,E]` of L layers; f_e: choices of expert e (top-k of the softmax) per token; P_e: mean
/// probability of e; both over the L·T tokens, or over those that `mask[T]` (1 or 0; empty = all) counts.
/// f is constant for the gradient.
pub fn load_balancing_loss(logits: &[f64], num_experts: usize, k: usize, mask: &[f64]) -> Loss {
    let rows = rows_of(logits, num_experts, "load_balancing_loss: logits");
    assert!(
        mask.is_empty() || rows.is_multiple_of(mask.len()),
        "mask is not [T]"
    );
    let counted = |row: usize| {
        if mask.is_empty() {
            1.0
        } else {
            mask[row % mask.len()]
        }
    };
    let total: f64 = (0..rows).map(counted).sum();
    let e = num_experts as f64;
    let probabilities: Vec<Vec<f64>> = logits.chunks_exact(num_experts).map(softmax).collect();
    let mut f = vec![0.0; num_experts];
    let mut p = vec![0.0; num_experts];
    for (row, prob) in probabilities.iter().enumerate() {
        for id in top_k(prob, &[], k) {
            f[id] += counted(row) / total;
        }
        for i in 0..num_experts {
            p[i] += counted(row) * prob[i] / total;
        }
    }
    // ∂P_e/∂z_j = p_e (δ_ej − p_j) / total for each counted row.
    let mut grad_logits = Vec::new();
    for (row, prob) in probabilities.iter().enumerate() {
        let mean_f = dot(&f, prob);
        grad_logits
            .extend((0..num_experts).map(|j| e * counted(row) / total * prob[j] * (f[j] - mean_f)));
    }
    Loss {
        value: e * dot(&f, &p),
        grad_logits,
    }
}

/// Load balancing as in Switch Transformers (Fedus et al. 2021, eq. 4 to 6): `E · Σ_e f_e · P_e` with f the
/// fraction of tokens whose best expert is e; perfect balance gives 1. It is computed within each group of
/// `group_tokens` tokens (a sequence; T for the whole batch) and averaged over the groups.
pub fn switch_load_balancing_loss(logits: &[f64], num_experts: usize, group_tokens: usize) -> Loss {
    let groups = rows_of(
        logits,
        num_experts * group_tokens,
        "switch_load_balancing_loss: logits",
    ) as f64;
    let mut sum = Loss {
        value: 0.0,
        grad_logits: Vec::new(),
    };
    for group in logits.chunks_exact(num_experts * group_tokens) {
        let loss = load_balancing_loss(group, num_experts, 1, &[]);
        sum.value += loss.value / groups;
        sum.grad_logits
            .extend(loss.grad_logits.iter().map(|g| g / groups));
    }
    sum
}

/// Router z-loss (Zoph et al. 2022, ST-MoE, eq. 5): the mean over all rows of `logsumexp(logits)²`.
pub fn router_z_loss(logits: &[f64], num_experts: usize) -> Loss {
    let rows = rows_of(logits, num_experts, "router_z_loss: logits") as f64;
    let mut loss = Loss {
        value: 0.0,
        grad_logits: Vec::new(),
    };
    for row in logits.chunks_exact(num_experts) {
        let lse = logsumexp(row);
        loss.value += lse * lse / rows;
        loss.grad_logits
            .extend(softmax(row).iter().map(|p| 2.0 * lse * p / rows));
    }
    loss
}

/// Balancing without a loss (Wang et al. 2024; DeepSeek-V3): each expert's correction bias moves by
/// `rate · sign(mean load − its load)`; a load equal to the mean does not move it.
///
/// ```
/// use moe_kernels::reference::update_bias;
/// assert_eq!(update_bias(&[0.0, 0.5, 0.0], &[4, 0, 2], 0.25), [-0.25, 0.75, 0.0]);
/// ```
pub fn update_bias(bias: &[f64], load: &[usize], rate: f64) -> Vec<f64> {
    assert_eq!(bias.len(), load.len(), "bias and load differ in length");
    let (total, e) = (load.iter().sum::<usize>(), load.len());
    let step = |n: usize| match (n * e).cmp(&total) {
        std::cmp::Ordering::Less => rate,
        std::cmp::Ordering::Equal => 0.0,
        std::cmp::Ordering::Greater => -rate,
    };
    bias.iter().zip(load).map(|(b, n)| b + step(*n)).collect()
}

/// How evenly a batch was spread over the experts.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadStats {
    /// `[E]`: pairs of each expert.
    pub counts: Vec<usize>,
    /// `[E]`: counts / their sum; zeros if there are none.
    pub fraction: Vec<f64>,
    /// `−Σ fraction · ln fraction`, in nats: ln E when balanced, 0 when one expert takes all.
    pub entropy: f64,
    /// Standard deviation of the counts (dividing by E) / their mean; 0 if there are none.
    pub coefficient_of_variation: f64,
    /// Pairs whose id is −1.
    pub dropped: usize,
    /// Pairs of null experts.
    pub null: usize,
}

/// The load of E experts under ids of any shape.
pub fn load_stats(ids: &[i32], num_experts: usize) -> LoadStats {
    let mut counts = vec![0usize; num_experts];
    let (mut dropped, mut null) = (0, 0);
    for &id in ids {
        match usize::try_from(id) {
            Err(_) => dropped += 1,
            Ok(e) if e < num_experts => counts[e] += 1,
            Ok(_) => null += 1,
        }
    }
    let total = counts.iter().sum::<usize>() as f64;
    let fraction: Vec<f64> = counts
        .iter()
        .map(|n| if total > 0.0 { *n as f64 / total } else { 0.0 })
        .collect();
    let entropy = fraction
        .iter()
        .filter(|f| **f > 0.0)
        .map(|f| -f * f.ln())
        .sum();
    let mean = total / num_experts as f64;
    let variance = counts
        .iter()
        .map(|n| (*n as f64 - mean).powi(2))
        .sum::<f64>()
        / num_experts as f64;
    let coefficient_of_variation = if total > 0.0 {
        variance.sqrt() / mean
    } else {
        0.0
    };
    LoadStats {
        counts,
        fraction,
        entropy,
        coefficient_of_variation,
        dropped,
        null,
    }
}

/// The warning sign of collapse: the experts that got nothing in any batch of a window of counts.
pub fn idle_experts(window: &[Vec<usize>]) -> Vec<usize> {
    let experts = window.first().map_or(0, Vec::len);
    (0..experts)
        .filter(|&e| window.iter().all(|counts| counts[e] == 0))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::{assert_close, noise};
    use super::*;

    /// Compares a gradient with central differences of the value.
    fn check_gradient(loss: impl Fn(&[f64]) -> Loss, logits: &[f64]) {
        let h = 1e-5;
        let gradient = loss(logits).grad_logits;
        assert_eq!(gradient.len(), logits.len());
        for i in 0..logits.len() {
            let at = |step: f64| {
                let mut moved = logits.to_vec();
                moved[i] += step;
                loss(&moved).value
            };
            let slope = (at(h) - at(-h)) / (2.0 * h);
            assert!(
                (slope - gradient[i]).abs() < 1e-8,
                "[{i}]: {} is not {slope}",
                gradient[i]
            );
        }
    }

    #[test]
    fn gradients_match_finite_differences() {
        let logits: Vec<f64> = noise(3, 2 * 6 * 4).iter().map(|z| 3.0 * z).collect();
        let mask = [1.0, 1.0, 0.0, 1.0, 0.0, 1.0];
        check_gradient(|z| load_balancing_loss(z, 4, 2, &[]), &logits);
        check_gradient(|z| load_balancing_loss(z, 4, 2, &mask), &logits);
        check_gradient(|z| switch_load_balancing_loss(z, 4, 6), &logits);
        check_gradient(|z| router_z_loss(z, 4), &logits);
    }

    #[test]
    fn load_balancing_by_hand() {
        // One expert takes all with certainty: f = P = 1, so E · 1. Balance: k.
        assert_close(
            &[load_balancing_loss(&[1e3, 0.0, 1e3, 0.0], 2, 1, &[]).value],
            &[2.0],
            1e-15,
        );
        assert_close(
            &[load_balancing_loss(&[9.0, 0.0, 0.0, 9.0], 2, 1, &[]).value],
            &[1.0],
            1e-15,
        );
        assert_close(
            &[load_balancing_loss(&noise(5, 30), 3, 3, &[]).value],
            &[3.0],
            1e-15,
        );
        // p = [3/4, 1/4], twice to expert 0: 2 · (1 · 3/4).
        let z = [3f64.ln(), 0.0, 3f64.ln(), 0.0];
        assert_close(&[load_balancing_loss(&z, 2, 1, &[]).value], &[1.5], 1e-15);
        // A masked token counts for nothing, and gets no gradient.
        let masked = load_balancing_loss(&[3f64.ln(), 0.0, 0.0, 50.0], 2, 1, &[1.0, 0.0]);
        assert_close(&[masked.value], &[1.5], 1e-15);
        assert_eq!(masked.grad_logits[2..], [0.0, 0.0]);
    }

    #[test]
    fn switch_form_is_the_mean_over_groups() {
        let logits = noise(7, 4 * 3);
        let half = |z| load_balancing_loss(z, 3, 1, &[]).value;
        let mean = (half(&logits[..6]) + half(&logits[6..])) / 2.0;
        assert_close(
            &[switch_load_balancing_loss(&logits, 3, 2).value],
            &[mean],
            1e-15,
        );
    }

    #[test]
    fn z_loss_by_hand() {
        let z = [0.0, 0.0, 3f64.ln(), 0.0]; // logsumexp: ln 2, ln 4
        let expected = (2f64.ln().powi(2) + 4f64.ln().powi(2)) / 2.0;
        assert_close(&[router_z_loss(&z, 2).value], &[expected], 1e-15);
    }

    #[test]
    fn load_by_hand() {
        let s = load_stats(&[0, 2, 0, -1, 4, 0], 4);
        assert_eq!((s.counts, s.dropped, s.null), (vec![3, 0, 1, 0], 1, 1));
        assert_eq!(s.fraction, [0.75, 0.0, 0.25, 0.0]);
        assert_close(
            &[s.entropy],
            &[0.75 * (4f64 / 3.0).ln() + 0.25 * 4f64.ln()],
            1e-15,
        );
        // Mean 1; deviations 2, −1, 0, −1.
        assert_close(&[s.coefficient_of_variation], &[1.5f64.sqrt()], 1e-15);
        let none = load_stats(&[-1], 2);
        assert_eq!(
            (none.fraction, none.entropy, none.coefficient_of_variation),
            (vec![0.0; 2], 0.0, 0.0)
        );
        assert_close(&[load_stats(&[0, 1, 2, 3], 4).entropy], &[4f64.ln()], 1e-15);
        assert_eq!(idle_experts(&[vec![1, 0, 0], vec![0, 0, 2]]), [1]);
    }
}
