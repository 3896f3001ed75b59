//! The layer: everything as a loop over tokens and their choices.

use super::grouped_gemm::{Activation, Clamp, MlpSpec, nth};
use super::math::{at_or, dot, linear, rms_norm, rows_of, sigmoid};
use super::router::{NullKind, RouterSpec};
use super::routing::{finish_logits, noisy_logits, route, router_logits};

/// How shared experts, which every token uses, join the routed sum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SharedCombine {
    /// `routed + shared`.
    Add,
    /// `routed + sigmoid(x · shared_gate_w) · shared` (Qwen2-MoE).
    SigmoidGate,
    /// `(routed + shared) / 2` (Cohere2-MoE).
    Average,
    /// `routed + Σ_j shared_weight_j · shared_j`: the Is intermediate neurons are `num_joint_shared` experts
    /// side by side, each with a weight from [`RouteResult::shared_weights`](super::RouteResult::shared_weights) (Inkling).
    RouterWeighted,
}

/// Shared experts. Several of them, concatenated, are one with a larger Is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SharedSpec {
    /// Their shape.
    pub mlp: MlpSpec,
    /// How they join.
    pub combine: SharedCombine,
}

/// A narrower space in which the routed experts live: project down, run them, project up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LatentSpec {
    /// L, its width.
    pub width: usize,
    /// The epsilon of an RMS norm on what enters it, if there is one.
    pub in_norm_eps: Option<f64>,
}

/// An RMS norm with a learned factor w.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PostNorm {
    /// `q / sqrt(mean(q²) + eps)` with `q = w · x` (Muse Spark, whose checkpoint holds w − 1).
    ScaleFirst(f64),
    /// [`rms_norm`].
    NormFirst(f64),
}

impl PostNorm {
    /// The norm of x.
    pub fn of(self, x: &[f64], w: &[f64]) -> Vec<f64> {
        match self {
            Self::NormFirst(eps) => rms_norm(x, w, eps),
            Self::ScaleFirst(eps) => {
                let scaled: Vec<f64> = x.iter().zip(w).map(|(x, w)| x * w).collect();
                rms_norm(&scaled, &[], eps)
            }
        }
    }
}

/// A layer, as plain data.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// H.
    pub hidden: usize,
    /// The router.
    pub router: RouterSpec,
    /// The routed experts.
    pub experts: MlpSpec,
    /// Whether the routing weight multiplies the expert's input (Llama 4) and not its output.
    pub weight_on_input: bool,
    /// The space of the routed experts, if not the hidden one.
    pub latent: Option<LatentSpec>,
    /// A norm on each expert's output, before its weight.
    pub post_norm: Option<PostNorm>,
    /// Factor on the routed sum.
    pub routed_out_scale: f64,
    /// Shared experts.
    pub shared: Option<SharedSpec>,
    /// The epsilon of an RMS norm on the sum of routed and shared.
    pub out_norm_eps: Option<f64>,
}

impl LayerSpec {
    /// SwiGLU experts behind a router, and nothing else.
    pub fn new(hidden: usize, router: RouterSpec) -> Self {
        Self {
            hidden,
            router,
            experts: MlpSpec {
                gated: true,
                act: Activation::Silu,
                clamp: Clamp::None,
            },
            weight_on_input: false,
            latent: None,
            post_norm: None,
            routed_out_scale: 1.0,
            shared: None,
            out_norm_eps: None,
        }
    }
}

/// The weights of one expert, or of all of them stacked. L is the width in which experts live: H, or the
/// latent one.
#[derive(Clone, Copy, Debug, Default)]
pub struct MlpWeights<'a> {
    /// `[E,I,L]`; empty when not gated.
    pub gate: &'a [f64],
    /// `[E,I,L]`.
    pub up: &'a [f64],
    /// `[E,L,I]`.
    pub down: &'a [f64],
    /// `[E,I]` or empty.
    pub b_gate: &'a [f64],
    /// `[E,I]` or empty.
    pub b_up: &'a [f64],
    /// `[E,L]` or empty.
    pub b_down: &'a [f64],
}

impl<'a> MlpWeights<'a> {
    /// The weights of expert e of `count`.
    pub fn expert(&self, e: usize, count: usize) -> Self {
        let part = |stacked: &'a [f64]| nth(stacked, e, count);
        Self {
            gate: part(self.gate),
            up: part(self.up),
            down: part(self.down),
            b_gate: part(self.b_gate),
            b_up: part(self.b_up),
            b_down: part(self.b_down),
        }
    }
}

