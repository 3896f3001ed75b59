//! Matrix products over ragged groups of rows: the experts.
//!
//! For each expert e, with its rows r in `offsets[e] .. offsets[e] + counts[e]`:
//!
//! ```text
//! out[r] = act( A[r] · W[e]ᵀ + b[e] )          A[r] = x[pair_of_row[r] / slots], or x[r]
//! ```
//!
//! Weights are out-features first (`[N, K]`), as strided views of any layout, packed once by [`PackedMatrices::push`]; a gated pair of projections is packed
//! side by side and gives `act(gate) · up`.
//!
//! # Numerics
//! Every output element is one chain of fused multiply-adds in f32 from +0, in ascending k (bf16 weights: pairs of k, odd element first). Then the bias is
//! added, then the activation applied, then the result rounded once to the output's format. Subnormal bf16 numbers are read as zeros of their
//! sign, weights and, where the weights are bf16, activations alike, since that is what x86's native bf16 instruction does. So the
//! bits depend on neither the instruction set, the number of threads, nor the other rows. Two exceptions: the payload of a NaN, and a partial sum that is
//! itself subnormal, once x86's native bf16 instruction is in use.

mod activation;
mod groups;
mod packed;

pub use activation::{Activation, ActivationFunction, Clamp};
pub use groups::Groups;
pub use packed::PackedMatrices;

use crate::cpu::Cpu;
use crate::cpu::grouped_gemm::{self as kernel, RowSource};
use crate::error::{Error, Result};
use crate::matrix::{AnyMatMut, AnyMatRef};

/// The rows of A: gathered from x, or x itself.
#[derive(Clone, Copy, Debug)]
pub struct Gather<'a> {
    /// For each row its pair t·slots + slot, `[rows]`; entries of padding rows are not read.
    pub pair_of_row: &'a [u32],
    /// Pairs of a token.
    pub slots: usize,
    /// Factor on each pair's input `[T·slots]`, for experts whose weight acts on their input (Llama 4). The product is rounded to
    /// x's format.
    pub input_scale: Option<&'a [f32]>,
}

/// Bytes of scratch memory that [`grouped_gemm_into`] needs on `cpu` (it depends on the number of threads only).
pub fn scratch_bytes(cpu: &Cpu) -> usize {
    kernel::scratch_bytes(cpu)
}

/// The grouped product: `out[r] = act(A[r] · W[e]ᵀ + b[e])` for each row r of each expert e. See the [module](self) for the numerics.
///
/// `x` is `[rows, K]`, or `[T, K]` with a [`Gather`]; `out` is `[rows, N]` in any format; rows of padding are left as they are. `activation` must be gated exactly when the
/// weights are; `None` leaves a plain product as it is. `scratch` holds [`scratch_bytes`] bytes.
///
/// # Errors
/// An [`Error`] that names the argument; nothing is written then.
pub fn grouped_gemm_into(
    cpu: &Cpu,
    x: AnyMatRef<'_>,
    gather: Option<Gather<'_>>,
    weights: &PackedMatrices,
    groups: Groups<'_>,
    activation: Option<Activation>,
    out: AnyMatMut<'_>,
    scratch: &mut [u8],
) -> Result<()> {
    check_product(cpu, &x, gather.as_ref(), weights, &groups, activation)?;
    out.expect("out", groups.total_rows(), weights.n())?;
    check_scratch(cpu, scratch)?;
    kernel::run(
        cpu,
        rows_of(x, gather),
        weights,
        groups,
        activation,
        out,
        scratch,
    );
    Ok(())
}

