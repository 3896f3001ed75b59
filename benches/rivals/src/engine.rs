//! What every engine gets and must do.

use crate::support::layer::tensor::Values;
use crate::support::layer::{Failure, Result};
use crate::support::subject::{Batch, Subject};
use candle_core::{Device, Tensor};

/// One call's input, in the form that each engine wants, made before the clock starts.
pub struct Call {
    pub batch: Batch,
    /// `[T, H]`
    pub x: Tensor,
    /// `[T, E]`, f32
    pub logits: Tensor,
}

impl Call {
    pub fn new(batch: Batch, hidden: usize) -> Result<Self> {
        let logits = batch.logits.clone();
        let experts = logits.len() / batch.tokens;
        Ok(Self {
            x: tensor(batch.x.clone(), batch.tokens, hidden)?,
            logits: Tensor::from_vec(logits, (batch.tokens, experts), &Device::Cpu)
                .map_err(candle)?,
            batch,
        })
    }
}

/// A candle tensor `[rows, cols]` that takes the numbers over.
pub fn tensor(values: Values, rows: usize, cols: usize) -> Result<Tensor> {
    let shape = (rows, cols);
    match values {
        Values::F32(v) => Tensor::from_vec(v, shape, &Device::Cpu),
        Values::F16(v) => Tensor::from_vec(v, shape, &Device::Cpu),
        Values::BF16(v) => Tensor::from_vec(v, shape, &Device::Cpu),
    }
    .map_err(candle)
}

/// candle's error in our words.
pub fn candle(error: candle_core::Error) -> Failure {
    Failure(format!("candle: {error}"))
}

/// Computes a layer.
pub trait Engine {
    fn name(&self) -> &'static str;
    /// The timed part.
    fn forward(&mut self, call: &Call) -> Result<()>;
    /// The last call's output `[T, H]`, widened.
    fn output(&self, call: &Call) -> Result<Vec<f32>>;
}

impl Engine for Subject<'_> {
    fn name(&self) -> &'static str {
        "ours"
    }

    fn forward(&mut self, call: &Call) -> Result<()> {
        self.forward(&call.batch)
    }

    fn output(&self, call: &Call) -> Result<Vec<f32>> {
        Ok(self.output(&call.batch))
    }
}
