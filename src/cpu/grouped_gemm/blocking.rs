//! What the caches and the kind of this machine want: the sizes of the blocks, and how B is asked for.

use super::kernel::{MicroKernel, Pace, Prefetch};
use super::panel::LINE;
use super::plan::MC;
use crate::cpu::caches::caches;
use crate::cpu::isa::Isa;
use crate::cpu::simd::model::{Model, model};
use crate::element::DType;

/// Most columns of a block of sums C while A has to be packed in several parts: C is 96 × 512 × 4 B = 192 KiB at the most, and packing a line of A costs
/// the time of some two FMA for each of its 512 · 16.
pub(super) const COLUMNS: usize = 512;

/// Bytes of the next run's B that are fetched while the last panel of this one is at work.
pub(super) const HEAD_BYTES: usize = 4096;

/// How far ahead of its use B is asked for where it is used once, over all panels that run side by side. Against leaving it to the hardware (one Zen 5 core,
/// qwen3's shape): T = 1 6% faster, T = 64 5% (f32), 8% (bf16), 27% (f16); half as far loses 10 to 20% of that for f16, half as far again 2%; in bursts every
/// four steps 3%. On Emerald Rapids, where [`Streaming`] is into L2: without it T = 64 takes 31% (f32) and 37% (bf16) longer.
const AHEAD_BYTES: usize = 8192;

/// The same with [`Streaming::Near`], shared by the panels side by side.
const NEAR_BYTES: usize = 2048;

/// Bytes of a slice of B that are worth a fifth of a small L2.
const SLICE_BYTES: usize = 100 << 10;

/// How B is asked for, above all where it is used once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Streaming {
    /// Into L1. On a Zen 5 core T = 64 is 7% slower into L2.
    IntoL1,
    /// Into L1, near; f32 from panels in halves and by the hardware alone. A loop on a Zen 3 core reads 27 to 30 GB/s by two streams or more that the hardware finds, 22 to 23 by one, 17 to 21 where it
    /// asks for lines a KiB ahead: its L1 cache has 24 misses under way. So a panel of f32 is two streams. Against panels in one piece, of which two took turns with 4 to 6 rows (products of 24
    /// experts by turns in one process, while neighbours left 20 GB/s of 30), f32 with 2, 4, 6, 8, 12 rows was 19, 24, 21, 14, 9% faster, with one row level; asking besides loses 5 to 30%. Four streams
    /// are level; four panels in turn were 15 to 21% slower than two; loads or prefetches that walk through four pages ahead of one stream 0 to 40% slower. bf16 and f16 in halves, which are
    /// of 256 B, gain 3 to 24% with 4 rows and lose 1 to 13% with one, which decoding has: they stay in one piece, and 2 KiB ahead are 0 to 8% better than 8 KiB. Into L2 is level.
    Near,
    /// Into L2. On an Emerald Rapids core 7% (T = 64, f32), 2% (T = 64, bf16) and 4% (T = 8, f32) faster than into L1, whose sixteen misses under way the loads want, too;
    /// with 24 to 32 rows of an expert, where slices are shared, 2 to 6%, with 64 rows 0 to 1%.
    IntoL2,
    /// By the hardware alone up to this many rows, and then one panel at a time. On a Zen 4 core a tile alone reads 28 to 30 GB/s of 30 so, 23 to 26 when it asks for lines itself;
    /// from 11 rows on asking is level or better.
    ByHardwareUpTo(usize),
}

impl Streaming {
    fn new(isa: Isa) -> Self {
        match model() {
            Model::Intel => Self::IntoL2,
            // Measured with AVX-512 alone.
            Model::Zen4 if isa == Isa::Avx512 => Self::ByHardwareUpTo(8),
            Model::Zen3 => Self::Near,
            _ => Self::IntoL1,
        }
    }

    /// How far ahead of its use B is asked for.
    fn ahead(self) -> usize {
        match self {
            Self::Near => NEAR_BYTES,
            _ => AHEAD_BYTES,
        }
    }

    /// Whether tiles ask for the B that they use once.
    pub(super) fn asks(self, rows: usize) -> bool {
        match self {
            Self::ByHardwareUpTo(most) => rows > most,
            _ => true,
        }
    }

    /// Whether panels run side by side where a few rows leave registers for them.
    pub(super) fn side_by_side(self, rows: usize) -> bool {
        !matches!(self, Self::ByHardwareUpTo(most) if rows <= most)
    }

    /// For B that is used once.
    fn pace(self) -> Pace {
        match self {
            Self::IntoL2 => Pace::AsUsedL2,
            _ => Pace::AsUsed,
        }
    }

    /// For the next slice of B, while row tiles share this one.
    pub(super) fn slice_pace(self) -> Pace {
        match self {
            Self::IntoL2 => Pace::CountedL2,
            _ => Pace::Counted,
        }
    }
}

/// Whether panels are packed in halves: [`PanelLayout::halved`](super::packing::PanelLayout::halved).
pub(crate) fn halves_panels(isa: Isa, dtype: DType) -> bool {
    isa == Isa::Avx2 && dtype == DType::F32 && Streaming::new(isa) == Streaming::Near
}

/// What the caches and the kind of this machine want.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blocking {
    /// Words of packed A: half of the L2 cache, between what MC rows of one slice need and a megabyte.
    pub(super) a_words: usize,
    /// Bytes of a slice of B: a tenth of the L2 cache, of a small one up to a fifth. It need not stay in L1: a tile reads 2 vectors of it in M cycles, which L2 feeds easily.
    /// Slices of half the L1 cost 4% at T = 512 (more visits to the tile, each some 120 cycles with its sums), of two fifths of L2 10%. On Zen 3, whose L2 is 512 KiB, a fifth is 0 to 1.5% better
    /// than a tenth, and half the L1 2 to 4% worse.
    pub(super) b_bytes: usize,
    pub(super) streaming: Streaming,
}

impl Blocking {
    pub(super) fn new(isa: Isa) -> Self {
        let caches = caches();
        Self {
            streaming: Streaming::new(isa),
            a_words: (caches.l2 / 8).clamp(32 << 10, 256 << 10),
            b_bytes: (caches.l2 / 10).max(SLICE_BYTES.min(caches.l2 / 5)),
        }
    }

    /// Scratch floats of one worker.
    pub(super) fn worker_floats(self) -> usize {
        self.a_words + MC * COLUMNS
    }
}

/// For one tile, which reads B as a stream: what lies [`Streaming::ahead`] in it, and in its last part what comes after it.
pub(super) fn stream_ahead<K: MicroKernel>(
    streaming: Streaming,
    b: *const u8,
    steps: usize,
    after: *const u8,
    width: usize,
) -> Prefetch {
    let line_steps = LINE / K::WORDS;
    let ahead = (streaming.ahead() / width / K::STEP_BYTES).next_multiple_of(line_steps);
    Prefetch {
        from: b.wrapping_add(ahead * K::STEP_BYTES),
        pace: streaming.pace(),
        turn: steps.saturating_sub(ahead).next_multiple_of(line_steps),
        then: after,
        ..Prefetch::NONE
    }
}
