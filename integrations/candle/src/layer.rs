//! The layer that models hold.

use crate::ops::{Call, CallInto, CallLogits, CallRouted};
use crate::view::{is_at, refused, with_matrix};
use crate::workspaces::Workspaces;
use candle_core::{CustomOp1, DeviceLocation, Module, Result, Tensor};
use moe_kernels::Cpu;
use moe_kernels::experts::PackedExperts;
use moe_kernels::moe::{self, Gate};
use moe_kernels::routing::{Router, RouterConfig};
use std::fmt;
use std::sync::Arc;

/// What a call needs and shares with other calls.
#[derive(Debug)]
pub(crate) struct Shared {
    pub cpu: Cpu,
    pub layer: moe::MoeLayer,
    pub workspaces: Workspaces,
}

/// A mixture-of-experts layer with candle tensors in and out: `y[t] = Σ_slot weight · expert(x[t])`, see [`moe_kernels::moe::MoeLayer`].
///
/// A handle: clones share the packed weights. Calls may come from many threads at once; each takes a workspace of its own from [`Workspaces`].
///
/// x is `[T, H]`, `[B, S, H]` or any `[.., H]`, in f32, f16 or bf16, and y is a new contiguous tensor of x's shape and format. The formats of x and of
/// the weights may differ. x is read through its strides; its rows must be evenly spaced (contiguous tensors, slices of them, transposed matrices and
/// broadcasts are), else the call is refused with an error that says to call `contiguous()`.
#[derive(Clone)]
pub struct MoeLayer {
    shared: Arc<Shared>,
    /// Made once, so that a call does not allocate it.
    op: Arc<Box<dyn CustomOp1 + Send + Sync>>,
}

impl fmt::Debug for MoeLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.shared.fmt(f)
    }
}

impl MoeLayer {
    /// A layer of a router, its projection `gate [R, H]` without bias, and experts packed by [`experts`](crate::experts) for the same `cpu`.
    ///
    /// # Errors
    /// What the router, the gate or the layer refuses, naming the argument.
    pub fn new(
        cpu: Cpu,
        router: RouterConfig,
        gate: &Tensor,
        experts: PackedExperts,
    ) -> Result<Self> {
        let router = Router::new(router).map_err(refused)?;
        let gate = self::gate(&cpu, gate)?;
        let layer = moe::MoeLayer::new(router, experts).and_then(|layer| layer.with_gate(gate));
        Ok(Self::from_layer(cpu, layer.map_err(refused)?))
    }

    /// Any layer of the kernels: with shared experts, norms, a latent space, correction bias, or without a gate. `cpu` is the one that it was packed for.
    pub fn from_layer(cpu: Cpu, layer: moe::MoeLayer) -> Self {
        Self::from_shared(Shared {
            cpu,
            layer,
            workspaces: Workspaces::shared(),
        })
    }

    fn from_shared(shared: Shared) -> Self {
        let shared = Arc::new(shared);
        let op: Box<dyn CustomOp1 + Send + Sync> = Box::new(Call(shared.clone()));
        Self {
            shared,
            op: Arc::new(op),
        }
    }

    /// The same layer with other workspaces than the process's. The weights are copied when another clone of this layer is alive.
    pub fn with_workspaces(self, workspaces: Workspaces) -> Self {
        let Self { shared, op } = self;
        drop(op);
        let (cpu, layer) = match Arc::try_unwrap(shared) {
            Ok(shared) => (shared.cpu, shared.layer),
            Err(shared) => (shared.cpu, shared.layer.clone()),
        };
        Self::from_shared(Shared {
            cpu,
            layer,
            workspaces,
        })
    }

    /// The layer inside.
    pub fn layer(&self) -> &moe::MoeLayer {
        &self.shared.layer
    }

    /// The instruction set and threads that calls use.
    pub fn cpu(&self) -> Cpu {
        self.shared.cpu
    }

    /// The layer: `y [.., H]` from `x [.., H]`.
    ///
    /// # Errors
    /// x on another device, of another format or width, or with rows that are not evenly spaced.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        on_cpu([("x", x)])?;
        x.apply_op1_arc(self.op.clone())
    }

    /// The layer into a tensor that exists: y of x's shape, any of the three formats, rows contiguous and evenly spaced. Every tensor that shares y's
    /// storage sees the change. Allocates nothing.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); y of another shape, or sharing its storage with x; y is untouched then.
    pub fn forward_into(&self, x: &Tensor, y: &Tensor) -> Result<()> {
        on_cpu([("x", x), ("y", y)])?;
        y.inplace_op2(x, &CallInto(&self.shared))
    }

    /// As [`forward`](Self::forward), with the router's logits `[.., R]` (f32, f16 or bf16) from elsewhere. The layer needs no gate. No gradient flows.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); logits that are not one row of R for each token.
    pub fn forward_logits(&self, x: &Tensor, logits: &Tensor) -> Result<Tensor> {
        on_cpu([("x", x), ("logits", logits)])?;
        x.apply_op2_no_bwd(logits, &CallLogits(&self.shared))
    }

    /// As [`forward`](Self::forward), with the routing from elsewhere: `ids [.., K]` (u32, i32 or i64) and `weights [.., K]` (f32), both contiguous, used as they are.
    /// For models whose routing is their own. No gradient flows.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); ids that name no expert, or shapes that do not agree.
    pub fn forward_routed(&self, x: &Tensor, ids: &Tensor, weights: &Tensor) -> Result<Tensor> {
        on_cpu([("x", x), ("ids", ids), ("weights", weights)])?;
        x.apply_op3_no_bwd(ids, weights, &CallRouted(&self.shared))
    }
}

impl Module for MoeLayer {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        MoeLayer::forward(self, x)
    }
}

fn on_cpu<const N: usize>(tensors: [(&str, &Tensor); N]) -> Result<()> {
    tensors
        .iter()
        .try_for_each(|(argument, tensor)| is_at(argument, tensor, DeviceLocation::Cpu))
}

/// The projection to logits from a tensor `[R, H]`, widened to f32.
///
/// # Errors
/// What [`Gate::new`] refuses.
pub(crate) fn gate(cpu: &Cpu, w: &Tensor) -> Result<Gate> {
    let (_, _) = w.dims2()?;
    with_matrix("gate", w, |w| Gate::new(cpu, w, None).map_err(refused))
}
