//! `moe_permutation`: pairs sorted by expert, and row copies.

use super::cpu::moe_cpu;
use super::handle::{destroy, exclusive, give, handle, shared};
use super::memory::{
    Regions, Versioned, moe_matrix, moe_matrix_mut, probe, read_struct, write_struct,
};
use super::status::*;
use crate::permute::{Permutation, PermuteOptions, permute_rows_into, unpermute_rows_into};
use bytemuck::Zeroable;

/// Marks a pair without a row and a row without a pair (padding).
pub const MOE_NONE: u32 = u32::MAX;

/// How to sort. Zeros (with struct_size) are the defaults.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_permute_options {
    /// sizeof(moe_permute_options)
    pub struct_size: usize,
    /// Each expert's rows begin at a multiple of this; 0 counts as 1.
    pub block: usize,
    /// Pairs of experts first_local .. first_local + num_local get rows, others none; num_local = 0 stands for all experts.
    pub first_local: usize,
    /// See first_local.
    pub num_local: usize,
    /// Ids E .. E + num_null are allowed and get no rows.
    pub num_null: usize,
}

// SAFETY: repr(C), begins with its size, integers.
unsafe impl Versioned for moe_permute_options {}

/// A permutation in its handle's memory: valid until the handle is used again or destroyed. Set struct_size.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_permutation_view {
    /// sizeof(moe_permutation_view)
    pub struct_size: usize,
    /// E
    pub num_experts: usize,
    /// T * K, those without a row included.
    pub num_pairs: usize,
    /// offsets[E], padding included.
    pub num_rows: usize,
    /// [E + 1]: expert e has rows offsets[e] .. offsets[e + 1], padding included.
    pub offsets: *const usize,
    /// [E]: rows of each expert without padding.
    pub counts: *const usize,
    /// [num_rows]: the pair t * K + slot of a row; MOE_NONE for padding.
    pub pair_of_row: *const u32,
    /// [num_pairs]: the row of a pair, or MOE_NONE.
    pub row_of_pair: *const u32,
}

// SAFETY: repr(C), begins with its size, integers and pointers.
unsafe impl Versioned for moe_permutation_view {}

/// The caller's arrays for a permutation; NULL for those not wanted, else at least as long as the view says. Lengths in elements.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_permutation_buffers {
    /// sizeof(moe_permutation_buffers)
    pub struct_size: usize,
    /// [E + 1] or more
    pub offsets: *mut usize,
    /// Elements of offsets.
    pub offsets_len: usize,
    /// [E] or more
    pub counts: *mut usize,
    /// Elements of counts.
    pub counts_len: usize,
    /// [num_rows] or more
    pub pair_of_row: *mut u32,
    /// Elements of pair_of_row.
    pub pair_of_row_len: usize,
    /// [num_pairs] or more
    pub row_of_pair: *mut u32,
    /// Elements of row_of_pair.
    pub row_of_pair_len: usize,
}

// SAFETY: repr(C), begins with its size, integers and pointers.
unsafe impl Versioned for moe_permutation_buffers {}

/// The first part of an array of the caller that takes all of `from`.
pub(super) fn copy_into<T: Copy>(from: &[T], to: &mut [T]) {
    to[..from.len()].copy_from_slice(from);
}

/// An array of the caller that takes `needed` elements, or none.
macro_rules! place {
    ($regions:ident, $buffers:ident . $field:ident, $len:ident, $needed:expr) => {{
        let found = $buffers.$len;
        if $buffers.$field.is_null() {
            None
        } else if found < $needed {
            return Err(crate::Error::BufferTooSmall {
                argument: stringify!($field),
                needed: $needed,
                found,
            }
            .into());
        } else {
            // SAFETY: the caller's contract: so many elements may be written.
            Some(unsafe { $regions.slice_mut(stringify!($field), $buffers.$field, $needed) }?)
        }
    }};
}
pub(super) use place;

