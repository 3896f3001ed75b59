//! Memory for packed matrices, in huge pages where the system offers them.
//!
//! A product reads its weights once, as one stream of hundreds of megabytes. In pages of 4 KiB the walks through the page tables and the prefetchers, which
//! stop at the end of a page, take up to a fifth of the bandwidth (one Zen 4 core reads 25 GB/s so, and 29 to 31 from pages of 2 MiB; a Zen 5 core showed no difference),
//! and each of the pages costs a fault while it is packed.
//!
//! A page of 2 MiB must lie inside one allocation, and a matrix is often smaller than a few of them. So matrices lie in slabs, one after another.

use super::packing::CacheLine;
use core::mem::MaybeUninit;
use core::ops::Range;

/// Bytes of a slab once the set has grown to that. What is not used of it has never been touched, so it is address space and not memory; Linux only
/// counts what is touched, so only there are slabs larger than their matrix.
const SLAB: usize = if cfg!(target_os = "linux") {
    64 << 20
} else {
    0
};

/// Packed matrices of one size.
pub(crate) struct Storage {
    /// Cache lines of a matrix.
    lines: usize,
    slabs: Vec<Slab>,
}

struct Slab {
    memory: Box<[MaybeUninit<CacheLine>]>,
    /// Matrices in it, from its beginning on: these lines are written.
    matrices: usize,
    /// Matrices in the slabs before it.
    before: usize,
}

impl Storage {
    /// No matrices; each will have `bytes` bytes, a whole number of cache lines, at least one.
    pub(crate) fn new(bytes: usize) -> Self {
        Self {
            lines: bytes.div_ceil(size_of::<CacheLine>()).max(1),
            slabs: Vec::new(),
        }
    }

    /// Number of matrices.
    pub(crate) fn len(&self) -> usize {
        self.slabs.last().map_or(0, |s| s.before + s.matrices)
    }

    /// Bytes of a matrix.
    pub(crate) fn matrix_bytes(&self) -> usize {
        self.lines * size_of::<CacheLine>()
    }

    /// One more matrix, which `write` fills.
    ///
    /// # Safety
    /// `write` writes every byte.
    pub(crate) unsafe fn push(&mut self, write: impl FnOnce(&mut [MaybeUninit<CacheLine>])) {
        let full = |s: &Slab| (s.matrices + 1) * self.lines > s.memory.len();
        if self.slabs.last().is_none_or(full) {
            self.grow();
        }
        let lines = self.lines;
        if let Some(slab) = self.slabs.last_mut() {
            write(&mut slab.memory[slab.matrices * lines..][..lines]);
            slab.matrices += 1;
        }
    }

    /// One more slab: twice the set, but no more than [`SLAB`] beyond one matrix.
    fn grow(&mut self) {
        let bytes = (self.len() * self.matrix_bytes()).min(SLAB);
        let matrices = (bytes / self.matrix_bytes()).max(1);
        self.slabs
            .push(Slab::new(matrices * self.lines, self.len()));
    }

    /// The slab of matrix `index`, and its lines there: among the first `matrices · lines`, which are written.
    fn locate(&self, index: usize) -> (usize, Range<usize>) {
        let slab = self
            .slabs
            .partition_point(|s| s.before + s.matrices <= index);
        let first = (index - self.slabs[slab].before) * self.lines;
        (slab, first..first + self.lines)
    }

    /// Matrix `index`.
    ///
    /// # Panics
    /// When there are not so many.
    pub(crate) fn get(&self, index: usize) -> &[CacheLine] {
        let (slab, lines) = self.locate(index);
        let lines = &self.slabs[slab].memory[lines];
        // SAFETY: `push` counts a matrix after its lines have been written, and `locate` finds those that are counted.
        unsafe { &*(lines as *const [MaybeUninit<CacheLine>] as *const [CacheLine]) }
    }

