//! The whole layer in one call, and each of its stages.
//!
//! ```text
//! x[T,H] ──gate──▶ logits[T,R] ──route──▶ ids, weights[T,K], offsets, pair_of_row, row_of_pair
//!   │
//!   ├─(latent in)─▶ gather rows ─▶ W_gate_up ─▶ activation ─▶ h[TK,I] ─▶ W_down ─▶ ys[TK,H] ─(post norm)─▶ Σ weight·ys
//!   │                                                                                  · scale, (latent out) ─▶ y[T,H]
//!   └──▶ shared experts ──────────────────────────────────────────────────────────────────────────────▶ + ──▶ norm, bias ─▶ y
//! ```
//!
//! A layer owns its packed weights. The caller owns inputs, outputs, the [`Routing`] and the workspace, so a call allocates nothing.
//!
//! The intermediate h has the format of x, as it does in the published models; latent inputs, ys and all sums are f32.

use crate::combine::{Combine, Identity, Routed, Shared, combine_into};
use crate::cpu::Cpu;
use crate::cpu::norm::normalize_rows;
use crate::element::DType;
use crate::error::{Error, Result};
use crate::experts::PackedExperts;
use crate::grouped_gemm::{Gather, Groups, PackedMatrices, grouped_gemm_into, scratch_bytes};
use crate::matrix::{AnyMatMut, AnyMatRef, MatMut, MatRef};
use crate::norm::RmsNorm;
use crate::routing::{NullExperts, RouteInput, Router, Routing};
use crate::workspace::{Arena, Sizes, any_mat, any_mat_mut};
use bytemuck::cast_slice_mut;
use core::ops::Range;

/// The projection from tokens to logits: `logits = norm(x) · Wᵀ + b`, always in f32.
#[derive(Clone, Debug)]
pub struct Gate {
    weights: PackedMatrices,
    noise: Option<PackedMatrices>,
    input_norm: Option<PostNorm>,
}

impl Gate {
    /// A gate `w [R, H]` with an optional bias `[R]`; weights of any format are widened to f32.
    ///
    /// # Errors
    /// [`Error`] naming `w` or `bias`.
    pub fn new(cpu: &Cpu, w: AnyMatRef<'_>, bias: Option<&[f32]>) -> Result<Self> {
        let mut weights = PackedMatrices::new(cpu, w.rows(), w.cols(), DType::F32)?;
        weights.push(cpu, w, bias)?;
        Ok(Self {
            weights,
            noise: None,
            input_norm: None,
        })
    }

    /// Noise logits `x · W_noiseᵀ`, `[R, H]`, for a router with a noise seed (Shazeer et al. 2017).
    ///
    /// # Errors
    /// [`Error::Shape`] naming `noise`.
    pub fn with_noise(mut self, cpu: &Cpu, w: AnyMatRef<'_>) -> Result<Self> {
        w.expect("noise", self.weights.n(), self.weights.k())?;
        let mut noise = PackedMatrices::new(cpu, w.rows(), w.cols(), DType::F32)?;
        noise.push(cpu, w, None)?;
        self.noise = Some(noise);
        Ok(self)
    }

    /// Normalises the gate's input: `x / √(mean(x²) + eps) · weight · mul` (Gemma 4).
    ///
    /// # Errors
    /// [`Error::Shape`] naming `input_norm`.
    pub fn with_input_norm(mut self, norm: RmsNorm) -> Result<Self> {
        norm.check("input_norm", self.weights.k())?;
        self.input_norm = Some(PostNorm::NormFirst(norm));
        Ok(self)
    }
}

/// How the shared experts' output S(x) joins the routed sum.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum SharedCombine {
    /// `y + Σ S_j(x)`
    Add,
    /// `y + σ(x · g) · Σ S_j(x)`, g `[1, H]` (Qwen2-MoE); see [`SharedExperts::with_sigmoid_gate`].
    SigmoidGate(PackedMatrices),
    /// `(y + Σ S_j(x)) / 2` (Cohere 2 MoE)
    Average,
    /// `y + Σ γ_j · S_j(x)`, γ the router's joint shared weights (Inkling).
    RouterWeighted,
}

