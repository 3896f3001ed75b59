//! Ids and weights against `moe_kernels::reference`, for every kind of router, on every ISA.
//!
//! Ids are compared exactly, but for rows in which f64 sees two values so close that rounding may decide: such rows are counted, and there must be few.

use crate::common::cpus;
use crate::setups::{self, Setup};
use moe_kernels::reference::{self as reference, RouteResult, RouterSpec};
use moe_kernels::routing::*;
use moe_kernels::{Cpu, MatMut};
use proptest::prelude::*;

/// Unit roundoff of f32.
const U: f64 = 1.0 / (1u64 << 24) as f64;
/// Half the smallest subnormal f32, a few times: what underflow may cost.
const TINY: f64 = 1e-44;

fn widen(v: &[f32]) -> Vec<f64> {
    v.iter().map(|&x| f64::from(x)).collect()
}

/// The same router in the oracle's words, with the ids that the call gives.
pub fn spec(setup: &Setup) -> RouterSpec {
    let mut spec = RouterSpec::from(&setup.router());
    if let reference::Method::Given { ids, .. } = &mut spec.method {
        ids.clone_from(&setup.given_ids);
    }
    spec
}

/// The logits that enter the score function.
fn effective(setup: &Setup, cpu: &Cpu) -> Vec<f32> {
    let r = setup.config.num_logits();
    let mut z = vec![f32::NAN; setup.tokens * r];
    let out = MatMut::new(&mut z, setup.tokens, r).unwrap();
    setup
        .router()
        .effective_logits_into(cpu, &setup.input(0, setup.tokens), out)
        .unwrap();
    z
}

/// What one token is compared with.
struct Row<'a> {
    setup: &'a Setup,
    spec: &'a RouterSpec,
    /// Logits of all experts, exact but for product keys.
    z: Vec<f64>,
    scores: Vec<f64>,
}

