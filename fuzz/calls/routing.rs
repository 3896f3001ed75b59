//! Logits of any bits against the reference: ids exactly, weights within rounding.
//!
//! A router that ranks by logit is compared with `reference::route` from the same logits. One that ranks by score is compared in two steps, since rounding may make two
//! scores equal that f64 tells apart: each f32 score with the reference's, then the choice with the reference's choice from these very scores.

use super::bytes::Bytes;
use moe_kernels::reference::{self, RouterSpec};
use moe_kernels::routing::*;
use moe_kernels::{Cpu, Isa, MatRef};

/// Unit roundoff of f32.
const U: f64 = 1.0 / (1u64 << 24) as f64;
/// Some steps of the smallest subnormal.
const TINY: f64 = 1e-44;

pub fn run(data: &[u8]) {
    let mut d = Bytes(data);
    let isas = Isa::available();
    let cpu = Cpu::with_isa(isas[d.below(isas.len())])
        .expect("available")
        .single_threaded();
    let experts = d.pick(&[1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 128]);
    let k = 1 + d.below(experts.min(20));
    let config = config(&mut d, experts, k);
    let tokens = 1 + d.below(6);
    let logits: Vec<f32> = (0..tokens * experts).map(|_| logit(&mut d)).collect();
    let routed = route(&cpu, &config, &logits);
    let wide: Vec<f64> = logits.iter().map(|&z| z.into()).collect();
    let spec = RouterSpec::from(&config);

    let by_logit = spec.select_on == reference::SelectOn::Logit;
    let scores = route(&cpu, &scores_of(&config), &logits);
    for t in 0..tokens {
        let row = t * experts..(t + 1) * experts;
        let z = &wide[row.clone()];
        let found = &scores.weights()[row];
        check_scores(config.score, z, found);
        let narrow: Vec<f64> = found.iter().map(|&s| s.into()).collect();
        let expected: Vec<i32> = match by_logit {
            true => reference::route(&spec, z).ids,
            false => reference::select(&spec, z, &narrow)
                .iter()
                .map(|&e| e as i32)
                .collect(),
        };
        let slots = t * k..(t + 1) * k;
        assert_eq!(
            routed.ids()[slots.clone()],
            expected,
            "{config:?}\nlogits {z:?}\nscores {narrow:?}"
        );
        check_weights(&spec, z, &narrow, &expected, &routed.weights()[slots]);
    }
}

/// Configs without correction bias, null experts or noise, whose sums would be rounded: those are compared with tolerances in `tests/routing`.
fn config(d: &mut Bytes<'_>, e: usize, k: usize) -> RouterConfig {
    let mut config = match d.below(8) {
        0 => RouterConfig::mixtral(e, k),
        1 => RouterConfig::olmoe(e, k),
        2 => RouterConfig::gpt_oss(e, k),
        3 => RouterConfig::llama4(e, k),
        4 => RouterConfig::cohere2_sigmoid(e, k),
        5 => RouterConfig::minimax_m2(e, k),
        6 => RouterConfig::deepseek_v4(e, k, 1.5),
        _ => RouterConfig::lfm2_moe(e, k, 2.5),
    };
    let by_score = matches!(
        config.selection,
        Selection::TopK {
            rank_by: RankBy::Score,
            ..
        }
    );
    if d.rarely(3) && e.is_multiple_of(4) && by_score {
        config.selection = Selection::TopK {
            rank_by: RankBy::Score,
            groups: Some(GroupLimit {
                n_group: 4,
                topk_group: 1 + d.below(4),
                score: GroupScore::Max,
                fill: MaskedFill::Zero,
            }),
        };
    }
    config
}

/// The same scores, of every expert in its own column.
fn scores_of(config: &RouterConfig) -> RouterConfig {
    RouterConfig {
        selection: Selection::Dense,
        weights: WeightSource::Score,
        renorm: Renorm::None,
        scale: 1.0,
        ..config.clone()
    }
}

fn route(cpu: &Cpu, config: &RouterConfig, logits: &[f32]) -> Routing {
    let router = Router::new(config.clone()).expect("a config that means something");
    let e = config.num_experts;
    let logits = MatRef::new(logits, logits.len() / e, e).expect("a matrix");
    let mut routing = Routing::new();
    router
        .route(cpu, &RouteInput::new(logits), &mut routing)
        .expect("a routing");
    routing
}

/// Ordinary, tied with others, or any bits at all.
fn logit(d: &mut Bytes<'_>) -> f32 {
    match d.u8() {
        0..=79 => f32::from(d.u8() as i8) / 8.0,
        80..=139 => f32::from(d.u8() % 4),
        140..=149 => d.pick(&[
            f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            -0.0,
            88.8,
            -104.0,
            f32::MAX,
            f32::MIN,
        ]),
        _ => f32::from_bits(d.u32()),
    }
}

fn close(found: f64, expected: f64, relative: f64) -> bool {
    (found.is_nan() && expected.is_nan())
        || found == expected
        || (found - expected).abs() <= relative * expected.abs() + TINY
}

fn check_scores(score: Score, z: &[f64], found: &[f32]) {
    let expected = match score {
        Score::Softmax => reference::score(reference::Score::Softmax, z),
        Score::Sigmoid => reference::score(reference::Score::Sigmoid, z),
        _ => reference::score(reference::Score::SqrtSoftplus, z),
    };
    let is_root = score == Score::SqrtSoftplus;
    let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    for (e, (&found, &expected)) in found.iter().zip(&expected).enumerate() {
        // exp of a rounded difference: its error grows with the difference.
        let relative = match score {
            Score::Softmax => U * ((max - z[e]).min(110.0) + 20.0),
            _ => 8.0 * U,
        };
        // The root is taken of a softplus that underflows below z = -103: compare what is under it.
        let under = |score: f64| match is_root {
            true => score * score,
            false => score,
        };
        let (found, expected) = (under(found.into()), under(expected));
        assert!(
            close(found, expected, 2.0 * relative),
            "score {e} of {z:?} is {found:e}, expected {expected:e}"
        );
    }
}

fn check_weights(spec: &RouterSpec, z: &[f64], scores: &[f64], ids: &[i32], found: &[f32]) {
    let (mut weights, _) = reference::raw_weights(spec, z, scores, ids);
    let softmax_of_selected = spec.weights == reference::WeightsFrom::SoftmaxSelectedLogits;
    let max = ids
        .iter()
        .map(|&e| z[e as usize])
        .fold(f64::NEG_INFINITY, f64::max);
    reference::renormalize(spec.renorm, &mut weights);
    for (slot, (&found, &weight)) in found.iter().zip(&weights).enumerate() {
        let weight = weight * spec.scale;
        let distance = match softmax_of_selected {
            true => (max - z[ids[slot] as usize]).min(110.0),
            false => 0.0,
        };
        let relative = U * (distance + ids.len() as f64 + 20.0);
        // Sums and quotients beyond f32's range.
        let beyond = weight.abs() > f64::from(f32::MAX) && found.is_infinite();
        assert!(
            beyond || close(found.into(), weight, relative),
            "weight {slot} of {z:?}, ids {ids:?}, is {found:e}, expected {weight:e}"
        );
    }
}
