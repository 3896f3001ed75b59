//! The layer by hand, and against the pipeline of its parts.

use super::super::grouped_gemm::Activation;
use super::super::router::{Capacity, Method, Renorm, RouterSpec, Score, WeightsFrom};
use super::super::{assert_close, combine, grouped_gemm, noise, permute, permute_rows};
use super::*;

const H: usize = 6;
const I: usize = 5;
const E: usize = 4;
const T: usize = 9;

struct Tensors {
    x: Vec<f64>,
    router: Vec<f64>,
    gate: Vec<f64>,
    up: Vec<f64>,
    down: Vec<f64>,
}

impl Tensors {
    fn new() -> Self {
        Self {
            x: noise(1, T * H),
            router: noise(2, E * H),
            gate: noise(3, E * I * H),
            up: noise(4, E * I * H),
            down: noise(5, E * H * I),
        }
    }

    fn weights(&self) -> LayerWeights<'_> {
        let experts = MlpWeights {
            gate: &self.gate,
            up: &self.up,
            down: &self.down,
            ..Default::default()
        };
        LayerWeights {
            router_w: &self.router,
            experts,
            ..Default::default()
        }
    }

    fn inputs(&self) -> LayerInputs<'_> {
        LayerInputs {
            x: &self.x,
            ..Default::default()
        }
    }
}

fn mixtral() -> LayerSpec {
    LayerSpec::new(
        H,
        RouterSpec {
            renorm: Renorm::Sum,
            ..RouterSpec::top_k(E, 2)
        },
    )
}

#[test]
fn the_loop_and_the_pipeline_agree() {
    let tensors = Tensors::new();
    let spec = mixtral();
    let expected = moe_layer(&spec, &tensors.weights(), &tensors.inputs());
    for align in [1, 4] {
        let logits = router_logits(&spec.router, &tensors.x, H, &tensors.router, &[], &[]);
        let r = route(&spec.router, &logits);
        let p = permute(&r.ids, 0..E, align);
        let rows = permute_rows(&tensors.x, H, &p.pair_of_row, r.slots);
        let gate = grouped_gemm(&rows, H, &tensors.gate, &[], &p.offsets);
        let up = grouped_gemm(&rows, H, &tensors.up, &[], &p.offsets);
        let h: Vec<f64> = gate
            .iter()
            .zip(&up)
            .map(|(g, u)| spec.experts.activate(*g, *u))
            .collect();
        let ys = grouped_gemm(&h, I, &tensors.down, &[], &p.offsets);
        let y = combine(&ys, H, &r.weights, &p.row_of_pair, r.slots);
        assert_close(&y, &expected.y, 1e-15);
        assert_eq!(
            (r.ids, logits),
            (expected.ids.clone(), expected.router_logits.clone())
        );
    }
}

#[test]
fn one_expert_by_hand() {
    // H = I = 1: y = weight · (w_down · silu(g·x) · u·x + b_down), with biases on the way.
    let spec = LayerSpec::new(1, RouterSpec::top_k(1, 1));
    let experts = MlpWeights {
        gate: &[2.0],
        up: &[3.0],
        down: &[5.0],
        b_gate: &[0.5],
        b_up: &[-1.0],
        b_down: &[7.0],
    };
    let w = LayerWeights {
        router_w: &[1.0],
        experts,
        out_bias: &[100.0],
        ..Default::default()
    };
    let inputs = LayerInputs {
        x: &[1.0],
        residual: &[1000.0],
        ..Default::default()
    };
    let r = moe_layer(&spec, &w, &inputs);
    let routed = 5.0 * Activation::Silu.at(2.5) * 2.0 + 7.0;
    assert_close(&r.y_routed, &[routed], 1e-15);
    assert_close(&r.y, &[routed + 1100.0], 1e-15);
}

