//! LOOPS 2 to 5: one run of panels by the rows of one block.

use super::Product;
use super::blocking::{Blocking, COLUMNS, HEAD_BYTES, stream_ahead};
use super::epilogue::FinishPanel;
use super::kernel::{Gaps, MicroKernel, Prefetch, TileArgs};
use super::packing::PanelLayout;
use super::panel::LINE;
use super::plan::Run;
use super::rows::{self, RowSource};
use crate::cpu::simd::{Op, Simd};
use core::ops::Range;

/// [`rows::pack_rows`] as a function of its own.
struct PackRows<'a, const PAIRS: bool> {
    source: &'a RowSource<'a>,
    rows: Range<usize>,
    lines: Range<usize>,
    out: &'a mut [f32],
}

impl<const PAIRS: bool> PackRows<'_, PAIRS> {
    /// # Safety
    /// That of [`rows::pack_rows`], when it runs.
    unsafe fn new<'a>(
        source: &'a RowSource<'a>,
        rows: Range<usize>,
        lines: Range<usize>,
        out: &'a mut [f32],
    ) -> PackRows<'a, PAIRS> {
        PackRows {
            source,
            rows,
            lines,
            out,
        }
    }
}

impl<const PAIRS: bool> Op for PackRows<'_, PAIRS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // SAFETY: `new`'s contract.
        unsafe { rows::pack_rows::<S, PAIRS>(s, self.source, self.rows, self.lines, self.out) }
    }
}

/// Rows of A as they lie packed in a worker's scratch.
pub(super) struct PackedRows<'a> {
    /// The block whose rows are here with all their k.
    pub(super) block: Option<usize>,
    pub(super) a: &'a mut [f32],
}

/// LOOPS 2 to 5 for one run.
pub(super) struct Task<'a> {
    pub(super) product: &'a Product<'a>,
    pub(super) run: &'a Run,
    pub(super) blocking: Blocking,
    /// Where B goes on after this run; may be null.
    pub(super) then: *const u8,
}