    /// Matrix `index`, to be written over.
    ///
    /// # Panics
    /// When there are not so many.
    pub(crate) fn get_mut(&mut self, index: usize) -> &mut [CacheLine] {
        let (slab, lines) = self.locate(index);
        let lines = &mut self.slabs[slab].memory[lines];
        // SAFETY: as in `get`; the type lets nobody put uninitialised bytes there.
        unsafe { &mut *(lines as *mut [MaybeUninit<CacheLine>] as *mut [CacheLine]) }
    }
}

impl Slab {
    fn new(lines: usize, before: usize) -> Self {
        let mut memory = Box::new_uninit_slice(lines);
        advise_huge_pages(&mut memory);
        Self {
            memory,
            matrices: 0,
            before,
        }
    }
}

/// A copy in memory of its own, without the unused ends of slabs.
impl Clone for Storage {
    fn clone(&self) -> Self {
        let slabs = self.slabs.iter().map(|slab| {
            let written = slab.matrices * self.lines;
            let mut copy = Slab::new(written, slab.before);
            copy.memory.copy_from_slice(&slab.memory[..written]);
            copy.matrices = slab.matrices;
            copy
        });
        Self {
            lines: self.lines,
            slabs: slabs.collect(),
        }
    }
}

/// Asks for pages of 2 MiB under `memory`, wherever one fits inside it. Advice: nothing depends on whether the system heeds it.
#[cfg(target_os = "linux")]
pub(crate) fn advise_huge_pages<T>(memory: &mut [T]) {
    // The largest alignment that Linux wants for the call: its page, at most 64 KiB.
    const PAGE: usize = 64 << 10;
    let bytes = size_of_val(memory);
    let skip = memory.as_ptr().cast::<u8>().align_offset(PAGE);
    if bytes < skip.saturating_add(PAGE) {
        return;
    }
    let len = (bytes - skip) / PAGE * PAGE;
    // SAFETY: whole pages of memory that is borrowed mutably; this advice changes how it is mapped and not what it holds. A refusal (no
    // such feature, another page size) leaves everything as it was.
    unsafe {
        libc::madvise(
            memory.as_mut_ptr().cast::<u8>().add(skip).cast(),
            len,
            libc::MADV_HUGEPAGE,
        );
    }
}

/// Other systems have no such advice, or none that one may give without rights.
#[cfg(not(target_os = "linux"))]
pub(crate) fn advise_huge_pages<T>(_memory: &mut [T]) {}

#[cfg(test)]
mod tests {
    use super::*;
    use bytemuck::Zeroable;

    /// Matrices of several sizes keep their contents and their addresses while others are added, across slabs, and in a copy.
    #[test]
    fn matrices_stay_where_they_are() {
        for bytes in [1, 64, 100, 5 << 20] {
            let mut storage = Storage::new(bytes);
            assert_eq!(storage.len(), 0);
            let mut places = Vec::new();
            let count = if bytes < 1000 { 40 } else { 9 };
            for i in 0..count {
                let line: CacheLine = bytemuck::cast([i as u8 + 1; 64]);
                // SAFETY: every line is written.
                unsafe { storage.push(|lines| lines.fill(MaybeUninit::new(line))) };
                assert_eq!(storage.len(), i + 1);
                places.push(storage.get(i).as_ptr());
            }
            storage.get_mut(3).fill(CacheLine::zeroed());
            let copy = storage.clone();
            for (i, place) in places.iter().enumerate() {
                assert_eq!(storage.get(i).as_ptr(), *place);
                assert_ne!(copy.get(i).as_ptr(), *place);
                let value = if i == 3 { 0 } else { i as u8 + 1 };
                for lines in [storage.get(i), copy.get(i)] {
                    assert_eq!(lines.len(), bytes.div_ceil(64));
                    let bytes: &[u8] = bytemuck::cast_slice(lines);
                    assert!(bytes.iter().all(|&b| b == value));
                }
            }
        }
    }
}
