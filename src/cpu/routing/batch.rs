//! The K best of many tokens at once, K ≤ 16: what nearly every router in the wild runs through.
//!
//! The easy version is `route_token` in the file above: for each token all scores, all keys, the K best, their weights. It is also what a
//! token falls back to when its logits are too strange for the shortcuts here (NaN, too many equal values, too few finite ones): both give the same bits.
//!
//! Then:
//! 1. rows of f32 logits are read where they lie;
//! 2. **wide stages run along a row, narrow stages across tokens.** Maxima and sums of a row are kept as vectors; a tile of `LANES` tokens is then
//!    transposed, so that a reduction, a sort or a weight is computed for `LANES` tokens in one instruction and without shuffling inside a
//!    vector. The stages follow each other for a whole batch, so that one token's latencies hide behind the next token's work;
//! 3. **few are ranked.** 32 interleaved columns have 32 maxima, each a different expert; the K-th largest maximum bounds the K-th largest value from
//!    below, and about 32·ln(32 / (32 − K)) values reach it (9 for K = 8). The maxima are sorted by a network of 60 exchanges;
//! 4. those few are moved to the front of a row by compression, without a branch, and sorted by the same network, with their ids;
//! 5. softmax is pruned by logit: the exponential is monotonic but for rounding, so with a margin for that only the few need a quotient;
//! 6. weights are those of the sorted keys, where value and weight are the same number; else K logits are fetched.
//!
//! What lost: see the end of `benches/record/epyc-zen5-2core/2026-11-25-routing.md`.

use super::logits::{Block, elementwise};
use super::select::{NAN, key};
use super::{Job, Out, Worker, load_row, weigh};
use crate::cpu::simd::math::{Lanes32, REDUCTION_LANES, exp};
use crate::cpu::simd::{MAX_LANES, Simd};
use crate::matrix::{AnyMatRef, MatRef};
use crate::routing::{
    GroupLimit, GroupScore, MaskedFill, NullExperts, RankBy, Renorm, RouterConfig, Score,
    Selection, WeightSource,
};

/// The most tokens of a batch: whole tiles on every instruction set.
const TOKENS: usize = MAX_LANES;
/// Logits of a batch: what fits the first-level cache twice.
const LOGITS: usize = 8192;
/// The width of [`network`], the largest K and the most groups.
const SLOTS: usize = 16;
/// Candidates that there is room for. K ≤ [`NARROW_K`] looks at [`SLOTS`] of them, a larger K at all: for K = 12 there are 15 on average, for 16 there are 22.
const MAX_CANDIDATES: usize = 2 * SLOTS;
/// The largest K for which [`SLOTS`] candidates are enough: 9.2 on average, and of random rows one in ten thousand has more than 16.
const NARROW_K: usize = 8;
/// A row of candidates, with room for one vector beyond the last.
const ROW: usize = MAX_CANDIDATES + MAX_LANES;
/// How far below the bound a logit may lie and still have the same score: exp errs by 0.9 ulp and the quotient by half a one, some 2⁻²¹
/// altogether; the difference to the maximum (at most [`REACH`]) is rounded to 2⁻¹⁸.
const MARGIN: f32 = 1.0 / 4096.0;
/// Logits so far below the maximum are left to the careful path: there scores are subnormal, and many are equal.
const REACH: f32 = 80.0;

/// Tokens of a batch.
pub(super) fn batch_len(config: &RouterConfig) -> usize {
    (LOGITS / config.num_logits().max(1)).clamp(1, TOKENS)
}

/// What is ranked.
#[derive(Clone, Copy, PartialEq)]
enum Ranked {
    /// The logit itself.
    Logit,
    /// Softmax, searched for by logit.
    Softmax,
    /// A row of values that is computed first: scores, bias, groups.
    Computed,
}

/// Where a weight comes from, before renormalisation.
#[derive(Clone, Copy, PartialEq)]
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

/// How a config is routed here.
#[derive(Clone, Copy)]
pub(super) struct Plan<'a> {
    /// The logits, where they can be used as they are.
    in_place: Option<MatRef<'a, f32>>,
    ranked: Ranked,
    /// Score and weight need the maximum and the sum of the row.
    softmax: bool,
    groups: Option<GroupLimit>,
    raw: Raw,
    /// Most candidates that are sorted.
    candidates: usize,
    /// `weigh::finish` in vectors.
    finish: bool,
}

