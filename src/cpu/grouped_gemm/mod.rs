//! The driver of the grouped product: blocking, work sharing, threads.
//!
//! The easy version:
//!
//! ```text
//! for each expert e, row r of e, column j:   out[r][j] = act( Σ_k A[r][k] · W[e][j][k] )
//! ```
//!
//! What this folder makes of it, in the order of the loops:
//!
//! ```text
//! LOOP 1  run = (block of ≤ MC rows of an expert, some of its panels), from one shared counter       threads
//! LOOP 2    ko: blocks of k whose rows of A, packed, fit half the L2 cache: pack A (gather, widen)
//! LOOP 3      panel of the run: its k slice of B streams through once for all rows of the block
//! LOOP 4        kc: values of k whose slice of B stays in the L2 cache across the row tiles
//! LOOP 5          row tile of ≤ MR rows: the register tile, sums continued in C (f32, L1 or L2)
//!             finish: bias, activation, rounding, store
//! ```
//!
//! The optimisations, in the order of what they brought:
//!
//! 1. While row tiles use one slice of B they prefetch the next, wherever it lies: the next block of k, the next panel, the next run. Without it the first
//!    tile of each slice waits for memory and the others leave memory idle.
//! 2. A is packed by copying lines, not by transposing (`rows.rs`), and once for all runs of a block where it fits.
//! 3. Runs shrink towards the end (`plan.rs`), so that threads finish together.
//! 4. Row tiles of a block are balanced: 32 rows are 6 + 6 + 5 + 5 + 5 + 5 and not 6 · 5 + 2, since a tile of 2 rows has too few chains to hide the
//!    latency of an FMA.
//! 5. Products that follow each other (gate and up, then down) run in one parallel region.
#![allow(unsafe_code)] // raw tiles; disjoint writes to one output from several threads

mod epilogue;
mod kernel;
mod packing;
mod panel;
mod plan;
mod rows;
mod storage;

pub(crate) use packing::{Columns, PanelLayout, pack, pack_bias, pack_into};
pub(crate) use rows::RowSource;
pub(crate) use storage::{Storage, advise_huge_pages};

use super::Cpu;
use super::caches::caches;
use super::isa::Isa;
use super::out_rows::OutRows;
use super::parallel::for_each_worker;
use super::shared::SharedSlice;
use super::simd::model::{Model, model};
use super::simd::{Op, Simd, dispatch};
use crate::element::DType;
use crate::grouped_gemm::{Activation, Groups, PackedMatrices};
use crate::matrix::AnyMatMut;
use core::ops::Range;
use epilogue::FinishPanel;
use kernel::{Kernel, MicroKernel, Pace, Prefetch, TileArgs};
use panel::{LINE, PanelBf16, PanelBf16Dot, PanelF16, PanelF32, UNROLL};
use plan::{MC, Run, Runs, Units};

/// Most columns of a block of sums C while A has to be packed in several parts: C is 96 × 512 × 4 B = 192 KiB at the most, and packing a line of A costs
/// the time of some two FMA for each of its 512 · 16.
const COLUMNS: usize = 512;
/// Bytes of the next run's B that are fetched while the last panel of this one is at work.
const HEAD_BYTES: usize = 4096;
/// How far ahead of its use B is asked for where it is used once, over all panels that run side by side. Against leaving it to the hardware (one Zen 5 core,
/// qwen3's shape): T = 1 6% faster, T = 64 5% (f32), 8% (bf16), 27% (f16); half as far loses 10 to 20% of that for f16, half as far again 2%; in bursts every
/// four steps 3%. On Emerald Rapids, where [`Streaming`] is into L2: without it T = 64 takes 31% (f32) and 37% (bf16) longer.
const AHEAD_BYTES: usize = 8192;

/// Lanes of an instruction set, known without holding its token.
pub(crate) fn lanes(isa: Isa) -> usize {
    match isa {
        Isa::Neon => 4,
        Isa::Scalar | Isa::Avx2 => 8,
        Isa::Avx512 => 16,
    }
}

