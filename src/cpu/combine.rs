//! Weighted sum of a token's rows and what follows it.
//!
//! A token is worked through in blocks of 32 columns that stay in registers from the first slot to the store: each row of ys is read once, y is written
//! once, nothing goes through memory in between. A norm needs the sum of squares of the finished row first; the row is then computed twice, which costs
//! less than a buffer that every caller would have to bring, and gives the same bits twice.
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

/// Columns of a block, and the number of chains of a reduction.
const BLOCK: usize = 32;
/// Tokens of a task: enough work to be worth handing out, few enough to balance.
const TOKENS: usize = 16;

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
    tokens: Range<usize>,
    hidden: usize,
}

impl Op for CombineTokens<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for t in self.tokens.clone() {
            let denominator = self.operands.norm.map(|norm| {
                let mut squares = math::Lanes32::new(s, 0.0);
                for col in (0..self.hidden).step_by(BLOCK) {
                    let block = store(s, self.sum(s, t, col));
                    squares.add_product(s, &block, &block);
                }
                denominator(s, squares.sum(s), self.hidden, norm)
            });
            for col in (0..self.hidden).step_by(BLOCK) {
                let mut v = self.sum(s, t, col);
                if let (Some(norm), Some(denominator)) = (self.operands.norm, denominator) {
                    v = scale(s, v, col, norm, denominator);
                }
                self.finish(s, t, col, v);
            }
        }
    }
}

/// The zero-filled block of `row` at `col`.
#[inline(always)]
fn load<S: Simd>(s: S, row: &[f32], col: usize) -> Vectors<S> {
    let rest = &row[col..];
    let mut v = [s.splat(0.0); BLOCK / 4];
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

impl CombineTokens<'_> {
    /// Steps 1 to 3 for one block of a token.
    #[inline(always)]
    fn sum<S: Simd>(&self, s: S, t: usize, col: usize) -> Vectors<S> {
        let mut acc = self.routed(s, t, col);
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
    fn finish<S: Simd>(&self, s: S, t: usize, col: usize, mut v: Vectors<S>) {
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
        // SAFETY: column col + n ≤ H of a token of this task; see `run`.
        unsafe { self.out.write(t, col, &store(s, v)[..n]) };
    }
}

#[inline(always)]
fn is_identity(identity: &Identity<'_>, pair: usize) -> bool {
    usize::try_from(identity.ids[pair]).is_ok_and(|id| id >= identity.num_experts)
}
