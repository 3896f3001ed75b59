//! The register tile: M rows of A times one packed panel of B (or a few), accumulators in registers for a whole block of k.
//!
//! ```text
//!            panel: NR = 2 vectors of columns               for k in 0..kc {              (f32)
//!          ┌───────────────┬───────────────┐                    b0, b1 = load B[k]
//!        k │      b0       │      b1       │                    for i in 0..M {
//!          └───────────────┴───────────────┘                        x = broadcast A[i][k]
//!  A[i][k] ┌───────────────┬───────────────┐                        acc[i][0] = fma(x, b0, acc[i][0])
//!   row i  │   acc[i][0]   │   acc[i][1]   │                        acc[i][1] = fma(x, b1, acc[i][1])
//!          └───────────────┴───────────────┘                    }
//!                                                           }
//! ```
//!
//! Columns sit in the lanes and x is broadcast, so each output element is ONE chain of fused multiply-adds in a fixed order of k,
//! whatever M, the number of lanes or the blocking. That is why T = 1 and T = 4096, scalar and AVX-512 give the same bits. A block of k
//! continues the chain through the C buffer, where an f32 loses nothing.
//!
//! The order of k is ascending for f32 and f16 weights. For bf16 it is by pairs, the odd element before the even one, which is what
//! `vdpbf16ps` does; a missing last odd element counts as 0 · 0.
//!
//! A comes in lines of [`LINE`] 32-bit words, a line of each of the M rows in turn, so that packing copies cache lines and transposes nothing. A word
//! is an f32, or for the native dot a pair of bf16.
//!
//! A step costs 2 loads of B and M broadcasts for 2 · M FMAs. With 2 FMAs and 2 loads a cycle the loads hide behind the FMAs from M = 2 on. With few
//! rows a panel gives too few independent chains (2·M; a latency of 4 cycles and 2 FMA a cycle want 8), so up to four panels run side by side.

use super::panel::{LINE, PanelFormat, UNROLL, step};
use crate::cpu::simd::{Op, Simd};
use core::marker::PhantomData;

/// The operands of one tile.
#[derive(Clone, Copy)]
pub(crate) struct TileArgs {
    /// Steps of k.
    pub(crate) steps: usize,
    /// `[lines][rows][LINE]` words, from the first word of a line on.
    pub(crate) a: *const f32,
    /// The first panel, at the first step.
    pub(crate) b: *const u8,
    /// Bytes from one panel to the next.
    pub(crate) b_stride: usize,
    /// Between the halves of B's lines.
    pub(crate) gaps: Gaps,
    /// B's steps after its last whole line, where there are gaps.
    pub(crate) tail: *const u8,
    /// A block of `[rows][NR]` for each panel.
    pub(crate) c: *mut f32,
    /// Floats from one block to the next.
    pub(crate) c_stride: usize,
    /// Continue the sums in C; else start at zero.
    pub(crate) accumulate: bool,
    /// What to bring into cache meanwhile.
    pub(crate) prefetch: Prefetch,
}

/// What a pointer that walks through a panel leaves out, modulo 2⁶⁴, where the halves of its lines lie apart; nothing where the panel is in one piece. See
/// [`PanelLayout::halved`](super::packing::PanelLayout::halved).
#[derive(Clone, Copy)]
pub(crate) struct Gaps {
    after_half: usize,
    /// Besides, after the second half.
    after_line: usize,
}

impl Gaps {
    pub(crate) const NONE: Self = Self {
        after_half: 0,
        after_line: 0,
    };

    /// For a pointer that moves by `bytes` itself in each half, while the halves are `apart` bytes from each other.
    pub(crate) fn new(apart: Option<usize>, bytes: usize) -> Self {
        apart.map_or(Self::NONE, |apart| Self {
            after_half: apart.wrapping_sub(bytes),
            after_line: bytes.wrapping_sub(2 * apart),
        })
    }
}

