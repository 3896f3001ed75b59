//! The calls: the whole layer, or its routing alone.

use super::MoeLayer;
use super::pieces::Pieces;
use crate::combine::{Combine, Identity, Routed, combine_into};
use crate::cpu::Cpu;
use crate::cpu::norm::normalize_rows;
use crate::element::DType;
use crate::error::{Error, Result};
use crate::grouped_gemm::{Gather, Groups};
use crate::matrix::{AnyMatMut, AnyMatRef, MatMut, MatRef};
use crate::routing::{NullExperts, RouteInput, Routing};
use crate::workspace::any_mat_mut;

/// Where a call gets its routing from.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub enum RouteFrom<'a> {
    /// Logits from x through the layer's gate, ids from the router.
    #[default]
    Gate,
    /// Logits from x through the layer's gate, ids `[T, K]` from the caller (the router's selection is [`Selection::Given`](crate::routing::Selection::Given)).
    GateAndIds(&'a [i32]),
    /// Logits `[T, R]` from the caller.
    Logits(AnyMatRef<'a>),
    /// Logits `[T, R]` and ids `[T, K]` from the caller.
    LogitsAndIds(AnyMatRef<'a>, &'a [i32]),
    /// The [`Routing`] as the caller has filled it, by [`Routing::set_given`] or an earlier call on as many tokens.
    Routing,
}

/// What one call may add to its input.
#[derive(Clone, Copy, Debug, Default)]
pub struct Forward<'a> {
    /// Where the routing comes from.
    pub route: RouteFrom<'a>,
    /// Added to the result, `[T, H]`.
    pub residual: Option<AnyMatRef<'a>>,
    /// Position of the first token, for a router with noise.
    pub position: u64,
}

impl MoeLayer {
    /// The layer: `y [T, H]` from `x [T, H]`, both of any format. Shorthand for [`forward_with`](Self::forward_with) with the gate's routing and
    /// no residual.
    ///
    /// # Errors
    /// As there.
    pub fn forward(
        &self,
        cpu: &Cpu,
        x: AnyMatRef<'_>,
        y: AnyMatMut<'_>,
        routing: &mut Routing,
        workspace: &mut [u8],
    ) -> Result<()> {
        self.forward_with(cpu, x, &Forward::default(), y, routing, workspace)
    }

    /// The layer: `y [T, H]` from `x [T, H]`, both of any format.
    ///
    /// `routing` receives ids, weights and the permutation. `workspace` holds [`workspace_size`](Self::workspace_size) bytes, of any content. Nothing is allocated
    /// once `routing` has been as large (rayon's own queues aside). The bits depend on neither ISA, threads, nor the other tokens, but for routers that look
    /// at several tokens (capacity, expert choice).
    ///
    /// # Errors
    /// An [`Error`] that names the argument; `y` is untouched then.
    pub fn forward_with(
        &self,
        cpu: &Cpu,
        x: AnyMatRef<'_>,
        forward: &Forward<'_>,
        y: AnyMatMut<'_>,
        routing: &mut Routing,
        workspace: &mut [u8],
    ) -> Result<()> {
        let tokens = x.rows();
        x.expect("x", tokens, self.hidden())?;
        y.expect("y", tokens, self.hidden())?;
        if let Some(residual) = &forward.residual {
            residual.expect("residual", tokens, self.hidden())?;
        }
        let slots = match forward.route {
            RouteFrom::Routing => routing.slots(),
            _ => self.router.config().slots(),
        };
        let pairs = crate::shape::pairs(tokens, slots)?;
        let needed = self.workspace_bytes(cpu, tokens, pairs, x.dtype().size())?;
        let pieces = Pieces::take(self, tokens, pairs, x.dtype(), workspace, needed)?;
        self.check_packed(cpu)?;
        self.route(cpu, x, forward, routing, pieces)
            .and_then(|pieces| self.run(cpu, x, forward.residual, routing, y, pieces))
    }

    /// The router's stage alone: logits through the gate, ids, weights and the permutation into `routing`.
    ///
    /// `workspace` is that of [`forward`](Self::forward). A [`forward_with`](Self::forward_with) of the same tokens by [`RouteFrom::Routing`] finishes the
    /// layer.
    ///
    /// # Errors
    /// An [`Error`] that names the argument; `routing` is untouched then.
    pub fn route_into(
        &self,
        cpu: &Cpu,
        x: AnyMatRef<'_>,
        forward: &Forward<'_>,
        routing: &mut Routing,
        workspace: &mut [u8],
    ) -> Result<()> {
        x.expect("x", x.rows(), self.hidden())?;
        let pairs = crate::shape::pairs(x.rows(), self.router.config().slots())?;
        let needed = self.workspace_bytes(cpu, x.rows(), pairs, x.dtype().size())?;
        let pieces = Pieces::take(self, x.rows(), pairs, x.dtype(), workspace, needed)?;
        self.check_packed(cpu)?;
        self.route(cpu, x, forward, routing, pieces).map(drop)
    }

