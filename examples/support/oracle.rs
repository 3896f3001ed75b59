//! A case through the f64 reference.

use super::case::{Case, Layer, Loss, LossKind, Task};
use super::file::Tensor;
use super::mlp::{Combine, Mlp};
use super::out::Output;
use super::router::{Gate, Logits};
use moe_kernels::reference as oracle;

fn wide(v: &[f32]) -> Vec<f64> {
    v.iter().map(|&v| v.into()).collect()
}

fn widened(v: &Option<Vec<f32>>) -> Vec<f64> {
    v.as_deref().map(wide).unwrap_or_default()
}

fn elements(t: &Tensor) -> Vec<f64> {
    t.f64s("weights").unwrap()
}

fn router_spec(gate: &Gate) -> oracle::RouterSpec {
    let mut spec = oracle::RouterSpec::from(&gate.config);
    if let Logits::Linear {
        input_norm: Some(norm),
        ..
    } = &gate.logits
    {
        spec.input_norm = Some(oracle::InputNorm {
            eps: norm.eps.into(),
            mul: norm.mul.into(),
        });
    }
    spec.correction_bias = widened(&gate.correction_bias);
    spec.per_expert_scale = widened(&gate.per_expert_scale);
    if let oracle::Method::Given { ids, weights } = &mut spec.method {
        *ids = gate.given_ids.clone().unwrap_or_default();
        *weights = widened(&gate.given_weights);
    }
    spec
}

/// The tensors of an MLP in f64, to be borrowed from: gate, up, down and their biases.
fn mlp_tensors(mlp: Option<&Mlp>) -> [Vec<f64>; 6] {
    let Some(mlp) = mlp else {
        return Default::default();
    };
    [
        mlp.gate.as_ref().map(elements).unwrap_or_default(),
        elements(&mlp.up),
        elements(&mlp.down),
        widened(&mlp.gate_bias),
        widened(&mlp.up_bias),
        widened(&mlp.down_bias),
    ]
}

fn mlp_weights([gate, up, down, b_gate, b_up, b_down]: &[Vec<f64>; 6]) -> oracle::MlpWeights<'_> {
    oracle::MlpWeights {
        gate,
        up,
        down,
        b_gate,
        b_up,
        b_down,
    }
}

pub fn layer(layer: &Layer) -> oracle::LayerResult {
    let mut spec = oracle::LayerSpec::new(layer.hidden, router_spec(&layer.gate));
    spec.experts = layer.experts.activation.into();
    spec.weight_on_input = layer.weight_on_input;
    spec.latent = layer.latent.as_ref().map(|latent| oracle::LatentSpec {
        width: latent.width,
        in_norm_eps: latent.in_norm.as_ref().map(|norm| norm.eps.into()),
    });
    let post = layer.post_norm.as_ref();
    spec.post_norm = post.map(|p| oracle::PostNorm::ScaleFirst(p.0.eps.into()));
    spec.routed_out_scale = layer.routed_out_scale.into();
    spec.shared = layer.shared.as_ref().map(|shared| oracle::SharedSpec {
        mlp: shared.mlp.activation.into(),
        combine: match shared.combine {
            Combine::Add => oracle::SharedCombine::Add,
            Combine::SigmoidGate => oracle::SharedCombine::SigmoidGate,
            Combine::Average => oracle::SharedCombine::Average,
            Combine::RouterWeighted => oracle::SharedCombine::RouterWeighted,
        },
    });
    spec.out_norm_eps = layer.out_norm.as_ref().map(|norm| norm.eps.into());

    let (router_w, given_logits) = match &layer.gate.logits {
        Logits::Linear { w, .. } => (elements(w), vec![]),
        Logits::Given(logits) => (vec![], wide(logits)),
        Logits::None => (vec![], vec![]),
    };
    let router_in_scale = match &layer.gate.logits {
        Logits::Linear {
            input_norm: Some(norm),
            ..
        } => wide(&norm.scale),
        _ => vec![],
    };
    let latent = layer.latent.as_ref();
    let in_norm = latent.and_then(|l| l.in_norm.as_ref());
    let shared = layer.shared.as_ref();
    let expert_tensors = mlp_tensors(Some(&layer.experts));
    let shared_tensors = mlp_tensors(shared.map(|s| &s.mlp));
    let weights = oracle::LayerWeights {
        router_w: &router_w,
        router_b: &widened(&layer.gate.bias),
        router_in_scale: &router_in_scale,
        experts: mlp_weights(&expert_tensors),
        shared: mlp_weights(&shared_tensors),
        shared_gate_w: &shared.map(|s| widened(&s.gate_w)).unwrap_or_default(),
        latent_in_w: &latent.map(|l| elements(&l.in_w)).unwrap_or_default(),
        latent_in_norm_w: &in_norm.map(|n| wide(&n.w)).unwrap_or_default(),
        latent_out_w: &latent.map(|l| elements(&l.out_w)).unwrap_or_default(),
        expert_post_norm_w: &post.map(|p| wide(&p.0.w)).unwrap_or_default(),
        out_norm_w: &layer
            .out_norm
            .as_ref()
            .map(|n| wide(&n.w))
            .unwrap_or_default(),
        out_bias: &widened(&layer.out_bias),
        ..Default::default()
    };
    let inputs = oracle::LayerInputs {
        x: &wide(&layer.x),
        given_logits: &given_logits,
        ..Default::default()
    };
    oracle::moe_layer(&spec, &weights, &inputs)
}

pub fn loss(loss: &Loss) -> oracle::Loss {
    let logits = wide(&loss.logits);
    let mask = widened(&loss.mask);
    match loss.kind {
        LossKind::LoadBalancing { top_k } => {
            oracle::load_balancing_loss(&logits, loss.experts, top_k, &mask)
        }
        LossKind::SwitchLoadBalancing => {
            oracle::switch_load_balancing_loss(&logits, loss.experts, loss.tokens)
        }
        LossKind::RouterZ => oracle::router_z_loss(&logits, loss.experts),
    }
}

/// What the program writes, computed by the oracle.
pub fn outputs(case: &Case) -> Vec<Output> {
    match &case.task {
        Task::Layer(task) => {
            let result = layer(task);
            let (tokens, columns) = (task.tokens, task.gate.config.num_logits());
            let slots = task.gate.config.slots();
            vec![
                Output::f64("router_logits", &[tokens, columns], result.router_logits),
                Output::i32("topk_ids", &[tokens, slots], result.ids),
                Output::f64("topk_weights", &[tokens, slots], result.weights),
                Output::f64("y", &[tokens, task.hidden], result.y),
            ]
        }
        Task::Loss(task) => {
            let result = loss(task);
            vec![
                Output::f64("value", &[1], vec![result.value]),
                Output::f64("grad_logits", &task.shape, result.grad_logits),
            ]
        }
    }
}
