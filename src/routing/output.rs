//! [`Routing`]: where each token goes. Owned by the caller and reused.

use super::DROPPED;
use super::config::{NullExperts, RouterConfig};
use super::router::Router;
use crate::Cpu;
use crate::cpu::routing::{self as kernel, Across, Job, Out, Worker};
use crate::error::{Error, Result};
use crate::permute::{Permutation, PermuteOptions, check_options};
use crate::shape::pairs;
use core::ops::Range;

/// The answer of a router: ids, weights, and the permutation that sorts pairs by expert.
///
/// Holding one proves that every id is [`DROPPED`] or below E + null experts, that the ids of a token are distinct (unless the caller gave them), and
/// that the permutation is the one of these ids; so what follows need not check again.
///
/// It also holds the scratch of the call. Make one with [`Routing::with_capacity`] and reuse it: then routing allocates nothing.
#[derive(Clone, Debug, Default)]
pub struct Routing {
    tokens: usize,
    slots: usize,
    num_experts: usize,
    null_experts: NullExperts,
    joint_shared: usize,
    ids: Vec<i32>,
    weights: Vec<f32>,
    shared_weights: Vec<f32>,
    importance: Vec<i32>,
    workers: Vec<Worker>,
    across: Across,
    /// Config, tokens and threads of the last [`fit`](Self::fit), unless something has changed the sizes since.
    fitted: Option<(RouterConfig, usize, usize)>,
    permutation: Permutation,
    /// Experts and alignment that the permutation was made for.
    sorted_for: PermuteOptions,
}

impl Routing {
    /// An empty one that grows when it is first used.
    pub fn new() -> Self {
        Self::default()
    }

    /// Empty, with room for `router.route` of up to `max_tokens` tokens on the current pool.
    ///
    /// # Errors
    /// [`Error::Overflow`] when that many pairs do not fit `u32`.
    pub fn with_capacity(max_tokens: usize, router: &Router) -> Result<Self> {
        Self::with_capacity_on(&Cpu::new(), max_tokens, router)
    }

    /// [`with_capacity`](Self::with_capacity) for the threads of `cpu`, which starts no pool where `cpu` is one thread.
    pub(crate) fn with_capacity_on(cpu: &Cpu, max_tokens: usize, router: &Router) -> Result<Self> {
        let config = router.config();
        pairs(max_tokens, config.slots())?;
        let mut routing = Self::default();
        routing.fit(config, max_tokens, kernel::threads(cpu, config, max_tokens));
        routing
            .permutation
            .reserve(max_tokens * config.slots(), config.num_experts, 1);
        routing.fit(config, 0, 1);
        Ok(routing)
    }

    /// T: tokens of the last call.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Columns of ids and weights: K, or E where every expert may serve a token.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// E: experts that have weights.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// What ids from E on stand for.
    pub fn null_experts(&self) -> NullExperts {
        self.null_experts
    }

    /// Columns of [`shared_weights`](Self::shared_weights).
    pub fn joint_shared(&self) -> usize {
        self.joint_shared
    }

    /// `[T, slots]`: 0..E an expert, from E on a null expert, [`DROPPED`] none. Distinct in a row but for `DROPPED` and for ids that the caller gave.
    pub fn ids(&self) -> &[i32] {
        &self.ids
    }

    /// `[T, slots]`: exactly what multiplies the expert. 0 where the id is [`DROPPED`], or a null expert of kind
    /// [`NullExperts::Zero`].
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// `[T, joint_shared]`: what multiplies each jointly scored shared expert.
    pub fn shared_weights(&self) -> &[f32] {
        &self.shared_weights
    }

    /// Pairs sorted by expert: where each pair's row is, and which pair each row has.
    pub fn permutation(&self) -> &Permutation {
        &self.permutation
    }

