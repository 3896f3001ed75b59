//! How a product is cut and shared out.
//!
//! The unit of work is one panel for one block of rows. Units are numbered by block, then panel, and handed out in runs from one counter: long runs
//! first, so that a worker keeps the rows that it has packed, short ones at the end, so that all workers finish together. Which worker gets which
//! run changes from call to call; no sum crosses a unit, so results do not.

use crate::grouped_gemm::Groups;
use core::ops::Range;
use core::sync::atomic::{AtomicUsize, Ordering};

/// Most rows of a block. Each byte of B read from memory then feeds 2 · 96 / 4 = 48 FLOP (f32), five times what a core needs that does 270 GFLOP/s and
/// reads 30 GB/s; more rows would take the cache from A.
pub(super) const MC: usize = 96;
/// A worker takes this part of what is left, divided by the number of workers.
const SHARE: usize = 4;
/// Shortest run: a run costs a visit to the counter and a break in the stream of B.
const SHORTEST: usize = 2;

/// The counter of one product.
pub(super) struct Units {
    panels: usize,
    total: usize,
    /// A run is what is left, divided by this.
    parts: usize,
    next: AtomicUsize,
    done: AtomicUsize,
}

impl Units {
    pub(super) fn new(groups: &Groups<'_>, panels: usize, workers: usize) -> Self {
        let blocks: usize = (0..groups.experts())
            .map(|e| blocks_of(groups.rows_of(e).len()))
            .sum();
        Self {
            panels,
            total: blocks * panels,
            // Nobody waits for the end of a worker who is alone.
            parts: if workers == 1 { 1 } else { SHARE * workers },
            next: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
        }
    }

    pub(super) fn total(&self) -> usize {
        self.total
    }

    /// The next run.
    fn take(&self) -> Option<Range<usize>> {
        let length = |next: usize| {
            let left = self.total - next;
            (left / self.parts).max(SHORTEST).min(left)
        };
        // Relaxed: the counter publishes nothing; `finish` and rayon's join order the outputs.
        let first = self
            .next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| {
                (next < self.total).then(|| next + length(next))
            })
            .ok()?;
        Some(first..first + length(first))
    }

    /// Reports units as done.
    pub(super) fn finish(&self, units: usize) {
        self.done.fetch_add(units, Ordering::Release);
    }

    /// Waits until every unit is done. Whoever calls this has found no more units to take, so each of those left is being worked on by a thread that
    /// is running: this waits for none that may never come.
    pub(super) fn wait(&self) {
        let mut spins = 0u32;
        while self.done.load(Ordering::Acquire) < self.total {
            spins += 1;
            if spins < 10_000 {
                core::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }
}

/// A run inside one block.
#[derive(Clone)]
pub(super) struct Run {
    pub(super) expert: usize,
    /// Number of the block in the whole product.
    pub(super) block: usize,
    pub(super) rows: Range<usize>,
    pub(super) panels: Range<usize>,
}

/// One worker's runs, in ascending order.
#[derive(Clone)]
pub(super) struct Runs<'a> {
    units: &'a Units,
    groups: Groups<'a>,
    /// Taken and not yet handed on.
    range: Range<usize>,
    expert: usize,
    /// Blocks of rows before this expert's first.
    blocks_before: usize,
}

impl<'a> Runs<'a> {
    pub(super) fn new(units: &'a Units, groups: Groups<'a>) -> Self {
        Self {
            units,
            groups,
            range: 0..0,
            expert: 0,
            blocks_before: 0,
        }
    }

    /// Expert and rows of a block. Block numbers only grow for one worker, so the walk over experts never restarts.
    fn seek(&mut self, block: usize) -> Range<usize> {
        loop {
            let rows = self.groups.rows_of(self.expert);
            let blocks = blocks_of(rows.len());
            if block < self.blocks_before + blocks {
                // Blocks of equal size, so that the last is not a sliver.
                let (i, n) = (block - self.blocks_before, rows.len());
                return rows.start + n * i / blocks..rows.start + n * (i + 1) / blocks;
            }
            self.blocks_before += blocks;
            self.expert += 1;
        }
    }
}

impl Iterator for Runs<'_> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        if self.range.is_empty() {
            self.range = self.units.take()?;
        }
        let panels = self.units.panels;
        let (block, first) = (self.range.start / panels, self.range.start % panels);
        let last = panels.min(first + self.range.len());
        self.range.start += last - first;
        let rows = self.seek(block);
        Some(Run {
            expert: self.expert,
            block,
            rows,
            panels: first..last,
        })
    }
}

fn blocks_of(rows: usize) -> usize {
    rows.div_ceil(MC)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Workers that take turns see every panel of every row once, in order, inside one expert at a time.
    #[test]
    fn runs_cover_each_panel_of_each_row_once() {
        let counts = [0, 1, MC, MC + 1, 0, 3 * MC - 1, 2, 0];
        let mut offsets = vec![0];
        for c in counts {
            // Three rows of padding after each expert.
            offsets.push(offsets.last().unwrap() + c + 3);
        }
        let groups = Groups::Ragged {
            offsets: &offsets,
            counts: &counts,
        };
        for (panels, count) in [(1, 2), (2, 2), (7, 2), (48, 2), (7, 1)] {
            let units = Units::new(&groups, panels, count);
            let mut workers = vec![Runs::new(&units, groups); count];
            let mut seen = vec![0; offsets.last().unwrap() * panels];
            for turn in 0.. {
                let Some(run) = workers[turn % count].next() else {
                    break;
                };
                assert!(run.rows.len() <= MC && !run.rows.is_empty());
                let whole = groups.rows_of(run.expert);
                assert!(whole.start <= run.rows.start && run.rows.end <= whole.end);
                units.finish(run.panels.len());
                for r in run.rows {
                    for p in run.panels.clone() {
                        seen[r * panels + p] += 1;
                    }
                }
            }
            assert!(workers.iter_mut().all(|w| w.next().is_none()));
            units.wait();
            for e in 0..counts.len() {
                let (rows, end) = (groups.rows_of(e), offsets[e + 1]);
                let is = |n, r: Range<usize>| {
                    seen[r.start * panels..r.end * panels]
                        .iter()
                        .all(|&s| s == n)
                };
                assert!(is(1, rows.clone()) && is(0, rows.end..end));
            }
        }
    }
}
