//! The whole layer on the GPU, in one call that only launches.
//!
//! ```text
//! x[T,H] ─(norm)─ gate ──▶ logits[T,R] ──route──▶ ids, weights[T,K] ──permute──▶ offsets, pair_of_row, row_of_pair
//!   │
//!   ├─(latent in)─ rows gathered · W_gate_upᵀ, activation ──▶ h[TK,I] · W_downᵀ ──▶ ys[TK,H] ─(post norm)─ Σ weight·ys · scale ─(latent out)─▶ y[T,H]
//!   └── shared experts ──────────────────────────────────────────────────────────────────────────────────▶ + ──▶ norm, bias, residual
//! ```
//!
//! A [`CudaMoeLayer`] is plain data: what the layer does, not its weights, which stay where the framework has them ([`ExpertPointers`]) and are named in each call.
//! The caller owns the workspace, sized by [`workspace_size`](CudaMoeLayer::workspace_size) for the most tokens that will come. A call allocates nothing, waits
//! for nothing and reads nothing back, so that it can be captured in a CUDA graph and replayed with other data in the same places.
//!
//! Three ways in:
//!
//! * [`CudaMoeLayer::plan`]: the launches as plain data;
//! * [`raw::moe_raw`](super::raw::moe_raw): queues them on a raw stream of the current context;
//! * [`CudaMoeLayer::forward_into`]: the same from cudarc's slices, checked.
//!
//! # Bits
//! Ids and weights are the CPU's from the same logits; and logits that the layer computes itself are the CPU's, too, since the gate's product is exact f32. Experts in
//! f32 (without TF32) give the CPU's bits all the way to y. Products on tensor cores do not: a token's result then has the same bits from run to run and in any
//! batch *of one class*: with [`strict`](CudaMoeLayer::strict) there is one class, otherwise calls of few pairs take kernels that read weights once and
//! sum in another order (see [`grouped_gemm`](super::grouped_gemm)).

mod forward;
mod latent;
mod layout;
mod plan;
mod products;
mod route;
mod shared;
mod views;
mod weights;

pub use forward::{MoeOperands, NormView, RouteSource};
pub use latent::{Latent, LatentPointers, LatentViews};
pub use layout::WorkspaceRouting;
pub use plan::{MoePlan, MoePointers};
pub use route::RoutingPointers;
pub use shared::{MAX_SHARED, SharedExpert, SharedJoin};
pub(in crate::cuda) use views::UpNames;
pub use views::{ExpertViews, GateViews, SharedViews, UpViews};
pub use weights::{BiasPointers, ExpertPointers, GatePointers, SharedPointers, WeightPointers};

use super::grouped_gemm::Numerics;
use crate::element::DType;
use crate::error::{Error, Result};
use crate::grouped_gemm::Activation;
use crate::routing::RouterConfig;
use core::ops::Range;

/// The order of [`CudaMoeLayer::with_post_norm`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PostNorm {
    /// `o / √(mean(o²) + eps) · weight · multiplier`
    NormFirst,
    /// `q / √(mean(q²) + eps) · multiplier` with `q = o · weight` (Muse Spark)
    ScaleFirst,
}

/// What a layer on the GPU does. Plain data; see the [module](self).
///
/// ```
/// use moe_kernels::DType;
/// use moe_kernels::cuda::DeviceInfo;
/// use moe_kernels::cuda::moe::CudaMoeLayer;
/// use moe_kernels::grouped_gemm::Activation;
/// use moe_kernels::routing::RouterConfig;
/// // Qwen3-30B-A3B: 128 experts, 8 a token, H = 2048, I = 768.
/// let layer = CudaMoeLayer::new(RouterConfig::mixtral(128, 8), 2048, 768, Activation::SWIGLU, DType::BF16)?;
/// let bytes = layer.workspace_size(4096, &DeviceInfo::H100)?;
/// assert!(bytes >= 4096 * 8 * (768 * 2 + 2048 * 4)); // h in bf16 and ys in f32
/// # Ok::<(), moe_kernels::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct CudaMoeLayer {
    router: RouterConfig,
    hidden: usize,
    intermediate: usize,
    activation: Activation,
    dtype: DType,
    ys_dtype: DType,
    local_experts: Range<usize>,
    weight_on_input: bool,
    gate_norm: bool,
    latent: Option<Latent>,
    post_norm: Option<PostNorm>,
    routed_scale: f32,
    shared: Option<SharedExpert>,
    numerics: Numerics,
    strict: bool,
}

impl CudaMoeLayer {
    /// A layer of E experts H → I → H with x, h and weights in `dtype`; ys in f32.
    ///
    /// # Errors
    /// Those of [`RouterConfig::validate`]; [`Error::Value`] for a zero size, a bad activation, and what the GPU's router does not do
    /// ([`routing`](super::routing) lists it).
    pub fn new(
        router: RouterConfig,
        hidden: usize,
        intermediate: usize,
        activation: Activation,
        dtype: DType,
    ) -> Result<Self> {
        super::routing::workspace_size(&router, 0)?;
        activation.validate()?;
        for (argument, size) in [("hidden", hidden), ("intermediate", intermediate)] {
            check_size(argument, size)?;
        }
        Ok(Self {
            local_experts: 0..router.num_experts,
            router,
            hidden,
            intermediate,
            activation,
            dtype,
            ys_dtype: DType::F32,
            weight_on_input: false,
            gate_norm: false,
            latent: None,
            post_norm: None,
            routed_scale: 1.0,
            shared: None,
            numerics: Numerics::default(),
            strict: false,
        })
    }

