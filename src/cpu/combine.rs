//! Weighted sum of a token's rows and what follows it.
//!
//! The easy version, for each token: `y = Σ_slot weight · ys[row]`, slot after slot over the whole row, then what follows. Then:
//!
//! 1. a token is worked through in blocks of 64 columns that stay in registers from the first slot to the store: each row of ys is read once, y is
//!    written once, nothing goes through memory in between. K rows are read side by side, which the hardware's prefetchers follow: slot after slot
//!    through a buffer of y reached 45% of the read bandwidth on one core at K = 8, this 95%;
//! 2. few rows are few streams: up to [`PREFETCH_SLOTS`] of them are asked for [`PREFETCH`] columns ahead (K = 2: 97% instead of 80%; at K = 8 it costs 11%);
//! 3. a large y is written past the caches: otherwise every line of it is read before it is written, which is a quarter of all traffic at K = 2.
//!    A small one stays in the cache for who reads it next.
//!
//! A norm needs the sum of squares of the finished row first; the row is then computed twice, which costs less than a buffer that every caller would
//! have to bring, and gives the same bits twice.
#![allow(unsafe_code)] // disjoint writes to one output from several threads

use super::Cpu;
use super::out_rows::OutRows;
use super::parallel::{TaskCounter, for_each_worker};
use super::simd::{Op, Simd, dispatch, math};
use crate::combine::{Combine, Identity, Routed, Shared};
use crate::matrix::{AnyMatMut, MatRef};
use crate::norm::RmsNorm;
use crate::permute::NO_ROW;
use core::ops::Range;

/// Columns of a block: four lines of each row at a time. (Two lines: 57% of the read bandwidth on one core at K = 8 instead of 95%.) A multiple of the
/// chains of a reduction.
const BLOCK: usize = 64;
/// Tokens of a task: enough work to be worth handing out, few enough to balance.
const TOKENS: usize = 16;

/// The most rows of a token that are asked for ahead of time, and how many columns ahead.
const PREFETCH_SLOTS: usize = 4;
const PREFETCH: usize = 512;
/// Floats of a cache line.
const LINE: usize = 16;
/// The most rows that are looked up before the loop over columns; a token with more looks them up for each block.
const MAX_ROWS: usize = 16;
/// Bytes of y from which it is written past the caches: more than a core's share of the last one.
const STREAM_BYTES: usize = 8 << 20;

/// A block in registers: `BLOCK / LANES` of them are used.
type Vectors<S> = [<S as Simd>::F; BLOCK / 4];

/// Runs a checked combine; see [`crate::combine::combine_into`].
pub(crate) fn run(cpu: &Cpu, operands: &Combine<'_>, mut out: AnyMatMut<'_>) {
    let (tokens, hidden) = (out.rows(), out.cols());
    if hidden == 0 {
        return;
    }
    let chunks = tokens.div_ceil(TOKENS);
    let tasks = TaskCounter::new(chunks);
    let large = tokens
        .saturating_mul(hidden)
        .saturating_mul(size_of::<f32>())
        >= STREAM_BYTES;
    let out = OutRows::new(&mut out);
    for_each_worker(cpu.threads().min(chunks), &|_| {
        while let Some(chunk) = tasks.take() {
            let first = chunk * TOKENS;
            let tokens = first..tokens.min(first + TOKENS);
            // SAFETY (of the writes inside): each chunk of tokens is taken once, and `out` is borrowed by this call.
            dispatch(
                cpu.isa(),
                CombineTokens {
                    operands,
                    out,
                    large,
                    tokens,
                    hidden,
                },
            );
        }
    });
}

/// The tokens of one task.
struct CombineTokens<'a> {
    operands: &'a Combine<'a>,
    out: OutRows,
    /// Whether y is too large for the caches.
    large: bool,
    tokens: Range<usize>,
    hidden: usize,
}

impl Op for CombineTokens<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let stream = self.large && self.out.can_stream();
        for t in self.tokens.clone() {
            let rows = self.rows(t);
            let rows = rows.as_ref();
            let denominator = self.operands.norm.map(|norm| {
                let mut squares = math::Lanes32::new(s, 0.0);
                for col in (0..self.hidden).step_by(BLOCK) {
                    let block = store(s, self.sum(s, t, col, rows));
                    for chains in block.as_chunks().0 {
                        squares.add_product(s, chains, chains);
                    }
                }
                denominator(s, squares.sum(s), self.hidden, norm)
            });
            for col in (0..self.hidden).step_by(BLOCK) {
                let mut v = self.sum(s, t, col, rows);
                if let (Some(norm), Some(denominator)) = (self.operands.norm, denominator) {
                    v = scale(s, v, col, norm, denominator);
                }
                self.finish(s, t, col, v, stream);
            }
        }
        if stream {
            s.fence_streams();
        }
    }
}

