//! Whole layers from a `VarBuilder`, for the models of candle-transformers that have experts.
//!
//! Each function takes the builder that the model's own block takes (`vb.pp("mlp")`, Mixtral's `vb.pp("block_sparse_moe")`), reads the same
//! names and packs one expert at a time. Sizes come from the tensors. Candle's block for the model, which is private there, becomes superfluous.

use crate::config::{self, DeepSeekV2};
use crate::experts::{Expert, one_by_one};
use crate::layer::{MoeLayer, gate};
use crate::view::{refused, with_matrix};
use candle_core::Result;
use candle_nn::VarBuilder;
#[cfg(feature = "transformers")]
use candle_transformers::{
    fused_moe::MoeCfg,
    models::{qwen2_moe, qwen3_moe},
};
use moe_kernels::Cpu;
use moe_kernels::experts::PackedExperts;
use moe_kernels::grouped_gemm::Activation;
use moe_kernels::moe::{self, SharedCombine, SharedExperts};
use moe_kernels::routing::{Router, RouterConfig};

/// What an expert's gate, up and down projections are called.
pub type Names = [&'static str; 3];
/// In most models.
pub const PROJECTIONS: Names = ["gate_proj", "up_proj", "down_proj"];
/// In Mixtral.
pub const MIXTRAL: Names = ["w1", "w3", "w2"];

/// The tensors of one expert.
fn expert(vb: &VarBuilder, [gate, up, down]: Names) -> Result<Expert> {
    let weight = |name: &str| vb.pp(name).get_unchecked("weight");
    Ok(Expert {
        gate: weight(gate)?,
        up: weight(up)?,
        down: weight(down)?,
    })
}

/// The experts `experts.0`, `experts.1`, …
fn experts(
    cpu: &Cpu,
    vb: &VarBuilder,
    num_experts: usize,
    names: Names,
    activation: Activation,
) -> Result<PackedExperts> {
    let vb = vb.pp("experts");
    one_by_one(
        cpu,
        (0..num_experts).map(|e| expert(&vb.pp(e), names)),
        activation,
    )
}

/// Any layer of `gate` and `experts.N` without shared experts: what the functions below come to, for models that are not among them.
///
/// # Errors
/// A tensor that is missing, or of another shape than the rest; an activation that the kernels do not have.
pub fn routed(
    cpu: Cpu,
    router: RouterConfig,
    names: Names,
    act: candle_nn::Activation,
    vb: VarBuilder,
) -> Result<MoeLayer> {
    let experts = experts(
        &cpu,
        &vb,
        router.num_experts,
        names,
        config::activation(act)?,
    )?;
    MoeLayer::new(
        cpu,
        router,
        &vb.pp("gate").get_unchecked("weight")?,
        experts,
    )
}

/// As [`routed`], with one shared expert under the name `shared` whose output is added, or multiplied first by `σ(x · w)` with w `[1, H]` under the name `shared_gate`.
///
/// # Errors
/// As [`routed`].
pub fn with_shared(
    cpu: Cpu,
    router: RouterConfig,
    names: Names,
    act: candle_nn::Activation,
    vb: VarBuilder,
    shared: &str,
    shared_gate: Option<&str>,
) -> Result<MoeLayer> {
    let activation = config::activation(act)?;
    let experts = experts(&cpu, &vb, router.num_experts, names, activation)?;
    let shared = one_by_one(&cpu, [expert(&vb.pp(shared), names)], activation)?;
    let shared = match shared_gate.map(|name| vb.pp(name)) {
        Some(vb) => with_matrix("shared_expert_gate", &vb.get_unchecked("weight")?, |w| {
            SharedExperts::with_sigmoid_gate(&cpu, shared, w).map_err(refused)
        })?,
        None => SharedExperts::new(shared, SharedCombine::Add).map_err(refused)?,
    };
    let gate = gate(&cpu, &vb.pp("gate").get_unchecked("weight")?)?;
    let layer = Router::new(router)
        .and_then(|router| moe::MoeLayer::new(router, experts))
        .and_then(|layer| layer.with_gate(gate))
        .and_then(|layer| layer.with_shared(shared));
    Ok(MoeLayer::from_layer(cpu, layer.map_err(refused)?))
}

/// In place of qwen3_moe's `Qwen3SparseMoeBlock`: `gate`, `experts.N.{gate,up,down}_proj`.
///
/// # Errors
/// As [`routed`].
#[cfg(feature = "transformers")]
pub fn qwen3_moe(cpu: Cpu, config: &qwen3_moe::Config, vb: VarBuilder) -> Result<MoeLayer> {
    routed(
        cpu,
        config::qwen3_moe(config),
        PROJECTIONS,
        config.hidden_act,
        vb,
    )
}

/// In place of `fused_moe::FusedMoe`, whose experts run on CUDA only: the same names as [`qwen3_moe`](fn@qwen3_moe).
///
/// # Errors
/// As [`routed`].
#[cfg(feature = "transformers")]
pub fn fused_moe(cpu: Cpu, config: &MoeCfg, vb: VarBuilder) -> Result<MoeLayer> {
    routed(cpu, config::fused_moe(config), PROJECTIONS, config.act, vb)
}

/// In place of mixtral's `SparseMoeBlock`: `gate`, `experts.N.{w1,w2,w3}`. The numbers are `num_local_experts` and `num_experts_per_tok` of
/// `config.json`, which candle's `mixtral::Config` keeps to itself.
///
/// # Errors
/// As [`routed`].
pub fn mixtral(
    cpu: Cpu,
    num_local_experts: usize,
    num_experts_per_tok: usize,
    hidden_act: candle_nn::Activation,
    vb: VarBuilder,
) -> Result<MoeLayer> {
    let router = RouterConfig::mixtral(num_local_experts, num_experts_per_tok);
    routed(cpu, router, MIXTRAL, hidden_act, vb)
}

/// In place of qwen2_moe's `SparseMoeBlock`: as [`qwen3_moe`](fn@qwen3_moe), with `shared_expert.{gate,up,down}_proj` and `shared_expert_gate`.
///
/// # Errors
/// As [`routed`].
#[cfg(feature = "transformers")]
pub fn qwen2_moe(cpu: Cpu, config: &qwen2_moe::Config, vb: VarBuilder) -> Result<MoeLayer> {
    let router = config::qwen2_moe(config);
    let (shared, gate) = ("shared_expert", Some("shared_expert_gate"));
    with_shared(
        cpu,
        router,
        PROJECTIONS,
        config.hidden_act,
        vb,
        shared,
        gate,
    )
}

/// In place of deepseek2's `Moe`: as [`qwen3_moe`](fn@qwen3_moe), with `shared_experts.{gate,up,down}_proj` where there are shared experts.
///
/// # Errors
/// As [`routed`].
pub fn deepseek2(cpu: Cpu, config: &DeepSeekV2, vb: VarBuilder) -> Result<MoeLayer> {
    let router = config::deepseek2(config);
    if config.n_shared_experts == 0 {
        return routed(cpu, router, PROJECTIONS, config.hidden_act, vb);
    }
    let shared = "shared_experts";
    with_shared(
        cpu,
        router,
        PROJECTIONS,
        config.hidden_act,
        vb,
        shared,
        None,
    )
}