/// Lines to bring into cache while a tile runs. Any address will do.
#[derive(Clone, Copy)]
pub(crate) struct Prefetch {
    /// How many, and how near.
    pub(crate) pace: Pace,
    /// Where to begin, for the first panel; further panels `b_stride` bytes on.
    pub(crate) from: *const u8,
    /// Lines for every [`MicroKernel::GROUP`] of steps of [`Pace::Counted`] and [`Pace::CountedL2`].
    pub(crate) lines: usize,
    /// The step from which it goes on elsewhere: a multiple of the steps in a line of A.
    pub(crate) turn: usize,
    /// Where.
    pub(crate) then: *const u8,
    /// Between the halves of the lines of B that they are of.
    pub(crate) gaps: Gaps,
}

/// How a tile asks for lines. One variant of the tile each: a count inside the loop costs more than it brings where B is used once, and with a choice of caches inside it
/// the compiler spilled the sums of the largest bf16 tile.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pace {
    /// So many for so many steps, into L1.
    Counted,
    /// As many lines of each panel as the tile uses, evenly, into L1.
    AsUsed,
    /// The same, into L2.
    AsUsedL2,
    /// As [`Pace::Counted`], into L2.
    CountedL2,
}

const COUNTED: u8 = Pace::Counted as u8;
const AS_USED: u8 = Pace::AsUsed as u8;
const AS_USED_L2: u8 = Pace::AsUsedL2 as u8;
const COUNTED_L2: u8 = Pace::CountedL2 as u8;

impl Prefetch {
    pub(crate) const NONE: Self = Self {
        pace: Pace::Counted,
        from: core::ptr::null(),
        lines: 0,
        turn: usize::MAX,
        then: core::ptr::null(),
        gaps: Gaps::NONE,
    };
}

/// M rows × P panels. `PACE` is a [`Pace`].
struct Tile<Format, const M: usize, const P: usize, const PACE: u8> {
    args: TileArgs,
    format: PhantomData<Format>,
}

impl<Format, const M: usize, const P: usize, const PACE: u8> Tile<Format, M, P, PACE> {
    fn new(args: TileArgs) -> Self {
        Self {
            args,
            format: PhantomData,
        }
    }
}

/// See [`MicroKernel::GROUP`].
const fn group<S: Simd, Format: PanelFormat>() -> usize {
    if S::HALVES {
        LINE / Format::WORDS / 2
    } else {
        UNROLL
    }
}

