//! The layers that are computed: one table for all tests.

use super::*;

/// How the gate and up rows of gated experts lie in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Up {
    Fused,
    Interleaved,
    Separate,
}

#[derive(Clone, Copy, Debug)]
pub struct Shared {
    pub count: usize,
    pub intermediate: usize,
    pub join: SharedJoin,
}

/// A layer to be computed on both sides.
#[derive(Clone, Debug)]
pub struct Case {
    pub name: &'static str,
    pub config: RouterConfig,
    pub hidden: usize,
    pub intermediate: usize,
    pub activation: Activation,
    pub up: Up,
    /// Of the gate and of the routed experts.
    pub biases: bool,
    pub correction_bias: bool,
    pub latent: Option<Latent>,
    pub gate_norm: bool,
    pub post_norm: Option<PostNorm>,
    pub shared: Option<Shared>,
    pub weight_on_input: bool,
    pub routed_scale: f32,
    pub local: Option<Range<usize>>,
    /// Norm, bias and residual.
    pub output_steps: bool,
}

impl Case {
    pub fn new(name: &'static str, config: RouterConfig) -> Self {
        Self {
            name,
            config,
            hidden: 40,
            intermediate: 24,
            activation: Activation::SWIGLU,
            up: Up::Fused,
            biases: false,
            correction_bias: false,
            latent: None,
            gate_norm: false,
            post_norm: None,
            shared: None,
            weight_on_input: false,
            routed_scale: 1.0,
            local: None,
            output_steps: false,
        }
    }

    pub fn local(&self) -> Range<usize> {
        self.local.clone().unwrap_or(0..self.config.num_experts)
    }

    /// L, or H.
    pub fn width(&self) -> usize {
        self.latent.map_or(self.hidden, |l| l.width)
    }

    /// Rows of a first projection.
    pub fn wide(&self, intermediate: usize) -> usize {
        intermediate * if self.activation.gated { 2 } else { 1 }
    }

    /// Whether the router adds noise, for which the gate has weights.
    pub fn is_noisy(&self) -> bool {
        self.config.noise_seed.is_some()
    }
}

pub fn identity(mut config: RouterConfig, count: usize) -> RouterConfig {
    config.null_experts = NullExperts::Identity(count);
    config
}

fn latent(width: usize, norm: bool) -> Option<Latent> {
    Some(Latent { width, norm })
}

fn shared(count: usize, intermediate: usize, join: SharedJoin) -> Option<Shared> {
    Some(Shared {
        count,
        intermediate,
        join,
    })
}

pub fn cases() -> Vec<Case> {
    [plain(), stepped()].concat()
}

pub fn case(name: &str) -> Case {
    let found = cases().into_iter().find(|c| c.name == name);
    found.unwrap_or_else(|| panic!("no layer is called {name}"))
}

/// Layers of experts, at most one shared expert and steps at the end: for these `bounds.rs` derives what roundings may do.
pub fn plain() -> Vec<Case> {
    let base = Case::new;
    vec![
        base("mixtral", RouterConfig::mixtral(8, 2)),
        Case {
            shared: shared(1, 32, SharedJoin::SigmoidGate),
            ..base("qwen2_moe", RouterConfig::qwen2_moe(6, 4))
        },
        Case {
            shared: shared(1, 16, SharedJoin::Add),
            correction_bias: true,
            ..base("deepseek_v3", RouterConfig::deepseek_v3(16, 4, 4, 2, 2.5))
        },
        Case {
            activation: Activation::GPT_OSS,
            up: Up::Interleaved,
            biases: true,
            ..base("gpt_oss", RouterConfig::gpt_oss(8, 4))
        },
        Case {
            weight_on_input: true,
            shared: shared(1, 24, SharedJoin::Add),
            ..base("llama4", RouterConfig::llama4(4, 1))
        },
        Case {
            activation: Activation::plain(ActivationFunction::Relu2),
            biases: true,
            routed_scale: 0.7,
            output_steps: true,
            ..base("norms", RouterConfig::mixtral(5, 2))
        },
        Case {
            shared: shared(1, 8, SharedJoin::Average),
            up: Up::Separate,
            activation: Activation::gated(ActivationFunction::GeluTanh),
            ..base("average", RouterConfig::olmoe(6, 2))
        },
        base("identity", identity(RouterConfig::mixtral(5, 3), 2)),
        base("dense", RouterConfig::dense(4)),
        // Multiples of nothing.
        Case {
            hidden: 67,
            intermediate: 37,
            shared: shared(1, 5, SharedJoin::SigmoidGate),
            ..base("odd plain", RouterConfig::mixtral(7, 3))
        },
        Case {
            hidden: 1,
            intermediate: 1,
            ..base("smallest", RouterConfig::mixtral(1, 1))
        },
    ]
}