    /// Sorts the pairs again, for other experts that live here or another alignment.
    ///
    /// # Errors
    /// [`Error::Value`] when `local` is not inside 0..E or `row_alignment` is 0, [`Error::Overflow`]; the permutation is then unchanged.
    pub fn localize(&mut self, cpu: &Cpu, local: Range<usize>, row_alignment: usize) -> Result<()> {
        let options = PermuteOptions {
            block: row_alignment,
            local: Some(local),
            num_null: self.null_experts.count(),
        };
        if options != self.sorted_for {
            self.sort(cpu, options)?;
        }
        Ok(())
    }

    fn sort(&mut self, cpu: &Cpu, options: PermuteOptions) -> Result<()> {
        let local = check_options(self.ids.len(), self.num_experts, &options)?;
        self.sort_checked(cpu, options, local)
    }

    /// Sorts the pairs, with the local range that [`check_options`] gave for these options.
    pub(super) fn sort_checked(
        &mut self,
        cpu: &Cpu,
        options: PermuteOptions,
        local: Range<usize>,
    ) -> Result<()> {
        self.permutation
            .sort_checked(cpu, &self.ids, self.num_experts, &options, local)?;
        self.sorted_for = options;
        Ok(())
    }

    /// Takes ids and weights from the caller: hash routing, or any framework's own router (R24).
    ///
    /// Weights are taken as they are, NaN included, but for dropped pairs and null experts of kind [`NullExperts::Zero`], which weigh 0.
    ///
    /// # Errors
    /// [`Error::Shape`] for lengths that do not agree, [`Error::Value`] for an id that is out of range,
    /// [`Error::Overflow`] for too many pairs; the routing is then unchanged.
    ///
    /// ```
    /// use moe_kernels::Cpu;
    /// use moe_kernels::routing::{GivenRouting, Routing};
    /// let mut routing = Routing::new();
    /// let cpu = Cpu::new();
    /// routing.set_given(&cpu, &GivenRouting::new(4, 2, &[2, 0, 2, 3, 0, 2], &[0.5; 6]))?;
    /// assert_eq!((routing.tokens(), routing.slots()), (3, 2));
    /// assert!(routing.set_given(&cpu, &GivenRouting::new(4, 2, &[2, 4], &[0.5; 2])).is_err());
    /// assert_eq!(routing.tokens(), 3);
    /// # Ok::<(), moe_kernels::Error>(())
    /// ```
    pub fn set_given(&mut self, cpu: &Cpu, given: &GivenRouting<'_>) -> Result<()> {
        let slots = given.slots;
        if slots == 0 {
            return Err(Error::value("slots", "at least 1", slots));
        }
        let tokens = given.ids.len() / slots;
        if !given.ids.len().is_multiple_of(slots) {
            return Err(Error::shape(
                "ids",
                format!("[T, {slots}]"),
                [given.ids.len()],
            ));
        }
        if given.weights.len() != given.ids.len() {
            return Err(Error::shape(
                "weights",
                [tokens, slots],
                [given.weights.len()],
            ));
        }
        pairs(tokens, slots)?;
        let selectable = given.num_experts.saturating_add(given.null_experts.count());
        if given.num_experts == 0 || selectable >= i32::MAX as usize {
            let expected = format!("at least 1 and, with null experts, below {}", i32::MAX);
            return Err(Error::value("num_experts", expected, selectable));
        }
        check_ids("ids", given.ids, selectable)?;
        let options = PermuteOptions {
            num_null: given.null_experts.count(),
            ..PermuteOptions::default()
        };
        let local = check_options(given.ids.len(), given.num_experts, &options)?;
        self.fitted = None;
        self.tokens = tokens;
        self.slots = slots;
        self.num_experts = given.num_experts;
        self.null_experts = given.null_experts;
        self.joint_shared = 0;
        copy_to(&mut self.ids, given.ids);
        copy_to(&mut self.weights, given.weights);
        self.shared_weights.clear();
        let zero_from = zero_from(given.null_experts, given.num_experts);
        for (w, &id) in self.weights.iter_mut().zip(&self.ids) {
            if usize::try_from(id).map_or(true, |id| id >= zero_from) {
                *w = 0.0;
            }
        }
        self.sort_checked(cpu, options, local)
    }

