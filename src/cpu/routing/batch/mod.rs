//! The K best of many tokens at once, K ≤ 16: what nearly every router in the wild runs through.
//!
//! The easy version is `route_token` in `routing.rs`: for each token all scores, all keys, the K best, their weights. It is also what a
//! token falls back to when its logits are too strange for the shortcuts here (NaN, too many equal values, too few finite ones): both give the same bits.
//!
//! Then:
//! 1. rows of f32 logits are read where they lie, if they are whole blocks;
//! 2. **wide stages run along a row, narrow stages across tokens.** Maxima and sums of a row are kept as vectors; a tile of `LANES` tokens is then
//!    transposed, so that a reduction, a sort or a weight is computed for `LANES` tokens in one instruction and without shuffling inside a
//!    vector. The stages follow each other for a whole batch, so that one token's latencies hide behind the next token's work;
//! 3. **few are ranked.** 32 interleaved columns have 32 maxima, each a different expert; the K-th largest maximum bounds the K-th largest value from
//!    below, and about 32·ln(32 / (32 − K)) values reach it (9 for K = 8). The maxima are sorted by a network of 60 exchanges;
//! 4. those few are moved to the front of a row by compression, without a branch, and sorted by the same network, with their ids;
//! 5. softmax is pruned by logit: the exponential is monotonic but for rounding, so with a margin for that only the few need a quotient;
//! 6. weights are those of the sorted keys, where value and weight are the same number; else K logits are fetched.
//!
//! | file | does |
//! |---|---|
//! | `narrow.rs` | all of it for at most sixteen experts: across tokens from beginning to end |
//! | `alone.rs` | the same for few tokens: an expert is a lane |
//! | `values.rs` | rows of scores, where the logit is not what is ranked; sums of softmax |
//! | `groups.rs` | the best groups |
//! | `prune.rs` | a few candidates of each row |
//! | `sort.rs` | networks |
//! | `weigh.rs` | sorted ids and their weights |
//! | `tile.rs` | transposition |

mod alone;
mod groups;
mod narrow;
mod prune;
mod sort;
mod tile;
mod values;
mod weigh;

pub(super) use alone::RouteAlone;

use super::logits::Block;
use super::{Job, Out, Worker, load_row};
use crate::cpu::simd::math::REDUCTION_LANES;
use crate::cpu::simd::{MAX_LANES, Op, Simd};
use crate::matrix::{AnyMatRef, MatRef};
use crate::routing::{
    GroupLimit, MaskedFill, NullExperts, RankBy, Renorm, RouterConfig, Score, Selection,
    WeightSource,
};
use groups::limit_groups;
use narrow::route_narrow;
use prune::{bounds, collect, collect_kept};
use values::{column_maxima, compute_values, exp_sum, kept_maxima, sums};
use weigh::{sorted_tile, weigh_tile};

/// The most tokens of a batch: whole tiles on every instruction set.
const TOKENS: usize = MAX_LANES;
/// Logits of a batch: what fits the first-level cache twice.
const LOGITS: usize = 8192;
/// The most tokens that are routed one after the other where sixteen experts are all: fewer than a tile has on any instruction set.
const ALONE: usize = 3;
/// Rows so short are routed one after the other, too, where there are two of them.
const PAIR_LOGITS: usize = 256;
/// The width of [`network`], the largest K and the most groups.
const SLOTS: usize = 16;
/// Candidates that there is room for. K ≤ [`NARROW_K`] looks at [`SLOTS`] of them, a larger K at all: for K = 12 there are 15 on average, for 16 there are 22.
const MAX_CANDIDATES: usize = 2 * SLOTS;
/// The largest K for which [`SLOTS`] candidates are enough: 9.2 on average, and of random rows one in ten thousand has more than 16.
const NARROW_K: usize = 8;
/// A row of candidates, with room for one vector beyond the last.
const ROW: usize = MAX_CANDIDATES + MAX_LANES;
/// How far below the bound a logit may lie and still have the same score: exp errs by 0.9 ulp and the quotient by half a one, some 2⁻²¹
/// altogether; the difference to the maximum (at most [`REACH`]) is rounded to 2⁻¹⁸. √softplus is flattest for large logits: at [`REACH`] it changes by 12 ulp within the
/// margin and errs by 2.
const MARGIN: f32 = 1.0 / 4096.0;
/// Logits so far below the maximum are left to the careful path: there scores are subnormal, and many are equal. For √softplus, logits so far from 0.
const REACH: f32 = 80.0;