impl<'a> Plan<'a> {
    /// None where the careful path has to do it.
    pub(super) fn new(job: &Job<'a>) -> Option<Self> {
        let config = job.config;
        let Selection::TopK { rank_by, groups } = config.selection else {
            return None;
        };
        let biased = !job.bias.is_empty();
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
            in_place: in_place(job),
            ranked,
            softmax: config.score == Score::Softmax && (!by_logit || raw == Raw::Softmax),
            groups,
            raw,
            candidates: match config.top_k {
                ..=NARROW_K => SLOTS,
                _ => MAX_CANDIDATES,
            },
            finish: job.per_expert_scale.is_empty()
                && !matches!(config.renorm, Renorm::PNorm(_))
                && !matches!(config.null_experts, NullExperts::Zero(_)),
        })
    }
}

/// The logits, when they are f32, neighbours in memory and enter the score as they are.
fn in_place<'a>(job: &Job<'a>) -> Option<MatRef<'a, f32>> {
    let config = job.config;
    let changed =
        config.logit_multiplier != 1.0 || config.logit_softcap > 0.0 || config.noise_seed.is_some();
    match job.logits {
        AnyMatRef::F32(m) if !changed && m.rows() > 0 && m.row_slice(0).is_some() => Some(m),
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
        }
    }
}

/// A row in blocks of 32, the last filled up with −∞.
struct Row<'a> {
    whole: &'a [Block],
    tail: Block,
    len: usize,
}

impl<'a> Row<'a> {
    #[inline(always)]
    fn new<S: Simd>(s: S, row: &'a [f32]) -> Self {
        let (whole, rest) = row.as_chunks();
        let mut tail = [f32::NEG_INFINITY; REDUCTION_LANES];
        if !rest.is_empty() {
            for i in (0..REDUCTION_LANES).step_by(S::LANES) {
                let x = s.load_partial(rest.get(i..).unwrap_or_default(), f32::NEG_INFINITY);
                s.store_slice(&mut tail[i..], x);
            }
        }
        let len = row.len().div_ceil(REDUCTION_LANES);
        Self { whole, tail, len }
    }

    #[inline(always)]
    fn block(&self, b: usize) -> &Block {
        self.whole.get(b).unwrap_or(&self.tail)
    }
}

/// The logits of the tokens of a batch.
#[derive(Clone, Copy)]
enum Rows<'a> {
    /// From this token on.
    InPlace(MatRef<'a, f32>, usize),
    /// Rows of so many blocks; so many logits in each.
    Copied(&'a [Block], usize, usize),
}

impl<'a> Rows<'a> {
    #[inline(always)]
    fn row(self, i: usize) -> &'a [f32] {
        match self {
            Self::InPlace(m, first) => m.row_slice(first + i).unwrap_or_default(),
            Self::Copied(z, blocks, n) => &z[i * blocks..(i + 1) * blocks].as_flattened()[..n],
        }
    }
}

/// Routes tokens `first ..` of `job`, at most [`batch_len`].
#[inline(always)]
pub(super) fn route<S: Simd>(
    s: S,
    job: &Job<'_>,
    plan: &Plan<'_>,
    first: usize,
    w: &mut Worker,
    out: &mut Out<'_>,
) {
    let config = job.config;
    let (n, blocks) = (
        config.num_logits(),
        config.num_logits().div_ceil(REDUCTION_LANES),
    );
    let tokens = out.tokens;
    let rows = match plan.in_place {
        Some(m) => Rows::InPlace(m, first),
        None => {
            for (t, z) in (first..)
                .zip(w.batch_z.chunks_exact_mut(blocks))
                .take(tokens)
            {
                load_row(s, job, t, z, &mut w.noise, &mut w.normals);
            }
            Rows::Copied(&w.batch_z, blocks, n)
        }
    };
    let room = &mut *w.room;
    room.strange = [0; TOKENS];
    if plan.ranked == Ranked::Computed {
        let values = &mut w.batch_values[..tokens * blocks];
        compute_values(s, job, plan, rows, values, room);
        if let Some(groups) = &plan.groups {
            limit_groups(s, groups, values, blocks, tokens, room);
        }
        for (i, values) in values.chunks_exact(blocks).enumerate() {
            column_maxima(s, &Row::new(s, values.as_flattened()), &mut room.columns[i]);
        }
    } else {
        for i in 0..tokens {
            column_maxima(s, &Row::new(s, rows.row(i)), &mut room.columns[i]);
        }
    }
    for tile in (0..tokens).step_by(S::LANES) {
        bounds(s, config.top_k, plan, tile, room);
    }
    if plan.softmax && plan.ranked != Ranked::Computed {
        for i in 0..tokens {
            let sum = exp_sum(s, &Row::new(s, rows.row(i)), room.max[i]);
            s.store_slice(&mut room.partial[i], sum);
        }
        sums(s, tokens, room);
    }
    for i in 0..tokens {
        let row = match plan.ranked {
            Ranked::Computed => w.batch_values[i * blocks..(i + 1) * blocks].as_flattened(),
            _ => rows.row(i),
        };
        let (values, ids) = (&mut room.values[i], &mut room.ids[i]);
        room.counts[i] = collect(s, &Row::new(s, row), room.below[i], values, ids);
    }
    for tile in (0..tokens).step_by(S::LANES) {
        finish_tile(s, job, plan, rows, tile, room, out);
    }
}

