//! Weighted sum of a token's rows and what follows it.
//!
//! The easy version, for each token: `y = Σ_slot weight · ys[row]`, slot after slot over the whole row, then what follows. Then:
//!
//! 1. a token is worked through in blocks of columns that stay in registers from the first slot to the last: each row of ys is read once, y is
//!    written once, nothing goes through memory in between;
//! 2. K rows are K streams of memory, which end every few kilobytes, and the hardware's prefetchers begin anew with each row. So each is asked for [`AHEAD`]
//!    columns ahead, and beyond its end the row of the same slot of the next token;
//! 3. a large y is written past the caches: otherwise every line of it is read before it is written, which is a quarter of all traffic at K = 2.
//!    A small one stays in the cache for who reads it next;
//! 4. where nothing follows the sum, the registers are stored as they are. Else the block goes through the first-level cache, and each later step is one pass
//!    over it: a chain of optional steps on a block in registers made the compiler keep the block in memory for all of them.
//!
//! A norm needs the sum of squares of the finished row first; the row is then computed twice, which costs less than a buffer that every caller would
//! have to bring, and gives the same bits twice.
//!
//! What lost, on one Zen 5 core at T = 4096, H = 2048, K = 8, of the read bandwidth: row after row through a buffer of y 53%, although asked for ahead; slices instead of pointers, looked up
//! for each block, 69% (the bookkeeping fills the window in which loads are seen early); f32 in blocks of 4, 8, 16 vectors 78%, 80%, 85%, and bf16 79%, 76%, 72%, since
//! rounding comes in bursts; rounding a block between the rows of the next one 73%; asking for lines with the hints for the second level 81%.
//!
//! Zen 3's own prefetchers are better than point 2 from four slots on. One core, T = 4096, H = 2048, GB/s asked for and not, by turns in one process (f32): K = 8 7.3 and 10.1, 6 8.6
//! and 11.6, 4 10.5 and 11.2, 16 (H = 2880) 6.8 and 7.4; but K = 1 7.6 and 7.3, K = 2 (H = 4096) 10.5 and 9.7, there bf16 11.0 and 8.4.
//! What lost there, of the read bandwidth: y that begins amid a line past the caches from its first whole line on, by turns K = 2 in bf16 57% to 52%, K = 8 in bf16 63% to 56%, in f32 76% to 81%;
//! f32 in blocks of 2 and 4 vectors instead of 8, within the noise.
#![allow(unsafe_code)] // disjoint writes to one output from several threads

use super::Cpu;
use super::caches::caches;
use super::out_rows::OutRows;
use super::parallel::{TaskCounter, for_each_worker};
use super::simd::math::{self, REDUCTION_LANES};
use super::simd::model::{Model, model};
use super::simd::{MAX_LANES, Op, Simd, dispatch};
use crate::combine::{Combine, Identity, Routed, Shared};
use crate::element::DType;
use crate::matrix::{AnyMatMut, MatRef};
use crate::norm::RmsNorm;
use crate::permute::NO_ROW;
use core::marker::PhantomData;
use core::ops::Range;

/// The most columns of a block, on any instruction set. A block has whole groups of the 32 chains of a reduction.
const MAX_BLOCK: usize = 16 * MAX_LANES;
/// How many columns ahead rows are asked for: the 2 KiB that one stream needs to be on its way at full bandwidth.
const AHEAD: usize = 512;
/// The most rows of a token that are summed in registers.
const MAX_ROWS: usize = 16;
/// Floats of a cache line.
const LINE: usize = 16;
/// Tokens of a task: enough work to be worth handing out, few enough to balance.
const TOKENS: usize = 16;

/// The most slots of a token for which blocks are short.
const FEW_SLOTS: usize = 4;

/// The fewest slots of a token for which Zen 3's own prefetchers do better than ours.
const UNASKED_SLOTS: usize = 4;

/// Columns of a block of `V` vectors.
const fn block_len<S: Simd, const V: usize>() -> usize {
    V * S::LANES
}

/// Runs a checked combine; see [`crate::combine::combine_into`].
pub(crate) fn run(cpu: &Cpu, operands: &Combine<'_>, mut out: AnyMatMut<'_>) {
    // ys passes through the last-level cache too, so that half of it holds no y that is as large as that.
    run_streaming(cpu, operands, &mut out, caches().l3 / 4);
}

