//! Packing weights, once, at load, into panels.
//!
//! A packed matrix of N columns (output features) and K rows is `panels` runs, each holding NR columns for all of K:
//!
//! ```text
//! panel p:  step 0: [c0 c1 … c(NR-1)]  step 1: [c0 … c(NR-1)]  …      f32, f16: a step is one k
//!                                                                       bf16:     a step is two, (even, odd) in each 32-bit word
//! ```
//!
//! A plain panel holds columns `p·NR ..`. A gated one holds LANES gate columns, then the LANES up columns of the same intermediate features, so
//! that one tile has both halves of SwiGLU. Missing columns, and the odd half of a last pair, are zeros.

use super::kernel::{PanelBf16, PanelF16, PanelF32, PanelFormat};
use crate::element::{DType, flush_bf16};
use crate::matrix::AnyMatRef;
use bytemuck::{Pod, Zeroable};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// One cache line: the unit of packed storage, so that panels never straddle a line.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(crate) struct CacheLine([u8; 64]);

/// Zeroed storage of at least `bytes` bytes.
pub(crate) fn zeroed_lines(bytes: usize) -> Box<[CacheLine]> {
    bytemuck::zeroed_slice_box(bytes.div_ceil(64))
}

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

/// k values packed at a time: 64 × 32 columns of f32 stay in L1 between the transposition and the conversion.
const BLOCK: usize = 64;

/// Fills one panel (`out`, zeroed, `panel_bytes` long).
///
/// Rows of neighbouring elements that have the panel's format already are only transposed; what is left goes through f32.
pub(crate) fn pack_panel(layout: &PanelLayout, columns: &Columns<'_>, p: usize, out: &mut [u8]) {
    let done = match layout.nr() {
        8 => transpose_panel::<8>(layout, columns, p, out),
        16 => transpose_panel::<16>(layout, columns, p, out),
        32 => transpose_panel::<32>(layout, columns, p, out),
        _ => 0,
    };
    convert_panel(layout, columns, p, done, out);
}

/// Transposes what can be taken as it is; returns how many k that was: all whole steps, or none.
fn transpose_panel<const NR: usize>(
    layout: &PanelLayout,
    columns: &Columns<'_>,
    p: usize,
    out: &mut [u8],
) -> usize {
    let mut f32_rows: [&[f32]; NR] = [&[]; NR];
    let mut f16_rows: [&[f16]; NR] = [&[]; NR];
    let mut bf16_rows: [&[bf16]; NR] = [&[]; NR];
    for c in 0..NR {
        let Some((matrix, i)) = columns.source(layout, p, c) else {
            continue;
        };
        let taken = match (layout.dtype, matrix) {
            (DType::F32, AnyMatRef::F32(m)) => m.row_slice(i).map(|row| f32_rows[c] = row),
            (DType::F16, AnyMatRef::F16(m)) => m.row_slice(i).map(|row| f16_rows[c] = row),
            (DType::BF16, AnyMatRef::BF16(m)) => m.row_slice(i).map(|row| bf16_rows[c] = row),
            _ => None,
        };
        if taken.is_none() {
            return 0;
        }
    }
    let steps = layout.k / layout.step();
    let out = &mut out[..steps * layout.step_bytes()];
    match layout.dtype {
        DType::F32 => transpose(&f32_rows, bytemuck::cast_slice_mut(out), |&[x]| x),
        DType::F16 => transpose(&f16_rows, bytemuck::cast_slice_mut(out), |&[x]| x),
        DType::BF16 => transpose(&bf16_rows, bytemuck::cast_slice_mut(out), |pair| {
            let [even, odd] = pair.map(|x| u32::from(flush_bf16(x).to_bits()));
            odd << 16 | even
        }),
    }
    steps * layout.step()
}

/// `out[step][c] = word(row c at that step)`; empty rows leave their column. So much of a row is read at once that the hardware sees a stream in each of
/// the NR rows, and so little that the part of `out` stays in the first-level cache meanwhile.
fn transpose<T: Copy, W: Pod, const NR: usize, const STEP: usize>(
    rows: &[&[T]; NR],
    out: &mut [W],
    word: impl Fn(&[T; STEP]) -> W,
) {
    let (out, _) = out.as_chunks_mut::<NR>();
    for (first, part) in out.chunks_mut(BLOCK).enumerate() {
        for (c, row) in rows.iter().enumerate().filter(|(_, row)| !row.is_empty()) {
            let (row, _) = row[first * BLOCK * STEP..].as_chunks::<STEP>();
            for (to, from) in part.iter_mut().zip(row) {
                to[c] = word(from);
            }
        }
    }
}

