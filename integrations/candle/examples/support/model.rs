//! The one-layer models, and what stands in them beside the block.

use super::weights::{Source, block_prefix};
use super::{Family, Sizes};
use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::{Activation, RmsNorm};
use candle_transformers::models::{deepseek2, mixtral, qwen2_moe, qwen3_moe};
use moe_kernels_candle::config::DeepSeekV2;
use moe_kernels_candle::{Cpu, MoeLayer, models};
use serde_json::{Value, json};

/// See the module's documentation.
const EPS: f64 = 262144.0;

/// Candle's model. Where its cache of keys cannot be emptied, a fresh clone runs.
pub enum Theirs {
    Qwen3(qwen3_moe::Model, Option<qwen3_moe::Model>),
    Mixtral(mixtral::Model, Option<mixtral::Model>),
    Qwen2(qwen2_moe::Model),
    DeepSeek2(Box<deepseek2::DeepSeekV2>),
}

fn parse<T: serde::de::DeserializeOwned>(value: Value) -> Result<T> {
    serde_json::from_value(value).map_err(candle_core::Error::wrap)
}

/// The fields of `config.json` that all four read.
fn config(sizes: Sizes, more: Value) -> Value {
    let mut config = json!({
        "vocab_size": sizes.vocab, "hidden_size": sizes.hidden, "intermediate_size": 1, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 8, "tie_word_embeddings": false,
        "rope_theta": 10000.0, "rms_norm_eps": EPS, "hidden_act": "silu", "sliding_window": 8, "max_window_layers": 1,
        "use_sliding_window": false, "decoder_sparse_step": 1, "moe_intermediate_size": sizes.intermediate,
        "num_experts_per_tok": sizes.top_k, "num_experts": sizes.experts, "attention_bias": false,
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    config
}

pub fn qwen3_config(sizes: Sizes) -> Result<qwen3_moe::Config> {
    parse(config(
        sizes,
        json!({ "head_dim": 2, "norm_topk_prob": true }),
    ))
}

pub fn qwen2_config(sizes: Sizes) -> Result<qwen2_moe::Config> {
    let more = json!({ "norm_topk_prob": false, "shared_expert_intermediate_size": sizes.shared });
    parse(config(sizes, more))
}

fn mixtral_config(sizes: Sizes) -> Result<mixtral::Config> {
    // Attention over one position costs its projections, whose width is H whatever the heads; fewer keys make half of them narrow.
    let heads = if sizes.hidden.is_multiple_of(64) {
        sizes.hidden / 64
    } else {
        1
    };
    let more = json!({
        "num_attention_heads": heads, "num_local_experts": sizes.experts,
        "intermediate_size": sizes.intermediate, "use_flash_attn": false,
    });
    parse(config(sizes, more))
}

pub fn deepseek2_numbers(sizes: Sizes) -> DeepSeekV2 {
    DeepSeekV2 {
        n_routed_experts: sizes.experts,
        num_experts_per_tok: sizes.top_k,
        n_shared_experts: sizes.shared / sizes.intermediate,
        norm_topk_prob: false,
        routed_scaling_factor: 1.5,
        hidden_act: Activation::Silu,
    }
}

fn deepseek2_config(sizes: Sizes) -> Result<deepseek2::DeepSeekV2Config> {
    let n = deepseek2_numbers(sizes);
    let more = json!({
        "n_shared_experts": n.n_shared_experts, "n_routed_experts": n.n_routed_experts, "norm_topk_prob": n.norm_topk_prob,
        "routed_scaling_factor": n.routed_scaling_factor, "qk_rope_head_dim": 2, "kv_lora_rank": 2, "v_head_dim": 2,
        "qk_nope_head_dim": 2, "n_group": 1, "topk_group": 1,
    });
    parse(config(sizes, more))
}

impl Theirs {
    pub fn new(family: Family, sizes: Sizes, source: &Source) -> Result<Self> {
        let vb = source.var_builder();
        Ok(match family {
            Family::Qwen3 => Self::Qwen3(qwen3_moe::Model::new(&qwen3_config(sizes)?, vb)?, None),
            Family::Mixtral => {
                Self::Mixtral(mixtral::Model::new(&mixtral_config(sizes)?, vb)?, None)
            }
            Family::Qwen2 => Self::Qwen2(qwen2_moe::Model::new(&qwen2_config(sizes)?, vb)?),
            Family::DeepSeek2 => {
                let model = deepseek2::DeepSeekV2::new(&deepseek2_config(sizes)?, vb)?;
                Self::DeepSeek2(Box::new(model))
            }
        })
    }

    /// The same model around one expert of width 1: what it costs beside the block, and a little of what the block costs.
    pub fn rest(family: Family, sizes: Sizes, source: &Source) -> Result<Self> {
        let one = Sizes {
            experts: 1,
            top_k: 1,
            intermediate: 1,
            shared: 1,
            ..sizes
        };
        Self::new(family, one, source)
    }

    /// Empties the cache of keys, so that the next call is like the first.
    pub fn prepare(&mut self) {
        match self {
            Self::Qwen3(model, fresh) => *fresh = Some(model.clone()),
            Self::Mixtral(model, fresh) => *fresh = Some(model.clone()),
            Self::Qwen2(model) => model.clear_kv_cache(),
            Self::DeepSeek2(model) => model.clear_kv_cache(),
        }
    }

    /// The model on the first `tokens` rows of its embedding: `[T, 1, ..]`. After [`prepare`](Self::prepare).
    pub fn forward(&mut self, ids: &Tensor) -> Result<Tensor> {
        match self {
            Self::Qwen3(model, fresh) => fresh.as_mut().unwrap_or(model).forward(ids, 0),
            Self::Mixtral(model, fresh) => fresh.as_mut().unwrap_or(model).forward(ids, 0),
            Self::Qwen2(model) => model.forward(ids, 0),
            Self::DeepSeek2(model) => model.forward(ids, 0),
        }
    }
}

/// Ids `[T, 1]` of the first T rows of the embedding.
pub fn ids(tokens: usize) -> Result<Tensor> {
    Tensor::arange(0u32, tokens as u32, &Device::Cpu)?.reshape((tokens, 1))
}

/// Our layer from the tensors that their block reads.
pub fn ours(family: Family, sizes: Sizes, source: &Source) -> Result<MoeLayer> {
    let vb = source.var_builder().pp(block_prefix(family));
    let cpu = Cpu::new();
    match family {
        Family::Qwen3 => models::qwen3_moe(cpu, &qwen3_config(sizes)?, vb),
        Family::Mixtral => models::mixtral(cpu, sizes.experts, sizes.top_k, Activation::Silu, vb),
        Family::Qwen2 => models::qwen2_moe(cpu, &qwen2_config(sizes)?, vb),
        Family::DeepSeek2 => models::deepseek2(cpu, &deepseek2_numbers(sizes), vb),
    }
}

/// What stands around the block, by the operations that the models call.
pub struct Around {
    embedding: Tensor,
    before: RmsNorm,
    after: RmsNorm,
    features: usize,
}

impl Around {
    pub fn new(sizes: Sizes, source: &Source) -> Result<Self> {
        let norm = |weight: f32| -> Result<RmsNorm> {
            let weight =
                Tensor::full(weight, sizes.hidden, &Device::Cpu)?.to_dtype(source.dtype)?;
            Ok(RmsNorm::new(weight, EPS))
        };
        Ok(Self {
            embedding: source.tensor("model.embed_tokens.weight")?,
            before: norm(32768.0)?,
            after: norm(512.0)?,
            features: sizes.hidden.min(sizes.vocab),
        })
    }

    /// The block's input `[T, 1, H]`.
    pub fn input(&self, tokens: usize) -> Result<Tensor> {
        self.before
            .forward(&self.embedding.narrow(0, 0, tokens)?)?
            .unsqueeze(1)
    }

    /// What the model makes of the block's output: `[T, features]` in f32.
    pub fn output(&self, block: &Tensor) -> Result<Tensor> {
        let tokens = block.dim(0)?;
        let x = self.embedding.narrow(0, 0, tokens)?;
        self.features(
            &self
                .after
                .forward(&(x + block.reshape(((), block.dim(2)?))?)?)?,
        )
    }

    /// The features that every model answers with.
    pub fn features(&self, y: &Tensor) -> Result<Tensor> {
        let y = y.reshape((y.dim(0)?, ()))?.narrow(1, 0, self.features)?;
        y.to_dtype(DType::F32)
    }
}
