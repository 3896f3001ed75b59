//! How published checkpoints name a layer's tensors.
//!
//! After `…layers.N.`, with E experts, H hidden, I intermediate:
//!
//! | families | router | experts |
//! |---|---|---|
//! | Mixtral, Phi-3.5-MoE, MiniMax-M2 | `block_sparse_moe.gate` | `block_sparse_moe.experts.{e}.w1` (gate), `w3` (up) `[I,H]`, `w2` (down) `[H,I]` |
//! | Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V2, -V3, GLM, Kimi | `mlp.gate` | `mlp.experts.{e}.gate_proj`, `up_proj`, `down_proj` |
//! | Jamba | `feed_forward.router` | `feed_forward.experts.{e}.gate_proj`, … |
//! | GraniteMoE | `block_sparse_moe.router.layer` | `block_sparse_moe.input_linear [E,2I,H]`, `output_linear [E,H,I]` |
//! | Mixtral, Qwen and others as transformers 5 holds them | `mlp.gate` | `mlp.experts.gate_up_proj [E,2I,H]`, `mlp.experts.down_proj [E,H,I]` |
//! | gpt-oss | `mlp.router`, with a bias | `mlp.experts.gate_up_proj [E,H,2I]` interleaved, `down_proj [E,I,H]`, each with a bias |
//! | Llama 4 | `feed_forward.router` | `feed_forward.experts.gate_up_proj [E,H,2I]`, `down_proj [E,I,H]` |
//!
//! Shared experts: `mlp.shared_expert` with `mlp.shared_expert_gate` (Qwen2-MoE), `mlp.shared_experts` (DeepSeek), `feed_forward.shared_expert` (Llama 4).

use super::options::Options;
use super::settings::Settings;
use super::{Result, fail};
use moe_kernels::routing::{Renorm, RouterConfig};

/// How the experts' matrices lie.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Layout {
    /// Three matrices for each expert; the names of gate, up and down.
    Separate([&'static str; 3]),
    /// `[E,2I,H]` gate rows first, and `[E,H,I]`.
    FusedOutFirst,
    /// `[E,H,2I]` gate columns first, and `[E,I,H]` (Llama 4).
    FusedInFirst,
    /// `[E,H,2I]` columns alternating, and `[E,I,H]`, all with biases (gpt-oss).
    InterleavedInFirst,
}

/// The names in one layer.
#[derive(Clone, Debug)]
pub struct Naming {
    /// What all names begin with, `model.layers.3.mlp.` for example.
    pub block: String,
    pub router: String,
    pub layout: Layout,
    /// The two fused tensors, where there are.
    pub fused: [String; 2],
    pub shared: Option<String>,
    pub family: Family,
}

/// Families whose routers or experts differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Mixtral,
    PhiMoe,
    MinimaxM2,
    Granite,
    Qwen2Moe,
    Qwen3Moe,
    Olmoe,
    Jamba,
    DeepseekV2,
    DeepseekV3,
    GptOss,
    Llama4,
}

impl Family {
    fn of_model_type(name: &str) -> Option<Self> {
        Some(match name.trim_end_matches("_text") {
            "mixtral" => Self::Mixtral,
            "phimoe" => Self::PhiMoe,
            "minimax_m2" => Self::MinimaxM2,
            "granitemoe" | "granitemoeshared" | "granitemoehybrid" => Self::Granite,
            "qwen2_moe" => Self::Qwen2Moe,
            // Shared expert or not is seen in the tensors; the router is that of Qwen3.
            "qwen3_moe" | "qwen3_next" | "qwen3_vl_moe" | "qwen3_5_moe" => Self::Qwen3Moe,
            "olmoe" | "flex_olmo" => Self::Olmoe,
            "jamba" => Self::Jamba,
            "deepseek_v2" => Self::DeepseekV2,
            "deepseek_v3" | "deepseek_v32" | "glm4_moe" | "kimi_k2" | "dots1" => Self::DeepseekV3,
            "gpt_oss" => Self::GptOss,
            "llama4" => Self::Llama4,
            _ => return None,
        })
    }

    /// Whether the weights may or may not be divided by their sum, as the config says.
    fn has_norm_switch(self) -> bool {
        matches!(
            self,
            Self::Qwen2Moe | Self::Qwen3Moe | Self::Olmoe | Self::DeepseekV3 | Self::MinimaxM2
        )
    }

    /// Whether the router has groups of experts and a factor.
    fn has_groups(self) -> bool {
        matches!(self, Self::DeepseekV2 | Self::DeepseekV3)
    }

