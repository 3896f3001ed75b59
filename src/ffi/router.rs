//! `moe_router_config` and `moe_router`.

use super::handle::{check_place, destroy, exclusive, give, handle, shared};
use super::memory::{Regions, Versioned, probe, read_struct, write_struct};
use super::status::*;
use crate::routing::{
    Capacity, GroupLimit, GroupScore, MaskedFill, NullExperts, RankBy, Renorm, Router,
    RouterConfig, Score, Selection, WeightSource,
};
use bytemuck::Zeroable;
use core::ffi::{CStr, c_char};

/// moe_router_config.null_kind: no experts without weights.
pub const MOE_NULL_NONE: u32 = 0;
/// Experts that return their input.
pub const MOE_NULL_IDENTITY: u32 = 1;
/// Experts that return nothing.
pub const MOE_NULL_ZERO: u32 = 2;

/// moe_router_config.score: exp(z - max) / sum.
pub const MOE_SCORE_SOFTMAX: u32 = 0;
/// 1 / (1 + exp(-z))
pub const MOE_SCORE_SIGMOID: u32 = 1;
/// sqrt(ln(1 + exp(z)))
pub const MOE_SCORE_SQRT_SOFTPLUS: u32 = 2;
/// z
pub const MOE_SCORE_IDENTITY: u32 = 3;

/// moe_router_config.selection: the K best.
pub const MOE_SELECT_TOP_K: u32 = 0;
/// Ids come with the call.
pub const MOE_SELECT_GIVEN: u32 = 1;
/// PhiMoE's sparsemixer, K = 2, with jitter_eps.
pub const MOE_SELECT_SPARSE_MIXER: u32 = 2;
/// Product keys (Doge): 2 * sqrt(E) logits.
pub const MOE_SELECT_PRODUCT_KEYS: u32 = 3;
/// Each expert takes its best tokens_per_expert tokens.
pub const MOE_SELECT_EXPERT_CHOICE: u32 = 4;
/// Every expert.
pub const MOE_SELECT_DENSE: u32 = 5;

/// moe_router_config.rank_by: the score (plus correction bias).
pub const MOE_RANK_SCORE: u32 = 0;
/// The logit (plus correction bias).
pub const MOE_RANK_LOGIT: u32 = 1;

/// moe_router_config.group_score: a group's best value.
pub const MOE_GROUP_MAX: u32 = 0;
/// The sum of a group's best two.
pub const MOE_GROUP_TOP2_SUM: u32 = 1;

/// moe_router_config.masked_fill: experts of other groups rank below everything.
pub const MOE_FILL_NEG_INF: u32 = 0;
/// They count as 0.
pub const MOE_FILL_ZERO: u32 = 1;

/// moe_router_config.weights: the selected expert's score.
pub const MOE_WEIGHTS_SCORE: u32 = 0;
/// Softmax over the selected logits.
pub const MOE_WEIGHTS_SOFTMAX_SELECTED: u32 = 1;
/// Sigmoids normalised together with those of the joint_shared last logits.
pub const MOE_WEIGHTS_JOINT_WITH_SHARED: u32 = 2;

/// moe_router_config.renorm: none.
pub const MOE_RENORM_NONE: u32 = 0;
/// Divided by their sum.
pub const MOE_RENORM_SUM: u32 = 1;
/// Divided by their sum plus renorm_value.
pub const MOE_RENORM_SUM_PLUS_EPS: u32 = 2;
/// Divided by their sum, but by no less than renorm_value.
pub const MOE_RENORM_SUM_CLAMP_MIN: u32 = 3;
/// Divided by their p-norm, p = renorm_value.
pub const MOE_RENORM_P_NORM: u32 = 4;

