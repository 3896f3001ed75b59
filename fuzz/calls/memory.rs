//! Memory of exactly the size that the C interface is told, so that a sanitizer sees a step beyond it; with a copy, to see what was written.

use super::bytes::Bytes;
use moe_kernels::ffi::*;
use std::alloc::{Layout, alloc, dealloc};

pub struct Memory {
    base: *mut u8,
    layout: Layout,
    /// Bytes before the part that is told; 1 makes it misaligned.
    skip: usize,
    before: Vec<u8>,
    /// Whether a call may write it.
    output: bool,
}

impl Memory {
    fn new(d: &mut Bytes<'_>, bytes: usize, skip: usize, output: bool) -> Self {
        let layout = Layout::from_size_align(skip + bytes.max(1), 16).expect("a small layout");
        // SAFETY: at least one byte.
        let base = unsafe { alloc(layout) };
        assert!(!base.is_null());
        let mut state = d.u32() | 1;
        let fill = |_| {
            if output {
                return 0xa5;
            }
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            // Exponents near 1 in the upper bytes of both halves, so that most numbers are ordinary.
            (state >> 8) as u8
        };
        let mut before: Vec<u8> = (0..skip + bytes.max(1)).map(fill).collect();
        if !output {
            for (i, byte) in before[skip..].iter_mut().enumerate() {
                if i % 2 == 1 && *byte < 0xf0 {
                    *byte = (*byte & 0x80) | 0x3c;
                }
            }
        }
        // SAFETY: both have skip + bytes bytes.
        unsafe { base.copy_from_nonoverlapping(before.as_ptr(), before.len()) };
        Self {
            base,
            layout,
            skip,
            before,
            output,
        }
    }

    pub fn data(&self) -> *mut u8 {
        self.base.wrapping_add(self.skip)
    }

    fn now(&self) -> &[u8] {
        // SAFETY: allocated with so many bytes, all of them initialised.
        unsafe { std::slice::from_raw_parts(self.base, self.before.len()) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.base, self.layout) };
    }
}

/// All memory of one call, and the structs that point at it.
#[derive(Default)]
pub struct Memories {
    list: Vec<Memory>,
    // Boxed, since calls hold their addresses while more are added.
    #[allow(clippy::vec_box)]
    read: Vec<Box<moe_matrix>>,
    #[allow(clippy::vec_box)]
    written: Vec<Box<moe_matrix_mut>>,
}

const SIZES: [usize; 4] = [4, 4, 2, 2];

impl Memories {
    fn add(&mut self, d: &mut Bytes<'_>, bytes: usize, output: bool) -> *mut u8 {
        let skip = usize::from(d.rarely(64));
        self.list.push(Memory::new(d, bytes, skip, output));
        self.list[self.list.len() - 1].data()
    }

    /// A place in memory that an earlier argument has; overlaps are refused where one of them is written.
    fn reuse(&mut self, d: &mut Bytes<'_>, output: bool) -> Option<(*mut u8, usize)> {
        if self.list.is_empty() || !d.rarely(48) {
            return None;
        }
        let choice = d.below(self.list.len());
        let memory = &mut self.list[choice];
        // If the earlier argument came to nothing, this one may be written.
        memory.output |= output;
        Some((memory.data(), memory.before.len() - memory.skip))
    }

    /// `n` elements of `T`: the pointer and the length to tell. Null sometimes; too short sometimes, and then said so.
    pub fn slice<T>(&mut self, d: &mut Bytes<'_>, right: usize, output: bool) -> (*mut T, usize) {
        if d.rarely(48) {
            return (std::ptr::null_mut(), d.size(right));
        }
        if let Some((data, bytes)) = self.reuse(d, output) {
            return (data.cast(), bytes / size_of::<T>());
        }
        let n = d.size(right).min(1 << 16);
        (self.add(d, n * size_of::<T>(), output).cast(), n)
    }

    /// Elements to read.
    pub fn read<T>(&mut self, d: &mut Bytes<'_>, right: usize) -> (*const T, usize) {
        let (data, n) = self.slice(d, right, false);
        (data, n)
    }

    /// Elements to read, once in `n` times; else none.
    pub fn maybe<T>(&mut self, d: &mut Bytes<'_>, n: u8, right: usize) -> (*const T, usize) {
        match d.rarely(n) {
            true => self.read(d, right),
            false => (std::ptr::null(), 0),
        }
    }

    /// Elements to read, with given content.
    pub fn filled<T: Copy>(&mut self, d: &mut Bytes<'_>, values: &[T]) -> (*const T, usize) {
        let (data, n) = self.slice::<T>(d, values.len(), false);
        if let Some(last) = self.list.last_mut()
            && last.data().cast::<T>() == data
        {
            let bytes = size_of_val(&values[..n.min(values.len())]);
            // SAFETY: `slice` has just made n elements there, and `values` has as many.
            unsafe {
                last.data()
                    .copy_from_nonoverlapping(values.as_ptr().cast(), bytes)
            };
            last.before = last.now().to_vec();
        }
        (data, n)
    }