/// The most tokens of a batch.
pub(super) fn batch_len(config: &RouterConfig) -> usize {
    (LOGITS / config.num_logits().max(1)).clamp(1, TOKENS)
}

/// What is ranked.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Ranked {
    /// The logit itself.
    Logit,
    /// Softmax, searched for by logit.
    Softmax,
    /// √softplus, searched for by logit.
    SqrtSoftplus,
    /// A row of values that is computed first: scores, bias, groups.
    Computed,
}

/// Where a weight comes from, before renormalisation.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Raw {
    /// The ranked value is the weight, and not negative: its key has its bits.
    Key,
    /// The softmax of the logit.
    Softmax,
    /// An element-wise score of the logit.
    Elementwise,
    /// Softmax over the selected logits.
    Selected,
}

/// How a config is routed here. A router makes it once: to think it over again would be a tenth of one token's time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Plan {
    /// The most tokens of a batch.
    pub(super) batch: usize,
    ranked: Ranked,
    /// What is ranked, before bias and groups, is the logit and not its score.
    by_logit: bool,
    /// Score and weight need the maximum and the sum of the row.
    softmax: bool,
    groups: Option<GroupLimit>,
    /// Blocks of a group, where groups are passed over that are not among the best.
    passed_over: Option<usize>,
    /// As many logits as candidates: all of them are ranked, without a search.
    narrow: bool,
    raw: Raw,
    /// Most candidates that are sorted.
    candidates: usize,
    /// `weigh::finish` in vectors.
    finish: bool,
}

impl Plan {
    /// For a router with a correction bias, or scales for each expert, or without; none where the careful path has to do it.
    pub(crate) fn new(config: &RouterConfig, biased: bool, scaled: bool) -> Option<Self> {
        let Selection::TopK { rank_by, groups } = config.selection else {
            return None;
        };
        // Limiting to all groups is no limit.
        let groups = groups.filter(|g| g.topk_group < g.n_group);
        let suits = config.top_k <= SLOTS
            && config.joint_shared == 0
            && config.capacity.is_none()
            && groups.is_none_or(|g| {
                g.n_group <= SLOTS
                    && (config.selectable() / g.n_group).is_multiple_of(REDUCTION_LANES)
            });
        if !suits {
            return None;
        }
        let by_logit = rank_by == RankBy::Logit || config.score == Score::Identity;
        let ranked = match () {
            () if biased || groups.is_some() => Ranked::Computed,
            () if by_logit => Ranked::Logit,
            () if config.score == Score::Softmax => Ranked::Softmax,
            () if config.score == Score::SqrtSoftplus => Ranked::SqrtSoftplus,
            () => Ranked::Computed,
        };
        // A group filled with zeros ranks by them, but weighs by its scores.
        let zeros = groups.is_some_and(|g| g.fill == MaskedFill::Zero);
        let raw = match config.weights {
            WeightSource::SoftmaxSelectedLogits => Raw::Selected,
            WeightSource::JointWithShared => return None,
            WeightSource::Score if !by_logit && !biased && !zeros => Raw::Key,
            WeightSource::Score if config.score == Score::Softmax => Raw::Softmax,
            WeightSource::Score => Raw::Elementwise,
        };
        Some(Self {
            batch: batch_len(config),
            ranked,
            by_logit,
            softmax: config.score == Score::Softmax && (!by_logit || raw == Raw::Softmax),
            groups,
            passed_over: groups
                .filter(|g| g.fill == MaskedFill::NegInf)
                .map(|g| config.selectable() / g.n_group / REDUCTION_LANES),
            narrow: config.num_logits() <= SLOTS && groups.is_none(),
            raw,
            candidates: match config.top_k {
                ..=NARROW_K => SLOTS,
                _ => MAX_CANDIDATES,
            },
            finish: !scaled
                && !matches!(config.renorm, Renorm::PNorm(_))
                && !matches!(config.null_experts, NullExperts::Zero(_)),
        })
    }
}

