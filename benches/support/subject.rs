//! Our layer with the buffers of its calls.

use super::layer::Result;
use super::layer::measure::Sample;
use super::layer::seeded::{Seeded, tokens as seeded_tokens};
use super::layer::shapes::Architecture;
use super::layer::source::Built;
use super::layer::tensor::Values;
use super::layer::{fail, oracle};
use super::load::Load;
use super::roof::Work;
use moe_kernels::moe::{Forward, RouteFrom};
use moe_kernels::routing::{LoadStats, Routing};
use moe_kernels::{Cpu, DType, MatRef};

/// The input of one call.
#[derive(Clone, Debug)]
pub struct Batch {
    pub tokens: usize,
    pub dtype: DType,
    /// `[T, H]`
    pub x: Values,
    /// `[T, E]`
    pub logits: Vec<f32>,
}

impl Batch {
    /// The `number`-th batch of `tokens` tokens.
    pub fn new(
        architecture: &Architecture,
        dtype: DType,
        load: Load,
        seed: u64,
        number: usize,
        tokens: usize,
    ) -> Self {
        let first = number * tokens;
        let x = seeded_tokens(seed, first, tokens, architecture.hidden, dtype);
        Self {
            tokens,
            dtype,
            x: Values::from_f32s(dtype, &x),
            logits: load.logits(seed, first, tokens, architecture.experts()),
        }
    }
}

/// Our layer. The caller owns all memory, and this is the caller.
pub struct Subject<'a> {
    cpu: &'a Cpu,
    built: &'a Built,
    architecture: &'a Architecture,
    routing: Routing,
    workspace: Vec<u8>,
    y: Values,
}

impl<'a> Subject<'a> {
    /// For calls of up to `most` tokens.
    ///
    /// # Errors
    /// Sizes that overflow.
    pub fn new(
        cpu: &'a Cpu,
        built: &'a Built,
        architecture: &'a Architecture,
        dtype: DType,
        most: usize,
    ) -> Result<Self> {
        Ok(Self {
            cpu,
            built,
            architecture,
            routing: Routing::with_capacity(most, built.layer.router())?,
            workspace: vec![0; built.layer.workspace_size(cpu, most)?],
            y: Values::zeros(dtype, most * architecture.hidden),
        })
    }

    /// The layer in one call, from the batch's logits.
    ///
    /// # Errors
    /// A batch larger than announced.
    pub fn forward(&mut self, batch: &Batch) -> Result<()> {
        let (t, hidden) = (batch.tokens, self.architecture.hidden);
        let logits = MatRef::new(&batch.logits, t, self.architecture.experts())?;
        let forward = Forward {
            route: RouteFrom::Logits(logits.into()),
            ..Forward::default()
        };
        Ok(self.built.layer.forward_with(
            self.cpu,
            batch.x.matrix(t, hidden)?,
            &forward,
            self.y.matrix_mut(t, hidden)?,
            &mut self.routing,
            &mut self.workspace,
        )?)
    }

    /// The last call's routing.
    pub fn routing(&self) -> &Routing {
        &self.routing
    }

    /// The last call's output `[T, H]`, widened.
    pub fn output(&self, batch: &Batch) -> Vec<f32> {
        let mut y = self.y.f32s();
        y.truncate(batch.tokens * self.architecture.hidden);
        y
    }

    /// The least work of the last call.
    pub fn work(&self, batch: &Batch) -> Work {
        let permutation = self.routing.permutation();
        let touched = permutation.counts().iter().filter(|&&c| c > 0).count();
        Work::new(
            self.architecture,
            batch.dtype,
            permutation.num_rows(),
            touched,
        )
    }

    /// Calls the layer and compares `tokens` of its tokens with the f64 reference.
    ///
    /// # Errors
    /// An output that is further away than rounding explains.
    pub fn check(&mut self, batch: &Batch, weights: &mut Seeded, tokens: usize) -> Result<()> {
        self.forward(batch)?;
        let sample = Sample {
            tokens: batch.tokens,
            x: batch.x.f32s(),
            logits: batch.logits.clone(),
            ids: self.routing.ids().to_vec(),
            weights: self.routing.weights().to_vec(),
            y: self.output(batch),
            load: LoadStats::of(&self.routing),
        };
        let (architecture, dtype) = (self.architecture, batch.dtype);
        let checked = oracle::check_from_logits(architecture, weights, dtype, &sample, tokens)?;
        if checked.passed() {
            return Ok(());
        }
        fail(format!(
            "{} {dtype} T = {}: not within rounding of the f64 reference: {checked:?}",
            architecture.name, batch.tokens
        ))
    }
}