/// Whether token `i` of the last batch has to go the careful way.
pub(super) fn is_strange(plan: &Plan<'_>, room: &Room, i: usize) -> bool {
    room.strange[i] != 0
        || room.counts[i] > plan.candidates as i32
        || plan.softmax && room.sum[i].is_nan()
}

/// The maximum of each of 32 interleaved columns, NaN passed over.
#[inline(always)]
fn column_maxima<S: Simd>(s: S, row: &Row<'_>, out: &mut Block) {
    let mut max = Lanes32::new(s, f32::NEG_INFINITY);
    for b in 0..row.len {
        max.max(s, row.block(b));
    }
    *out = max.lanes(s);
}

/// Σ exp(z − max), reduced to one vector.
#[inline(always)]
fn exp_sum<S: Simd>(s: S, row: &Row<'_>, max: f32) -> S::F {
    let max = s.splat(max);
    let mut sum = Lanes32::new(s, 0.0);
    for b in 0..row.len {
        let z = row.block(b);
        for i in 0..REDUCTION_LANES / S::LANES {
            let e = exp(s, s.sub(s.load_slice(&z[i * S::LANES..]), max));
            sum.add_vector(s, i, e);
        }
    }
    sum.fold(s)
}

/// Rows of scores plus bias; for softmax also the maxima and sums.
#[inline(always)]
fn compute_values<S: Simd>(
    s: S,
    job: &Job<'_>,
    plan: &Plan<'_>,
    rows: Rows<'_>,
    values: &mut [Block],
    room: &mut Room,
) {
    let config = job.config;
    let blocks = config.num_logits().div_ceil(REDUCTION_LANES);
    let by_logit = matches!(
        config.selection,
        Selection::TopK {
            rank_by: RankBy::Logit,
            ..
        }
    );
    if plan.softmax {
        softmax_values(s, rows, values, blocks, room);
    }
    for (i, values) in values.chunks_exact_mut(blocks).enumerate() {
        let row = Row::new(s, rows.row(i));
        let sum = s.splat(room.sum[i]);
        // A macro, since a closure that is not inlined would lose the instruction set.
        macro_rules! fill {
            ($x:ident, $old:ident => $f:expr) => {
                for (b, values) in values.iter_mut().enumerate() {
                    let z = row.block(b);
                    for i in (0..REDUCTION_LANES).step_by(S::LANES) {
                        #[allow(unused_variables)]
                        let ($x, $old) = (s.load_slice(&z[i..]), s.load_slice(&values[i..]));
                        let mut value = $f;
                        if let Some(bias) = job.bias.get(b) {
                            value = s.add(value, s.load_slice(&bias[i..]));
                        }
                        s.store_slice(&mut values[i..], value);
                    }
                }
            };
        }
        match config.score {
            Score::Softmax if !by_logit => fill!(_z, e => s.div(e, sum)),
            Score::Sigmoid if !by_logit => fill!(z, _e => elementwise(s, Score::Sigmoid, z)),
            Score::SqrtSoftplus if !by_logit => {
                fill!(z, _e => elementwise(s, Score::SqrtSoftplus, z))
            }
            _ => fill!(z, _e => z),
        }
        // What stands beyond the end of the row must not be a candidate.
        values.as_flattened_mut()[config.num_logits()..].fill(f32::NEG_INFINITY);
    }
}

/// values = exp(z − max z), and the maxima and sums of the rows.
#[inline(always)]
fn softmax_values<S: Simd>(
    s: S,
    rows: Rows<'_>,
    values: &mut [Block],
    blocks: usize,
    room: &mut Room,
) {
    let tokens = values.len() / blocks;
    for i in 0..tokens {
        column_maxima(s, &Row::new(s, rows.row(i)), &mut room.columns[i]);
    }
    for tile in (0..tokens).step_by(S::LANES) {
        let mut max = s.splat(f32::NEG_INFINITY);
        for part in (0..REDUCTION_LANES).step_by(SLOTS) {
            for column in load_tile(s, &room.columns, tile, part) {
                max = s.max(column, max);
            }
        }
        s.store_slice(&mut room.max[tile..], max);
    }
    for (i, values) in values.chunks_exact_mut(blocks).enumerate() {
        let (row, max) = (Row::new(s, rows.row(i)), s.splat(room.max[i]));
        let mut sum = Lanes32::new(s, 0.0);
        for (b, values) in values.iter_mut().enumerate() {
            let z = row.block(b);
            for i in 0..REDUCTION_LANES / S::LANES {
                let e = exp(s, s.sub(s.load_slice(&z[i * S::LANES..]), max));
                s.store_slice(&mut values[i * S::LANES..], e);
                sum.add_vector(s, i, e);
            }
        }
        s.store_slice(&mut room.partial[i], sum.fold(s));
    }
    sums(s, tokens, room);
}