/// How the tokens of a batch are routed. All ways give the same bits.
#[derive(Clone, Copy)]
pub(super) enum Way<'p> {
    /// Across tokens: [`RouteBatch`], and the careful path for those that are strange.
    Batch(&'p Plan),
    /// One after the other, experts in lanes: [`RouteAlone`].
    Alone(&'p Plan),
    /// One after the other, the careful path.
    Careful,
}

impl Plan {
    /// The fastest: a tile costs as much for one token as for `LANES`.
    #[inline]
    pub(super) fn way<S: Simd>(&self, config: &RouterConfig, tokens: usize) -> Way<'_> {
        match tokens {
            _ if self.narrow && (tokens <= ALONE || !S::BATCHES) => Way::Alone(self),
            _ if !S::BATCHES => Way::Careful,
            _ if self.narrow => Way::Batch(self),
            0 | 1 => Way::Careful,
            2 if self.groups.is_none() && config.num_logits() <= PAIR_LOGITS => Way::Careful,
            _ => Way::Batch(self),
        }
    }
}

/// The logits, when they are f32, neighbours in memory, whole blocks, and enter the score as they are.
fn in_place<'a>(job: &Job<'a>) -> Option<MatRef<'a, f32>> {
    let config = job.config;
    let changed =
        config.logit_multiplier != 1.0 || config.logit_softcap > 0.0 || config.noise_seed.is_some();
    match job.logits {
        AnyMatRef::F32(m)
            if !changed
                && m.cols().is_multiple_of(REDUCTION_LANES)
                && m.rows() > 0
                && m.row_slice(0).is_some() =>
        {
            Some(m)
        }
        _ => None,
    }
}

/// What a batch needs beside the rows.
#[derive(Clone, Debug)]
pub(super) struct Room {
    /// For each token the maxima of 32 interleaved columns.
    columns: [[f32; REDUCTION_LANES]; TOKENS],
    /// For each token a vector that is to be reduced.
    partial: [[f32; MAX_LANES]; TOKENS],
    max: [f32; TOKENS],
    sum: [f32; TOKENS],
    /// Candidates lie above.
    below: [f32; TOKENS],
    /// Not 0: the careful path.
    strange: [i32; TOKENS],
    /// Candidates of each token in the order of their ids: bits of value or logit, and id.
    values: [[i32; ROW]; TOKENS],
    ids: [[i32; ROW]; TOKENS],
    counts: [i32; TOKENS],
    group_scores: [[f32; SLOTS]; TOKENS],
    /// For each token a bit for each of its best groups.
    kept: [u32; TOKENS],
}

impl Default for Room {
    fn default() -> Self {
        Self {
            columns: [[0.0; REDUCTION_LANES]; TOKENS],
            partial: [[0.0; MAX_LANES]; TOKENS],
            max: [0.0; TOKENS],
            sum: [0.0; TOKENS],
            below: [0.0; TOKENS],
            strange: [0; TOKENS],
            values: [[0; ROW]; TOKENS],
            ids: [[0; ROW]; TOKENS],
            counts: [0; TOKENS],
            group_scores: [[0.0; SLOTS]; TOKENS],
            kept: [0; TOKENS],
        }
    }
}

/// The logits of the tokens of a batch, in rows of whole blocks.
#[derive(Clone, Copy)]
enum Rows<'a> {
    /// From this token on.
    InPlace(MatRef<'a, f32>, usize),
    /// Rows of so many blocks, the last filled up with −∞.
    Copied(&'a [Block], usize),
}

impl<'a> Rows<'a> {
    #[inline(always)]
    fn row(self, i: usize) -> &'a [Block] {
        match self {
            Self::InPlace(m, first) => m.row_slice(first + i).unwrap_or_default().as_chunks().0,
            Self::Copied(z, blocks) => &z[i * blocks..(i + 1) * blocks],
        }
    }
}

