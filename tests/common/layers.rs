//! Small random layers of every shape of computation, for the tests of the whole.

use super::Rng;
use moe_kernels::experts::{ExpertWeights, PackedExperts};
use moe_kernels::grouped_gemm::{Activation, ActivationFunction, Clamp};
use moe_kernels::moe::{Gate, Latent, MoeLayer, PostNorm, SharedCombine, SharedExperts};
use moe_kernels::norm::RmsNorm;
use moe_kernels::routing::{NullExperts, Router, RouterConfig};
use moe_kernels::{AnyMatRef, Cpu, DType, MatRef};

/// What a layer is made of; weights follow from the seed.
#[derive(Clone, Debug)]
pub struct Recipe {
    pub name: &'static str,
    pub hidden: usize,
    pub intermediate: usize,
    pub activation: Activation,
    pub config: RouterConfig,
    pub biases: bool,
    pub correction_bias: bool,
    pub shared: usize,
    pub shared_combine: fn() -> SharedCombine,
    pub sigmoid_gate: bool,
    pub latent: Option<usize>,
    pub weight_on_input: bool,
    pub norms: bool,
}

fn view(m: &[f32], rows: usize, cols: usize) -> AnyMatRef<'_> {
    MatRef::new(m, rows, cols).unwrap().into()
}

impl Recipe {
    pub fn new(name: &'static str, config: RouterConfig) -> Self {
        Self {
            name,
            // Multiples of nothing.
            hidden: 67,
            intermediate: 37,
            activation: Activation::SWIGLU,
            config,
            biases: false,
            correction_bias: false,
            shared: 0,
            shared_combine: || SharedCombine::Add,
            sigmoid_gate: false,
            latent: None,
            weight_on_input: false,
            norms: false,
        }
    }

    /// The layer with weights in `dtype`, packed for `cpu`: the same weights for every `cpu`.
    pub fn layer(&self, cpu: &Cpu, dtype: DType) -> MoeLayer {
        let mut rng = Rng(self.name.bytes().map(u64::from).sum());
        let (h, i, e) = (self.hidden, self.intermediate, self.config.num_experts);
        let l = self.latent.unwrap_or(h);
        let experts = self.experts(cpu, dtype, &mut rng, e, l, i, self.activation);
        let mut router = Router::new(self.config.clone()).unwrap();
        if self.correction_bias {
            router = router
                .with_correction_bias(&rng.normals(self.config.selectable()))
                .unwrap();
        }
        let mut layer = match self.latent {
            Some(l) => {
                let (w_in, w_out) = (scaled(&mut rng, l * h, h), scaled(&mut rng, h * l, l));
                let mut latent =
                    Latent::new(cpu, view(&w_in, l, h), view(&w_out, h, l), dtype).unwrap();
                if self.norms {
                    latent = latent.with_norm(norm(&mut rng, l)).unwrap();
                }
                MoeLayer::new_latent(router, experts, latent).unwrap()
            }
            None => MoeLayer::new(router, experts).unwrap(),
        };
        let r = self.config.num_logits();
        let gate_w = scaled(&mut rng, r * h, h);
        let gate_b = self.biases.then(|| rng.normals(r));
        let mut gate = Gate::new(cpu, view(&gate_w, r, h), gate_b.as_deref()).unwrap();
        if self.config.noise_seed.is_some() {
            let w = scaled(&mut rng, r * h, h);
            gate = gate.with_noise(cpu, view(&w, r, h)).unwrap();
        }
        if self.norms {
            let norm = norm(&mut rng, h).with_multiplier(0.5).unwrap();
            gate = gate.with_input_norm(norm).unwrap();
        }
        layer = layer.with_gate(gate).unwrap();
        if self.shared > 0 {
            let experts =
                self.experts(cpu, dtype, &mut rng, self.shared, h, i + 3, self.activation);
            let shared = if self.sigmoid_gate {
                let w = scaled(&mut rng, h, h);
                SharedExperts::with_sigmoid_gate(cpu, experts, view(&w, 1, h)).unwrap()
            } else {
                SharedExperts::new(experts, (self.shared_combine)()).unwrap()
            };
            layer = layer.with_shared(shared).unwrap();
        }
        if self.weight_on_input {
            layer = layer.with_weight_on_input();
        }
        if self.norms {
            layer = layer
                .with_post_norm(PostNorm::ScaleFirst(norm(&mut rng, l)))
                .unwrap()
                .with_out_norm(norm(&mut rng, h))
                .unwrap()
                .with_out_bias(&rng.normals(h))
                .unwrap()
                .with_routed_scale(0.7)
                .unwrap();
        }
        layer
    }

    /// Experts `first .. first + count` of the layer alone (no shared experts, no gate biases).
    pub fn part(&self, cpu: &Cpu, first: usize, count: usize) -> MoeLayer {
        let (h, i) = (self.hidden, self.intermediate);
        let mut experts = PackedExperts::new(cpu, h, i, self.activation, DType::F32).unwrap();
        for e in first..first + count {
            self.push(cpu, &mut experts, e);
        }
        let layer = MoeLayer::new(Router::new(self.config.clone()).unwrap(), experts).unwrap();
        layer
            .with_first_expert(first)
            .unwrap()
            .with_gate(self.gate(cpu))
            .unwrap()
    }

    /// Adds expert `e` of the layer, without biases, to a set.
    pub fn push(&self, cpu: &Cpu, experts: &mut PackedExperts, e: usize) {
        let (all, _) = self.seeded();
        let gated = self.activation.gated;
        experts.push(cpu, &all[e].view(gated, false)).unwrap();
    }

