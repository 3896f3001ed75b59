//! At most sixteen experts and few tokens: an expert is a lane.
//!
//! The easy version is `narrow.rs` for a tile of which one lane is in use. Here the sixteen experts of one token are one vector (two with eight lanes, four with four):
//!
//! 1. one exponential, one quotient, one key for all of them;
//! 2. the rank of each is the number of experts before it, counted: its place among the ids;
//! 3. sums are the butterfly of `Lanes32`, whose other lanes hold zeros, and weights are finished in slot order by `routing/weigh.rs`: the bits of `narrow.rs`.

use super::{Plan, Raw, SLOTS};
use crate::cpu::routing::logits::{elementwise, load_row};
use crate::cpu::routing::select::key;
use crate::cpu::routing::{Job, Out, Worker, weigh};
use crate::cpu::simd::math::exp_padded;
use crate::cpu::simd::{Op, Simd};
use crate::routing::Score;

/// The experts of one token.
type Row = [f32; SLOTS];

/// Token `t`, to which `out` belongs.
pub(in crate::cpu::routing) struct RouteAlone<'a, 'o> {
    pub job: &'a Job<'a>,
    pub plan: &'a Plan,
    pub worker: &'a mut Worker,
    pub t: usize,
    pub out: Out<'o>,
}

impl Op for RouteAlone<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // Most routers so narrow have eight experts.
        match self.job.config.num_logits() <= S::LANES {
            true => route_alone(s, self, 1),
            false => route_alone(s, self, SLOTS / S::LANES),
        }
    }
}

/// One token, whose experts fill so many `vectors`.
#[inline(always)]
fn route_alone<S: Simd>(s: S, token: RouteAlone<'_, '_>, vectors: usize) {
    let (job, plan, t, out) = (token.job, token.plan, token.t, token.out);
    let w = token.worker;
    let config = job.config;
    let n = config.num_logits();
    load_row(s, job, t, &mut w.z, &mut w.noise, &mut w.normals);
    let Some(z) = w.z.first().and_then(|block| block.first_chunk::<SLOTS>()) else {
        return;
    };
    let mut soft = [0.0; SLOTS];
    if plan.softmax {
        softmax(s, vectors, z, &mut soft);
    }
    let mut scores = *z;
    match config.score {
        Score::Softmax | Score::Identity => {}
        _ if plan.by_logit && plan.raw != Raw::Elementwise => {}
        score => {
            for i in (0..vectors * S::LANES).step_by(S::LANES) {
                s.store_slice(
                    &mut scores[i..],
                    elementwise(s, score, s.load_slice(&z[i..])),
                );
            }
        }
    }
    let ranked = match config.score {
        _ if plan.by_logit => z,
        Score::Softmax => &soft,
        _ => &scores,
    };
    rank(s, vectors, job, n, ranked, out.ids);
    match plan.raw {
        Raw::Selected => {
            weigh::raw_weights(
                s,
                config,
                &w.z,
                &[],
                out.ids,
                &mut w.selected,
                out.weights,
                out.shared,
            );
        }
        raw => {
            let from = match raw {
                Raw::Key => ranked,
                Raw::Softmax => &soft,
                _ => &scores,
            };
            for (weight, &id) in out.weights.iter_mut().zip(out.ids.iter()) {
                *weight = from[id as usize % SLOTS];
            }
        }
    }
    weigh::finish(job, out.ids, out.weights, out.shared);
}

/// The butterfly of sixteen lanes, of which `$left` vectors are in use: lane l takes lane l + 8, then l + 4, 2, 1. Lanes zipped with themselves are each there twice as often, so that in the end all of them hold the
/// result. A macro, since a closure that is not inlined would lose the instruction set.
macro_rules! butterfly {
    ($s:ident: $simd:ident, $operation:ident, $left:expr, $vectors:expr) => {{
        let mut v: [$simd::F; 4] = $vectors;
        let mut left = $left;
        while left > 1 {
            left /= 2;
            for i in 0..left {
                v[i] = $s.$operation(v[i], v[i + left]);
            }
        }
        let (mut all, mut lanes) = (v[0], $simd::LANES);
        while lanes > 1 {
            let (low, high) = $s.zip(all, all);
            all = $s.$operation(low, high);
            lanes /= 2;
        }
        all
    }};
}

/// `soft = exp(z − max z) / Σ exp(z − max z)`. What is beyond the last expert holds −∞ and becomes +0.0.
#[inline(always)]
fn softmax<S: Simd>(s: S, vectors: usize, z: &Row, soft: &mut Row) {
    // As many of the four as the experts fill. What is beyond adds +0.0 to sums that are +0.0 or more.
    let mut v = [s.splat(0.0); 4];
    for (v, z) in v[..vectors].iter_mut().zip(z.chunks_exact(S::LANES)) {
        // NaN is passed over.
        *v = s.max(s.load_slice(z), s.splat(f32::NEG_INFINITY));
    }
    let max = butterfly!(s: S, max, vectors, v);
    for (v, z) in v[..vectors].iter_mut().zip(z.chunks_exact(S::LANES)) {
        *v = exp_padded(s, s.sub(s.load_slice(z), max));
    }
    let sum = butterfly!(s: S, add, vectors, v);
    for (&v, soft) in v[..vectors].iter().zip(soft.chunks_exact_mut(S::LANES)) {
        s.store_slice(soft, s.div(v, sum));
    }
}

/// The K best of the first `n` values plus bias.
#[inline(always)]
fn rank<S: Simd>(s: S, vectors: usize, job: &Job<'_>, n: usize, values: &Row, ids: &mut [i32]) {
    const LANE: [i32; SLOTS] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
    let mut keys = [0; SLOTS];
    for i in (0..vectors * S::LANES).step_by(S::LANES) {
        let mut x = s.load_slice(&values[i..]);
        if let Some(bias) = job.bias.first() {
            x = s.add(x, s.load_slice(&bias[i..]));
        }
        s.store_slice_i(&mut keys[i..], key(s, x));
    }
    let mut ranks = [0; SLOTS];
    for i in (0..vectors * S::LANES).step_by(S::LANES) {
        let mine = s.load_slice_i(&keys[i..]);
        let lane = s.load_slice_i(&LANE[i..]);
        // An equal key of a lower id comes before too: it is greater than mine − 1.
        let mine_less = s.sub_i(mine, s.splat_i(1));
        let mut rank = s.splat_i(0);
        for (e, &other) in keys[..n].iter().enumerate() {
            let is_lower = s.gt_i(lane, s.splat_i(e as i32));
            let rival = s.select_i(is_lower, mine_less, mine);
            let beats = s.gt_i(s.splat_i(other), rival);
            rank = s.add_i(rank, s.select_i(beats, s.splat_i(1), s.splat_i(0)));
        }
        s.store_slice_i(&mut ranks[i..], rank);
    }
    // The ranks of n experts are 0..n, each once.
    let mut sorted = [0; SLOTS];
    for (&rank, e) in ranks[..n].iter().zip(0..) {
        sorted[rank as usize % SLOTS] = e;
    }
    for (id, &e) in ids.iter_mut().zip(&sorted) {
        *id = e;
    }
}