/// Neighbouring tokens, at most [`batch_len`], from token `t` on. An op, since a call of one token would pay for its stack.
pub(super) struct RouteBatch<'a, 'o> {
    pub job: &'a Job<'a>,
    pub plan: &'a Plan,
    pub worker: &'a mut Worker,
    pub t: usize,
    pub out: Out<'o>,
}

impl Op for RouteBatch<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        route(s, self.job, self.plan, self.t, self.worker, &mut self.out);
    }
}

/// Routes tokens `first ..` of `job`, at most [`batch_len`].
#[inline(always)]
fn route<S: Simd>(
    s: S,
    job: &Job<'_>,
    plan: &Plan,
    first: usize,
    w: &mut Worker,
    out: &mut Out<'_>,
) {
    let config = job.config;
    let n = config.num_logits();
    let blocks = n.div_ceil(REDUCTION_LANES);
    let tokens = out.tokens;
    let rows = match in_place(job) {
        Some(m) => Rows::InPlace(m, first),
        None => {
            for (t, z) in (first..)
                .zip(w.batch_z.chunks_exact_mut(blocks))
                .take(tokens)
            {
                load_row(s, job, t, z, &mut w.noise, &mut w.normals);
            }
            Rows::Copied(&w.batch_z, blocks)
        }
    };
    let room = &mut *w.room;
    room.strange = [0; TOKENS];
    if plan.narrow {
        for tile in (0..tokens).step_by(S::LANES) {
            route_narrow(s, job, plan, rows, tile, room, out);
        }
        return;
    }
    if plan.ranked == Ranked::Computed {
        let values = &mut w.batch_values[..tokens * blocks];
        compute_values(s, job, plan, rows, values, room);
        if let Some(groups) = &plan.groups {
            limit_groups(s, groups, values, blocks, tokens, room);
        }
        for (i, values) in values.chunks_exact(blocks).enumerate() {
            let columns = &mut room.columns[i];
            match plan.passed_over {
                Some(size) => kept_maxima(s, values, size, room.kept[i], columns),
                None => column_maxima(s, values, columns),
            }
        }
    } else {
        for i in 0..tokens {
            column_maxima(s, rows.row(i), &mut room.columns[i]);
        }
    }
    for tile in (0..tokens).step_by(S::LANES) {
        bounds(s, config.top_k, plan, tile, room);
    }
    if plan.softmax && plan.ranked != Ranked::Computed {
        for i in 0..tokens {
            let sum = exp_sum(s, n, rows.row(i), room.max[i]);
            s.store_slice(&mut room.partial[i], sum);
        }
        sums(s, tokens, room);
    }
    for i in 0..tokens {
        let row = match plan.ranked {
            Ranked::Computed => &w.batch_values[i * blocks..(i + 1) * blocks],
            _ => rows.row(i),
        };
        let (values, ids) = (&mut room.values[i], &mut room.ids[i]);
        let below = room.below[i];
        room.counts[i] = match plan.passed_over {
            Some(size) => collect_kept(s, row, size, room.kept[i], below, values, ids),
            None => collect(s, row, 0, 0, below, values, ids),
        };
    }
    for tile in (0..tokens).step_by(S::LANES) {
        let sorted = sorted_tile(s, plan, tile, room);
        let max = s.load_slice(&room.max[tile..]);
        let sum = s.load_slice(&room.sum[tile..]);
        weigh_tile(s, job, plan, rows, tile, sorted, (max, sum), out);
    }
}

/// Whether token `i` of the last batch has to go the careful way.
pub(super) fn is_strange(plan: &Plan, room: &Room, i: usize) -> bool {
    // A narrow row is ranked whole, by the keys of the careful path.
    if plan.narrow {
        return false;
    }
    room.strange[i] != 0
        || room.counts[i] > plan.candidates as i32
        || plan.softmax && room.sum[i].is_nan()
}

#[cfg(test)]
mod tests;
