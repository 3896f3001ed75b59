//! Runs a case through the crate's public API.

use super::case::{Case, Latent, Layer, Loss, LossKind, Norm, Task};
use super::mlp::{Combine, Mlp, Shared, matrix};
use super::out::Output;
use super::router::{Gate, Logits};
use moe_kernels::experts::PackedExperts;
use moe_kernels::losses::{LossScratch, load_balancing, router_z, switch_load_balancing};
use moe_kernels::moe::{
    self, Forward, MoeLayer, PostNorm, RouteFrom, SharedCombine, SharedExperts,
};
use moe_kernels::norm::RmsNorm;
use moe_kernels::routing::{GivenRouting, RouteInput, Router, Routing};
use moe_kernels::{Cpu, DType, Isa, MatMut, MatRef, Result};

/// What runs the cases.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    pub cpu: Cpu,
    /// Format of the packed weights; each tensor's own if `None`.
    pub dtype: Option<DType>,
}

impl Machine {
    /// An ISA by name, or what `MOE_KERNELS_ISA` says.
    pub fn new(isa: Option<Isa>, dtype: Option<DType>) -> Result<Self> {
        let cpu = match isa {
            Some(isa) => Cpu::with_isa(isa)?,
            None => Cpu::from_env()?,
        };
        Ok(Self { cpu, dtype })
    }
}

/// `router_logits`, `topk_ids`, `topk_weights` and `y` of a layer; `value`, `value_f64` and `grad_logits` of a loss.
pub fn run(machine: &Machine, case: &Case) -> Result<Vec<Output>> {
    match &case.task {
        Task::Layer(layer) => run_layer(machine, layer),
        Task::Loss(loss) => run_loss(machine, loss),
    }
}

fn run_layer(machine: &Machine, case: &Layer) -> Result<Vec<Output>> {
    let cpu = &machine.cpu;
    let layer = build(machine, case)?;
    let (tokens, hidden) = (case.tokens, case.hidden);
    let x = MatRef::new(&case.x, tokens, hidden)?.into();
    let mut workspace = vec![0u8; layer.workspace_size(cpu, tokens)?];
    let mut routing = Routing::with_capacity(tokens, layer.router())?;
    let mut outputs = Vec::new();

    let columns = case.gate.config.num_logits();
    let given_ids = case.gate.given_ids.as_deref();
    let mut logits = vec![f32::NAN; tokens * columns];
    match &case.gate.logits {
        Logits::Linear { .. } => {
            let out = MatMut::new(&mut logits, tokens, columns)?;
            layer.logits_into(cpu, x, out, &mut workspace)?;
        }
        Logits::Given(given) => logits = biased(given, case.gate.bias.as_deref()),
        Logits::None => {}
    }
    let route = if let Some(weights) = &case.gate.given_weights {
        let config = &case.gate.config;
        let ids = given_ids.unwrap_or_default();
        let given = GivenRouting::new(config.num_experts, config.top_k, ids, weights);
        routing.set_given(cpu, &given.null_experts(config.null_experts))?;
        RouteFrom::Routing
    } else {
        let given = MatRef::new(&logits, tokens, columns)?;
        let mut input = RouteInput::new(given);
        if let Some(ids) = given_ids {
            input = input.given_ids(ids);
        }
        let mut effective = vec![f32::NAN; tokens * columns];
        let out = MatMut::new(&mut effective, tokens, columns)?;
        layer.router().effective_logits_into(cpu, &input, out)?;
        outputs.push(Output::f32("router_logits", &[tokens, columns], effective));
        match (&case.gate.logits, given_ids) {
            (Logits::Linear { .. }, None) => RouteFrom::Gate,
            (Logits::Linear { .. }, Some(ids)) => RouteFrom::GateAndIds(ids),
            (_, None) => RouteFrom::Logits(given.into()),
            (_, Some(ids)) => RouteFrom::LogitsAndIds(given.into(), ids),
        }
    };

    let mut y = vec![f32::NAN; tokens * hidden];
    let forward = Forward {
        route,
        ..Forward::default()
    };
    let out = MatMut::new(&mut y, tokens, hidden)?.into();
    layer.forward_with(cpu, x, &forward, out, &mut routing, &mut workspace)?;
    let shape = [tokens, routing.slots()];
    outputs.push(Output::i32("topk_ids", &shape, routing.ids().to_vec()));
    outputs.push(Output::f32(
        "topk_weights",
        &shape,
        routing.weights().to_vec(),
    ));
    outputs.push(Output::f32("y", &[tokens, hidden], y));
    Ok(outputs)
}

/// Logits from outside with the router's bias, if it has one.
pub fn biased(logits: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    let Some(bias) = bias else {
        return logits.to_vec();
    };
    let bias = bias.iter().cycle();
    logits.iter().zip(bias).map(|(z, b)| z + b).collect()
}

