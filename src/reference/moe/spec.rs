//! A layer as plain data: what it does, its weights, what goes in and comes out.

use super::super::grouped_gemm::{Activation, Clamp, MlpSpec, nth};
use super::super::math::rms_norm;
use super::super::router::RouterSpec;

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
    /// side by side, each with a weight from [`RouteResult::shared_weights`](super::super::RouteResult::shared_weights) (Inkling).
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
    /// `[R,H]`: the noise of [`noisy_logits`](super::super::noisy_logits).
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

/// What [`moe_layer`](super::moe_layer) answers.
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