#[test]
fn unselected_experts_are_not_read_and_nan_stays_in_its_row() {
    let mut tensors = Tensors::new();
    let mut spec = mixtral();
    let ids: Vec<i32> = (0..T as i32).flat_map(|t| [t % 3, (t + 1) % 3]).collect();
    spec.router.method = Method::Given {
        ids,
        weights: vec![],
    };
    let clean = moe_layer(&spec, &tensors.weights(), &tensors.inputs());
    tensors.gate[3 * I * H..].fill(f64::NAN);
    tensors.down[3 * H * I..].fill(f64::INFINITY);
    tensors.x[4 * H + 1] = f64::NAN;
    let r = moe_layer(&spec, &tensors.weights(), &tensors.inputs());
    assert_eq!(
        (&r.y[..4 * H], &r.y[5 * H..]),
        (&clean.y[..4 * H], &clean.y[5 * H..])
    );
    assert!(r.y[4 * H..5 * H].iter().all(|v| v.is_nan()));
}

#[test]
fn a_token_with_no_expert_gets_zero() {
    let tensors = Tensors::new();
    let mut spec = mixtral();
    spec.router.capacity = Some(Capacity {
        per_expert: 0,
        scope_tokens: None,
        batch_prioritized: false,
        normalize_before_drop: true,
    });
    let r = moe_layer(&spec, &tensors.weights(), &tensors.inputs());
    assert_eq!((r.ids, r.y), (vec![-1; 2 * T], vec![0.0; T * H]));
}

#[test]
fn shared_experts_in_every_form() {
    let tensors = Tensors::new();
    let (sg, su, sd) = (noise(6, 4 * H), noise(7, 4 * H), noise(8, H * 4));
    let gate_w = noise(9, H);
    let mut w = tensors.weights();
    w.shared = MlpWeights {
        gate: &sg,
        up: &su,
        down: &sd,
        ..Default::default()
    };
    w.shared_gate_w = &gate_w;
    let mut spec = mixtral();
    let routed = moe_layer(&spec, &w, &tensors.inputs()).y;
    let shared: Vec<f64> = tensors
        .x
        .chunks(H)
        .flat_map(|x| mlp(&spec.experts, &w.shared, x))
        .collect();
    let gates: Vec<f64> = tensors
        .x
        .chunks(H)
        .map(|x| sigmoid(dot(x, &gate_w)))
        .collect();
    for combine in [
        SharedCombine::Add,
        SharedCombine::SigmoidGate,
        SharedCombine::Average,
    ] {
        spec.shared = Some(SharedSpec {
            mlp: spec.experts,
            combine,
        });
        let r = moe_layer(&spec, &w, &tensors.inputs());
        let expected: Vec<f64> = (0..T * H)
            .map(|i| match combine {
                SharedCombine::SigmoidGate => routed[i] + gates[i / H] * shared[i],
                SharedCombine::Average => (routed[i] + shared[i]) / 2.0,
                _ => routed[i] + shared[i],
            })
            .collect();
        assert_eq!(r.y_routed, routed);
        assert_close(&r.y, &expected, 1e-15);
    }
    // Two shared experts, weighted by the router along with the routed ones.
    let router_w = noise(2, (E + 2) * H);
    w.router_w = &router_w;
    spec.router.score = Score::Sigmoid;
    spec.router.num_joint_shared = 2;
    spec.router.weights = WeightsFrom::JointWithShared;
    spec.router.renorm = Renorm::None;
    spec.shared = Some(SharedSpec {
        mlp: spec.experts,
        combine: SharedCombine::RouterWeighted,
    });
    let r = moe_layer(&spec, &w, &tensors.inputs());
    let weights = route(&spec.router, &r.router_logits).shared_weights;
    for (t, x) in tensors.x.chunks(H).enumerate() {
        for i in 0..H {
            let mut expected = r.y_routed[t * H + i];
            for j in 0..2 {
                let h = mlp_hidden(&spec.experts, &w.shared, x);
                let part = j * 2..j * 2 + 2;
                expected += weights[t * 2 + j] * dot(&h[part.clone()], &sd[i * 4..][part]);
            }
            assert_close(&[r.y[t * H + i]], &[expected], 1e-14);
        }
    }
}

