//! What a layer is made of, checked when it is put together.

use super::{Gate, Latent, SharedCombine, SharedExperts};
use crate::error::{Error, Result};
use crate::experts::PackedExperts;
use crate::norm::RmsNorm;
use crate::routing::Router;
use core::ops::Range;

/// A mixture-of-experts layer.
///
/// ```
/// use moe_kernels::experts::{ExpertWeights, PackedExperts};
/// use moe_kernels::grouped_gemm::Activation;
/// use moe_kernels::moe::{Gate, MoeLayer};
/// use moe_kernels::routing::{Router, RouterConfig, Routing};
/// use moe_kernels::{Cpu, DType, MatMut, MatRef};
///
/// let (tokens, hidden, intermediate, num_experts) = (3, 8, 4, 4);
/// let cpu = Cpu::new();
/// let w = vec![0.01f32; 2 * intermediate * hidden];
/// let mut experts = PackedExperts::new(&cpu, hidden, intermediate, Activation::SWIGLU, DType::BF16)?;
/// for _ in 0..num_experts {
///     let gate_up = MatRef::new(&w, 2 * intermediate, hidden)?.into();
///     let down = MatRef::new(&w, hidden, intermediate)?.into();
///     experts.push(&cpu, &ExpertWeights::fused(gate_up, down)?)?;
/// }
/// let router = Router::new(RouterConfig::mixtral(num_experts, 2))?;
/// let gate_w = vec![0.1f32; num_experts * hidden];
/// let gate = Gate::new(&cpu, MatRef::new(&gate_w, num_experts, hidden)?.into(), None)?;
/// let layer = MoeLayer::new(router, experts)?.with_gate(gate)?;
///
/// let x = vec![1.0f32; tokens * hidden];
/// let mut y = vec![0.0f32; tokens * hidden];
/// let mut routing = Routing::with_capacity(tokens, layer.router())?;
/// let mut workspace = vec![0u8; layer.workspace_size(&cpu, tokens)?];
/// layer.forward(
///     &cpu,
///     MatRef::new(&x, tokens, hidden)?.into(),
///     MatMut::new(&mut y, tokens, hidden)?.into(),
///     &mut routing,
///     &mut workspace,
/// )?;
/// assert_eq!(routing.ids(), [0, 1, 0, 1, 0, 1]); // equal logits: the lower indices
/// assert!(y.iter().all(|&v| v == y[0] && v > 0.0));
/// # Ok::<(), moe_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct MoeLayer {
    pub(super) router: Router,
    pub(super) gate: Option<Gate>,
    pub(super) experts: PackedExperts,
    pub(super) first_expert: usize,
    pub(super) weight_on_input: bool,
    pub(super) latent: Option<Latent>,
    pub(super) post_norm: Option<PostNorm>,
    pub(super) routed_scale: f32,
    pub(super) shared: Option<SharedExperts>,
    pub(super) out_norm: Option<RmsNorm>,
    pub(super) out_bias: Option<Vec<f32>>,
}

/// Normalisation of each expert's output, before its weight.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum PostNorm {
    /// `o / √(mean(o²) + eps) · weight`
    NormFirst(RmsNorm),
    /// `q / √(mean(q²) + eps)` with `q = o · weight` (Muse Spark)
    ScaleFirst(RmsNorm),
}

impl PostNorm {
    pub(crate) fn norm(&self) -> &RmsNorm {
        match self {
            Self::NormFirst(norm) | Self::ScaleFirst(norm) => norm,
        }
    }
}

impl MoeLayer {
    /// A layer of a router and its experts. Give it a [`Gate`] unless every call brings its own logits or routing.
    ///
    /// # Errors
    /// [`Error::Value`] when there are no experts, or more than the router knows.
    pub fn new(router: Router, experts: PackedExperts) -> Result<Self> {
        Self::check_experts(&router, &experts)?;
        Ok(Self {
            router,
            gate: None,
            experts,
            first_expert: 0,
            weight_on_input: false,
            latent: None,
            post_norm: None,
            routed_scale: 1.0,
            shared: None,
            out_norm: None,
            out_bias: None,
        })
    }