    /// Refuses options that mean nothing for this family's router: they would be ignored.
    pub fn check_options(self, options: &Options) -> Result<()> {
        let given = [
            (
                "--norm-topk",
                options.norm_topk.is_some(),
                self.has_norm_switch(),
            ),
            ("--n-group", options.n_group.is_some(), self.has_groups()),
            (
                "--topk-group",
                options.topk_group.is_some(),
                self.has_groups(),
            ),
            ("--scale", options.scale.is_some(), self.has_groups()),
        ];
        match given.into_iter().find(|(_, given, used)| *given && !used) {
            Some((name, ..)) => fail(format!(
                "{name}: the router of {self:?} has no such setting"
            )),
            None => Ok(()),
        }
    }

    /// What the weights alone leave open, for the user to know.
    pub fn open_settings(self, settings: &Settings) -> Option<&'static str> {
        let open = settings.n_group.is_none() || settings.scale.is_none();
        (self.has_groups() && open).then_some(
            "without groups or a factor unless given: DeepSeek-V3 has --n-group 8 --topk-group 4 --scale 2.5",
        )
    }

    /// The router, with E experts. Of the settings that are neither in the config nor given, K is asked for; groups and the factor are none, and
    /// the others have the family's published value.
    pub fn router(self, experts: usize, settings: &Settings) -> Result<RouterConfig> {
        let k = match (settings.top_k, self) {
            (Some(k), _) => k,
            (None, Self::PhiMoe) => 2,
            (None, _) => {
                return fail(
                    "K, the experts of a token, is not in the weights: give --top-k, or put the model's config.json beside the file",
                );
            }
        };
        let scale = settings.scale.unwrap_or(1.0);
        let groups = (
            settings.n_group.unwrap_or(1),
            settings.topk_group.unwrap_or(1),
        );
        let mut config = match self {
            Self::Mixtral => RouterConfig::mixtral(experts, k),
            Self::PhiMoe if k != 2 => {
                return fail(format!("Phi-3.5-MoE's router selects 2 experts, not {k}"));
            }
            Self::PhiMoe => RouterConfig::phimoe(experts, settings.router_jitter.unwrap_or(0.01)),
            Self::MinimaxM2 => RouterConfig::minimax_m2(experts, k),
            Self::Granite => RouterConfig::granite(experts, k),
            Self::Qwen3Moe => RouterConfig::qwen3_moe(experts, k),
            Self::Qwen2Moe | Self::Olmoe | Self::Jamba => RouterConfig::qwen2_moe(experts, k),
            Self::DeepseekV2 if settings.grouped() => {
                RouterConfig::deepseek_v2_grouped(experts, k, groups.0, groups.1, scale)
            }
            Self::DeepseekV2 => RouterConfig::deepseek_v2(experts, k, scale),
            Self::DeepseekV3 => RouterConfig::deepseek_v3(experts, k, groups.0, groups.1, scale),
            Self::GptOss => RouterConfig::gpt_oss(experts, k),
            Self::Llama4 => RouterConfig::llama4(experts, k),
        };
        match settings.norm_topk.filter(|_| self.has_norm_switch()) {
            Some(true) if config.renorm == Renorm::None => config.renorm = Renorm::Sum,
            Some(false) => config.renorm = Renorm::None,
            _ => {}
        }
        config.validate()?;
        Ok(config)
    }
}

/// Finds the block of experts of layer `layer` among all names of a checkpoint, and says what is wrong where there is none.
pub fn detect(names: &[&str], layer: usize, settings: &Settings) -> Result<(Naming, Vec<String>)> {
    let marker = format!("layers.{layer}.");
    // The part before the name within the layer; "mlp.experts.0" has a layer number nowhere else.
    let inside = |name: &str| {
        let at = name
            .match_indices(&marker)
            .find(|(at, _)| *at == 0 || name[..*at].ends_with('.'))?
            .0;
        Some(at + marker.len())
    };
    let mut blocks: Vec<String> = Vec::new();
    let mut dense = None;
    for name in names {
        let Some(at) = inside(name) else { continue };
        for block in ["mlp.", "block_sparse_moe.", "feed_forward."] {
            let Some(rest) = name[at..].strip_prefix(block) else {
                continue;
            };
            let block = format!("{}{block}", &name[..at]);
            if rest.starts_with("experts.") || rest == "input_linear.weight" {
                if !blocks.contains(&block) {
                    blocks.push(block);
                }
            } else {
                dense = Some(name.to_string());
            }
        }
    }
    match blocks.as_slice() {
        [block] => name_block(block, names, settings),
        [] if dense.is_some() => {
            let name = dense.unwrap_or_default();
            fail(format!(
                "layer {layer} has no experts: it has {name}; choose another with --layer"
            ))
        }
        [] => fail(format!(
            "layer {layer} has no experts in this file; {}",
            layers_with_experts(names)
        )),
        _ => fail(format!(
            "layer {layer} is there {} times: {}",
            blocks.len(),
            blocks.join(", ")
        )),
    }
}

