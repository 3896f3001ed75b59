//! Candle's own sparse-MoE blocks, to run beside ours on the same tensors.
//!
//! The blocks are private to candle-transformers. What is public is the models, so that a model of one layer is made whose
//! rest does next to nothing, from a source of tensors that answers every name:
//!
//! ```text
//! embed_tokens = X (2⁻⁶ · noise)     x = X[ids]
//! attention    = 0                    x + 0
//! ln2: eps 2¹⁸, weight 2¹⁵            h2 ≈ 2⁶ · x, the block's input
//! block                               x + block(h2), the block's output being the larger by far
//! norm: eps 2¹⁸, weight 2⁹            ≈ the same
//! lm_head = the first rows of 1       its first V features
//! ```
//!
//! Norms with a large eps are all but linear, so that no error in scale hides in them. Tokens are sequences of length 1 in a batch of T, so that models that
//! answer for the last position only answer for every token. What the rest costs is measured with the same model around a block of width 1.

// The tests and the example each use a part of it.
#![allow(dead_code)]

pub mod check;
pub mod model;
pub mod weights;

/// A model of candle-transformers that has experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Family {
    Qwen3,
    Mixtral,
    Qwen2,
    DeepSeek2,
}

/// Sizes of a block.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub experts: usize,
    pub top_k: usize,
    pub hidden: usize,
    pub intermediate: usize,
    /// Width of the shared expert of Qwen2-MoE and DeepSeek-V2.
    pub shared: usize,
    /// Rows of the embedding: the most tokens of a call, and the features that are compared.
    pub vocab: usize,
}
