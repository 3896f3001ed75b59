//! Routing on the CPU.
//!
//! The easy version, for each token:
//! ```text
//! z = softcap(logits · multiplier) + noise
//! s = softmax(z)                                   # or sigmoid, …
//! v = s + bias;  v[outside the best groups] = −∞ or 0
//! ids = the K best of v;  w = s[ids];  w = w / Σw · scale
//! ```
//! Then:
//! 1. a row lives in blocks of 32 in the worker's scratch, and every step runs over whole vectors (`logits.rs`);
//! 2. floats are ranked as integers, and the K best are found by counting among a few candidates, not by K passes (`select.rs`);
//! 3. scores that nobody reads are not computed: ranking by logit leaves K element-wise scores instead of E (`weigh.rs`);
//! 4. tokens are split evenly over the threads of the pool. A token's arithmetic knows nothing of its neighbours, so neither threads nor
//!    batches change a bit. Only capacity, expert choice and Doge's stacked product keys look at other tokens, because they are defined so.

mod across;
mod batch;
mod logits;
mod mixer;
mod select;
mod weigh;

use super::Cpu;
use super::parallel;
use super::simd::math::REDUCTION_LANES;
use super::simd::{Op, Simd, dispatch};
use crate::matrix::{AnyMatRef, MatMut};
use crate::routing::{RankBy, RouterConfig, Selection};
use batch::{RouteAlone, RouteBatch, Way};
use logits::{load_row, scores};
use select::{EXCLUDED, GroupRoom, Keys, best_key, keys, limit_groups, top_k};

pub(crate) use across::Across;
pub(crate) use batch::Plan;
pub(crate) use logits::Block;

/// Fewer logits than this are not worth another thread: some 10 µs of work.
const LOGITS_PER_THREAD: usize = 8192;

/// One call, checked: shapes agree with the config, given ids are in range and distinct.
#[derive(Clone, Copy)]
pub(crate) struct Job<'a> {
    pub config: &'a RouterConfig,
    /// None where the careful path has to do it.
    pub plan: Option<&'a Plan>,
    /// Blocks of the correction bias, zeros beyond its end; empty for none.
    pub bias: &'a [Block],
    /// `[E]`, or empty.
    pub per_expert_scale: &'a [f32],
    /// `[T, R]`
    pub logits: AnyMatRef<'a>,
    /// `[T, R]`
    pub noise_logits: Option<AnyMatRef<'a>>,
    /// `[T, K]` for [`Selection::Given`], else empty.
    pub given_ids: &'a [i32],
    /// Position of the first token, for the noise.
    pub position: u64,
}

/// The outputs of neighbouring tokens.
pub(crate) struct Out<'a> {
    pub tokens: usize,
    /// `[tokens, slots]`
    pub ids: &'a mut [i32],
    /// `[tokens, slots]`
    pub weights: &'a mut [f32],
    /// `[tokens, joint_shared]`
    pub shared: &'a mut [f32],
    /// Key of the best score of each token, for batch priority; empty when nobody wants it.
    pub importance: &'a mut [i32],
}

impl<'a> Out<'a> {
    /// The first `tokens` tokens, and the others.
    fn split_at(self, tokens: usize) -> (Self, Self) {
        let cut = |len: usize| len / self.tokens.max(1) * tokens;
        let ids = self.ids.split_at_mut(cut(self.ids.len()));
        let weights = self.weights.split_at_mut(cut(self.weights.len()));
        let shared = self.shared.split_at_mut(cut(self.shared.len()));
        let importance = self.importance.split_at_mut(cut(self.importance.len()));
        let part = |tokens, ids, weights, shared, importance| Self {
            tokens,
            ids,
            weights,
            shared,
            importance,
        };
        (
            part(tokens, ids.0, weights.0, shared.0, importance.0),
            part(
                self.tokens - tokens,
                ids.1,
                weights.1,
                shared.1,
                importance.1,
            ),
        )
    }