/// Both products of experts, `h = act(A · W_upᵀ + b)` and `ys = h · W_downᵀ + b`: the same bits as two calls of [`grouped_gemm_into`], in one parallel
/// region. `h` is `[rows, I]`, in x's format as a rule; `ys` is `[rows, N]`.
///
/// # Errors
/// An [`Error`] that names the argument; nothing is written then.
pub(crate) fn experts_into(
    cpu: &Cpu,
    x: AnyMatRef<'_>,
    gather: Option<Gather<'_>>,
    (up, down): (&PackedMatrices, &PackedMatrices),
    groups: Groups<'_>,
    activation: Activation,
    h: AnyMatMut<'_>,
    ys: AnyMatMut<'_>,
    scratch: &mut [u8],
) -> Result<()> {
    check_product(cpu, &x, gather.as_ref(), up, &groups, Some(activation))?;
    down.check_isa("weights", cpu)?;
    let rows = groups.total_rows();
    h.expect("h", rows, up.n())?;
    let (expected, found) = ([up.len(), up.n()], [down.len(), down.k()]);
    if expected != found || down.is_gated() {
        return Err(Error::shape("down", expected, found));
    }
    ys.expect("ys", rows, down.n())?;
    check_scratch(cpu, scratch)?;
    let source = rows_of(x, gather);
    kernel::run_experts(cpu, source, (up, down), groups, activation, h, ys, scratch);
    Ok(())
}

fn rows_of<'a>(x: AnyMatRef<'a>, gather: Option<Gather<'a>>) -> RowSource<'a> {
    let mut source = RowSource::new(x);
    source.gather = gather.map(|g| (g.pair_of_row, g.slots));
    source.scale = gather.and_then(|g| g.input_scale);
    source
}

fn check_scratch(cpu: &Cpu, scratch: &[u8]) -> Result<()> {
    let needed = scratch_bytes(cpu);
    if scratch.len() < needed {
        return Err(Error::BufferTooSmall {
            argument: "scratch",
            needed,
            found: scratch.len(),
        });
    }
    Ok(())
}

/// The operands of a product, but for where it goes.
fn check_product(
    cpu: &Cpu,
    x: &AnyMatRef<'_>,
    gather: Option<&Gather<'_>>,
    weights: &PackedMatrices,
    groups: &Groups<'_>,
    activation: Option<Activation>,
) -> Result<()> {
    weights.check_isa("weights", cpu)?;
    let experts = weights.len();
    if experts == 0 {
        return Err(Error::value("weights", "at least one matrix", 0));
    }
    groups.validate(experts)?;
    if x.cols() != weights.k() {
        return Err(Error::shape(
            "x",
            ("rows", weights.k()),
            [x.rows(), x.cols()],
        ));
    }
    match gather {
        Some(gather) => check_gather(gather, groups, x.rows())?,
        None => x.expect("x", groups.total_rows(), weights.k())?,
    }
    match activation {
        Some(activation) => {
            activation.validate()?;
            if activation.gated != weights.is_gated() {
                return Err(Error::value(
                    "activation",
                    format!("gated = {}, as the weights are", weights.is_gated()),
                    activation.gated,
                ));
            }
            Ok(())
        }
        None if weights.is_gated() => Err(Error::value(
            "activation",
            "one, since the weights are gated",
            "none",
        )),
        None => Ok(()),
    }
}

fn check_gather(gather: &Gather<'_>, groups: &Groups<'_>, tokens: usize) -> Result<()> {
    let rows = groups.total_rows();
    if gather.pair_of_row.len() < rows {
        return Err(Error::shape(
            "pair_of_row",
            [rows],
            [gather.pair_of_row.len()],
        ));
    }
    if gather.slots == 0 {
        return Err(Error::value("slots", "at least 1", 0));
    }
    let pairs = crate::shape::pairs(tokens, gather.slots)?;
    if let Some(scale) = gather.input_scale
        && scale.len() != pairs
    {
        return Err(Error::shape("input_scale", [pairs], [scale.len()]));
    }
    for expert in 0..groups.experts() {
        let range = groups.rows_of(expert);
        if let Some(&bad) = gather.pair_of_row[range]
            .iter()
            .find(|&&p| p as usize >= pairs)
        {
            return Err(Error::value(
                "pair_of_row",
                format!("pairs below {pairs}"),
                bad,
            ));
        }
    }
    Ok(())
}
