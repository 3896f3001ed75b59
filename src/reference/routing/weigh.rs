//! What a token's choices weigh.

use super::super::math::{log_sigmoid, softmax};
use super::super::router::{Renorm, RouterSpec, WeightsFrom};

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

#[cfg(test)]
mod tests {
    use super::super::super::assert_close;
    use super::*;

    const NAN: f64 = f64::NAN;

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
}
