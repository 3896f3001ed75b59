//! Rows of logits to probabilities, and sums over rows that do not depend on the number of threads.
//!
//! Rows are shared out in chunks of fixed length. Each chunk adds up its rows in ascending order, in f64, and the chunks are then added in ascending
//! order, so the grouping of the sum is the same for one thread and for many.
#![allow(unsafe_code)] // disjoint writes from several threads

use super::Cpu;
use super::parallel::{TaskCounter, for_each_worker};
use super::shared::SharedSlice;
use super::simd::{Op, Simd, dispatch, math};
use crate::losses::LossScratch;
use crate::matrix::AnyMatRef;
use core::ops::Range;

/// Rows of a chunk: some tens of microseconds of work.
const CHUNK: usize = 256;

/// The rows of a loss.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    /// `[rows, E]`
    pub logits: AnyMatRef<'a>,
    /// How much a row counts: `mask[row mod T]`; `None`: 1.
    pub mask: Option<&'a [f32]>,
}

impl Rows<'_> {
    #[inline(always)]
    fn weight(&self, row: usize) -> f32 {
        self.mask.map_or(1.0, |mask| mask[row % mask.len()])
    }
}

/// What a worker writes for one chunk.
struct ChunkRoom<'a> {
    /// Zeros at first: [`Task::sums`] of them.
    sums: &'a mut [f64],
    row: &'a mut [f32],
    keys: &'a mut [u64],
    /// The gradient of the chunk's rows.
    grad: Option<&'a mut [f32]>,
}

/// Work on a chunk of rows.
trait Task: Sync {
    /// How many numbers a chunk sums up.
    fn sums(&self, num_experts: usize) -> usize;
    fn run<S: Simd>(&self, s: S, rows: Range<usize>, room: ChunkRoom<'_>);
}

struct RunTask<'a, T>(&'a T, Range<usize>, ChunkRoom<'a>);

impl<T: Task> Op for RunTask<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.0.run(s, self.1, self.2);
    }
}

/// Runs the task on every chunk of `rows`; then `scratch.sums` begins with the sum over chunks. `grad` is that of `rows`.
fn for_each_chunk<T: Task>(
    cpu: &Cpu,
    rows: Range<usize>,
    num_experts: usize,
    task: &T,
    grad: Option<&mut [f32]>,
    scratch: &mut LossScratch,
) {
    let chunks = rows.len().div_ceil(CHUNK);
    let width = task.sums(num_experts);
    scratch.sums.clear();
    scratch.sums.resize(chunks.max(1) * width, 0.0);
    scratch.rows.resize(chunks * num_experts, 0.0);
    scratch.keys.resize(chunks * num_experts, 0);
    let sums = SharedSlice::new(&mut scratch.sums);
    let row = SharedSlice::new(&mut scratch.rows);
    let keys = SharedSlice::new(&mut scratch.keys);
    let grad = grad.map(SharedSlice::new);
    let tasks = TaskCounter::new(chunks);
    for_each_worker(chunks.min(cpu.threads()), &|_| {
        while let Some(c) = tasks.take() {
            let (first, last) = (c * CHUNK, rows.len().min((c + 1) * CHUNK));
            let experts = c * num_experts..(c + 1) * num_experts;
            // SAFETY: these parts belong to chunk c, and the chunk to whoever took it.
            let room = unsafe {
                ChunkRoom {
                    sums: sums.range(c * width..(c + 1) * width),
                    row: row.range(experts.clone()),
                    keys: keys.range(experts),
                    grad: (grad.as_ref()).map(|g| g.range(first * num_experts..last * num_experts)),
                }
            };
            let rows = rows.start + first..rows.start + last;
            dispatch(cpu.isa(), RunTask(task, rows, room));
        }
    });
    let (total, others) = scratch.sums.split_at_mut(width);
    for sums in others.chunks_exact(width) {
        for (total, sum) in total.iter_mut().zip(sums) {
            *total += sum;
        }
    }
}

/// Replaces a row of logits by its softmax; returns its logsumexp.
#[inline(always)]
fn softmax<S: Simd>(s: S, row: &mut [f32]) -> f32 {
    let max = math::max32(s, row);
    for v in row.chunks_mut(S::LANES) {
        let z = s.sub(s.load_partial(v, 0.0), s.splat(max));
        s.store_partial(v, math::exp(s, z));
    }
    let sum = math::sum32(s, row);
    for v in row.chunks_mut(S::LANES) {
        let p = s.div(s.load_partial(v, 0.0), s.splat(sum));
        s.store_partial(v, p);
    }
    max + math::ln1(sum)
}

/// Moves the indices of the K largest to the front of `keys`: by value, ties to the lower index, NaN last.
#[inline(always)]
fn select(row: &[f32], k: usize, keys: &mut [u64]) {
    for (i, (key, &z)) in (0u32..).zip(keys.iter_mut().zip(row)) {
        // −0 + 0 = +0. Positive floats are ordered like their bits, negative ones the other way round.
        let bits = (z + 0.0).to_bits();
        let ordered = if bits >> 31 == 0 {
            bits | 1 << 31
        } else {
            !bits
        };
        let ordered = if z.is_nan() { 0 } else { ordered };
        *key = u64::from(ordered) << 32 | u64::from(!i);
    }
    if k < keys.len() {
        keys.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
    }
}