/// `room.sum` from `room.partial`: the butterfly of [`Lanes32`], a tile of tokens at a time.
#[inline(always)]
fn sums<S: Simd>(s: S, tokens: usize, room: &mut Room) {
    for tile in (0..tokens).step_by(S::LANES) {
        let mut v = [s.splat(0.0); SLOTS];
        for (v, partial) in v.iter_mut().zip(&room.partial[tile..][..S::LANES]) {
            *v = s.load_slice(partial);
        }
        let mut left = S::LANES;
        while left > 1 {
            left /= 2;
            for i in 0..left {
                // Lanes of neighbouring tokens side by side: each level halves the lanes of a token and the vectors.
                let (low, high) = s.zip(v[i], v[i + left]);
                v[i] = s.add(low, high);
            }
        }
        s.store_slice(&mut room.sum[tile..], v[0]);
    }
}

/// Element `first + c` of tokens `tile ..`, for c = 0 .. 16: token t in lane t.
#[inline(always)]
fn load_tile<S: Simd, const N: usize>(
    s: S,
    rows: &[[f32; N]; TOKENS],
    tile: usize,
    first: usize,
) -> [S::F; SLOTS] {
    let mut all = [s.splat(0.0); SLOTS];
    for part in (0..SLOTS).step_by(S::LANES) {
        let mut v = [s.splat(0.0); MAX_LANES];
        for (v, row) in v.iter_mut().zip(&rows[tile..][..S::LANES]) {
            *v = s.load_slice(&row[first + part..]);
        }
        s.transpose(&mut v);
        all[part..][..S::LANES].copy_from_slice(&v[..S::LANES]);
    }
    all
}

/// [`load_tile`] of integers.
#[inline(always)]
fn load_tile_i<S: Simd>(
    s: S,
    rows: &[[i32; ROW]; TOKENS],
    tile: usize,
    first: usize,
) -> [S::F; SLOTS] {
    let mut all = [s.splat(0.0); SLOTS];
    for part in (0..SLOTS).step_by(S::LANES) {
        let mut v = [s.splat(0.0); MAX_LANES];
        for (v, row) in v.iter_mut().zip(&rows[tile..][..S::LANES]) {
            *v = s.from_bits(s.load_slice_i(&row[first + part..]));
        }
        s.transpose(&mut v);
        all[part..][..S::LANES].copy_from_slice(&v[..S::LANES]);
    }
    all
}

/// Calls `$exchange!(i j)` for every exchange of a network that sorts sixteen numbers: that of Green (1969) with 60, in 10 levels. A macro, so that
/// the numbers stay in registers.
macro_rules! network {
    ($exchange:ident) => {
        $exchange!(0 1, 2 3, 4 5, 6 7, 8 9, 10 11, 12 13, 14 15);
        $exchange!(0 2, 1 3, 4 6, 5 7, 8 10, 9 11, 12 14, 13 15);
        $exchange!(0 4, 1 5, 2 6, 3 7, 8 12, 9 13, 10 14, 11 15);
        $exchange!(0 8, 1 9, 2 10, 3 11, 4 12, 5 13, 6 14, 7 15);
        $exchange!(5 10, 6 9, 3 12, 13 14, 4 8, 7 11, 1 2);
        $exchange!(1 4, 7 13, 2 8, 11 14);
        $exchange!(2 4, 5 6, 9 10, 11 13, 3 8, 7 12);
        $exchange!(6 8, 10 12, 3 5, 7 9);
        $exchange!(3 4, 5 6, 7 8, 9 10, 11 12);
        $exchange!(6 7, 8 9);
    };
}

/// Sorts, the largest first; no NaN among them.
#[inline(always)]
fn sort_values<S: Simd>(s: S, v: &mut [S::F; SLOTS]) {
    macro_rules! exchange {
        ($($i:literal $j:literal),*) => {$(
            (v[$i], v[$j]) = (s.max(v[$i], v[$j]), s.min(v[$i], v[$j]));
        )*};
    }
    network!(exchange);
}

