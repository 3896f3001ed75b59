//! Across tokens against one token at a time, bit by bit, on every instruction set: in calls of one to 33 tokens, in a batch of 300, at every place of
//! a batch.

use super::*;
use crate::cpu::Isa;
use crate::cpu::routing::{RouteToken, RouteTokens};
use crate::cpu::simd::{Op, dispatch};
use crate::routing::Router;
use proptest::prelude::*;

/// Ids, and the bits of the weights.
type Bits = (Vec<i32>, Vec<u32>);

/// Routes all tokens of a job, as calls do or without the shortcuts of this folder.
fn route_all(isa: Isa, job: &Job<'_>, careful: bool) -> Bits {
    let (tokens, slots) = (job.logits.rows(), job.config.slots());
    let mut worker = Worker::default();
    worker.fit(job.config, tokens);
    let (mut ids, mut weights) = (vec![-7; tokens * slots], vec![0.5; tokens * slots]);
    let mut out = Out {
        tokens,
        ids: &mut ids,
        weights: &mut weights,
        shared: &mut [],
        importance: &mut [],
    };
    let worker = &mut worker;
    if careful {
        for t in 0..tokens {
            let out = out.token(t, job.config);
            dispatch(isa, one_token(job, worker, t, out));
        }
    } else {
        let first = 0;
        dispatch(
            isa,
            RouteTokens {
                job,
                worker,
                first,
                out,
            },
        );
    }
    (ids, weights.iter().map(|w| w.to_bits()).collect())
}

fn one_token<'a, 'o>(
    job: &'a Job<'a>,
    worker: &'a mut Worker,
    t: usize,
    out: Out<'o>,
) -> impl Op<Output = ()> + use<'a, 'o> {
    RouteToken {
        job,
        worker,
        t,
        out,
    }
}

/// Every combination of what decides a path here, as far as it means something.
fn configs(e: usize, k: usize) -> Vec<RouterConfig> {
    let mut all = Vec::new();
    for score in [
        Score::Softmax,
        Score::Sigmoid,
        Score::SqrtSoftplus,
        Score::Identity,
    ] {
        for rank_by in [RankBy::Score, RankBy::Logit] {
            for weights in [WeightSource::Score, WeightSource::SoftmaxSelectedLogits] {
                for (renorm, scale) in [
                    (Renorm::None, 1.0),
                    (Renorm::Sum, 2.5),
                    (Renorm::SumPlusEps(1e-20), 1.0),
                    (Renorm::SumClampMin(1e-3), 1.0),
                    (Renorm::PNorm(2.0), 1.0),
                ] {
                    all.push(RouterConfig {
                        score,
                        weights,
                        renorm,
                        scale,
                        selection: Selection::TopK {
                            rank_by,
                            groups: None,
                        },
                        ..RouterConfig::new(e, k)
                    });
                }
            }
        }
    }
    if e.is_multiple_of(4) {
        let half = |top| (e / 4 * 2 >= k).then_some(top);
        all.extend(half(RouterConfig::deepseek_v3(e, k, 4, 2, 2.5)));
        all.extend(half(RouterConfig::deepseek_v2_grouped(e, k, 4, 2, 16.0)));
        all.extend(half(RouterConfig::mistral4(e, k, 4, 2, 1.0)));
    }
    all.push(RouterConfig::zaya(e, k));
    all.push(RouterConfig::longcat_flash(e, 5, k, 6.0));
    all.push(RouterConfig::laguna(e, k, 3.0));
    all.retain(|config| Router::new(config.clone()).is_ok());
    all
}

/// A row of each of the kinds that a shortcut could be wrong for.
fn logits(rng: &mut TestRng, n: usize) -> Vec<f32> {
    const STRANGE: [f32; 9] = [
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        0.0,
        -0.0,
        1e-42,
        -3e38,
        3e38,
        -100.0,
    ];
    let kind = rng.below(12);
    let spread = [0.01, 1.0, 30.0][rng.below(3)];
    (0..n)
        .map(|i| {
            let z = rng.unit() * 6.0 * spread - 3.0 * spread;
            match kind {
                0 => STRANGE[rng.below(STRANGE.len())],
                1 if rng.below(8) == 0 => f32::NAN,
                2 if rng.below(8) == 0 => STRANGE[rng.below(STRANGE.len())],
                // Ties: few values, one value, every value twice.
                3 => rng.below(4) as f32,
                4 => 1.5,
                5 => (i / 2 * 37 % 101) as f32 * 0.01,
                // Sorted, so that all the best lie side by side.
                6 => i as f32 * spread / n as f32,
                // Few that are finite.
                7 if rng.below(16) != 0 => f32::NEG_INFINITY,
                // Logits that differ while their softmax does not: the maximum is so much larger that the difference to it is rounded.
                8 => match rng.below(n) {
                    0..4 => 5.0 + rng.unit(),
                    4..14 => 1e-3 + rng.below(4) as f32 * 1e-8,
                    _ => -5.0 - rng.unit(),
                },
                // Logits that differ while their √softplus does not: it is flat for large numbers.
                9 => 60.0 + rng.below(6) as f32 * 4e-6 - rng.below(2) as f32,
                _ => z,
            }
        })
        .collect()
}