#[test]
fn an_identity_expert_returns_the_token() {
    let tensors = Tensors::new();
    let mut spec = mixtral();
    spec.router.num_null = 1;
    spec.router.top_k = 1;
    let mut logits = vec![0.0; T * (E + 1)];
    logits
        .iter_mut()
        .skip(E)
        .step_by(E + 1)
        .for_each(|z| *z = 50.0);
    let inputs = LayerInputs {
        given_logits: &logits,
        ..tensors.inputs()
    };
    let r = moe_layer(&spec, &tensors.weights(), &inputs);
    assert_eq!((r.ids, &r.y), (vec![E as i32; T], &tensors.x));
    spec.router.null_kind = NullKind::Zero;
    let r = moe_layer(&spec, &tensors.weights(), &inputs);
    assert_eq!((r.weights, r.y), (vec![0.0; T], vec![0.0; T * H]));
}

#[test]
fn latent_experts_norms_and_scale() {
    // L = 1, H = 2. x = [3, 4] → low = 7 → normed to 1 · 2 → silu(2·1)·(2·3)·0.5 → normed to ±1 …
    let mut spec = LayerSpec::new(2, RouterSpec::top_k(1, 1));
    spec.latent = Some(LatentSpec {
        width: 1,
        in_norm_eps: Some(0.0),
    });
    spec.routed_out_scale = 10.0;
    let experts = MlpWeights {
        gate: &[1.0],
        up: &[3.0],
        down: &[0.5],
        ..Default::default()
    };
    let mut w = LayerWeights {
        router_w: &[0.0, 0.0],
        experts,
        latent_in_w: &[1.0, 1.0],
        latent_in_norm_w: &[2.0],
        latent_out_w: &[1.0, -1.0],
        expert_post_norm_w: &[4.0],
        out_norm_w: &[1.0, 2.0],
        ..Default::default()
    };
    let inputs = LayerInputs {
        x: &[3.0, 4.0],
        ..Default::default()
    };
    let out = Activation::Silu.at(2.0) * 6.0 * 0.5 * 10.0;
    assert_close(&moe_layer(&spec, &w, &inputs).y, &[out, -out], 1e-15);
    spec.post_norm = Some(PostNorm::ScaleFirst(0.0));
    assert_close(&moe_layer(&spec, &w, &inputs).y, &[10.0, -10.0], 1e-15);
    spec.post_norm = Some(PostNorm::NormFirst(0.0));
    assert_close(&moe_layer(&spec, &w, &inputs).y, &[40.0, -40.0], 1e-15);
    spec.out_norm_eps = Some(0.0);
    w.out_bias = &[5.0, 5.0];
    assert_close(&moe_layer(&spec, &w, &inputs).y, &[6.0, 3.0], 1e-15);
}

#[test]
fn weight_on_input_and_noise() {
    let tensors = Tensors::new();
    let mut spec = mixtral();
    spec.weight_on_input = true;
    spec.router.top_k = 1;
    spec.router.renorm = Renorm::None;
    spec.router.score = Score::Sigmoid;
    let r = moe_layer(&spec, &tensors.weights(), &tensors.inputs());
    for t in 0..T {
        let x: Vec<f64> = tensors.x[t * H..][..H]
            .iter()
            .map(|v| v * r.weights[t])
            .collect();
        let expert = tensors.weights().experts.expert(r.ids[t] as usize, E);
        assert_close(&r.y[t * H..][..H], &mlp(&spec.experts, &expert, &x), 1e-15);
    }
    let (noise_w, normals) = (noise(11, E * H), noise(12, T * E));
    let w = LayerWeights {
        router_noise_w: &noise_w,
        ..tensors.weights()
    };
    let noisy = moe_layer(
        &spec,
        &w,
        &LayerInputs {
            normals: &normals,
            ..tensors.inputs()
        },
    );
    let scale = linear(&tensors.x, H, &noise_w, &[]);
    assert_eq!(
        noisy.router_logits,
        noisy_logits(&r.router_logits, &scale, &normals)
    );
}

#[test]
fn no_tokens() {
    let tensors = Tensors::new();
    let r = moe_layer(&mixtral(), &tensors.weights(), &LayerInputs::default());
    assert!(r.y.is_empty() && r.ids.is_empty());
}