/// Experts that every token visits.
#[derive(Clone, Debug)]
pub struct SharedExperts {
    experts: PackedExperts,
    combine: SharedCombine,
}

impl SharedExperts {
    /// Shared experts and how they join.
    ///
    /// # Errors
    /// [`Error::Value`] when there are none.
    pub fn new(experts: PackedExperts, combine: SharedCombine) -> Result<Self> {
        if experts.is_empty() {
            return Err(Error::value("shared experts", "at least one", 0));
        }
        Ok(Self { experts, combine })
    }

    /// Shared experts behind a sigmoid gate `w [1, H]`.
    ///
    /// # Errors
    /// [`Error::Shape`] naming `gate`, [`Error::Value`] when there are no experts.
    pub fn with_sigmoid_gate(cpu: &Cpu, experts: PackedExperts, w: AnyMatRef<'_>) -> Result<Self> {
        w.expect("gate", 1, experts.hidden())?;
        let mut gate = PackedMatrices::new(cpu, 1, w.cols(), DType::F32)?;
        gate.push(cpu, w, None)?;
        Self::new(experts, SharedCombine::SigmoidGate(gate))
    }
}

/// Routed experts that work in a narrower space: `z = norm(x · W_inᵀ)`, experts `L → I → L`, `y = (Σ w·ys) · W_outᵀ` (Nemotron-H, Muse Spark).
#[derive(Clone, Debug)]
pub struct Latent {
    down: PackedMatrices,
    norm: Option<PostNorm>,
    up: PackedMatrices,
}

impl Latent {
    /// `w_in [L, H]` and `w_out [H, L]`, kept in `dtype`.
    ///
    /// # Errors
    /// [`Error::Shape`] naming `w_out`.
    pub fn new(cpu: &Cpu, w_in: AnyMatRef<'_>, w_out: AnyMatRef<'_>, dtype: DType) -> Result<Self> {
        w_out.expect("w_out", w_in.cols(), w_in.rows())?;
        let mut down = PackedMatrices::new(cpu, w_in.rows(), w_in.cols(), dtype)?;
        down.push(cpu, w_in, None)?;
        let mut up = PackedMatrices::new(cpu, w_out.rows(), w_out.cols(), dtype)?;
        up.push(cpu, w_out, None)?;
        Ok(Self {
            down,
            norm: None,
            up,
        })
    }

    /// Normalises the latent input.
    ///
    /// # Errors
    /// [`Error::Shape`] naming `latent norm`.
    pub fn with_norm(mut self, norm: RmsNorm) -> Result<Self> {
        norm.check("latent norm", self.width())?;
        self.norm = Some(PostNorm::NormFirst(norm));
        Ok(self)
    }

    /// L
    pub fn width(&self) -> usize {
        self.down.n()
    }
}