/// The rows of a token with their weights, in slot order.
struct Rows<'a> {
    rows: [(f32, &'a [f32]); MAX_ROWS],
    count: usize,
}

impl<'a> Rows<'a> {
    /// Σ weight · row for the block at `col`.
    #[inline(always)]
    fn sum<S: Simd>(&self, s: S, col: usize) -> Vectors<S> {
        let mut acc = [s.splat(0.0); BLOCK / 4];
        let ahead = self.count <= PREFETCH_SLOTS;
        for &(weight, row) in &self.rows[..self.count] {
            let weight = s.splat(weight);
            if ahead {
                // Beyond the end of the row is as good a guess as any.
                let p = row.as_ptr().wrapping_add(col + PREFETCH);
                for line in (0..BLOCK).step_by(LINE) {
                    s.prefetch(p.wrapping_add(line).cast());
                }
            }
            for (a, v) in acc.iter_mut().zip(load(s, row, col)).take(BLOCK / S::LANES) {
                *a = s.fma(weight, v, *a);
            }
        }
        acc
    }
}

/// The zero-filled block of `row` at `col`.
#[inline(always)]
fn load<S: Simd>(s: S, row: &[f32], col: usize) -> Vectors<S> {
    let rest = &row[col..];
    let mut v = [s.splat(0.0); BLOCK / 4];
    if let Some(whole) = rest.first_chunk::<BLOCK>() {
        for (i, v) in v.iter_mut().take(BLOCK / S::LANES).enumerate() {
            *v = s.load_slice(&whole[i * S::LANES..]);
        }
        return v;
    }
    for (i, v) in v.iter_mut().take(BLOCK / S::LANES).enumerate() {
        *v = s.load_partial(rest.get(i * S::LANES..).unwrap_or(&[]), 0.0);
    }
    v
}

/// The block as an array.
#[inline(always)]
fn store<S: Simd>(s: S, v: Vectors<S>) -> [f32; BLOCK] {
    let mut out = [0.0; BLOCK];
    for (i, v) in v.iter().take(BLOCK / S::LANES).enumerate() {
        s.store_slice(&mut out[i * S::LANES..], *v);
    }
    out
}

/// Row `r`, whose elements are neighbours (checked at the door).
#[inline(always)]
fn row<'a>(m: &MatRef<'a, f32>, r: usize) -> &'a [f32] {
    m.row_slice(r).unwrap_or(&[])
}

/// √(mean of squares + eps)
#[inline(always)]
fn denominator<S: Simd>(s: S, squares: f32, width: usize, norm: &RmsNorm) -> S::F {
    // Scalar IEEE operations: the same on every ISA.
    s.splat((squares / width as f32 + norm.eps()).sqrt())
}

/// `v / denominator · weight · mul`
#[inline(always)]
fn scale<S: Simd>(
    s: S,
    mut v: Vectors<S>,
    col: usize,
    norm: &RmsNorm,
    denominator: S::F,
) -> Vectors<S> {
    let weight = load(s, norm.weight(), col);
    for (v, w) in v.iter_mut().zip(weight).take(BLOCK / S::LANES) {
        *v = s.mul(s.div(*v, denominator), w);
        if norm.multiplier() != 1.0 {
            *v = s.mul(*v, s.splat(norm.multiplier()));
        }
    }
    v
}