/// Puts the better of two (key, id) into the first place: the larger key or, of equal keys, the lower id. No key is `i32::MIN`.
macro_rules! exchange_keys {
    ($s:ident, $keys:ident, $ids:ident, $($i:literal $j:literal),*) => {$({
        let (a, b) = ($keys[$i], $keys[$j]);
        let (a_id, b_id) = ($ids[$i], $ids[$j]);
        // An equal key wins when its id is lower: it is greater than a − 1.
        let rival = $s.select_i($s.gt_i(a_id, b_id), $s.sub_i(a, $s.splat_i(1)), a);
        let b_first = $s.gt_i(b, rival);
        ($keys[$i], $keys[$j]) = ($s.max_i(a, b), $s.min_i(a, b));
        $ids[$i] = $s.select_i(b_first, b_id, a_id);
        $ids[$j] = $s.select_i(b_first, a_id, b_id);
    })*};
}

/// Sorts by key, the largest first, and equal keys by id, the lowest first.
#[inline(always)]
fn sort_keys<S: Simd>(s: S, keys: &mut [S::I; SLOTS], ids: &mut [S::I; SLOTS]) {
    macro_rules! exchange {
        ($($pairs:tt)*) => { exchange_keys!(s, keys, ids, $($pairs)*) };
    }
    network!(exchange);
}

/// The best sixteen of two sorted rows, sorted: the better ones of a[i] and b[15 − i] rise and then fall, which four levels sort.
#[inline(always)]
fn merge_keys<S: Simd>(
    s: S,
    keys: &mut [S::I; SLOTS],
    ids: &mut [S::I; SLOTS],
    more_keys: &[S::I; SLOTS],
    more_ids: &[S::I; SLOTS],
) {
    for i in 0..SLOTS {
        let (b, b_id) = (more_keys[SLOTS - 1 - i], more_ids[SLOTS - 1 - i]);
        let (mut two, mut two_ids) = ([keys[i], b], [ids[i], b_id]);
        exchange_keys!(s, two, two_ids, 0 1);
        (keys[i], ids[i]) = (two[0], two_ids[0]);
    }
    exchange_keys!(s, keys, ids, 0 8, 1 9, 2 10, 3 11, 4 12, 5 13, 6 14, 7 15);
    exchange_keys!(s, keys, ids, 0 4, 1 5, 2 6, 3 7, 8 12, 9 13, 10 14, 11 15);
    exchange_keys!(s, keys, ids, 0 2, 1 3, 4 6, 5 7, 8 10, 9 11, 12 14, 13 15);
    exchange_keys!(s, keys, ids, 0 1, 2 3, 4 5, 6 7, 8 9, 10 11, 12 13, 14 15);
}

/// For the tokens of a tile: the value that their candidates exceed, their maxima, and whether they are strange.
#[inline(always)]
fn bounds<S: Simd>(s: S, k: usize, plan: &Plan<'_>, tile: usize, room: &mut Room) {
    let mut low = load_tile(s, &room.columns, tile, 0);
    sort_values(s, &mut low);
    let mut high = load_tile(s, &room.columns, tile, SLOTS);
    sort_values(s, &mut high);
    // The K largest of two falling rows are the larger ones of low[i] and high[K − 1 − i].
    let mut bound = s.splat(f32::INFINITY);
    for (&low, &high) in low[..k].iter().zip(high[..k].iter().rev()) {
        bound = s.min(s.max(low, high), bound);
    }
    let max = s.max(low[0], high[0]);
    let ok = if plan.ranked == Ranked::Softmax {
        s.lt(s.splat(-REACH), s.sub(bound, max)) // false for NaN
    } else {
        s.lt(s.splat(f32::NEG_INFINITY), bound)
    };
    let mut strange = [0; MAX_LANES];
    s.store_slice_i(&mut strange, s.select_i(ok, s.splat_i(0), s.splat_i(1)));
    for (all, &this) in room.strange[tile..].iter_mut().zip(&strange[..S::LANES]) {
        *all |= this;
    }
    if plan.ranked == Ranked::Softmax {
        bound = s.sub(bound, s.splat(MARGIN));
    }
    if plan.ranked != Ranked::Computed {
        s.store_slice(&mut room.max[tile..], max);
    }
    s.store_slice(&mut room.below[tile..], below(s, bound));
}

/// A number below `x`, two steps away at most. (The step from +0 to −0 would be none.)
#[inline(always)]
fn below<S: Simd>(s: S, x: S::F) -> S::F {
    let k = s.sub_i(key(s, x), s.splat_i(2));
    s.from_bits(s.xor_i(k, s.shr::<1>(s.sar::<31>(k))))
}

