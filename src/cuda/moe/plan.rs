//! A call of the layer as launches, in order.

use super::layout::Pieces;
use super::{CudaMoeLayer, ExpertPointers, GatePointers, SharedPointers};
use crate::cuda::combine::{
    CombineOperands, DeviceRows, Identity, Norm, Routed, Shared, plan_combine,
};
use crate::cuda::permute::{PermutePointers, plan_permute};
use crate::cuda::routing::{RoutePointers, plan_route};
use crate::cuda::{DeviceInfo, DevicePtr, Launch};
use crate::element::DType;
use crate::error::{Error, Result};
use crate::routing::NullExperts;

/// Where a call's routing comes from.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum RoutingPointers {
    /// Logits from x through the gate.
    Gate(GatePointers),
    /// Logits `[T, R]`.
    Logits(DeviceRows),
    /// Ids `[T, slots]` i32 and weights `[T, slots]` f32 as they are: the router is not asked. An id that is neither an expert's nor a null expert's is dropped.
    Given {
        /// `[T, slots]` i32
        ids: DevicePtr,
        /// `[T, slots]` f32
        weights: DevicePtr,
    },
}

/// Where the operands of a call are, in device memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MoePointers {
    /// In: `[T, H]` in the layer's format.
    pub x: DeviceRows,
    /// In: ids and weights, or what they come from.
    pub routing: RoutingPointers,
    /// In: i32 `[T, K]`, when and only when the router's selection is [`Selection::Given`](crate::routing::Selection::Given).
    pub given_ids: DevicePtr,
    /// In, optional: f32 `[E + null experts]`, added to what the router's selection ranks.
    pub correction_bias: DevicePtr,
    /// In, optional: f32 `[E]`, a factor on each expert's weights.
    pub per_expert_scale: DevicePtr,
    /// In: noise logits `[T, R]`, when and only when the router has a noise seed; in the format of the logits, which the gate makes f32.
    pub noise_logits: Option<DeviceRows>,
    /// Position of the first token, for a router with noise.
    pub position: u64,
    /// In: the local experts' weights.
    pub experts: ExpertPointers,
    /// In: the shared expert's weights, when and only when the layer has one.
    pub shared: Option<SharedPointers>,
    /// In: normalises the output, after the shared expert.
    pub out_norm: Option<Norm>,
    /// In, optional: f32 `[H]`, added after the norm.
    pub out_bias: DevicePtr,
    /// In: `[T, H]`, added last; may be y itself.
    pub residual: Option<DeviceRows>,
    /// Out: `[T, H]` of any format.
    pub y: DeviceRows,
    /// [`CudaMoeLayer::workspace_size`] bytes. The contents do not matter before and mean nothing after, but for what [`CudaMoeLayer::workspace_routing`] names.
    pub workspace: DevicePtr,
}

impl MoePointers {
    /// The operands that every call has.
    pub fn new(
        x: DeviceRows,
        routing: RoutingPointers,
        experts: ExpertPointers,
        y: DeviceRows,
        workspace: DevicePtr,
    ) -> Self {
        Self {
            x,
            routing,
            given_ids: DevicePtr::NULL,
            correction_bias: DevicePtr::NULL,
            per_expert_scale: DevicePtr::NULL,
            noise_logits: None,
            position: 0,
            experts,
            shared: None,
            out_norm: None,
            out_bias: DevicePtr::NULL,
            residual: None,
            y,
            workspace,
        }
    }
}

/// The most launches of a call: gate, router (4), sort (3), two products, the shared expert's three, combine.
const MAX_LAUNCHES: usize = 16;

/// The launches of a call, to be queued in order on one stream.
#[derive(Clone, Debug)]
pub struct MoePlan {
    launches: [Option<Launch>; MAX_LAUNCHES],
    len: usize,
}

impl MoePlan {
    fn new() -> Self {
        Self {
            launches: [const { None }; MAX_LAUNCHES],
            len: 0,
        }
    }

    /// One more launch. There is room for the most that a call has.
    pub(super) fn push(&mut self, launch: Launch) -> Result<()> {
        let Some(place) = self.launches.get_mut(self.len) else {
            return Err(Error::Overflow {
                what: "launches of a layer",
            });
        };
        *place = Some(launch);
        self.len += 1;
        Ok(())
    }

