//! Routers with any combination of fields, and logits for them.

use super::*;

/// A config of any combination of fields.
pub fn any_config() -> impl Strategy<Value = RouterConfig> {
    let e = prop_oneof![
        1usize..=9,
        30usize..=34,
        60usize..=68,
        Just(96),
        Just(128),
        Just(130),
        Just(256)
    ];
    let scores = prop::sample::select(vec![
        Score::Softmax,
        Score::Sigmoid,
        Score::SqrtSoftplus,
        Score::Identity,
    ]);
    let renorms = prop::sample::select(vec![
        Renorm::None,
        Renorm::Sum,
        Renorm::SumPlusEps(1e-20),
        Renorm::SumClampMin(1e-3),
        Renorm::PNorm(1.0),
        Renorm::PNorm(2.0),
        Renorm::PNorm(0.7),
    ]);
    let selection = (
        any::<bool>(),
        any::<u32>(),
        any::<bool>(),
        any::<bool>(),
        0u8..8,
    );
    let capacity = prop::option::weighted(
        0.25,
        (
            0usize..6,
            prop::option::of(1usize..12),
            any::<bool>(),
            any::<bool>(),
        ),
    );
    let logit = (
        prop_oneof![3 => Just(1.0f32), 1 => -2.0f32..2.0],
        prop_oneof![3 => Just(0.0f32), 1 => 0.1f32..30.0],
        prop::option::weighted(0.2, any::<u64>()),
    );
    (
        e,
        1usize..12,
        scores,
        renorms,
        selection,
        capacity,
        logit,
        0u8..6,
        -2.0f32..3.0,
    )
        .prop_map(
            |(
                e,
                k,
                score,
                renorm,
                (by_logit, groups, top2, zero, kind),
                capacity,
                logit,
                nulls,
                scale,
            )| {
                let mut config = RouterConfig::new(e, k.min(e));
                config.score = score;
                config.renorm = renorm;
                config.scale = scale;
                config.null_experts = match nulls {
                    0 => NullExperts::Identity(1 + e / 2),
                    1 => NullExperts::Zero(2),
                    _ => NullExperts::None,
                };
                if nulls == 2 {
                    config.weights = WeightSource::SoftmaxSelectedLogits;
                }
                if nulls == 3 {
                    config.score = Score::Sigmoid;
                    config.renorm = Renorm::None;
                    config.weights = WeightSource::JointWithShared;
                    config.joint_shared = 1 + groups as usize % 40;
                }
                (
                    config.logit_multiplier,
                    config.logit_softcap,
                    config.noise_seed,
                ) = logit;
                config.capacity = capacity.map(
                    |(per_expert, scope_tokens, batch_prioritized, normalize_before_drop)| {
                        Capacity {
                            per_expert,
                            scope_tokens,
                            batch_prioritized,
                            normalize_before_drop,
                        }
                    },
                );
                let n = config.selectable();
                let divisors: Vec<usize> = (1..=n).filter(|d| n.is_multiple_of(*d)).collect();
                let n_group = divisors[groups as usize % divisors.len()];
                let limit = GroupLimit {
                    n_group,
                    topk_group: 1 + (groups >> 16) as usize % n_group,
                    score: if top2 {
                        GroupScore::Top2Sum
                    } else {
                        GroupScore::Max
                    },
                    fill: if zero {
                        MaskedFill::Zero
                    } else {
                        MaskedFill::NegInf
                    },
                };
                config.selection = match kind {
                    0 => Selection::Given,
                    1 => Selection::ProductKeys { stacked: top2 },
                    2 => Selection::SparseMixer {
                        jitter_eps: 0.01 + scale.abs() * 0.1,
                    },
                    3 => Selection::ExpertChoice {
                        per_expert: 1 + groups as usize % 9,
                    },
                    4 => Selection::Dense,
                    _ => Selection::TopK {
                        rank_by: if by_logit {
                            RankBy::Logit
                        } else {
                            RankBy::Score
                        },
                        groups: (groups % 2 == 0).then_some(limit),
                    },
                };
                if kind == 2 {
                    config.top_k = 2;
                }
                config
            },
        )
        .prop_filter("combinations that no model defines", |c| {
            c.validate().is_ok() && workspace_size(c, 1).is_ok()
        })
}

/// Any router with logits from `strategies` (ordinary, tied, extreme rows), bias and scales.
pub fn any_setup() -> impl Strategy<Value = Setup> {
    (any_config(), 1usize..14, any::<u64>()).prop_flat_map(|(config, tokens, seed)| {
        let r = config.num_logits();
        prop::collection::vec(logit_row(r), tokens).prop_map(move |rows| {
            let mut rng = Rng(seed);
            let ranks = matches!(
                config.selection,
                Selection::TopK { .. } | Selection::ProductKeys { .. }
            );
            let mut normals = |n: usize, wanted: bool| if wanted { rng.normals(n) } else { vec![] };
            let bias = normals(config.selectable(), ranks && seed % 3 == 0);
            let per_expert_scale = normals(config.num_experts, seed % 5 == 0);
            let noise_logits = normals(tokens * r, config.noise_seed.is_some());
            let given = config.selection == Selection::Given;
            Setup {
                name: "any",
                bias: bias
                    .iter()
                    .map(|b| if *b > 1.5 { f32::NEG_INFINITY } else { *b })
                    .collect(),
                per_expert_scale,
                tokens,
                logits: rows.concat(),
                noise_logits,
                given_ids: if given {
                    setups::given_ids(&mut rng, &config, tokens)
                } else {
                    vec![]
                },
                config: config.clone(),
            }
        })
    })
}
