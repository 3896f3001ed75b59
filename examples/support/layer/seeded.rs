//! Weights and tokens from a seed, one expert at a time: the same numbers on every machine, whatever the number of threads.

use super::shapes::{Architecture, Join};
use super::source::{RouterTensors, SharedTensors, Source};
use super::tensor::{Expert, GateUp, Matrix, Values};
use super::{Result, tensor::round_to};
use half::{bf16, f16};
use moe_kernels::DType;
use rayon::prelude::*;

/// What a stream of numbers is for; streams of one seed are independent.
#[derive(Clone, Copy)]
pub enum Stream {
    Router,
    RouterBias,
    Correction,
    Tokens,
    Direction,
    SharedGate,
    /// Logits that are given to the layer, and the experts' order of popularity.
    Logits,
    Popularity,
    /// The shared expert, or routed expert e, and which of its tensors.
    Shared(u64),
    Expert(usize, u64),
}

/// Number i of a stream, uniform in −1..1.
#[derive(Clone, Copy)]
pub struct Generator {
    key: u64,
}

/// SplitMix64's finaliser (Steele et al. 2014): a bijection whose outputs look independent for successive inputs.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Generator {
    pub fn new(seed: u64, stream: Stream) -> Self {
        let name = match stream {
            Stream::Router => 1,
            Stream::RouterBias => 2,
            Stream::Correction => 3,
            Stream::Tokens => 4,
            Stream::Direction => 5,
            Stream::SharedGate => 6,
            Stream::Logits => 7,
            Stream::Popularity => 8,
            Stream::Shared(part) => 0x100 + part,
            Stream::Expert(e, part) => 0x1000 + 8 * e as u64 + part,
        };
        Self {
            key: mix(mix(seed) ^ name.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
        }
    }

    pub fn at(self, i: usize) -> f32 {
        let bits = mix(self
            .key
            .wrapping_add((i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        (bits >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    /// n numbers of variance `scale²`.
    pub fn values(self, dtype: DType, n: usize, scale: f32) -> Values {
        let scale = scale * 3f32.sqrt();
        match dtype {
            DType::F16 => Values::F16(self.fill(n, |v| f16::from_f32(v * scale))),
            DType::BF16 => Values::BF16(self.fill(n, |v| bf16::from_f32(v * scale))),
            _ => Values::F32(self.fill(n, |v| v * scale)),
        }
    }

    fn fill<T: Copy + Default + Send>(self, n: usize, of: impl Fn(f32) -> T + Sync) -> Vec<T> {
        const PART: usize = 1 << 16;
        let mut values = vec![T::default(); n];
        values
            .par_chunks_mut(PART)
            .enumerate()
            .for_each(|(part, values)| {
                for (i, v) in values.iter_mut().enumerate() {
                    *v = of(self.at(part * PART + i));
                }
            });
        values
    }

    /// n f32 numbers of variance `scale²`.
    pub fn floats(self, n: usize, scale: f32) -> Vec<f32> {
        match self.values(DType::F32, n, scale) {
            Values::F32(v) => v,
            _ => Vec::new(),
        }
    }
}

/// A layer made from a seed. Weights have variance 1/fan-in, so that sums stay near 1, as in a trained layer.
pub struct Seeded {
    pub architecture: Architecture,
    pub seed: u64,
    pub dtype: DType,
}

impl Seeded {
    fn matrix(&self, stream: Stream, rows: usize, cols: usize) -> Matrix {
        let scale = (cols as f32).sqrt().recip();
        let values = Generator::new(self.seed, stream).values(self.dtype, rows * cols, scale);
        Matrix::new(values, rows, cols)
    }

    fn expert_of(&self, stream: impl Fn(u64) -> Stream, inner: usize, biases: bool) -> Expert {
        let hidden = self.architecture.hidden;
        let bias = |part, n| biases.then(|| Generator::new(self.seed, stream(part)).floats(n, 0.1));
        Expert {
            gate_up: GateUp::Separate(
                self.matrix(stream(0), inner, hidden),
                self.matrix(stream(1), inner, hidden),
            ),
            down: self.matrix(stream(2), hidden, inner),
            gate_bias: bias(3, inner),
            up_bias: bias(4, inner),
            down_bias: bias(5, hidden),
        }
    }
}

impl Source for Seeded {
    fn router(&mut self) -> Result<RouterTensors> {
        let a = &self.architecture;
        let rows = a.router.num_logits();
        let floats = |stream, n, scale| Generator::new(self.seed, stream).floats(n, scale);
        Ok(RouterTensors {
            weight: self.matrix(Stream::Router, rows, a.hidden),
            bias: a.biases.then(|| floats(Stream::RouterBias, rows, 0.1)),
            correction: a
                .correction_bias
                .then(|| floats(Stream::Correction, rows, 0.02)),
        })
    }

    fn expert(&mut self, e: usize) -> Result<Expert> {
        let a = &self.architecture;
        Ok(self.expert_of(|part| Stream::Expert(e, part), a.intermediate, a.biases))
    }

    fn shared(&mut self) -> Result<Option<SharedTensors>> {
        let Some(shape) = self.architecture.shared else {
            return Ok(None);
        };
        let expert = self.expert_of(Stream::Shared, shape.intermediate, false);
        let gate = (shape.join == Join::SigmoidGate)
            .then(|| self.matrix(Stream::SharedGate, 1, self.architecture.hidden));
        Ok(Some(SharedTensors { expert, gate }))
    }
}

/// `tokens` tokens of width `hidden` from the `first`-th on, of mean square about 1, rounded to `dtype`.
///
/// They share a direction, as hidden states do; so some experts are busier than others.
pub fn tokens(seed: u64, first: usize, tokens: usize, hidden: usize, dtype: DType) -> Vec<f32> {
    const COMMON: f32 = 0.3;
    let common = Generator::new(seed, Stream::Direction).floats(hidden, COMMON);
    let own = Generator::new(seed, Stream::Tokens);
    let scale = (3.0 * (1.0 - COMMON * COMMON)).sqrt();
    (0..tokens * hidden)
        .into_par_iter()
        .map(|i| {
            let own = own.at(first * hidden + i) * scale;
            round_to(common[i % hidden] + own, dtype)
        })
        .collect()
}
