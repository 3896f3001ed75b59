//! Stable counting sort of pairs by expert, and the row copies that go with it.
//!
//! The easy version:
//! ```text
//! for pair in 0..T·K: count[ids[pair]] += 1
//! offsets = exclusive scan of count, each rounded up to the block size
//! for pair in 0..T·K: row = next[ids[pair]]++; pair_of_row[row] = pair; row_of_pair[pair] = row
//! ```
//! Both loops are shared out in chunks of pairs with a histogram each; the scan then runs over (expert, chunk), so a chunk knows where
//! its first pair of each expert goes. A stable sort has one answer, so neither the chunks nor the threads show in the result.
#![allow(unsafe_code)] // the scatter: disjoint writes from several threads

mod few;

pub(crate) use few::{are_few, sort_few};

use super::Cpu;
use super::parallel::{TaskCounter, for_each_worker};
use super::shared::{SharedRows, SharedSlice};
use crate::element::Element;
use crate::matrix::{MatMut, MatRef};
use crate::permute::{NO_PAIR, NO_ROW};
use core::ops::Range;
use core::sync::atomic::{AtomicBool, Ordering};

/// Pairs in a chunk: some 10 µs of work. Never less than E, so that the histograms
/// together stay about as small as the pairs.
const CHUNK: usize = 8192;

/// Chunks that are worth a thread: what one costs to wake up, twice. (32768 pairs on two threads: 57 µs; on one: 41 µs.)
const CHUNKS_PER_THREAD: usize = 4;

/// Threads that share so many chunks.
fn workers(cpu: &Cpu, chunks: usize) -> usize {
    cpu.threads().min(chunks.div_ceil(CHUNKS_PER_THREAD))
}

/// Pairs in a chunk with `num_experts` experts.
fn chunk_len(num_experts: usize) -> usize {
    CHUNK.max(num_experts)
}

/// Counters for the pairs that are passed over. Successive pairs take different ones: with one, half of all increments would wait for the one
/// before when half of the experts live on another rank (measured: 85 µs more for 32768 pairs).
const SINKS: usize = 8;

/// The most elements that the histograms can have: for each chunk a counter for each expert and those for the pairs that are passed over.
pub(crate) fn max_histograms_len(pairs: usize, num_experts: usize) -> Option<usize> {
    let chunks = pairs.div_ceil(chunk_len(num_experts));
    chunks.checked_mul(num_experts.checked_add(SINKS)?)
}

/// Which ids are sorted, which are passed over, which are wrong.
pub(crate) struct Ids<'a> {
    pub ids: &'a [i32],
    pub num_experts: usize,
    /// Ids inside are sorted; inside `0..num_experts`.
    pub local: Range<usize>,
    /// Ids from here on are wrong, and so are those below −1; all others outside `local` are passed over.
    pub limit: usize,
}

impl Ids<'_> {
    /// Number of chunks, and the pairs of one.
    fn chunks(&self) -> (usize, impl Fn(usize) -> Range<usize> + Sync) {
        let len = chunk_len(self.num_experts);
        let pairs = self.ids.len();
        (pairs.div_ceil(len), move |c| {
            c * len..pairs.min((c + 1) * len)
        })
    }

    /// Elements of the histograms. Exactly: [`scan`] takes every (chunk, bucket) for one that [`count`] has filled.
    pub(crate) fn histograms_len(&self) -> Option<usize> {
        self.chunks().0.checked_mul(self.buckets().len())
    }

    fn buckets(&self) -> Buckets {
        Buckets {
            first: self.local.start as u32,
            local: self.local.len(),
        }
    }

    /// Whether an id is allowed.
    pub(crate) fn is_valid(&self, id: i32) -> bool {
        id == crate::routing::DROPPED || usize::try_from(id).is_ok_and(|id| id < self.limit)
    }
}

/// The counters of a chunk: the local experts, then those for pairs that are passed over. A copy, so that its fields stay in registers.
#[derive(Clone, Copy)]
struct Buckets {
    first: u32,
    local: usize,
}

impl Buckets {
    fn len(self) -> usize {
        self.local + SINKS
    }

