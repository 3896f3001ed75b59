//! The formats of a packed panel, and how a tile reads each: one step of k at a time, or [`UNROLL`] at once where the instructions multiply by an
//! element of a vector.
//!
//! ```text
//! a step:           x = broadcast A[i][k]                                acc[i] = fma(x, B[k], acc[i])
//! UNROLL of them:   x = load A[i][k .. k + 4]                            acc[i] = fma(x[0], B[k], acc[i]), then x[1], B[k + 1] …
//! ```
//!
//! The second takes one load of A for four k and no broadcast. The vectors of B for all four have to be in registers meanwhile, which NEON's 32 allow.

use crate::cpu::simd::{Columns, Simd};

/// Words of A that lie together: a cache line on every machine that matters.
pub(crate) const LINE: usize = 16;

/// Steps between two turns at prefetching; also hides the loop's own instructions.
pub(crate) const UNROLL: usize = 4;

/// Tiles of so many rows have registers to spare.
const FEW_ROWS: usize = 4;

/// One kind of packed panel with one kind of A: how many k a step takes and how a step reads both.
pub(crate) trait PanelFormat: Copy + Send + Sync + 'static {
    /// k values in a step of B; K is padded with zeros to a multiple of it.
    const STEP: usize;
    /// Bytes of one column in one step.
    const COLUMN_BYTES: usize;
    /// Words of A in a step; they divide [`LINE`].
    const WORDS: usize;
    /// Registers that a step wants beyond the accumulators, two vectors of B and a broadcast; not with [`Simd::tile_step`].
    const EXTRA_REGISTERS: usize = 0;
    /// Registers that `steps` wants beyond the accumulators, the vectors of B for [`UNROLL`] k and two of A.
    const EXTRA_BY_ELEMENT: usize = 0;
    /// A word of A holds a pair of bf16, for the native dot.
    const NATIVE_DOT: bool = false;
    /// What a step reads of a column, for [`Simd::tile_step`].
    const COLUMNS: Columns;

    /// Continues the chains of `acc` by one step. Row i's words of this step are at `a + i · LINE`.
    ///
    /// # Safety
    /// `a` is valid for WORDS words at each of the M places and `b` for 2 × LANES × COLUMN_BYTES bytes; with `NATIVE_DOT` only below
    /// [`Simd::outline_bf16_dot`].
    unsafe fn step<S: Simd, const M: usize>(
        s: S,
        acc: &mut [[S::F; 2]; M],
        a: *const f32,
        b: *const u8,
    );

    /// Continues the chains by [`UNROLL`] steps, with multiplications by element. Only where [`Simd::BY_ELEMENT`].
    ///
    /// # Safety
    /// As [`PanelFormat::step`], for so many steps.
    unsafe fn steps<S: Simd, const M: usize>(
        s: S,
        acc: &mut [[S::F; 2]; M],
        a: *const f32,
        b: *const u8,
    );
}

/// f32 weights: one k a step.
#[derive(Clone, Copy)]
pub(crate) struct PanelF32;
/// f16 weights, widened exactly: one k a step.
#[derive(Clone, Copy)]
pub(crate) struct PanelF16;
/// bf16 weights: two k a step, the even one in the lower half of a 32-bit word, the odd one in the upper half; A is f32.
#[derive(Clone, Copy)]
pub(crate) struct PanelBf16;
/// The same panels, and pairs of bf16 in A too, multiplied as they are.
#[derive(Clone, Copy)]
pub(crate) struct PanelBf16Dot;

/// One FMA of every accumulator with the row values `a[i · LINE]` and the columns `b`.
///
/// # Safety
/// `a` is valid at these M places.
#[inline(always)]
unsafe fn rank1<S: Simd, const M: usize>(
    s: S,
    acc: &mut [[S::F; 2]; M],
    a: *const f32,
    b: [S::F; 2],
) {
    for (i, row) in acc.iter_mut().enumerate() {
        // SAFETY: i < M.
        let x = s.splat(unsafe { *a.add(i * LINE) });
        row[0] = s.fma(x, b[0], row[0]);
        row[1] = s.fma(x, b[1], row[1]);
    }
}

/// One step of a tile: by hand where the instruction set has one.
///
/// # Safety
/// That of [`PanelFormat::step`].
#[inline(always)]
pub(super) unsafe fn step<S: Simd, Format: PanelFormat, const M: usize>(
    s: S,
    acc: &mut [[S::F; 2]; M],
    a: *const f32,
    b: *const u8,
) {
    // SAFETY: the caller's contract.
    unsafe {
        if const { S::TILE_STEP && !Format::NATIVE_DOT } {
            s.tile_step(Format::COLUMNS, acc, a, b);
        } else {
            Format::step(s, acc, a, b);
        }
    }
}