impl<'a> CombineTokens<'a> {
    /// The rows of a token, where they are few and all of ys.
    #[inline(always)]
    fn rows(&self, t: usize) -> Option<Rows<'a>> {
        let Routed::Pairs {
            ys,
            weights,
            row_of_pair,
            slots,
            identity: None,
        } = &self.operands.routed
        else {
            return None;
        };
        if *slots > MAX_ROWS {
            return None;
        }
        let mut rows = Rows {
            rows: [(0.0, &[]); MAX_ROWS],
            count: 0,
        };
        for pair in t * slots..(t + 1) * slots {
            let r = row_of_pair[pair];
            if r != NO_ROW {
                let weight = weights.map_or(1.0, |w| w[pair]);
                rows.rows[rows.count] = (weight, row(ys, r as usize));
                rows.count += 1;
            }
        }
        Some(rows)
    }

    /// Steps 1 to 3 for one block of a token.
    #[inline(always)]
    fn sum<S: Simd>(&self, s: S, t: usize, col: usize, rows: Option<&Rows<'_>>) -> Vectors<S> {
        let mut acc = match rows {
            Some(rows) => rows.sum(s, col),
            None => self.routed(s, t, col),
        };
        let n = BLOCK / S::LANES;
        if self.operands.routed_scale != 1.0 {
            let scale = s.splat(self.operands.routed_scale);
            for a in &mut acc[..n] {
                *a = s.mul(*a, scale);
            }
        }
        let Some(shared) = &self.operands.shared else {
            return acc;
        };
        let values = load(s, row(&shared.matrix(), t), col);
        match shared {
            Shared::Add(_) => {
                for (a, v) in acc.iter_mut().zip(values).take(n) {
                    *a = s.add(*a, v);
                }
            }
            Shared::SigmoidGate(_, gate) => {
                let gate = math::sigmoid(s, s.splat(gate[t]));
                for (a, v) in acc.iter_mut().zip(values).take(n) {
                    *a = s.fma(gate, v, *a);
                }
            }
            Shared::Average(_) => {
                for (a, v) in acc.iter_mut().zip(values).take(n) {
                    *a = s.mul(s.add(*a, v), s.splat(0.5));
                }
            }
        }
        acc
    }

    /// Step 1.
    #[inline(always)]
    fn routed<S: Simd>(&self, s: S, t: usize, col: usize) -> Vectors<S> {
        let (ys, weights, row_of_pair, slots, identity) = match &self.operands.routed {
            Routed::Pairs {
                ys,
                weights,
                row_of_pair,
                slots,
                identity,
            } => (ys, weights, row_of_pair, *slots, identity),
            Routed::Sum(sum) => return load(s, row(sum, t), col),
        };
        let mut acc = [s.splat(0.0); BLOCK / 4];
        for pair in t * slots..(t + 1) * slots {
            let weight = s.splat(weights.map_or(1.0, |w| w[pair]));
            let values = match (row_of_pair[pair], identity) {
                (NO_ROW, Some(identity)) if is_identity(identity, pair) => {
                    let mut x = [0.0; BLOCK];
                    let n = BLOCK.min(self.hidden - col);
                    identity.x.widen_row(t, col, &mut x[..n]);
                    load(s, &x, 0)
                }
                (NO_ROW, _) => continue,
                (r, _) => load(s, row(ys, r as usize), col),
            };
            for (a, v) in acc.iter_mut().zip(values).take(BLOCK / S::LANES) {
                *a = s.fma(weight, v, *a);
            }
        }
        acc
    }

    /// Steps 5 to 7 for one block of a token.
    #[inline(always)]
    fn finish<S: Simd>(&self, s: S, t: usize, col: usize, mut v: Vectors<S>, stream: bool) {
        let n = BLOCK.min(self.hidden - col);
        if let Some(bias) = self.operands.bias {
            for (v, b) in v.iter_mut().zip(load(s, bias, col)).take(BLOCK / S::LANES) {
                *v = s.add(*v, b);
            }
        }
        if let Some(residual) = &self.operands.residual {
            let mut r = [0.0; BLOCK];
            residual.widen_row(t, col, &mut r[..n]);
            for (v, r) in v.iter_mut().zip(load(s, &r, 0)).take(BLOCK / S::LANES) {
                *v = s.add(*v, r);
            }
        }
        // SAFETY: in both cases column col + n ≤ H of a token of this task; see `run`. `stream` is asked for there, and col is a multiple of 64.
        unsafe {
            if n == BLOCK {
                let v = &v[..BLOCK / S::LANES];
                self.out.write_vectors(s, t, col, v, stream);
            } else {
                self.out.write(t, col, &store(s, v)[..n]);
            }
        }
    }
}

#[inline(always)]
fn is_identity(identity: &Identity<'_>, pair: usize) -> bool {
    usize::try_from(identity.ids[pair]).is_ok_and(|id| id >= identity.num_experts)
}