/// How B is asked for where it is used once.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Streaming {
    /// Into L1. On a Zen 5 core T = 64 is 7% slower into L2.
    IntoL1,
    /// Into L2. On an Emerald Rapids core 7% (T = 64, f32), 2% (T = 64, bf16) and 4% (T = 8, f32) faster than into L1, whose sixteen misses under way the loads want, too.
    IntoL2,
    /// By the hardware alone up to this many rows, and then one panel at a time. On a Zen 4 core a tile alone reads 28 to 30 GB/s of 30 so, 23 to 26 when it asks for lines itself;
    /// from 11 rows on asking is level or better.
    ByHardwareUpTo(usize),
}

impl Streaming {
    fn new(isa: Isa) -> Self {
        match model() {
            Model::Intel => Self::IntoL2,
            // Measured with AVX-512 alone.
            Model::Zen4 if isa == Isa::Avx512 => Self::ByHardwareUpTo(8),
            _ => Self::IntoL1,
        }
    }

    fn by_hardware(self, rows: usize) -> bool {
        matches!(self, Self::ByHardwareUpTo(most) if rows <= most)
    }

    fn pace(self) -> Pace {
        match self {
            Self::IntoL2 => Pace::AsUsedL2,
            _ => Pace::AsUsed,
        }
    }
}

/// What the caches and the kind of this machine want.
#[derive(Clone, Copy)]
struct Blocking {
    /// Words of packed A: half of the L2 cache, between what MC rows of one slice need and a megabyte.
    a_words: usize,
    /// Bytes of a slice of B: a tenth of the L2 cache. It need not stay in L1: a tile reads 2 vectors of it in M cycles, which L2 feeds easily.
    /// Slices of half the L1 cost 4% at T = 512 (more visits to the tile, each some 120 cycles with its sums), of two fifths of L2 10%.
    b_bytes: usize,
    streaming: Streaming,
}

impl Blocking {
    fn new(isa: Isa) -> Self {
        let caches = caches();
        Self {
            streaming: Streaming::new(isa),
            a_words: (caches.l2 / 8).clamp(32 << 10, 256 << 10),
            b_bytes: caches.l2 / 10,
        }
    }

    /// Scratch floats of one worker.
    fn worker_floats(self) -> usize {
        self.a_words + MC * COLUMNS
    }
}

/// See [`crate::grouped_gemm::scratch_bytes`]. 63 bytes more let it begin at a cache line.
pub(crate) fn scratch_bytes(cpu: &Cpu) -> usize {
    cpu.threads() * Blocking::new(cpu.isa()).worker_floats() * size_of::<f32>() + 63
}

/// One grouped product whose operands were checked.
struct Product<'a> {
    source: RowSource<'a>,
    weights: &'a PackedMatrices,
    groups: Groups<'a>,
    activation: Option<Activation>,
    out: OutRows,
    units: Units,
    /// Results go past the caches.
    stream: bool,
}

impl<'a> Product<'a> {
    /// # Safety
    /// `out` and the rows of `source` stay valid, and nobody else touches them, until the product has run; what the door checks holds.
    unsafe fn new(
        cpu: &Cpu,
        source: RowSource<'a>,
        weights: &'a PackedMatrices,
        groups: Groups<'a>,
        activation: Option<Activation>,
        out: OutRows,
    ) -> Self {
        Self {
            source: source.flushed(weights.dtype() == DType::BF16),
            units: Units::new(&groups, weights.layout().panels(), cpu.threads()),
            weights,
            groups,
            activation,
            out,
            stream: !weights.is_gated()
                && out.can_stream()
                && groups.total_rows() * weights.n() * size_of::<f32>() > caches().l3 / 2,
        }
    }
}