/// Whether the loads of row `i`'s pair in a tile of `rows` stay behind those before it.
const fn wants_order(i: usize, rows: usize) -> bool {
    i < rows && rows > FEW_ROWS
}

/// `$run!([i, i + 1])` for the rows below `$m`, and `$run!([$m - 1])` for the last of an odd number. Not a loop: the compiler does not unroll one whose body it takes for
/// long, and then the sums are in memory.
macro_rules! for_row_pairs {
    ($s:ident, $m:ident, $run:ident) => {
        for_row_pairs!($s, $m, $run, 0 2 4 6 8 10 12)
    };
    ($s:ident, $m:ident, $run:ident, $($i:literal)*) => {$(
        if const { wants_order($i, $m) } {
            // Else all loads of A go to the front, where registers are short.
            $s.keep_order();
        }
        if const { $i + 1 < $m } {
            $run!([$i, $i + 1]);
        } else if const { $i < $m } {
            $run!([$i]);
        }
    )*};
}

/// [`UNROLL`] FMAs of every accumulator, with the elements of the vectors at `a + i · LINE` and the columns `b`; k ascending, or the odd one of each pair first.
///
/// Rows go by twos: four chains lie between two links of one, and only two vectors of A are in registers beside those of B.
///
/// # Safety
/// `a` is valid for UNROLL words at these M places; `S::BY_ELEMENT`.
#[inline(always)]
unsafe fn rank4<S: Simd, const M: usize, const ODD_FIRST: bool>(
    s: S,
    acc: &mut [[S::F; 2]; M],
    a: *const f32,
    b: [[S::F; 2]; UNROLL],
) {
    macro_rules! multiply {
        ($rows:expr, $x:ident, $($k:literal)*) => {
            // SAFETY: the rows are below M, and such a vector has UNROLL lanes.
            let $x = $rows.map(|i| unsafe { s.load(a.add(i * LINE)) });
            $(for (i, &x) in $rows.into_iter().zip(&$x) {
                acc[i][0] = s.fma_element::<$k>(x, b[$k][0], acc[i][0]);
                acc[i][1] = s.fma_element::<$k>(x, b[$k][1], acc[i][1]);
            })*
        };
    }
    macro_rules! in_order {
        ($rows:expr) => {
            if ODD_FIRST {
                multiply!($rows, x, 1 0 3 2);
            } else {
                multiply!($rows, x, 0 1 2 3);
            }
        };
    }
    for_row_pairs!(s, M, in_order);
}

/// `load` of both vectors of [`UNROLL`] steps. (A closure that is not inlined loses nothing here: NEON is in every build for AArch64.)
macro_rules! columns {
    ($s:ident, $b:ident, $load:ident) => {
        [0, 1, 2, 3].map(|u| {
            let b = $b.add(u * 2 * S::LANES);
            [$s.$load(b), $s.$load(b.add(S::LANES))]
        })
    };
}

/// A format with one k a step: `$columns` read by `$load` from numbers of type `$number`; with `$extra` registers beyond those of f32 where elements are multiplied.
macro_rules! one_k_a_step {
    ($format:ident, $columns:ident, $number:ty, $load:ident, $extra:literal) => {
        impl PanelFormat for $format {
            const STEP: usize = 1;
            const COLUMN_BYTES: usize = size_of::<$number>();
            const WORDS: usize = 1;
            const EXTRA_BY_ELEMENT: usize = $extra;
            const COLUMNS: Columns = Columns::$columns;

            #[inline(always)]
            unsafe fn step<S: Simd, const M: usize>(
                s: S,
                acc: &mut [[S::F; 2]; M],
                a: *const f32,
                b: *const u8,
            ) {
                let b = b.cast::<$number>();
                // SAFETY: the caller's contract.
                unsafe { rank1(s, acc, a, [s.$load(b), s.$load(b.add(S::LANES))]) }
            }

            #[inline(always)]
            unsafe fn steps<S: Simd, const M: usize>(
                s: S,
                acc: &mut [[S::F; 2]; M],
                a: *const f32,
                b: *const u8,
            ) {
                let b = b.cast::<$number>();
                // SAFETY: the caller's contract.
                unsafe { rank4::<S, M, false>(s, acc, a, columns!(s, b, $load)) }
            }
        }
    };
}

