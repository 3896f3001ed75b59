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
use candle_transformers::fused_moe::MoeCfg;
use candle_transformers::models::{qwen2_moe, qwen3_moe};
use moe_kernels::Cpu;
use moe_kernels::experts::PackedExperts;
use moe_kernels::grouped_gemm::Activation;
use moe_kernels::moe::{self, SharedCombine, SharedExperts};
use moe_kernels::routing::{Router, RouterConfig};

/// The projections of an expert, as most models name them.
const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];
/// As Mixtral names them.
const MIXTRAL: [&str; 3] = ["w1", "w3", "w2"];

/// The tensors of one expert.
fn expert(vb: &VarBuilder, [gate, up, down]: [&str; 3]) -> Result<Expert> {
    let weight = |name: &str| vb.pp(name).get_unchecked("weight");
    Ok(Expert {
        gate: weight(gate)?,
        up: weight(up)?,
        down: weight(down)?,
    })
}

/// The experts `experts.0`, `experts.1`, …
fn routed(
    cpu: &Cpu,
    vb: &VarBuilder,
    num_experts: usize,
    names: [&str; 3],
    activation: Activation,
) -> Result<PackedExperts> {
    let vb = vb.pp("experts");
    one_by_one(
        cpu,
        (0..num_experts).map(|e| expert(&vb.pp(e), names)),
        activation,
    )
}

/// A layer without shared experts.
fn plain(
    cpu: Cpu,
    vb: &VarBuilder,
    router: RouterConfig,
    names: [&str; 3],
    act: candle_nn::Activation,
) -> Result<MoeLayer> {
    let experts = routed(
        &cpu,
        vb,
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

/// A layer with one shared expert, added, or behind a sigmoid gate.
fn with_shared(
    cpu: Cpu,
    vb: &VarBuilder,
    router: RouterConfig,
    activation: Activation,
    shared: &VarBuilder,
    shared_gate: Option<&VarBuilder>,
) -> Result<MoeLayer> {
    let experts = routed(&cpu, vb, router.num_experts, PROJECTIONS, activation)?;
    let shared = one_by_one(&cpu, [expert(shared, PROJECTIONS)], activation)?;
    let shared = match shared_gate {
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
/// A tensor that is missing, or of another shape than the rest; an activation that the kernels do not have.
pub fn qwen3_moe(cpu: Cpu, config: &qwen3_moe::Config, vb: VarBuilder) -> Result<MoeLayer> {
    plain(
        cpu,
        &vb,
        config::qwen3_moe(config),
        PROJECTIONS,
        config.hidden_act,
    )
}

/// In place of `fused_moe::FusedMoe`, whose experts run on CUDA only: the same names as [`qwen3_moe`].
///
/// # Errors
/// As [`qwen3_moe`].
pub fn fused_moe(cpu: Cpu, config: &MoeCfg, vb: VarBuilder) -> Result<MoeLayer> {
    plain(cpu, &vb, config::fused_moe(config), PROJECTIONS, config.act)
}

/// In place of mixtral's `SparseMoeBlock`: `gate`, `experts.N.{w1,w2,w3}`. The numbers are `num_local_experts` and `num_experts_per_tok` of
/// `config.json`, which candle's `mixtral::Config` keeps to itself.
///
/// # Errors
/// As [`qwen3_moe`].
pub fn mixtral(
    cpu: Cpu,
    num_local_experts: usize,
    num_experts_per_tok: usize,
    hidden_act: candle_nn::Activation,
    vb: VarBuilder,
) -> Result<MoeLayer> {
    let router = RouterConfig::mixtral(num_local_experts, num_experts_per_tok);
    plain(cpu, &vb, router, MIXTRAL, hidden_act)
}

/// In place of qwen2_moe's `SparseMoeBlock`: as [`qwen3_moe`](fn@qwen3_moe), with `shared_expert.{gate,up,down}_proj` and `shared_expert_gate`.
///
/// # Errors
/// As [`qwen3_moe`](fn@qwen3_moe).
pub fn qwen2_moe(cpu: Cpu, config: &qwen2_moe::Config, vb: VarBuilder) -> Result<MoeLayer> {
    let (router, activation) = (
        config::qwen2_moe(config),
        config::activation(config.hidden_act)?,
    );
    let (shared, gate) = (vb.pp("shared_expert"), vb.pp("shared_expert_gate"));
    with_shared(cpu, &vb, router, activation, &shared, Some(&gate))
}

/// In place of deepseek2's `Moe`: as [`qwen3_moe`](fn@qwen3_moe), with `shared_experts.{gate,up,down}_proj` where there are shared experts.
///
/// # Errors
/// As [`qwen3_moe`](fn@qwen3_moe).
pub fn deepseek2(cpu: Cpu, config: &DeepSeekV2, vb: VarBuilder) -> Result<MoeLayer> {
    let router = config::deepseek2(config);
    if config.n_shared_experts == 0 {
        return plain(cpu, &vb, router, PROJECTIONS, config.hidden_act);
    }
    let activation = config::activation(config.hidden_act)?;
    with_shared(cpu, &vb, router, activation, &vb.pp("shared_experts"), None)
}
