//! The crate's own descriptions in the words of [`reference`](mod@crate::reference), which imports nothing from here.

use crate::grouped_gemm::{Activation, ActivationFunction, Clamp};
use crate::reference::{self, Method, MlpSpec, RouterSpec};
use crate::routing::{
    GroupLimit, GroupScore, MaskedFill, NullExperts, RankBy, Renorm, Router, RouterConfig, Score,
    Selection, WeightSource,
};

/// What the reference does for the same router. Correction bias and per-expert scale belong to the [`Router`]; the ids of [`Selection::Given`]
/// come with a call, and are left empty.
///
/// ```
/// use moe_kernels::reference::{self, RouterSpec};
/// use moe_kernels::routing::RouterConfig;
/// let spec = RouterSpec::from(&RouterConfig::mixtral(4, 2));
/// let result = reference::route(&spec, &[0.0, 2.0, 1.0, 3.0]);
/// assert_eq!(result.ids, [3, 1]);
/// ```
impl From<&RouterConfig> for RouterSpec {
    fn from(config: &RouterConfig) -> Self {
        let mut spec = Self::top_k(config.num_experts, config.top_k);
        (spec.num_null, spec.null_kind) = match config.null_experts {
            NullExperts::Zero(n) => (n, reference::NullKind::Zero),
            NullExperts::Identity(n) => (n, reference::NullKind::Identity),
            NullExperts::None => (0, reference::NullKind::Identity),
        };
        spec.num_joint_shared = config.joint_shared;
        spec.logit_mul = config.logit_multiplier.into();
        spec.logit_softcap = config.logit_softcap.into();
        spec.score = match config.score {
            Score::Softmax => reference::Score::Softmax,
            Score::Sigmoid => reference::Score::Sigmoid,
            Score::SqrtSoftplus => reference::Score::SqrtSoftplus,
            Score::Identity => reference::Score::Identity,
        };
        spec.weights = match config.weights {
            WeightSource::Score => reference::WeightsFrom::Score,
            WeightSource::SoftmaxSelectedLogits => reference::WeightsFrom::SoftmaxSelectedLogits,
            WeightSource::JointWithShared => reference::WeightsFrom::JointWithShared,
        };
        spec.renorm = match config.renorm {
            Renorm::None => reference::Renorm::None,
            Renorm::Sum => reference::Renorm::Sum,
            Renorm::SumPlusEps(eps) => reference::Renorm::SumPlusEps(eps.into()),
            Renorm::SumClampMin(eps) => reference::Renorm::SumClampMin(eps.into()),
            Renorm::PNorm(p) => reference::Renorm::PNorm(p.into()),
        };
        spec.scale = config.scale.into();
        spec.capacity = config.capacity.map(|c| reference::Capacity {
            per_expert: c.per_expert,
            scope_tokens: c.scope_tokens,
            batch_prioritized: c.batch_prioritized,
            normalize_before_drop: c.normalize_before_drop,
        });
        select(&mut spec, config.selection);
        spec
    }
}

fn select(spec: &mut RouterSpec, selection: Selection) {
    spec.method = match selection {
        Selection::TopK { rank_by, groups } => {
            spec.select_on = match rank_by {
                RankBy::Score => reference::SelectOn::Score,
                RankBy::Logit => reference::SelectOn::Logit,
            };
            spec.groups = groups.map(reference::Groups::from);
            Method::TopK
        }
        Selection::Given => Method::Given {
            ids: Vec::new(),
            weights: Vec::new(),
        },
        Selection::SparseMixer { jitter_eps } => Method::Sparsemixer {
            jitter_eps: jitter_eps.into(),
        },
        Selection::ProductKeys { stacked } => {
            spec.select_on = reference::SelectOn::Logit;
            Method::ProductKey {
                layout: match stacked {
                    true => reference::KeyLayout::BatchHalves,
                    false => reference::KeyLayout::PerToken,
                },
            }
        }
        Selection::ExpertChoice { per_expert } => Method::ExpertChoice {
            capacity: per_expert,
        },
        Selection::Dense => Method::Dense,
    };
}

impl From<GroupLimit> for reference::Groups {
    fn from(groups: GroupLimit) -> Self {
        Self {
            n_group: groups.n_group,
            topk_group: groups.topk_group,
            score: match groups.score {
                GroupScore::Max => reference::GroupScore::Max,
                GroupScore::Top2Sum => reference::GroupScore::Top2Sum,
            },
            fill: match groups.fill {
                MaskedFill::NegInf => reference::Fill::NegInf,
                MaskedFill::Zero => reference::Fill::Zero,
            },
        }
    }
}

/// The router's config with its correction bias and per-expert scale.
impl From<&Router> for RouterSpec {
    fn from(router: &Router) -> Self {
        let wide = |v: Option<&[f32]>| v.unwrap_or_default().iter().map(|&v| v.into()).collect();
        Self {
            correction_bias: wide(router.correction_bias()),
            per_expert_scale: wide(router.per_expert_scale()),
            ..Self::from(router.config())
        }
    }
}

/// What the reference computes between an expert's two products.
impl From<Activation> for MlpSpec {
    fn from(activation: Activation) -> Self {
        use reference::{Activation as A, Clamp as C};
        Self {
            gated: activation.gated,
            act: match activation.function {
                ActivationFunction::Identity => A::Identity,
                ActivationFunction::Silu => A::Silu,
                ActivationFunction::Gelu => A::Gelu,
                ActivationFunction::GeluTanh => A::GeluTanh,
                ActivationFunction::Relu => A::Relu,
                ActivationFunction::Relu2 => A::Relu2,
            },
            clamp: match activation.clamp {
                Clamp::None => C::None,
                Clamp::Pre { limit } => C::Pre(limit.into()),
                Clamp::Post { limit } => C::Post(limit.into()),
                Clamp::GptOss { limit, alpha } => C::Oai {
                    limit: limit.into(),
                    alpha: alpha.into(),
                },
                Clamp::Softcap { gate, up } => C::Softcap {
                    gate: gate.into(),
                    up: up.into(),
                },
            },
        }
    }
}