pub(super) fn view_of(p: &Permutation) -> moe_permutation_view {
    moe_permutation_view {
        struct_size: 0, // the caller's stays
        num_experts: p.num_experts(),
        num_pairs: p.num_pairs(),
        num_rows: p.num_rows(),
        offsets: p.offsets().as_ptr(),
        counts: p.counts().as_ptr(),
        pair_of_row: p.pair_of_row().as_ptr(),
        row_of_pair: p.row_of_pair().as_ptr(),
    }
}

/// Copies a permutation into the caller's arrays.
///
/// # Safety
/// `buffers` is null or valid, with arrays as long as they say.
pub(super) unsafe fn read_permutation(
    p: &Permutation,
    buffers: *const moe_permutation_buffers,
) -> Checked {
    // SAFETY: this function's contract.
    let b = unsafe { read_struct("buffers", buffers) }?;
    let mut regions = Regions::new();
    let offsets = place!(regions, b.offsets, offsets_len, p.offsets().len());
    let counts = place!(regions, b.counts, counts_len, p.counts().len());
    let pair_of_row = place!(regions, b.pair_of_row, pair_of_row_len, p.num_rows());
    let row_of_pair = place!(regions, b.row_of_pair, row_of_pair_len, p.num_pairs());
    let apart = regions.apart()?;
    for (from, to) in [(p.offsets(), offsets), (p.counts(), counts)] {
        if let Some(to) = to {
            copy_into(from, to.get(&apart));
        }
    }
    for (from, to) in [
        (p.pair_of_row(), pair_of_row),
        (p.row_of_pair(), row_of_pair),
    ] {
        if let Some(to) = to {
            copy_into(from, to.get(&apart));
        }
    }
    Ok(())
}

/// Bytes that sorting may ask for: the arrays and the histograms, generously.
pub(super) fn sort_bytes(pairs: usize, num_experts: usize, block: usize) -> Option<usize> {
    let padding = pairs
        .min(num_experts)
        .checked_mul(block.saturating_sub(1))?;
    let histograms = crate::cpu::permute::max_histograms_len(pairs, num_experts)?;
    let words = pairs
        .checked_mul(2)?
        .checked_add(padding)?
        .checked_add(histograms)?;
    let experts = num_experts
        .checked_add(1)?
        .checked_mul(2 * size_of::<usize>())?;
    words.checked_mul(4)?.checked_add(experts)
}

/// A permutation and its scratch, to be used again and again.
pub struct moe_permutation {
    _opaque: (),
}

handle!(moe_permutation, Permutation, b"moeperm1");

/// Makes an empty one; it grows when it sorts, and sorting as much again allocates nothing.
///
/// # Safety
/// out: writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_permutation_create(out: *mut *mut moe_permutation) -> moe_status {
    // SAFETY: the caller's contract.
    guard(|| unsafe { give(out, Permutation::default()) })
}

/// Ends a handle. NULL is allowed.
///
/// # Safety
/// p: NULL or living, not used afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_permutation_destroy(p: *mut moe_permutation) -> moe_status {
    // SAFETY: the caller's contract.
    guard(|| unsafe { destroy(p) })
}

/// Sorts ids[num_pairs] (T * K) by expert, stably; -1 is a pair without expert. options may be NULL.
///
/// Errors: MOE_ERROR_VALUE for an id below -1 or from E + num_null on, E = 0, locals outside 0..E; MOE_ERROR_OVERFLOW. The permutation is then what it was.
///
/// # Safety
/// Handles: NULL or living. ids: NULL or num_pairs readable ids. options: NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_permutation_sort(
    cpu: *const moe_cpu,
    p: *mut moe_permutation,
    ids: *const i32,
    num_pairs: usize,
    num_experts: usize,
    options: *const moe_permute_options,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let (cpu, mut p) = (unsafe { shared(cpu) }?, unsafe { exclusive(p) }?);
        // SAFETY: the caller's contract.
        let options = unsafe { read_options(options) }?;
        let mut regions = Regions::new();
        // SAFETY: the caller's contract.
        let ids = unsafe { regions.slice("ids", ids, num_pairs) }?;
        let apart = regions.apart()?;
        crate::permute::check_options(num_pairs, num_experts, &options)?;
        probe("ids", sort_bytes(num_pairs, num_experts, options.block))?;
        let (ids, p) = (ids.get(&apart), &mut *p);
        Ok(cpu.run(|cpu| p.sort(cpu, ids, num_experts, &options))?)
    })
}

