//! Inputs and copies of the weights that take turns.
//!
//! A model comes back to a layer only after it has read all its other layers, so the L2 holds nothing of it. Calls on one copy of the weights, one after
//! the other, would read from the L2 what a model reads from memory. So calls take turns with copies until so much has been read between two calls on one copy that it is gone.

use super::super::Result;
use super::super::device::Matrix;
use super::super::seeded::tokens as seeded_tokens;
use super::OnGpu;
use super::weights::Weights;

/// Between two calls on one copy of the weights so many times the L2 is to be read.
const L2_TIMES: u64 = 3;
/// More than that are not made, however small the layer.
const MOST_COPIES: u64 = 16;
/// Inputs at least, each with other tokens.
const LEAST_INPUTS: usize = 4;

/// What takes turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotation {
    /// Copies of the weights.
    pub copies: usize,
    /// Inputs, each with an output; a multiple of the copies.
    pub inputs: usize,
    /// Bytes of weights read between two calls on one copy.
    pub read_between: u64,
    /// Bytes of the L2.
    pub l2: u64,
}

impl Rotation {
    /// For calls that each read `touched` bytes of weights. `room` more copies fit the memory.
    pub fn new(touched: u64, l2: u64, room: u64) -> Self {
        let touched = touched.max(1);
        // One call that reads that much more than the L2 holds leaves nothing of its own beginning.
        let wanted = match touched > (L2_TIMES + 1) * l2 {
            true => 1,
            false => 1 + (L2_TIMES * l2).div_ceil(touched),
        };
        let copies = wanted.min(MOST_COPIES).min(1 + room);
        let copies_before = if wanted == 1 { 1 } else { copies - 1 };
        let copies = copies as usize;
        Self {
            copies,
            inputs: copies * LEAST_INPUTS.div_ceil(copies),
            read_between: copies_before * touched,
            l2,
        }
    }

    /// Whether the weights come from memory.
    pub fn is_cold(&self) -> bool {
        self.read_between >= L2_TIMES * self.l2
    }
}

/// One input and its output.
pub struct Turn {
    pub x: Matrix,
    pub y: Matrix,
    /// Which copy of the weights.
    pub copy: usize,
}

impl Turn {
    /// The `n`-th batch of tokens of a seed.
    pub fn new(on: &OnGpu<'_>, seed: u64, n: usize, tokens: usize, copy: usize) -> Result<Self> {
        let hidden = on.architecture.hidden;
        let x = seeded_tokens(seed, n * tokens, tokens, hidden, on.dtype);
        Ok(Self {
            x: Matrix::new(on.gpu, on.dtype, &x, tokens, hidden)?,
            y: Matrix::zeros(on.gpu, on.dtype, tokens, hidden)?,
            copy,
        })
    }
}

/// Makes or drops copies until there are `wanted`.
pub fn adjust(on: &OnGpu<'_>, weights: &mut Vec<Weights>, wanted: usize) -> Result<()> {
    weights.truncate(wanted.max(1));
    while weights.len() < wanted {
        let copy = weights[0].duplicate(on.gpu)?;
        weights.push(copy);
    }
    Ok(on.gpu.synchronize()?)
}
