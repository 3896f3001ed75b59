//! The layers that are computed, and their weights.

use super::*;

/// How gate and up rows lie in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Up {
    Plain,
    Fused,
    Interleaved,
    Separate,
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
    pub biases: bool,
    pub correction_bias: bool,
    pub shared: Option<(usize, SharedJoin)>,
    pub weight_on_input: bool,
    pub routed_scale: f32,
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
            shared: None,
            weight_on_input: false,
            routed_scale: 1.0,
            output_steps: false,
        }
    }
}

pub fn cases() -> Vec<Case> {
    let mut identity = RouterConfig::mixtral(5, 3);
    identity.null_experts = NullExperts::Identity(2);
    let base = Case::new;
    vec![
        base("mixtral", RouterConfig::mixtral(8, 2)),
        Case {
            shared: Some((32, SharedJoin::SigmoidGate)),
            ..base("qwen2_moe", RouterConfig::qwen2_moe(6, 4))
        },
        Case {
            shared: Some((16, SharedJoin::Add)),
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
            shared: Some((24, SharedJoin::Add)),
            ..base("llama4", RouterConfig::llama4(4, 1))
        },
        Case {
            activation: Activation::plain(ActivationFunction::Relu2),
            up: Up::Plain,
            biases: true,
            routed_scale: 0.7,
            output_steps: true,
            ..base("norms", RouterConfig::mixtral(5, 2))
        },
        Case {
            shared: Some((8, SharedJoin::Average)),
            up: Up::Separate,
            activation: Activation::gated(ActivationFunction::GeluTanh),
            ..base("average", RouterConfig::olmoe(6, 2))
        },
        base("identity", identity),
        base("dense", RouterConfig::dense(4)),
        // Multiples of nothing.
        Case {
            hidden: 67,
            intermediate: 37,
            shared: Some((5, SharedJoin::SigmoidGate)),
            ..base("odd", RouterConfig::mixtral(7, 3))
        },
        Case {
            hidden: 1,
            intermediate: 1,
            ..base("smallest", RouterConfig::mixtral(1, 1))
        },
    ]
}

/// Weights of a case, rounded to `dtype` so that both sides hold the same numbers.
pub struct Weights {
    pub dtype: DType,
    pub gate_w: Vec<f32>,
    pub gate_b: Vec<f32>,
    /// `[E, 2I, H]` gate rows first, or `[E, I, H]`.
    pub up: Vec<f32>,
    pub down: Vec<f32>,
    pub up_bias: Vec<f32>,
    pub down_bias: Vec<f32>,
    pub correction: Vec<f32>,
    pub shared_up: Vec<f32>,
    pub shared_down: Vec<f32>,
    pub shared_gate: Vec<f32>,
    pub norm: Vec<f32>,
    pub out_bias: Vec<f32>,
}

pub fn rounded(dtype: DType, v: Vec<f32>) -> Vec<f32> {
    Stored::new(dtype, &v).to_f32()
}

impl Weights {
    pub fn new(case: &Case, dtype: DType) -> Self {
        let mut rng = Rng(case.name.bytes().map(u64::from).sum());
        let (h, i, e) = (case.hidden, case.intermediate, case.config.num_experts);
        let is = case.shared.map_or(0, |(i, _)| i);
        let wide = if case.activation.gated { 2 } else { 1 };
        let mut scaled = |n: usize, fan_in: usize| {
            let scale = 1.0 / (fan_in.max(1) as f32).sqrt();
            rounded(
                dtype,
                rng.normals(n).into_iter().map(|v| v * scale).collect(),
            )
        };
        Self {
            dtype,
            gate_w: scaled(case.config.num_logits() * h, h),
            gate_b: scaled(case.config.num_logits(), 4),
            up: scaled(e * wide * i * h, h),
            down: scaled(e * h * i, i),
            up_bias: scaled(e * wide * i, 1),
            down_bias: scaled(e * h, 1),
            correction: scaled(case.config.selectable(), 1),
            shared_up: scaled(wide * is * h, h),
            shared_down: scaled(h * is, is),
            shared_gate: scaled(h, h),
            norm: scaled(h, 1),
            out_bias: scaled(h, 1),
        }
    }

    /// The same rows as they lie on the device.
    pub fn rows_on_device(&self, case: &Case) -> Vec<f32> {
        let (h, i) = (case.hidden, case.intermediate);
        match case.up {
            Up::Interleaved => interleave(&self.up, i, h),
            _ => self.up.clone(),
        }
    }

    pub fn up_bias_on_device(&self, case: &Case) -> Vec<f32> {
        match case.up {
            Up::Interleaved => interleave(&self.up_bias, case.intermediate, 1),
            _ => self.up_bias.clone(),
        }
    }
}

/// `[E, 2I, width]` with gate rows first, to gate and up rows in turn.
pub fn interleave(m: &[f32], i: usize, width: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(m.len());
    for expert in m.chunks(2 * i * width) {
        for row in 0..i {
            out.extend_from_slice(&expert[row * width..][..width]);
            out.extend_from_slice(&expert[(i + row) * width..][..width]);
        }
    }
    out
}
