//! [`Router`]: a checked config with its tensors, and the call that routes.

use super::config::{RouterConfig, Selection};
use super::output::Routing;
use crate::Cpu;
use crate::cpu::routing::{self as kernel, Block, Job, Plan};
use crate::error::{Error, Result};
use crate::matrix::{AnyMatRef, MatMut};
use crate::permute::{PermuteOptions, check_options};
use crate::shape::pairs;
use core::ops::Range;

/// A checked [`RouterConfig`] with the small tensors that belong to it. Make it once, at load.
///
/// ```
/// use moe_kernels::routing::{RouteInput, Router, RouterConfig, Routing};
/// use moe_kernels::{Cpu, MatRef};
/// let router = Router::new(RouterConfig::mixtral(4, 2))?;
/// let logits = [1.0f32, 3.0, 0.0, 2.0, /**/ 0.0, 0.0, 0.0, 0.0];
/// let mut routing = Routing::with_capacity(2, &router)?;
/// router.route(&Cpu::new(), &RouteInput::new(MatRef::new(&logits, 2, 4)?), &mut routing)?;
/// assert_eq!(routing.ids(), [1, 3, /* equal logits: the lower index */ 0, 1]);
/// assert_eq!(routing.weights()[2..], [0.5, 0.5]);
/// # Ok::<(), moe_kernels::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Router {
    config: RouterConfig,
    /// How tokens are routed in batches, with the tensors below.
    plan: Option<Plan>,
    /// In blocks of 32, zeros beyond the end; empty for none.
    correction_bias: Vec<Block>,
    per_expert_scale: Vec<f32>,
}

/// What one call routes.
///
/// ```
/// # use moe_kernels::{MatRef, routing::RouteInput};
/// # let (logits, noise) = ([0.0f32; 8], [0.0f32; 8]);
/// let input = RouteInput::new(MatRef::new(&logits, 2, 4)?)
///     .noise_logits(MatRef::new(&noise, 2, 4)?)
///     .position(512);
/// # Ok::<(), moe_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct RouteInput<'a> {
    logits: AnyMatRef<'a>,
    noise_logits: Option<AnyMatRef<'a>>,
    given_ids: Option<&'a [i32]>,
    position: u64,
    local_experts: Option<Range<usize>>,
    row_alignment: usize,
}

impl<'a> RouteInput<'a> {
    /// Logits `[T, R]` with R = [`RouterConfig::num_logits`], f32, f16 or bf16; routing computes in f32 whatever they are.
    pub fn new(logits: impl Into<AnyMatRef<'a>>) -> Self {
        Self {
            logits: logits.into(),
            noise_logits: None,
            given_ids: None,
            position: 0,
            local_experts: None,
            row_alignment: 1,
        }
    }

    /// Noise logits `[T, R]` (`x·W_noise`), wanted when and only when the config has a [`RouterConfig::noise_seed`].
    pub fn noise_logits(mut self, noise_logits: impl Into<AnyMatRef<'a>>) -> Self {
        self.noise_logits = Some(noise_logits.into());
        self
    }

    /// Ids `[T, K]`, wanted when and only when the selection is [`Selection::Given`]: below
    /// [`RouterConfig::selectable`], or [`DROPPED`](super::DROPPED).
    pub fn given_ids(mut self, ids: &'a [i32]) -> Self {
        self.given_ids = Some(ids);
        self
    }

    /// Position of the first token. Noise is drawn by position, so that a token's noise does not depend on the batch it comes in.
    pub fn position(mut self, position: u64) -> Self {
        self.position = position;
        self
    }

    /// The experts that live here: only their pairs get rows in the permutation. Ids and weights are those of all experts.
    pub fn local_experts(mut self, experts: Range<usize>) -> Self {
        self.local_experts = Some(experts);
        self
    }

    /// Rounds each expert's rows in the permutation up to a multiple of `rows`.
    pub fn row_alignment(mut self, rows: usize) -> Self {
        self.row_alignment = rows;
        self
    }
}

