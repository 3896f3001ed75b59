//! What a layer needs and its weights do not say: K, the router's switches. From `config.json` beside the weights; options come first.

use super::options::Options;
use super::{Result, fail};
use serde_json::Value;
use std::path::Path;

/// The settings that were found.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    pub model_type: Option<String>,
    pub top_k: Option<usize>,
    pub norm_topk: Option<bool>,
    pub n_group: Option<usize>,
    pub topk_group: Option<usize>,
    pub scale: Option<f32>,
    pub topk_method: Option<String>,
    pub hidden_act: Option<String>,
    pub router_jitter: Option<f32>,
    pub swiglu_limit: Option<f32>,
    /// Whether there was a `config.json`.
    pub from_config: bool,
}

impl Settings {
    /// Those of `config.json` in the directory of `weights`, overridden by `options`.
    pub fn read(weights: &Path, options: &Options) -> Result<Self> {
        let path = weights.with_file_name("config.json");
        let mut settings = match std::fs::read(&path) {
            Ok(text) => match serde_json::from_slice::<Value>(&text) {
                Ok(value) => Self::from_json(&value)
                    .map_err(|why| super::Failure(format!("{}: {why}", path.display())))?,
                Err(why) => return fail(format!("{}: no JSON: {why}", path.display())),
            },
            Err(why) if why.kind() == std::io::ErrorKind::NotFound => Self::default(),
            Err(why) => return fail(format!("{}: cannot be read: {why}", path.display())),
        };
        settings.top_k = options.top_k.or(settings.top_k);
        settings.norm_topk = options.norm_topk.or(settings.norm_topk);
        settings.n_group = options.n_group.or(settings.n_group);
        settings.topk_group = options.topk_group.or(settings.topk_group);
        settings.scale = options.scale.or(settings.scale);
        Ok(settings)
    }

    /// Whether DeepSeek-V2 limits the selection to groups: as the config says, or because groups were given without one.
    pub fn grouped(&self) -> bool {
        match self.topk_method.as_deref() {
            Some(method) => method == "group_limited_greedy",
            None => self.n_group.is_some_and(|n| n > 1),
        }
    }

    fn from_json(value: &Value) -> std::result::Result<Self, String> {
        // Models of text and images keep the text model's numbers one level deeper.
        let inner = value
            .get("text_config")
            .filter(|v| v.is_object())
            .unwrap_or(value);
        let find = |names: &[&str]| {
            let found = names
                .iter()
                .find_map(|name| inner.get(name).map(|v| (name.to_string(), v)));
            found.filter(|(_, v)| !v.is_null())
        };
        let size = |names: &[&str]| match find(names) {
            Some((name, v)) => match v.as_u64().and_then(|n| usize::try_from(n).ok()) {
                Some(n) => Ok(Some(n)),
                None => Err(format!("{name}: expected a whole number, got {v}")),
            },
            None => Ok(None),
        };
        let number = |names: &[&str]| match find(names) {
            Some((name, v)) => match v.as_f64() {
                Some(n) => Ok(Some(n as f32)),
                None => Err(format!("{name}: expected a number, got {v}")),
            },
            None => Ok(None),
        };
        let word = |names: &[&str]| find(names).and_then(|(_, v)| v.as_str().map(str::to_string));
        Ok(Self {
            model_type: word(&["model_type"]),
            top_k: size(&[
                "num_experts_per_tok",
                "num_experts_per_token",
                "experts_per_token",
                "moe_topk",
            ])?,
            norm_topk: find(&["norm_topk_prob"]).and_then(|(_, v)| v.as_bool()),
            n_group: size(&["n_group", "num_expert_group"])?,
            topk_group: size(&["topk_group"])?,
            scale: number(&["routed_scaling_factor"])?,
            topk_method: word(&["topk_method"]),
            hidden_act: word(&["hidden_act", "hidden_activation"]),
            router_jitter: number(&["router_jitter_noise"])?,
            swiglu_limit: number(&["swiglu_limit"])?,
            from_config: true,
        })
    }
}