/// The row of logits in f32: in its place in the gradient if there is one, else in the scratch.
#[inline(always)]
fn load_row<'a>(
    logits: &AnyMatRef<'_>,
    row: usize,
    i: usize,
    scratch: &'a mut [f32],
    grad: &'a mut Option<&mut [f32]>,
) -> &'a mut [f32] {
    let e = scratch.len();
    let room = match grad {
        Some(grad) => &mut grad[i * e..(i + 1) * e],
        None => scratch,
    };
    logits.widen_row(row, 0, room);
    room
}

/// Σ over rows of weight · [e among the K best], then of weight · p, then of the weights: 2E + 1 numbers. Leaves p in the gradient.
struct CountAndSum<'a> {
    rows: Rows<'a>,
    k: usize,
}

impl Task for CountAndSum<'_> {
    fn sums(&self, num_experts: usize) -> usize {
        2 * num_experts + 1
    }

    #[inline(always)]
    fn run<S: Simd>(&self, s: S, rows: Range<usize>, mut room: ChunkRoom<'_>) {
        let (counts, rest) = room.sums.split_at_mut(room.row.len());
        let (probabilities, total) = rest.split_at_mut(room.row.len());
        for (i, row) in rows.enumerate() {
            let weight = f64::from(self.rows.weight(row));
            if weight == 0.0 {
                continue; // whatever its logits, NaN included
            }
            let p = load_row(&self.rows.logits, row, i, room.row, &mut room.grad);
            select(p, self.k, room.keys);
            for key in &room.keys[..self.k] {
                counts[!(*key as u32) as usize] += weight;
            }
            softmax(s, p);
            for (sum, &p) in probabilities.iter_mut().zip(p.iter()) {
                *sum += weight * f64::from(p);
            }
            total[0] += weight;
        }
    }
}

/// Turns the p that [`CountAndSum`] left into factor · weight · p · (f − Σ f·p).
struct BalanceGradient<'a> {
    rows: Rows<'a>,
    f: &'a [f64],
    factor: f64,
}

impl Task for BalanceGradient<'_> {
    fn sums(&self, _: usize) -> usize {
        1
    }

    #[inline(always)]
    fn run<S: Simd>(&self, _: S, rows: Range<usize>, room: ChunkRoom<'_>) {
        let Some(grad) = room.grad else { return };
        for (row, p) in rows.zip(grad.chunks_exact_mut(self.f.len())) {
            let weight = f64::from(self.rows.weight(row));
            if weight == 0.0 {
                p.fill(0.0);
                continue;
            }
            // The f32 p add up to 1 only nearly. Divided by their sum, a common part of all f cancels in f − mean as it should.
            let (mut sum, mut mean) = (0.0, 0.0);
            for (&p, f) in p.iter().zip(self.f) {
                sum += f64::from(p);
                mean += f * f64::from(p);
            }
            let mean = mean / sum;
            for (p, f) in p.iter_mut().zip(self.f) {
                *p = (self.factor * weight * f64::from(*p) * (f - mean)) as f32;
            }
        }
    }
}

/// `E · Σ_e f_e · P_e` over some rows, and its gradient, both times `scale`.
pub(crate) fn balance(
    cpu: &Cpu,
    rows: Rows<'_>,
    range: Range<usize>,
    k: usize,
    scale: f64,
    mut grad: Option<&mut [f32]>,
    scratch: &mut LossScratch,
) -> f64 {
    let e = rows.logits.cols();
    let task = CountAndSum { rows, k };
    for_each_chunk(cpu, range.clone(), e, &task, grad.as_deref_mut(), scratch);
    let total = scratch.sums[2 * e];
    if total == 0.0 {
        if let Some(grad) = grad {
            grad.fill(0.0);
        }
        return 0.0;
    }
    // The fractions move aside: the gradient's task has the scratch anew.
    let mut f = core::mem::take(&mut scratch.f);
    f.clear();
    f.extend(scratch.sums[..e].iter().map(|count| count / total));
    let value = (f.iter().zip(&scratch.sums[e..2 * e]))
        .map(|(f, p)| f * (p / total))
        .sum::<f64>();
    let factor = e as f64 * scale;
    if grad.is_some() {
        let task = BalanceGradient {
            rows,
            f: &f,
            factor: factor / total,
        };
        for_each_chunk(cpu, range, e, &task, grad, scratch);
    }
    scratch.f = f;
    factor * value
}

/// Σ over rows of logsumexp², and 2 · logsumexp · p / rows in the gradient.
struct SquaredLogSum<'a> {
    logits: AnyMatRef<'a>,
}

impl Task for SquaredLogSum<'_> {
    fn sums(&self, _: usize) -> usize {
        1
    }

    #[inline(always)]
    fn run<S: Simd>(&self, s: S, rows: Range<usize>, mut room: ChunkRoom<'_>) {
        let count = self.logits.rows() as f64;
        for (i, row) in rows.enumerate() {
            let p = load_row(&self.logits, row, i, room.row, &mut room.grad);
            let lse = f64::from(softmax(s, p));
            room.sums[0] += lse * lse;
            let factor = 2.0 * lse / count;
            for p in p.iter_mut() {
                *p = (factor * f64::from(*p)) as f32;
            }
        }
    }
}

/// mean of logsumexp² over all rows, and its gradient.
pub(crate) fn router_z(
    cpu: &Cpu,
    logits: AnyMatRef<'_>,
    grad: Option<&mut [f32]>,
    scratch: &mut LossScratch,
) -> f64 {
    let task = SquaredLogSum { logits };
    for_each_chunk(cpu, 0..logits.rows(), logits.cols(), &task, grad, scratch);
    scratch.sums[0] / logits.rows() as f64
}
