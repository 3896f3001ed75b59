//! An output matrix of any format that several threads write, each its own part.
#![allow(unsafe_code)] // the shim for disjoint parallel writes

use super::simd::Simd;
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

    /// Whether rows may be written with [`Simd::stream`]: f32, each row aligned to a vector of `lanes`.
    pub(crate) fn can_stream(self, lanes: usize) -> bool {
        match self {
            Self::F32(p, stride) => {
                p.addr().is_multiple_of(lanes * size_of::<f32>()) && stride.is_multiple_of(lanes)
            }
            Self::F16(..) | Self::BF16(..) => false,
        }
    }

    /// [`OutRows::write`] of whole vectors; past the caches if `stream`.
    ///
    /// # Safety
    /// As there; `stream` only where [`OutRows::can_stream`] and `col` is a multiple of the lanes.
    #[inline(always)]
    pub(crate) unsafe fn write_vectors<S: Simd>(
        self,
        s: S,
        row: usize,
        col: usize,
        values: &[S::F],
        stream: bool,
    ) {
        match self {
            Self::F32(p, stride) => {
                for (i, &v) in values.iter().enumerate() {
                    // SAFETY: the caller's contract.
                    unsafe {
                        let p = p.add(row * stride + col + i * S::LANES);
                        if stream {
                            s.stream(p, v);
                        } else {
                            s.store(p, v);
                        }
                    }
                }
            }
            Self::BF16(p, stride) => {
                for (i, &v) in values.iter().enumerate() {
                    let bits = round_to_bf16(s, v);
                    // SAFETY: the caller's contract; a bf16 is a u16.
                    unsafe {
                        let p = p.add(row * stride + col + i * S::LANES);
                        s.store_low_halves(p.cast(), bits);
                    }
                }
            }
            Self::F16(..) => {
                let mut lanes = [0.0; super::simd::MAX_LANES];
                for (i, &v) in values.iter().enumerate() {
                    s.store_slice(&mut lanes, v);
                    // SAFETY: the caller's contract.
                    unsafe { self.write(row, col + i * S::LANES, &lanes[..S::LANES]) };
                }
            }
        }
    }
}

/// The bits of the nearest bf16, ties to even, in the low half of each lane. NaN stays NaN: it is made quiet, so that no carry reaches its exponent.
#[inline(always)]
fn round_to_bf16<S: Simd>(s: S, v: S::F) -> S::I {
    let bits = s.to_bits(v);
    let odd = s.and_i(s.shr::<16>(bits), s.splat_i(1));
    let rounded = s.add_i(s.add_i(bits, s.splat_i(0x7fff)), odd);
    let quiet = s.or_i(bits, s.splat_i(0x0040_0000));
    s.shr::<16>(s.select_i(s.eq(v, v), rounded, quiet))
}