/// Runs one checked product; see [`crate::grouped_gemm::grouped_gemm_into`].
pub(crate) fn run(
    cpu: &Cpu,
    source: RowSource<'_>,
    weights: &PackedMatrices,
    groups: Groups<'_>,
    activation: Option<Activation>,
    mut out: AnyMatMut<'_>,
    scratch: &mut [u8],
) {
    let out = OutRows::new(&mut out);
    // SAFETY: `out` and what `source` borrows live until the end of this function.
    let product = unsafe { Product::new(cpu, source, weights, groups, activation, out) };
    run_all(cpu, &[product], scratch);
}

/// Runs the two checked products of the experts, `h = act(A · W_upᵀ)` and `ys = h · W_downᵀ`, in one parallel region.
pub(crate) fn run_experts(
    cpu: &Cpu,
    source: RowSource<'_>,
    (up, down): (&PackedMatrices, &PackedMatrices),
    groups: Groups<'_>,
    activation: Activation,
    mut h: AnyMatMut<'_>,
    mut ys: AnyMatMut<'_>,
    scratch: &mut [u8],
) {
    let (h_rows, ys_rows) = (OutRows::new(&mut h), OutRows::new(&mut ys));
    let h_source = RowSource::written(h_rows, up.n());
    // SAFETY: h, ys and what `source` borrows live until the end of this function; h is read only after the first product (`run_all`).
    let products = unsafe {
        [
            Product::new(cpu, source, up, groups, Some(activation), h_rows),
            Product::new(cpu, h_source, down, groups, None, ys_rows),
        ]
    };
    run_all(cpu, &products, scratch);
}

/// Runs products one after another in one parallel region; each may read what an earlier one writes.
fn run_all(cpu: &Cpu, products: &[Product<'_>], scratch: &mut [u8]) {
    let blocking = Blocking::new(cpu.isa());
    let worker_floats = blocking.worker_floats();
    let skip = scratch.as_ptr().align_offset(64);
    let floats: &mut [f32] = {
        let len = cpu.threads() * worker_floats * size_of::<f32>();
        bytemuck::cast_slice_mut(&mut scratch[skip..skip + len])
    };
    let scratch = SharedSlice::new(floats);
    let most = products.iter().map(|p| p.units.total()).max();
    for_each_worker(cpu.threads().min(most.unwrap_or(0)), &|worker| {
        for (i, product) in products.iter().enumerate() {
            // SAFETY: each worker below `threads` runs once and has a part of its own.
            let scratch =
                unsafe { scratch.range(worker * worker_floats..(worker + 1) * worker_floats) };
            dispatch(
                cpu.isa(),
                Worker {
                    product,
                    blocking,
                    native_bf16: cpu.native_bf16(),
                    scratch,
                },
            );
            if i + 1 < products.len() {
                product.units.wait();
            }
        }
    });
}

/// One worker's share of a grouped product.
struct Worker<'a> {
    product: &'a Product<'a>,
    blocking: Blocking,
    native_bf16: bool,
    scratch: &'a mut [f32],
}

impl Op for Worker<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // SAFETY: none but the last is a native dot, and `Cpu::native_bf16` is only true where the CPU has it.
        unsafe {
            match self.product.weights.dtype() {
                DType::F32 => self.with(s, Kernel::<S, PanelF32>::new(s)),
                DType::F16 => self.with(s, Kernel::<S, PanelF16>::new(s)),
                DType::BF16 => {
                    if const { S::BF16_DOT }
                        && self.native_bf16
                        && self.product.source.dtype() == DType::BF16
                    {
                        self.with(s, Kernel::<S, PanelBf16Dot>::new(s));
                    } else {
                        self.with(s, Kernel::<S, PanelBf16>::new(s));
                    }
                }
            }
        }
    }
}

/// A worker with its kernel, and below it the parts of its loop, are functions of their own: in a build without optimisation every value that is inlined has a
/// place of its own on the stack, and all of them together overflowed the 2 MiB of a thread.
struct With<'a, K> {
    worker: Worker<'a>,
    kernel: K,
}

impl<K: MicroKernel> Op for With<'_, K> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.worker.run_units(s, self.kernel);
    }
}

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

