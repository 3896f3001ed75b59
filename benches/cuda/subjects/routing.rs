//! The router from f32 logits: softmax, top k, renormalised. Ids and weights must be the CPU's, bit for bit.

use super::{Result, Subject, Work, same};
use crate::data::normals;
use crate::gpu::{Buffer, Gpu};
use moe_kernels::cuda::routing::{RoutePointers, plan_route, workspace_size};
use moe_kernels::cuda::{DeviceInfo, Launch};
use moe_kernels::routing::{RouteInput, Router, RouterConfig, Routing};
use moe_kernels::{Cpu, DType, MatRef};

/// Logits come hot from the gate's product: few sets, so that choices differ, not so that the cache is cold.
const SETS: usize = 4;

struct Set {
    logits: Buffer,
    ids: Buffer,
    weights: Buffer,
    expected: Routing,
}

pub struct Route {
    config: RouterConfig,
    tokens: usize,
    sets: Vec<Set>,
    workspace: Buffer,
}

/// The CPU's choices.
pub fn on_cpu(config: &RouterConfig, logits: &[f32]) -> Result<Routing> {
    let router = Router::new(config.clone())?;
    let mut routing = Routing::new();
    let tokens = logits.len() / config.num_logits();
    let input = RouteInput::new(MatRef::new(logits, tokens, config.num_logits())?);
    router.route(&Cpu::new(), &input, &mut routing)?;
    Ok(routing)
}

impl Route {
    pub fn new(gpu: &Gpu, tokens: usize, experts: usize, top_k: usize) -> Result<Self> {
        let config = RouterConfig::mixtral(experts, top_k);
        let set = |i: usize| -> Result<Set> {
            let logits = normals(100 + i as u64, tokens * experts);
            Ok(Set {
                logits: gpu.upload(&logits)?,
                ids: gpu.alloc(4 * tokens * top_k)?,
                weights: gpu.alloc(4 * tokens * top_k)?,
                expected: on_cpu(&config, &logits)?,
            })
        };
        Ok(Self {
            sets: (0..SETS.min(gpu.most_sets))
                .map(set)
                .collect::<Result<_>>()?,
            workspace: gpu.alloc(workspace_size(&config, tokens)?)?,
            config,
            tokens,
        })
    }
}

impl Subject for Route {
    fn sets(&self) -> usize {
        self.sets.len()
    }

    fn work(&self) -> Work {
        let words = self.tokens * (self.config.num_experts + 2 * self.config.top_k);
        Work {
            flops: 0.0,
            bytes: 4.0 * words as f64,
        }
    }

    fn plan(&self, device: &DeviceInfo, set: usize) -> Result<Vec<Launch>> {
        let set = &self.sets[set];
        let pointers = RoutePointers {
            logits: set.logits.ptr,
            logits_stride: self.config.num_logits() as u64,
            ids: set.ids.ptr,
            weights: set.weights.ptr,
            workspace: self.workspace.ptr,
            ..RoutePointers::default()
        };
        let plan = plan_route(&self.config, self.tokens, DType::F32, 0, &pointers, device)?;
        Ok(plan.iter().cloned().collect())
    }

    fn poison(&self, gpu: &Gpu, set: usize) -> Result<()> {
        gpu.poison(&self.sets[set].ids)?;
        gpu.poison(&self.sets[set].weights)
    }

    fn check(&self, gpu: &Gpu, set: usize) -> Result<()> {
        let (set, pairs) = (&self.sets[set], self.tokens * self.config.top_k);
        same(
            "ids",
            &gpu.download::<i32>(&set.ids, 0, pairs)?,
            set.expected.ids(),
        )?;
        let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let found = gpu.download::<f32>(&set.weights, 0, pairs)?;
        same("weights", &bits(&found), &bits(set.expected.weights()))
    }
}