/// The general way for what begins at `k0`: rows are read `BLOCK` elements at a time, whatever their strides and format, and transposed through a small f32
/// buffer; f32 holds every format exactly.
fn convert_panel(
    layout: &PanelLayout,
    columns: &Columns<'_>,
    p: usize,
    mut k0: usize,
    out: &mut [u8],
) {
    let nr = layout.nr();
    let mut row = [0.0f32; BLOCK];
    let mut block = [0.0f32; BLOCK * 2 * crate::cpu::simd::MAX_LANES];
    while k0 < layout.k {
        let kc = BLOCK.min(layout.k - k0);
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
        // BLOCK is even, so a block begins at a step.
        let start = k0 / layout.step() * layout.step_bytes();
        let len = padded / layout.step() * layout.step_bytes();
        store_block(layout, block, &mut out[start..start + len]);
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
mod tests {
    use super::*;
    use crate::matrix::MatRef;

    /// Bits of every kind: normal, subnormal, zeros, infinities, NaN with payloads.
    fn bits(n: usize) -> Vec<u16> {
        let mut state = 1u64;
        (0..n)
            .map(|i| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                let random = (state >> 48) as u16;
                match i % 5 {
                    0 => random & 0x80ff,
                    _ => random,
                }
            })
            .collect()
    }

    fn check(layout: &PanelLayout, columns: &Columns<'_>) {
        for p in 0..layout.panels() {
            let bytes = layout.panel_bytes();
            let (mut fast, mut general) = (zeroed_lines(bytes), zeroed_lines(bytes));
            let general = &mut bytemuck::cast_slice_mut(&mut general)[..bytes];
            convert_panel(layout, columns, p, 0, general);
            let fast = &mut bytemuck::cast_slice_mut(&mut fast)[..bytes];
            pack_panel(layout, columns, p, fast);
            assert_eq!(fast, general, "{layout:?} panel {p}");
        }
    }

    /// Both ways give the same bytes, whatever the numbers of columns and k and wherever rows begin.
    #[test]
    fn transposing_is_converting() {
        for lanes in [4, 8, 16] {
            for (n, k) in [(1, 1), (lanes, 64), (2 * lanes, 65), (37, 130), (70, 3)] {
                for pad in [0, 3] {
                    let stride = k + pad;
                    let halves = bits(n * stride);
                    // f32 that survive: the general way passes NaN through f32 as they are.
                    let floats: Vec<f32> = halves.iter().map(|&b| f32::from(b)).collect();
                    let sixteen: Vec<f16> = halves
                        .iter()
                        .map(|&b| f16::from_bits(b))
                        .map(|x| if x.is_nan() { f16::NAN } else { x })
                        .collect();
                    let brain: Vec<bf16> = halves
                        .iter()
                        .map(|&b| bf16::from_bits(b))
                        .map(|x| if x.is_nan() { bf16::NAN } else { x })
                        .collect();
                    let matrices: [(DType, AnyMatRef<'_>); 3] = [
                        (
                            DType::F32,
                            MatRef::with_strides(&floats, n, k, stride, 1)
                                .unwrap()
                                .into(),
                        ),
                        (
                            DType::F16,
                            MatRef::with_strides(&sixteen, n, k, stride, 1)
                                .unwrap()
                                .into(),
                        ),
                        (
                            DType::BF16,
                            MatRef::with_strides(&brain, n, k, stride, 1)
                                .unwrap()
                                .into(),
                        ),
                    ];
                    for (dtype, up) in matrices {
                        for gate in [None, Some(up)] {
                            let gated = gate.is_some();
                            let layout = PanelLayout {
                                lanes,
                                dtype,
                                n,
                                k,
                                gated,
                            };
                            check(&layout, &Columns { gate, up });
                        }
                    }
                }
            }
        }
    }
}
