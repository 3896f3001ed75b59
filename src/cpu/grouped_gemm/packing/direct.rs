//! Packing at the speed of memory, where source and panels have one format, or f32 and bf16, and the source's rows or its columns are contiguous.
//!
//! The easy version is [`pack_any`]. What this file makes of it:
//!
//! 1. Elements are moved in blocks of one cache line ([`LINE`] words) of each of the panel's NR columns. A row-major source (`[N, K]`) is transposed in
//!    registers, by words of 32 bits: an f32, a pair of bf16, which is what a panel of bf16 holds, or a pair of f16 that is taken apart afterwards. From
//!    contiguous columns (`[K, N]`) they are copied. Only f32 for panels of bf16 are converted, in registers and after the transposition, where the two of
//!    a pair lie in the same lane.
//! 2. A block is put together in L1 and leaves in one piece, in whole lines, which can go past the caches.
//! 3. Each line of the source is asked for ahead of its use and then read once.

use super::{Columns, PanelLayout, pack_any};
use crate::cpu::grouped_gemm::panel::LINE;
use crate::cpu::grouped_gemm::rows::flush_pairs;
use crate::cpu::simd::{MAX_LANES, Simd};
use crate::element::DType;
use core::mem::MaybeUninit;
use core::ops::Range;

/// How far ahead of its use each row of the source is asked for.
const AHEAD_BYTES: usize = 512;
/// Panels packed side by side from contiguous columns, so that what is read of each row of the source is long.
const GROUP: usize = 8;

/// The columns of one vector of a panel: element (c, k) lies at `data + c · column_stride + k · k_stride`, in bytes.
#[derive(Clone, Copy)]
struct Source {
    data: *const u8,
    column_stride: usize,
    k_stride: usize,
    /// Columns that there are.
    valid: usize,
}

impl Source {
    const NONE: Self = Self {
        data: core::ptr::null(),
        column_stride: 0,
        k_stride: 0,
        valid: 0,
    };

    /// Columns `half · LANES ..` of panel `p`.
    fn new(layout: &PanelLayout, columns: &Columns<'_>, p: usize, half: usize) -> Self {
        let Some((matrix, row)) = columns.source(layout, p, half * layout.lanes) else {
            return Self::NONE;
        };
        let (data, row_stride, col_stride) = matrix.as_raw();
        let size = matrix.dtype().size();
        Self {
            data: data.wrapping_add(row * row_stride * size),
            column_stride: row_stride * size,
            k_stride: col_stride * size,
            valid: layout.lanes.min(layout.n - row),
        }
    }

    fn at(&self, c: usize, k: usize) -> *const u8 {
        self.data
            .wrapping_add(c * self.column_stride + k * self.k_stride)
    }

    /// The elements `ks` of the columns that there are, in rows of two lines each and with zeros around them.
    ///
    /// # Safety
    /// The elements are inside the matrix, `size` bytes each, and fit two lines.
    unsafe fn staged(
        &self,
        ks: Range<usize>,
        size: usize,
        stage: &mut [[f32; 2 * LINE]; MAX_LANES],
    ) -> Self {
        *stage = [[0.0; 2 * LINE]; MAX_LANES];
        for (c, line) in stage.iter_mut().enumerate().take(self.valid) {
            let line = bytemuck::bytes_of_mut(line).chunks_exact_mut(size);
            for (k, to) in ks.clone().zip(line) {
                // SAFETY: the caller's contract.
                to.copy_from_slice(unsafe { core::slice::from_raw_parts(self.at(c, k), size) });
            }
        }
        Self {
            data: stage.as_ptr().cast(),
            column_stride: size_of_val(&stage[0]),
            k_stride: size,
            valid: MAX_LANES,
        }
    }
}

/// Which neighbours a source's elements have.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// Those of a row.
    Rows,
    /// Those of a column.
    Columns,
    /// None, or they have to be converted.
    Any,
}

impl Way {
    fn of(layout: &PanelLayout, columns: &Columns<'_>) -> Self {
        let source = columns.up.dtype();
        if source != layout.dtype && !narrows(source, layout) {
            return Self::Any;
        }
        let each = |is: &dyn Fn(usize, usize) -> bool| {
            [columns.gate, Some(columns.up)]
                .into_iter()
                .flatten()
                .all(|matrix| {
                    let (_, row_stride, col_stride) = matrix.as_raw();
                    matrix.dtype() == source && is(row_stride, col_stride)
                })
        };
        if each(&|_, col_stride| col_stride == 1 || layout.k == 1) {
            Self::Rows
        } else if each(&|row_stride, _| row_stride == 1) {
            Self::Columns
        } else {
            Self::Any
        }
    }
}

