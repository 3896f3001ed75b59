//! The router of a case: metadata and tensors into a [`RouterConfig`].

use super::fields::Fields;
use super::file::{Result, Tensor, malformed};
use super::tensors::Tensors;
use moe_kernels::routing::*;

/// The router and everything that it reads besides x.
#[derive(Clone, Debug)]
pub struct Gate {
    pub config: RouterConfig,
    pub logits: Logits,
    /// `[R]`, added to the logits.
    pub bias: Option<Vec<f32>>,
    /// `[E + null experts]`
    pub correction_bias: Option<Vec<f32>>,
    /// `[E]`
    pub per_expert_scale: Option<Vec<f32>>,
    /// `[T, K]`
    pub given_ids: Option<Vec<i32>>,
    /// `[T, K]`: weights as they are; the logits play no part then.
    pub given_weights: Option<Vec<f32>>,
}

/// Where logits come from.
#[derive(Clone, Debug)]
pub enum Logits {
    /// `x · wᵀ`, w `[R, H]`.
    Linear {
        w: Tensor,
        input_norm: Option<InputNorm>,
    },
    /// `[T, R]`
    Given(Vec<f32>),
    /// None: ids and weights are both given.
    None,
}

/// `x / √(mean(x²) + eps) · scale · mul` before the router.
#[derive(Clone, Debug)]
pub struct InputNorm {
    pub eps: f32,
    pub mul: f32,
    /// `[H]`
    pub scale: Vec<f32>,
}

/// Reads the router of a layer whose x is `[T, H]`. `joint` is the number of shared experts.
pub fn read_gate(
    fields: &Fields,
    tensors: &mut Tensors,
    (tokens, hidden): (usize, usize),
    joint: usize,
) -> Result<Gate> {
    let meta = [
        fields.object("router")?,
        fields.object("selection")?,
        fields.object("weights")?,
        fields.object("null_experts")?,
        fields.object("capacity")?,
    ];
    let [router, selection, weights, null, capacity] = &meta;
    let Some(experts) = fields.size("E")? else {
        return malformed("field E is missing");
    };
    let mut config = RouterConfig::new(experts, read_top_k(fields, selection)?);
    config.null_experts = read_null(null)?;
    config.logit_multiplier = router.f32_or("logit_mul", 1.0)?;
    config.logit_softcap = router.f32_or("logit_softcap", 0.0)?;
    config.score = fields.choice(
        "score",
        "softmax",
        &[
            ("softmax", Score::Softmax),
            ("sigmoid", Score::Sigmoid),
            ("sqrtsoftplus", Score::SqrtSoftplus),
            ("sqrt_softplus", Score::SqrtSoftplus),
            ("identity", Score::Identity),
            ("none", Score::Identity),
        ],
    )?;
    let given = read_weights(weights, &mut config, joint)?;
    let jitter = weights.number("jitter_eps")?;
    read_selection(selection, capacity, &mut config, tokens, jitter)?;

    let columns = config.num_logits();
    let biased = router.flag("bias");
    let gate = Gate {
        logits: read_logits(router, tensors, (tokens, hidden, columns), given)?,
        bias: match biased {
            true => Some(tensors.vector("router_b", columns)?),
            false => None,
        },
        correction_bias: match selection.flag("correction_bias") {
            true => Some(read_correction_bias(tensors, &config)?),
            false => None,
        },
        per_expert_scale: match weights.flag("per_expert_scale") {
            true => Some(tensors.vector("per_expert_scale", experts)?),
            false => None,
        },
        given_ids: match config.selection {
            Selection::Given => Some(read_ids(tensors, tokens, config.top_k)?),
            _ => None,
        },
        given_weights: match given {
            true => {
                let t = tensors.weight("given_weights", &[tokens, config.top_k])?;
                Some(t.f32s("given_weights")?)
            }
            false => None,
        },
        config,
    };
    let mut notes = Vec::new();
    meta.iter()
        .for_each(|fields| fields.report_unread(&mut notes));
    notes.into_iter().for_each(|note| tensors.note(note));
    Ok(gate)
}

fn read_top_k(fields: &Fields, selection: &Fields) -> Result<usize> {
    match (selection.size("top_k")?, fields.size("k")?) {
        (Some(a), Some(b)) if a != b => {
            malformed(format!("field selection.top_k is {a}, but field k is {b}"))
        }
        (Some(k), _) | (None, Some(k)) => Ok(k),
        (None, None) => malformed("field selection.top_k is missing"),
    }
}

