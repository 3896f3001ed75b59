//! The rows of A: gathered, widened and packed into lines for the tiles.
//!
//! ```text
//! tile of m rows:   [ row 0: k 0 … 15 ][ row 1: k 0 … 15 ] … [ row m−1 ]   [ row 0: k 16 … 31 ] …
//! ```
//!
//! A line holds sixteen 32-bit words: f32, or pairs of bf16 as they lie in memory. So packing is a copy, a line at a time, with the widening on the
//! way; a transposition, which a `[k][row]` layout would want, took as long as a tenth of the product.

use super::panel::LINE;
use crate::cpu::out_rows::OutRows;
use crate::cpu::simd::Simd;
use crate::element::DType;
use crate::matrix::AnyMatRef;
use core::marker::PhantomData;
use core::ops::Range;
use half::{bf16, f16};

/// How the rows of A are read. Raw, since the rows of a second product are written by other threads during the first.
#[derive(Clone, Copy)]
pub(crate) struct RowSource<'a> {
    data: *const u8,
    dtype: DType,
    cols: usize,
    /// In elements.
    row_stride: usize,
    col_stride: usize,
    /// Row r of A is row `gather[r] / slots` of x; row r itself without it.
    pub(crate) gather: Option<(&'a [u32], usize)>,
    /// Row r is multiplied by `scale[gather[r]]` and rounded to x's format (experts whose weight acts on the input).
    pub(crate) scale: Option<&'a [f32]>,
    /// bf16 subnormals of x read as zeros.
    flush: bool,
    borrow: PhantomData<&'a [u8]>,
}

// SAFETY: memory that is only read here; who writes it meanwhile is up to the contract of `pack_rows`.
unsafe impl Send for RowSource<'_> {}
// SAFETY: as above.
unsafe impl Sync for RowSource<'_> {}

impl<'a> RowSource<'a> {
    /// Rows of the caller's matrix.
    pub(crate) fn new(x: AnyMatRef<'a>) -> Self {
        let (data, row_stride, col_stride) = x.as_raw();
        Self {
            data,
            dtype: x.dtype(),
            cols: x.cols(),
            row_stride,
            col_stride,
            gather: None,
            scale: None,
            flush: false,
            borrow: PhantomData,
        }
    }

    /// Rows that an earlier product writes, of `cols` columns.
    pub(crate) fn written(rows: OutRows, cols: usize) -> Self {
        let (data, dtype, row_stride) = rows.as_raw();
        Self {
            data,
            dtype,
            cols,
            row_stride,
            col_stride: 1,
            gather: None,
            scale: None,
            flush: false,
            borrow: PhantomData,
        }
    }

    /// The same rows, bf16 subnormals read as zeros if `flush`: where the weights are bf16.
    pub(crate) fn flushed(self, flush: bool) -> Self {
        Self { flush, ..self }
    }

    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    /// The row of x and the pair that row `r` of A stands for.
    fn locate(&self, r: usize) -> (usize, usize) {
        match self.gather {
            Some((pairs, slots)) => (pairs[r] as usize / slots, pairs[r] as usize),
            None => (r, r),
        }
    }

    /// Element (row, k) in f32, scaled and rounded; for the cases that are not worth vectors.
    ///
    /// # Safety
    /// As [`pack_rows`]; the element is inside the matrix.
    unsafe fn element(&self, row: usize, pair: usize, k: usize) -> f32 {
        let at = row * self.row_stride + k * self.col_stride;
        // SAFETY: the caller's contract.
        let mut v = unsafe {
            match self.dtype {
                DType::F32 => *self.data.cast::<f32>().add(at),
                DType::F16 => (*self.data.cast::<f16>().add(at)).to_f32(),
                DType::BF16 => (*self.data.cast::<bf16>().add(at)).to_f32(),
            }
        };
        if let Some(scale) = self.scale {
            v *= scale[pair];
            v = match self.dtype {
                DType::F32 => v,
                DType::F16 => f16::from_f32(v).to_f32(),
                DType::BF16 => bf16::from_f32(v).to_f32(),
            };
        }
        // A bf16 is subnormal exactly when its f32 is: they share the exponent.
        if self.flush && self.dtype == DType::BF16 && !v.is_normal() && v.is_finite() {
            v = 0.0f32.copysign(v);
        }
        v
    }
}