/// Whether elements are converted as they are moved.
fn narrows(source: DType, layout: &PanelLayout) -> bool {
    (source, layout.dtype) == (DType::F32, DType::BF16)
}

/// How 32-bit words of a panel's format lie in a panel.
trait Word {
    /// Elements in a word, of one column.
    const ELEMENTS: usize;
    /// Words of 32 bits that they have in the source.
    const FLOATS: usize = 1;

    /// Words of LANES columns from the first and the last of [`Word::FLOATS`] words of the source.
    #[inline(always)]
    fn join<S: Simd>(_s: S, first: S::F, _last: S::F) -> S::F {
        first
    }

    /// Writes the words `w` of LANES columns into a block.
    ///
    /// # Safety
    /// `block` holds [`LINE`] words of 2 × LANES columns, w < LINE and half < 2.
    unsafe fn put<S: Simd>(s: S, words: S::F, block: *mut f32, w: usize, half: usize);

    /// The words of LANES columns, whose `ELEMENTS` elements begin at the given places.
    ///
    /// # Safety
    /// LANES elements at each place are inside the matrix.
    unsafe fn gather<S: Simd>(s: S, from: *const u8, k_stride: usize) -> S::F;
}

struct WordF32;
struct WordF16;
struct WordBf16;
/// bf16 from f32, to nearest, ties to even.
struct WordNarrowed;

impl Word for WordF32 {
    const ELEMENTS: usize = 1;

    #[inline(always)]
    unsafe fn put<S: Simd>(s: S, words: S::F, block: *mut f32, w: usize, half: usize) {
        // SAFETY: the caller's contract.
        unsafe { s.store(block.add((2 * w + half) * S::LANES), words) }
    }

    #[inline(always)]
    unsafe fn gather<S: Simd>(s: S, from: *const u8, _k_stride: usize) -> S::F {
        // SAFETY: the caller's contract.
        unsafe { s.load(from.cast()) }
    }
}

/// Two neighbours in k of LANES columns, the first in the lower halves.
///
/// # Safety
/// As [`Word::gather`].
#[inline(always)]
unsafe fn gather_pairs<S: Simd>(s: S, from: *const u8, k_stride: usize) -> S::F {
    // SAFETY: the caller's contract.
    let (even, odd) = unsafe {
        let odd = from.wrapping_add(k_stride);
        (s.load_u16(from.cast()), s.load_u16(odd.cast()))
    };
    s.from_bits(s.or_i(even, s.shl::<16>(odd)))
}

impl Word for WordF16 {
    const ELEMENTS: usize = 2;

    #[inline(always)]
    unsafe fn put<S: Simd>(s: S, words: S::F, block: *mut f32, w: usize, half: usize) {
        let (block, words) = (block.cast::<u16>(), s.to_bits(words));
        let even = s.and_i(words, s.splat_i(0xffff));
        // SAFETY: the caller's contract; a word is two steps.
        unsafe {
            s.store_u16(block.add((4 * w + half) * S::LANES), even);
            s.store_u16(block.add((4 * w + 2 + half) * S::LANES), s.shr::<16>(words));
        }
    }

    #[inline(always)]
    unsafe fn gather<S: Simd>(s: S, from: *const u8, k_stride: usize) -> S::F {
        // SAFETY: the caller's contract.
        unsafe { gather_pairs(s, from, k_stride) }
    }
}

impl Word for WordBf16 {
    const ELEMENTS: usize = 2;

    #[inline(always)]
    unsafe fn put<S: Simd>(s: S, words: S::F, block: *mut f32, w: usize, half: usize) {
        let words = s.from_bits(flush_pairs(s, s.to_bits(words)));
        // SAFETY: the caller's contract.
        unsafe { s.store(block.add((2 * w + half) * S::LANES), words) }
    }

    #[inline(always)]
    unsafe fn gather<S: Simd>(s: S, from: *const u8, k_stride: usize) -> S::F {
        // SAFETY: the caller's contract.
        unsafe { gather_pairs(s, from, k_stride) }
    }
}

impl Word for WordNarrowed {
    const ELEMENTS: usize = 2;
    const FLOATS: usize = 2;

    #[inline(always)]
    fn join<S: Simd>(s: S, even: S::F, odd: S::F) -> S::F {
        let (even, odd) = (s.to_bf16(even), s.to_bf16(odd));
        s.from_bits(s.or_i(even, s.shl::<16>(odd)))
    }

    #[inline(always)]
    unsafe fn put<S: Simd>(s: S, words: S::F, block: *mut f32, w: usize, half: usize) {
        // SAFETY: the caller's contract.
        unsafe { WordBf16::put(s, words, block, w, half) }
    }