fn read_null(meta: &Fields) -> Result<NullExperts> {
    let n = meta.size("n")?.unwrap_or(0);
    Ok(match meta.word("kind", "none")? {
        "none" => NullExperts::None,
        _ if n == 0 => NullExperts::None,
        "identity" => NullExperts::Identity(n),
        "zero" | "skip" => NullExperts::Zero(n),
        other => return Err(meta.unknown_value("kind", other)),
    })
}

/// Weights and their division; true if the file gives them.
fn read_weights(meta: &Fields, config: &mut RouterConfig, joint: usize) -> Result<bool> {
    let from = meta.word("from", "score")?;
    let renorm = meta.word("renorm", "none")?;
    let eps = meta.f32_or("eps", 0.0)?;
    let p = meta.number("p")?;
    config.scale = meta.f32_or("scale", 1.0)?;
    config.renorm = match renorm {
        "none" => Renorm::None,
        "sum" => Renorm::Sum,
        "sum_plus_eps" => Renorm::SumPlusEps(eps),
        "sum_clamp_min" => Renorm::SumClampMin(eps),
        "pnorm" => p.map_or(Renorm::None, |p| Renorm::PNorm(p as f32)),
        other => return Err(meta.unknown_value("renorm", other)),
    };
    match from {
        "score" | "sparsemixer" => {}
        "softmax_selected_logits" => config.weights = WeightSource::SoftmaxSelectedLogits,
        "joint_with_shared" => {
            // It normalises by itself.
            if !matches!(config.renorm, Renorm::None | Renorm::Sum) {
                return Err(meta.unknown_value("renorm", renorm));
            }
            config.renorm = Renorm::None;
            config.weights = WeightSource::JointWithShared;
            config.joint_shared = joint;
        }
        "given" => return Ok(true),
        other => return Err(meta.unknown_value("from", other)),
    }
    Ok(false)
}

fn read_selection(
    meta: &Fields,
    capacity: &Fields,
    config: &mut RouterConfig,
    tokens: usize,
    jitter_elsewhere: Option<f64>,
) -> Result<()> {
    let rank_by = meta.choice(
        "on",
        "score",
        &[("score", RankBy::Score), ("logit", RankBy::Logit)],
    )?;
    let groups = read_groups(meta)?;
    let jitter_eps = meta.number("jitter_eps")?.or(jitter_elsewhere);
    let stacked = meta.get("stacked").is_none() || meta.flag("stacked");
    let method = meta.word("method", "topk")?;
    config.selection = match method {
        "topk" | "capacity_top1" | "capacity_top2" => Selection::TopK { rank_by, groups },
        "given" => Selection::Given,
        "sparsemixer" => match jitter_eps {
            Some(eps) => Selection::SparseMixer {
                jitter_eps: eps as f32,
            },
            None => return malformed("field selection.jitter_eps is missing"),
        },
        "product_key" => Selection::ProductKeys { stacked },
        "dense" => Selection::Dense,
        "expert_choice" => Selection::ExpertChoice {
            per_expert: match meta.size("per_expert")?.or(capacity.size("per_expert")?) {
                Some(n) => n,
                None => return malformed("field selection.per_expert is missing"),
            },
        },
        other => return Err(meta.unknown_value("method", other)),
    };
    // Some methods have their own weights, whatever the file says of others.
    match method {
        "sparsemixer" => (config.weights, config.renorm) = (WeightSource::Score, Renorm::None),
        "product_key" => {
            config.weights = WeightSource::SoftmaxSelectedLogits;
            config.renorm = Renorm::None;
        }
        _ => {}
    }
    let expected_k = match method {
        "capacity_top1" => Some(1),
        "capacity_top2" | "sparsemixer" => Some(2),
        _ => None,
    };
    if expected_k.is_some_and(|k| k != config.top_k) {
        let k = config.top_k;
        return malformed(format!(
            "field selection.top_k is {k}, but the method is {method}"
        ));
    }
    if method == "expert_choice" {
        return Ok(());
    }
    let limit = read_capacity(capacity, tokens)?;
    match (limit, method) {
        (None, "capacity_top1" | "capacity_top2") => return malformed("field capacity is missing"),
        (Some(_), "capacity_top2") => {
            config.renorm = Renorm::SumClampMin(capacity.f32_or("eps", 0.0)?);
        }
        _ => {}
    }
    capacity.get("eps");
    config.capacity = limit;
    Ok(())
}