/// Where a call gets its routing from.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub enum RouteFrom<'a> {
    /// Logits from x through the layer's gate, ids from the router.
    #[default]
    Gate,
    /// Logits from x through the layer's gate, ids `[T, K]` from the caller (the router's selection is [`Selection::Given`](crate::routing::Selection::Given)).
    GateAndIds(&'a [i32]),
    /// Logits `[T, R]` from the caller.
    Logits(AnyMatRef<'a>),
    /// Logits `[T, R]` and ids `[T, K]` from the caller.
    LogitsAndIds(AnyMatRef<'a>, &'a [i32]),
    /// The [`Routing`] as the caller has filled it, by [`Routing::set_given`] or an earlier call on as many tokens.
    Routing,
}

/// What one call may add to its input.
#[derive(Clone, Copy, Debug, Default)]
pub struct Forward<'a> {
    /// Where the routing comes from.
    pub route: RouteFrom<'a>,
    /// Added to the result, `[T, H]`.
    pub residual: Option<AnyMatRef<'a>>,
    /// Position of the first token, for a router with noise.
    pub position: u64,
}

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
    router: Router,
    gate: Option<Gate>,
    experts: PackedExperts,
    first_expert: usize,
    weight_on_input: bool,
    latent: Option<Latent>,
    post_norm: Option<PostNorm>,
    routed_scale: f32,
    shared: Option<SharedExperts>,
    out_norm: Option<RmsNorm>,
    out_bias: Option<Vec<f32>>,
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
        let known = router.config().num_experts;
        if experts.is_empty() || experts.len() > known {
            return Err(Error::value(
                "experts",
                format!("1 to {known}"),
                experts.len(),
            ));
        }
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

    /// A layer whose experts work in a latent space of L = `experts.hidden()` columns.
    ///
    /// # Errors
    /// As [`MoeLayer::new`]; [`Error::Shape`] naming `latent`; [`Error::Value`] with identity experts, for which no model says which space they
    /// return.
    pub fn new_latent(router: Router, experts: PackedExperts, latent: Latent) -> Result<Self> {
        if latent.width() != experts.hidden() {
            return Err(Error::shape("latent", [experts.hidden()], [latent.width()]));
        }
        if matches!(router.config().null_experts, NullExperts::Identity(_)) {
            return Err(Error::value(
                "latent",
                "no identity experts beside it",
                "some",
            ));
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
        Ok(self)
    }

    /// The layer holds experts `first .. first + experts.len()` of the router's; pairs of the others are skipped (expert parallelism: the
    /// layers' outputs add up, so give the shared experts, bias and residual to one of them).
    ///
    /// # Errors
    /// [`Error::Value`] naming `first_expert`.
    pub fn with_first_expert(mut self, first: usize) -> Result<Self> {
        let last = self.router.config().num_experts - self.experts.len();
        if first > last {
            return Err(Error::value(
                "first_expert",
                format!("at most {last}"),
                first,
            ));
        }
        self.first_expert = first;
        Ok(self)
    }

    /// A pair's weight multiplies the expert's input instead of its output (Llama 4).
    ///
    /// # Errors
    /// [`Error::Value`] with identity experts, for which no model says what that means.
    pub fn with_weight_on_input(mut self) -> Result<Self> {
        if matches!(self.router.config().null_experts, NullExperts::Identity(_)) {
            return Err(Error::value(
                "weight_on_input",
                "no identity experts",
                "some",
            ));
        }
        self.weight_on_input = true;
        Ok(self)
    }

    /// Normalises each expert's output before its weight.
    ///
    /// # Errors
    /// [`Error::Shape`] naming `post_norm`.
    pub fn with_post_norm(mut self, norm: PostNorm) -> Result<Self> {
        norm.norm().check("post_norm", self.experts.hidden())?;
        self.post_norm = Some(norm);
        Ok(self)
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
    /// [`Error::Shape`] naming `shared`; [`Error::Value`] when router weights are wanted and their number differs.
    pub fn with_shared(mut self, shared: SharedExperts) -> Result<Self> {
        if shared.experts.hidden() != self.hidden() {
            return Err(Error::shape(
                "shared",
                [self.hidden()],
                [shared.experts.hidden()],
            ));
        }
        let joint = self.router.config().joint_shared;
        if matches!(shared.combine, SharedCombine::RouterWeighted) && shared.experts.len() != joint
        {
            return Err(Error::value(
                "shared",
                format!("the {joint} experts that the router weighs"),
                shared.experts.len(),
            ));
        }
        self.shared = Some(shared);
        Ok(self)
    }

    /// Normalises the layer's output, after shared experts.
    ///
    /// # Errors
    /// [`Error::Shape`] naming `out_norm`.
    pub fn with_out_norm(mut self, norm: RmsNorm) -> Result<Self> {
        norm.check("out_norm", self.hidden())?;
        self.out_norm = Some(norm);
        Ok(self)
    }

    /// Adds a bias `[H]` to the output, after the norm.
    ///
    /// # Errors
    /// [`Error::Shape`] naming `out_bias`.
    pub fn with_out_bias(mut self, bias: &[f32]) -> Result<Self> {
        if bias.len() != self.hidden() {
            return Err(Error::shape("out_bias", [self.hidden()], [bias.len()]));
        }
        self.out_bias = Some(bias.to_vec());
        Ok(self)
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

    /// The experts of the router that live here.
    pub fn local_experts(&self) -> Range<usize> {
        self.first_expert..self.first_expert + self.experts.len()
    }

    /// Bytes that [`forward`](Self::forward) needs for up to `max_tokens` tokens on `cpu`, whatever their format.
    ///
    /// # Errors
    /// [`Error::Overflow`] when they do not fit the address space, or the pairs `u32`.
    pub fn workspace_size(&self, cpu: &Cpu, max_tokens: usize) -> Result<usize> {
        let pairs = crate::shape::pairs(max_tokens, self.router.config().slots())?;
        self.workspace_bytes(cpu, max_tokens, pairs, size_of::<f32>())
    }

    /// Bytes for so many tokens and rows, with elements of x of `size` bytes.
    fn workspace_bytes(&self, cpu: &Cpu, tokens: usize, rows: usize, size: usize) -> Result<usize> {
        let mut sizes = Sizes::new();
        for piece in self.pieces(tokens, rows, size) {
            sizes.add(&piece);
        }
        sizes.add(&[scratch_bytes(cpu)]);
        sizes.total()
    }

    /// The pieces of a workspace: rows × columns × bytes, zeros for those that this layer does without. [`Pieces::take`] takes them in this order.
    fn pieces(&self, tokens: usize, rows: usize, size: usize) -> [[usize; 3]; 11] {
        let when = |wanted: bool, piece: [usize; 3]| if wanted { piece } else { [0; 3] };
        let (h, l) = (self.hidden(), self.experts.hidden());
        let logits = [tokens, self.router.config().num_logits(), 4];
        let gate = self.gate.as_ref();
        let latent = self.latent.is_some();
        let shared = self.shared.as_ref();
        let shared_width = shared.map_or(0, |s| s.experts.intermediate());
        // One shared expert at a time, and their sum where there are several.
        let shared_outputs = shared.map_or(0, |s| s.experts.len().min(2));
        let gated = shared.is_some_and(|s| matches!(s.combine, SharedCombine::SigmoidGate(_)));
        [
            when(gate.is_some_and(|g| g.input_norm.is_some()), [tokens, h, 4]),
            when(gate.is_some(), logits),
            when(gate.is_some_and(|g| g.noise.is_some()), logits),
            when(latent, [tokens, l, 4]),
            [rows, self.experts.intermediate(), size],
            [rows, l, 4],
            when(latent, [tokens, l, 4]),
            when(latent, [tokens, h, 4]),
            [tokens, shared_width, size],
            when(shared.is_some(), [tokens, h * shared_outputs, 4]),
            when(gated, [tokens, 1, 4]),
        ]
    }

    /// The layer: `y [T, H]` from `x [T, H]`, both of any format. Shorthand for [`forward_with`](Self::forward_with) with the gate's routing and
    /// no residual.
    ///
    /// # Errors
    /// As there.
    pub fn forward(
        &self,
        cpu: &Cpu,
        x: AnyMatRef<'_>,
        y: AnyMatMut<'_>,
        routing: &mut Routing,
        workspace: &mut [u8],
    ) -> Result<()> {
        self.forward_with(cpu, x, &Forward::default(), y, routing, workspace)
    }

    /// The layer: `y [T, H]` from `x [T, H]`, both of any format.
    ///
    /// `routing` receives ids, weights and the permutation. `workspace` holds [`workspace_size`](Self::workspace_size) bytes, of any content. Nothing is allocated
    /// once `routing` has been as large (rayon's own queues aside). The bits depend on neither ISA, threads, nor the other tokens, but for routers that look
    /// at several tokens (capacity, expert choice).
    ///
    /// # Errors
    /// An [`Error`] that names the argument; `y` is untouched then.
    pub fn forward_with(
        &self,
        cpu: &Cpu,
        x: AnyMatRef<'_>,
        forward: &Forward<'_>,
        y: AnyMatMut<'_>,
        routing: &mut Routing,
        workspace: &mut [u8],
    ) -> Result<()> {
        let tokens = x.rows();
        x.expect("x", tokens, self.hidden())?;
        y.expect("y", tokens, self.hidden())?;
        if let Some(residual) = &forward.residual {
            residual.expect("residual", tokens, self.hidden())?;
        }
        let slots = match forward.route {
            RouteFrom::Routing => routing.slots(),
            _ => self.router.config().slots(),
        };
        let pairs = crate::shape::pairs(tokens, slots)?;
        let needed = self.workspace_bytes(cpu, tokens, pairs, x.dtype().size())?;
        let pieces = Pieces::take(self, tokens, pairs, x.dtype(), workspace, needed)?;
        self.check_packed(cpu)?;
        self.route(cpu, x, forward, routing, pieces)
            .and_then(|pieces| self.run(cpu, x, forward.residual, routing, y, pieces))
    }

    /// The router's stage alone: logits through the gate, ids, weights and the permutation into `routing`.
    ///
    /// `workspace` is that of [`forward`](Self::forward). `logits`, if given, receives what enters the score function, `[T, R]`.
    ///
    /// # Errors
    /// An [`Error`] that names the argument.
    pub fn route_into(
        &self,
        cpu: &Cpu,
        x: AnyMatRef<'_>,
        forward: &Forward<'_>,
        routing: &mut Routing,
        workspace: &mut [u8],
    ) -> Result<()> {
        x.expect("x", x.rows(), self.hidden())?;
        let pairs = crate::shape::pairs(x.rows(), self.router.config().slots())?;
        let needed = self.workspace_bytes(cpu, x.rows(), pairs, x.dtype().size())?;
        let pieces = Pieces::take(self, x.rows(), pairs, x.dtype(), workspace, needed)?;
        self.check_packed(cpu)?;
        self.route(cpu, x, forward, routing, pieces).map(drop)
    }

    /// The gate's logits `norm(x) · Wᵀ + b` as they are before multiplier, softcap and noise (see [`Router::effective_logits_into`]).
    ///
    /// # Errors
    /// An [`Error`] that names the argument; [`Error::Value`] naming `gate` when the layer has none.
    pub fn logits_into(
        &self,
        cpu: &Cpu,
        x: AnyMatRef<'_>,
        logits: MatMut<'_, f32>,
        workspace: &mut [u8],
    ) -> Result<()> {
        x.expect("x", x.rows(), self.hidden())?;
        let Some(gate) = &self.gate else {
            return Err(Error::value("gate", "a layer with a gate", "none"));
        };
        let pairs = crate::shape::pairs(x.rows(), self.router.config().slots())?;
        let needed = self.workspace_bytes(cpu, x.rows(), pairs, x.dtype().size())?;
        let pieces = Pieces::take(self, x.rows(), pairs, x.dtype(), workspace, needed)?;
        gate.logits_into(cpu, x, pieces.gate_x, logits.into(), None, pieces.scratch)
    }

    /// Everything packed must be for `cpu`; checked before the first stage writes.
    fn check_packed(&self, cpu: &Cpu) -> Result<()> {
        self.experts.check_isa(cpu)?;
        if let Some(gate) = &self.gate {
            gate.weights.check_isa("gate", cpu)?;
        }
        if let Some(latent) = &self.latent {
            latent.down.check_isa("latent", cpu)?;
        }
        match &self.shared {
            Some(shared) => shared.experts.check_isa(cpu),
            None => Ok(()),
        }
    }

    /// Fills `routing`; gives the workspace back.
    fn route<'w>(
        &self,
        cpu: &Cpu,
        x: AnyMatRef<'_>,
        forward: &Forward<'_>,
        routing: &mut Routing,
        mut pieces: Pieces<'w>,
    ) -> Result<Pieces<'w>> {
        let (tokens, width) = (x.rows(), self.router.config().num_logits());
        let (logits, ids) = match forward.route {
            RouteFrom::Routing => {
                self.check_given(routing, tokens)?;
                routing.localize(cpu, self.local_experts(), 1)?;
                return Ok(pieces);
            }
            RouteFrom::Gate => (None, None),
            RouteFrom::GateAndIds(ids) => (None, Some(ids)),
            RouteFrom::Logits(logits) => (Some(logits), None),
            RouteFrom::LogitsAndIds(logits, ids) => (Some(logits), Some(ids)),
        };
        let mut noise = None;
        let logits = match (logits, &self.gate) {
            (Some(logits), _) => {
                logits.expect("logits", tokens, width)?;
                logits
            }
            (None, Some(gate)) => {
                let out = MatMut::new(pieces.logits, tokens, width)?.into();
                let noise_out = match &gate.noise {
                    Some(_) => Some(MatMut::new(&mut *pieces.noise, tokens, width)?.into()),
                    None => None,
                };
                gate.logits_into(cpu, x, pieces.gate_x, out, noise_out, pieces.scratch)?;
                if gate.noise.is_some() {
                    noise = Some(MatRef::new(&*pieces.noise, tokens, width)?);
                }
                MatRef::new(&*pieces.logits, tokens, width)?.into()
            }
            (None, None) => {
                return Err(Error::value(
                    "route",
                    "logits or routing for a layer without a gate",
                    "none",
                ));
            }
        };
        let mut input = RouteInput::new(logits)
            .position(forward.position)
            .local_experts(self.local_experts());
        if let Some(noise) = noise {
            input = input.noise_logits(noise);
        }
        if let Some(ids) = ids {
            input = input.given_ids(ids);
        }
        self.router.route(cpu, &input, routing)?;
        pieces.gate_x = &mut [];
        pieces.logits = &mut [];
        pieces.noise = &mut [];
        Ok(pieces)
    }

    /// A routing that the caller made must be for these tokens and experts.
    fn check_given(&self, routing: &Routing, tokens: usize) -> Result<()> {
        if routing.tokens() != tokens {
            return Err(Error::shape(
                "routing",
                [tokens, routing.slots()],
                [routing.tokens(), routing.slots()],
            ));
        }
        let config = self.router.config();
        let expected = (config.num_experts, config.null_experts, config.joint_shared);
        let found = (
            routing.num_experts(),
            routing.null_experts(),
            routing.joint_shared(),
        );
        if found == expected {
            Ok(())
        } else {
            Err(Error::value(
                "routing",
                format!("one for {expected:?} (experts, null experts, joint shared experts)"),
                format!("{found:?}"),
            ))
        }
    }

    /// Experts, shared experts and the combine, from a finished routing. Every shape was checked or follows from the layer's own.
    fn run(
        &self,
        cpu: &Cpu,
        x: AnyMatRef<'_>,
        residual: Option<AnyMatRef<'_>>,
        routing: &Routing,
        y: AnyMatMut<'_>,
        pieces: Pieces<'_>,
    ) -> Result<()> {
        let (tokens, l) = (x.rows(), self.experts.hidden());
        let permutation = routing.permutation();
        let local = self.local_experts();
        let groups = Groups::Ragged {
            offsets: &permutation.offsets()[local.start..=local.end],
            counts: &permutation.counts()[local.clone()],
        };
        let rows = groups.total_rows();
        let scratch = pieces.scratch;

        let expert_x = match &self.latent {
            Some(latent) => latent.enter(cpu, x, pieces.latent_x, scratch)?,
            None => x,
        };
        let gather = Gather {
            pair_of_row: permutation.pair_of_row(),
            slots: routing.slots(),
            input_scale: self.weight_on_input.then(|| routing.weights()),
        };
        let i = self.experts.intermediate();
        let h_bytes = &mut pieces.h[..rows * i * x.dtype().size()];
        let h = any_mat_mut(h_bytes, x.dtype(), rows, i)?;
        self.experts
            .up_into(cpu, expert_x, Some(gather), groups, h, scratch)?;
        let h = any_mat(h_bytes, x.dtype(), rows, i)?;
        let ys = &mut pieces.ys[..rows * l];
        self.experts
            .down_into(cpu, h, groups, MatMut::new(ys, rows, l)?.into(), scratch)?;
        if let Some(norm) = &self.post_norm {
            normalize_rows(cpu, ys, norm);
        }

        let identity =
            matches!(routing.null_experts(), NullExperts::Identity(_)).then(|| Identity {
                ids: routing.ids(),
                num_experts: routing.num_experts(),
                x: expert_x,
            });
        let mut combine = Combine::new(Routed::Pairs {
            ys: MatRef::new(ys, rows, l)?,
            weights: (!self.weight_on_input).then(|| routing.weights()),
            row_of_pair: permutation.row_of_pair(),
            slots: routing.slots(),
            identity,
        });
        combine.routed_scale = self.routed_scale;
        if let Some(latent) = &self.latent {
            latent.leave(cpu, &combine, pieces.latent_y, pieces.routed, scratch)?;
            combine = Combine::new(Routed::Sum(MatRef::new(
                pieces.routed,
                tokens,
                self.hidden(),
            )?));
        }
        combine.shared = match &self.shared {
            Some(shared) => Some(shared.run(
                cpu,
                x,
                routing,
                pieces.shared_h,
                pieces.shared_y,
                pieces.shared_gate,
                scratch,
            )?),
            None => None,
        };
        combine.norm = self.out_norm.as_ref();
        combine.bias = self.out_bias.as_deref();
        combine.residual = residual;
        combine_into(cpu, &combine, y)
    }
}