impl Row<'_> {
    fn new<'a>(setup: &'a Setup, spec: &'a RouterSpec, all: &[f64], t: usize) -> Row<'a> {
        let width = all.len() / setup.tokens;
        let z = all[t * width..(t + 1) * width].to_vec();
        let scores = reference::score(spec.score, &z);
        Row {
            setup,
            spec,
            z,
            scores,
        }
    }

    /// Bound on the relative error of an f32 score with its exponent `distance` away from the maximum: exp of a rounded argument, the sum of
    /// n, a division, each function within 2 ulp.
    fn relative_error(&self, distance: f64) -> f64 {
        match self.setup.config.score {
            Score::Softmax => U * (distance + 16.0 + self.z.len() as f64 / 32.0),
            Score::Identity => 0.0,
            _ => 8.0 * U,
        }
    }

    fn maximum(&self) -> f64 {
        self.z.iter().copied().fold(f64::NEG_INFINITY, f64::max)
    }

    /// Selection values and bounds on their errors.
    fn values(&self) -> (Vec<f64>, Vec<f64>) {
        let by_logit = self.spec.select_on == reference::SelectOn::Logit;
        let sums = matches!(self.setup.config.selection, Selection::ProductKeys { .. });
        let max = self.maximum();
        (0..self.spec.candidates())
            .map(|e| {
                let bias = self.spec.correction_bias.get(e).copied().unwrap_or(0.0);
                let (value, error) = match by_logit {
                    true => (self.z[e], if sums { U * self.z[e].abs() } else { 0.0 }),
                    false => (
                        self.scores[e],
                        self.scores[e].abs() * self.relative_error(max - self.z[e]) + TINY,
                    ),
                };
                let value = value + bias;
                (
                    value,
                    error + if bias == 0.0 { 0.0 } else { U * value.abs() },
                )
            })
            .unzip()
    }

    /// Whether f32 must agree with f64 about the order of a and b: far apart, made of the same numbers, or not finite.
    fn sure(&self, (values, errors): (&[f64], &[f64]), a: usize, b: usize) -> bool {
        let bias = |e| self.spec.correction_bias.get(e);
        let apart = (values[a] - values[b]).abs() > errors[a] + errors[b];
        let exact = errors[a] == 0.0 && errors[b] == 0.0;
        let same = self.z[a] == self.z[b] && bias(a) == bias(b);
        let finite = values[a].is_finite() && values[b].is_finite();
        apart || exact || same || !finite
    }

    /// Whether the choice of this token is sure.
    fn is_sure(&self) -> bool {
        match self.setup.config.selection {
            Selection::TopK { groups, .. } => self.top_k_is_sure(groups),
            Selection::ProductKeys { .. } => self.top_k_is_sure(None),
            Selection::SparseMixer { jitter_eps } => self.mixer_is_sure(jitter_eps.into()),
            _ => true,
        }
    }

    fn top_k_is_sure(&self, groups: Option<GroupLimit>) -> bool {
        let (mut values, mut errors) = self.values();
        let mut allowed = Vec::new();
        if let (Some(g), Some(groups)) = (groups, &self.spec.groups) {
            let mask = reference::group_mask(groups, &values);
            let size = values.len() / g.n_group;
            let score = |i: usize| {
                let members = &values[i * size..][..size];
                let best = reference::top_k(
                    members,
                    &[],
                    size.min(if g.score == GroupScore::Max { 1 } else { 2 }),
                );
                let score: f64 = best.iter().map(|&m| members[m]).sum();
                let error = errors[i * size..][..size]
                    .iter()
                    .copied()
                    .fold(0.0, f64::max);
                (
                    score,
                    2.0 * error
                        + if best.len() == 1 {
                            0.0
                        } else {
                            U * score.abs()
                        },
                )
            };
            for kept in (0..g.n_group).filter(|i| mask[i * size]) {
                for other in (0..g.n_group).filter(|i| !mask[i * size]) {
                    let ((a, da), (b, db)) = (score(kept), score(other));
                    if a - b <= da + db {
                        return false;
                    }
                }
            }
            for e in (0..values.len()).filter(|&e| !mask[e]) {
                (values[e], errors[e]) = (0.0, 0.0);
            }
            if g.fill == MaskedFill::NegInf {
                allowed = mask;
            }
        }
        let k = self.setup.config.top_k;
        let order = reference::top_k(&values, &allowed, values.len());
        let pair = (&values[..], &errors[..]);
        let last = order[k - 1];
        let excluded = |e: usize| !allowed.is_empty() && !allowed[e];
        order[..k].windows(2).all(|w| self.sure(pair, w[0], w[1]))
            && order[k..]
                .iter()
                .all(|&e| excluded(e) || self.sure(pair, last, e))
    }

    fn mixer_is_sure(&self, jitter_eps: f64) -> bool {
        let ids = reference::top_k(&self.z, &[], 2);
        ids.iter().all(|&id| {
            self.z.iter().all(|z| {
                let distance = (self.z[id] - z) / z.abs().max(self.z[id]);
                (distance - 2.0 * jitter_eps).abs() > 8.0 * U * (1.0 + distance.abs())
            })
        })
    }

    /// Bound on the relative error of a weight of this token, given the weights before renormalisation.
    fn weight_error(&self, ids: &[i32], raw: &[f64]) -> f64 {
        let k = ids.len() as f64;
        let max = self.maximum();
        let chosen = ids
            .iter()
            .filter(|id| **id >= 0)
            .map(|&id| max - self.z[id as usize]);
        let distance = chosen.fold(0.0, f64::max);
        let sums = matches!(self.setup.config.selection, Selection::ProductKeys { .. });
        // A logit that is itself a rounded sum.
        let rounded = if sums {
            2.0 * self.z.iter().fold(0.0, |m: f64, z| m.max(z.abs()))
        } else {
            0.0
        };
        let from_score = U * (distance + rounded + 32.0 + (self.z.len() as f64 + k) / 32.0);
        // Σ|w| / |Σw|: how much a sum of mixed signs cancels.
        let size: f64 = raw.iter().map(|w| w.abs()).sum();
        let sum: f64 = raw.iter().sum();
        let cancelled = if self.setup.config.renorm == Renorm::None {
            1.0
        } else {
            (size / sum.abs()).max(1.0)
        };
        let p_norm = if let Renorm::PNorm(p) = self.setup.config.renorm {
            32.0 * U * f64::from(p).max(1.0)
        } else {
            0.0
        };
        // What underflow costs the divisor.
        let underflow = if self.setup.config.renorm == Renorm::None {
            0.0
        } else {
            TINY * k / sum.abs().max(f64::MIN_POSITIVE)
        };
        (from_score + U * (k + 4.0)) * cancelled + p_norm + underflow
    }
}