    /// What [`Router::route`] must know before it writes: given ids in range.
    pub(super) fn check(&self, job: &Job<'_>) -> Result<()> {
        let config = job.config;
        check_ids("given_ids", job.given_ids, config.selectable())
    }

    /// Sizes everything for a call.
    pub(super) fn fit(&mut self, config: &RouterConfig, tokens: usize, threads: usize) {
        // Most calls of a decode loop. To compare costs less than to look at every buffer.
        if let Some((old_config, old_tokens, old_threads)) = &self.fitted
            && (*old_tokens, *old_threads) == (tokens, threads)
            && old_config == config
        {
            return;
        }
        self.fitted = Some((config.clone(), tokens, threads));
        let pairs = tokens * config.slots();
        self.tokens = tokens;
        self.slots = config.slots();
        self.num_experts = config.num_experts;
        self.null_experts = config.null_experts;
        self.joint_shared = config.joint_shared;
        self.ids.resize(pairs, DROPPED);
        self.weights.resize(pairs, 0.0);
        self.shared_weights
            .resize(tokens * config.joint_shared, 0.0);
        let prioritized = config.capacity.is_some_and(|c| c.batch_prioritized);
        self.importance
            .resize(if prioritized { tokens } else { 0 }, 0);
        kernel::fit_workers(&mut self.workers, threads, config, tokens);
        self.across.fit(config, tokens);
    }

    /// Runs the kernel on buffers that [`fit`](Self::fit) has sized.
    pub(super) fn run(&mut self, cpu: &Cpu, job: &Job<'_>, threads: usize) {
        let out = Out {
            tokens: self.tokens,
            ids: &mut self.ids,
            weights: &mut self.weights,
            shared: &mut self.shared_weights,
            importance: &mut self.importance,
        };
        kernel::route(
            cpu,
            job,
            out,
            &mut self.workers[..threads],
            &mut self.across,
        );
    }
}

/// Ids and weights that the caller has made, for [`Routing::set_given`].
#[derive(Clone, Copy, Debug)]
pub struct GivenRouting<'a> {
    num_experts: usize,
    null_experts: NullExperts,
    slots: usize,
    ids: &'a [i32],
    weights: &'a [f32],
}

impl<'a> GivenRouting<'a> {
    /// `ids` and `weights` `[T, slots]` for E experts.
    pub fn new(num_experts: usize, slots: usize, ids: &'a [i32], weights: &'a [f32]) -> Self {
        Self {
            num_experts,
            null_experts: NullExperts::None,
            slots,
            ids,
            weights,
        }
    }

    /// Experts without weights, ids from E on.
    pub fn null_experts(mut self, null_experts: NullExperts) -> Self {
        self.null_experts = null_experts;
        self
    }
}

/// The first id whose weight is reported as 0.
fn zero_from(null_experts: NullExperts, num_experts: usize) -> usize {
    match null_experts {
        NullExperts::Zero(_) => num_experts,
        NullExperts::None | NullExperts::Identity(_) => usize::MAX,
    }
}

/// Every id is [`DROPPED`] or below `selectable`. One may come twice for a token, as random token-id tables do; it then weighs twice.
fn check_ids(argument: &'static str, ids: &[i32], selectable: usize) -> Result<()> {
    // One test for all: a negative id is a large u32.
    if let Some(&bad) = ids
        .iter()
        .find(|&&id| id != DROPPED && id as u32 as usize >= selectable)
    {
        return Err(Error::value(
            argument,
            format!("ids in 0..{selectable}, or {DROPPED} for none"),
            bad,
        ));
    }
    Ok(())
}

fn copy_to<T: Copy>(to: &mut Vec<T>, from: &[T]) {
    to.clear();
    to.extend_from_slice(from);
}