impl Gate {
    /// Logits and noise logits; `buffer` is `[T, H]` floats for a normalised input.
    fn logits_into(
        &self,
        cpu: &Cpu,
        x: AnyMatRef<'_>,
        buffer: &mut [f32],
        logits: AnyMatMut<'_>,
        noise: Option<AnyMatMut<'_>>,
        scratch: &mut [u8],
    ) -> Result<()> {
        let x = match &self.input_norm {
            Some(norm) => {
                for (t, row) in buffer.chunks_exact_mut(x.cols()).enumerate() {
                    x.widen_row(t, 0, row);
                }
                normalize_rows(cpu, buffer, norm);
                MatRef::new(&*buffer, x.rows(), x.cols())?.into()
            }
            None => x,
        };
        product(cpu, x, &self.weights, 0, logits, scratch)?;
        match (&self.noise, noise) {
            (Some(weights), Some(out)) => product(cpu, x, weights, 0, out, scratch),
            _ => Ok(()),
        }
    }
}

impl Latent {
    /// `z = norm(x · W_inᵀ)`
    fn enter<'w>(
        &self,
        cpu: &Cpu,
        x: AnyMatRef<'_>,
        z: &'w mut [f32],
        scratch: &mut [u8],
    ) -> Result<AnyMatRef<'w>> {
        let out = MatMut::new(&mut *z, x.rows(), self.width())?.into();
        product(cpu, x, &self.down, 0, out, scratch)?;
        if let Some(norm) = &self.norm {
            normalize_rows(cpu, z, norm);
        }
        Ok(MatRef::new(&*z, x.rows(), self.width())?.into())
    }

    /// `out = (Σ weight · ys) · W_outᵀ`, through the sum in `buffer [T, L]`.
    fn leave(
        &self,
        cpu: &Cpu,
        combine: &Combine<'_>,
        buffer: &mut [f32],
        out: &mut [f32],
        scratch: &mut [u8],
    ) -> Result<()> {
        let tokens = buffer.len() / self.width();
        combine_into(
            cpu,
            combine,
            MatMut::new(&mut *buffer, tokens, self.width())?.into(),
        )?;
        let sum = MatRef::new(&*buffer, tokens, self.width())?.into();
        product(
            cpu,
            sum,
            &self.up,
            0,
            MatMut::new(out, tokens, self.up.n())?.into(),
            scratch,
        )
    }
}

