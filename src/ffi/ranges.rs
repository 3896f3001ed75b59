//! The memory of one call as ranges of addresses, and the proof that nothing written overlaps anything else.

use super::status::*;

/// A range of bytes that a call uses.
#[derive(Clone, Copy)]
struct Range {
    argument: &'static str,
    start: usize,
    end: usize,
    written: bool,
}

/// Up to N ranges.
pub(super) struct Ranges<const N: usize> {
    list: [Range; N],
    len: usize,
}

impl<const N: usize> Ranges<N> {
    pub(super) fn new() -> Self {
        let none = Range {
            argument: "",
            start: 0,
            end: 0,
            written: false,
        };
        Self {
            list: [none; N],
            len: 0,
        }
    }

    /// One more range, whose end was found to fit. Nothing where there are no bytes.
    pub(super) fn add(
        &mut self,
        argument: &'static str,
        start: usize,
        bytes: usize,
        written: bool,
    ) -> Checked {
        if bytes == 0 {
            return Ok(());
        }
        let Some(place) = self.list.get_mut(self.len) else {
            return Err(Fault::new(
                MOE_ERROR_INTERNAL,
                "too many ranges in one call",
            ));
        };
        *place = Range {
            argument,
            start,
            end: start + bytes,
            written,
        };
        self.len += 1;
        Ok(())
    }

    /// [`MOE_ERROR_OVERLAP`] when a range that is written overlaps another.
    pub(super) fn check(&self) -> Checked {
        let list = &self.list[..self.len];
        for (i, a) in list.iter().enumerate() {
            for b in &list[i + 1..] {
                if (a.written || b.written) && a.start < b.end && b.start < a.end {
                    return Err(Fault::new(
                        MOE_ERROR_OVERLAP,
                        format_args!(
                            "{}: overlaps {}, and one of them is written",
                            a.argument, b.argument
                        ),
                    ));
                }
            }
        }
        Ok(())
    }
}
