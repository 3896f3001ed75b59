//! From ids to rows: pairs sorted by expert, so that each expert's tokens are neighbours.
//!
//! A *pair* is t·K + slot; a *row* is a position after sorting. With T = 3, K = 2, E = 4:
//!
//! ```text
//! ids          [[2, 0], [2, 3], [0, 2]]        pairs 0 … 5
//! offsets      [0, 2, 2, 5, 6]                 expert e has rows offsets[e] .. offsets[e+1]; expert 1 has none
//! pair_of_row  [1, 4, 0, 2, 5, 3]
//! row_of_pair  [2, 0, 3, 5, 1, 4]              its inverse
//! ```
//!
//! ```
//! use moe_kernels::{Cpu, permute::{Permutation, PermuteOptions, NO_PAIR}};
//! let ids = [2, 0, 2, 3, 0, 2];
//! let mut p = Permutation::with_capacity(6, 4);
//! p.sort(&Cpu::new(), &ids, 4, &PermuteOptions::default())?;
//! assert_eq!(p.offsets(), [0, 2, 2, 5, 6]);
//! assert_eq!(p.counts(), [2, 0, 3, 1]);
//! assert_eq!(p.pair_of_row(), [1, 4, 0, 2, 5, 3]);
//! assert_eq!(p.row_of_pair(), [2, 0, 3, 5, 1, 4]);
//!
//! // The same with every expert's rows beginning at a multiple of 2.
//! p.sort(&Cpu::new(), &ids, 4, &PermuteOptions { block: 2, ..Default::default() })?;
//! assert_eq!(p.offsets(), [0, 2, 2, 6, 8]);
//! assert_eq!(p.pair_of_row(), [1, 4, 0, 2, 5, NO_PAIR, 3, NO_PAIR]);
//! assert_eq!(p.rows_of(2), 2..5);
//! # Ok::<(), moe_kernels::Error>(())
//! ```

use crate::Cpu;
use crate::cpu::permute as kernel;
use crate::error::{Error, Result, checked_mul};
use crate::matrix::{AnyMatMut, AnyMatRef};
use core::ops::Range;

/// Marks a padding row in [`Permutation::pair_of_row`].
pub const NO_PAIR: u32 = u32::MAX;

/// Marks a pair without a row in [`Permutation::row_of_pair`]: dropped, of another rank's expert, or of a null expert.
pub const NO_ROW: u32 = u32::MAX;

/// How [`Permutation::sort`] treats ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PermuteOptions {
    /// Every expert's rows begin at a multiple of this; 1 packs them tightly.
    pub block: usize,
    /// The experts of this rank; pairs of others get no row (expert parallelism). `None`: all E.
    pub local: Option<Range<usize>>,
    /// Experts without weights, ids E, E + 1, …: allowed in `ids`, but they get no rows.
    pub num_null: usize,
}

impl Default for PermuteOptions {
    /// No alignment, all experts local, no null experts.
    fn default() -> Self {
        Self {
            block: 1,
            local: None,
            num_null: 0,
        }
    }
}

/// Pairs sorted by expert, and back: holding one proves that the two permutations are inverse to each other and inside their ranges.
///
/// Reusable: [`Permutation::sort`] allocates nothing while the capacity suffices.
///
/// The order is that of a stable sort, so there is one right answer, whatever the thread count.
#[derive(Clone, Debug)]
pub struct Permutation {
    offsets: Vec<usize>,
    counts: Vec<usize>,
    pair_of_row: Vec<u32>,
    row_of_pair: Vec<u32>,
    /// Scratch: a histogram for each chunk of pairs.
    histograms: Vec<u32>,
}

impl Default for Permutation {
    /// No pairs, no experts, no room.
    fn default() -> Self {
        Self {
            offsets: vec![0],
            counts: Vec::new(),
            pair_of_row: Vec::new(),
            row_of_pair: Vec::new(),
            histograms: Vec::new(),
        }
    }
}

impl Permutation {
    /// An empty permutation with room for `max_pairs` pairs of `num_experts` experts, rows not aligned.
    pub fn with_capacity(max_pairs: usize, num_experts: usize) -> Self {
        let mut p = Self::default();
        p.reserve(max_pairs, num_experts, 1);
        p
    }

    /// Makes room, so that sorting up to `max_pairs` pairs of `num_experts` experts, aligned to `block`, allocates nothing.
    ///
    /// Only a hint: room that cannot be had now is asked for again by [`Permutation::sort`].
    pub fn reserve(&mut self, max_pairs: usize, num_experts: usize, block: usize) {
        fn grow<T>(v: &mut Vec<T>, capacity: usize) {
            // An impossible size must not panic here: `sort` refuses it with an error.
            let _ = v.try_reserve(capacity.saturating_sub(v.len()));
        }
        let padding = max_pairs
            .min(num_experts)
            .saturating_mul(block.saturating_sub(1));
        let scratch = kernel::max_histograms_len(max_pairs, num_experts).unwrap_or(usize::MAX);
        grow(&mut self.offsets, num_experts.saturating_add(1));
        grow(&mut self.counts, num_experts);
        grow(&mut self.pair_of_row, max_pairs.saturating_add(padding));
        grow(&mut self.row_of_pair, max_pairs);
        grow(&mut self.histograms, scratch);
    }

