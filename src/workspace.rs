//! Cutting one caller-owned byte buffer into the typed pieces of a call.

use crate::element::DType;
use crate::error::{Error, Result};
use crate::matrix::{AnyMatMut, MatMut};
use bytemuck::cast_slice_mut;

/// Pieces begin at cache lines, so that threads that write neighbouring pieces do not share one.
const ALIGN: usize = 64;

/// Adds up the pieces of a workspace; the same sequence of sizes is then taken from an [`Arena`].
#[derive(Default)]
pub(crate) struct Sizes {
    /// `None` after an overflow.
    total: Option<usize>,
}

impl Sizes {
    pub(crate) fn new() -> Self {
        // The slack to reach the first cache line.
        Self {
            total: Some(ALIGN - 1),
        }
    }

    /// One more piece: the product of `factors` bytes.
    pub(crate) fn add(&mut self, factors: &[usize]) {
        self.total = self.total.and_then(|total| {
            let bytes = factors.iter().try_fold(1usize, |n, &f| n.checked_mul(f))?;
            total.checked_add(bytes.checked_next_multiple_of(ALIGN)?)
        });
    }

    pub(crate) fn total(self) -> Result<usize> {
        self.total
            .filter(|&n| n <= isize::MAX as usize)
            .ok_or(Error::Overflow {
                what: "workspace bytes",
            })
    }
}

/// What is left of a workspace.
pub(crate) struct Arena<'a> {
    rest: &'a mut [u8],
}

impl<'a> Arena<'a> {
    /// # Errors
    /// [`Error::BufferTooSmall`] when the workspace has fewer than `needed` bytes.
    pub(crate) fn new(workspace: &'a mut [u8], needed: usize) -> Result<Self> {
        if workspace.len() < needed {
            return Err(Error::BufferTooSmall {
                argument: "workspace",
                needed,
                found: workspace.len(),
            });
        }
        let skip = workspace.as_ptr().align_offset(ALIGN).min(workspace.len());
        Ok(Self {
            rest: &mut workspace[skip..],
        })
    }

    /// The next piece; the sizes were added up beforehand, so it is there.
    pub(crate) fn take(&mut self, factors: &[usize]) -> &'a mut [u8] {
        let bytes: usize = factors.iter().product();
        let rest = core::mem::take(&mut self.rest);
        let (piece, rest) = rest.split_at_mut(bytes.next_multiple_of(ALIGN));
        self.rest = rest;
        &mut piece[..bytes]
    }

    /// Everything that is left.
    pub(crate) fn rest(self) -> &'a mut [u8] {
        self.rest
    }
}

/// A piece as a matrix of `dtype`. Pieces are aligned and as long as the matrix, so neither cast nor view can fail.
pub(crate) fn any_mat_mut(
    bytes: &mut [u8],
    dtype: DType,
    rows: usize,
    cols: usize,
) -> Result<AnyMatMut<'_>> {
    Ok(match dtype {
        DType::F32 => MatMut::<f32>::new(cast_slice_mut(bytes), rows, cols)?.into(),
        DType::F16 => MatMut::<half::f16>::new(cast_slice_mut(bytes), rows, cols)?.into(),
        DType::BF16 => MatMut::<half::bf16>::new(cast_slice_mut(bytes), rows, cols)?.into(),
    })
}