impl<Format: PanelFormat, const M: usize, const P: usize, const PACE: u8> Op
    for Tile<Format, M, P, PACE>
{
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let t = self.args;
        let nr = 2 * S::LANES;
        let mut acc = [[[s.splat(0.0); 2]; M]; P];
        if t.accumulate {
            for (p, panel) in acc.iter_mut().enumerate() {
                for (i, row) in panel.iter_mut().enumerate() {
                    // SAFETY: `MicroKernel::run`'s contract: C holds P blocks of M × NR.
                    unsafe {
                        let c = t.c.add(p * t.c_stride + i * nr);
                        *row = [s.load(c), s.load(c.add(S::LANES))];
                    }
                }
            }
        }
        let (mut a, mut b, mut ahead) = (t.a, t.b, t.prefetch.from);
        // A macro and not a closure: a closure that is not inlined would lose the instruction set (it did: 30 times slower).
        macro_rules! advance {
            ($by:expr, $steps:expr) => {
                advance!($by, $steps, 0 1 2 3);
                a = a.wrapping_add($steps * Format::WORDS);
                b = b.wrapping_add($steps * nr * Format::COLUMN_BYTES);
            };
            // Not a loop, which the compiler would leave one if its body is long, with the sums in memory.
            ($by:expr, $steps:expr, $($p:literal)*) => {$(
                if const { $p < P } {
                    // SAFETY: `MicroKernel::run`'s contract: A and B hold `steps` steps.
                    unsafe { $by(s, &mut acc[$p], a, b.add($p * t.b_stride)) };
                }
            )*};
        }
        macro_rules! ask {
            ($lines:expr) => {
                for _ in 0..$lines {
                    for p in 0..P {
                        let line = ahead.wrapping_add(p * t.b_stride);
                        if PACE == AS_USED_L2 || PACE == COUNTED_L2 {
                            s.prefetch_l2(line);
                        } else {
                            s.prefetch(line);
                        }
                    }
                    ahead = ahead.wrapping_add(64);
                }
            };
        }
        let counted = const { PACE == COUNTED || PACE == COUNTED_L2 };
        let line_steps = LINE / Format::WORDS;
        let step_bytes = nr * Format::COLUMN_BYTES;
        let in_group = const { group::<S, Format>() };
        let mut left = t.steps;
        while left > 0 {
            let now = left.min(line_steps);
            if t.steps - left == t.prefetch.turn {
                ahead = t.prefetch.then;
            }
            let mut gaps = t.gaps;
            if const { S::HALVES } && now < line_steps {
                (b, gaps) = (t.tail, Gaps::NONE);
            }
            for _ in 0..now / in_group {
                if counted {
                    ask!(t.prefetch.lines);
                }
                if const { S::BY_ELEMENT } {
                    if !counted {
                        ask!(step_bytes * UNROLL / 64);
                    }
                    advance!(Format::steps::<S, M>, UNROLL);
                    continue;
                }
                for u in 0..in_group {
                    if !counted {
                        // Constants once the loop is unrolled.
                        ask!(step_bytes * (u + 1) / 64 - step_bytes * u / 64);
                    }
                    advance!(step::<S, Format, M>, 1);
                }
                if const { S::HALVES } {
                    b = b.wrapping_add(gaps.after_half);
                    ahead = ahead.wrapping_add(t.prefetch.gaps.after_half);
                }
            }
            for _ in 0..now % in_group {
                advance!(step::<S, Format, M>, 1);
            }
            // On to the next line of the first row. After a line that is not full nothing follows.
            a = a.wrapping_add(M * LINE - LINE);
            if const { S::HALVES } {
                b = b.wrapping_add(gaps.after_line);
                ahead = ahead.wrapping_add(t.prefetch.gaps.after_line);
            }
            left -= now;
        }
        for (p, panel) in acc.iter().enumerate() {
            for (i, row) in panel.iter().enumerate() {
                // SAFETY: as for the loads.
                unsafe {
                    let c = t.c.add(p * t.c_stride + i * nr);
                    s.store(c, row[0]);
                    s.store(c.add(S::LANES), row[1]);
                }
            }
        }
    }
}

/// A matrix kernel: what the driver needs to know of it, and how to run it.
///
/// A kernel that sums in another order (AMX, BFMMLA) would be one more implementation, chosen by a named numerics mode.
pub(crate) trait MicroKernel: Copy {
    /// The most rows in a tile.
    const MR: usize;
    /// Columns of a panel.
    const NR: usize;
    /// Words of A in a step.
    const WORDS: usize;
    /// Bytes of a panel in one step.
    const STEP_BYTES: usize;
    /// Steps between two turns at prefetching; half a line of A where panels may lie in halves.
    const GROUP: usize;
    /// See [`PanelFormat::NATIVE_DOT`].
    const NATIVE_DOT: bool;

    /// How many panels to run side by side for a tile of `rows` rows; C needs them as neighbours.
    fn panels_at_once(rows: usize) -> usize;

    /// C (+)= A · B for `rows` rows and `panels` panels.
    ///
    /// # Safety
    /// The pointers of `args` are valid for the sizes stated there; `1 ≤ rows ≤ MR`; `panels` is `panels_at_once(rows)`, 1, or 2 where four could be at once.
    unsafe fn run(self, rows: usize, panels: usize, args: TileArgs);
}

/// The generic tile on one instruction set and one panel format.
#[derive(Clone, Copy)]
pub(crate) struct Kernel<S, Format> {
    simd: S,
    format: PhantomData<Format>,
}

