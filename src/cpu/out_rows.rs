//! An output matrix of any format that several threads write, each its own part.
#![allow(unsafe_code)] // the shim for disjoint parallel writes

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
}
