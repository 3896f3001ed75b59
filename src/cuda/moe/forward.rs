//! The safe call: the layer from cudarc's slices.
#![allow(unsafe_code)] // one block: the launch of a plan whose operands were checked here

use super::plan::MoePointers;
use super::route::RoutingPointers;
use super::views::{ExpertViews, GateViews, SharedViews};
use super::{CudaMoeLayer, LatentViews};
use crate::cuda::combine::DeviceRows;
use crate::cuda::stages::Door;
use crate::cuda::{Cuda, DeviceMat, DeviceMatMut, DevicePtr, DeviceVec, DeviceVecMut};
use crate::error::{Error, Result};
use crate::shape::pairs;
use cudarc::driver::CudaStream;

/// Where a call's routing comes from.
#[derive(Debug)]
#[non_exhaustive]
pub enum RouteSource<'a> {
    /// Logits from x through the gate.
    Gate(GateViews<'a>),
    /// Logits `[T, R]` of any format.
    Logits(DeviceMat<'a>),
    /// Ids and weights `[T, slots]` as they are: the router is not asked. An id that is neither an expert's nor a null expert's is dropped
    /// (beside identity experts, each id from E on is one of theirs).
    Given {
        /// `[T, slots]`
        ids: DeviceVec<'a, i32>,
        /// `[T, slots]`
        weights: DeviceVec<'a, f32>,
    },
}

/// A norm of rows, `y / √(mean(y²) + eps) · weight · multiplier`.
#[derive(Debug)]
pub struct NormView<'a> {
    /// As long as a row.
    pub weight: DeviceVec<'a, f32>,
    /// The number under the root.
    pub eps: f32,
    /// One more factor on every column.
    pub multiplier: f32,
}

/// What a call of [`CudaMoeLayer::forward_into`] reads. [`new`](Self::new) has what every call has; set the other fields as the layer wants them.
#[derive(Debug)]
pub struct MoeOperands<'a> {
    /// `[T, H]` in the layer's format.
    pub x: DeviceMat<'a>,
    /// Ids and weights, or what they come from.
    pub route: RouteSource<'a>,
    /// `[T, K]`, when and only when the router's selection is [`Selection::Given`](crate::routing::Selection::Given).
    pub given_ids: Option<DeviceVec<'a, i32>>,
    /// `[E + null experts]`, added to what the router's selection ranks.
    pub correction_bias: Option<DeviceVec<'a, f32>>,
    /// `[E]`, a factor on each expert's weights.
    pub per_expert_scale: Option<DeviceVec<'a, f32>>,
    /// Normalises the gate's input, when and only when the layer does so ([`CudaMoeLayer::with_gate_norm`]) and the call goes through the gate.
    pub gate_norm: Option<NormView<'a>>,
    /// Weights `[R, H]` of the noise logits `norm(x) · W_noiseᵀ` in exact f32, for a router with a noise seed and a call through the gate without `noise_logits`.
    pub gate_noise: Option<DeviceMat<'a>>,
    /// `[T, R]`, for a router with a noise seed; in the format of the logits, which the gate makes f32.
    pub noise_logits: Option<DeviceMat<'a>>,
    /// Position of the first token, for a router with noise.
    pub position: u64,
    /// The local experts' weights.
    pub experts: ExpertViews<'a>,
    /// The latent projections, when and only when the layer is latent.
    pub latent: Option<LatentViews<'a>>,
    /// Normalises the experts' outputs, L columns for a latent layer, when and only when the layer does so ([`CudaMoeLayer::with_post_norm`]).
    pub post_norm: Option<NormView<'a>>,
    /// The shared experts' weights, when and only when the layer has some.
    pub shared: Option<SharedViews<'a>>,
    /// Normalises the output, after the shared experts.
    pub out_norm: Option<NormView<'a>>,
    /// `[H]`, added after the norm.
    pub out_bias: Option<DeviceVec<'a, f32>>,
    /// `[T, H]`, added last.
    pub residual: Option<DeviceMat<'a>>,
}

impl<'a> MoeOperands<'a> {
    /// The operands that every call has.
    pub fn new(x: DeviceMat<'a>, route: RouteSource<'a>, experts: ExpertViews<'a>) -> Self {
        Self {
            x,
            route,
            given_ids: None,
            correction_bias: None,
            per_expert_scale: None,
            gate_norm: None,
            gate_noise: None,
            noise_logits: None,
            position: 0,
            experts,
            latent: None,
            post_norm: None,
            shared: None,
            out_norm: None,
            out_bias: None,
            residual: None,
        }
    }
}