/// The same; y goes past the caches if it has so many bytes.
fn run_streaming(cpu: &Cpu, operands: &Combine<'_>, out: &mut AnyMatMut<'_>, stream_bytes: usize) {
    let (tokens, hidden) = (out.rows(), out.cols());
    if hidden == 0 {
        return;
    }
    let chunks = tokens.div_ceil(TOKENS);
    let tasks = TaskCounter::new(chunks);
    let bytes = tokens
        .saturating_mul(hidden)
        .saturating_mul(out.dtype().size());
    let out = OutRows::new(out);
    let stream = bytes >= stream_bytes && out.begins_lines();
    for_each_worker(cpu.threads().min(chunks), &|_| {
        while let Some(chunk) = tasks.take() {
            let first = chunk * TOKENS;
            let tokens = first..tokens.min(first + TOKENS);
            // Each chunk of tokens is taken once, and `out` is borrowed by this call: what the writes inside rest on.
            dispatch(
                cpu.isa(),
                CombineTokens {
                    operands,
                    out,
                    stream,
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
    /// Whether y goes past the caches; only where its rows begin at cache lines.
    stream: bool,
    tokens: Range<usize>,
    hidden: usize,
}

/// The rows of a token with their weights, in slot order: pointers, so that a block costs few instructions beside its loads and many lines of
/// memory are on their way at once.
#[derive(Clone, Copy)]
struct Rows<'a> {
    /// First elements; each row has as many as ys has columns. Beyond `count` they are only good for a prefetch.
    rows: [(f32, *const f32); MAX_ROWS],
    count: usize,
    columns: usize,
    borrow: PhantomData<&'a [f32]>,
}

impl<'a> Rows<'a> {
    /// Those of token `t`, where they are few and all of ys.
    fn new(routed: &Routed<'a>, t: usize) -> Option<Self> {
        let Routed::Pairs {
            ys,
            weights,
            row_of_pair,
            slots,
            identity: None,
        } = routed
        else {
            return None;
        };
        if *slots > MAX_ROWS {
            return None;
        }
        let mut rows = Self {
            rows: [(0.0, ys.as_raw().0.cast()); MAX_ROWS],
            count: 0,
            columns: ys.cols(),
            borrow: PhantomData,
        };
        for pair in t * slots..(t + 1) * slots {
            let r = row_of_pair[pair];
            if r != NO_ROW {
                let weight = weights.map_or(1.0, |w| w[pair]);
                rows.rows[rows.count] = (weight, columns(ys, r as usize, 0, ys.cols()).as_ptr());
                rows.count += 1;
            }
        }
        Some(rows)
    }

    /// Σ weight · row for the whole block at `col`; with `next`, asks for what comes [`AHEAD`] columns later, in these rows or at the beginning of the
    /// next ones.
    #[inline(always)]
    fn chain<S: Simd, const V: usize>(&self, s: S, next: Option<&Self>, col: usize) -> [S::F; V] {
        assert!(col + block_len::<S, V>() <= self.columns);
        let then = col + AHEAD;
        let (ahead, then) = match next {
            Some(next) if then >= self.columns => (next, then - self.columns),
            _ => (self, then),
        };
        let mut acc = [s.splat(0.0); V];
        for (&(weight, row), &(_, ahead)) in self.rows[..self.count].iter().zip(&ahead.rows) {
            if next.is_some() {
                // Beyond the end of a row is as good a guess as any.
                for line in (0..block_len::<S, V>()).step_by(LINE) {
                    s.prefetch(ahead.wrapping_add(then + line).cast());
                }
            }
            let weight = s.splat(weight);
            for (i, acc) in acc.iter_mut().enumerate() {
                // SAFETY: `new` took the pointer from a row of so many columns, which is borrowed for 'a; the block ends inside them, as asserted.
                let values = unsafe { s.load(row.add(col + i * S::LANES)) };
                *acc = s.fma(weight, values, *acc);
            }
        }
        acc
    }
}

/// Columns of one token.
#[derive(Clone, Copy)]
struct Place {
    t: usize,
    col: usize,
    /// At most [`block_len`].
    n: usize,
}

impl Op for CombineTokens<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let few = matches!(self.operands.routed, Routed::Pairs { slots, .. } if slots <= FEW_SLOTS);
        // Many rows of f32 are the longer side by side the better; the rest wants short blocks, whose rounding and storing hides behind loads.
        match (S::LANES, few || self.out.as_raw().1 != DType::F32) {
            (16.., false) => self.run_blocks::<S, 16>(s),
            (8.., true) => self.run_blocks::<S, 4>(s),
            _ => self.run_blocks::<S, 8>(s),
        }
    }
}

/// The block as an array.
#[inline(always)]
fn store<S: Simd, const V: usize>(s: S, v: [S::F; V]) -> [f32; MAX_BLOCK] {
    let mut out = [0.0; MAX_BLOCK];
    for (i, v) in v.iter().enumerate() {
        s.store_slice(&mut out[i * S::LANES..], *v);
    }
    out
}

/// Calls `$each` for each vector of the first `$n` floats of `$block`, and of the same columns of `$other`, filled up with zeros. A macro, since a
/// closure that is not inlined would lose the instruction set.
macro_rules! each_vector {
    ($s:ident, $n:expr, $block:ident, $other:expr, ($v:ident, $o:ident) => $each:expr) => {{
        let other: &[f32] = $other;
        for i in (0..$n).step_by(S::LANES) {
            let $o = $s.load_partial(other.get(i..).unwrap_or(&[]), 0.0);
            let $v = $s.load_slice(&$block[i..]);
            $s.store_slice(&mut $block[i..], $each);
        }
    }};
}

impl CombineTokens<'_> {
    /// All tokens, in blocks of `V` vectors.
    #[inline(always)]
    fn run_blocks<S: Simd, const V: usize>(&self, s: S) {
        let chain_only = self.chain_only();
        let asks = self.asks();
        let mut next = Rows::new(&self.operands.routed, self.tokens.start);
        for t in self.tokens.clone() {
            let rows = next;
            if t + 1 < self.tokens.end {
                next = Rows::new(&self.operands.routed, t + 1);
            }
            let asked = next.as_ref().filter(|_| asks);
            let rows = rows.as_ref().map(|rows| (rows, asked));
            let denominator = self.denominator::<S, V>(s, t, rows);
            for col in (0..self.hidden).step_by(block_len::<S, V>()) {
                let n = block_len::<S, V>().min(self.hidden - col);
                if let Some((rows, next)) = rows
                    && chain_only
                    && n == block_len::<S, V>()
                {
                    let v = rows.chain::<S, V>(s, next, col);
                    // SAFETY: columns col .. col + n ≤ H of a token of this task (see `run_streaming`), and col is a multiple of the lanes.
                    unsafe {
                        self.out.write_vectors(s, t, col, &v, self.stream);
                    }
                    continue;
                }
                let place = Place { t, col, n };
                let mut block = self.routed::<S, V>(s, place, rows);
                self.add_shared(s, place, &mut block);
                self.finish(s, place, denominator, &mut block);
                self.write(s, place, &block);
            }
        }
        if self.stream {
            s.fence_streams();
        }
    }

    /// Whether rows are asked for ahead of their use.
    fn asks(&self) -> bool {
        let unasked = |slots| slots >= UNASKED_SLOTS && model() == Model::Zen3;
        !matches!(self.operands.routed, Routed::Pairs { slots, .. } if unasked(slots))
    }

    /// Whether nothing follows the sum.
    fn chain_only(&self) -> bool {
        let c = self.operands;
        c.routed_scale == 1.0
            && c.shared.is_none()
            && c.norm.is_none()
            && c.bias.is_none()
            && c.residual.is_none()
    }

    /// Step 1 for a block, in memory.
    #[inline(always)]
    fn routed<S: Simd, const V: usize>(
        &self,
        s: S,
        Place { t, col, n }: Place,
        rows: Option<(&Rows<'_>, Option<&Rows<'_>>)>,
    ) -> [f32; MAX_BLOCK] {
        if let Some((rows, next)) = rows
            && n == block_len::<S, V>()
        {
            return store(s, rows.chain::<S, V>(s, next, col));
        }
        let mut block = [0.0; MAX_BLOCK];
        let (ys, weights, row_of_pair, slots, identity) = match &self.operands.routed {
            Routed::Pairs {
                ys,
                weights,
                row_of_pair,
                slots,
                identity,
            } => (ys, weights, row_of_pair, *slots, identity),
            Routed::Sum(sum) => {
                block[..n].copy_from_slice(columns(sum, t, col, n));
                return block;
            }
        };
        for pair in t * slots..(t + 1) * slots {
            let weight = s.splat(weights.map_or(1.0, |w| w[pair]));
            let mut x = [0.0; MAX_BLOCK];
            let row = match (row_of_pair[pair], identity) {
                (NO_ROW, Some(identity)) if is_identity(identity, pair) => {
                    identity.x.widen_row(t, col, &mut x[..n]);
                    &x[..n]
                }
                (NO_ROW, _) => continue,
                (r, _) => columns(ys, r as usize, col, n),
            };
            each_vector!(s, n, block, row, (v, o) => s.fma(weight, o, v));
        }
        block
    }

    /// Steps 2 and 3.
    #[inline(always)]
    fn add_shared<S: Simd>(&self, s: S, Place { t, col, n }: Place, block: &mut [f32; MAX_BLOCK]) {
        if self.operands.routed_scale != 1.0 {
            let scale = s.splat(self.operands.routed_scale);
            each_vector!(s, n, block, &[], (v, _o) => s.mul(v, scale));
        }
        let Some(shared) = &self.operands.shared else {
            return;
        };
        let m = shared.matrix();
        let row = columns(&m, t, col, n);
        match shared {
            Shared::Add(_) => each_vector!(s, n, block, row, (v, o) => s.add(v, o)),
            Shared::SigmoidGate(_, gate) => {
                let gate = math::sigmoid(s, s.splat(gate[t]));
                each_vector!(s, n, block, row, (v, o) => s.fma(gate, o, v));
            }
            Shared::Average(_) => {
                let half = s.splat(0.5);
                each_vector!(s, n, block, row, (v, o) => s.mul(s.add(v, o), half));
            }
        }
    }

    /// √(mean of squares + eps) of steps 1 to 3, where there is a norm.
    #[inline(always)]
    fn denominator<S: Simd, const V: usize>(
        &self,
        s: S,
        t: usize,
        rows: Option<(&Rows<'_>, Option<&Rows<'_>>)>,
    ) -> Option<S::F> {
        let norm = self.operands.norm?;
        let mut squares = math::Lanes32::new(s, 0.0);
        for col in (0..self.hidden).step_by(block_len::<S, V>()) {
            let n = block_len::<S, V>().min(self.hidden - col);
            let place = Place { t, col, n };
            let mut block = self.routed::<S, V>(s, place, rows);
            self.add_shared(s, place, &mut block);
            // What stands beyond the row is cut off: 0 · 0.5 is 0, but 0 · ∞ is not.
            block[n..].fill(0.0);
            for chains in block[..n.next_multiple_of(REDUCTION_LANES)].as_chunks().0 {
                squares.add_product(s, chains, chains);
            }
        }
        // Scalar IEEE operations: the same on every ISA.
        let mean = squares.sum(s) / self.hidden as f32;
        Some(s.splat((mean + norm.eps()).sqrt()))
    }

    /// Steps 4 to 6.
    #[inline(always)]
    fn finish<S: Simd>(
        &self,
        s: S,
        Place { t, col, n }: Place,
        denominator: Option<S::F>,
        block: &mut [f32; MAX_BLOCK],
    ) {
        if let (Some(norm), Some(denominator)) = (self.operands.norm, denominator) {
            self.scale(s, norm, denominator, &norm.weight()[col..col + n], block);
        }
        if let Some(bias) = self.operands.bias {
            each_vector!(s, n, block, &bias[col..col + n], (v, o) => s.add(v, o));
        }
        if let Some(residual) = &self.operands.residual {
            let mut r = [0.0; MAX_BLOCK];
            residual.widen_row(t, col, &mut r[..n]);
            each_vector!(s, n, block, &r[..n], (v, o) => s.add(v, o));
        }
    }

    /// `v / denominator · weight · mul`
    #[inline(always)]
    fn scale<S: Simd>(
        &self,
        s: S,
        norm: &RmsNorm,
        denominator: S::F,
        weight: &[f32],
        block: &mut [f32; MAX_BLOCK],
    ) {
        let n = weight.len();
        each_vector!(s, n, block, weight, (v, o) => s.mul(s.div(v, denominator), o));
        if norm.multiplier() != 1.0 {
            let mul = s.splat(norm.multiplier());
            each_vector!(s, n, block, &[], (v, _o) => s.mul(v, mul));
        }
    }

    /// Writes a block, in whole vectors as far as it has them.
    #[inline(always)]
    fn write<S: Simd>(&self, s: S, Place { t, col, n }: Place, block: &[f32; MAX_BLOCK]) {
        let whole = n - n % S::LANES;
        for i in (0..whole).step_by(S::LANES) {
            let v = [s.load_slice(&block[i..])];
            // SAFETY: columns below col + n ≤ H of a token of this task (see `run_streaming`), and col + i is a multiple of the lanes.
            unsafe { self.out.write_vectors(s, t, col + i, &v, self.stream) };
        }
        // SAFETY: as above.
        unsafe { self.out.write(t, col + whole, &block[whole..n]) };
    }
}

/// Columns `col .. col + n` of row `r`, whose elements are neighbours (checked at the door).
#[inline(always)]
fn columns<'a>(m: &MatRef<'a, f32>, r: usize, col: usize, n: usize) -> &'a [f32] {
    &m.row_slice(r).unwrap_or(&[])[col..col + n]
}

