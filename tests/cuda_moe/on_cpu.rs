//! The CPU's side.

use super::*;
use moe_kernels::moe as cpu;

fn view(m: &[f32], rows: usize, cols: usize) -> AnyMatRef<'_> {
    MatRef::new(m, rows, cols).unwrap().into()
}

/// The n experts whose first projections are at `place`.
fn packed(
    cpu: &Cpu,
    case: &Case,
    w: &Weights,
    place: usize,
    [n, i, h]: [usize; 3],
) -> PackedExperts {
    let (wide, gated) = (case.wide(i), case.activation.gated);
    let mut experts = PackedExperts::new(cpu, h, i, case.activation, w.dtype).unwrap();
    for e in 0..n {
        let part = |place: usize, len: usize| &w.matrices[place][e * len..][..len];
        let up = view(part(place, wide * h), wide, h);
        let down = view(part(place + 1, h * i), h, i);
        let mut expert = match gated {
            true => ExpertWeights::fused(up, down).unwrap(),
            false => ExpertWeights::plain(up, down),
        };
        if case.biases && place == UP {
            let (gate, up) = part(UP_BIAS, wide).split_at(wide - i);
            let down = part(DOWN_BIAS, h);
            expert = expert.with_biases(gated.then_some(gate), Some(up), Some(down));
        }
        experts.push(cpu, &expert).unwrap();
    }
    experts
}

/// The CPU's layer.
fn cpu_layer(cpu: &Cpu, case: &Case, w: &Weights) -> MoeLayer {
    let (h, l, r) = (case.hidden, case.width(), case.config.num_logits());
    let norm = |place: usize| {
        let norm = RmsNorm::new(&w.vectors[place], EPS).unwrap();
        norm.with_multiplier(MULTIPLIER).unwrap()
    };
    let matrix = |place: usize, rows, cols| view(&w.matrices[place], rows, cols);
    let mut router = Router::new(case.config.clone()).unwrap();
    if case.correction_bias {
        let bias = &w.vectors[CORRECTION];
        router = router.with_correction_bias(bias).unwrap();
    }
    let sizes = [case.local().len(), case.intermediate, l];
    let experts = packed(cpu, case, w, UP, sizes);
    let mut layer = match case.latent {
        None => MoeLayer::new(router, experts).unwrap(),
        Some(space) => {
            let (w_in, w_out) = (matrix(W_IN, l, h), matrix(W_OUT, h, l));
            let mut latent = cpu::Latent::new(cpu, w_in, w_out, w.dtype).unwrap();
            if space.norm {
                latent = latent.with_norm(norm(LATENT_NORM)).unwrap();
            }
            MoeLayer::new_latent(router, experts, latent).unwrap()
        }
    };
    let bias = case.biases.then_some(&w.vectors[GATE_BIAS][..]);
    let mut gate = cpu::Gate::new(cpu, matrix(GATE, r, h), bias).unwrap();
    if case.gate_norm {
        gate = gate.with_input_norm(norm(GATE_NORM)).unwrap();
    }
    if case.is_noisy() {
        gate = gate.with_noise(cpu, matrix(NOISE, r, h)).unwrap();
    }
    layer = layer.with_gate(gate).unwrap();
    layer = layer.with_first_expert(case.local().start).unwrap();
    layer = layer.with_routed_scale(case.routed_scale).unwrap();
    if case.weight_on_input {
        layer = layer.with_weight_on_input();
    }
    if let Some(order) = case.post_norm {
        let post = match order {
            PostNorm::ScaleFirst => cpu::PostNorm::ScaleFirst(norm(POST_NORM)),
            _ => cpu::PostNorm::NormFirst(norm(POST_NORM)),
        };
        layer = layer.with_post_norm(post).unwrap();
    }
    if let Some(s) = case.shared {
        let experts = packed(cpu, case, w, SHARED_UP, [s.count, s.intermediate, h]);
        let shared = match s.join {
            SharedJoin::SigmoidGate => {
                SharedExperts::with_sigmoid_gate(cpu, experts, matrix(SHARED_GATE, 1, h))
            }
            SharedJoin::Average => SharedExperts::new(experts, SharedCombine::Average),
            SharedJoin::RouterWeighted => {
                SharedExperts::new(experts, SharedCombine::RouterWeighted)
            }
            _ => SharedExperts::new(experts, SharedCombine::Add),
        };
        layer = layer.with_shared(shared.unwrap()).unwrap();
    }
    if case.output_steps {
        layer = layer.with_out_norm(norm(OUT_NORM)).unwrap();
        layer = layer.with_out_bias(&w.vectors[OUT_BIAS]).unwrap();
    }
    layer
}

/// What a side has computed.
pub struct Answer {
    pub y: Vec<f32>,
    pub ids: Vec<i32>,
    pub weights: Vec<f32>,
}

pub fn on_cpu(case: &Case, w: &Weights, x: &[f32], residual: &[f32]) -> Answer {
    let (cpu, h) = (Cpu::new(), case.hidden);
    let tokens = x.len() / h;
    let layer = cpu_layer(&cpu, case, w);
    let mut forward = Forward {
        position: POSITION,
        ..Forward::default()
    };
    if case.output_steps {
        forward.residual = Some(view(residual, tokens, h));
    }
    let (mut y, mut routing) = (vec![f32::NAN; x.len()], Routing::new());
    let mut workspace = vec![0xff; layer.workspace_size(&cpu, tokens).unwrap()];
    let x = Stored::new(w.dtype, x);
    let (x, out) = (x.view(tokens, h), MatMut::new(&mut y, tokens, h).unwrap());
    layer
        .forward_with(&cpu, x, &forward, out.into(), &mut routing, &mut workspace)
        .unwrap();
    let (ids, weights) = (routing.ids().to_vec(), routing.weights().to_vec());
    Answer { y, ids, weights }
}