    /// Whether all ids from `low` to `high` are local.
    fn hold(self, low: i32, high: i32) -> bool {
        let inside = |id: i32| usize::try_from(id).is_ok_and(|id| self.range().contains(&id));
        inside(low) && inside(high)
    }

    fn range(self) -> Range<usize> {
        self.first as usize..self.first as usize + self.local
    }

    /// The counter of a pair of a local expert.
    #[inline(always)]
    fn of_local(self, id: i32) -> usize {
        id.wrapping_sub_unsigned(self.first) as u32 as usize
    }

    /// The counter of any pair. No branch.
    #[inline(always)]
    fn of(self, pair: usize, id: i32) -> usize {
        // An id below the range, −1 included, wraps to a large number.
        self.of_local(id).min(self.local + pair % SINKS)
    }
}

/// Counts the pairs of each (chunk, bucket); returns whether every id is valid.
pub(crate) fn count(cpu: &Cpu, ids: &Ids, histograms: &mut [u32]) -> bool {
    let (chunks, pairs_of) = ids.chunks();
    let buckets = ids.buckets();
    let histograms = SharedSlice::new(histograms);
    let all_valid = AtomicBool::new(true);
    let tasks = TaskCounter::new(chunks);
    for_each_worker(workers(cpu, chunks), &|_| {
        while let Some(c) = tasks.take() {
            // SAFETY: the histogram of chunk c belongs to whoever took task c.
            let histogram = unsafe { histograms.range(c * buckets.len()..(c + 1) * buckets.len()) };
            histogram.fill(0);
            let chunk = &ids.ids[pairs_of(c)];
            // The extremes tell whether all are valid, and a loop over them alone is vectorised. −1 is always valid.
            let (low, high) = (chunk.iter()).fold((i32::MAX, -1), |(low, high), &id| {
                (id.min(low), id.max(high))
            });
            if !(ids.is_valid(low.min(high)) && ids.is_valid(high)) {
                all_valid.store(false, Ordering::Relaxed);
            }
            if buckets.hold(low, high) {
                for &id in chunk {
                    histogram[buckets.of_local(id)] += 1;
                }
            } else {
                for (pair, &id) in pairs_of(c).zip(chunk) {
                    histogram[buckets.of(pair, id)] += 1;
                }
            }
        }
    });
    all_valid.into_inner()
}

/// Turns counts into the first row of each (chunk, bucket); fills `offsets` and `counts`; returns the number of rows with those beyond
/// `offsets[E]`, where the pairs that are passed over go.
pub(crate) fn scan(
    ids: &Ids,
    histograms: &mut [u32],
    block: usize,
    offsets: &mut [usize],
    counts: &mut [usize],
) -> usize {
    let buckets = ids.buckets();
    let one_chunk = histograms.len() == buckets.len();
    // Replaces the bucket's counts by first rows, from `row` on; returns where it ends.
    let mut place = |bucket: usize, mut row: usize| {
        // Most calls. The general loop, once for each expert, would be most of the work for one token.
        if one_chunk {
            let count = core::mem::replace(&mut histograms[bucket], row as u32);
            return row + count as usize;
        }
        for histogram in histograms.chunks_exact_mut(buckets.len()) {
            let count = histogram[bucket] as usize;
            histogram[bucket] = row as u32; // fits: the caller bounded the number of rows
            row += count;
        }
        row
    };
    let (local, experts) = (ids.local.clone(), counts.len());
    let mut row = 0;
    offsets[..local.start].fill(0);
    counts[..local.start].fill(0);
    let all = offsets[local.clone()]
        .iter_mut()
        .zip(&mut counts[local.clone()]);
    for (bucket, (offset, count)) in all.enumerate() {
        *offset = row;
        *count = place(bucket, row) - row;
        // A division for each expert would be most of the work for one token.
        row += match block {
            1 => *count,
            _ => count.next_multiple_of(block),
        };
    }
    offsets[local.end..=experts].fill(row);
    counts[local.end..].fill(0);
    (buckets.local..buckets.len()).fold(row, |row, sink| place(sink, row))
}

