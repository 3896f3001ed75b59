//! The whole layer from given logits, bf16, SwiGLU: routing, sort, two products, combine. The router's product is left out, as in the CPU's benches.

use super::routing::on_cpu;
use super::{Result, Subject, Work, near};
use crate::data::{dot, normals, spread};
use crate::gpu::{Buffer, Gpu};
use crate::tape::{Filled, Tape};
use half::bf16;
use moe_kernels::DType;
use moe_kernels::cuda::combine::DeviceRows;
use moe_kernels::cuda::moe::{
    CudaMoeLayer, ExpertPointers, MoePointers, RoutingPointers, WeightPointers,
};
use moe_kernels::cuda::{DeviceInfo, DevicePtr, Launch};
use moe_kernels::grouped_gemm::Activation;
use moe_kernels::routing::{RouterConfig, Routing};
use std::cell::OnceCell;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerShape {
    pub tokens: usize,
    pub hidden: usize,
    pub intermediate: usize,
    pub experts: usize,
    pub top_k: usize,
    /// Experts' rows in f32 until they are summed; otherwise bf16, as every peer has them.
    pub ys_f32: bool,
}

/// One batch of tokens.
struct Set {
    x: Filled,
    logits: Buffer,
    y: Buffer,
    routing: Routing,
    /// Some tokens and what they become, by the definition: computed once, since many plans may be held against it.
    expected: OnceCell<Vec<(usize, Vec<f64>)>>,
}

pub struct Layer {
    shape: LayerShape,
    layer: CudaMoeLayer,
    /// `[E, 2I, H]` and `[E, H, I]`
    up: Filled,
    down: Filled,
    workspace: Buffer,
    sets: Vec<Set>,
}

impl Layer {
    pub fn new(gpu: &Gpu, shape: LayerShape) -> Result<Self> {
        let (t, h, i, e) = (
            shape.tokens,
            shape.hidden,
            shape.intermediate,
            shape.experts,
        );
        let config = RouterConfig::mixtral(e, shape.top_k);
        let mut layer = CudaMoeLayer::new(config.clone(), h, i, Activation::SWIGLU, DType::BF16)?;
        if !shape.ys_f32 {
            layer = layer.with_ys_dtype(DType::BF16);
        }
        let set = |n: usize| -> Result<Set> {
            let logits = normals(300 + n as u64, t * e);
            Ok(Set {
                x: gpu.filled(Tape::Input, 7919 * n, t * h)?,
                logits: gpu.upload(&logits)?,
                y: gpu.alloc(2 * t * h)?,
                routing: on_cpu(&config, &logits)?,
                expected: OnceCell::new(),
            })
        };
        // Weights are read once by each call and far larger than the L2, but few tokens want few experts: others in each turn.
        let sets = gpu.most_sets.min(if t > 512 { 2 } else { 16 });
        let sets: Vec<Set> = (0..sets).map(set).collect::<Result<_>>()?;
        Ok(Self {
            up: gpu.filled(Tape::Weight, 0, e * 2 * i * h)?,
            down: gpu.filled(Tape::Weight, 1_299_709, e * h * i)?,
            workspace: gpu.alloc(layer.workspace_size(t, gpu.info())?)?,
            sets,
            layer,
            shape,
        })
    }

    /// A token by the definition, in f64 with h rounded to bf16.
    fn token(&self, set: &Set, token: usize) -> Vec<f64> {
        let (h, i, k) = (self.shape.hidden, self.shape.intermediate, self.shape.top_k);
        let x = set.x.numbers(token * h, h);
        let mut y = vec![0.0; h];
        for pair in token * k..token * k + k {
            let expert = set.routing.ids()[pair] as usize;
            let weight = f64::from(set.routing.weights()[pair]);
            let row = |n: usize| self.up.numbers((expert * 2 * i + n) * h, h);
            let middle: Vec<f32> = (0..i)
                .map(|n| {
                    let (gate, up) = (dot(&x, &row(n)).0, dot(&x, &row(i + n)).0);
                    bf16::from_f64(gate / (1.0 + (-gate).exp()) * up).to_f32()
                })
                .collect();
            for (n, y) in y.iter_mut().enumerate() {
                let w = self.down.numbers((expert * h + n) * i, i);
                *y += weight * dot(&middle, &w).0;
            }
        }
        y
    }
}

impl Subject for Layer {
    fn sets(&self) -> usize {
        self.sets.len()
    }

    /// Weights of the experts that the batch touches, x, logits and y once.
    fn work(&self) -> Work {
        let s = &self.shape;
        let expert = 3.0 * s.hidden as f64 * s.intermediate as f64;
        let touched = |set: &Set| {
            let counts = set.routing.permutation().counts();
            counts.iter().filter(|&&c| c > 0).count() as f64
        };
        let touched = self.sets.iter().map(touched).sum::<f64>() / self.sets.len() as f64;
        let tokens = s.tokens as f64;
        Work {
            flops: 2.0 * tokens * s.top_k as f64 * expert,
            bytes: 2.0 * touched * expert
                + tokens * (4.0 * s.hidden as f64 + 4.0 * s.experts as f64),
        }
    }

    fn plan(&self, device: &DeviceInfo, set: usize) -> Result<Vec<Launch>> {
        let (s, set) = (&self.shape, &self.sets[set]);
        let rows = |ptr: DevicePtr, stride, dtype| DeviceRows { ptr, stride, dtype };
        let weights = |filled: &Filled, n, k| {
            WeightPointers::contiguous(filled.buffer.ptr, DType::BF16, n, k)
        };
        let experts = ExpertPointers::fused(
            weights(&self.up, 2 * s.intermediate, s.hidden),
            s.intermediate,
            weights(&self.down, s.hidden, s.intermediate),
        );
        let pointers = MoePointers::new(
            rows(set.x.buffer.ptr, s.hidden, DType::BF16),
            RoutingPointers::Logits(rows(set.logits.ptr, s.experts, DType::F32)),
            experts,
            rows(set.y.ptr, s.hidden, DType::BF16),
            self.workspace.ptr,
        );
        let plan = self.layer.plan(s.tokens, &pointers, device)?;
        Ok(plan.iter().cloned().collect())
    }

    fn poison(&self, gpu: &Gpu, set: usize) -> Result<()> {
        gpu.poison(&self.workspace)?;
        gpu.poison(&self.sets[set].y)
    }

    /// All of it written; two tokens against f64.
    fn check(&self, gpu: &Gpu, set: usize) -> Result<()> {
        let (h, set) = (self.shape.hidden, &self.sets[set]);
        gpu.all_written::<u16>(&set.y)?;
        let expected = set.expected.get_or_init(|| {
            let tokens = spread(self.shape.tokens, 2);
            tokens.map(|t| (t, self.token(set, t))).collect()
        });
        for (token, expected) in expected {
            let found: Vec<bf16> = gpu.download(&set.y, token * h, h)?;
            let (mut off, mut norm) = (0.0, 0.0);
            for (found, expected) in found.iter().zip(expected) {
                off += (found.to_f64() - expected).powi(2);
                norm += expected * expected;
            }
            let error = (off / norm).sqrt();
            // Roundings to bf16 of h, ys and y; twice what a dozen independent ones make.
            let tolerance = 2.0 * 12f64.sqrt() / 512.0;
            let place = format!("token {token}: distance from f64, relatively");
            near(&place, error, 0.0, tolerance)?;
        }
        Ok(())
    }
}
