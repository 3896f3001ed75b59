//! The layer that models on a GPU hold.

use super::launch::Kernels;
use super::operands::Operands;
use super::ops::{Call, CallInto, CallLogits, CallRouted};
use super::weights::{Experts, Pointers, Weights};
use super::workspaces::CudaWorkspaces;
use crate::view::{format, is_at, refused};
use candle_core::{CustomOp1, Device, Module, Result, Storage, Tensor, bail};
use moe_kernels::cuda::combine::DeviceRows;
use moe_kernels::cuda::moe::{self as plain, MoePointers, RoutingPointers};
use moe_kernels::cuda::{DeviceInfo, DevicePtr};
use moe_kernels::grouped_gemm::Activation;
use moe_kernels::routing::RouterConfig;
use std::fmt;
use std::sync::Arc;

/// What a call needs and shares with other calls.
pub(super) struct Shared {
    pub layer: plain::CudaMoeLayer,
    pub weights: Weights,
    pub kernels: Kernels,
    pub workspaces: CudaWorkspaces,
}

/// Where a call's routing comes from.
#[derive(Clone, Copy)]
pub(super) enum Route {
    /// The layer's gate.
    Gate,
    /// Logits, or ids and weights.
    Given(RoutingPointers),
}

/// A mixture-of-experts layer on tensors of one GPU; see [`cuda`](super).
///
/// A handle: clones share everything. Calls may come from many threads at once.
///
/// x is `[T, H]`, `[B, S, H]` or any `[.., H]` in the weights' format, f32, f16 or bf16; its rows must be evenly spaced and without gaps, else the call is refused with an error that says to call
/// `contiguous()`. y is a new contiguous tensor of x's shape and format.
///
/// Bits: ids and weights are the CPU layer's, and so is y with f32 weights; with 16-bit weights y has the same bits from run to run, and agrees with the CPU's within rounding (`docs/gpu.md`).
#[derive(Clone)]
pub struct CudaMoeLayer {
    shared: Arc<Shared>,
    /// Made once, so that a call does not allocate it.
    op: Arc<Box<dyn CustomOp1 + Send + Sync>>,
}

impl fmt::Debug for CudaMoeLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaMoeLayer")
            .field("layer", &self.shared.layer)
            .field("device", &self.shared.weights.experts.location())
            .finish_non_exhaustive()
    }
}

impl CudaMoeLayer {
    /// A layer of a router, its projection `gate [R, H]` without bias (of any format), and experts.
    ///
    /// # Errors
    /// As [`from_layer`](Self::from_layer).
    pub fn new(
        router: RouterConfig,
        gate: &Tensor,
        experts: Experts,
        activation: Activation,
    ) -> Result<Self> {
        let dtype = format("down", experts.dtype())?;
        let layer = plain::CudaMoeLayer::new(
            router,
            experts.hidden(),
            experts.intermediate(),
            activation,
            dtype,
        );
        let mut weights = Weights::new(experts);
        weights.gate = Some(gate.clone());
        Self::from_layer(layer.map_err(refused)?, weights)
    }

    /// Any layer of the kernels whose operands are among [`Weights`]: with a shared expert, a correction bias, some experts of a router's, other numerics, or without a gate.
    ///
    /// # Errors
    /// Weights of other shapes than the layer's, on different devices, or that kernels cannot follow; a layer that wants more operands; a GPU before compute capability 8.0, or an
    /// old driver. The argument is named.
    pub fn from_layer(layer: plain::CudaMoeLayer, weights: Weights) -> Result<Self> {
        check_shapes(&layer, &weights)?;
        let kernels = Kernels::new(weights.experts.device().as_cuda_device()?)?;
        let shared = Shared {
            layer,
            weights,
            kernels,
            workspaces: CudaWorkspaces::shared(),
        };
        shared.check()?;
        Ok(Self::from_shared(shared))
    }

    fn from_shared(shared: Shared) -> Self {
        let shared = Arc::new(shared);
        let op: Box<dyn CustomOp1 + Send + Sync> = Box::new(Call(shared.clone()));
        Self {
            shared,
            op: Arc::new(op),
        }
    }

    /// The same layer with other workspaces than the process's.
    ///
    /// # Errors
    /// As [`from_layer`](Self::from_layer).
    pub fn with_workspaces(self, workspaces: CudaWorkspaces) -> Result<Self> {
        let Shared { layer, weights, .. } = &*self.shared;
        let kernels = Kernels::new(weights.experts.device().as_cuda_device()?)?;
        Ok(Self::from_shared(Shared {
            layer: layer.clone(),
            weights: weights.clone(),
            kernels,
            workspaces,
        }))
    }

    /// What it does, as plain data.
    pub fn layer(&self) -> &plain::CudaMoeLayer {
        &self.shared.layer
    }

    /// The device of its weights.
    pub fn device(&self) -> &Device {
        self.shared.weights.experts.device()
    }