/// Rows so long have many blocks without a candidate, so that a branch is worth it.
const SPARSE_BLOCKS: usize = 12;

/// Moves all values above `below` to the front, with their ids; returns how many there are. Beyond [`MAX_CANDIDATES`] of them nothing is kept.
#[inline(always)]
fn collect<S: Simd>(
    s: S,
    row: &Row<'_>,
    below: f32,
    values: &mut [i32; ROW],
    ids: &mut [i32; ROW],
) -> i32 {
    const LANE: [i32; MAX_LANES] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
    let below = s.splat(below);
    let (mut count, mut place) = (0, 0);
    let lane = s.load_slice_i(&LANE);
    for b in 0..row.len {
        let block = row.block(b);
        if row.len > SPARSE_BLOCKS {
            let mut any = 0;
            for i in (0..REDUCTION_LANES).step_by(S::LANES) {
                any |= s.mask_bits(s.lt(below, s.load_slice(&block[i..])));
            }
            if any == 0 {
                continue;
            }
        }
        for i in (0..REDUCTION_LANES).step_by(S::LANES) {
            let x = s.load_slice(&block[i..]);
            let found = s.lt(below, x);
            let id = s.add_i(lane, s.splat_i((b * REDUCTION_LANES + i) as i32));
            s.store_slice_i(&mut values[place..], s.compress(found, s.to_bits(x)));
            s.store_slice_i(&mut ids[place..], s.compress(found, id));
            count += s.mask_bits(found).count_ones() as i32;
            place = (count as usize).min(MAX_CANDIDATES);
        }
    }
    count
}

/// Fills the values of groups that are not among the best.
#[inline(always)]
fn limit_groups<S: Simd>(
    s: S,
    groups: &GroupLimit,
    values: &mut [Block],
    blocks: usize,
    tokens: usize,
    room: &mut Room,
) {
    let size = blocks / groups.n_group;
    for (i, values) in values.chunks_exact(blocks).enumerate() {
        let has_nan = score_groups(s, groups, values, &mut room.group_scores[i]);
        room.strange[i] |= i32::from(has_nan);
    }
    let fill = match groups.fill {
        MaskedFill::NegInf => f32::NEG_INFINITY,
        MaskedFill::Zero => 0.0,
    };
    for tile in (0..tokens).step_by(S::LANES) {
        let scores = load_tile(s, &room.group_scores, tile, 0);
        let mut keys = [s.splat_i(NAN); SLOTS];
        let mut ids = [s.splat_i(0); SLOTS];
        for (g, id) in ids.iter_mut().enumerate() {
            *id = s.splat_i(g as i32);
            if g < groups.n_group {
                keys[g] = key(s, scores[g]);
            }
        }
        sort_keys(s, &mut keys, &mut ids);
        for dropped in &ids[groups.topk_group..groups.n_group] {
            let mut group = [0; MAX_LANES];
            s.store_slice_i(&mut group, *dropped);
            for (t, &group) in (tile..tokens).zip(&group[..S::LANES]) {
                let from = t * blocks + group as usize * size;
                values[from..][..size].as_flattened_mut().fill(fill);
            }
        }
    }
}

/// The score of each group of a token; whether one of its values may be NaN.
#[inline(always)]
fn score_groups<S: Simd>(
    s: S,
    groups: &GroupLimit,
    values: &[Block],
    scores: &mut [f32; SLOTS],
) -> bool {
    let nothing = s.splat(f32::NEG_INFINITY);
    let mut best = [nothing; SLOTS];
    let mut second = [nothing; SLOTS];
    let mut sum = s.splat(0.0);
    let size = values.len() / groups.n_group;
    for (g, members) in values.chunks_exact(size).enumerate() {
        let (mut first, mut next) = (nothing, nothing);
        for x in members.as_flattened().chunks_exact(S::LANES) {
            let x = s.load_slice(x);
            next = s.max(s.min(first, x), next);
            first = s.max(x, first);
            sum = s.add(sum, x);
        }
        (best[g], second[g]) = (first, next);
    }
    let has_nan = s.mask_bits(s.eq(sum, sum)) != (1 << S::LANES) - 1;
    // As in `sums`: lanes of neighbouring groups side by side, level by level; then the copies of one group against each other.
    let together = groups.n_group.next_power_of_two().min(S::LANES);
    for part in (0..groups.n_group).step_by(together) {
        let mut lanes = S::LANES;
        let mut left = together;
        while lanes > 1 {
            lanes /= 2;
            let half = left / 2;
            for i in 0..half.max(1) {
                let (b, c) = (part + i, part + i + half);
                let (b0, b1) = s.zip(best[b], best[c]);
                let (s0, s1) = s.zip(second[b], second[c]);
                best[b] = s.max(b0, b1);
                second[b] = s.max(s.min(b0, b1), s.max(s0, s1));
            }
            left = half.max(1);
        }
        let score = match groups.score {
            GroupScore::Max => best[part],
            GroupScore::Top2Sum => s.add(best[part], second[part]),
        };
        let mut all = [0.0; MAX_LANES];
        s.store_slice(&mut all, score);
        let copies = S::LANES / together;
        for (score, copies) in scores[part..]
            .iter_mut()
            .zip(all[..S::LANES].chunks_exact(copies))
        {
            *score = copies[0];
        }
    }
    has_nan
}