/// How to sort; null stands for the defaults.
///
/// # Safety
/// `options` is null or valid.
pub(super) unsafe fn read_options(options: *const moe_permute_options) -> Checked<PermuteOptions> {
    let options = match options.is_null() {
        true => moe_permute_options::zeroed(),
        // SAFETY: this function's contract.
        false => unsafe { read_struct("options", options) }?,
    };
    Ok(PermuteOptions {
        block: options.block.max(1),
        local: local_range(options.first_local, options.num_local)?,
        num_null: options.num_null,
    })
}

/// C's two numbers as a range; no experts stand for all of them.
pub(super) fn local_range(first: usize, count: usize) -> Checked<Option<core::ops::Range<usize>>> {
    if count == 0 {
        return match first {
            0 => Ok(None),
            other => Err(Fault::value("first_local", "0 with num_local = 0", other)),
        };
    }
    let overflow = crate::Error::Overflow {
        what: "first_local + num_local",
    };
    let end = first.checked_add(count).ok_or(overflow)?;
    Ok(Some(first..end))
}

/// Shows the permutation in the handle's own memory.
///
/// # Safety
/// p: NULL or living. view: NULL or writable for its struct_size bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_permutation_get(
    p: *const moe_permutation,
    view: *mut moe_permutation_view,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let p = unsafe { shared(p) }?;
        // SAFETY: the caller's contract.
        unsafe { write_struct("view", view, &view_of(&p)) }
    })
}

/// Copies the permutation into the caller's arrays. Errors: MOE_ERROR_BUFFER_TOO_SMALL naming the array; nothing is written then.
///
/// # Safety
/// p: NULL or living. buffers: NULL or valid, arrays as long as they say.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_permutation_read(
    p: *const moe_permutation,
    buffers: *const moe_permutation_buffers,
) -> moe_status {
    // SAFETY: the caller's contract.
    guard(|| unsafe { read_permutation(&*shared(p)?, buffers) })
}

/// out[row] = x[pair_of_row[row] / slots], zeros in padding rows. x [T, H], out [num_rows, H] of the same dtype; slots is K.
///
/// # Safety
/// Handles: NULL or living. Matrices: NULL or valid, with memory as long as they say.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_permute_rows(
    cpu: *const moe_cpu,
    p: *const moe_permutation,
    x: *const moe_matrix,
    slots: usize,
    out: *const moe_matrix_mut,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let (cpu, p) = (unsafe { shared(cpu) }?, unsafe { shared(p) }?);
        let mut regions = Regions::new();
        // SAFETY: the caller's contract.
        let (x, out) = unsafe { (regions.matrix("x", x)?, regions.matrix_mut("out", out)?) };
        let apart = regions.apart()?;
        let (x, out) = (x.view(&apart)?, out.view(&apart)?);
        let p: &Permutation = &p;
        Ok(cpu.run(|cpu| permute_rows_into(cpu, x, p, slots, out))?)
    })
}

/// out[pair] = ys[row_of_pair[pair]], zeros for pairs without a row. ys [num_rows, H], out [num_pairs, H] of the same dtype.
///
/// # Safety
/// As moe_permute_rows.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_unpermute_rows(
    cpu: *const moe_cpu,
    p: *const moe_permutation,
    ys: *const moe_matrix,
    out: *const moe_matrix_mut,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let (cpu, p) = (unsafe { shared(cpu) }?, unsafe { shared(p) }?);
        let mut regions = Regions::new();
        // SAFETY: the caller's contract.
        let (ys, out) = unsafe { (regions.matrix("ys", ys)?, regions.matrix_mut("out", out)?) };
        let apart = regions.apart()?;
        let (ys, out) = (ys.view(&apart)?, out.view(&apart)?);
        let p: &Permutation = &p;
        Ok(cpu.run(|cpu| unpermute_rows_into(cpu, ys, p, out))?)
    })
}
