//! The driver of the grouped product: blocking, tasks, threads.
//!
//! The easy version:
//!
//! ```text
//! for each expert e, row r of e, column j:   out[r][j] = act( Σ_k A[r][k] · W[e][j][k] )
//! ```
//!
//! What this file makes of it, in the order of the loops:
//!
//! ```text
//! LOOP 1  task = (expert, block of ≤ MC rows, group of panels), from one shared counter       threads
//! LOOP 2    ko: blocks of k whose rows of A, packed, fit the L2 cache: pack A (gather, widen, transpose)
//! LOOP 3      panel of the group: its k slice of B streams through once for all rows of the block
//! LOOP 4        kc: KC values of k, so that the slice of B (KC × NR) stays in L1 across the row tiles
//! LOOP 5          row tile of ≤ MR rows: the register tile, sums continued in C (f32, L2)
//!           finish: bias, activation, rounding, store
//! ```
//!
//! Row tiles of a block are balanced: 32 rows are 6 + 6 + 5 + 5 + 5 + 5 and not 6 · 5 + 2, since a tile of 2 rows has too few chains to hide the
//! latency of an FMA.
#![allow(unsafe_code)] // raw tiles; disjoint writes to one output from several threads

mod epilogue;
mod kernel;
mod packing;

pub(crate) use packing::{CacheLine, Columns, PanelLayout, RowSource, pack_bias, zeroed_lines};

use super::Cpu;
use super::isa::Isa;
use super::out_rows::OutRows;
use super::parallel::{TaskCounter, for_each_worker};
use super::shared::SharedSlice;
use super::simd::{Op, Simd, dispatch};
use crate::element::DType;
use crate::grouped_gemm::{Activation, Groups, PackedMatrices};
use crate::matrix::AnyMatMut;
use core::ops::Range;
use epilogue::finish_panel;
use kernel::{Kernel, MicroKernel, PanelBf16, PanelF16, PanelF32, PanelFormat, TileArgs, UNROLL};

/// Most rows of a task. Each byte of B read from memory then feeds 2 · 96 / 4 = 48 FLOP (f32), above the balance of a core of some 110 GFLOP/s
/// and 15 GB/s.
const MC: usize = 96;
/// k of one pass over the row tiles: 256 × 16 × 4 B = 16 KiB of B and 6 KiB of A fit the 32 KiB of L1 (AVX2).
const KC: usize = 256;
/// Packed floats of A: 256 KiB, half of the smallest common L2 (512 KiB, Zen 2 and 3).
const A_FLOATS: usize = 64 * 1024;
/// Most columns of a task: C is 96 × 512 × 4 B = 192 KiB at the most; packing A costs one element move for 512 FMA lanes.
const COLUMNS: usize = 512;
/// Scratch floats of one worker.
const WORKER_FLOATS: usize = A_FLOATS + MC * COLUMNS;
/// Tasks wanted for each thread, so that the last ones to finish do not leave the others idle for long.
const TASKS_PER_THREAD: usize = 8;

/// Lanes of an instruction set, known without holding its token.
pub(crate) fn lanes(isa: Isa) -> usize {
    match isa {
        Isa::Neon => 4,
        Isa::Scalar | Isa::Avx2 => 8,
        Isa::Avx512 => 16,
    }
}

/// See [`crate::grouped_gemm::scratch_bytes`]. 63 bytes more let it begin at a cache line.
pub(crate) fn scratch_bytes(cpu: &Cpu) -> usize {
    cpu.threads() * WORKER_FLOATS * size_of::<f32>() + 63
}

/// Packs every panel of one matrix; panels are shared out among threads.
pub(crate) fn pack_panels(cpu: &Cpu, layout: &PanelLayout, columns: &Columns<'_>, out: &mut [u8]) {
    let panel_bytes = layout.panel_bytes();
    let out = SharedSlice::new(out);
    let tasks = TaskCounter::new(layout.panels());
    for_each_worker(cpu.threads().min(layout.panels()), &|_| {
        while let Some(p) = tasks.take() {
            // SAFETY: each p is taken once, so panels do not overlap.
            let panel = unsafe { out.range(p * panel_bytes..(p + 1) * panel_bytes) };
            packing::pack_panel(layout, columns, p, panel);
        }
    });
}