    /// Keeps the experts' output rows in another format until they are summed: in 16 bits they take half the traffic, and one rounding more.
    pub fn with_ys_dtype(mut self, dtype: DType) -> Self {
        self.ys_dtype = dtype;
        self
    }

    /// The layer holds these experts of the router's; pairs of the others are skipped (expert parallelism: the layers' outputs add up, so give the shared expert,
    /// bias and residual to one of them). Identity experts belong to the layer that holds expert 0.
    ///
    /// # Errors
    /// [`Error::Value`] naming `local_experts` when they are none or not the router's.
    pub fn with_local_experts(mut self, local: Range<usize>) -> Result<Self> {
        if local.is_empty() || local.end > self.router.num_experts {
            let expected = format!("a range inside 0..{}", self.router.num_experts);
            return Err(Error::value(
                "local_experts",
                expected,
                format_args!("{local:?}"),
            ));
        }
        self.local_experts = local;
        Ok(self)
    }

    /// A pair's weight multiplies the expert's input instead of its output (Llama 4). Identity experts, whose weight has no input to act on, still return
    /// weight · x.
    pub fn with_weight_on_input(mut self) -> Self {
        self.weight_on_input = true;
        self
    }

    /// The gate's input is normalised, `x / √(mean(x²) + eps) · weight · multiplier` in f32 (Gemma 4); each call through the gate brings
    /// [`gate_norm`](MoeOperands::gate_norm).
    pub fn with_gate_norm(mut self) -> Self {
        self.gate_norm = true;
        self
    }

    /// The routed experts work in a narrower space: `z = norm(x · W_inᵀ)`, experts `L → I → L`, `y = (Σ w·ys · scale) · W_outᵀ` (Nemotron-H). Identity experts
    /// return x itself. Each call brings [`latent`](MoeOperands::latent).
    ///
    /// # Errors
    /// [`Error::Value`] naming `latent.width` when it is zero or beyond 31 bits.
    pub fn with_latent(mut self, latent: Latent) -> Result<Self> {
        check_size("latent.width", latent.width)?;
        self.latent = Some(latent);
        Ok(self)
    }

    /// Each expert's output is normalised before its weight; each call brings [`post_norm`](MoeOperands::post_norm).
    pub fn with_post_norm(mut self, order: PostNorm) -> Self {
        self.post_norm = Some(order);
        self
    }

    /// A factor on the routed sum, before shared experts.
    ///
    /// # Errors
    /// [`Error::Value`] when it is not finite.
    pub fn with_routed_scale(mut self, scale: f32) -> Result<Self> {
        if !scale.is_finite() {
            return Err(Error::value("routed_scale", "a finite number", scale));
        }
        self.routed_scale = scale;
        Ok(self)
    }

    /// Adds shared experts.
    ///
    /// # Errors
    /// [`Error::Value`] for a zero size, a bad activation, a number of experts that is not 1 to [`MAX_SHARED`] or, with [`SharedJoin::RouterWeighted`], not the
    /// router's.
    pub fn with_shared(mut self, shared: SharedExpert) -> Result<Self> {
        shared.check(&self.router)?;
        self.shared = Some(shared);
        Ok(self)
    }

    /// One class of bits for every number of tokens: the kernels for few rows, which sum in another order, are not used.
    pub fn with_strict(mut self) -> Self {
        self.strict = true;
        self
    }

    /// How the experts' products are summed; the gates' are exact whatever this says.
    pub fn with_numerics(mut self, numerics: Numerics) -> Self {
        self.numerics = numerics;
        self
    }

    /// The router.
    pub fn router(&self) -> &RouterConfig {
        &self.router
    }

    /// H
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// I
    pub fn intermediate(&self) -> usize {
        self.intermediate
    }

    /// The format of x and h.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The experts of the router that live here.
    pub fn local_experts(&self) -> Range<usize> {
        self.local_experts.clone()
    }

    /// Columns of what the routed experts take and give: L of a latent layer, else H.
    pub fn expert_hidden(&self) -> usize {
        self.latent.map_or(self.hidden, |latent| latent.width)
    }

    /// The shared experts.
    pub fn shared(&self) -> Option<&SharedExpert> {
        self.shared.as_ref()
    }

    /// Whether every number of tokens has the same bits.
    pub fn strict(&self) -> bool {
        self.strict
    }
}

/// Sizes of a matrix: at least 1, and such that the kernels' 32-bit column numbers hold them.
fn check_size(argument: &'static str, size: usize) -> Result<()> {
    if size == 0 || size > i32::MAX as usize {
        return Err(Error::value(argument, "1 to 2^31 - 1", size));
    }
    Ok(())
}