    /// The layer: `y [.., H]` from `x [.., H]`.
    ///
    /// # Errors
    /// x on another device, of another format or width, or with rows that are not evenly spaced and without gaps; a layer without a gate; what the driver says.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.on_device([("x", x)])?;
        x.apply_op1_arc(self.op.clone())
    }

    /// The layer into a tensor that exists: y of x's shape, any of the three formats, rows without gaps and evenly spaced. Every tensor that shares y's storage sees the change. Allocates nothing once
    /// its workspace is large enough.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); y of another shape, or sharing its storage with x or a weight; y is untouched then.
    pub fn forward_into(&self, x: &Tensor, y: &Tensor) -> Result<()> {
        self.on_device([("x", x), ("y", y)])?;
        // Candle holds y's storage for writing while the weights' are taken for reading: never one and the same.
        let place = storage_address(y);
        let weights = self.shared.weights.tensors();
        if let Some((name, _)) = weights.iter().find(|(_, t)| storage_address(t) == place) {
            bail!(
                "y: expected a tensor that shares its storage with no weight, got one that shares it with {name}"
            );
        }
        y.inplace_op2(x, &CallInto(&self.shared))
    }

    /// As [`forward`](Self::forward), with the router's logits `[.., R]` (f32, f16 or bf16) from elsewhere. The layer needs no gate. No gradient flows.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); logits that are not one row of R for each token.
    pub fn forward_logits(&self, x: &Tensor, logits: &Tensor) -> Result<Tensor> {
        self.on_device([("x", x), ("logits", logits)])?;
        x.apply_op2_no_bwd(logits, &CallLogits(&self.shared))
    }

    /// As [`forward`](Self::forward), with the routing from elsewhere: `ids [.., K]` (u32 or i32) and `weights [.., K]` (f32), both contiguous, used as they are. Ids that name no expert are dropped: nobody
    /// on the host sees them. No gradient flows.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); shapes that do not agree, other formats.
    pub fn forward_routed(&self, x: &Tensor, ids: &Tensor, weights: &Tensor) -> Result<Tensor> {
        self.on_device([("x", x), ("ids", ids), ("weights", weights)])?;
        x.apply_op3_no_bwd(ids, weights, &CallRouted(&self.shared))
    }

    fn on_device<const N: usize>(&self, tensors: [(&str, &Tensor); N]) -> Result<()> {
        let place = self.shared.weights.experts.location();
        tensors
            .iter()
            .try_for_each(|(argument, tensor)| is_at(argument, tensor, place))
    }
}

impl Module for CudaMoeLayer {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        CudaMoeLayer::forward(self, x)
    }
}

/// Tensors share a storage when they have it at the same address.
fn storage_address(tensor: &Tensor) -> *const Storage {
    &raw const *tensor.storage_and_layout().0
}

/// The layer's shapes, and one device for all.
fn check_shapes(layer: &plain::CudaMoeLayer, weights: &Weights) -> Result<()> {
    let experts = &weights.experts;
    let place = experts.location();
    weights
        .tensors()
        .iter()
        .try_for_each(|(argument, tensor)| is_at(argument, tensor, place))?;
    let shape = |argument: &str, tensor: &Tensor, expected: &[usize]| {
        if tensor.dims() != expected {
            bail!(
                "{argument}: expected shape {expected:?}, got {:?}",
                tensor.dims()
            );
        }
        Ok(())
    };
    let sizes = |argument: &str, experts: &Experts, expected: [usize; 3]| {
        let found = [
            experts.num_experts(),
            experts.intermediate(),
            experts.hidden(),
        ];
        if found != expected {
            bail!("{argument}: expected E, I, H = {expected:?}, got {found:?}");
        }
        Ok(())
    };
    let local = layer.local_experts().len();
    sizes(
        "experts",
        experts,
        [local, layer.intermediate(), layer.hidden()],
    )?;
    if let Some(gate) = &weights.gate {
        shape("gate", gate, &[layer.router().num_logits(), layer.hidden()])?;
    }
    if let Some(bias) = &weights.correction_bias {
        shape("correction_bias", bias, &[layer.router().selectable()])?;
    }
    match (&weights.shared, layer.shared()) {
        (Some(found), Some(shared)) => {
            sizes(
                "shared.experts",
                &found.experts,
                [1, shared.intermediate, layer.hidden()],
            )?;
            found
                .gate
                .iter()
                .try_for_each(|gate| shape("shared.gate", gate, &[1, layer.hidden()]))
        }
        (None, None) => Ok(()),
        _ => bail!("shared: expected weights when and only when the layer has a shared expert"),
    }
}

impl Shared {
    /// What plans have to know of the GPU.
    pub fn info(&self) -> &DeviceInfo {
        self.kernels.cuda().device_info()
    }

    /// Plans a call of one token at addresses that are nowhere: what is wrong with the layer is said when it is made.
    fn check(&self) -> Result<()> {
        let nowhere = DevicePtr(1 << 20);
        let row = |stride, dtype| DeviceRows {
            ptr: nowhere,
            stride,
            dtype,
        };
        let (hidden, dtype) = (self.layer.hidden(), self.layer.dtype());
        let logits = row(self.layer.router().num_logits(), moe_kernels::DType::F32);
        let route = match self.weights.gate {
            Some(_) => Route::Gate,
            None => Route::Given(RoutingPointers::Logits(logits)),
        };
        let stream = self
            .weights
            .experts
            .device()
            .as_cuda_device()?
            .cuda_stream();
        let locked = self.weights.lock();
        let mut operands = Operands::new(&stream);
        let weights = locked.pointers(&self.weights, &mut operands)?;
        let pointers = self.pointers(
            &weights,
            row(hidden, dtype),
            route,
            row(hidden, dtype),
            nowhere,
        )?;
        self.layer
            .plan(1, &pointers, self.info())
            .map(drop)
            .map_err(refused)
    }

    pub fn pointers(
        &self,
        weights: &Pointers,
        x: DeviceRows,
        route: Route,
        y: DeviceRows,
        workspace: DevicePtr,
    ) -> Result<MoePointers> {
        let routing = match (route, weights.gate) {
            (Route::Given(routing), _) => routing,
            (Route::Gate, Some(gate)) => RoutingPointers::Gate(gate),
            (Route::Gate, None) => {
                bail!("gate: expected weights, for a call without logits or a routing")
            }
        };
        Ok(MoePointers {
            correction_bias: weights.correction_bias,
            shared: weights.shared,
            ..MoePointers::new(x, routing, weights.experts, y, workspace)
        })
    }
}