/// The weights of a layer. What is absent is empty.
#[derive(Clone, Copy, Debug, Default)]
pub struct LayerWeights<'a> {
    /// `[R,H]`; not needed with given logits.
    pub router_w: &'a [f64],
    /// `[R]`.
    pub router_b: &'a [f64],
    /// `[H]`.
    pub router_in_scale: &'a [f64],
    /// `[R,H]`: the noise of [`noisy_logits`].
    pub router_noise_w: &'a [f64],
    /// The routed experts, stacked.
    pub experts: MlpWeights<'a>,
    /// The shared expert.
    pub shared: MlpWeights<'a>,
    /// `[1,H]`.
    pub shared_gate_w: &'a [f64],
    /// `[L,H]`.
    pub latent_in_w: &'a [f64],
    /// `[L]`, the factor itself (Muse Spark's checkpoint holds it less 1).
    pub latent_in_norm_w: &'a [f64],
    /// `[H,L]`.
    pub latent_out_w: &'a [f64],
    /// `[L]`, the same for all experts.
    pub expert_post_norm_w: &'a [f64],
    /// `[H]`.
    pub out_norm_w: &'a [f64],
    /// `[H]`.
    pub out_bias: &'a [f64],
}

/// What goes through a layer.
#[derive(Clone, Copy, Debug, Default)]
pub struct LayerInputs<'a> {
    /// `[T,H]`.
    pub x: &'a [f64],
    /// `[T,R]`: logits computed elsewhere, instead of `x · router_wᵀ`. Bias,
    /// multiplier and softcap still apply.
    pub given_logits: &'a [f64],
    /// `[T,R]`: draws from N(0,1), with `router_noise_w`.
    pub normals: &'a [f64],
    /// `[T,H]`: added to the result.
    pub residual: &'a [f64],
}

/// What [`moe_layer`] answers.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerResult {
    /// `[T,R]`: what enters the score function.
    pub router_logits: Vec<f64>,
    /// `[T,K]`.
    pub ids: Vec<i32>,
    /// `[T,K]`.
    pub weights: Vec<f64>,
    /// `[T,H]`: the routed sum, without shared experts, norm, bias and residual.
    pub y_routed: Vec<f64>,
    /// `[T,H]`.
    pub y: Vec<f64>,
}

/// The intermediate values of one expert for one token: `activate(x·w_gateᵀ, x·w_upᵀ)`, `[I]`.
pub fn mlp_hidden(spec: &MlpSpec, w: &MlpWeights, x: &[f64]) -> Vec<f64> {
    let up = linear(x, x.len(), w.up, w.b_up);
    let gate = if spec.gated {
        linear(x, x.len(), w.gate, w.b_gate)
    } else {
        up.clone()
    };
    gate.iter()
        .zip(&up)
        .map(|(g, u)| spec.activate(*g, *u))
        .collect()
}

/// One expert for one token: `mlp_hidden · w_downᵀ`.
pub fn mlp(spec: &MlpSpec, w: &MlpWeights, x: &[f64]) -> Vec<f64> {
    let h = mlp_hidden(spec, w, x);
    linear(&h, h.len(), w.down, w.b_down)
}

