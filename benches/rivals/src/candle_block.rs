//! candle's block of experts.
//!
//! In candle-transformers 0.11 the blocks of all models (qwen3_moe, qwen2_moe, mixtral, …) are private, and `fused_moe` has CUDA kernels only. This is their
//! common structure in our own code, on candle's tensors and `candle_nn::Linear`: softmax and full sort of the probabilities, lists of tokens by expert built on the
//! host, then for each expert index_select, three linear layers, the weights, index_add. It differs in one thing: the softmax is over f32 logits in every format, so
//! that it chooses the experts that the others choose.

use crate::engine::{Call, Engine, candle};
use crate::support::layer::Result;
use crate::support::layer::shapes::Architecture;
use crate::weights::RowMajor;
use candle_core::{D, DType, Module, Tensor};
use candle_nn::ops::{silu, softmax_last_dim};
use moe_kernels::routing::Renorm;

/// The block.
pub struct Block<'a> {
    experts: &'a [RowMajor],
    top_k: usize,
    renormalise: bool,
    y: Option<Tensor>,
}

impl<'a> Block<'a> {
    pub fn new(architecture: &Architecture, experts: &'a [RowMajor]) -> Self {
        Self {
            experts,
            top_k: architecture.router.top_k,
            renormalise: architecture.router.renorm != Renorm::None,
            y: None,
        }
    }

    /// For each expert its tokens and their weights.
    fn route(&self, logits: &Tensor) -> candle_core::Result<Vec<(Vec<u32>, Vec<f32>)>> {
        let probabilities = softmax_last_dim(logits)?;
        let ids = probabilities
            .arg_sort_last_dim(false)?
            .narrow(D::Minus1, 0, self.top_k)?
            .contiguous()?;
        let weights = probabilities.gather(&ids, D::Minus1)?.to_vec2::<f32>()?;
        let mut chosen = vec![(Vec::new(), Vec::new()); self.experts.len()];
        for (t, (ids, weights)) in ids.to_vec2::<u32>()?.iter().zip(&weights).enumerate() {
            let sum: f32 = weights.iter().sum();
            for (&id, &weight) in ids.iter().zip(weights) {
                let (tokens, factors) = &mut chosen[id as usize];
                tokens.push(t as u32);
                factors.push(if self.renormalise {
                    weight / sum
                } else {
                    weight
                });
            }
        }
        Ok(chosen)
    }

    fn run(&self, x: &Tensor, logits: &Tensor) -> candle_core::Result<Tensor> {
        let mut y = x.zeros_like()?;
        for (expert, (tokens, weights)) in self.experts.iter().zip(self.route(logits)?) {
            if tokens.is_empty() {
                continue;
            }
            let tokens = Tensor::new(tokens, x.device())?;
            let weights = Tensor::new(weights, x.device())?;
            let weights = weights.reshape(((), 1))?.to_dtype(x.dtype())?;
            let rows = x.index_select(&tokens, 0)?;
            let h = (silu(&expert.gate.forward(&rows)?)? * expert.up.forward(&rows)?)?;
            let out = expert.down.forward(&h)?.broadcast_mul(&weights)?;
            y = y.index_add(&tokens, &out, 0)?;
        }
        Ok(y)
    }
}

impl Engine for Block<'_> {
    fn name(&self) -> &'static str {
        "candle"
    }

    fn forward(&mut self, call: &Call) -> Result<()> {
        self.y = Some(self.run(&call.x, &call.logits).map_err(candle)?);
        Ok(())
    }

    fn output(&self, _: &Call) -> Result<Vec<f32>> {
        let Some(y) = &self.y else {
            return Ok(Vec::new());
        };
        let widened = y.to_dtype(DType::F32).and_then(|y| y.flatten_all());
        widened.and_then(|y| y.to_vec1()).map_err(candle)
    }
}