    /// The gate's logits `norm(x) · Wᵀ + b` as they are before multiplier, softcap and noise (see [`Router::effective_logits_into`](crate::routing::Router::effective_logits_into)).
    ///
    /// # Errors
    /// An [`Error`] that names the argument; [`Error::Value`] naming `gate` when the layer has none.
    pub fn logits_into(
        &self,
        cpu: &Cpu,
        x: AnyMatRef<'_>,
        logits: MatMut<'_, f32>,
        workspace: &mut [u8],
    ) -> Result<()> {
        x.expect("x", x.rows(), self.hidden())?;
        let Some(gate) = &self.gate else {
            return Err(Error::value("gate", "a layer with a gate", "none"));
        };
        let pairs = crate::shape::pairs(x.rows(), self.router.config().slots())?;
        let needed = self.workspace_bytes(cpu, x.rows(), pairs, x.dtype().size())?;
        let pieces = Pieces::take(self, x.rows(), pairs, x.dtype(), workspace, needed)?;
        gate.check_isa(cpu)?;
        gate.logits_into(cpu, x, pieces.gate_x, logits.into(), None, pieces.scratch)
    }

    /// Everything packed must be for `cpu`; checked before the first stage writes.
    fn check_packed(&self, cpu: &Cpu) -> Result<()> {
        self.experts.check_isa(cpu)?;
        if let Some(gate) = &self.gate {
            gate.check_isa(cpu)?;
        }
        if let Some(latent) = &self.latent {
            latent.check_isa(cpu)?;
        }
        match &self.shared {
            Some(shared) => shared.check_isa(cpu),
            None => Ok(()),
        }
    }