impl<S: Simd, Format: PanelFormat> Kernel<S, Format> {
    /// # Safety
    /// For a native dot, the CPU has it: [`crate::Isa::has_bf16_dot`].
    #[inline(always)]
    pub(crate) unsafe fn new(simd: S) -> Self {
        Self {
            simd,
            format: PhantomData,
        }
    }
}

impl<S: Simd, Format: PanelFormat> Kernel<S, Format> {
    /// # Safety
    /// That of the tile.
    #[inline(always)]
    unsafe fn outline<T: Op<Output = ()>>(self, tile: T) {
        // A constant, so that only one of them is compiled: assemblers refuse the instructions where they are not enabled.
        if const { Format::NATIVE_DOT } {
            // SAFETY: `Kernel::new`'s contract.
            unsafe { self.simd.outline_bf16_dot(tile) }
        } else {
            self.simd.outline(tile)
        }
    }
}

impl<S: Simd, Format: PanelFormat> MicroKernel for Kernel<S, Format> {
    const MR: usize = {
        let extra = if S::TILE_STEP {
            0
        } else if S::BY_ELEMENT {
            Format::EXTRA_BY_ELEMENT
        } else {
            Format::EXTRA_REGISTERS
        };
        S::MR - extra.div_ceil(2)
    };
    const NR: usize = 2 * S::LANES;
    const WORDS: usize = Format::WORDS;
    const STEP_BYTES: usize = 2 * S::LANES * Format::COLUMN_BYTES;
    const GROUP: usize = group::<S, Format>();
    const NATIVE_DOT: bool = Format::NATIVE_DOT;

    #[inline(always)]
    fn panels_at_once(rows: usize) -> usize {
        // Two cache lines in a step are enough to keep memory busy; more streams than needed cost 5% at T = 1 (f32, bf16; AVX-512). With a line or less,
        // four panels gain 8 to 20%.
        let most = if Self::STEP_BYTES >= 128 { 2 } else { 4 };
        match rows {
            1 if Self::MR >= most => most,
            1..=3 if 2 * rows <= Self::MR => 2,
            _ => 1,
        }
    }

    #[inline(always)]
    unsafe fn run(self, rows: usize, panels: usize, args: TileArgs) {
        macro_rules! tiles {
            ($(($m:literal, $p:literal))*) => {
                match (rows, panels) {
                    $(($m, $p) => {
                        // A constant, so that tiles which this ISA has no registers for are not even compiled.
                        if const { $m * $p <= Self::MR } {
                            // SAFETY: this function's contract.
                            unsafe {
                                match args.prefetch.pace {
                                    // Slices are shared by tiles of half the most rows at the least.
                                    Pace::CountedL2 if const {
                                        S::PREFETCH_L2 && $p == 1 && 2 * $m >= Self::MR
                                    } =>
                                    {
                                        self.outline(Tile::<Format, $m, $p, COUNTED_L2>::new(args));
                                    }
                                    Pace::Counted | Pace::CountedL2 => {
                                        self.outline(Tile::<Format, $m, $p, COUNTED>::new(args));
                                    }
                                    Pace::AsUsedL2 if const { S::PREFETCH_L2 } => {
                                        self.outline(Tile::<Format, $m, $p, AS_USED_L2>::new(args));
                                    }
                                    _ => self.outline(Tile::<Format, $m, $p, AS_USED>::new(args)),
                                }
                            }
                        } else {
                            unreachable!("{rows} rows and {panels} panels in a tile of {}", Self::MR)
                        }
                    })*
                    _ => unreachable!("no tile of {rows} rows and {panels} panels"),
                }
            };
        }
        tiles!(
            (1, 1)(1, 2)(1, 4)(2, 1)(2, 2)(3, 1)(3, 2)(4, 1)(5, 1)(6, 1)(7, 1)(8, 1)(9, 1)(10, 1)(
                11, 1
            )(12, 1)(13, 1)(14, 1)
        );
    }
}
