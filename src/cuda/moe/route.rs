//! Where a call's routing comes from: the gate, the router and the sort.

use super::plan::{Call, MoePointers};
use super::{CudaMoeLayer, GatePointers};
use crate::cuda::DevicePtr;
use crate::cuda::combine::DeviceRows;
use crate::cuda::norm::NormRows;
use crate::cuda::permute::{PermutePointers, plan_permute};
use crate::cuda::routing::{RoutePointers, plan_route};
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
    /// Ids `[T, slots]` i32 and weights `[T, slots]` f32 as they are: the router is not asked. An id that is neither an expert's nor a null expert's is dropped
    /// (beside identity experts, each id from E on is one of theirs).
    Given {
        /// `[T, slots]` i32
        ids: DevicePtr,
        /// `[T, slots]` f32
        weights: DevicePtr,
    },
}

impl CudaMoeLayer {
    /// Whether this layer answers for identity experts: of the parts of a layer, the first does.
    pub(super) fn adds_identity(&self) -> bool {
        let null = self.router.null_experts;
        matches!(null, NullExperts::Identity(_)) && self.local_experts.start == 0
    }

    /// What belongs to the gate comes with a gate, and what the router wants is there. (Noise logits are the router's to check.)
    pub(super) fn check_routing(&self, pointers: &MoePointers) -> Result<()> {
        let gate = matches!(pointers.routing, RoutingPointers::Gate(_));
        let wanted = |argument, expected, wanted: bool, found: bool| match wanted == found {
            true => Ok(()),
            false => Err(Error::value(argument, expected, "the opposite")),
        };
        wanted(
            "gate_norm",
            "a norm when and only when the call has a gate whose input the layer normalises",
            gate && self.gate_norm,
            pointers.gate_norm.is_some(),
        )?;
        if pointers.gate_noise.is_some() {
            wanted(
                "gate_noise",
                "weights only for a call through a gate without noise logits, and a router with a noise seed",
                gate && self.router.noise_seed.is_some() && pointers.noise_logits.is_none(),
                true,
            )?;
        }
        let given = matches!(pointers.routing, RoutingPointers::Given { .. });
        if given && self.is_router_weighted() {
            let expected = "a gate or logits, since the router weighs the shared experts";
            return Err(Error::value("routing", expected, "ids and weights"));
        }
        Ok(())
    }
}

impl Call<'_> {
    /// Logits through the gate, and noise logits where their weights are there.
    fn gate(&mut self, gate: &GatePointers, noise: &mut Option<DeviceRows>) -> Result<DeviceRows> {
        let (columns, hidden) = (self.layer.router.num_logits(), self.layer.hidden);
        let mut x = self.pointers.x;
        if let Some(norm) = self.pointers.gate_norm {
            let out = self.rows(self.pieces.gate_x, hidden, DType::F32);
            self.norm_rows(&NormRows::new(self.tokens, hidden, x, norm, out))?;
            x = out;
        }
        let logits = self.rows(self.pieces.logits, columns, DType::F32);
        self.exact(x, gate.weights, gate.bias, columns, logits)?;
        if let Some(weights) = self.pointers.gate_noise {
            let out = self.rows(self.pieces.noise, columns, DType::F32);
            self.exact(x, weights, None, columns, out)?;
            *noise = Some(out);
        }
        Ok(logits)
    }

    /// Ids and weights, computed or given.
    pub(super) fn route(&mut self) -> Result<(DevicePtr, DevicePtr)> {
        let mut noise = self.pointers.noise_logits;
        let logits = match self.pointers.routing {
            RoutingPointers::Given { ids, weights } => return Ok((ids, weights)),
            RoutingPointers::Logits(logits) => logits,
            RoutingPointers::Gate(gate) => self.gate(&gate, &mut noise)?,
        };
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
            shared_weights: if self.layer.router.joint_shared > 0 {
                self.at(self.pieces.shared_weights)
            } else {
                DevicePtr::NULL
            },
            workspace: self.at(self.pieces.route),
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

    pub(super) fn sort(&mut self, ids: DevicePtr) -> Result<()> {
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
}