    /// Fills `routing`; gives the workspace back.
    fn route<'w>(
        &self,
        cpu: &Cpu,
        x: AnyMatRef<'_>,
        forward: &Forward<'_>,
        routing: &mut Routing,
        mut pieces: Pieces<'w>,
    ) -> Result<Pieces<'w>> {
        let (tokens, width) = (x.rows(), self.router.config().num_logits());
        let (logits, ids) = match forward.route {
            RouteFrom::Routing => {
                self.check_given(routing, tokens)?;
                routing.localize(cpu, self.local_experts(), 1)?;
                return Ok(pieces);
            }
            RouteFrom::Gate => (None, None),
            RouteFrom::GateAndIds(ids) => (None, Some(ids)),
            RouteFrom::Logits(logits) => (Some(logits), None),
            RouteFrom::LogitsAndIds(logits, ids) => (Some(logits), Some(ids)),
        };
        let mut noise = None;
        let logits = match (logits, &self.gate) {
            (Some(logits), _) => {
                logits.expect("logits", tokens, width)?;
                logits
            }
            (None, Some(gate)) => {
                let out = MatMut::new(pieces.logits, tokens, width)?.into();
                let noise_out = match &gate.noise {
                    Some(_) => Some(MatMut::new(&mut *pieces.noise, tokens, width)?.into()),
                    None => None,
                };
                gate.logits_into(cpu, x, pieces.gate_x, out, noise_out, pieces.scratch)?;
                if gate.noise.is_some() {
                    noise = Some(MatRef::new(&*pieces.noise, tokens, width)?);
                }
                MatRef::new(&*pieces.logits, tokens, width)?.into()
            }
            (None, None) => {
                return Err(Error::value(
                    "route",
                    "logits or routing for a layer without a gate",
                    "none",
                ));
            }
        };
        let mut input = RouteInput::new(logits)
            .position(forward.position)
            .local_experts(self.local_experts());
        if let Some(noise) = noise {
            input = input.noise_logits(noise);
        }
        if let Some(ids) = ids {
            input = input.given_ids(ids);
        }
        self.router.route(cpu, &input, routing)?;
        pieces.gate_x = &mut [];
        pieces.logits = &mut [];
        pieces.noise = &mut [];
        Ok(pieces)
    }

    /// A routing that the caller made must be for these tokens and experts.
    fn check_given(&self, routing: &Routing, tokens: usize) -> Result<()> {
        if routing.tokens() != tokens {
            return Err(Error::shape(
                "routing",
                [tokens, routing.slots()],
                [routing.tokens(), routing.slots()],
            ));
        }
        let config = self.router.config();
        let expected = (config.num_experts, config.null_experts, config.joint_shared);
        let found = (
            routing.num_experts(),
            routing.null_experts(),
            routing.joint_shared(),
        );
        if found == expected {
            Ok(())
        } else {
            Err(Error::value(
                "routing",
                format!("one for {expected:?} (experts, null experts, joint shared experts)"),
                format!("{found:?}"),
            ))
        }
    }

    /// Experts, shared experts and the combine, from a finished routing. Every shape was checked or follows from the layer's own.
    fn run(
        &self,
        cpu: &Cpu,
        x: AnyMatRef<'_>,
        residual: Option<AnyMatRef<'_>>,
        routing: &Routing,
        y: AnyMatMut<'_>,
        pieces: Pieces<'_>,
    ) -> Result<()> {
        let (tokens, hidden, scratch) = (x.rows(), self.hidden(), pieces.scratch);
        let expert_x = match &self.latent {
            Some(latent) => latent.enter(cpu, x, pieces.latent_x, scratch)?,
            None => x,
        };
        let ys = self.visit(
            cpu,
            expert_x,
            x.dtype(),
            routing,
            pieces.h,
            pieces.ys,
            scratch,
        )?;
        let mut combine = Combine::new(Routed::Pairs {
            ys,
            weights: (!self.weight_on_input).then(|| routing.weights()),
            row_of_pair: routing.permutation().row_of_pair(),
            slots: routing.slots(),
            identity: (self.adds_identity() && !self.sum_goes_by_buffer()).then(|| Identity {
                ids: routing.ids(),
                num_experts: routing.num_experts(),
                x,
            }),
        });
        combine.routed_scale = self.routed_scale;
        if self.sum_goes_by_buffer() {
            let routed = pieces.routed;
            match &self.latent {
                Some(latent) => latent.leave(cpu, &combine, pieces.latent_y, routed, scratch)?,
                None => combine_into(cpu, &combine, MatMut::new(routed, tokens, hidden)?.into())?,
            }
            if self.adds_identity() {
                add_identity(routed, x, routing, self.routed_scale);
            }
            combine = Combine::new(Routed::Sum(MatRef::new(routed, tokens, hidden)?));
        }
        combine.shared = match &self.shared {
            Some(shared) => Some(shared.run(
                cpu,
                x,
                routing,
                pieces.shared_h,
                pieces.shared_y,
                pieces.shared_gate,
                scratch,
            )?),
            None => None,
        };
        combine.norm = self.out_norm.as_ref();
        combine.bias = self.out_bias.as_deref();
        combine.residual = residual;
        combine_into(cpu, &combine, y)
    }

    /// The pairs through their experts: `ys [rows, L]` in the order of the permutation; h has the format `dtype`.
    fn visit<'w>(
        &self,
        cpu: &Cpu,
        x: AnyMatRef<'_>,
        dtype: DType,
        routing: &Routing,
        h: &mut [u8],
        ys: &'w mut [f32],
        scratch: &mut [u8],
    ) -> Result<MatRef<'w, f32>> {
        let permutation = routing.permutation();
        let local = self.local_experts();
        let groups = Groups::Ragged {
            offsets: &permutation.offsets()[local.start..=local.end],
            counts: &permutation.counts()[local],
        };
        let (rows, i, l) = (
            groups.total_rows(),
            self.experts.intermediate(),
            self.experts.hidden(),
        );
        let gather = Gather {
            pair_of_row: permutation.pair_of_row(),
            slots: routing.slots(),
            input_scale: self.weight_on_input.then(|| routing.weights()),
        };
        let h = any_mat_mut(&mut h[..rows * i * dtype.size()], dtype, rows, i)?;
        let ys = &mut ys[..rows * l];
        let out = MatMut::new(&mut *ys, rows, l)?.into();
        self.experts
            .forward_into(cpu, x, Some(gather), groups, h, out, scratch)?;
        if let Some(norm) = &self.post_norm {
            normalize_rows(cpu, ys, norm);
        }
        MatRef::new(ys, rows, l)
    }

    /// Whether this layer answers for identity experts: of the parts of a layer, the first does.
    fn adds_identity(&self) -> bool {
        let null = self.router.config().null_experts;
        matches!(null, NullExperts::Identity(_)) && self.first_expert == 0
    }

    /// Whether something comes between the sum over slots and the rest: a projection, or identity experts that the sum cannot hold. Those
    /// return the layer's x, which has no place in a latent sum, nor in one whose weights have acted on the input.
    pub(super) fn sum_goes_by_buffer(&self) -> bool {
        self.latent.is_some() || (self.weight_on_input && self.adds_identity())
    }
}

/// `routed[t] += scale · Σ weight · x[t]` over the identity experts of token t, each sum one chain in slot order. Plain loops: no published
/// layer comes here.
fn add_identity(routed: &mut [f32], x: AnyMatRef<'_>, routing: &Routing, scale: f32) {
    let (slots, hidden) = (routing.slots(), x.cols());
    for (t, row) in routed.chunks_exact_mut(hidden).enumerate() {
        let pairs = t * slots..(t + 1) * slots;
        let ids = routing.ids()[pairs.clone()]
            .iter()
            .zip(&routing.weights()[pairs]);
        for (col, out) in row.iter_mut().enumerate() {
            let mut v = [0.0];
            x.widen_row(t, col, &mut v);
            let sum = ids.clone().fold(0.0f32, |sum, (&id, &weight)| {
                let identity = usize::try_from(id).is_ok_and(|id| id >= routing.num_experts());
                if identity {
                    weight.mul_add(v[0], sum)
                } else {
                    sum
                }
            });
            *out += sum * scale;
        }
    }
}
