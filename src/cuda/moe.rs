//! The whole layer on the GPU, in one call that only launches.
//!
//! ```text
//! x[T,H] ──gate──▶ logits[T,R] ──route──▶ ids, weights[T,K] ──permute──▶ offsets, pair_of_row, row_of_pair
//!   │
//!   ├── rows gathered · W_gate_upᵀ, activation ──▶ h[TK,I] · W_downᵀ ──▶ ys[TK,H] ── Σ weight·ys ──▶ · scale ──▶ y[T,H]
//!   └── shared expert ──────────────────────────────────────────────────────────────────────────▶ + ──▶ norm, bias, residual
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
mod layout;
mod plan;
mod products;
mod views;
mod weights;

pub use forward::{MoeOperands, NormView, RouteSource};
pub use layout::WorkspaceRouting;
pub use plan::{MoePlan, MoePointers, RoutingPointers};
pub use views::{ExpertViews, GateViews, SharedViews, UpViews};
pub use weights::{BiasPointers, ExpertPointers, GatePointers, SharedPointers, WeightPointers};

use super::grouped_gemm::Numerics;
use crate::element::DType;
use crate::error::{Error, Result};
use crate::grouped_gemm::Activation;
use crate::routing::{NullExperts, RouterConfig};
use core::ops::Range;

/// How the shared expert's output S(x) joins the routed sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SharedJoin {
    /// `y + S(x)`
    Add,
    /// `y + σ(x · g) · S(x)` with g `[1, H]` (Qwen2-MoE).
    SigmoidGate,
    /// `(y + S(x)) / 2` (Cohere 2 MoE)
    Average,
}

/// The expert that every token visits. Several shared experts that only add up are one whose I is the sum of theirs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SharedExpert {
    /// I of the shared expert.
    pub intermediate: usize,
    /// Between its two products.
    pub activation: Activation,
    /// How its output joins.
    pub join: SharedJoin,
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
        if router.joint_shared > 0 {
            let expected = "0: shared experts that the router weighs run on the CPU only";
            return Err(Error::value("joint_shared", expected, router.joint_shared));
        }
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

    /// A pair's weight multiplies the expert's input instead of its output (Llama 4).
    ///
    /// # Errors
    /// [`Error::Value`] when the router has identity experts, whose weight has no input to act on.
    pub fn with_weight_on_input(mut self) -> Result<Self> {
        if matches!(self.router.null_experts, NullExperts::Identity(_)) {
            let expected = "a router without identity experts (on a GPU)";
            return Err(Error::value("weight_on_input", expected, "some"));
        }
        self.weight_on_input = true;
        Ok(self)
    }

    /// A factor on the routed sum, before the shared expert.
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

    /// Adds a shared expert.
    ///
    /// # Errors
    /// [`Error::Value`] for a zero size or a bad activation.
    pub fn with_shared(mut self, shared: SharedExpert) -> Result<Self> {
        shared.activation.validate()?;
        check_size("shared.intermediate", shared.intermediate)?;
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

    /// The shared expert.
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