    /// Sorts `ids[T·K]` by expert, stably.
    ///
    /// [`DROPPED`](crate::routing::DROPPED) (−1), ids outside `options.local` and null experts' ids get no row.
    ///
    /// # Errors
    /// [`Error::Value`] for an id below −1 or from E + `num_null` on (`ids`), E = 0 or above `i32::MAX`, a block of 0, a local range outside 0..E;
    /// [`Error::Overflow`] when rows do not fit `u32`. The permutation is then what it was.
    pub fn sort(
        &mut self,
        cpu: &Cpu,
        ids: &[i32],
        num_experts: usize,
        options: &PermuteOptions,
    ) -> Result<()> {
        let local = check_options(ids.len(), num_experts, options)?;
        self.sort_checked(cpu, ids, num_experts, options, local)
    }

    /// [`sort`](Self::sort) with the local range that [`check_options`] gave for the same arguments.
    pub(crate) fn sort_checked(
        &mut self,
        cpu: &Cpu,
        ids: &[i32],
        num_experts: usize,
        options: &PermuteOptions,
        local: Range<usize>,
    ) -> Result<()> {
        let all_local = local.len() == num_experts;
        if options.block == 1 && all_local && kernel::are_few(ids, num_experts) {
            self.sort_few(ids, num_experts);
            return Ok(());
        }
        let ids = kernel::Ids {
            ids,
            num_experts,
            local,
            limit: num_experts.saturating_add(options.num_null),
        };
        let scratch = ids
            .histograms_len()
            .ok_or(Error::Overflow { what: "chunks·E" })?;
        self.histograms.resize(scratch, 0);
        if !kernel::count(cpu, &ids, &mut self.histograms) {
            return Err(wrong_id(&ids));
        }
        // From here on nothing fails.
        self.offsets.resize(num_experts + 1, 0);
        self.counts.resize(num_experts, 0);
        let (offsets, counts) = (&mut self.offsets, &mut self.counts);
        let all_rows = kernel::scan(&ids, &mut self.histograms, options.block, offsets, counts);
        let rows = offsets[num_experts];
        self.pair_of_row.resize(all_rows, NO_PAIR);
        self.row_of_pair.resize(ids.ids.len(), NO_ROW);
        if options.block > 1 {
            for (ends, &count) in self.offsets.windows(2).zip(&self.counts) {
                self.pair_of_row[ends[0] + count..ends[1]].fill(NO_PAIR);
            }
        }
        let (pair_of_row, row_of_pair) = (&mut self.pair_of_row, &mut self.row_of_pair);
        kernel::scatter(
            cpu,
            &ids,
            rows as u32,
            &mut self.histograms,
            pair_of_row,
            row_of_pair,
        );
        self.pair_of_row.truncate(rows);
        Ok(())
    }

    /// [`sort`](Self::sort) of few pairs, checked.
    fn sort_few(&mut self, ids: &[i32], num_experts: usize) {
        self.offsets.resize(num_experts + 1, 0);
        self.counts.resize(num_experts, 0);
        self.pair_of_row.resize(ids.len(), NO_PAIR);
        self.row_of_pair.resize(ids.len(), NO_ROW);
        kernel::sort_few(
            ids,
            &mut self.offsets,
            &mut self.counts,
            &mut self.pair_of_row,
            &mut self.row_of_pair,
        );
    }

    /// `[E + 1]`: expert e has rows `offsets[e] .. offsets[e+1]`, padding included.
    pub fn offsets(&self) -> &[usize] {
        &self.offsets
    }

    /// `[E]`: rows of each expert, padding not included.
    pub fn counts(&self) -> &[usize] {
        &self.counts
    }

    /// `[rows]`: the pair of a row, [`NO_PAIR`] for padding.
    pub fn pair_of_row(&self) -> &[u32] {
        &self.pair_of_row
    }

    /// `[T·K]`: the row of a pair, or [`NO_ROW`].
    pub fn row_of_pair(&self) -> &[u32] {
        &self.row_of_pair
    }

    /// The rows of an expert without its padding; empty for an expert that does not exist.
    pub fn rows_of(&self, expert: usize) -> Range<usize> {
        match self.counts.get(expert) {
            Some(count) => self.offsets[expert]..self.offsets[expert] + count,
            None => 0..0,
        }
    }