/// What a router does with its logits. Fill it with moe_router_config_init or moe_router_config_family, then change fields.
///
/// In order: z * logit_multiplier, softcap; scores; K ids by score or logit (plus correction bias), within groups; weights, renormalised, * scale, * per-expert scale;
/// capacity. Flags are 0 or 1.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_router_config {
    /// sizeof(moe_router_config)
    pub struct_size: usize,
    /// E: experts that have weights.
    pub num_experts: usize,
    /// K: experts of a token; ignored by MOE_SELECT_DENSE and MOE_SELECT_EXPERT_CHOICE, whose slots are E.
    pub top_k: usize,
    /// Experts without weights, ids E, E + 1, ...; of kind null_kind.
    pub num_null: usize,
    /// Last logits, which score shared experts; with MOE_WEIGHTS_JOINT_WITH_SHARED only.
    pub joint_shared: usize,
    /// Groups of experts of which topk_group are kept; 0 for no such limit.
    pub n_group: usize,
    /// Groups kept.
    pub topk_group: usize,
    /// For MOE_SELECT_EXPERT_CHOICE.
    pub tokens_per_expert: usize,
    /// Pairs that an expert accepts in one scope, if has_capacity.
    pub capacity: usize,
    /// Tokens of a scope; 0 for all tokens of the call.
    pub scope_tokens: usize,
    /// Seed of noisy top-k, if has_noise_seed.
    pub noise_seed: u64,
    /// MOE_NULL_*
    pub null_kind: u32,
    /// MOE_SCORE_*
    pub score: u32,
    /// MOE_SELECT_*
    pub selection: u32,
    /// MOE_RANK_*
    pub rank_by: u32,
    /// MOE_GROUP_*
    pub group_score: u32,
    /// MOE_FILL_*
    pub masked_fill: u32,
    /// MOE_WEIGHTS_*
    pub weights: u32,
    /// MOE_RENORM_*
    pub renorm: u32,
    /// Whether experts have limited room.
    pub has_capacity: u32,
    /// Serve tokens by their best score, not by position.
    pub batch_prioritized: u32,
    /// Renormalise before dropping.
    pub normalize_before_drop: u32,
    /// Whether noise is added to the logits.
    pub has_noise_seed: u32,
    /// For MOE_SELECT_PRODUCT_KEYS: Doge's reading of the logits as two stacked matrices.
    pub stacked_keys: u32,
    /// Factor on every logit; 1 changes nothing.
    pub logit_multiplier: f32,
    /// c * tanh(z / c) when above 0.
    pub logit_softcap: f32,
    /// For MOE_SELECT_SPARSE_MIXER.
    pub jitter_eps: f32,
    /// The number that MOE_RENORM_* speaks of.
    pub renorm_value: f32,
    /// Factor on every weight; 1 changes nothing.
    pub scale: f32,
}

// SAFETY: repr(C), begins with its size, numbers only.
unsafe impl Versioned for moe_router_config {}

/// A flag of C.
pub(super) fn flag(argument: &'static str, value: u32) -> Checked<bool> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(Fault::value(argument, "0 or 1", other)),
    }
}

fn constant<T: Copy>(argument: &'static str, values: &[T], value: u32) -> Checked<T> {
    let expected = format_args!("a constant below {}", values.len());
    values
        .get(value as usize)
        .copied()
        .ok_or_else(|| Fault::value(argument, expected, value))
}