/// Keys and ids of candidates `first .. first + 16` of each token of a tile, sorted.
#[inline(always)]
fn sorted_candidates<S: Simd>(
    s: S,
    plan: &Plan<'_>,
    tile: usize,
    first: usize,
    room: &Room,
) -> ([S::I; SLOTS], [S::I; SLOTS]) {
    let values = load_tile_i(s, &room.values, tile, first);
    let ids_of = load_tile_i(s, &room.ids, tile, first);
    let (max, sum) = (
        s.load_slice(&room.max[tile..]),
        s.load_slice(&room.sum[tile..]),
    );
    let counts = s.load_slice_i(&room.counts[tile..]);
    let mut keys = [s.splat_i(NAN); SLOTS];
    let mut ids = [s.splat_i(0); SLOTS];
    for slot in 0..SLOTS {
        let value = match plan.ranked {
            Ranked::Softmax => s.div(exp(s, s.sub(values[slot], max)), sum),
            Ranked::Logit | Ranked::Computed => values[slot],
        };
        let is_one = s.gt_i(counts, s.splat_i((first + slot) as i32));
        // Below every candidate, but not i32::MIN.
        keys[slot] = s.select_i(is_one, key(s, value), s.splat_i(NAN));
        ids[slot] = s.to_bits(ids_of[slot]);
    }
    sort_keys(s, &mut keys, &mut ids);
    (keys, ids)
}

/// Sorts the candidates of a tile and writes ids and weights.
#[inline(always)]
fn finish_tile<S: Simd>(
    s: S,
    job: &Job<'_>,
    plan: &Plan<'_>,
    rows: Rows<'_>,
    tile: usize,
    room: &Room,
    out: &mut Out<'_>,
) {
    let k = job.config.top_k;
    let (max, sum) = (
        s.load_slice(&room.max[tile..]),
        s.load_slice(&room.sum[tile..]),
    );
    let (mut keys, mut ids) = sorted_candidates(s, plan, tile, 0, room);
    if plan.candidates > SLOTS {
        let (more_keys, more_ids) = sorted_candidates(s, plan, tile, SLOTS, room);
        merge_keys(s, &mut keys, &mut ids, &more_keys, &more_ids);
    }
    let mut weights = [s.splat(0.0); SLOTS];
    match plan.raw {
        Raw::Key => {
            for (w, &key) in weights.iter_mut().zip(&keys[..k]) {
                *w = s.from_bits(key);
            }
        }
        _ => {
            fetch_logits(s, rows, tile, out.tokens, &ids[..k], &mut weights);
            match plan.raw {
                Raw::Selected => softmax_selected(s, k, &mut weights),
                Raw::Softmax => {
                    for w in &mut weights[..k] {
                        *w = s.div(exp(s, s.sub(*w, max)), sum);
                    }
                }
                _ => {
                    for w in &mut weights[..k] {
                        *w = elementwise(s, job.config.score, *w);
                    }
                }
            }
        }
    }
    if plan.finish {
        finish_weights(s, job.config, &mut weights[..k]);
    }
    let pairs = tile * k..out.tokens * k;
    let mut as_floats = [s.splat(0.0); SLOTS];
    for (f, &id) in as_floats.iter_mut().zip(&ids[..k]) {
        *f = s.from_bits(id);
    }
    let out_ids = &mut out.ids[pairs.clone()];
    store_tile(s, k, as_floats, bytemuck::cast_slice_mut(out_ids));
    store_tile(s, k, weights, &mut out.weights[pairs]);
    if !plan.finish {
        for i in tile..out.tokens.min(tile + S::LANES) {
            let out = out.token(i, job.config);
            weigh::finish(job, out.ids, out.weights, out.shared);
        }
    }
}

