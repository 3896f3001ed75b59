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

mod blocking;
mod epilogue;
mod kernel;
mod packing;
mod panel;
mod plan;
mod rows;
mod storage;
mod task;
#[cfg(test)]
mod tests;

pub(crate) use blocking::halves_panels;
pub(crate) use packing::{Columns, PanelLayout, pack, pack_bias, pack_into};
pub(crate) use rows::RowSource;
pub(crate) use storage::{Storage, advise_huge_pages};

use super::Cpu;
use super::caches::caches;
use super::isa::Isa;
use super::out_rows::OutRows;
use super::parallel::for_each_worker;
use super::shared::SharedSlice;
use super::simd::{Op, Simd, dispatch};
use crate::element::DType;
use crate::grouped_gemm::{Activation, Groups, PackedMatrices};
use crate::matrix::AnyMatMut;
use blocking::Blocking;
use kernel::{Kernel, MicroKernel};
use panel::{PanelBf16, PanelBf16Dot, PanelF16, PanelF32};
use plan::{Runs, Units};
use task::{PackedRows, Task};

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
    /// A product that so many workers share.
    ///
    /// # Safety
    /// `out` and the rows of `source` stay valid, and nobody else touches them, until the product has run; what the door checks holds.
    unsafe fn new(
        workers: usize,
        source: RowSource<'a>,
        weights: &'a PackedMatrices,
        groups: Groups<'a>,
        activation: Option<Activation>,
        out: OutRows,
    ) -> Self {
        Self {
            source: source.flushed(weights.dtype() == DType::BF16),
            units: Units::new(&groups, weights.layout().panels(), workers),
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

/// Multiply-adds that are worth a worker: some 5 µs. A layer on Zen 3 cores (f32, T = 1, K = 2, weights in the caches) with one worker and with two: H = I = 128 (98 thousand) 7.6 and 8.3 µs,
/// H = 256, I = 128 (twice as many) 14.6 and 13.1. In builds with assertions all work is shared, so that small tests meet several workers.
const WORTH_A_WORKER: usize = if cfg!(debug_assertions) { 1 } else { 1 << 16 };

/// Workers for the products of these rows with these weights.
fn workers(cpu: &Cpu, rows: usize, weights: &[&PackedMatrices]) -> usize {
    let of_row: usize = (weights.iter())
        .map(|w| w.n() * w.k() * if w.is_gated() { 2 } else { 1 })
        .sum();
    match rows.saturating_mul(of_row) / WORTH_A_WORKER {
        // The pool need not be asked.
        0 | 1 => 1,
        useful => cpu.threads().min(useful),
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
    let workers = workers(cpu, groups.total_rows(), &[weights]);
    // SAFETY: `out` and what `source` borrows live until the end of this function.
    let product = unsafe { Product::new(workers, source, weights, groups, activation, out) };
    run_all(cpu, workers, Blocking::new(cpu.isa()), &[product], scratch);
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
    let workers = workers(cpu, groups.total_rows(), &[up, down]);
    // SAFETY: h, ys and what `source` borrows live until the end of this function; h is read only after the first product (`run_all`).
    let products = unsafe {
        [
            Product::new(workers, source, up, groups, Some(activation), h_rows),
            Product::new(workers, h_source, down, groups, None, ys_rows),
        ]
    };
    run_all(cpu, workers, Blocking::new(cpu.isa()), &products, scratch);
}

/// Runs products one after another in one parallel region of at most `workers`; each may read what an earlier one writes.
fn run_all(
    cpu: &Cpu,
    workers: usize,
    blocking: Blocking,
    products: &[Product<'_>],
    scratch: &mut [u8],
) {
    let worker_floats = blocking.worker_floats();
    let skip = scratch.as_ptr().align_offset(64);
    let floats: &mut [f32] = {
        let len = workers * worker_floats * size_of::<f32>();
        bytemuck::cast_slice_mut(&mut scratch[skip..skip + len])
    };
    let scratch = SharedSlice::new(floats);
    let most = products.iter().map(|p| p.units.total()).max();
    for_each_worker(workers.min(most.unwrap_or(0)), &|worker| {
        for (i, product) in products.iter().enumerate() {
            // SAFETY: each worker below `workers` runs once and has a part of its own.
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