    /// What [`MoeLayer::new`] asks of experts, for callers who must know before they give them away.
    pub(crate) fn check_experts(router: &Router, experts: &PackedExperts) -> Result<()> {
        let known = router.config().num_experts;
        if experts.is_empty() || experts.len() > known {
            let expected = format!("1 to {known}");
            return Err(Error::value("experts", expected, experts.len()));
        }
        Ok(())
    }

    /// A layer whose experts work in a latent space of L = `experts.hidden()` columns. Identity experts return x itself.
    ///
    /// # Errors
    /// As [`MoeLayer::new`]; [`Error::Shape`] naming `latent`.
    pub fn new_latent(router: Router, experts: PackedExperts, latent: Latent) -> Result<Self> {
        if latent.width() != experts.hidden() {
            return Err(Error::shape("latent", [experts.hidden()], [latent.width()]));
        }
        Ok(Self {
            latent: Some(latent),
            ..Self::new(router, experts)?
        })
    }

    /// Computes logits from x.
    ///
    /// # Errors
    /// [`Error::Shape`] naming `gate`; [`Error::Value`] when noise weights and the router's noise seed do not come together.
    pub fn with_gate(mut self, gate: Gate) -> Result<Self> {
        self.set_gate(gate)?;
        Ok(self)
    }

    /// [`with_gate`](Self::with_gate) in place; the layer is unchanged on error.
    pub(crate) fn set_gate(&mut self, gate: Gate) -> Result<()> {
        let expected = [self.router.config().num_logits(), self.hidden()];
        let found = [gate.weights.n(), gate.weights.k()];
        if found != expected {
            return Err(Error::shape("gate", expected, found));
        }
        if gate.noise.is_some() != self.router.config().noise_seed.is_some() {
            return Err(Error::value(
                "gate",
                "noise weights exactly when the router has a noise seed",
                if gate.noise.is_some() {
                    "noise weights"
                } else {
                    "no noise weights"
                },
            ));
        }
        self.gate = Some(gate);
        Ok(())
    }

    /// The layer holds experts `first .. first + experts.len()` of the router's; pairs of the others are skipped (expert parallelism: the
    /// layers' outputs add up, so give the shared experts, bias and residual to one of them). Identity experts belong to the layer that holds expert 0.
    ///
    /// # Errors
    /// [`Error::Value`] naming `first_expert`.
    pub fn with_first_expert(mut self, first: usize) -> Result<Self> {
        self.set_first_expert(first)?;
        Ok(self)
    }

    /// [`with_first_expert`](Self::with_first_expert) in place; the layer is unchanged on error.
    pub(crate) fn set_first_expert(&mut self, first: usize) -> Result<()> {
        let last = self.router.config().num_experts - self.experts.len();
        if first > last {
            return Err(Error::value(
                "first_expert",
                format!("at most {last}"),
                first,
            ));
        }
        self.first_expert = first;
        Ok(())
    }

    /// A pair's weight multiplies the expert's input instead of its output (Llama 4).
    pub fn with_weight_on_input(mut self) -> Self {
        self.set_weight_on_input(true);
        self
    }

    /// [`with_weight_on_input`](Self::with_weight_on_input) in place, or taken back.
    pub(crate) fn set_weight_on_input(&mut self, on: bool) {
        self.weight_on_input = on;
    }

    /// Normalises each expert's output before its weight.
    ///
    /// # Errors
    /// [`Error::Shape`] naming `post_norm`.
    pub fn with_post_norm(mut self, norm: PostNorm) -> Result<Self> {
        self.set_post_norm(norm)?;
        Ok(self)
    }

    /// [`with_post_norm`](Self::with_post_norm) in place; the layer is unchanged on error.
    pub(crate) fn set_post_norm(&mut self, norm: PostNorm) -> Result<()> {
        norm.norm().check("post_norm", self.experts.hidden())?;
        self.post_norm = Some(norm);
        Ok(())
    }