/// The layer that a case describes.
pub fn build(machine: &Machine, case: &Layer) -> Result<MoeLayer> {
    let cpu = &machine.cpu;
    let router = build_router(&case.gate)?;
    let experts = pack(machine, &case.experts)?;
    let mut layer = match &case.latent {
        Some(latent) => {
            MoeLayer::new_latent(router, experts, build_latent(machine, latent, case.hidden)?)?
        }
        None => MoeLayer::new(router, experts)?,
    };
    if let Some(gate) = build_gate(cpu, case)? {
        layer = layer.with_gate(gate)?;
    }
    if case.weight_on_input {
        layer = layer.with_weight_on_input();
    }
    if let Some(post) = &case.post_norm {
        layer = layer.with_post_norm(PostNorm::ScaleFirst(rms_norm(&post.0)?))?;
    }
    layer = layer.with_routed_scale(case.routed_out_scale)?;
    if let Some(shared) = &case.shared {
        layer = layer.with_shared(build_shared(machine, shared)?)?;
    }
    if let Some(norm) = &case.out_norm {
        layer = layer.with_out_norm(rms_norm(norm)?)?;
    }
    if let Some(bias) = &case.out_bias {
        layer = layer.with_out_bias(bias)?;
    }
    Ok(layer)
}

fn build_router(gate: &Gate) -> Result<Router> {
    let mut router = Router::new(gate.config.clone())?;
    if let Some(bias) = &gate.correction_bias {
        router = router.with_correction_bias(bias)?;
    }
    if let Some(scale) = &gate.per_expert_scale {
        router = router.with_per_expert_scale(scale)?;
    }
    Ok(router)
}

fn build_gate(cpu: &Cpu, case: &Layer) -> Result<Option<moe::Gate>> {
    let Logits::Linear { w, input_norm } = &case.gate.logits else {
        return Ok(None);
    };
    let columns = case.gate.config.num_logits();
    let w = matrix(w, 0, columns, case.hidden)?;
    let gate = moe::Gate::new(cpu, w, case.gate.bias.as_deref())?;
    Ok(Some(match input_norm {
        Some(norm) => {
            let rms = RmsNorm::new(&norm.scale, norm.eps)?;
            gate.with_input_norm(rms.with_multiplier(norm.mul)?)?
        }
        None => gate,
    }))
}

fn pack(machine: &Machine, mlp: &Mlp) -> Result<PackedExperts> {
    let mut packed = empty(machine, mlp, mlp.inner)?;
    for e in 0..mlp.count {
        packed.push(&machine.cpu, &mlp.expert(e)?)?;
    }
    Ok(packed)
}

fn empty(machine: &Machine, mlp: &Mlp, inner: usize) -> Result<PackedExperts> {
    let dtype = machine.dtype.unwrap_or(mlp.dtype());
    PackedExperts::new(&machine.cpu, mlp.outer, inner, mlp.activation, dtype)
}

fn build_shared(machine: &Machine, shared: &Shared) -> Result<SharedExperts> {
    let mlp = &shared.mlp;
    let combine = match shared.combine {
        Combine::Add => SharedCombine::Add,
        Combine::Average => SharedCombine::Average,
        Combine::SigmoidGate => {
            let gate_w = shared.gate_w.as_deref().unwrap_or_default();
            let w = MatRef::new(gate_w, 1, mlp.outer)?.into();
            return SharedExperts::with_sigmoid_gate(&machine.cpu, pack(machine, mlp)?, w);
        }
        // Each has a weight of its own.
        Combine::RouterWeighted => {
            let mut packed = empty(machine, mlp, mlp.inner / shared.count)?;
            for j in 0..shared.count {
                packed.push(&machine.cpu, &mlp.slice(j, shared.count)?)?;
            }
            return SharedExperts::new(packed, SharedCombine::RouterWeighted);
        }
    };
    SharedExperts::new(pack(machine, mlp)?, combine)
}

fn build_latent(machine: &Machine, latent: &Latent, hidden: usize) -> Result<moe::Latent> {
    let kept = machine.dtype.unwrap_or(latent.dtype());
    let w_in = matrix(&latent.in_w, 0, latent.width, hidden)?;
    let w_out = matrix(&latent.out_w, 0, hidden, latent.width)?;
    let built = moe::Latent::new(&machine.cpu, w_in, w_out, kept)?;
    match &latent.in_norm {
        Some(norm) => built.with_norm(rms_norm(norm)?),
        None => Ok(built),
    }
}

fn rms_norm(norm: &Norm) -> Result<RmsNorm> {
    RmsNorm::new(&norm.w, norm.eps)
}

fn run_loss(machine: &Machine, loss: &Loss) -> Result<Vec<Output>> {
    let cpu = &machine.cpu;
    let rows = loss.layers.saturating_mul(loss.tokens);
    let logits = MatRef::new(&loss.logits, rows, loss.experts)?.into();
    let mut grad = vec![f32::NAN; loss.logits.len()];
    let scratch = &mut LossScratch::default();
    let value = match loss.kind {
        LossKind::LoadBalancing { top_k } => {
            let mask = loss.mask.as_deref();
            load_balancing(cpu, logits, top_k, mask, Some(&mut grad), scratch)?
        }
        LossKind::SwitchLoadBalancing => {
            switch_load_balancing(cpu, logits, loss.tokens, Some(&mut grad), scratch)?
        }
        LossKind::RouterZ => router_z(cpu, logits, Some(&mut grad), scratch)?,
    };
    Ok(vec![
        Output::f32("value", &[1], vec![value as f32]),
        Output::f64("value_f64", &[1], vec![value]),
        Output::f32("grad_logits", &loss.shape, grad),
    ])
}