impl CudaMoeLayer {
    /// The layer: `y [T, H]` of any format from `operands.x [T, H]`, queued on `stream`. Only launches: nothing is allocated, waited for or read back, so the call can
    /// be captured in a CUDA graph, after one call that loads the kernels and with cudarc's event tracking off (see [`memory`](crate::cuda::memory)).
    ///
    /// `workspace` holds [`workspace_size`](Self::workspace_size) bytes of any content. Two calls that may overlap need two.
    ///
    /// # Errors
    /// An [`Error`] that names the operand; nothing has been queued then, unless the driver fails in the middle.
    pub fn forward_into(
        &self,
        cuda: &Cuda,
        stream: &CudaStream,
        operands: &MoeOperands<'_>,
        y: &mut DeviceMatMut<'_>,
        workspace: &mut DeviceVecMut<'_, u8>,
    ) -> Result<()> {
        let door = Door { cuda, stream };
        let tokens = operands.x.rows();
        y.expect(cuda, "y", stream, tokens, self.hidden)?;
        let needed = self.workspace_size(tokens, cuda.device_info())?;
        let workspace = door.out("workspace", workspace, needed)?;
        let pointers = self.check(&door, operands, y.as_rows(), workspace)?;
        let plan = self.plan(tokens, &pointers, cuda.device_info())?;
        // SAFETY: every operand was checked to be a live view of this context for this stream, of the extent that the plan reads or writes; the views
        // are borrowed until the launches are queued, and cudarc orders what comes after on other streams by the events that they leave. Nothing aliases what
        // is written: y and workspace are borrowed mutably. Ids and permutations that the kernels follow are made by this call's own kernels, which accept any ids.
        unsafe { cuda.launch_all(stream, plan.iter()) }
    }

    /// The operands as plain data, once each has the layer's shape.
    fn check(
        &self,
        door: &Door<'_>,
        o: &MoeOperands<'_>,
        y: DeviceRows,
        workspace: DevicePtr,
    ) -> Result<MoePointers> {
        let (tokens, hidden, router) = (o.x.rows(), self.hidden, &self.router);
        let x = door.mat("x", &o.x, tokens, hidden)?;
        let pairs = pairs(tokens, router.slots())?;
        let routing = self.routing(door, o, pairs)?;
        let experts = o.experts.check(
            door.cuda,
            door.stream,
            self.local_experts.len(),
            self.expert_hidden(),
            self.intermediate,
        )?;
        let mat = |argument, view: &Option<DeviceMat<'_>>, rows, cols| match view {
            Some(view) => door.mat(argument, view, rows, cols).map(Some),
            None => Ok(None),
        };
        let shared = match (&o.shared, &self.shared) {
            (Some(views), Some(shared)) => Some(views.check(
                door.cuda,
                door.stream,
                shared.count,
                hidden,
                shared.intermediate,
            )?),
            (None, None) => None,
            _ => {
                let expected = "weights when and only when the layer has shared experts";
                return Err(Error::value("shared", expected, "the opposite"));
            }
        };
        Ok(MoePointers {
            given_ids: door.optional("given_ids", &o.given_ids, pairs)?,
            correction_bias: door.optional(
                "correction_bias",
                &o.correction_bias,
                router.selectable(),
            )?,
            per_expert_scale: door.optional(
                "per_expert_scale",
                &o.per_expert_scale,
                router.num_experts,
            )?,
            noise_logits: mat("noise_logits", &o.noise_logits, tokens, router.num_logits())?,
            gate_norm: door.norm("gate_norm", &o.gate_norm, hidden)?,
            gate_noise: mat("gate_noise", &o.gate_noise, router.num_logits(), hidden)?,
            position: o.position,
            latent: match &o.latent {
                Some(views) => Some(views.check(door, self.expert_hidden(), hidden)?),
                None => None,
            },
            post_norm: door.norm("post_norm", &o.post_norm, self.expert_hidden())?,
            shared,
            out_norm: door.norm("out_norm", &o.out_norm, hidden)?,
            out_bias: door.optional("out_bias", &o.out_bias, hidden)?,
            residual: mat("residual", &o.residual, tokens, hidden)?,
            ..MoePointers::new(x, routing, experts, y, workspace)
        })
    }

    fn routing(
        &self,
        door: &Door<'_>,
        o: &MoeOperands<'_>,
        pairs: usize,
    ) -> Result<RoutingPointers> {
        let columns = self.router.num_logits();
        Ok(match &o.route {
            RouteSource::Gate(gate) => {
                RoutingPointers::Gate(gate.check(door.cuda, door.stream, columns, self.hidden)?)
            }
            RouteSource::Logits(logits) => {
                RoutingPointers::Logits(door.mat("logits", logits, o.x.rows(), columns)?)
            }
            RouteSource::Given { ids, weights } => RoutingPointers::Given {
                ids: door.vec("ids", ids, pairs)?,
                weights: door.vec("weights", weights, pairs)?,
            },
        })
    }
}