/// Layers with more steps: a latent space, norms, several shared experts, identity experts beside weights on the input, noise of their own.
pub fn stepped() -> Vec<Case> {
    let base = Case::new;
    vec![
        Case {
            latent: latent(24, false),
            activation: Activation::plain(ActivationFunction::Relu2),
            shared: shared(1, 48, SharedJoin::Add),
            routed_scale: 2.5,
            ..base("nemotron_h", RouterConfig::deepseek_v3(16, 4, 4, 2, 1.0))
        },
        // The projection out writes y itself.
        Case {
            latent: latent(16, false),
            ..base("latent alone", RouterConfig::mixtral(6, 2))
        },
        Case {
            latent: latent(16, true),
            post_norm: Some(PostNorm::ScaleFirst),
            output_steps: true,
            ..base("muse_spark", RouterConfig::mixtral(8, 3))
        },
        Case {
            gate_norm: true,
            post_norm: Some(PostNorm::NormFirst),
            activation: Activation::gated(ActivationFunction::GeluTanh),
            ..base("gemma4", RouterConfig::gemma4(8, 2))
        },
        Case {
            shared: shared(2, 16, SharedJoin::RouterWeighted),
            ..base("inkling", RouterConfig::inkling(8, 3, 2, 8.0))
        },
        Case {
            shared: shared(1, 16, SharedJoin::RouterWeighted),
            ..base("one weighed", RouterConfig::inkling(5, 2, 1, 1.0))
        },
        // The router weighs experts whose weights nobody asks for.
        Case {
            shared: shared(3, 8, SharedJoin::Add),
            ..base("weighed in vain", RouterConfig::inkling(5, 2, 2, 1.0))
        },
        Case {
            shared: shared(2, 32, SharedJoin::Average),
            output_steps: true,
            ..base("cohere2_moe", RouterConfig::gpt_oss(6, 2))
        },
        Case {
            shared: shared(MAX_SHARED, 8, SharedJoin::SigmoidGate),
            ..base("many gated", RouterConfig::qwen2_moe(6, 2))
        },
        Case {
            weight_on_input: true,
            routed_scale: 0.7,
            ..base("on input", identity(RouterConfig::mixtral(5, 3), 3))
        },
        Case {
            weight_on_input: true,
            latent: latent(8, false),
            routed_scale: 0.7,
            shared: shared(2, 8, SharedJoin::Add),
            output_steps: true,
            ..base("all apart", identity(RouterConfig::mixtral(4, 3), 4))
        },
        Case {
            latent: latent(8, false),
            ..base("latent identity", identity(RouterConfig::mixtral(4, 3), 2))
        },
        Case {
            gate_norm: true,
            ..base("noisy", RouterConfig::noisy_top_k(8, 2, 1234))
        },
        // Experts of another layer have no rows, which no norm may touch, and identity experts are the first layer's.
        Case {
            local: Some(2..5),
            latent: latent(24, true),
            post_norm: Some(PostNorm::NormFirst),
            ..base("a part", identity(RouterConfig::mixtral(8, 4), 2))
        },
        // Multiples of nothing.
        Case {
            hidden: 67,
            intermediate: 37,
            latent: latent(19, true),
            gate_norm: true,
            post_norm: Some(PostNorm::NormFirst),
            shared: shared(3, 5, SharedJoin::SigmoidGate),
            output_steps: true,
            ..base("odd", identity(RouterConfig::mixtral(7, 3), 2))
        },
    ]
}
