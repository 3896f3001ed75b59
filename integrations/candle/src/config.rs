//! Routers and activations from candle's configurations.
//!
//! What can be read: every field of `qwen3_moe::Config`, `qwen2_moe::Config` and `fused_moe::MoeCfg` is public. What cannot: those of `mixtral::Config`
//! and `deepseek2::DeepSeekV2Config` are private to candle-transformers, so that their numbers come from `config.json` once more: as arguments of
//! [`RouterConfig::mixtral`] and as a [`DeepSeekV2`]. `granitemoehybrid` has no experts in candle, in spite of its name.
//!
//! Two differences from candle's blocks. Routing is in f32 here, whatever the tensors' format; qwen2_moe, qwen3_moe and mixtral compute logits and softmax in the tensors'
//! format, so that in bf16 two experts of nearly the same score may change places. And K experts are summed in f32 and rounded once.

use candle_core::{Result, bail};
#[cfg(feature = "transformers")]
use candle_transformers::{
    fused_moe::MoeCfg,
    models::{qwen2_moe, qwen3_moe},
};
use moe_kernels::grouped_gemm::{Activation, ActivationFunction};
use moe_kernels::routing::{Renorm, RouterConfig};

/// Softmax, the K best, divided by their sum where `norm_topk_prob` says so: the router of Qwen2-MoE and Qwen3-MoE by its numbers.
pub fn softmax(num_experts: usize, top_k: usize, norm_topk_prob: bool) -> RouterConfig {
    let mut config = RouterConfig::new(num_experts, top_k);
    if norm_topk_prob {
        config.renorm = Renorm::Sum;
    }
    config
}

/// The router of Qwen3-MoE.
#[cfg(feature = "transformers")]
pub fn qwen3_moe(config: &qwen3_moe::Config) -> RouterConfig {
    softmax(
        config.num_experts,
        config.num_experts_per_tok,
        config.norm_topk_prob,
    )
}

/// The router of Qwen2-MoE (and Qwen1.5-MoE).
#[cfg(feature = "transformers")]
pub fn qwen2_moe(config: &qwen2_moe::Config) -> RouterConfig {
    softmax(
        config.num_experts,
        config.num_experts_per_tok,
        config.norm_topk_prob,
    )
}

/// The router of `FusedMoe` and `FusedMoeGGUF`.
#[cfg(feature = "transformers")]
pub fn fused_moe(config: &MoeCfg) -> RouterConfig {
    softmax(
        config.num_experts,
        config.num_experts_per_tok,
        config.norm_topk_prob,
    )
}

/// What DeepSeek-V2's layer needs of its `config.json`, under the names that it has there.
///
/// Only `topk_method` "greedy" (V2-Lite). For "group_limited_greedy" take [`RouterConfig::deepseek_v2_grouped`]; candle 0.11 selects the groups from the experts' scores
/// there, and differs from the published model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeepSeekV2 {
    /// E
    pub n_routed_experts: usize,
    /// K
    pub num_experts_per_tok: usize,
    /// Shared experts; the checkpoint holds them as one of so many times the width. 0 for none.
    pub n_shared_experts: usize,
    /// Whether the K weights are divided by their sum plus 1e-20; then they are not scaled.
    pub norm_topk_prob: bool,
    /// Factor on every weight, unless they are divided.
    pub routed_scaling_factor: f64,
    /// Activation of routed and shared experts.
    pub hidden_act: candle_nn::Activation,
}

/// The router of DeepSeek-V2-Lite.
pub fn deepseek2(config: &DeepSeekV2) -> RouterConfig {
    let scale = config.routed_scaling_factor as f32;
    let mut router =
        RouterConfig::deepseek_v2(config.n_routed_experts, config.num_experts_per_tok, scale);
    if config.norm_topk_prob && config.num_experts_per_tok > 1 {
        router.renorm = Renorm::SumPlusEps(1e-20);
        router.scale = 1.0;
    }
    router
}

/// The gated activation `act(x · W_gateᵀ) ⊙ (x · W_upᵀ)` with candle's `act`.
///
/// # Errors
/// An activation that the kernels do not have; it is named.
pub fn activation(act: candle_nn::Activation) -> Result<Activation> {
    use candle_nn::Activation as A;
    Ok(Activation::gated(match act {
        A::Silu | A::Swish => ActivationFunction::Silu,
        A::Gelu => ActivationFunction::Gelu,
        A::NewGelu | A::GeluPytorchTanh => ActivationFunction::GeluTanh,
        A::Relu => ActivationFunction::Relu,
        A::Relu2 => ActivationFunction::Relu2,
        other => {
            bail!("hidden_act: expected silu, gelu (erf or tanh), relu or relu2, got {other:?}")
        }
    }))
}
