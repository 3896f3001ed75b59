//! Cutting one device buffer into the pieces of a call: arithmetic on addresses, nothing is touched.

use super::DevicePtr;
use crate::error::{Error, Result};

/// Pieces begin at multiples of this, which is what the driver aligns allocations to and more than any load needs.
pub(crate) const ALIGN: usize = 256;

/// Adds up pieces; gives each its offset from the first aligned address of the buffer.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Layout {
    end: usize,
}

/// Where a piece lies in a workspace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Piece {
    offset: usize,
}

impl Layout {
    /// One more piece: the product of `factors` bytes.
    pub(crate) fn add(&mut self, factors: &[usize]) -> Result<Piece> {
        let overflow = Error::Overflow {
            what: "workspace bytes",
        };
        let bytes = factors.iter().try_fold(1usize, |n, &f| n.checked_mul(f));
        let padded = bytes.and_then(|b| b.checked_next_multiple_of(ALIGN));
        let end = padded.and_then(|b| self.end.checked_add(b));
        let piece = Piece { offset: self.end };
        self.end = end
            .filter(|&n| n <= isize::MAX as usize - ALIGN)
            .ok_or(overflow)?;
        Ok(piece)
    }

    /// Bytes of the whole, with what it takes to reach the first aligned address.
    pub(crate) fn total(&self) -> usize {
        self.end + ALIGN - 1
    }
}

impl Piece {
    /// Its address in a workspace that begins at `base`.
    pub(crate) fn at(self, base: DevicePtr) -> DevicePtr {
        let aligned = base.0.wrapping_add(ALIGN as u64 - 1) & !(ALIGN as u64 - 1);
        DevicePtr(aligned).add(self.offset as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_aligned_apart_and_inside() {
        let mut layout = Layout::default();
        let a = layout.add(&[3, 5]).unwrap();
        let b = layout.add(&[0, 8]).unwrap();
        let c = layout.add(&[257]).unwrap();
        for base in [DevicePtr(4096), DevicePtr(4097), DevicePtr(4351)] {
            let [a, b, c] = [a, b, c].map(|p| p.at(base).0);
            assert!(a % 256 == 0 && a >= base.0);
            assert_eq!((b - a, c - b), (256, 0));
            assert!(c + 257 <= base.0 + layout.total() as u64);
        }
        assert!(layout.add(&[usize::MAX, 2]).is_err());
        assert!(layout.add(&[usize::MAX]).is_err());
    }
}