impl Task<'_> {
    #[inline(always)]
    pub(super) fn run<S: Simd, K: MicroKernel>(
        self,
        s: S,
        kernel: K,
        rows: &mut PackedRows<'_>,
        c: &mut [f32],
    ) {
        let layout = self.product.weights.layout();
        let m = self.run.rows.len();
        let all = lines_of::<K>(layout);
        let fit = rows.a.len() / (m * LINE);
        let whole = fit >= all;
        // Equal parts.
        let part = all.div_ceil(all.div_ceil(fit));
        // While A comes in parts, sums of several panels wait in C.
        let group = if whole {
            self.run.panels.len()
        } else {
            COLUMNS / K::NR
        };
        let mut first = self.run.panels.start;
        while first < self.run.panels.end {
            let panels = first..self.run.panels.end.min(first + group);
            // LOOP 2
            for from in (0..all).step_by(part) {
                let lines = from..all.min(from + part);
                if !whole || rows.block != Some(self.run.block) {
                    self.pack::<S, K>(s, lines.clone(), rows.a);
                    rows.block = whole.then_some(self.run.block);
                }
                self.panels(s, kernel, panels.clone(), lines, rows.a, c);
            }
            first = panels.end;
        }
    }

    /// Packs the lines `lines` of the run's rows, tile after tile.
    #[inline(always)]
    fn pack<S: Simd, K: MicroKernel>(&self, s: S, lines: Range<usize>, a: &mut [f32]) {
        let rows = &self.run.rows;
        for (from, to) in tiles::<K>(rows.len()) {
            let tile = &mut a[from * lines.len() * LINE..to * lines.len() * LINE];
            let rows = rows.start + from..rows.start + to;
            // SAFETY: `Product::new`'s contract; an earlier product that writes these rows is done (`Units::wait`).
            unsafe {
                let (source, lines) = (&self.product.source, lines.clone());
                if K::NATIVE_DOT {
                    s.outline(PackRows::<true>::new(source, rows, lines, tile));
                } else {
                    s.outline(PackRows::<false>::new(source, rows, lines, tile));
                }
            }
        }
    }

    /// LOOPS 3 to 5: continues the sums of `panels` by `lines` of A and finishes them after the last line.
    #[inline(always)]
    fn panels<S: Simd, K: MicroKernel>(
        &self,
        s: S,
        kernel: K,
        panels: Range<usize>,
        lines: Range<usize>,
        a: &[f32],
        c: &mut [f32],
    ) {
        let product = self.product;
        let layout = product.weights.layout();
        let m = self.run.rows.len();
        let block_floats = m * K::NR;
        let last = lines.end == lines_of::<K>(layout);
        let all = lines.start == 0 && last;
        // LOOP 3: several panels at once when there are few rows
        let streaming = self.blocking.streaming;
        let at_once = if m <= K::MR && streaming.side_by_side(m) {
            K::panels_at_once(m)
        } else {
            1
        };
        let mut panel = panels.start;
        while panel < panels.end {
            let width = match panels.end - panel {
                left if left >= at_once => at_once,
                // A single row has tiles of two panels, too: twice the chains of one.
                2.. if at_once > 2 => 2,
                _ => 1,
            };
            let waiting = if all { 0 } else { panel - panels.start };
            let c = &mut c[waiting * block_floats..][..width * block_floats];
            // Where B goes on after these panels: with the next, with the next part of A, or with the next run.
            let then = if panel + width < panels.end {
                Next::Panel(panel + width)
            } else if last && panels.end == self.run.panels.end {
                Next::Run
            } else {
                Next::Part
            };
            self.slices(kernel, panel, width, then, lines.clone(), a, c);
            if last {
                for (i, c) in c.chunks_exact_mut(block_floats).enumerate() {
                    // SAFETY: the rows and panels of this run are inside `out` (checked at the door) and no other run has them; `Product::new`'s contract.
                    unsafe {
                        s.outline(FinishPanel::new(
                            layout,
                            panel + i,
                            c,
                            product.weights.bias(self.run.expert),
                            product.activation.as_ref(),
                            product.out,
                            self.run.rows.start,
                            product.stream,
                        ));
                    }
                }
            }
            panel += width;
        }
    }

    /// LOOPS 4 and 5: `width` panels from `panel` on.
    #[inline(always)]
    fn slices<K: MicroKernel>(
        &self,
        kernel: K,
        panel: usize,
        width: usize,
        then: Next,
        lines: Range<usize>,
        a: &[f32],
        c: &mut [f32],
    ) {
        let layout = self.product.weights.layout();
        let b = self.product.weights.panels(self.run.expert);
        let (m, panel_bytes) = (self.run.rows.len(), layout.panel_bytes());
        let line_steps = LINE / K::WORDS;
        let steps = lines.start * line_steps..layout.steps().min(lines.end * line_steps);
        // Where a line of a panel begins.
        let at = |panel: usize, step: usize| {
            b[panel * panel_bytes + layout.place(step * K::STEP_BYTES).0..].as_ptr()
        };
        let apart = layout.apart();
        let tail = at(panel, layout.steps() / line_steps * line_steps);
        let tile_count = m.div_ceil(K::MR);
        // With one tile B is used once: no slices.
        let slice = if tile_count == 1 {
            steps.len()
        } else {
            // Equal slices, so that none is a sliver.
            let count = (steps.len() * K::STEP_BYTES).div_ceil(self.blocking.b_bytes);
            steps.len().div_ceil(count).next_multiple_of(line_steps)
        };
        assert!(a.len() >= m * lines.len() * LINE && c.len() >= width * m * K::NR);
        assert!(b.len() >= (panel + width) * panel_bytes);
        // LOOP 4
        for from in steps.clone().step_by(slice) {
            let now = slice.min(steps.end - from);
            let after = if from + now < steps.end {
                at(panel, from + now)
            } else {
                match then {
                    Next::Panel(panel) => at(panel, steps.start),
                    Next::Part => at(panel, from),
                    Next::Run => self.then,
                }
            };
            let streaming = self.blocking.streaming;
            // Two streams of B used once are the hardware's to find (`Streaming::Near`).
            let found = tile_count == 1 && apart.is_some();
            let mut prefetch = if found || !streaming.asks(m) {
                Prefetch::NONE
            } else if tile_count == 1 {
                stream_ahead::<K>(streaming, at(panel, from), now, after, width)
            } else {
                let last = from + now == steps.end && matches!(then, Next::Run);
                let bytes = if last {
                    HEAD_BYTES
                } else {
                    now * K::STEP_BYTES
                };
                let lines = (bytes / 64).div_ceil(tile_count * (now / K::GROUP).max(1));
                Prefetch {
                    from: after,
                    pace: streaming.slice_pace(),
                    lines,
                    gaps: Gaps::new(apart, lines * 64),
                    ..Prefetch::NONE
                }
            };
            // LOOP 5
            for (first, end) in tiles::<K>(m) {
                let a = &a[first * lines.len() * LINE..];
                let args = TileArgs {
                    steps: now,
                    a: a[(from - steps.start) / line_steps * (end - first) * LINE..].as_ptr(),
                    b: at(panel, from),
                    b_stride: panel_bytes,
                    gaps: Gaps::new(apart, K::GROUP * K::STEP_BYTES),
                    tail,
                    c: c[first * K::NR..].as_mut_ptr(),
                    c_stride: m * K::NR,
                    accumulate: from > 0,
                    prefetch,
                };
                // SAFETY: A's tile holds `lines` of m rows, each panel all its steps, C `width` blocks of m rows (asserted above); a tile has at most MR
                // rows because there are ⌈m / MR⌉.
                unsafe { kernel.run(end - first, width, args) };
                let asked = now / K::GROUP * prefetch.lines * 64;
                let pieces = if apart.is_some() { 2 } else { 1 };
                prefetch.from = prefetch.from.wrapping_add(asked / pieces);
            }
        }
    }
}

/// What follows the last slice of a panel.
#[derive(Clone, Copy)]
enum Next {
    Panel(usize),
    /// The next part of A, somewhere.
    Part,
    Run,
}

/// Lines of a whole row of A.
fn lines_of<K: MicroKernel>(layout: &PanelLayout) -> usize {
    (layout.steps() * K::WORDS).div_ceil(LINE)
}

/// The row tiles of a block of m rows: ⌈m / MR⌉ of them, as equal as can be.
fn tiles<K: MicroKernel>(m: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = m.div_ceil(K::MR);
    (0..count).map(move |t| (m * t / count, m * (t + 1) / count))
}