    #[inline(always)]
    unsafe fn gather<S: Simd>(s: S, from: *const u8, k_stride: usize) -> S::F {
        // SAFETY: the caller's contract.
        let (even, odd) = unsafe {
            let odd = from.wrapping_add(k_stride);
            (s.load(from.cast()), s.load(odd.cast()))
        };
        Self::join(s, even, odd)
    }
}

/// A line of words of each column, as steps of a panel.
#[repr(C, align(64))]
struct Block([f32; LINE * 2 * MAX_LANES]);

/// The memory of a panel, which is written step by step.
pub(super) struct Filler<'a> {
    layout: &'a PanelLayout,
    memory: &'a mut [MaybeUninit<u8>],
    /// Bytes of the steps written so far.
    at: usize,
    /// Past the caches.
    stream: bool,
}

impl<'a> Filler<'a> {
    pub(super) fn new(
        layout: &'a PanelLayout,
        memory: &'a mut [MaybeUninit<u8>],
        stream: bool,
    ) -> Self {
        Self {
            layout,
            memory,
            at: 0,
            stream,
        }
    }

    /// Whether every byte has been written.
    pub(super) fn is_full(&self) -> bool {
        self.at == self.memory.len()
    }

    /// The next bytes. Panics when there is no room.
    pub(super) fn put(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let to = self.advance(rest.len());
            let now;
            (now, rest) = rest.split_at(to.len());
            for (to, &from) in to.iter_mut().zip(now) {
                to.write(from);
            }
        }
    }

    /// The place of the next bytes, as far as they lie together.
    fn advance(&mut self, bytes: usize) -> &mut [MaybeUninit<u8>] {
        let (place, room) = self.layout.place(self.at);
        let bytes = bytes.min(room);
        self.at += bytes;
        &mut self.memory[place..place + bytes]
    }

    /// The next words. Panics when there is no room.
    #[inline(always)]
    fn put_words<S: Simd>(&mut self, s: S, words: &[f32]) {
        let stream = self.stream;
        let mut rest = words;
        while !rest.is_empty() {
            let to = self.advance(size_of_val(rest));
            let now;
            (now, rest) = rest.split_at(to.len() / size_of::<f32>());
            let to = to.as_mut_ptr().cast::<f32>();
            let vectors = now.chunks_exact(S::LANES);
            if !stream || !vectors.remainder().is_empty() || to.addr() % (4 * S::LANES) != 0 {
                // SAFETY: `advance` has made room.
                unsafe {
                    to.cast::<u8>()
                        .copy_from_nonoverlapping(now.as_ptr().cast(), size_of_val(now))
                };
                continue;
            }
            for (i, vector) in vectors.enumerate() {
                // SAFETY: as above; vectors are aligned (looked up above); `PackGroups` ends with a fence.
                unsafe { s.stream(to.add(i * S::LANES), s.load_slice(vector)) };
            }
        }
    }
}

/// How the panels of one matrix are written.
pub(super) struct Packer<'a> {
    pub(super) layout: &'a PanelLayout,
    columns: &'a Columns<'a>,
    way: Way,
    stream: bool,
}

impl<'a> Packer<'a> {
    /// `stream`: past the caches.
    pub(super) fn new(layout: &'a PanelLayout, columns: &'a Columns<'a>, stream: bool) -> Self {
        Self {
            layout,
            columns,
            way: Way::of(layout, columns),
            stream,
        }
    }

    /// The most panels that are packed together.
    pub(super) fn group(&self) -> usize {
        match self.way {
            Way::Columns => GROUP,
            Way::Rows | Way::Any => 1,
        }
    }