impl Router {
    /// A router without tensors.
    ///
    /// # Errors
    /// Those of [`RouterConfig::validate`].
    pub fn new(config: RouterConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            plan: Plan::new(&config, false, false),
            config,
            correction_bias: Vec::new(),
            per_expert_scale: Vec::new(),
        })
    }

    /// Adds a correction bias to what the selection ranks, `[E + null experts]`. It never enters a weight.
    ///
    /// −∞ is allowed: such an expert is taken only when too few others are left.
    ///
    /// # Errors
    /// [`Error::Shape`] for a wrong length; [`Error::Value`] for NaN or +∞, and when the selection ranks nothing
    /// (only [`Selection::TopK`] and [`Selection::ProductKeys`] do).
    pub fn with_correction_bias(mut self, bias: &[f32]) -> Result<Self> {
        self.set_correction_bias(bias)?;
        Ok(self)
    }

    /// Replaces the correction bias, as the balancing without auxiliary loss does after a step. Allocates the first time only.
    ///
    /// # Errors
    /// As [`with_correction_bias`](Self::with_correction_bias); the bias is then unchanged.
    pub fn set_correction_bias(&mut self, bias: &[f32]) -> Result<()> {
        const ARGUMENT: &str = "correction_bias";
        if !matches!(
            self.config.selection,
            Selection::TopK { .. } | Selection::ProductKeys { .. }
        ) {
            let found = "a bias for another selection";
            return Err(Error::value(
                ARGUMENT,
                "none unless TopK or ProductKeys ranks with it",
                found,
            ));
        }
        let n = self.config.selectable();
        if bias.len() != n {
            return Err(Error::shape(ARGUMENT, [n], [bias.len()]));
        }
        if let Some(bad) = bias.iter().find(|b| b.is_nan() || **b == f32::INFINITY) {
            return Err(Error::value(ARGUMENT, "finite numbers or -inf", bad));
        }
        self.correction_bias.resize(n.div_ceil(32), [0.0; 32]);
        self.correction_bias.as_flattened_mut()[..n].copy_from_slice(bias);
        self.make_plan();
        Ok(())
    }

    /// Multiplies the weight of expert e by `scale[e]`, `[E]`, after everything else. Null experts have none.
    ///
    /// # Errors
    /// [`Error::Shape`] for a wrong length, [`Error::Value`] for a number that is not finite.
    pub fn with_per_expert_scale(mut self, scale: &[f32]) -> Result<Self> {
        const ARGUMENT: &str = "per_expert_scale";
        if scale.len() != self.config.num_experts {
            return Err(Error::shape(
                ARGUMENT,
                [self.config.num_experts],
                [scale.len()],
            ));
        }
        if let Some(bad) = scale.iter().find(|s| !s.is_finite()) {
            return Err(Error::value(ARGUMENT, "finite numbers", bad));
        }
        self.per_expert_scale = scale.to_vec();
        self.make_plan();
        Ok(self)
    }

    /// After a change of the tensors.
    fn make_plan(&mut self) {
        let (biased, scaled) = (
            !self.correction_bias.is_empty(),
            !self.per_expert_scale.is_empty(),
        );
        self.plan = Plan::new(&self.config, biased, scaled);
    }

    /// What it was made from.
    pub fn config(&self) -> &RouterConfig {
        &self.config
    }

    /// `[E + null experts]`, or `None`.
    pub fn correction_bias(&self) -> Option<&[f32]> {
        let n = self.config.selectable();
        self.correction_bias.as_flattened().get(..n)
    }

    /// `[E]`, or `None`.
    pub fn per_expert_scale(&self) -> Option<&[f32]> {
        (!self.per_expert_scale.is_empty()).then_some(&self.per_expert_scale)
    }

    /// Routes T tokens: ids, weights and the permutation into `routing`.
    ///
    /// Slots are ordered by selection value, the best first ([`Selection::Dense`]: by index; [`Selection::Given`]: as given; a dropped pair
    /// keeps its slot). Ids are distinct and in range however bad the logits are: NaN ranks below −∞, equal values go to the lower
    /// index, and a row that is all NaN gets experts 0..K with weights NaN and harms no other row.
    ///
    /// The bits do not depend on ISA, threads or batch. Exceptions to the last, by definition: [`Capacity`](super::Capacity),
    /// [`Selection::ExpertChoice`], and [`Selection::ProductKeys`] when stacked. Allocates nothing once `routing` has been as large.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Value`] or [`Error::Overflow`] for an input that does not fit the config; `routing` is then unchanged.
    pub fn route(&self, cpu: &Cpu, input: &RouteInput<'_>, routing: &mut Routing) -> Result<()> {
        let job = self.check(input)?;
        let tokens = job.logits.rows();
        routing.check(&job)?;
        let options = PermuteOptions {
            block: input.row_alignment,
            local: input.local_experts.clone(),
            num_null: self.config.null_experts.count(),
        };
        let local = check_options(
            tokens * self.config.slots(),
            self.config.num_experts,
            &options,
        )?;
        let threads = kernel::threads(cpu, &self.config, tokens);
        routing.fit(&self.config, tokens, threads);
        routing.run(cpu, &job, threads);
        routing.sort_checked(cpu, options, local)
    }

    /// The logits as they enter the score function, `[T, R]`: multiplied, softly capped, with noise. For inspection; allocates one row.
    ///
    /// # Errors
    /// Those of [`route`](Self::route), and [`Error::Shape`] for `out`.
    pub fn effective_logits_into(
        &self,
        cpu: &Cpu,
        input: &RouteInput<'_>,
        out: MatMut<'_, f32>,
    ) -> Result<()> {
        let job = self.check(input)?;
        let expected = [job.logits.rows(), job.logits.cols()];
        if [out.rows(), out.cols()] != expected {
            return Err(Error::shape("out", expected, [out.rows(), out.cols()]));
        }
        kernel::effective_logits(cpu, &job, out);
        Ok(())
    }

    /// The call as the kernel wants it, with every shape checked. Inlined: the way of a job through memory would be a tenth of one token's time.
    #[inline(always)]
    fn check<'a>(&'a self, input: &RouteInput<'a>) -> Result<Job<'a>> {
        let config = &self.config;
        let tokens = input.logits.rows();
        pairs(tokens, config.slots())?;
        input.logits.expect("logits", tokens, config.num_logits())?;
        match (config.noise_seed, &input.noise_logits) {
            (Some(_), Some(noise)) => noise.expect("noise_logits", tokens, config.num_logits())?,
            (None, None) => {}
            (Some(_), None) => {
                return Err(Error::value(
                    "noise_logits",
                    "logits of the noise, with a noise_seed",
                    "none",
                ));
            }
            (None, Some(_)) => {
                return Err(Error::value(
                    "noise_logits",
                    "none without a noise_seed",
                    "some",
                ));
            }
        }
        match (config.selection, input.given_ids) {
            (Selection::Given, Some(ids)) if ids.len() == tokens * config.top_k => {}
            (Selection::Given, Some(ids)) => {
                return Err(Error::shape(
                    "given_ids",
                    [tokens, config.top_k],
                    [ids.len()],
                ));
            }
            (Selection::Given, None) => {
                return Err(Error::value(
                    "given_ids",
                    "ids, with Selection::Given",
                    "none",
                ));
            }
            (_, Some(_)) => {
                return Err(Error::value(
                    "given_ids",
                    "none without Selection::Given",
                    "some",
                ));
            }
            (_, None) => {}
        }
        Ok(Job {
            config,
            plan: self.plan.as_ref(),
            bias: &self.correction_bias,
            per_expert_scale: &self.per_expert_scale,
            logits: input.logits,
            noise_logits: input.noise_logits,
            given_ids: input.given_ids.unwrap_or_default(),
            position: input.position,
        })
    }
}