    /// A factor on the routed sum, before shared experts.
    ///
    /// # Errors
    /// [`Error::Value`] when it is not finite.
    pub fn with_routed_scale(mut self, scale: f32) -> Result<Self> {
        self.set_routed_scale(scale)?;
        Ok(self)
    }

    /// [`with_routed_scale`](Self::with_routed_scale) in place; the layer is unchanged on error.
    pub(crate) fn set_routed_scale(&mut self, scale: f32) -> Result<()> {
        if !scale.is_finite() {
            return Err(Error::value("routed_scale", "a finite number", scale));
        }
        self.routed_scale = scale;
        Ok(())
    }

    /// Adds shared experts.
    ///
    /// # Errors
    /// [`Error::Shape`] naming `shared`; [`Error::Value`] when router weights are wanted and their number differs.
    pub fn with_shared(mut self, shared: SharedExperts) -> Result<Self> {
        let weighted = matches!(shared.combine, SharedCombine::RouterWeighted);
        self.check_shared(&shared.experts, weighted)?;
        self.set_shared(shared);
        Ok(self)
    }

    /// What [`with_shared`](Self::with_shared) asks of experts, for callers who must know before they give them away.
    pub(crate) fn check_shared(&self, experts: &PackedExperts, weighted: bool) -> Result<()> {
        if experts.hidden() != self.hidden() {
            return Err(Error::shape("shared", [self.hidden()], [experts.hidden()]));
        }
        let joint = self.router.config().joint_shared;
        if weighted && experts.len() != joint {
            let expected = format!("the {joint} experts that the router weighs");
            return Err(Error::value("shared", expected, experts.len()));
        }
        Ok(())
    }

    /// Shared experts that [`check_shared`](Self::check_shared) has seen.
    pub(crate) fn set_shared(&mut self, shared: SharedExperts) {
        self.shared = Some(shared);
    }

    /// Normalises the layer's output, after shared experts.
    ///
    /// # Errors
    /// [`Error::Shape`] naming `out_norm`.
    pub fn with_out_norm(mut self, norm: RmsNorm) -> Result<Self> {
        self.set_out_norm(norm)?;
        Ok(self)
    }

    /// [`with_out_norm`](Self::with_out_norm) in place; the layer is unchanged on error.
    pub(crate) fn set_out_norm(&mut self, norm: RmsNorm) -> Result<()> {
        norm.check("out_norm", self.hidden())?;
        self.out_norm = Some(norm);
        Ok(())
    }

    /// Adds a bias `[H]` to the output, after the norm.
    ///
    /// # Errors
    /// [`Error::Shape`] naming `out_bias`.
    pub fn with_out_bias(mut self, bias: &[f32]) -> Result<Self> {
        self.set_out_bias(bias)?;
        Ok(self)
    }

    /// [`with_out_bias`](Self::with_out_bias) in place; the layer is unchanged on error.
    pub(crate) fn set_out_bias(&mut self, bias: &[f32]) -> Result<()> {
        if bias.len() != self.hidden() {
            return Err(Error::shape("out_bias", [self.hidden()], [bias.len()]));
        }
        self.out_bias = Some(bias.to_vec());
        Ok(())
    }

    /// H: the width of a token.
    pub fn hidden(&self) -> usize {
        match &self.latent {
            Some(latent) => latent.up.n(),
            None => self.experts.hidden(),
        }
    }

    /// The router.
    pub fn router(&self) -> &Router {
        &self.router
    }

    /// The router, to replace its correction bias between steps.
    pub fn router_mut(&mut self) -> &mut Router {
        &mut self.router
    }

    /// The routed experts.
    pub fn experts(&self) -> &PackedExperts {
        &self.experts
    }

    /// The routed experts, to be taken elsewhere: with more of them pushed, into a new layer for example. None is packed again.
    pub fn into_experts(self) -> PackedExperts {
        self.experts
    }

    /// The experts of the router that live here.
    pub fn local_experts(&self) -> Range<usize> {
        self.first_expert..self.first_expert + self.experts.len()
    }
}