    /// A matrix to read, of about these sizes; null sometimes, and where it may be, often.
    pub fn matrix(
        &mut self,
        d: &mut Bytes<'_>,
        rows: usize,
        cols: usize,
        optional: u8,
    ) -> *const moe_matrix {
        if optional > 0 && !d.rarely(optional) || d.rarely(64) {
            return std::ptr::null();
        }
        let m = self.describe(d, rows, cols, false);
        self.read.push(Box::new(m));
        &raw const **self.read.last().expect("just pushed")
    }

    /// A matrix to write.
    pub fn output(&mut self, d: &mut Bytes<'_>, rows: usize, cols: usize) -> *const moe_matrix_mut {
        if d.rarely(64) {
            return std::ptr::null();
        }
        let m = self.describe(d, rows, cols, true);
        self.written.push(Box::new(moe_matrix_mut {
            data: m.data.cast_mut(),
            bytes: m.bytes,
            rows: m.rows,
            cols: m.cols,
            row_stride: m.row_stride,
            dtype: m.dtype,
            reserved: m.reserved,
        }));
        &raw const **self.written.last().expect("just pushed")
    }

    fn describe(
        &mut self,
        d: &mut Bytes<'_>,
        rows: usize,
        cols: usize,
        output: bool,
    ) -> moe_matrix {
        let (rows, cols) = (d.size(rows), d.size(cols));
        let dtype = d.constant(3).wrapping_add(1);
        let size = SIZES[dtype.min(3) as usize];
        let (row_stride, col_stride) = strides(d, rows, cols, output);
        // What it takes, as far as it can be said and made.
        let extent = (|| {
            let last_row = rows
                .checked_sub(1)?
                .checked_mul(usize::try_from(row_stride).ok()?)?;
            let last_col = cols
                .checked_sub(1)?
                .checked_mul(usize::try_from(col_stride).ok()?)?;
            let bytes = last_row
                .checked_add(last_col)?
                .checked_add(1)?
                .checked_mul(size)?;
            (bytes <= 1 << 18).then_some(bytes)
        })();
        let (data, bytes) = match self.reuse(d, output) {
            Some(place) => place,
            None => {
                let bytes = d.size(extent.unwrap_or(64)).min(1 << 18);
                (self.add(d, bytes, output), bytes)
            }
        };
        let null = d.rarely(64);
        moe_matrix {
            data: if null { std::ptr::null() } else { data.cast() },
            bytes,
            rows,
            cols,
            row_stride,
            col_stride,
            dtype,
            reserved: u32::from(d.rarely(128)),
        }
    }

    /// After a call: one that was refused has written nothing, no call has written what it should read or what lies beside.
    pub fn check(&self, status: moe_status, what: &str) {
        assert_ne!(status, MOE_ERROR_INTERNAL, "{what}");
        for memory in &self.list {
            if !memory.output || status != MOE_OK {
                assert!(
                    memory.now() == memory.before,
                    "{what}: status {status}, but memory was written"
                );
            }
        }
        if status != MOE_OK {
            return;
        }
        for m in &self.written {
            self.check_gaps(m, what);
        }
    }

    /// Between rows nothing was written.
    fn check_gaps(&self, m: &moe_matrix_mut, what: &str) {
        let Some(memory) = self
            .list
            .iter()
            .find(|memory| memory.data().cast() == m.data)
        else {
            return; // no elements
        };
        let size = SIZES[m.dtype.min(3) as usize];
        // A single row's stride, and the columns of no rows, may be anything.
        let stride = m.row_stride.unsigned_abs().saturating_mul(size);
        let width = m.cols.saturating_mul(size);
        for (i, byte) in memory.now()[memory.skip..].iter().enumerate() {
            let inside = match m.rows {
                0 => false,
                1 => i < width,
                rows => i / stride.max(1) < rows && i % stride.max(1) < width,
            };
            let before = memory.before[memory.skip + i];
            assert!(
                inside || *byte == before,
                "{what}: byte {i} beside the matrix was written"
            );
        }
    }
}

/// Row-major, with gaps, transposed (to read), repeated (to read), negative or huge.
fn strides(d: &mut Bytes<'_>, rows: usize, cols: usize, output: bool) -> (isize, isize) {
    let cols_signed = cols.min(1 << 20) as isize;
    let rows_signed = rows.min(1 << 20) as isize;
    match d.u8() {
        0..=159 => (cols_signed, 1),
        160..=199 => (cols_signed + d.below(5) as isize, 1),
        200..=219 if !output => (1, rows_signed),
        220..=229 if !output => (0, 1),
        230..=234 if !output => (0, 0),
        235..=239 => (-cols_signed, 1),
        240..=244 => (cols_signed, -1),
        245..=249 => (d.below(9) as isize, d.below(9) as isize),
        250.. => (
            d.pick(&[isize::MAX, isize::MIN, 1 << 61, 1 << 40, -1]),
            d.pick(&[1, isize::MAX, isize::MIN]),
        ),
        _ => (cols_signed, 1),
    }
}