/// Bits of floats, those of subnormal ones replaced by their sign.
#[inline(always)]
fn flush<S: Simd>(s: S, bits: S::I) -> S::I {
    let exponent = s.and_i(bits, s.splat_i(0x7f80_0000));
    let sign = s.and_i(bits, s.splat_i(i32::MIN));
    s.select_i(s.gt_i(exponent, s.splat_i(0)), bits, sign)
}

/// [`crate::element::flush_bf16`] of both halves of each word: where the exponent is zero, only the sign stays.
#[inline(always)]
pub(super) fn flush_pairs<S: Simd>(s: S, words: S::I) -> S::I {
    let has_exponent = |bits| s.gt_i(s.and_i(words, s.splat_i(bits)), s.splat_i(0));
    let kept = |bits, all: i32| s.select_i(has_exponent(bits), s.splat_i(all), s.splat_i(0));
    let odd = kept(0x7f80_0000, 0x7fff_0000);
    let even = kept(0x7f80, 0x7fff);
    let signs = s.splat_i(0x8000_8000_u32 as i32);
    s.and_i(words, s.or_i(signs, s.or_i(odd, even)))
}

/// How a line is read from neighbouring elements.
trait LineFormat {
    /// Bytes of the elements of one word.
    const WORD_BYTES: usize;

    /// LANES words from `p` on.
    ///
    /// # Safety
    /// `p` is valid for reading them.
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::F;
}

struct LineF32;
struct LineF16;
/// `FLUSH`: subnormals read as zeros.
struct LineBf16<const FLUSH: bool>;
/// Pairs of bf16 as they lie in memory, subnormals read as zeros where the instruction that takes them does not read them so.
struct LinePairs;

impl LineFormat for LineF32 {
    const WORD_BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::F {
        // SAFETY: the caller's contract.
        unsafe { s.load(p.cast()) }
    }
}

impl LineFormat for LineF16 {
    const WORD_BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::F {
        // SAFETY: the caller's contract.
        unsafe { s.load_f16(p.cast()) }
    }
}

impl<const FLUSH: bool> LineFormat for LineBf16<FLUSH> {
    const WORD_BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::F {
        // SAFETY: the caller's contract.
        let bits = s.shl::<16>(unsafe { s.load_u16(p.cast()) });
        s.from_bits(if FLUSH { flush(s, bits) } else { bits })
    }
}

impl LineFormat for LinePairs {
    const WORD_BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::F {
        // SAFETY: the caller's contract.
        let words = unsafe { s.load_i(p.cast()) };
        s.from_bits(if const { S::BF16_DOT_FLUSHES } {
            words
        } else {
            flush_pairs(s, words)
        })
    }
}

/// Packs rows `rows` of A, the lines `lines` of each (LINE words each; `PAIRS`: of two bf16), as `[line][row][LINE]`. Words past K are zeros.
///
/// # Safety
/// Rows and columns are inside the matrix (checked at the door), and nobody writes them during the call.
#[inline(always)]
pub(super) unsafe fn pack_rows<S: Simd, const PAIRS: bool>(
    s: S,
    source: &RowSource<'_>,
    rows: Range<usize>,
    lines: Range<usize>,
    out: &mut [f32],
) {
    let (out, _) = out.as_chunks_mut::<LINE>();
    assert!(out.len() >= rows.len() * lines.len());
    // SAFETY: the caller's contract.
    unsafe {
        if source.scale.is_some() || (source.col_stride != 1 && source.cols > 1) {
            return pack_by_element::<PAIRS>(source, rows, lines, out);
        }
        match source.dtype {
            _ if PAIRS => pack_lines::<S, LinePairs, true>(s, source, rows, lines, out),
            DType::F32 => pack_lines::<S, LineF32, false>(s, source, rows, lines, out),
            DType::F16 => pack_lines::<S, LineF16, false>(s, source, rows, lines, out),
            DType::BF16 if source.flush => {
                pack_lines::<S, LineBf16<true>, false>(s, source, rows, lines, out);
            }
            DType::BF16 => pack_lines::<S, LineBf16<false>, false>(s, source, rows, lines, out),
        }
    }
}