impl SharedExperts {
    /// `S(x) [T, H]` in f32, and its gate's logits.
    fn run<'w>(
        &self,
        cpu: &Cpu,
        x: AnyMatRef<'_>,
        routing: &Routing,
        h: &mut [u8],
        y: &'w mut [f32],
        gate: &'w mut [f32],
        scratch: &mut [u8],
    ) -> Result<Shared<'w>> {
        let (tokens, hidden) = (x.rows(), x.cols());
        let (sum, single) = y.split_at_mut(tokens * hidden);
        let n = self.experts.len();
        for expert in 0..n {
            let groups = Groups::Single {
                rows: tokens,
                expert,
            };
            let width = self.experts.intermediate();
            let h_out = any_mat_mut(h, x.dtype(), tokens, width)?;
            self.experts.up_into(cpu, x, None, groups, h_out, scratch)?;
            let h_in = any_mat(h, x.dtype(), tokens, width)?;
            let out = if n == 1 { &mut *sum } else { &mut *single };
            let out = MatMut::new(out, tokens, hidden)?.into();
            self.experts.down_into(cpu, h_in, groups, out, scratch)?;
            let gamma = |t: usize| match self.combine {
                SharedCombine::RouterWeighted => routing.shared_weights()[t * n + expert],
                _ => 1.0,
            };
            if n == 1 {
                if matches!(self.combine, SharedCombine::RouterWeighted) {
                    for (t, row) in sum.chunks_exact_mut(hidden).enumerate() {
                        row.iter_mut().for_each(|v| *v *= gamma(t));
                    }
                }
            } else {
                accumulate(sum, single, hidden, expert == 0, &gamma);
            }
        }
        let s = MatRef::new(&*sum, tokens, hidden)?;
        Ok(match &self.combine {
            SharedCombine::Add | SharedCombine::RouterWeighted => Shared::Add(s),
            SharedCombine::Average => Shared::Average(s),
            SharedCombine::SigmoidGate(weights) => {
                let out = MatMut::new(&mut *gate, tokens, 1)?.into();
                product(cpu, x, weights, 0, out, scratch)?;
                Shared::SigmoidGate(s, gate)
            }
        })
    }
}

