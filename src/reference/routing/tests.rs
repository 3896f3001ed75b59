//! Routers by hand, and properties of all of them.

use super::super::math::softmax;
use super::super::router::{
    Capacity, Fill, GroupScore, Groups, InputNorm, KeyLayout, Renorm, WeightsFrom,
};
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
