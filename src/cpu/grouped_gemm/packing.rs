//! Packing weights, once, at load, into panels.
//!
//! A packed matrix of N columns (output features) and K rows is `panels` runs, each holding NR columns for all of K:
//!
//! ```text
//! panel p:  step 0: [c0 c1 … c(NR-1)]  step 1: [c0 … c(NR-1)]  …      f32, f16: a step is one k
//!                                                                       bf16:     a step is two, (even, odd) in each 32-bit word
//! ```
//!
//! Where the CPU's prefetcher follows two streams better than one, a panel of L whole lines and a rest lies in halves ([`PanelLayout::halved`]); a line is what meets a line of A:
//!
//! ```text
//! first half of line 0, of line 1, …, of line L-1 │ second half of line 0, of line 1, …, of line L-1 │ the rest
//! ```
//!
//! A plain panel holds columns `p·NR ..`. A gated one holds LANES gate columns, then the LANES up columns of the same intermediate features, so
//! that one tile has both halves of SwiGLU. Missing columns, and the odd half of a last pair, are zeros.

mod direct;

use super::panel::{LINE, PanelBf16, PanelF16, PanelF32, PanelFormat};
use super::storage::Storage;
use crate::cpu::Cpu;
use crate::cpu::caches::caches;
use crate::cpu::parallel::{TaskCounter, for_each_worker};
use crate::cpu::shared::SharedSlice;
use crate::cpu::simd::{MAX_LANES, Op, Simd, dispatch};
use crate::element::{DType, flush_bf16};
use crate::matrix::AnyMatRef;
use bytemuck::{Pod, Zeroable};
use core::mem::MaybeUninit;
use direct::{Filler, Packer};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// One cache line: the unit of packed storage, so that panels never straddle a line.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(crate) struct CacheLine([u8; 64]);

/// The geometry of a packed matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PanelLayout {
    /// Lanes of the ISA it is packed for; NR is twice that.
    pub(crate) lanes: usize,
    /// Format of the weights.
    pub(crate) dtype: DType,
    /// Output columns: N, or I of a gated pair.
    pub(crate) n: usize,
    /// K, unpadded.
    pub(crate) k: usize,
    /// Panels hold gate and up columns side by side.
    pub(crate) gated: bool,
    /// The second halves of a panel's lines lie behind the first halves. Speed only; see [`Streaming::Near`](super::blocking::Streaming::Near).
    pub(crate) halved: bool,
}

impl PanelLayout {
    pub(crate) fn nr(&self) -> usize {
        2 * self.lanes
    }

    /// Output columns of one panel.
    pub(crate) fn columns_per_panel(&self) -> usize {
        if self.gated { self.lanes } else { self.nr() }
    }

    pub(crate) fn panels(&self) -> usize {
        self.n.div_ceil(self.columns_per_panel())
    }

    /// k values in a step.
    pub(crate) fn step(&self) -> usize {
        match self.dtype {
            DType::F32 => PanelF32::STEP,
            DType::F16 => PanelF16::STEP,
            DType::BF16 => PanelBf16::STEP,
        }
    }

    pub(crate) fn steps(&self) -> usize {
        self.k.div_ceil(self.step())
    }

    pub(crate) fn step_bytes(&self) -> usize {
        self.nr() * self.step() * self.dtype.size()
    }

    pub(crate) fn panel_bytes(&self) -> usize {
        self.steps() * self.step_bytes()
    }

    /// Steps that meet a line of A.
    fn line_steps(&self) -> usize {
        LINE / self.step()
    }

    fn half_line_bytes(&self) -> usize {
        self.line_steps() / 2 * self.step_bytes()
    }

    /// Bytes from the first half of a line to the second, where they lie apart.
    pub(crate) fn apart(&self) -> Option<usize> {
        let lines = self.steps() / self.line_steps();
        self.halved.then_some(lines * self.half_line_bytes())
    }

    /// Where byte `at` of the steps in their order lies in a panel, and how many follow it there.
    pub(crate) fn place(&self, at: usize) -> (usize, usize) {
        match self.apart() {
            Some(apart) if at < 2 * apart => {
                let half = self.half_line_bytes();
                let (count, within) = (at / half, at % half);
                let place = count % 2 * apart + count / 2 * half + within;
                (place, half - within)
            }
            _ => (at, self.panel_bytes() - at),
        }
    }