/// `sum[t] = γ(t) · y[t]`, plus the old sum after the first expert; one rounding for each operation, in expert order.
fn accumulate(
    sum: &mut [f32],
    y: &[f32],
    hidden: usize,
    first: bool,
    gamma: &dyn Fn(usize) -> f32,
) {
    let rows = sum.chunks_exact_mut(hidden).zip(y.chunks_exact(hidden));
    for (t, (sum, y)) in rows.enumerate() {
        let gamma = gamma(t);
        for (sum, &y) in sum.iter_mut().zip(y) {
            let term = gamma * y;
            *sum = if first { term } else { *sum + term };
        }
    }
}

/// An ordinary product with one matrix of a set.
fn product(
    cpu: &Cpu,
    x: AnyMatRef<'_>,
    weights: &PackedMatrices,
    expert: usize,
    out: AnyMatMut<'_>,
    scratch: &mut [u8],
) -> Result<()> {
    let groups = Groups::Single {
        rows: x.rows(),
        expert,
    };
    grouped_gemm_into(cpu, x, None, weights, groups, None, out, scratch)
}

/// A workspace, cut up. The names follow [`MoeLayer::pieces`].
struct Pieces<'w> {
    gate_x: &'w mut [f32],
    logits: &'w mut [f32],
    noise: &'w mut [f32],
    latent_x: &'w mut [f32],
    h: &'w mut [u8],
    ys: &'w mut [f32],
    latent_y: &'w mut [f32],
    routed: &'w mut [f32],
    shared_h: &'w mut [u8],
    shared_y: &'w mut [f32],
    shared_gate: &'w mut [f32],
    scratch: &'w mut [u8],
}

impl<'w> Pieces<'w> {
    fn take(
        layer: &MoeLayer,
        tokens: usize,
        rows: usize,
        dtype: DType,
        workspace: &'w mut [u8],
        needed: usize,
    ) -> Result<Self> {
        let mut arena = Arena::new(workspace, needed)?;
        let pieces = layer.pieces(tokens, rows, dtype.size());
        let [a, b, c, d, e, f, g, h, i, j, k] = pieces.map(|piece| arena.take(&piece));
        Ok(Self {
            gate_x: cast_slice_mut(a),
            logits: cast_slice_mut(b),
            noise: cast_slice_mut(c),
            latent_x: cast_slice_mut(d),
            h: e,
            ys: cast_slice_mut(f),
            latent_y: cast_slice_mut(g),
            routed: cast_slice_mut(h),
            shared_h: i,
            shared_y: cast_slice_mut(j),
            shared_gate: cast_slice_mut(k),
            scratch: arena.rest(),
        })
    }
}