/// `z[slot] = logit of ids[slot]`, token by token.
#[inline(always)]
fn fetch_logits<S: Simd>(
    s: S,
    rows: Rows<'_>,
    tile: usize,
    tokens: usize,
    ids: &[S::I],
    z: &mut [S::F; SLOTS],
) {
    let mut of = [[0; MAX_LANES]; SLOTS];
    let mut logits = [[0.0; MAX_LANES]; SLOTS];
    for (of, &ids) in of.iter_mut().zip(ids) {
        s.store_slice_i(of, ids);
    }
    for (lane, i) in (tile..tokens).take(S::LANES).enumerate() {
        let row = rows.row(i);
        for (logits, of) in logits.iter_mut().zip(&of).take(ids.len()) {
            // A strange token's ids are whatever was there before.
            logits[lane] = row.get(of[lane] as usize).copied().unwrap_or_default();
        }
    }
    for (z, logits) in z.iter_mut().zip(&logits).take(ids.len()) {
        *z = s.load_slice(logits);
    }
}

/// Softmax over the first `k` of each token, in place. Sixteen lanes of the reduction's 32 are in use: the first level of the butterfly adds zeros.
#[inline(always)]
fn softmax_selected<S: Simd>(s: S, k: usize, z: &mut [S::F; SLOTS]) {
    let mut max = s.splat(f32::NEG_INFINITY);
    for &z in &z[..k] {
        max = s.max(z, max);
    }
    let mut sum = [s.splat(0.0); SLOTS];
    for (z, sum) in z.iter_mut().zip(&mut sum).take(k) {
        *z = exp(s, s.sub(*z, max));
        *sum = s.add(*sum, *z);
    }
    for off in [8, 4, 2, 1] {
        for l in 0..off {
            sum[l] = s.add(sum[l], sum[l + off]);
        }
    }
    for z in &mut z[..k] {
        *z = s.div(*z, sum[0]);
    }
}

/// `weigh::finish` for a tile, where nothing is dropped and experts have no scale of their own.
#[inline(always)]
fn finish_weights<S: Simd>(s: S, config: &RouterConfig, weights: &mut [S::F]) {
    let mut sum = s.splat(0.0);
    for &w in weights.iter() {
        sum = s.add(sum, w);
    }
    let divisor = match config.renorm {
        Renorm::None | Renorm::PNorm(_) => s.splat(1.0),
        Renorm::Sum => sum,
        Renorm::SumPlusEps(eps) => s.add(sum, s.splat(eps)),
        Renorm::SumClampMin(eps) => {
            let eps = s.splat(eps);
            s.select(s.lt(sum, eps), eps, sum)
        }
    };
    let scale = s.splat(config.scale);
    for w in weights {
        let scaled = s.mul(s.div(*w, divisor), scale);
        *w = s.select(s.eq(scaled, scaled), scaled, s.splat(f32::NAN));
    }
}

/// Writes the first `k` of each token of a tile to its row of `out`, which begins at the tile.
#[inline(always)]
fn store_tile<S: Simd>(s: S, k: usize, slots: [S::F; SLOTS], out: &mut [f32]) {
    let mut rows = [[0.0; SLOTS]; MAX_LANES];
    for part in (0..k).step_by(S::LANES) {
        let mut v = [s.splat(0.0); MAX_LANES];
        v[..S::LANES].copy_from_slice(&slots[part..][..S::LANES]);
        s.transpose(&mut v);
        for (row, &v) in rows.iter_mut().zip(&v).take(S::LANES) {
            s.store_slice(&mut row[part..], v);
        }
    }
    // Whole vectors: what is written beyond the row of a token is overwritten by the next token's.
    for (t, row) in rows[..S::LANES].iter().enumerate() {
        for part in (0..k).step_by(S::LANES) {
            let Some(rest) = out.get_mut(t * k + part..).filter(|rest| !rest.is_empty()) else {
                return;
            };
            if rest.len() >= S::LANES {
                s.store_slice(rest, s.load_slice(&row[part..]));
            } else {
                let n = rest.len().min(k - part);
                rest[..n].copy_from_slice(&row[part..][..n]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    /// A network sorts everything when it sorts all rows of zeros and ones.
    #[test]
    fn the_network_sorts() {
        for bits in 0..1u32 << 16 {
            let mut v: [u32; 16] = core::array::from_fn(|i| bits >> i & 1);
            macro_rules! exchange {
                ($($i:literal $j:literal),*) => {$(
                    (v[$i], v[$j]) = (v[$i].max(v[$j]), v[$i].min(v[$j]));
                )*};
            }
            network!(exchange);
            assert!(v.is_sorted_by(|a, b| a >= b), "{bits:016b}: {v:?}");
        }
    }
}