    /// Rows altogether, padding included: `offsets[E]`.
    pub fn num_rows(&self) -> usize {
        self.pair_of_row.len()
    }

    /// Pairs altogether, T·K, those without a row included.
    pub fn num_pairs(&self) -> usize {
        self.row_of_pair.len()
    }

    /// E.
    pub fn num_experts(&self) -> usize {
        self.counts.len()
    }
}

/// The local range, when all options make sense.
pub(crate) fn check_options(
    pairs: usize,
    num_experts: usize,
    options: &PermuteOptions,
) -> Result<Range<usize>> {
    if num_experts == 0 || num_experts > i32::MAX as usize {
        return Err(Error::value(
            "num_experts",
            "1 to 2^31 - 1, since ids are i32",
            num_experts,
        ));
    }
    if options.block == 0 {
        return Err(Error::value("block", "at least 1", 0));
    }
    let local = options.local.clone().unwrap_or(0..num_experts);
    if local.start > local.end || local.end > num_experts {
        return Err(Error::value(
            "local",
            format!("a range inside 0..{num_experts}"),
            format!("{local:?}"),
        ));
    }
    // Only experts that have pairs are padded. u32::MAX itself marks padding.
    let fits = (options.block - 1)
        .checked_mul(local.len().min(pairs))
        .and_then(|padding| padding.checked_add(pairs))
        .is_some_and(|rows| rows < u32::MAX as usize);
    if !fits {
        return Err(Error::Overflow {
            what: "rows as u32",
        });
    }
    Ok(local)
}

/// The error for the first wrong id.
fn wrong_id(ids: &kernel::Ids) -> Error {
    let (pair, id) = (ids.ids.iter().enumerate())
        .find(|&(_, &id)| !ids.is_valid(id))
        .map_or((0, 0), |(pair, &id)| (pair, id));
    Error::value(
        "ids",
        format!("-1 or an id below {}", ids.limit),
        format!("{id} at pair {pair}"),
    )
}

/// Runs `$body` for the element type that both matrices have, or returns [`Error::Value`].
macro_rules! same_dtype {
    ($src:expr, $out:expr, |$s:ident, $o:ident| $body:expr) => {
        match ($src, $out) {
            (AnyMatRef::F32($s), AnyMatMut::F32($o)) => $body,
            (AnyMatRef::F16($s), AnyMatMut::F16($o)) => $body,
            (AnyMatRef::BF16($s), AnyMatMut::BF16($o)) => $body,
            (s, o) => {
                return Err(Error::value(
                    "out",
                    format!("dtype {}", s.dtype()),
                    o.dtype(),
                ))
            }
        }
    };
}

/// Copies tokens into rows: `out[row] = x[pair_of_row[row] / slots]`, zeros in padding rows.
///
/// `x` is `[T, H]` with any strides, `out` `[rows, H]` of the same dtype; `slots` is K. For those who want the rows in memory: the grouped GEMM
/// gathers them by itself.
///
/// # Errors
/// [`Error::Shape`] or [`Error::Value`] when sizes or dtypes do not fit the permutation; `out` is then untouched.
pub fn permute_rows_into(
    cpu: &Cpu,
    x: AnyMatRef<'_>,
    permutation: &Permutation,
    slots: usize,
    out: AnyMatMut<'_>,
) -> Result<()> {
    if checked_mul(x.rows(), slots, "T·K")? != permutation.num_pairs() {
        return Err(Error::shape(
            "permutation",
            format!("{} tokens of {slots} slots", x.rows()),
            format!("{} pairs", permutation.num_pairs()),
        ));
    }
    out.expect("out", permutation.num_rows(), x.cols())?;
    // With no slots there are no pairs, so nothing is divided.
    let slots = slots.max(1);
    same_dtype!(x, out, |x, out| {
        kernel::gather_rows(cpu, x, permutation.pair_of_row(), slots, out);
    });
    Ok(())
}

/// Copies rows back into pairs: `out[pair] = ys[row_of_pair[pair]]`, zeros for pairs without a row.
///
/// `ys` is `[rows, H]` with any strides, `out` `[T·K, H]` of the same dtype.
///
/// # Errors
/// [`Error::Shape`] or [`Error::Value`] when sizes or dtypes do not fit the permutation; `out` is then untouched.
pub fn unpermute_rows_into(
    cpu: &Cpu,
    ys: AnyMatRef<'_>,
    permutation: &Permutation,
    out: AnyMatMut<'_>,
) -> Result<()> {
    ys.expect("ys", permutation.num_rows(), ys.cols())?;
    out.expect("out", permutation.num_pairs(), ys.cols())?;
    same_dtype!(ys, out, |ys, out| {
        kernel::gather_rows(cpu, ys, permutation.row_of_pair(), 1, out);
    });
    Ok(())
}