/// The whole layer, one token and one choice at a time, without sorting anything.
///
/// An expert that nobody chose is not looked at, whatever its weights hold.
pub fn moe_layer(spec: &LayerSpec, w: &LayerWeights, inputs: &LayerInputs) -> LayerResult {
    let (hidden, router) = (spec.hidden, &spec.router);
    let tokens = rows_of(inputs.x, hidden, "moe_layer: x");
    let check = |v: &[f64], len: usize, what: &str| {
        assert!(
            v.is_empty() || v.len() == len,
            "{what} has {} elements, not {len}",
            v.len()
        );
    };
    check(
        inputs.given_logits,
        tokens * router.router_rows(),
        "given_logits",
    );
    check(inputs.residual, inputs.x.len(), "residual");
    check(w.out_bias, hidden, "out_bias");

    // Route.
    let mut logits = if !inputs.given_logits.is_empty() {
        finish_logits(router, inputs.given_logits, w.router_b)
    } else if w.router_w.is_empty() {
        Vec::new() // ids and weights are both given
    } else {
        router_logits(
            router,
            inputs.x,
            hidden,
            w.router_w,
            w.router_b,
            w.router_in_scale,
        )
    };
    if !inputs.normals.is_empty() {
        logits = noisy_logits(
            &logits,
            &linear(inputs.x, hidden, w.router_noise_w, &[]),
            inputs.normals,
        );
    }
    let routing = route(router, &logits);
    let k = routing.slots;
    assert_eq!(routing.ids.len(), tokens * k, "the routing is not [T,K]");

    let (mut y_routed, mut y) = (Vec::new(), Vec::new());
    for (t, x) in inputs.x.chunks_exact(hidden).enumerate() {
        // The routed experts.
        let expert_x = match spec.latent {
            None => x.to_vec(),
            Some(latent) => {
                let low = linear(x, hidden, w.latent_in_w, &[]);
                assert_eq!(low.len(), latent.width, "latent_in_w is not [L,H]");
                latent
                    .in_norm_eps
                    .map_or(low.clone(), |eps| rms_norm(&low, w.latent_in_norm_w, eps))
            }
        };
        let mut sum = vec![0.0; expert_x.len()];
        let mut identity = vec![0.0; hidden];
        for pair in t * k..(t + 1) * k {
            let (id, weight) = (routing.ids[pair], routing.weights[pair]);
            if id < 0 {
                continue;
            }
            let id = id as usize;
            if id >= router.num_experts {
                if router.null_kind == NullKind::Identity {
                    add(&mut identity, weight, x);
                }
                continue;
            }
            let (in_weight, out_weight) = if spec.weight_on_input {
                (weight, 1.0)
            } else {
                (1.0, weight)
            };
            let weighted_x: Vec<f64> = expert_x.iter().map(|v| v * in_weight).collect();
            let mut out = mlp(
                &spec.experts,
                &w.experts.expert(id, router.num_experts),
                &weighted_x,
            );
            if let Some(norm) = spec.post_norm {
                out = norm.of(&out, w.expert_post_norm_w);
            }
            add(&mut sum, out_weight, &out);
        }
        if let Some(latent) = spec.latent {
            sum = linear(&sum, latent.width, w.latent_out_w, &[]);
        }
        add(&mut sum, 1.0, &identity);
        let routed: Vec<f64> = sum.iter().map(|v| v * spec.routed_out_scale).collect();

        // The shared experts.
        let mut out = routed.clone();
        if let Some(shared) = &spec.shared {
            let mut h = mlp_hidden(&shared.mlp, &w.shared, x);
            if shared.combine == SharedCombine::RouterWeighted {
                let n = router.num_joint_shared;
                assert!(
                    n > 0 && h.len().is_multiple_of(n),
                    "Is is not a multiple of num_joint_shared"
                );
                let slice = h.len() / n;
                for (i, v) in h.iter_mut().enumerate() {
                    *v *= routing.shared_weights[t * n + i / slice];
                }
            }
            let shared_y = linear(&h, h.len(), w.shared.down, w.shared.b_down);
            let gate = match shared.combine {
                SharedCombine::SigmoidGate => sigmoid(dot(x, w.shared_gate_w)),
                _ => 1.0,
            };
            add(&mut out, gate, &shared_y);
            if shared.combine == SharedCombine::Average {
                out.iter_mut().for_each(|v| *v /= 2.0);
            }
        }

        // The output.
        if let Some(eps) = spec.out_norm_eps {
            out = rms_norm(&out, w.out_norm_w, eps);
        }
        for (h, v) in out.iter_mut().enumerate() {
            *v += at_or(w.out_bias, h, 0.0);
            *v += at_or(inputs.residual, t * hidden + h, 0.0);
        }
        y_routed.extend(routed);
        y.extend(out);
    }
    LayerResult {
        router_logits: logits,
        ids: routing.ids,
        weights: routing.weights,
        y_routed,
        y,
    }
}

/// `sum += factor · v`.
fn add(sum: &mut [f64], factor: f64, v: &[f64]) {
    assert_eq!(sum.len(), v.len(), "add: lengths differ");
    for (s, v) in sum.iter_mut().zip(v) {
        *s += factor * v;
    }
}

#[cfg(test)]
mod tests {
    use super::super::router::{Capacity, Method, Renorm, Score, WeightsFrom};
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
}