fn read_groups(meta: &Fields) -> Result<Option<GroupLimit>> {
    let score = meta.choice(
        "group_score",
        "none",
        &[
            ("none", None),
            ("max", Some(GroupScore::Max)),
            ("top2_sum", Some(GroupScore::Top2Sum)),
        ],
    )?;
    let fill = meta.choice(
        "masked_fill",
        "neg_inf",
        &[
            ("neg_inf", MaskedFill::NegInf),
            ("zero", MaskedFill::Zero),
            ("none", MaskedFill::NegInf),
        ],
    )?;
    let n_group = meta.size("n_group")?.unwrap_or(1);
    let topk_group = meta.size("topk_group")?.unwrap_or(1);
    Ok(score.filter(|_| n_group > 0).map(|score| GroupLimit {
        n_group,
        topk_group,
        score,
        fill,
    }))
}

fn read_capacity(meta: &Fields, tokens: usize) -> Result<Option<Capacity>> {
    if meta.is_absent() {
        return Ok(None);
    }
    let Some(per_expert) = meta.size("per_expert")? else {
        return malformed("field capacity.per_expert is missing");
    };
    let scope = meta.size("scope_tokens")?.unwrap_or(0);
    Ok(Some(Capacity {
        per_expert,
        scope_tokens: (scope > 0 && scope < tokens).then_some(scope),
        batch_prioritized: meta.flag("batch_prioritized"),
        normalize_before_drop: meta.flag("normalize_before_drop"),
    }))
}

fn read_logits(
    meta: &Fields,
    tensors: &mut Tensors,
    (tokens, hidden, columns): (usize, usize, usize),
    weights_given: bool,
) -> Result<Logits> {
    let input_norm = meta.word("input_norm", "none")?;
    let eps = meta.f32_or("input_norm_eps", 0.0)?;
    let mul = meta.f32_or("input_mul", 1.0)?;
    match meta.word("source", "linear")? {
        "given_logits" => {
            let logits = tensors.take("given_logits")?;
            tensors.expect_computed("given_logits", &logits)?;
            if logits.shape != [tokens, columns] {
                let found = &logits.shape;
                return malformed(format!(
                    "tensor given_logits: expected shape [{tokens}, {columns}], got {found:?}"
                ));
            }
            Ok(Logits::Given(logits.f32s("given_logits")?))
        }
        "linear" if weights_given && tensors.get("router_w").is_none() => Ok(Logits::None),
        "linear" => Ok(Logits::Linear {
            w: tensors.weight("router_w", &[columns, hidden])?,
            input_norm: match input_norm {
                "none" => None,
                "rms_scaled" => Some(InputNorm {
                    eps,
                    mul,
                    scale: tensors.vector("router_in_scale", hidden)?,
                }),
                other => return Err(meta.unknown_value("input_norm", other)),
            },
        }),
        "none" | "given" if weights_given => Ok(Logits::None),
        other => Err(meta.unknown_value("source", other)),
    }
}

/// `[E + null experts]`. Null experts and joint shared experts may be left out or in: they have a bias of 0, or none.
fn read_correction_bias(tensors: &mut Tensors, config: &RouterConfig) -> Result<Vec<f32>> {
    const NAME: &str = "correction_bias";
    let found = tensors.get(NAME).map_or(0, |t| t.shape.iter().product());
    let wanted = config.selectable();
    let len = match found {
        n if n == config.num_experts || n == config.num_logits() => n,
        _ => wanted,
    };
    let mut bias = tensors.vector(NAME, len)?;
    if len != wanted {
        tensors.note(format!(
            "tensor {NAME} has {len} elements for {wanted} experts"
        ));
        bias.resize(wanted, 0.0);
    }
    Ok(bias)
}

fn read_ids(tensors: &mut Tensors, tokens: usize, top_k: usize) -> Result<Vec<i32>> {
    let ids = tensors.take("given_ids")?;
    if ids.shape != [tokens, top_k] {
        let found = &ids.shape;
        return malformed(format!(
            "tensor given_ids: expected shape [{tokens}, {top_k}], got {found:?}"
        ));
    }
    ids.ids("given_ids")
}