one_k_a_step!(PanelF32, F32, f32, load, 0);
// Halves on their way to being widened: with ten rows NEON's tile spills.
one_k_a_step!(PanelF16, F16, u16, load_f16, 2);

impl PanelFormat for PanelBf16 {
    const STEP: usize = 2;
    const COLUMN_BYTES: usize = 4;
    const WORDS: usize = 2;
    // Both halves of B at once, and the mask: where the compiler allots registers (AVX-512), it spills with a row more.
    const EXTRA_REGISTERS: usize = 2;
    const COLUMNS: Columns = Columns::Bf16Pairs;

    #[inline(always)]
    unsafe fn step<S: Simd, const M: usize>(
        s: S,
        acc: &mut [[S::F; 2]; M],
        a: *const f32,
        b: *const u8,
    ) {
        let b = b.cast::<i32>();
        // SAFETY: the caller's contract.
        let words = unsafe { [s.load_i(b), s.load_i(b.add(S::LANES))] };
        let odd = words.map(|w| s.odd_bf16(w));
        let even = words.map(|w| s.even_bf16(w));
        // SAFETY: `a` holds 2 words of each row.
        unsafe {
            rank1(s, acc, a.add(1), odd);
            rank1(s, acc, a, even);
        }
    }

    #[inline(always)]
    unsafe fn steps<S: Simd, const M: usize>(
        s: S,
        acc: &mut [[S::F; 2]; M],
        a: *const f32,
        b: *const u8,
    ) {
        let b = b.cast::<i32>();
        // Four k are two steps.
        for half in 0..UNROLL / 2 {
            if const { M > FEW_ROWS } {
                s.keep_order();
            }
            // SAFETY: the caller's contract.
            let words = unsafe {
                let b = b.add(half * 4 * S::LANES);
                [0, 1, 2, 3].map(|v| s.load_i(b.add(v * S::LANES)))
            };
            let [even, odd] = [words.map(|w| s.even_bf16(w)), words.map(|w| s.odd_bf16(w))];
            let columns = [
                [even[0], even[1]],
                [odd[0], odd[1]],
                [even[2], even[3]],
                [odd[2], odd[3]],
            ];
            // SAFETY: the caller's contract.
            unsafe { rank4::<S, M, true>(s, acc, a.add(half * 4), columns) };
        }
    }
}

impl PanelFormat for PanelBf16Dot {
    const STEP: usize = 2;
    const COLUMN_BYTES: usize = 4;
    const WORDS: usize = 1;
    const NATIVE_DOT: bool = true;
    const COLUMNS: Columns = Columns::Bf16Pairs;

    #[inline(always)]
    unsafe fn step<S: Simd, const M: usize>(
        s: S,
        acc: &mut [[S::F; 2]; M],
        a: *const f32,
        b: *const u8,
    ) {
        let (a, b) = (a.cast::<i32>(), b.cast::<i32>());
        // SAFETY: the caller's contract.
        unsafe {
            let (left, right) = (s.load_i(b), s.load_i(b.add(S::LANES)));
            for (i, row) in acc.iter_mut().enumerate() {
                let pair = s.splat_i(*a.add(i * LINE));
                row[0] = s.dot_bf16(row[0], pair, left);
                row[1] = s.dot_bf16(row[1], pair, right);
            }
        }
    }

    /// As [`rank4`], with halves of words for elements.
    #[inline(always)]
    unsafe fn steps<S: Simd, const M: usize>(
        s: S,
        acc: &mut [[S::F; 2]; M],
        a: *const f32,
        b: *const u8,
    ) {
        let (a, b) = (a.cast::<i32>(), b.cast::<i32>());
        // SAFETY: the caller's contract.
        unsafe {
            let b: [[S::I; 2]; UNROLL] = columns!(s, b, load_i);
            macro_rules! multiply {
                ($rows:expr) => { multiply!($rows, 1 0 3 2 5 4 7 6) };
                ($rows:expr, $($half:literal)*) => {
                    let x = $rows.map(|i| s.load_i(a.add(i * LINE)));
                    $(for (i, &x) in $rows.into_iter().zip(&x) {
                        let [left, right] = b[$half / 2];
                        acc[i][0] = s.fma_bf16_element::<$half>(acc[i][0], x, left);
                        acc[i][1] = s.fma_bf16_element::<$half>(acc[i][1], x, right);
                    })*
                };
            }
            for_row_pairs!(s, M, multiply);
        }
    }
}
