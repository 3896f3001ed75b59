//! The CPU's side.

use super::*;

pub fn view(m: &[f32], rows: usize, cols: usize) -> AnyMatRef<'_> {
    MatRef::new(m, rows, cols).unwrap().into()
}

pub fn packed(
    cpu: &Cpu,
    case: &Case,
    w: &Weights,
    up: &[f32],
    down: &[f32],
    count: usize,
    i: usize,
    biases: bool,
) -> PackedExperts {
    let (h, gated) = (case.hidden, case.activation.gated);
    let wide = if gated { 2 * i } else { i };
    let mut experts = PackedExperts::new(cpu, h, i, case.activation, w.dtype).unwrap();
    for e in 0..count {
        let up = &up[e * wide * h..][..wide * h];
        let down = view(&down[e * h * i..][..h * i], h, i);
        let mut expert = match gated {
            true => ExpertWeights::fused(view(up, wide, h), down).unwrap(),
            false => ExpertWeights::plain(view(up, i, h), down),
        };
        if biases {
            let up = &w.up_bias[e * wide..][..wide];
            let (gate, up) = if gated {
                (Some(&up[..i]), &up[i..])
            } else {
                (None, up)
            };
            expert = expert.with_biases(gate, Some(up), Some(&w.down_bias[e * h..][..h]));
        }
        experts.push(cpu, &expert).unwrap();
    }
    experts
}

/// The CPU's layer.
pub fn cpu_layer(cpu: &Cpu, case: &Case, w: &Weights) -> MoeLayer {
    let (h, r) = (case.hidden, case.config.num_logits());
    let mut router = Router::new(case.config.clone()).unwrap();
    if case.correction_bias {
        router = router.with_correction_bias(&w.correction).unwrap();
    }
    let experts = packed(
        cpu,
        case,
        w,
        &w.up,
        &w.down,
        case.config.num_experts,
        case.intermediate,
        case.biases,
    );
    let bias = case.biases.then_some(&w.gate_b[..]);
    let gate = Gate::new(cpu, view(&w.gate_w, r, h), bias).unwrap();
    let mut layer = MoeLayer::new(router, experts)
        .unwrap()
        .with_gate(gate)
        .unwrap()
        .with_routed_scale(case.routed_scale)
        .unwrap();
    if let Some((i, join)) = case.shared {
        let experts = packed(cpu, case, w, &w.shared_up, &w.shared_down, 1, i, false);
        layer = layer
            .with_shared(match join {
                SharedJoin::SigmoidGate => {
                    SharedExperts::with_sigmoid_gate(cpu, experts, view(&w.shared_gate, 1, h))
                        .unwrap()
                }
                SharedJoin::Average => SharedExperts::new(experts, SharedCombine::Average).unwrap(),
                _ => SharedExperts::new(experts, SharedCombine::Add).unwrap(),
            })
            .unwrap();
    }
    if case.weight_on_input {
        layer = layer.with_weight_on_input();
    }
    if case.output_steps {
        let norm = RmsNorm::new(&w.norm, 1e-5).unwrap();
        layer = layer
            .with_out_norm(norm)
            .unwrap()
            .with_out_bias(&w.out_bias)
            .unwrap();
    }
    layer
}

/// What a side has computed.
pub struct Answer {
    pub y: Vec<f32>,
    pub ids: Vec<i32>,
    pub weights: Vec<f32>,
}

pub fn on_cpu(case: &Case, w: &Weights, x: &Stored, tokens: usize, residual: &[f32]) -> Answer {
    let (cpu, h) = (Cpu::new(), case.hidden);
    let layer = cpu_layer(&cpu, case, w);
    let mut forward = Forward::default();
    if case.output_steps {
        forward.residual = Some(view(residual, tokens, h));
    }
    let mut y = vec![f32::NAN; tokens * h];
    let mut workspace = vec![0xff; layer.workspace_size(&cpu, tokens).unwrap()];
    let out = MatMut::new(&mut y, tokens, h).unwrap().into();
    let mut routing = Routing::new();
    layer
        .forward_with(
            &cpu,
            x.view(tokens, h),
            &forward,
            out,
            &mut routing,
            &mut workspace,
        )
        .unwrap();
    Answer {
        y,
        ids: routing.ids().to_vec(),
        weights: routing.weights().to_vec(),
    }
}