/// SplitMix64.
struct TestRng(u64);

impl TestRng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 24) as f32
    }
}

/// Tokens of the large batch.
const MANY: usize = 300;

fn check(config: &RouterConfig, with_bias: bool, rng: &mut TestRng) -> bool {
    let (n, k) = (config.num_logits(), config.slots());
    let mut bias = vec![[0.0; REDUCTION_LANES]; n.div_ceil(REDUCTION_LANES)];
    if with_bias {
        let values = &mut bias.as_flattened_mut()[..config.selectable()];
        values.fill_with(|| rng.unit() - 0.5);
        if rng.below(4) == 0 {
            values[0] = f32::NEG_INFINITY;
        }
    } else {
        bias.clear();
    }
    let rows: Vec<f32> = (0..MANY).flat_map(|_| logits(rng, n)).collect();
    let plan = Plan::new(config, with_bias, false);
    let job = |rows| Job {
        config,
        plan: plan.as_ref(),
        bias: &bias,
        per_expert_scale: &[],
        logits: AnyMatRef::F32(rows),
        noise_logits: None,
        given_ids: &[],
        position: 0,
    };
    let view = |first: usize, tokens: usize| {
        MatRef::new(&rows[first * n..][..tokens * n], tokens, n).expect("as large as said")
    };
    let whole = job(view(0, MANY));
    let expected = route_all(Isa::Scalar, &whole, true);
    for isa in Isa::available() {
        assert_eq!(
            route_all(isa, &whole, true),
            expected,
            "{isa}, one by one: {config:?}"
        );
        // From each of the first 16 on: each token at every place of a batch.
        for first in 0..TOKENS {
            let found = route_all(isa, &job(view(first, MANY - first)), false);
            let from = first * k;
            assert!(
                found.0 == expected.0[from..] && found.1 == expected.1[from..],
                "{isa}, from token {first} on: {config:?}"
            );
        }
        // Few tokens, which go other ways, up to around the lanes of every instruction set; a last batch of so many is what a long call ends with.
        for tokens in [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 18, 19, 33] {
            for first in (0..MANY - tokens).step_by(tokens.min(7)) {
                let found = route_all(isa, &job(view(first, tokens)), false);
                let pairs = first * k..(first + tokens) * k;
                assert!(
                    found.0 == expected.0[pairs.clone()] && found.1 == expected.1[pairs],
                    "{isa}, {tokens} tokens from {first} on: {config:?}"
                );
            }
        }
    }
    plan.is_some()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..Default::default() })]

    #[test]
    fn across_tokens_gives_the_bits_of_one_token_at_a_time(
        seed: u64,
        e in prop::sample::select(vec![2usize, 7, 16, 31, 32, 33, 64, 100, 128, 160, 256, 384, 500]),
        k in 1usize..=17,
        with_bias: bool,
        pick: prop::sample::Index,
    ) {
        let mut rng = TestRng(seed);
        let configs = configs(e, k.min(e));
        check(pick.get(&configs), with_bias, &mut rng);
    }
}

/// `PROPTEST_CASES`, or enough for each path to be met.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").map_or(64, |n| n.parse().expect("a number of cases"))
}

/// Each combination once, and that most go this way at all.
#[test]
fn every_configuration_agrees() {
    let mut rng = TestRng(11);
    for (e, k) in [(64, 8), (128, 12)] {
        let all = configs(e, k);
        let planned = all
            .iter()
            .enumerate()
            .filter(|(i, config)| check(config, i % 3 == 2, &mut rng))
            .count();
        assert!(planned * 10 >= all.len() * 9, "{planned} of {}", all.len());
    }
}