/// Which layers there are, for whoever chose a wrong one.
fn layers_with_experts(names: &[&str]) -> String {
    let number = |name: &&str| -> Option<usize> {
        let (before, after) = name.split_once("layers.")?;
        let (number, rest) = after.split_once('.')?;
        let moe = rest.contains("experts.") || rest.contains("input_linear");
        (moe && (before.is_empty() || before.ends_with('.'))).then(|| number.parse().ok())?
    };
    let mut layers: Vec<usize> = names.iter().filter_map(number).collect();
    layers.sort_unstable();
    layers.dedup();
    match layers.as_slice() {
        [] => {
            "no name has the form …layers.N.{mlp, block_sparse_moe, feed_forward}.experts.…".into()
        }
        some => {
            let shown: Vec<String> = some.iter().take(12).map(usize::to_string).collect();
            let more = if some.len() > 12 { ", …" } else { "" };
            format!("layers with experts: {}{more}", shown.join(", "))
        }
    }
}

fn name_block(block: &str, names: &[&str], settings: &Settings) -> Result<(Naming, Vec<String>)> {
    let has = |name: &str| names.contains(&format!("{block}{name}").as_str());
    let any = |prefix: &str| {
        names
            .iter()
            .any(|n| n.strip_prefix(block).is_some_and(|n| n.starts_with(prefix)))
    };
    let mut notes = Vec::new();
    if any("experts.gate_up_proj_blocks") || any("experts.gate_up_proj_scales") {
        return fail(format!(
            "{block}experts.gate_up_proj_blocks: MXFP4 experts are not read yet; convert the checkpoint to bf16"
        ));
    }
    if names.iter().any(|n| {
        n.starts_with(block) && (n.ends_with("weight_scale_inv") || n.ends_with(".qweight"))
    }) {
        return fail(format!(
            "{block}…: quantised experts (weight_scale_inv, qweight) are not read yet; convert the checkpoint to bf16"
        ));
    }
    let from_config = settings
        .model_type
        .as_deref()
        .and_then(Family::of_model_type);
    let first = |candidates: &[&str]| {
        candidates
            .iter()
            .find(|name| has(name))
            .map(|name| format!("{block}{name}"))
    };
    let corrected = has("gate.e_score_correction_bias") || has("e_score_correction_bias");

    let (layout, by_name) = if has("input_linear.weight") {
        (Layout::FusedOutFirst, Family::Granite)
    } else if has("experts.gate_up_proj") || has("experts.down_proj") {
        let in_first = block.ends_with("feed_forward.");
        if has("router.weight") && !in_first {
            (Layout::InterleavedInFirst, Family::GptOss)
        } else if in_first {
            (Layout::FusedInFirst, Family::Llama4)
        } else {
            (Layout::FusedOutFirst, mlp_family(corrected, &any))
        }
    } else if block.ends_with("block_sparse_moe.") {
        let family = if corrected {
            Family::MinimaxM2
        } else {
            Family::Mixtral
        };
        (Layout::Separate(["w1", "w3", "w2"]), family)
    } else {
        let family = if block.ends_with("feed_forward.") {
            Family::Jamba
        } else {
            mlp_family(corrected, &any)
        };
        (
            Layout::Separate(["gate_proj", "up_proj", "down_proj"]),
            family,
        )
    };
    let family = from_config.unwrap_or(by_name);
    if let (Some(name), None) = (&settings.model_type, from_config) {
        notes.push(format!(
            "model_type {name:?} is not known; the names say {by_name:?}"
        ));
    }
    if from_config.is_none() {
        notes.push(format!(
            "{family:?} by the names of its tensors; a config.json beside the file would be certain"
        ));
        if settings.norm_topk.is_none() && matches!(by_name, Family::Qwen3Moe) {
            notes.push("weights are divided by their sum, as in Qwen3 and Mixtral; for OLMoE give --norm-topk false".into());
        }
    }
    let fused = match layout {
        Layout::FusedOutFirst if family == Family::Granite && has("input_linear.weight") => {
            ["input_linear.weight", "output_linear.weight"]
        }
        _ => ["experts.gate_up_proj", "experts.down_proj"],
    };
    let router = first(&["gate.weight", "router.weight", "router.layer.weight"]);
    let shared = ["shared_expert.", "shared_experts."]
        .into_iter()
        .find(|s| any(s));
    Ok((
        Naming {
            block: block.into(),
            router: router.unwrap_or_else(|| format!("{block}gate.weight")),
            layout,
            fused: fused.map(|name| format!("{block}{name}")),
            shared: shared.map(|s| format!("{block}{s}")),
            family,
        },
        notes,
    ))
}

/// Families that call the block `mlp` and the router `gate`.
fn mlp_family(corrected: bool, any: &dyn Fn(&str) -> bool) -> Family {
    if corrected {
        Family::DeepseekV3
    } else if any("shared_experts.") {
        Family::DeepseekV2
    } else if any("shared_expert.") {
        Family::Qwen2Moe
    } else {
        Family::Qwen3Moe
    }
}