#[inline(always)]
fn is_identity(identity: &Identity<'_>, pair: usize) -> bool {
    usize::try_from(identity.ids[pair]).is_ok_and(|id| id >= identity.num_experts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Isa;
    use crate::{Element, MatMut};
    use half::{bf16, f16};

    /// Aligned to a cache line.
    #[repr(align(64))]
    struct Lines<T>([T; TOKENS_HERE * WIDTH]);

    const WIDTH: usize = 2 * MAX_BLOCK + 32;
    /// A whole task and a part of one.
    const TOKENS_HERE: usize = TOKENS + 3;

    /// Past the caches or not: the same bits, in every format, for few slots, many and more than fit [`Rows`]; a row that does not begin at a line
    /// is not streamed.
    fn streams_the_same<T: Element>(nothing: T)
    where
        for<'a> AnyMatMut<'a>: From<MatMut<'a, T>>,
    {
        for slots in [FEW_SLOTS, FEW_SLOTS + 1, MAX_ROWS, MAX_ROWS + 1] {
            let pairs = TOKENS_HERE * slots;
            let ys: Vec<f32> = (0..pairs * WIDTH)
                .map(|i| (i % 8191) as f32 - 4000.3)
                .collect();
            let weights: Vec<f32> = (0..pairs).map(|i| (i % 13) as f32 / 7.0 - 0.6).collect();
            let row_of_pair: Vec<u32> = (0..pairs as u32).rev().collect();
            let operands = Combine::new(Routed::Pairs {
                ys: MatRef::new(&ys, pairs, WIDTH).unwrap(),
                weights: Some(&weights),
                row_of_pair: &row_of_pair,
                slots,
                identity: None,
            });
            for isa in Isa::available() {
                let cpu = Cpu::with_isa(isa).unwrap();
                let mut lines = [0, 1].map(|_| Box::new(Lines([nothing; TOKENS_HERE * WIDTH])));
                for (lines, bytes) in lines.iter_mut().zip([0, usize::MAX]) {
                    let mut out = MatMut::new(&mut lines.0, TOKENS_HERE, WIDTH)
                        .unwrap()
                        .into();
                    assert!(OutRows::new(&mut out).begins_lines());
                    run_streaming(&cpu, &operands, &mut out, bytes);
                }
                let [streamed, stored] = lines.map(|l| l.0.map(Element::to_f32).map(f32::to_bits));
                assert_eq!(streamed, stored, "{isa}, {slots} slots");
                let mut shifted = Box::new(Lines([nothing; TOKENS_HERE * WIDTH]));
                let (tokens, part) = (TOKENS_HERE - 1, 1..1 + (TOKENS_HERE - 1) * WIDTH);
                let mut out = MatMut::new(&mut shifted.0[part], tokens, WIDTH)
                    .unwrap()
                    .into();
                assert!(!OutRows::new(&mut out).begins_lines());
                let Routed::Pairs { ys, .. } = operands.routed else {
                    unreachable!()
                };
                let fewer = Combine::new(Routed::Pairs {
                    ys,
                    weights: Some(&weights[..tokens * slots]),
                    row_of_pair: &row_of_pair[..tokens * slots],
                    slots,
                    identity: None,
                });
                run_streaming(&cpu, &fewer, &mut out, 0);
                for (a, b) in shifted.0[1..].iter().zip(&stored[..tokens * WIDTH]) {
                    assert_eq!(
                        a.to_f32().to_bits(),
                        *b,
                        "{isa}, {slots} slots, not at lines"
                    );
                }
            }
        }
    }

    #[test]
    fn past_the_caches_or_not_the_bits_are_the_same() {
        streams_the_same(f32::NAN);
        streams_the_same(bf16::NAN);
        streams_the_same(f16::NAN);
    }
}