impl moe_router_config {
    fn to_rust(self) -> Checked<RouterConfig> {
        let kind = constant("null_kind", &[0, 1, 2], self.null_kind)?;
        let null_experts = match (kind, self.num_null) {
            (_, 0) => NullExperts::None,
            (1, n) => NullExperts::Identity(n),
            (2, n) => NullExperts::Zero(n),
            (_, n) => return Err(Fault::value("num_null", "0 with MOE_NULL_NONE", n)),
        };
        let scores = [
            Score::Softmax,
            Score::Sigmoid,
            Score::SqrtSoftplus,
            Score::Identity,
        ];
        let sources = [
            WeightSource::Score,
            WeightSource::SoftmaxSelectedLogits,
            WeightSource::JointWithShared,
        ];
        let value = self.renorm_value;
        let renorms = [
            Renorm::None,
            Renorm::Sum,
            Renorm::SumPlusEps(value),
            Renorm::SumClampMin(value),
            Renorm::PNorm(value),
        ];
        let capacity = Capacity {
            per_expert: self.capacity,
            scope_tokens: (self.scope_tokens > 0).then_some(self.scope_tokens),
            batch_prioritized: flag("batch_prioritized", self.batch_prioritized)?,
            normalize_before_drop: flag("normalize_before_drop", self.normalize_before_drop)?,
        };
        let mut config = RouterConfig::new(self.num_experts, self.top_k);
        config.null_experts = null_experts;
        config.joint_shared = self.joint_shared;
        config.logit_multiplier = self.logit_multiplier;
        config.logit_softcap = self.logit_softcap;
        config.score = constant("score", &scores, self.score)?;
        config.selection = self.selection()?;
        config.weights = constant("weights", &sources, self.weights)?;
        config.renorm = constant("renorm", &renorms, self.renorm)?;
        config.scale = self.scale;
        config.capacity = flag("has_capacity", self.has_capacity)?.then_some(capacity);
        config.noise_seed = flag("has_noise_seed", self.has_noise_seed)?.then_some(self.noise_seed);
        Ok(config)
    }

    fn selection(&self) -> Checked<Selection> {
        let group_scores = [GroupScore::Max, GroupScore::Top2Sum];
        let fills = [MaskedFill::NegInf, MaskedFill::Zero];
        let groups = GroupLimit {
            n_group: self.n_group,
            topk_group: self.topk_group,
            score: constant("group_score", &group_scores, self.group_score)?,
            fill: constant("masked_fill", &fills, self.masked_fill)?,
        };
        let selections = [
            Selection::TopK {
                rank_by: constant("rank_by", &[RankBy::Score, RankBy::Logit], self.rank_by)?,
                groups: (self.n_group > 0).then_some(groups),
            },
            Selection::Given,
            Selection::SparseMixer {
                jitter_eps: self.jitter_eps,
            },
            Selection::ProductKeys {
                stacked: flag("stacked_keys", self.stacked_keys)?,
            },
            Selection::ExpertChoice {
                per_expert: self.tokens_per_expert,
            },
            Selection::Dense,
        ];
        constant("selection", &selections, self.selection)
    }

    /// The families' configs use few of the fields.
    fn from_rust(config: &RouterConfig) -> Self {
        let mut c = Self::zeroed();
        c.num_experts = config.num_experts;
        c.top_k = config.top_k;
        c.logit_multiplier = config.logit_multiplier;
        c.logit_softcap = config.logit_softcap;
        c.scale = config.scale;
        c.score = match config.score {
            Score::Softmax => MOE_SCORE_SOFTMAX,
            Score::Sigmoid => MOE_SCORE_SIGMOID,
            Score::SqrtSoftplus => MOE_SCORE_SQRT_SOFTPLUS,
            Score::Identity => MOE_SCORE_IDENTITY,
        };
        if let Selection::TopK { rank_by, groups } = config.selection {
            c.rank_by = match rank_by {
                RankBy::Score => MOE_RANK_SCORE,
                RankBy::Logit => MOE_RANK_LOGIT,
            };
            if let Some(groups) = groups {
                (c.n_group, c.topk_group) = (groups.n_group, groups.topk_group);
                c.group_score = match groups.score {
                    GroupScore::Max => MOE_GROUP_MAX,
                    GroupScore::Top2Sum => MOE_GROUP_TOP2_SUM,
                };
                c.masked_fill = match groups.fill {
                    MaskedFill::NegInf => MOE_FILL_NEG_INF,
                    MaskedFill::Zero => MOE_FILL_ZERO,
                };
            }
        }
        c.weights = match config.weights {
            WeightSource::Score => MOE_WEIGHTS_SCORE,
            WeightSource::SoftmaxSelectedLogits => MOE_WEIGHTS_SOFTMAX_SELECTED,
            WeightSource::JointWithShared => MOE_WEIGHTS_JOINT_WITH_SHARED,
        };
        (c.renorm, c.renorm_value) = match config.renorm {
            Renorm::None => (MOE_RENORM_NONE, 0.0),
            Renorm::Sum => (MOE_RENORM_SUM, 0.0),
            Renorm::SumPlusEps(eps) => (MOE_RENORM_SUM_PLUS_EPS, eps),
            Renorm::SumClampMin(eps) => (MOE_RENORM_SUM_CLAMP_MIN, eps),
            Renorm::PNorm(p) => (MOE_RENORM_P_NORM, p),
        };
        c
    }
}