/// Writes both permutations. `next` is what [`scan`] left: the first row of each (chunk, bucket). Rows from `rows` on are for the pairs that are
/// passed over: they are written like all others.
///
/// Precondition: [`count`] and [`scan`] have run on the same ids, and `pair_of_row` has as many rows as [`scan`] returned.
pub(crate) fn scatter(
    cpu: &Cpu,
    ids: &Ids,
    rows: u32,
    next: &mut [u32],
    pair_of_row: &mut [u32],
    row_of_pair: &mut [u32],
) {
    let (chunks, pairs_of) = ids.chunks();
    let buckets = ids.buckets();
    let next = SharedSlice::new(next);
    let all_rows = pair_of_row.len();
    let pair_of_row = SharedSlice::new(pair_of_row);
    let row_of_pair = SharedSlice::new(row_of_pair);
    let tasks = TaskCounter::new(chunks);
    for_each_worker(workers(cpu, chunks), &|_| {
        while let Some(c) = tasks.take() {
            let pairs = pairs_of(c);
            // SAFETY: the counters and the pairs of chunk c belong to whoever took task c.
            let (next, row_of_pair) = unsafe {
                (
                    next.range(c * buckets.len()..(c + 1) * buckets.len()),
                    row_of_pair.range(pairs.clone()),
                )
            };
            let pairs = pairs.clone().zip(&ids.ids[pairs]).zip(row_of_pair);
            if rows as usize == all_rows {
                for ((pair, &id), row_of) in pairs {
                    let next = &mut next[buckets.of_local(id)];
                    *row_of = *next;
                    // SAFETY: as below.
                    unsafe { pair_of_row.set(*next as usize, pair as u32) };
                    *next += 1;
                }
                continue;
            }
            for ((pair, &id), row_of) in pairs {
                let next = &mut next[buckets.of(pair, id)];
                let row = *next;
                *next += 1;
                // A branch would be mispredicted every other time when half of the experts live on another rank.
                *row_of = core::hint::select_unpredictable(row < rows, row, NO_ROW);
                // SAFETY: each (chunk, bucket) has as many rows of its own, from where the scan says, as it has pairs, so no other
                // pair has this row. `set` checks that it is inside.
                unsafe { pair_of_row.set(row as usize, pair as u32) };
            }
        }
    });
}

/// Bytes below which another thread costs more than it copies.
const BYTES_PER_THREAD: usize = 1 << 17;

/// `out[i] = src[index[i] / divisor]`; zeros where the index is `NO_PAIR` (= `NO_ROW`).
///
/// Precondition: `out` has as many rows as there are indices, and every other `index / divisor` is a row of `src`.
pub(crate) fn gather_rows<T: Element>(
    cpu: &Cpu,
    src: MatRef<T>,
    index: &[u32],
    divisor: usize,
    out: MatMut<T>,
) {
    const { assert!(NO_PAIR == NO_ROW) };
    let rows = index.len();
    let bytes = out.cols().saturating_mul(size_of::<T>());
    let rows_per_task = (BYTES_PER_THREAD / bytes.max(1)).clamp(1, 4096);
    let tasks = TaskCounter::new(rows.div_ceil(rows_per_task));
    let workers = rows.div_ceil(rows_per_task).min(cpu.threads());
    let out = SharedRows::new(out);
    for_each_worker(workers, &|_| {
        while let Some(task) = tasks.take() {
            let first = task * rows_per_task;
            let last = rows.min(first + rows_per_task);
            for (i, &from) in (first..).zip(&index[first..last]) {
                // SAFETY: row i belongs to the task, and the task to one worker.
                let row = unsafe { out.row(i) };
                match from {
                    NO_PAIR => row.fill(T::default()),
                    from => copy_row(&src, from as usize / divisor, row),
                }
            }
        }
    });
}

#[inline(always)]
fn copy_row<T: Element>(src: &MatRef<T>, i: usize, out: &mut [T]) {
    match src.row_slice(i) {
        Some(row) => out.copy_from_slice(row),
        None => {
            for (j, o) in out.iter_mut().enumerate() {
                *o = src.get(i, j).unwrap_or_default();
            }
        }
    }
}