/// Runs a checked grouped product; see [`crate::grouped_gemm::grouped_gemm_into`].
pub(crate) fn run(
    cpu: &Cpu,
    source: &RowSource<'_>,
    weights: &PackedMatrices,
    groups: Groups<'_>,
    activation: Option<Activation>,
    mut out: AnyMatMut<'_>,
    scratch: &mut [u8],
) {
    let plan = Plan::new(cpu, weights.layout(), &groups);
    let skip = scratch.as_ptr().align_offset(64);
    let floats: &mut [f32] = {
        let len = cpu.threads() * WORKER_FLOATS * size_of::<f32>();
        bytemuck::cast_slice_mut(&mut scratch[skip..skip + len])
    };
    let scratch = SharedSlice::new(floats);
    let out = OutRows::new(&mut out);
    let tasks = TaskCounter::new(plan.tasks);
    for_each_worker(cpu.threads().min(plan.tasks), &|worker| {
        // SAFETY: each worker below `threads` runs once and has a part of its own.
        let scratch =
            unsafe { scratch.range(worker * WORKER_FLOATS..(worker + 1) * WORKER_FLOATS) };
        dispatch(
            cpu.isa(),
            Worker {
                plan: &plan,
                tasks: &tasks,
                source,
                weights,
                groups,
                activation: activation.as_ref(),
                out,
                scratch,
            },
        );
    });
}

/// How the work is cut: the same for every ISA and thread count as far as sums are concerned, since no sum crosses a task.
struct Plan {
    /// Most rows of a task, a multiple of MR.
    rows_per_task: usize,
    /// Panels of a task.
    panels_per_task: usize,
    /// Tasks that share the rows of one block.
    panel_groups: usize,
    tasks: usize,
}

impl Plan {
    fn new(cpu: &Cpu, layout: &PanelLayout, groups: &Groups<'_>) -> Self {
        let blocks: usize = (0..groups.experts())
            .map(|e| groups.rows_of(e).len().div_ceil(MC))
            .sum();
        let panels = layout.panels();
        let most = COLUMNS / layout.nr();
        let wanted = (TASKS_PER_THREAD * cpu.threads()).div_ceil(blocks.max(1));
        // A task of one panel would pack A for 16 columns only; 4 panels keep that cost below a tenth.
        let panel_groups = panels.div_ceil(most).max(wanted.min(panels.div_ceil(4)));
        let panels_per_task = panels.div_ceil(panel_groups);
        let panel_groups = panels.div_ceil(panels_per_task);
        Self {
            rows_per_task: MC,
            panels_per_task,
            panel_groups,
            tasks: blocks * panel_groups,
        }
    }
}

/// Finds the expert and rows of a task. Task numbers only grow for one worker, so the walk over experts never restarts.
struct Cursor {
    expert: usize,
    /// Blocks of rows before this expert's first.
    blocks_before: usize,
}

impl Cursor {
    fn seek(&mut self, groups: &Groups<'_>, rows_per_task: usize, block: usize) -> Range<usize> {
        loop {
            let rows = groups.rows_of(self.expert);
            let blocks = rows.len().div_ceil(rows_per_task);
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

/// One worker's share of a grouped product.
struct Worker<'a> {
    plan: &'a Plan,
    tasks: &'a TaskCounter,
    source: &'a RowSource<'a>,
    weights: &'a PackedMatrices,
    groups: Groups<'a>,
    activation: Option<&'a Activation>,
    out: OutRows,
    scratch: &'a mut [f32],
}

impl Op for Worker<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.weights.dtype() {
            DType::F32 => self.run_tasks::<S, PanelF32>(s),
            DType::F16 => self.run_tasks::<S, PanelF16>(s),
            DType::BF16 => self.run_tasks::<S, PanelBf16>(s),
        }
    }
}

