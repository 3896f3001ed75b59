//! An output matrix of any format that several threads write, each its own part.
#![allow(unsafe_code)] // the shim for disjoint parallel writes

use crate::cpu::simd::Simd;
use crate::element::DType;
use crate::matrix::AnyMatMut;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// The output as raw rows: element pointer and row stride.
#[derive(Clone, Copy)]
pub(crate) enum OutRows {
    F32(*mut f32, usize),
    F16(*mut f16, usize),
    BF16(*mut bf16, usize),
}

// SAFETY: a pointer with its row stride; `OutRows::write`'s contract keeps threads apart.
unsafe impl Send for OutRows {}
// SAFETY: as above.
unsafe impl Sync for OutRows {}

impl OutRows {
    pub(crate) fn new(out: &mut AnyMatMut<'_>) -> Self {
        match out {
            AnyMatMut::F32(m) => {
                let (p, stride) = m.as_raw();
                Self::F32(p, stride)
            }
            AnyMatMut::F16(m) => {
                let (p, stride) = m.as_raw();
                Self::F16(p, stride)
            }
            AnyMatMut::BF16(m) => {
                let (p, stride) = m.as_raw();
                Self::BF16(p, stride)
            }
        }
    }

    /// First element, format and row stride, to read by what was written.
    pub(crate) fn as_raw(self) -> (*const u8, DType, usize) {
        match self {
            Self::F32(p, stride) => (p.cast_const().cast(), DType::F32, stride),
            Self::F16(p, stride) => (p.cast_const().cast(), DType::F16, stride),
            Self::BF16(p, stride) => (p.cast_const().cast(), DType::BF16, stride),
        }
    }

    /// Whether rows are f32 and begin at cache lines.
    pub(crate) fn can_stream(self) -> bool {
        matches!(self, Self::F32(p, stride) if p.addr().is_multiple_of(64) && (stride * 4).is_multiple_of(64))
    }

    /// Writes a block of rows, 2 × LANES floats each of which the first `n` count, at column `col` from row `first` on; rounded to nearest, ties to even.
    ///
    /// With `stream` they go past the caches, which saves reading the lines first: for outputs that no cache holds until they are read.
    ///
    /// # Safety
    /// As [`OutRows::write`] for these columns of these rows. `stream` only where [`OutRows::can_stream`], at a `col` that is a multiple of LANES,
    /// and with [`Simd::fence_streams`] before another thread is told.
    #[inline(always)]
    pub(crate) unsafe fn write_block<S: Simd>(
        self,
        s: S,
        first: usize,
        col: usize,
        n: usize,
        block: &[f32],
        stream: bool,
    ) {
        let rows = block.chunks_exact(2 * S::LANES).enumerate();
        if !n.is_multiple_of(S::LANES) {
            for (i, row) in rows {
                // SAFETY: the caller's contract.
                unsafe { self.write(first + i, col, &row[..n]) };
            }
            return;
        }
        let two = n > S::LANES;
        // A macro and not a closure, which would lose the instruction set where it is not inlined.
        macro_rules! each_row {
            ($p:ident, $stride:ident, $to:ident, $v:ident => $store:expr) => {
                for (i, row) in rows {
                    let $to = $p.wrapping_add((first + i) * $stride + col);
                    let $v = s.load_slice(row);
                    $store;
                    if two {
                        let $to = $to.wrapping_add(S::LANES);
                        let $v = s.load_slice(&row[S::LANES..]);
                        $store;
                    }
                }
            };
        }
        // SAFETY: the caller's contract: whole vectors of columns are inside.
        unsafe {
            match self {
                Self::F32(p, stride) if stream => {
                    each_row!(p, stride, to, v => s.stream(to, v))
                }
                Self::F32(p, stride) => each_row!(p, stride, to, v => s.store(to, v)),
                Self::F16(p, stride) => each_row!(p, stride, to, v => s.store_f16(to.cast(), v)),
                Self::BF16(p, stride) => {
                    each_row!(p, stride, to, v => s.store_u16(to.cast(), s.to_bf16(v)));
                }
            }
        }
    }

    /// Writes columns `col .. col + values.len()` of a row, rounded to nearest, ties to even.
    ///
    /// # Safety
    /// They lie inside the matrix, which stays mutably borrowed for as long as this is used, and no other thread touches them.
    #[inline(always)]
    pub(crate) unsafe fn write(self, row: usize, col: usize, values: &[f32]) {
        let n = values.len();
        match self {
            Self::F32(p, stride) => {
                // SAFETY: the caller's contract.
                let out = unsafe { core::slice::from_raw_parts_mut(p.add(row * stride + col), n) };
                out.copy_from_slice(values);
            }
            Self::F16(p, stride) => {
                // SAFETY: the caller's contract.
                let out = unsafe { core::slice::from_raw_parts_mut(p.add(row * stride + col), n) };
                out.convert_from_f32_slice(values);
            }
            Self::BF16(p, stride) => {
                // SAFETY: the caller's contract.
                let out = unsafe { core::slice::from_raw_parts_mut(p.add(row * stride + col), n) };
                out.convert_from_f32_slice(values);
            }
        }
    }

    /// Whether rows begin at cache lines, in any format.
    pub(crate) fn begins_lines(self) -> bool {
        let (p, dtype, stride) = self.as_raw();
        p.addr().is_multiple_of(64) && (stride * dtype.size()).is_multiple_of(64)
    }

    /// Writes whole vectors that are still in registers: columns from `col` on of a row; rounded as by [`OutRows::write_block`].
    ///
    /// With `stream` they go past the caches, bf16 too; f16 does not.
    ///
    /// # Safety
    /// As [`OutRows::write`] for these columns. `stream` only where [`OutRows::begins_lines`], at a `col` that is a multiple of LANES, and with
    /// [`Simd::fence_streams`] before another thread is told.
    #[inline(always)]
    pub(crate) unsafe fn write_vectors<S: Simd>(
        self,
        s: S,
        row: usize,
        col: usize,
        values: &[S::F],
        stream: bool,
    ) {
        // A macro and not a closure, as above.
        macro_rules! each_vector {
            ($p:ident, $stride:ident, $to:ident, $v:ident => $store:expr) => {
                for (i, &$v) in values.iter().enumerate() {
                    let $to = $p.wrapping_add(row * $stride + col + i * S::LANES);
                    $store;
                }
            };
        }
        // SAFETY: the caller's contract: whole vectors of columns are inside.
        unsafe {
            match self {
                Self::F32(p, stride) if stream => each_vector!(p, stride, to, v => s.stream(to, v)),
                Self::F32(p, stride) => each_vector!(p, stride, to, v => s.store(to, v)),
                Self::F16(p, stride) => {
                    each_vector!(p, stride, to, v => s.store_f16(to.cast(), v));
                }
                Self::BF16(p, stride) if stream => {
                    each_vector!(p, stride, to, v => s.stream_u16(to.cast(), s.to_bf16(v)));
                }
                Self::BF16(p, stride) => {
                    each_vector!(p, stride, to, v => s.store_u16(to.cast(), s.to_bf16(v)));
                }
            }
        }
    }
}