    fn reborrow(&mut self) -> Out<'_> {
        Out {
            tokens: self.tokens,
            ids: self.ids,
            weights: self.weights,
            shared: self.shared,
            importance: self.importance,
        }
    }

    /// Token i of these: its part of each output.
    #[inline(always)]
    fn token(&mut self, i: usize, config: &RouterConfig) -> Out<'_> {
        self.range(i, 1, config)
    }

    /// `tokens` of these from token i on.
    #[inline(always)]
    fn range(&mut self, i: usize, tokens: usize, config: &RouterConfig) -> Out<'_> {
        let (slots, shared) = (config.slots(), config.joint_shared);
        Out {
            tokens,
            ids: &mut self.ids[i * slots..][..tokens * slots],
            weights: &mut self.weights[i * slots..][..tokens * slots],
            shared: &mut self.shared[i * shared..][..tokens * shared],
            importance: self.importance.get_mut(i..i + tokens).unwrap_or_default(),
        }
    }
}

/// What one thread needs to route one token at a time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Worker {
    /// Effective logits of all experts.
    z: Vec<Block>,
    scores: Vec<Block>,
    keys: Vec<Keys>,
    /// A row as it came, where that is not yet `z`: product keys.
    raw: Vec<Block>,
    noise: Vec<Block>,
    normals: Vec<Block>,
    group_keys: Vec<Keys>,
    kept_groups: Vec<i32>,
    /// Selected logits and their softmax.
    selected: Vec<Block>,
    sort: Vec<u64>,
    /// Rows of a batch: logits that had to be copied, and values to rank.
    batch_z: Vec<Block>,
    batch_values: Vec<Block>,
    room: Box<batch::Room>,
}

impl Worker {
    /// Grows to what `config` needs for `tokens` tokens; allocates nothing when it has been as large before.
    fn fit(&mut self, config: &RouterConfig, tokens: usize) {
        let blocks = |n: usize| n.div_ceil(REDUCTION_LANES);
        let zeros = [0.0; REDUCTION_LANES];
        let product_keys = matches!(config.selection, Selection::ProductKeys { .. });
        let raw = blocks(config.num_logits());
        let row = if product_keys {
            blocks(config.num_experts)
        } else {
            raw
        };
        let groups = match config.selection {
            Selection::TopK {
                groups: Some(groups),
                ..
            } => groups.n_group,
            _ => 0,
        };
        let sort = match config.selection {
            Selection::ExpertChoice { .. } => tokens.max(config.num_experts),
            _ => config.selectable(),
        };
        self.z.resize(row, zeros);
        self.scores.resize(row, zeros);
        self.keys.resize(row, [EXCLUDED; REDUCTION_LANES]);
        self.raw.resize(if product_keys { raw } else { 0 }, zeros);
        self.noise
            .resize(if config.noise_seed.is_some() { raw } else { 0 }, zeros);
        self.normals.resize(self.noise.len(), zeros);
        self.group_keys
            .resize(blocks(groups), [EXCLUDED; REDUCTION_LANES]);
        self.kept_groups.resize(groups, 0);
        let mixer = matches!(config.selection, Selection::SparseMixer { .. });
        self.selected
            .resize(2 * if mixer { row } else { blocks(config.slots()) }, zeros);
        self.sort.resize(sort, 0);
        let batch = match config.selection {
            Selection::TopK { .. } => raw * batch::batch_len(config),
            _ => 0,
        };
        self.batch_z.resize(batch, zeros);
        self.batch_values.resize(batch, zeros);
    }
}

/// Threads that a call of so many tokens runs on.
pub(crate) fn threads(cpu: &Cpu, config: &RouterConfig, tokens: usize) -> usize {
    match tokens.saturating_mul(config.num_logits()) / LOGITS_PER_THREAD {
        // The pool need not be asked.
        0 | 1 => 1,
        useful => cpu.threads().min(useful).max(1),
    }
}

/// Makes `workers` fit for a call; see [`Worker::fit`]. Never shrinks their number.
pub(crate) fn fit_workers(
    workers: &mut Vec<Worker>,
    threads: usize,
    config: &RouterConfig,
    tokens: usize,
) {
    if workers.len() < threads {
        workers.resize_with(threads, Worker::default);
    }
    workers.iter_mut().for_each(|w| w.fit(config, tokens));
}

