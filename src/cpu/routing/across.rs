//! The two rules that look across tokens: limited capacity, and experts that choose their tokens.

use super::select::{key1, pack, packed_index};
use super::{Job, Out, Worker, parallel, split_tokens, weigh};
use crate::routing::{Capacity, DROPPED, RouterConfig, Selection};
use core::cmp::Reverse;

/// Room for what is remembered across tokens.
#[derive(Clone, Debug, Default)]
pub(crate) struct Across {
    /// Tokens of a scope in the order in which they are served.
    order: Vec<u32>,
    /// Pairs that each expert has accepted in this scope.
    accepted: Vec<usize>,
    /// For each expert, the last token that it takes, as key and token packed.
    last_taken: Vec<u64>,
}

impl Across {
    /// Grows to what `config` needs for `tokens` tokens; allocates nothing when it has been as large before.
    pub(crate) fn fit(&mut self, config: &RouterConfig, tokens: usize) {
        if config.capacity.is_some() {
            self.order.resize(tokens, 0);
            self.accepted.resize(config.num_experts, 0);
        }
        if matches!(config.selection, Selection::ExpertChoice { .. }) {
            self.last_taken.resize(config.num_experts, 0);
        }
    }
}

/// Serves slot after slot, and in a slot token after token or the most important first; drops what exceeds an expert's room. On one
/// thread: T·K steps, each of which depends on the one before.
pub(super) fn apply_capacity(
    job: &Job<'_>,
    capacity: &Capacity,
    mut out: Out<'_>,
    across: &mut Across,
) {
    let config = job.config;
    let slots = config.slots();
    let scope = capacity.scope_tokens.unwrap_or(out.tokens).max(1);
    for start in (0..out.tokens).step_by(scope) {
        let end = out.tokens.min(start.saturating_add(scope));
        let order = &mut across.order[start..end];
        order
            .iter_mut()
            .zip(start as u32..)
            .for_each(|(o, t)| *o = t);
        if capacity.batch_prioritized {
            order.sort_unstable_by_key(|&t| (Reverse(out.importance[t as usize]), t));
        }
        across.accepted.fill(0);
        for slot in 0..slots {
            for &t in order.iter() {
                let id = &mut out.ids[t as usize * slots + slot];
                // Dropped pairs and null experts are not counted.
                let Some(accepted) = usize::try_from(*id)
                    .ok()
                    .and_then(|e| across.accepted.get_mut(e))
                else {
                    continue;
                };
                if *accepted < capacity.per_expert {
                    *accepted += 1;
                } else {
                    *id = DROPPED;
                }
            }
        }
    }
    for t in 0..out.tokens {
        let out = out.token(t, config);
        for (w, &id) in out.weights.iter_mut().zip(out.ids.iter()) {
            if id < 0 {
                *w = 0.0;
            }
        }
        if !capacity.normalize_before_drop {
            weigh::finish(job, out.ids, out.weights, out.shared);
        }
    }
}

/// Each expert takes its best tokens. `out.weights` holds all scores `[T, E]` and becomes the weights.
///
/// First, expert by expert, the last token that it takes; then, token by token, the experts that took it.
pub(super) fn expert_choice(
    job: &Job<'_>,
    per_expert: usize,
    out: Out<'_>,
    workers: &mut [Worker],
    across: &mut Across,
) {
    if out.tokens == 0 {
        return;
    }
    let column = Columns {
        scores: out.weights,
        experts: job.config.num_experts,
        taken: per_expert.min(out.tokens),
    };
    split_experts(workers, 0, &mut across.last_taken, &column);
    let last_taken = &across.last_taken;
    split_tokens(workers, 0, out, &|worker, first, mut out| {
        for i in 0..out.tokens {
            serve_token(job, first + i, last_taken, worker, out.token(i, job.config));
        }
    });
}

/// Scores `[T, experts]`, of which each expert takes the `taken` best of its column.
struct Columns<'a> {
    scores: &'a [f32],
    experts: usize,
    taken: usize,
}

/// Shares experts among workers in equal neighbouring parts, on the current pool.
fn split_experts(
    workers: &mut [Worker],
    first: usize,
    last_taken: &mut [u64],
    columns: &Columns<'_>,
) {
    match workers {
        [] => {}
        [worker] => {
            for (e, last) in (first..).zip(last_taken) {
                let column = columns.scores.iter().skip(e).step_by(columns.experts);
                let ranked = &mut worker.sort[..columns.scores.len() / columns.experts];
                for ((packed, &score), t) in ranked.iter_mut().zip(column).zip(0..) {
                    *packed = pack(key1(score), t);
                }
                *last = *ranked
                    .select_nth_unstable_by(columns.taken - 1, |a, b| b.cmp(a))
                    .1;
            }
        }
        _ => {
            let (left, right) = workers.split_at_mut(workers.len() / 2);
            let middle = last_taken.len() * left.len() / (left.len() + right.len());
            let (left_last, right_last) = last_taken.split_at_mut(middle);
            parallel::join(
                || split_experts(left, first, left_last, columns),
                || split_experts(right, first + middle, right_last, columns),
            );
        }
    }
}

/// Lists the experts that took token `t`, the best score first, and turns its scores into their weights.
fn serve_token(job: &Job<'_>, t: usize, last_taken: &[u64], worker: &mut Worker, out: Out<'_>) {
    let mut count = 0;
    for (e, (&score, &last)) in out.weights.iter().zip(last_taken).enumerate() {
        let key = key1(score);
        if pack(key, t) >= last {
            worker.sort[count] = pack(key, e);
            count += 1;
        }
    }
    let takers = &mut worker.sort[..count];
    takers.sort_unstable_by(|a, b| b.cmp(a));
    let scores = &mut worker.z.as_flattened_mut()[..out.weights.len()];
    scores.copy_from_slice(out.weights);
    out.ids.fill(DROPPED);
    out.weights.fill(0.0);
    for ((id, w), &packed) in out
        .ids
        .iter_mut()
        .zip(out.weights.iter_mut())
        .zip(takers.iter())
    {
        let e = packed_index(packed);
        *id = e as i32;
        *w = scores[e];
    }
    weigh::finish(job, out.ids, out.weights, out.shared);
}