/// Fills a config: softmax over all, the K best by score, weights as they are. struct_size must be set.
///
/// # Safety
/// config: NULL or writable for its struct_size bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_router_config_init(
    config: *mut moe_router_config,
    num_experts: usize,
    top_k: usize,
) -> moe_status {
    let filled = moe_router_config::from_rust(&RouterConfig::new(num_experts, top_k));
    // SAFETY: the caller's contract.
    guard(|| unsafe { write_struct("config", config, &filled) })
}

/// Fills a config with what a published family does. struct_size must be set.
///
/// Names: mixtral, qwen3_moe, qwen2_moe, olmoe, deepseek_v2, gpt_oss, granite, deepseek_v3, glm4_moe, kimi_k2, minimax_m2, lfm2_moe, cohere2_sigmoid, kolibri1,
/// llama4, ernie4_5, deepseek_v4. What differs between a family's models stays to be set: scale (1 here), and n_group, topk_group (1 here) of deepseek_v3.
///
/// Errors: MOE_ERROR_UNKNOWN_NAME, MOE_ERROR_NULL, MOE_ERROR_STRUCT_SIZE.
///
/// # Safety
/// family: NULL or NUL-terminated. config: NULL or writable for its struct_size bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_router_config_family(
    config: *mut moe_router_config,
    family: *const c_char,
    num_experts: usize,
    top_k: usize,
) -> moe_status {
    guard(|| {
        if family.is_null() {
            return Err(Fault::new(
                MOE_ERROR_NULL,
                "family: expected a name, got NULL",
            ));
        }
        // SAFETY: the caller's contract: a NUL-terminated text.
        let name = unsafe { CStr::from_ptr(family) }.to_string_lossy();
        let filled = family_config(&name, num_experts, top_k)?;
        // SAFETY: the caller's contract.
        unsafe { write_struct("config", config, &moe_router_config::from_rust(&filled)) }
    })
}

fn family_config(name: &str, e: usize, k: usize) -> Checked<RouterConfig> {
    Ok(match name {
        "mixtral" => RouterConfig::mixtral(e, k),
        "qwen3_moe" => RouterConfig::qwen3_moe(e, k),
        "qwen2_moe" => RouterConfig::qwen2_moe(e, k),
        "olmoe" => RouterConfig::olmoe(e, k),
        "deepseek_v2" => RouterConfig::deepseek_v2(e, k, 1.0),
        "gpt_oss" => RouterConfig::gpt_oss(e, k),
        "granite" => RouterConfig::granite(e, k),
        "deepseek_v3" => RouterConfig::deepseek_v3(e, k, 1, 1, 1.0),
        "glm4_moe" => RouterConfig::glm4_moe(e, k, 1.0),
        "kimi_k2" => RouterConfig::kimi_k2(e, k, 1.0),
        "minimax_m2" => RouterConfig::minimax_m2(e, k),
        "lfm2_moe" => RouterConfig::lfm2_moe(e, k, 1.0),
        "cohere2_sigmoid" => RouterConfig::cohere2_sigmoid(e, k),
        "kolibri1" => RouterConfig::kolibri1(e, k),
        "llama4" => RouterConfig::llama4(e, k),
        "ernie4_5" => RouterConfig::ernie4_5(e, k),
        "deepseek_v4" => RouterConfig::deepseek_v4(e, k, 1.0),
        other => {
            let text = format_args!("family: unknown name {other:?}; the header lists those known");
            return Err(Fault::new(MOE_ERROR_UNKNOWN_NAME, text));
        }
    })
}