/// Routes all tokens. `workers` fit; as many are used as there are.
pub(crate) fn route(
    cpu: &Cpu,
    job: &Job<'_>,
    mut out: Out<'_>,
    workers: &mut [Worker],
    across: &mut Across,
) {
    let tokens = |worker: &mut Worker, first, out: Out<'_>| {
        let op = RouteTokens {
            job,
            worker,
            first,
            out,
        };
        dispatch(cpu.isa(), op);
    };
    match workers {
        [worker] => tokens(worker, 0, out.reborrow()),
        _ => split_tokens(workers, 0, out.reborrow(), &tokens),
    }
    match job.config.selection {
        Selection::ExpertChoice { per_expert } => {
            across::expert_choice(job, per_expert, out, workers, across)
        }
        _ => {
            if let Some(capacity) = job.config.capacity {
                across::apply_capacity(job, &capacity, out, across);
            }
        }
    }
}

/// Shares tokens among workers in equal neighbouring parts, on the current pool.
fn split_tokens(
    workers: &mut [Worker],
    first: usize,
    out: Out<'_>,
    run: &(dyn Fn(&mut Worker, usize, Out<'_>) + Sync),
) {
    match workers {
        [] => {}
        [worker] => run(worker, first, out),
        _ => {
            let left_workers = workers.len() / 2;
            let left_tokens = out.tokens * left_workers / workers.len();
            let (left, right) = workers.split_at_mut(left_workers);
            let (left_out, right_out) = out.split_at(left_tokens);
            parallel::join(
                || split_tokens(left, first, left_out, run),
                || split_tokens(right, first + left_tokens, right_out, run),
            );
        }
    }
}

/// The work of one thread: tokens `first..first + out.tokens`.
struct RouteTokens<'a, 'o> {
    job: &'a Job<'a>,
    worker: &'a mut Worker,
    first: usize,
    out: Out<'o>,
}

impl Op for RouteTokens<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (job, tokens) = (self.job, self.out.tokens);
        let step = job.plan.map_or(1, |plan| plan.batch);
        let mut first = 0;
        // Not `step_by`, which divides.
        while first < tokens {
            let mut out = self.out.range(first, step.min(tokens - first), job.config);
            let t = self.first + first;
            first += out.tokens;
            let way = match job.plan {
                Some(plan) => plan.way::<S>(job.config, out.tokens),
                None => Way::Careful,
            };
            // A constant, so that it is not even compiled where nothing takes that way.
            if const { S::BATCHES }
                && let Way::Batch(plan) = way
            {
                let (worker, out) = (&mut *self.worker, out.reborrow());
                s.outline(RouteBatch {
                    job,
                    plan,
                    worker,
                    t,
                    out,
                });
            }
            for i in 0..out.tokens {
                let (worker, t) = (&mut *self.worker, t + i);
                match way {
                    Way::Batch(plan) if !batch::is_strange(plan, &worker.room, i) => {}
                    Way::Alone(plan) => s.outline(RouteAlone {
                        job,
                        plan,
                        worker,
                        t,
                        out: out.token(i, job.config),
                    }),
                    _ => s.outline(RouteToken {
                        job,
                        worker,
                        t,
                        out: out.token(i, job.config),
                    }),
                }
            }
        }
    }
}

/// One token, the careful way.
struct RouteToken<'a, 'o> {
    job: &'a Job<'a>,
    worker: &'a mut Worker,
    t: usize,
    out: Out<'o>,
}

impl Op for RouteToken<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        route_token(s, self.job, self.t, self.worker, self.out);
    }
}