/// Fails unless `routing` is what the oracle says. Returns (rows compared, rows left out).
fn compare(setup: &Setup, routing: &Routing, logits: &[f32]) -> (usize, usize) {
    let spec = spec(setup);
    let expected = reference::route(&spec, &widen(logits));
    let all = match setup.config.selection {
        Selection::ProductKeys { stacked } => {
            let layout = if stacked {
                reference::KeyLayout::BatchHalves
            } else {
                reference::KeyLayout::PerToken
            };
            reference::product_keys(&widen(logits), setup.config.num_experts.isqrt(), layout)
        }
        _ => widen(logits),
    };
    let rows: Vec<Row<'_>> = (0..setup.tokens)
        .map(|t| Row::new(setup, &spec, &all, t))
        .collect();
    assert_eq!(
        (routing.tokens(), routing.slots()),
        (setup.tokens, expected.slots),
        "{}",
        setup.name
    );
    let mut sure: Vec<bool> = rows.iter().map(Row::is_sure).collect();
    if !across_is_sure(setup, &rows) || (setup.config.capacity.is_some() && sure.contains(&false)) {
        // One row that may differ may change every other.
        sure.fill(false);
    }
    for (t, row) in rows.iter().enumerate().filter(|(t, _)| sure[*t]) {
        compare_row(row, routing, &expected, t);
    }
    let left_out = sure.iter().filter(|s| !**s).count();
    (setup.tokens - left_out, left_out)
}

fn compare_row(row: &Row<'_>, routing: &Routing, expected: &RouteResult, t: usize) {
    let name = row.setup.name;
    let slots = t * expected.slots..(t + 1) * expected.slots;
    let ids = &expected.ids[slots.clone()];
    assert_eq!(
        routing.ids()[slots.clone()],
        *ids,
        "{name}: ids of token {t}, logits {:?}",
        row.z
    );
    let (raw, _) = match row.setup.config.selection {
        Selection::SparseMixer { .. } => (expected.weights[slots.clone()].to_vec(), Vec::new()),
        _ => reference::raw_weights(row.spec, &row.z, &row.scores, ids),
    };
    let error = row.weight_error(ids, &raw);
    let shared = t * row.setup.config.joint_shared..(t + 1) * row.setup.config.joint_shared;
    let found = routing.weights()[slots.clone()]
        .iter()
        .chain(&routing.shared_weights()[shared.clone()]);
    let wanted = expected.weights[slots]
        .iter()
        .chain(&expected.shared_weights[shared]);
    for (slot, (&w, &e)) in found.zip(wanted).enumerate() {
        let w = f64::from(w);
        // What underflow costs the score grows with it: by the divisor and the scales.
        let growth = raw.get(slot).map_or(1.0, |raw| {
            if *raw == 0.0 {
                1.0
            } else {
                (e / raw).abs().max(1.0)
            }
        });
        let close = (w - e).abs() <= error * e.abs() + TINY * growth;
        assert!(
            close || w == e || (w.is_nan() && e.is_nan()) || error.is_nan(),
            "{name}: weight {slot} of token {t} is {w:e}, expected {e:e}, off by {:.2e}, bound {error:.2e}",
            ((w - e) / e).abs()
        );
    }
}