/// The usual case: rows of neighbouring elements. While a row is copied, the next one, which may be anywhere, is fetched.
///
/// # Safety
/// As [`pack_rows`].
#[inline(always)]
unsafe fn pack_lines<S: Simd, Format: LineFormat, const PAIRS: bool>(
    s: S,
    source: &RowSource<'_>,
    rows: Range<usize>,
    lines: Range<usize>,
    out: &mut [[f32; LINE]],
) {
    let m = rows.len();
    let line_bytes = LINE * Format::WORD_BYTES;
    let element_bytes = source.dtype.size();
    let whole = lines.end.min(source.cols * element_bytes / line_bytes);
    let start = |r: usize| {
        let (row, _) = source.locate(r);
        source
            .data
            .wrapping_add(row * source.row_stride * element_bytes + lines.start * line_bytes)
    };
    for (i, r) in rows.clone().enumerate() {
        let mut from = start(r);
        let mut ahead = start(if r + 1 < rows.end { r + 1 } else { r });
        for line in out[i..]
            .iter_mut()
            .step_by(m)
            .take(whole.saturating_sub(lines.start))
        {
            s.prefetch(ahead);
            for w in (0..LINE).step_by(S::LANES) {
                // SAFETY: the caller's contract: the line is inside the row.
                let v = unsafe { Format::load(s, from.wrapping_add(w * Format::WORD_BYTES)) };
                s.store_slice(&mut line[w..], v);
            }
            from = from.wrapping_add(line_bytes);
            ahead = ahead.wrapping_add(line_bytes);
        }
        if whole < lines.end {
            let (row, pair) = source.locate(r);
            let out = &mut out[(lines.len() - 1) * m + i];
            // SAFETY: the caller's contract.
            unsafe { line_by_element::<PAIRS>(source, row, pair, lines.end - 1, out) };
        }
    }
}

/// Strided columns and scaled rows.
///
/// # Safety
/// As [`pack_rows`].
#[inline(never)]
unsafe fn pack_by_element<const PAIRS: bool>(
    source: &RowSource<'_>,
    rows: Range<usize>,
    lines: Range<usize>,
    out: &mut [[f32; LINE]],
) {
    let m = rows.len();
    for (i, r) in rows.enumerate() {
        let (row, pair) = source.locate(r);
        for (line, out) in lines.clone().zip(out[i..].iter_mut().step_by(m)) {
            // SAFETY: the caller's contract.
            unsafe { line_by_element::<PAIRS>(source, row, pair, line, out) };
        }
    }
}

/// Line `line` of a row by elements; zeros past its end.
///
/// # Safety
/// As [`pack_rows`].
#[inline(never)]
unsafe fn line_by_element<const PAIRS: bool>(
    source: &RowSource<'_>,
    row: usize,
    pair: usize,
    line: usize,
    out: &mut [f32; LINE],
) {
    let k = line * if PAIRS { 2 * LINE } else { LINE };
    let element = |k: usize| {
        if k < source.cols {
            // SAFETY: the caller's contract, and the line above.
            unsafe { source.element(row, pair, k) }
        } else {
            0.0
        }
    };
    for (i, word) in out.iter_mut().enumerate() {
        *word = if PAIRS {
            // Exact: the elements are bf16 already.
            let [even, odd] = [0, 1].map(|j| element(k + 2 * i + j).to_bits());
            f32::from_bits(odd & 0xffff_0000 | even >> 16)
        } else {
            element(k + i)
        };
    }
}