    /// Bytes of the whole matrix, or `None` when they do not fit.
    pub(crate) fn matrix_bytes(&self) -> Option<usize> {
        // Everything is at most a small constant times n·k rounded up; the products below check it.
        let padded_n = self.n.checked_next_multiple_of(self.columns_per_panel())?;
        let padded_k = self.k.checked_next_multiple_of(self.step())?;
        padded_n
            .checked_mul(if self.gated { 2 } else { 1 })?
            .checked_mul(padded_k)?
            .checked_mul(self.dtype.size())
            .filter(|&bytes| bytes <= isize::MAX as usize - 64)
    }
}

/// Where a panel's NR columns come from: row `row` of `gate` or `up` for each, or nothing.
#[derive(Clone, Copy)]
pub(crate) struct Columns<'a> {
    /// The gate projection `[I, K]`, when gated.
    pub(crate) gate: Option<AnyMatRef<'a>>,
    /// The up projection, or the only one: `[n, K]`.
    pub(crate) up: AnyMatRef<'a>,
}

impl<'a> Columns<'a> {
    /// The matrix and row of column `c` of panel `p`, or `None` for padding.
    fn source(&self, layout: &PanelLayout, p: usize, c: usize) -> Option<(&AnyMatRef<'a>, usize)> {
        let (matrix, row) = match &self.gate {
            Some(gate) if c < layout.lanes => (gate, p * layout.lanes + c),
            Some(_) => (&self.up, p * layout.lanes + c - layout.lanes),
            None => (&self.up, p * layout.nr() + c),
        };
        (row < layout.n).then_some((matrix, row))
    }
}

/// Packs one matrix as the next one of `out`, in memory that nothing fills with zeros before.
pub(crate) fn pack(cpu: &Cpu, layout: &PanelLayout, columns: &Columns<'_>, out: &mut Storage) {
    // SAFETY: `pack_panels` writes every byte.
    unsafe { out.push(|lines| pack_panels(cpu, layout, columns, lines)) }
}

/// Packs one matrix over another of the same layout.
pub(crate) fn pack_into(
    cpu: &Cpu,
    layout: &PanelLayout,
    columns: &Columns<'_>,
    out: &mut [CacheLine],
) {
    let (first, len) = (out.as_mut_ptr().cast(), out.len());
    // SAFETY: the same memory for as long; `pack_panels` leaves no byte uninitialised.
    let out = unsafe { core::slice::from_raw_parts_mut(first, len) };
    pack_panels(cpu, layout, columns, out);
}

/// Packs every panel of a matrix; groups of panels are shared out among threads. Every byte of `out` is written.
fn pack_panels(
    cpu: &Cpu,
    layout: &PanelLayout,
    columns: &Columns<'_>,
    out: &mut [MaybeUninit<CacheLine>],
) {
    let len = size_of_val(out);
    // SAFETY: the same memory as bytes, which need no alignment.
    let bytes = unsafe { core::slice::from_raw_parts_mut(out.as_mut_ptr().cast(), len) };
    let (panels, padding) = bytes.split_at_mut(layout.panels() * layout.panel_bytes());
    padding.fill(MaybeUninit::new(0));
    // A model is packed expert by expert: when a matrix that L2 does not hold is first used, the next ones have driven it out of L3, too. And what is written through the caches is
    // read first: past them, packing over an expert is 1.2 to 1.7 times as fast (AVX-512 on Emerald Rapids, whose L3 would hold every matrix).
    let stream = panels.len() > caches().l2;
    let packer = Packer::new(layout, columns, stream);
    let out = SharedSlice::new(panels);
    let tasks = TaskCounter::new(layout.panels().div_ceil(packer.group()));
    for_each_worker(cpu.threads().min(layout.panels()), &|_| {
        dispatch(
            cpu.isa(),
            PackGroups {
                packer: &packer,
                tasks: &tasks,
                out: &out,
            },
        );
    });
}