/// A checked router with its small tensors.
pub struct moe_router {
    _opaque: (),
}

handle!(moe_router, Router, b"moerout1");

/// Makes a router. Errors: MOE_ERROR_VALUE naming the field, and those of the struct.
///
/// # Safety
/// config: NULL or valid. out: writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_router_create(
    config: *const moe_router_config,
    out: *mut *mut moe_router,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        unsafe { check_place(out) }?;
        // SAFETY: the caller's contract.
        let config = unsafe { read_struct("config", config) }?;
        let router = Router::new(config.to_rust()?)?;
        // SAFETY: the caller's contract.
        unsafe { give(out, router) }
    })
}

/// Replaces the correction bias, bias[len], len = E + num_null: added to what the selection ranks, never to a weight. -inf is allowed.
///
/// Errors: MOE_ERROR_SHAPE, MOE_ERROR_VALUE (NaN, +inf, a selection that ranks nothing).
///
/// # Safety
/// router: NULL or living. bias: NULL or len readable floats.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_router_set_correction_bias(
    router: *mut moe_router,
    bias: *const f32,
    len: usize,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let mut router = unsafe { exclusive(router) }?;
        let mut regions = Regions::new();
        // SAFETY: the caller's contract.
        let bias = unsafe { regions.slice("correction_bias", bias, len) }?;
        // Rounded up to whole blocks and grown by the allocator.
        probe("correction_bias", len.checked_mul(8))?;
        Ok(router.set_correction_bias(bias.get(&regions.apart()?))?)
    })
}

/// Multiplies the weight of expert e by scale[e], len = E, after everything else. Errors: MOE_ERROR_SHAPE, MOE_ERROR_VALUE.
///
/// # Safety
/// router: NULL or living. scale: NULL or len readable floats.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_router_set_per_expert_scale(
    router: *mut moe_router,
    scale: *const f32,
    len: usize,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let mut router = unsafe { exclusive(router) }?;
        let mut regions = Regions::new();
        // SAFETY: the caller's contract.
        let scale = unsafe { regions.slice("per_expert_scale", scale, len) }?;
        probe("per_expert_scale", len.checked_mul(8))?;
        let changed = router
            .clone()
            .with_per_expert_scale(scale.get(&regions.apart()?))?;
        *router = changed;
        Ok(())
    })
}

/// R: columns of the logits; 0 for a handle that is none.
///
/// # Safety
/// router: NULL or living.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_router_num_logits(router: *const moe_router) -> usize {
    let mut n = 0;
    guard(|| {
        // SAFETY: the caller's contract.
        n = unsafe { shared(router) }?.config().num_logits();
        Ok(())
    });
    n
}

/// Columns of ids and weights: K, or E where every expert may serve a token; 0 for a handle that is none.
///
/// # Safety
/// router: NULL or living.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_router_slots(router: *const moe_router) -> usize {
    let mut n = 0;
    guard(|| {
        // SAFETY: the caller's contract.
        n = unsafe { shared(router) }?.config().slots();
        Ok(())
    });
    n
}

/// Ends a handle. NULL is allowed. MOE_ERROR_BUSY while a call uses it.
///
/// # Safety
/// router: NULL or living, not used afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_router_destroy(router: *mut moe_router) -> moe_status {
    // SAFETY: the caller's contract.
    guard(|| unsafe { destroy(router) })
}