/// Everything that concerns one token alone.
#[inline(always)]
fn route_token<S: Simd>(s: S, job: &Job<'_>, t: usize, w: &mut Worker, out: Out<'_>) {
    let config = job.config;
    let n = config.selectable();
    let k = out.ids.len();
    load_token(s, job, t, w);
    let with_scores = weigh::needs_all_scores(config);
    if with_scores {
        scores(s, config.score, &w.z, &mut w.scores);
    }
    match config.selection {
        Selection::TopK { rank_by, groups } => {
            let values = if rank_by == RankBy::Score {
                &w.scores
            } else {
                &w.z
            };
            keys(s, n, values, job.bias, &mut w.keys);
            // Limiting to all groups is no limit.
            if let Some(groups) = groups.filter(|g| g.topk_group < g.n_group) {
                let room = GroupRoom {
                    keys: &mut w.group_keys,
                    kept: &mut w.kept_groups,
                    sort: &mut w.sort,
                };
                limit_groups(s, &groups, n, &mut w.keys, room);
            }
            top_k(s, n, &w.keys, &mut w.sort, out.ids);
        }
        Selection::ProductKeys { .. } => {
            keys(s, n, &w.z, job.bias, &mut w.keys);
            top_k(s, n, &w.keys, &mut w.sort, out.ids);
        }
        Selection::SparseMixer { jitter_eps } => {
            keys(s, n, &w.z, &[], &mut w.keys);
            top_k(s, n, &w.keys, &mut w.sort, out.ids);
            mixer::weights(s, jitter_eps, &w.z, &mut w.selected, out.ids, out.weights);
        }
        Selection::Given => out.ids.copy_from_slice(&job.given_ids[t * k..][..k]),
        Selection::Dense => out.ids.iter_mut().zip(0..).for_each(|(id, e)| *id = e),
        Selection::ExpertChoice { .. } => {
            // The experts choose among all tokens later; until then a token's weights are its scores.
            out.weights.copy_from_slice(&w.scores.as_flattened()[..k]);
            return;
        }
    }
    if let [importance] = out.importance {
        let scored = n + config.joint_shared;
        *importance = best_key(s, scored, &w.scores, &mut w.keys);
    }
    if !matches!(config.selection, Selection::SparseMixer { .. }) {
        let scores = if with_scores { &w.scores[..] } else { &[] };
        weigh::raw_weights(
            s,
            config,
            &w.z,
            scores,
            out.ids,
            &mut w.selected,
            out.weights,
            out.shared,
        );
    }
    if config.capacity.is_none_or(|c| c.normalize_before_drop) {
        weigh::finish(job, out.ids, out.weights, out.shared);
    }
}

/// Fills `w.z` with the effective logits of token `t`, for each expert.
#[inline(always)]
fn load_token<S: Simd>(s: S, job: &Job<'_>, t: usize, w: &mut Worker) {
    let Selection::ProductKeys { stacked } = job.config.selection else {
        load_row(s, job, t, &mut w.z, &mut w.noise, &mut w.normals);
        return;
    };
    // Halves of a token's own row; or, if stacked, rows t and T + t of the logits read as [2T, n].
    let n = job.config.num_experts.isqrt();
    let half = |i: usize| (i / 2, i % 2 * n);
    let (first, second) = match stacked {
        true => (half(t), half(job.logits.rows() + t)),
        false => (half(2 * t), half(2 * t + 1)),
    };
    // z[i·n + j] = first[i] + second[j], in two steps because the worker holds one raw row.
    load_row(s, job, first.0, &mut w.raw, &mut w.noise, &mut w.normals);
    let z = &mut w.z.as_flattened_mut()[..n * n];
    for (row, &a) in z.chunks_exact_mut(n).zip(&w.raw.as_flattened()[first.1..]) {
        row.fill(a);
    }
    if second.0 != first.0 {
        load_row(s, job, second.0, &mut w.raw, &mut w.noise, &mut w.normals);
    }
    for row in z.chunks_exact_mut(n) {
        for (z, &b) in row.iter_mut().zip(&w.raw.as_flattened()[second.1..]) {
            *z += b;
        }
    }
    w.z.as_flattened_mut()[n * n..].fill(f32::NEG_INFINITY);
}

/// The logits as they enter the score function, `[T, R]`. For inspection: allocates one row.
pub(crate) fn effective_logits(cpu: &Cpu, job: &Job<'_>, out: MatMut<'_, f32>) {
    let mut worker = Worker::default();
    worker.fit(job.config, 0);
    let row = vec![[0.0; REDUCTION_LANES]; job.logits.cols().div_ceil(REDUCTION_LANES)];
    dispatch(
        cpu.isa(),
        EffectiveLogits {
            job,
            out,
            row,
            worker,
        },
    );
}

struct EffectiveLogits<'a, 'o> {
    job: &'a Job<'a>,
    out: MatMut<'o, f32>,
    row: Vec<Block>,
    worker: Worker,
}

impl Op for EffectiveLogits<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        for t in 0..self.out.rows() {
            load_row(
                s,
                self.job,
                t,
                &mut self.row,
                &mut self.worker.noise,
                &mut self.worker.normals,
            );
            let out = self.out.row_mut(t);
            out.copy_from_slice(&self.row.as_flattened()[..out.len()]);
        }
    }
}