impl Worker<'_> {
    #[inline(always)]
    fn run_tasks<S: Simd, Format: PanelFormat>(self, s: S) {
        let kernel = Kernel::<S, Format>::new(s);
        let layout = self.weights.layout();
        let (a, c) = self.scratch.split_at_mut(A_FLOATS);
        let mut cursor = Cursor {
            expert: 0,
            blocks_before: 0,
        };
        while let Some(task) = self.tasks.take() {
            let (block, group) = (task / self.plan.panel_groups, task % self.plan.panel_groups);
            let rows = cursor.seek(&self.groups, self.plan.rows_per_task, block);
            let first = group * self.plan.panels_per_task;
            let panels = first..layout.panels().min(first + self.plan.panels_per_task);
            let b = self.weights.panels(cursor.expert);
            multiply(
                kernel,
                layout,
                self.source,
                rows.clone(),
                panels.clone(),
                b,
                a,
                c,
            );
            let block_floats = rows.len() * layout.nr();
            for (panel, c) in panels.zip(c.chunks_exact(block_floats)) {
                // SAFETY: the rows and panels of this task are inside `out` (checked at the door) and no other task has them; the matrix stays
                // borrowed by `run`.
                unsafe {
                    finish_panel(
                        s,
                        layout,
                        panel,
                        c,
                        self.weights.bias(cursor.expert),
                        self.activation,
                        self.out,
                        rows.start,
                    );
                }
            }
        }
    }
}

/// LOOPS 2 to 5: C `[panels][rows][NR]` = A · B for one task.
#[inline(always)]
fn multiply<K: MicroKernel>(
    kernel: K,
    layout: &PanelLayout,
    source: &RowSource<'_>,
    rows: Range<usize>,
    panels: Range<usize>,
    b: &[u8],
    a: &mut [f32],
    c: &mut [f32],
) {
    let m = rows.len();
    let tiles = m.div_ceil(K::MR);
    let tile_start = |t: usize| m * t / tiles;
    let block_floats = m * K::NR;
    assert!(m <= MC && panels.len() * block_floats <= c.len());
    assert!(b.len() >= layout.panels() * layout.panel_bytes());
    let padded_k = layout.steps() * K::STEP;
    // LOOP 2
    let ko = (A_FLOATS / m / KC).max(1) * KC;
    for k0 in (0..padded_k).step_by(ko) {
        let padded = ko.min(padded_k - k0);
        let kc = padded.min(layout.k - k0);
        for t in 0..tiles {
            let (from, to) = (tile_start(t), tile_start(t + 1));
            let tile = &mut a[padded * from..padded * to];
            packing::pack_rows(source, rows.start + from..rows.start + to, k0, kc, tile);
        }
        // LOOP 3: several panels at once when there are few rows
        let at_once = if tiles == 1 { K::panels_at_once(m) } else { 1 };
        let mut panel = panels.start;
        while panel < panels.end {
            let width = if panel + at_once <= panels.end {
                at_once
            } else {
                1
            };
            let b = &b[panel * layout.panel_bytes()..];
            let c = &mut c[(panel - panels.start) * block_floats..][..width * block_floats];
            // LOOP 4. B is one stream in memory, slice after slice and panel after panel: while the row tiles use a slice, they fetch the next.
            for kk in (0..padded).step_by(KC) {
                let steps = KC.min(padded - kk) / K::STEP;
                let slice_bytes = steps * K::STEP_BYTES;
                let turns = (steps / UNROLL).max(1);
                let lines = (width * slice_bytes / 64).div_ceil(tiles * turns);
                // LOOP 5
                for t in 0..tiles {
                    let (from, to) = (tile_start(t), tile_start(t + 1));
                    let args = TileArgs {
                        steps,
                        a: a[padded * from + kk * (to - from)..].as_ptr(),
                        b: b[(k0 + kk) / K::STEP * K::STEP_BYTES..].as_ptr(),
                        b_stride: layout.panel_bytes(),
                        c: c[from * K::NR..].as_mut_ptr(),
                        c_stride: block_floats,
                        accumulate: k0 + kk > 0,
                        prefetch: b[(k0 + kk) / K::STEP * K::STEP_BYTES..]
                            .as_ptr()
                            .wrapping_add(slice_bytes + t * turns * lines * 64),
                        prefetch_lines: lines,
                    };
                    // SAFETY: A's tile holds `padded` values of k from `kk` on, each panel `panel_bytes` (asserted above), C `width` blocks of m rows;
                    // a tile has at most MR rows because tiles = ⌈m / MR⌉.
                    unsafe { kernel.run(to - from, width, args) };
                }
            }
            panel += width;
        }
    }
}