/// Whether no two tokens are so close that rounding may swap them: by importance, or for an expert that chooses.
fn across_is_sure(setup: &Setup, rows: &[Row<'_>]) -> bool {
    let apart = |column: Vec<(f64, f64)>, upto: usize| {
        let mut sorted = column;
        sorted.sort_by(|a, b| b.0.total_cmp(&a.0));
        sorted
            .windows(2)
            .take(upto)
            .all(|w| w[0].0 - w[1].0 > w[0].1 + w[1].1)
    };
    let with_error = |row: &Row<'_>, e: usize| {
        let distance = row.maximum() - row.z[e];
        (
            row.scores[e],
            row.scores[e].abs() * row.relative_error(distance) + TINY,
        )
    };
    let prioritized = setup.config.capacity.is_some_and(|c| c.batch_prioritized);
    if prioritized {
        let best = |row: &Row<'_>| with_error(row, reference::top_k(&row.scores, &[], 1)[0]);
        return apart(rows.iter().map(best).collect(), rows.len());
    }
    let Selection::ExpertChoice { per_expert } = setup.config.selection else {
        return true;
    };
    let experts = 0..setup.config.num_experts;
    experts.clone().all(|e| {
        let column: Vec<_> = rows.iter().map(|row| with_error(row, e)).collect();
        let mut sorted = column.clone();
        sorted.sort_by(|a, b| b.0.total_cmp(&a.0));
        per_expert >= sorted.len() || {
            let (last, next) = (sorted[per_expert - 1], sorted[per_expert]);
            last.0 - next.0 > last.1 + next.1
        }
    }) && rows.iter().all(|row| {
        apart(
            experts.clone().map(|e| with_error(row, e)).collect(),
            row.z.len(),
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn every_router_does_what_the_oracle_says(
        seed in any::<u64>(),
        e in prop_oneof![1usize..40, 60usize..70, 125usize..132, 250usize..260],
        k in prop_oneof![1usize..12, 14usize..20, 30usize..36],
        tokens in 1usize..14,
        spread in prop_oneof![Just(0.5f32), Just(1.0), Just(4.0), Just(20.0)],
    ) {
        for setup in setups::all(seed, e, k, tokens, spread) {
            for cpu in cpus() {
                let logits = effective(&setup, &cpu);
                compare(&setup, &setup.route(&cpu), &logits);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    /// Many equal logits: indices decide, of groups too. Now and then NaN and infinities, where f64 knows the answer as well.
    #[test]
    fn ties_go_to_the_lower_index_and_nan_comes_last(
        seed in any::<u64>(),
        e in prop_oneof![1usize..40, Just(64usize), Just(128), Just(256)],
        k in prop_oneof![1usize..12, 30usize..36],
        levels in 1i32..4,
        bad in any::<bool>(),
    ) {
        let mut rng = crate::common::Rng(seed);
        for mut setup in setups::all(seed, e, k, 5, 1.0) {
            for z in &mut setup.logits {
                *z = (*z * levels as f32).round() / 2.0;
                match rng.below(12) {
                    0 if bad => *z = f32::NAN,
                    1 if bad => *z = f32::INFINITY,
                    2 if bad => *z = f32::NEG_INFINITY,
                    3 => *z = -0.0,
                    _ => {}
                }
            }
            if rng.below(2) == 0 {
                setup.bias.clear();
            }
            for cpu in cpus() {
                let logits = effective(&setup, &cpu);
                compare(&setup, &setup.route(&cpu), &logits);
            }
        }
    }
}

/// The property above is not vacuous: of each kind of router, nearly every row is compared.
#[test]
fn hardly_any_row_is_left_out() {
    let mut counts = std::collections::BTreeMap::new();
    let cpu = Cpu::new();
    for (seed, e) in [4, 16, 60, 64, 128, 256]
        .into_iter()
        .cycle()
        .take(36)
        .enumerate()
    {
        for setup in setups::all(seed as u64, e, 8, 10, 1.0) {
            let logits = effective(&setup, &cpu);
            let (compared, left_out) = compare(&setup, &setup.route(&cpu), &logits);
            let count = counts.entry(setup.name).or_insert((0, 0));
            *count = (count.0 + compared, count.1 + left_out);
        }
    }
    for (name, (compared, left_out)) in counts {
        assert!(
            left_out * 10 < compared,
            "{name}: {compared} rows compared, {left_out} left out"
        );
    }
}

/// Ids and weights of all K = E = 4096, where sorting takes over.
#[test]
fn four_thousand_experts() {
    for k in [1, 16, 17, 4096] {
        let mut setup = setups::all(7, 4, 4, 2, 1.0).swap_remove(0);
        setup.config = RouterConfig::gpt_oss(4096, k);
        setup.bias = Vec::new();
        setup.per_expert_scale = Vec::new();
        setup.logits = crate::common::Rng(3).normals(2 * 4096);
        for cpu in cpus() {
            let routing = setup.route(&cpu);
            let (compared, left_out) = if k < 100 {
                compare(&setup, &routing, &setup.logits)
            } else {
                // The oracle's selection is quadratic.
                for (ids, z) in routing.ids().chunks(k).zip(setup.logits.chunks(k)) {
                    let mut order: Vec<i32> = (0..k as i32).collect();
                    order.sort_by(|&a, &b| z[b as usize].total_cmp(&z[a as usize]));
                    assert_eq!(ids, order);
                }
                (2, 0)
            };
            assert_eq!((compared, left_out), (2, 0));
        }
    }
}