    /// The gate of a layer without biases.
    pub fn gate(&self, cpu: &Cpu) -> Gate {
        let (_, mut rng) = self.seeded();
        let (r, h) = (self.config.num_logits(), self.hidden);
        let w = scaled(&mut rng, r * h, h);
        Gate::new(cpu, view(&w, r, h), None).unwrap()
    }

    /// The weights of all experts, and the generator as it stands after them.
    fn seeded(&self) -> (Vec<Weights>, Rng) {
        let mut rng = Rng(self.name.bytes().map(u64::from).sum());
        let (h, i, e) = (self.hidden, self.intermediate, self.config.num_experts);
        (self.weights(&mut rng, e, h, i), rng)
    }

    fn weights(&self, rng: &mut Rng, count: usize, h: usize, i: usize) -> Vec<Weights> {
        let mut weights = Vec::new();
        for _ in 0..count {
            let (gate, up) = (scaled(rng, i * h, h), scaled(rng, i * h, h));
            let down = scaled(rng, h * i, i);
            let biases = [rng.normals(i), rng.normals(i), rng.normals(h)];
            weights.push(Weights {
                h,
                i,
                gate,
                up,
                down,
                biases,
            });
        }
        weights
    }

    fn experts(
        &self,
        cpu: &Cpu,
        dtype: DType,
        rng: &mut Rng,
        count: usize,
        h: usize,
        i: usize,
        activation: Activation,
    ) -> PackedExperts {
        let mut experts = PackedExperts::new(cpu, h, i, activation, dtype).unwrap();
        for w in self.weights(rng, count, h, i) {
            experts
                .push(cpu, &w.view(activation.gated, self.biases))
                .unwrap();
        }
        experts
    }
}

/// One expert's matrices and biases.
struct Weights {
    h: usize,
    i: usize,
    gate: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
    biases: [Vec<f32>; 3],
}

impl Weights {
    fn view(&self, gated: bool, biases: bool) -> ExpertWeights<'_> {
        let (h, i) = (self.h, self.i);
        let mut weights = ExpertWeights::plain(view(&self.up, i, h), view(&self.down, h, i));
        weights.gate = gated.then(|| view(&self.gate, i, h));
        if biases {
            let gate_bias = gated.then_some(&self.biases[0][..]);
            weights = weights.with_biases(gate_bias, Some(&self.biases[1]), Some(&self.biases[2]));
        }
        weights
    }
}

/// Normal numbers over √fan-in, so that activations stay near 1.
fn scaled(rng: &mut Rng, n: usize, fan_in: usize) -> Vec<f32> {
    let scale = 1.0 / (fan_in as f32).sqrt();
    rng.normals(n).into_iter().map(|v| v * scale).collect()
}

fn norm(rng: &mut Rng, width: usize) -> RmsNorm {
    let weight: Vec<f32> = rng
        .normals(width)
        .into_iter()
        .map(|v| 1.0 + 0.1 * v)
        .collect();
    RmsNorm::new(&weight, 1e-6).unwrap()
}

/// One recipe for each way in which layers differ. None of them looks at several tokens at once, so all keep D2.
pub fn recipes() -> Vec<Recipe> {
    let plain = |name, config| Recipe::new(name, config);
    let mut identity = RouterConfig::mixtral(6, 3);
    identity.null_experts = NullExperts::Identity(2);
    vec![
        plain("mixtral", RouterConfig::mixtral(8, 2)),
        Recipe {
            shared: 1,
            sigmoid_gate: true,
            ..plain("qwen2_moe", RouterConfig::qwen2_moe(6, 4))
        },
        Recipe {
            shared: 1,
            correction_bias: true,
            ..plain("deepseek_v3", RouterConfig::deepseek_v3(16, 4, 4, 2, 2.5))
        },
        Recipe {
            activation: Activation::GPT_OSS,
            biases: true,
            ..plain("gpt_oss", RouterConfig::gpt_oss(8, 4))
        },
        Recipe {
            weight_on_input: true,
            shared: 1,
            ..plain("llama4", RouterConfig::llama4(4, 1))
        },
        Recipe {
            activation: Activation::plain(ActivationFunction::Relu2),
            latent: Some(29),
            norms: true,
            ..plain("latent", RouterConfig::mixtral(5, 2))
        },
        Recipe {
            shared: 2,
            shared_combine: || SharedCombine::RouterWeighted,
            ..plain("inkling", RouterConfig::inkling(7, 3, 2, 1.5))
        },
        Recipe {
            shared: 2,
            shared_combine: || SharedCombine::Average,
            activation: Activation {
                clamp: Clamp::Post { limit: 0.9 },
                ..Activation::gated(ActivationFunction::GeluTanh)
            },
            ..plain("average", RouterConfig::olmoe(6, 2))
        },
        plain("identity", identity.clone()),
        plain("dense", RouterConfig::dense(4)),
        plain("noisy", RouterConfig::noisy_top_k(8, 2, 7)),
        plain("one expert", RouterConfig::mixtral(1, 1)),
        Recipe {
            intermediate: 1,
            ..plain("I = 1", RouterConfig::mixtral(4, 4))
        },
        // No model has these, but what they mean is clear.
        Recipe {
            latent: Some(29),
            norms: true,
            ..plain("latent + x", identity.clone())
        },
        Recipe {
            weight_on_input: true,
            ..plain("input + x", identity)
        },
    ]
}
