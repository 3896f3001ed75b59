//! A call of the layer as launches, in order.

use super::layout::Pieces;
use super::{
    CudaMoeLayer, ExpertPointers, LatentPointers, MAX_SHARED, RoutingPointers, SharedPointers,
};
use crate::cuda::combine::{
    CombineOperands, DeviceRows, Identity, IdentityApart, Norm, Routed, Shared, SharedSum,
    plan_combine,
};
use crate::cuda::{DeviceInfo, DevicePtr, Launch};
use crate::element::DType;
use crate::error::{Error, Result};

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
    /// In: normalises the gate's input, for a layer that does so and a call through the gate.
    pub gate_norm: Option<Norm>,
    /// In: weights `[R, H]` of the noise logits `norm(x) · W_noiseᵀ` in exact f32, for a router with a noise seed and a call through the gate that brings no
    /// `noise_logits`.
    pub gate_noise: Option<DeviceRows>,
    /// In: noise logits `[T, R]`, for a router with a noise seed; in the format of the logits, which the gate makes f32.
    pub noise_logits: Option<DeviceRows>,
    /// Position of the first token, for a router with noise.
    pub position: u64,
    /// In: the local experts' weights.
    pub experts: ExpertPointers,
    /// In: the latent projections, when and only when the layer is latent.
    pub latent: Option<LatentPointers>,
    /// In: normalises the experts' outputs, `[L]` or `[H]` wide, when and only when the layer does that.
    pub post_norm: Option<Norm>,
    /// In: the shared experts' weights, when and only when the layer has some.
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
            gate_norm: None,
            gate_noise: None,
            noise_logits: None,
            position: 0,
            experts,
            latent: None,
            post_norm: None,
            shared: None,
            out_norm: None,
            out_bias: DevicePtr::NULL,
            residual: None,
            y,
            workspace,
        }
    }
}

/// The most launches of a call: the gate's norm, the gate, its noise, router (4), sort (3), latent in, its norm, two products, their norm, the shared
/// experts' two each, their gate, the sum, latent out, combine.
const MAX_LAUNCHES: usize = 18 + 2 * MAX_SHARED;

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
        self.check_pointers(pointers)?;
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

    /// Every operand is there that the layer wants, and none besides.
    fn check_pointers(&self, pointers: &MoePointers) -> Result<()> {
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
                "weights when and only when the layer has shared experts",
                "the opposite",
            ));
        }
        if pointers.workspace.is_null() {
            return Err(Error::value("workspace", "device memory", "no pointer"));
        }
        if pointers.post_norm.is_some() != self.post_norm.is_some() {
            let expected = "a norm when and only when the layer normalises its experts' outputs";
            return Err(Error::value("post_norm", expected, "the opposite"));
        }
        self.check_latent(pointers.latent.as_ref())?;
        self.check_routing(pointers)
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

    /// The sum over slots and all that follows; a latent sum leaves its space on the way.
    fn combine(
        &mut self,
        ids: DevicePtr,
        weights: DevicePtr,
        shared: Option<(Shared, SharedSum)>,
    ) -> Result<()> {
        let (layer, p) = (self.layer, self.pointers);
        let (null, slots) = (layer.adds_identity(), layer.router.slots());
        let latent = self.latent_sum();
        // x has no place in a latent sum, nor in one whose weights have acted on the input.
        let apart = null && (latent.is_some() || layer.weight_on_input);
        let (num_experts, x) = (layer.router.num_experts, p.x);
        let routed = Routed::Pairs {
            ys: self.rows(self.pieces.ys, layer.expert_hidden(), layer.ys_dtype),
            rows: self.pieces.rows,
            slots,
            weights: if layer.weight_on_input {
                DevicePtr::NULL
            } else {
                weights
            },
            row_of_pair: self.at(self.pieces.row_of_pair),
            identity: (null && !apart).then_some(Identity {
                ids,
                num_experts,
                x,
            }),
        };
        let operands = CombineOperands {
            routed_scale: layer.routed_scale,
            identity_apart: apart.then_some(IdentityApart {
                ids,
                weights,
                slots,
                num_experts,
                x,
                scale: layer.routed_scale,
            }),
            shared: shared.map(|(join, _)| join),
            shared_sum: shared.map(|(_, sum)| sum),
            norm: p.out_norm,
            bias: p.out_bias,
            residual: p.residual,
            ..CombineOperands::new(self.tokens, layer.hidden, routed, p.y)
        };
        match latent {
            Some(sum) => self.combine_latent(&operands, sum),
            None => self.push_combine(&operands),
        }
    }

    /// The same through the latent `sum [T, L]`.
    fn combine_latent(&mut self, operands: &CombineOperands, sum: DeviceRows) -> Result<()> {
        let (layer, routed) = (self.layer, operands.routed);
        self.push_combine(&CombineOperands {
            routed_scale: operands.routed_scale,
            ..CombineOperands::new(self.tokens, layer.expert_hidden(), routed, sum)
        })?;
        let nothing_follows = operands.identity_apart.is_none()
            && operands.shared.is_none()
            && operands.norm.is_none()
            && operands.bias.is_null()
            && operands.residual.is_none();
        if nothing_follows {
            return self.leave(sum, operands.out);
        }
        let routed = self.rows(self.pieces.routed, layer.hidden, DType::F32);
        self.leave(sum, routed)?;
        self.push_combine(&CombineOperands {
            routed: Routed::Sum(routed),
            routed_scale: 1.0,
            ..*operands
        })
    }

    fn push_combine(&mut self, operands: &CombineOperands) -> Result<()> {
        let launch = plan_combine(operands, self.device)?;
        self.plan.push(launch)
    }
}