impl Worker<'_> {
    #[inline(always)]
    fn with<S: Simd, K: MicroKernel>(self, s: S, kernel: K) {
        s.outline(With {
            worker: self,
            kernel,
        });
    }

    #[inline(always)]
    fn run_units<S: Simd, K: MicroKernel>(self, s: S, kernel: K) {
        let product = self.product;
        let (a, c) = self.scratch.split_at_mut(self.blocking.a_words);
        let mut runs = Runs::new(&product.units, product.groups);
        let mut next = runs.next();
        let mut rows = PackedRows { block: None, a };
        while let Some(run) = next {
            // One run ahead, to know where its B begins.
            next = runs.next();
            let then = next.as_ref().map(|next| {
                let b = product.weights.panels(next.expert);
                b[next.panels.start * product.weights.layout().panel_bytes()..].as_ptr()
            });
            let task = Task {
                product,
                run: &run,
                blocking: self.blocking,
                then: then.unwrap_or(core::ptr::null()),
            };
            task.run(s, kernel, &mut rows, c);
            if product.stream {
                s.fence_streams();
            }
            product.units.finish(run.panels.len());
        }
    }
}

/// Rows of A as they lie packed in a worker's scratch.
struct PackedRows<'a> {
    /// The block whose rows are here with all their k.
    block: Option<usize>,
    a: &'a mut [f32],
}

/// LOOPS 2 to 5 for one run.
struct Task<'a> {
    product: &'a Product<'a>,
    run: &'a Run,
    blocking: Blocking,
    /// Where B goes on after this run; may be null.
    then: *const u8,
}

impl Task<'_> {
    #[inline(always)]
    fn run<S: Simd, K: MicroKernel>(
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
        let at_once = if m <= K::MR && !self.blocking.streaming.by_hardware(m) {
            K::panels_at_once(m)
        } else {
            1
        };
        let mut panel = panels.start;
        while panel < panels.end {
            let width = if panel + at_once <= panels.end {
                at_once
            } else {
                1
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
        let at =
            |panel: usize, step: usize| b[panel * panel_bytes + step * K::STEP_BYTES..].as_ptr();
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
                    Next::Part => at(panel, from + now - 1),
                    Next::Run => self.then,
                }
            };
            let streaming = self.blocking.streaming;
            let mut prefetch = if streaming.by_hardware(m) {
                Prefetch::NONE
            } else if tile_count == 1 {
                stream_ahead::<K>(streaming.pace(), at(panel, from), now, after, width)
            } else {
                let last = from + now == steps.end && matches!(then, Next::Run);
                let bytes = if last {
                    HEAD_BYTES
                } else {
                    now * K::STEP_BYTES
                };
                Prefetch {
                    from: after,
                    lines: (bytes / 64).div_ceil(tile_count * (now / UNROLL).max(1)),
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
                    c: c[first * K::NR..].as_mut_ptr(),
                    c_stride: m * K::NR,
                    accumulate: from > 0,
                    prefetch,
                };
                // SAFETY: A's tile holds `lines` of m rows, each panel all its steps, C `width` blocks of m rows (asserted above); a tile has at most MR
                // rows because there are ⌈m / MR⌉.
                unsafe { kernel.run(end - first, width, args) };
                prefetch.from = prefetch
                    .from
                    .wrapping_add(now / UNROLL * prefetch.lines * 64);
            }
        }
    }
}

/// For one tile, which reads B as a stream: what lies [`AHEAD_BYTES`] ahead in it, and in its last part what comes after it.
fn stream_ahead<K: MicroKernel>(
    pace: Pace,
    b: *const u8,
    steps: usize,
    after: *const u8,
    width: usize,
) -> Prefetch {
    let line_steps = LINE / K::WORDS;
    let ahead = (AHEAD_BYTES / width / K::STEP_BYTES).next_multiple_of(line_steps);
    Prefetch {
        from: b.wrapping_add(ahead * K::STEP_BYTES),
        pace,
        lines: 0,
        turn: steps.saturating_sub(ahead).next_multiple_of(line_steps),
        then: after,
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