    /// Writes `panels` to every byte of `out`.
    #[inline(always)]
    pub(super) fn pack_group<S: Simd>(
        &self,
        s: S,
        panels: Range<usize>,
        out: &mut [MaybeUninit<u8>],
    ) {
        let mut parts = out.chunks_exact_mut(self.layout.panel_bytes());
        let mut fillers: [Filler<'_>; GROUP] = core::array::from_fn(|_| {
            Filler::new(self.layout, parts.next().unwrap_or_default(), self.stream)
        });
        let fillers = &mut fillers[..panels.len()];
        match (self.way, self.layout.dtype) {
            (Way::Any, _) => {
                for (p, filler) in panels.zip(fillers.iter_mut()) {
                    pack_any(self.layout, self.columns, p, filler);
                }
            }
            (_, DType::F32) => self.pack_words::<S, WordF32>(s, panels, fillers),
            (_, DType::F16) => self.pack_words::<S, WordF16>(s, panels, fillers),
            (_, DType::BF16) if narrows(self.columns.up.dtype(), self.layout) => {
                self.pack_words::<S, WordNarrowed>(s, panels, fillers);
            }
            (_, DType::BF16) => self.pack_words::<S, WordBf16>(s, panels, fillers),
        }
        assert!(fillers.iter().all(Filler::is_full));
    }

    /// Block by block, of each panel in turn.
    #[inline(always)]
    fn pack_words<S: Simd, W: Word>(&self, s: S, panels: Range<usize>, fillers: &mut [Filler<'_>]) {
        let layout = self.layout;
        assert!(S::LANES == layout.lanes);
        let mut sources = [[Source::NONE; 2]; GROUP];
        for (sources, p) in sources.iter_mut().zip(panels) {
            *sources = [0, 1].map(|half| Source::new(layout, self.columns, p, half));
        }
        let mut block = Block([0.0; LINE * 2 * MAX_LANES]);
        for k in (0..layout.k).step_by(LINE * W::ELEMENTS) {
            let ks = k..layout.k.min(k + LINE * W::ELEMENTS);
            let words = ks.len().div_ceil(layout.step()) * layout.step_bytes() / size_of::<f32>();
            for (sources, filler) in sources.iter().zip(fillers.iter_mut()) {
                for (half, source) in sources.iter().enumerate() {
                    // SAFETY: the columns of a source and k < K are inside the matrix, whose extent was checked when the view was made.
                    unsafe { self.fill::<S, W>(s, source, ks.clone(), half, &mut block) };
                }
                filler.put_words(s, &block.0[..words]);
            }
        }
    }

    /// Half a block.
    ///
    /// # Safety
    /// The elements `ks` of the source's columns are inside the matrix.
    #[inline(always)]
    unsafe fn fill<S: Simd, W: Word>(
        &self,
        s: S,
        source: &Source,
        ks: Range<usize>,
        half: usize,
        block: &mut Block,
    ) {
        let block = block.0.as_mut_ptr();
        // SAFETY: the caller's contract, with whole blocks of LANES columns only; what is staged is whole.
        unsafe {
            if source.valid < S::LANES || ks.len() < LINE * W::ELEMENTS {
                let mut stage = [[0.0; 2 * LINE]; MAX_LANES];
                let size = W::FLOATS * size_of::<f32>() / W::ELEMENTS;
                let staged = source.staged(ks, size, &mut stage);
                transpose::<S, W>(s, &staged, 0, half, block);
            } else if self.way == Way::Rows {
                transpose::<S, W>(s, source, ks.start, half, block);
            } else {
                copy::<S, W>(s, source, ks.start, half, block);
            }
        }
    }
}

/// From rows.
///
/// # Safety
/// The source has LANES columns of [`LINE`] words from element k on; `block` holds [`LINE`] words of 2 × LANES columns.
#[inline(always)]
unsafe fn transpose<S: Simd, W: Word>(
    s: S,
    source: &Source,
    k: usize,
    half: usize,
    block: *mut f32,
) {
    for c in 0..S::LANES {
        for line in 0..W::FLOATS {
            s.prefetch(source.at(c, k).wrapping_add(AHEAD_BYTES + line * 64));
        }
    }
    for float in (0..LINE * W::FLOATS).step_by(S::LANES) {
        let mut v = [s.splat(0.0); MAX_LANES];
        for (c, v) in v.iter_mut().enumerate().take(S::LANES) {
            // SAFETY: the caller's contract.
            *v = unsafe { s.load(source.at(c, k).cast::<f32>().wrapping_add(float)) };
        }
        s.transpose(&mut v);
        for i in (0..S::LANES).step_by(W::FLOATS) {
            let words = W::join(s, v[i], v[i + W::FLOATS - 1]);
            // SAFETY: the caller's contract; LANES divides LINE.
            unsafe { W::put(s, words, block, (float + i) / W::FLOATS, half) };
        }
    }
}

/// From columns.
///
/// # Safety
/// As [`transpose`].
#[inline(always)]
unsafe fn copy<S: Simd, W: Word>(s: S, source: &Source, k: usize, half: usize, block: *mut f32) {
    for w in 0..LINE {
        let from = source.at(0, k + w * W::ELEMENTS);
        for e in 0..W::ELEMENTS {
            // The same columns of the next block.
            let next = LINE * W::ELEMENTS + e;
            s.prefetch(from.wrapping_add(next * source.k_stride));
        }
        // SAFETY: the caller's contract.
        unsafe {
            let words = W::gather(s, from, source.k_stride);
            W::put(s, words, block, w, half);
        }
    }
}