/// One worker's share of a matrix.
struct PackGroups<'a> {
    packer: &'a Packer<'a>,
    tasks: &'a TaskCounter,
    out: &'a SharedSlice<'a, MaybeUninit<u8>>,
}

impl Op for PackGroups<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let layout = self.packer.layout;
        let group = self.packer.group();
        while let Some(task) = self.tasks.take() {
            let panels = task * group..layout.panels().min((task + 1) * group);
            let bytes = panels.start * layout.panel_bytes()..panels.end * layout.panel_bytes();
            // SAFETY: each task is taken once, so groups of panels do not overlap.
            let out = unsafe { self.out.range(bytes) };
            self.packer.pack_group(s, panels, out);
        }
        s.fence_streams();
    }
}

/// k values packed at a time by [`pack_any`]: 64 × 32 columns of f32 stay in L1 between the transposition and the conversion.
const BLOCK: usize = 64;

/// Writes one panel from sources of any format and any strides: BLOCK elements of a row at a time are widened to f32, which holds every format exactly, and
/// transposed one by one. An order of magnitude slower than [`Packer`]'s ways, and the definition of what they write.
#[inline(never)]
fn pack_any(layout: &PanelLayout, columns: &Columns<'_>, p: usize, out: &mut Filler<'_>) {
    let nr = layout.nr();
    let mut row = [0.0f32; BLOCK];
    let mut block = [0.0f32; BLOCK * 2 * MAX_LANES];
    let mut narrow = [0.0f32; BLOCK * 2 * MAX_LANES];
    let mut k0 = 0;
    while k0 < layout.k {
        let kc = BLOCK.min(layout.k - k0);
        // BLOCK is even, so a block begins at a step.
        let padded = kc.next_multiple_of(layout.step());
        let block = &mut block[..padded * nr];
        block.fill(0.0);
        for c in 0..nr {
            if let Some((matrix, i)) = columns.source(layout, p, c) {
                matrix.widen_row(i, k0, &mut row[..kc]);
                for (k, &value) in row[..kc].iter().enumerate() {
                    block[k * nr + c] = value;
                }
            }
        }
        let bytes = padded / layout.step() * layout.step_bytes();
        let narrow = &mut bytemuck::cast_slice_mut::<f32, u8>(&mut narrow)[..bytes];
        store_block(layout, block, narrow);
        out.put(narrow);
        k0 += kc;
    }
}

/// Narrows a `[k][NR]` block of f32 to the panel's format (to nearest, ties to even).
fn store_block(layout: &PanelLayout, block: &[f32], out: &mut [u8]) {
    match layout.dtype {
        DType::F32 => bytemuck::cast_slice_mut::<u8, f32>(out).copy_from_slice(block),
        DType::F16 => bytemuck::cast_slice_mut::<u8, f16>(out).convert_from_f32_slice(block),
        DType::BF16 => {
            let nr = layout.nr();
            let words = bytemuck::cast_slice_mut::<u8, u32>(out).chunks_exact_mut(nr);
            for (words, pair) in words.zip(block.chunks_exact(2 * nr)) {
                let (even, odd) = pair.split_at(nr);
                for ((word, &e), &o) in words.iter_mut().zip(even).zip(odd) {
                    let bits = |x: f32| u32::from(flush_bf16(bf16::from_f32(x)).to_bits());
                    *word = bits(o) << 16 | bits(e);
                }
            }
        }
    }
}

/// Puts a bias vector into panel order, zero where there is no column.
pub(crate) fn pack_bias(
    layout: &PanelLayout,
    gate: Option<&[f32]>,
    up: Option<&[f32]>,
) -> Option<Box<[f32]>> {
    if gate.is_none() && up.is_none() {
        return None;
    }
    let at = |bias: Option<&[f32]>, i: usize| bias.and_then(|b| b.get(i)).copied().unwrap_or(0.0);
    let (lanes, nr) = (layout.lanes, layout.nr());
    Some(
        (0..layout.panels() * nr)
            .map(|j| match (layout.gated, j / nr, j % nr) {
                (true, p, c) if c < lanes => at(gate, p * lanes + c),
                (true, p, c) => at(up, p * lanes + c - lanes),
                (false, _, _) => at(up, j),
            })
            .collect(),
    )
}

#[cfg(test)]
mod tests;