    /// In the order in which they have to run.
    pub fn iter(&self) -> impl Iterator<Item = &Launch> + Clone {
        self.launches.iter().flatten()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// What the stages of one call share.
pub(super) struct Call<'a> {
    pub(super) layer: &'a CudaMoeLayer,
    pub(super) tokens: usize,
    pub(super) pointers: &'a MoePointers,
    pub(super) pieces: Pieces,
    pub(super) device: &'a DeviceInfo,
    pub(super) plan: MoePlan,
}

impl CudaMoeLayer {
    /// Plans a call for `tokens` tokens, 0 included. Pure arithmetic: the addresses are not followed.
    ///
    /// # Errors
    /// An [`Error`] that names the operand: absent though it is wanted, there though it is not, misaligned, of a wrong format or stride; [`Error::Overflow`].
    pub fn plan(
        &self,
        tokens: usize,
        pointers: &MoePointers,
        device: &DeviceInfo,
    ) -> Result<MoePlan> {
        if pointers.x.dtype != self.dtype {
            return Err(Error::value("x", self.dtype, pointers.x.dtype));
        }
        if pointers.experts.gate.is_some() != self.activation.gated {
            let expected = if self.activation.gated {
                "a gate projection"
            } else {
                "none"
            };
            return Err(Error::value("experts.gate", expected, "the opposite"));
        }
        if pointers.shared.is_some() != self.shared.is_some() {
            return Err(Error::value(
                "shared",
                "weights when and only when the layer has a shared expert",
                "the opposite",
            ));
        }
        if pointers.workspace.is_null() {
            return Err(Error::value("workspace", "device memory", "no pointer"));
        }
        let mut call = Call {
            layer: self,
            tokens,
            pointers,
            pieces: self.pieces(tokens, device)?,
            device,
            plan: MoePlan::new(),
        };
        if tokens == 0 {
            return Ok(call.plan);
        }
        let (ids, weights) = call.route()?;
        call.sort(ids)?;
        call.experts(weights)?;
        let shared = call.shared()?;
        call.combine(ids, weights, shared)?;
        Ok(call.plan)
    }
}

impl Call<'_> {
    pub(super) fn at(&self, piece: crate::cuda::workspace::Piece) -> DevicePtr {
        piece.at(self.pointers.workspace)
    }

    /// Rows of `width` neighbours in the workspace.
    pub(super) fn rows(
        &self,
        piece: crate::cuda::workspace::Piece,
        width: usize,
        dtype: DType,
    ) -> DeviceRows {
        DeviceRows {
            ptr: self.at(piece),
            stride: width,
            dtype,
        }
    }

    /// Ids and weights, computed or given.
    fn route(&mut self) -> Result<(DevicePtr, DevicePtr)> {
        let columns = self.layer.router.num_logits();
        let logits = match self.pointers.routing {
            RoutingPointers::Given { ids, weights } => return Ok((ids, weights)),
            RoutingPointers::Logits(logits) => logits,
            RoutingPointers::Gate(gate) => {
                let logits = self.rows(self.pieces.logits, columns, DType::F32);
                self.dense(gate.weights, gate.bias, columns, logits)?;
                logits
            }
        };
        let noise = self.pointers.noise_logits;
        if let Some(noise) = noise.filter(|n| n.dtype != logits.dtype) {
            let expected = format!("{}, as the logits are", logits.dtype);
            return Err(Error::value("noise_logits", expected, noise.dtype));
        }
        let (ids, weights) = (self.at(self.pieces.ids), self.at(self.pieces.weights));
        let route = RoutePointers {
            logits: logits.ptr,
            logits_stride: logits.stride as u64,
            noise_logits: noise.map_or(DevicePtr::NULL, |n| n.ptr),
            noise_stride: noise.map_or(0, |n| n.stride as u64),
            correction_bias: self.pointers.correction_bias,
            per_expert_scale: self.pointers.per_expert_scale,
            given_ids: self.pointers.given_ids,
            ids,
            weights,
            workspace: self.at(self.pieces.route),
            ..RoutePointers::default()
        };
        let plan = plan_route(
            &self.layer.router,
            self.tokens,
            logits.dtype,
            self.pointers.position,
            &route,
            self.device,
        )?;
        plan.iter()
            .try_for_each(|launch| self.plan.push(launch.clone()))?;
        Ok((ids, weights))
    }

    fn sort(&mut self, ids: DevicePtr) -> Result<()> {
        let pointers = PermutePointers {
            ids,
            counts: self.at(self.pieces.counts),
            offsets: self.at(self.pieces.offsets),
            pair_of_row: self.at(self.pieces.pair_of_row),
            row_of_pair: self.at(self.pieces.row_of_pair),
            workspace: self.at(self.pieces.permute),
        };
        let (pairs, experts) = (
            self.tokens * self.layer.router.slots(),
            self.layer.router.num_experts,
        );
        let plan = plan_permute(
            pairs,
            experts,
            &self.layer.permute_options(),
            &pointers,
            self.device,
        )?;
        plan.iter()
            .try_for_each(|launch| self.plan.push(launch.clone()))
    }

    fn combine(
        &mut self,
        ids: DevicePtr,
        weights: DevicePtr,
        shared: Option<Shared>,
    ) -> Result<()> {
        let (layer, p) = (self.layer, self.pointers);
        let null = matches!(layer.router.null_experts, NullExperts::Identity(_))
            && layer.local_experts.start == 0;
        let routed = Routed::Pairs {
            ys: self.rows(self.pieces.ys, layer.hidden, layer.ys_dtype),
            rows: self.pieces.rows,
            slots: layer.router.slots(),
            weights: if layer.weight_on_input {
                DevicePtr::NULL
            } else {
                weights
            },
            row_of_pair: self.at(self.pieces.row_of_pair),
            identity: null.then_some(Identity {
                ids,
                num_experts: layer.router.num_experts,
                x: p.x,
            }),
        };
        let operands = CombineOperands {
            routed_scale: layer.routed_scale,
            shared,
            norm: p.out_norm,
            bias: p.out_bias,
            residual: p.residual,
            ..CombineOperands::new(self.tokens, layer.hidden, routed, p.y)
        };
        let launch = plan_combine(&operands, self.device)?;
        self.plan.push(launch)
    }
}
