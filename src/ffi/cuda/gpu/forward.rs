//! The whole layer.

use super::layer::Layer;
use super::memory::{Array, DeviceRegions, Matrix};
use super::norm;
use super::weights::{EXPERTS, SHARED, Sizes, experts};
use crate::cuda::RawStream;
use crate::cuda::moe::{GatePointers, MoePointers, RoutingPointers, SharedPointers};
use crate::cuda::raw::CurrentGpu;
use crate::ffi::cuda::{moe_cuda_forward, moe_cuda_layer};
use crate::ffi::handle::shared;
use crate::ffi::memory::read_struct;
use crate::ffi::status::*;
use crate::shape::pairs;
use core::ffi::c_void;

/// Queues a call, or loads what it needs where there is no stream.
///
/// # Safety
/// As `moe_cuda_layer_forward`; without a stream as `moe_cuda_layer_prepare`.
pub(in crate::ffi::cuda) unsafe fn forward(
    layer: *const moe_cuda_layer,
    stream: Option<*mut c_void>,
    args: *const moe_cuda_forward,
) -> Checked {
    // SAFETY: this function's contract.
    let (layer, a) = unsafe { (shared(layer)?, read_struct("args", args)?) };
    let mut call = Call {
        layer: &layer,
        a: &a,
        regions: DeviceRegions::new(),
    };
    // SAFETY: this function's contract.
    let (tokens, pointers) = unsafe { call.read() }?;
    call.regions.apart()?;
    let gpu = CurrentGpu::get()?;
    let needed = layer.layer.workspace_size(tokens, gpu.info())?;
    call.workspace().check_len(needed)?;
    let plan = layer.layer.plan(tokens, &pointers, gpu.info())?;
    match stream {
        None => gpu.prepare(plan.iter())?,
        // SAFETY: the caller's promise for stream and memory; the plan was made of this call's addresses, whose extents are what the caller says.
        Some(stream) => unsafe { gpu.queue(RawStream(stream), plan.iter()) }?,
    }
    Ok(())
}

/// A call while it is read.
struct Call<'a> {
    layer: &'a Layer,
    a: &'a moe_cuda_forward,
    regions: DeviceRegions,
}

impl Call<'_> {
    fn workspace(&self) -> Array {
        Array::bytes("workspace", self.a.workspace, self.a.workspace_bytes, 1)
    }

    /// Every operand, checked against the layer: T and the pointers.
    ///
    /// # Safety
    /// The pointers of the arguments are null or valid.
    unsafe fn read(&mut self) -> Checked<(usize, MoePointers)> {
        let (a, layer) = (self.a, &self.layer.layer);
        let hidden = layer.hidden();
        // SAFETY: this function's contract, here and below.
        let (x, y) = unsafe {
            (
                self.regions.matrix("x", a.x)?,
                self.regions.matrix_mut("y", a.y)?,
            )
        };
        let tokens = x.rows;
        let (x, out) = (x.expect(tokens, hidden)?, y.expect(tokens, hidden)?);
        // SAFETY: as above.
        let routing = unsafe { self.routing(tokens) }?;
        let sizes = Sizes {
            experts: layer.local_experts().len(),
            hidden,
            intermediate: layer.intermediate(),
            gated: self.layer.activation.gated,
        };
        // SAFETY: as above.
        let experts = unsafe { experts(&mut self.regions, &EXPERTS, a.experts, sizes) }?;
        let workspace = self.workspace().scratch(&mut self.regions)?;
        let mut pointers = MoePointers::new(x, routing, experts, out, workspace);
        // SAFETY: as above.
        unsafe {
            self.router_operands(tokens, &mut pointers)?;
            pointers.shared = self.shared()?;
            self.output_steps(&y, &mut pointers)?;
        }
        Ok((tokens, pointers))
    }

    /// Where ids and weights come from.
    ///
    /// # Safety
    /// As [`Self::read`].
    unsafe fn routing(&mut self, tokens: usize) -> Checked<RoutingPointers> {
        let (a, layer) = (self.a, &self.layer.layer);
        let (router, hidden) = (layer.router(), layer.hidden());
        let ids = Array::of("ids", a.ids, a.ids_len);
        let weights = Array::of("weights", a.weights, a.weights_len);
        let gate_bias = Array::of("gate_bias", a.gate_bias, a.gate_bias_len);
        if a.gate.is_null() {
            gate_bias.must_be_absent("none without a gate")?;
        }
        // Without tokens the arrays are empty, and may be absent.
        let given = !(ids.is_absent() && weights.is_absent())
            || (tokens == 0 && a.gate.is_null() && a.logits.is_null());
        let sources = [!a.gate.is_null(), !a.logits.is_null(), given];
        match sources.into_iter().filter(|&s| s).count() {
            1 => {}
            n => {
                let expected = "exactly one of gate, logits, and ids with weights";
                return Err(Fault::value("routing", expected, n));
            }
        }
        let regions = &mut self.regions;
        // SAFETY: this function's contract.
        let (gate, logits) = unsafe {
            (
                regions.optional_matrix("gate", a.gate)?,
                regions.optional_matrix("logits", a.logits)?,
            )
        };
        Ok(match (gate, logits) {
            (Some(gate), _) => RoutingPointers::Gate(GatePointers {
                weights: gate.expect(router.num_logits(), hidden)?,
                bias: match gate_bias.is_absent() {
                    true => None,
                    false => Some(gate_bias.exactly(regions, router.num_logits())?),
                },
            }),
            (None, Some(logits)) => {
                RoutingPointers::Logits(logits.expect(tokens, router.num_logits())?)
            }
            (None, None) => {
                let pairs = pairs(tokens, router.slots())?;
                RoutingPointers::Given {
                    ids: ids.exactly(regions, pairs)?,
                    weights: weights.exactly(regions, pairs)?,
                }
            }
        })
    }

    /// What the router reads besides logits.
    ///
    /// # Safety
    /// As [`Self::read`].
    unsafe fn router_operands(&mut self, tokens: usize, p: &mut MoePointers) -> Checked {
        let (a, router) = (self.a, self.layer.layer.router());
        let given = Array::of("given_ids", a.given_ids, a.given_ids_len);
        let (bias, len) = (a.correction_bias, a.correction_bias_len);
        let bias = Array::of("correction_bias", bias, len);
        let (scale, len) = (a.per_expert_scale, a.per_expert_scale_len);
        let scale = Array::of("per_expert_scale", scale, len);
        if matches!(p.routing, RoutingPointers::Given { .. }) {
            let why = "none with ids, which the router does not touch";
            [given, bias, scale]
                .iter()
                .try_for_each(|array| array.must_be_absent(why))?;
            return match a.noise_logits.is_null() {
                true => Ok(()),
                false => Err(Fault::value("noise_logits", why, "a matrix")),
            };
        }
        self.layer.tensors.expect(bias, scale)?;
        let regions = &mut self.regions;
        p.given_ids = given.exactly_or_absent(regions, pairs(tokens, router.slots())?)?;
        p.correction_bias = bias.exactly_or_absent(regions, router.selectable())?;
        p.per_expert_scale = scale.exactly_or_absent(regions, router.num_experts)?;
        // SAFETY: this function's contract.
        p.noise_logits = unsafe { regions.optional_matrix("noise_logits", a.noise_logits) }?
            .map(|m| m.expect(tokens, router.num_logits()))
            .transpose()?;
        p.position = a.position;
        Ok(())
    }

    /// The shared expert's weights.
    ///
    /// # Safety
    /// As [`Self::read`].
    unsafe fn shared(&mut self) -> Checked<Option<SharedPointers>> {
        let (a, layer) = (self.a, &self.layer.layer);
        let Some(shared) = layer.shared() else {
            let unused = |argument| {
                let expected = "NULL, since the layer has no shared expert";
                Err(Fault::value(argument, expected, "some"))
            };
            return match (a.shared.is_null(), a.shared_gate.is_null()) {
                (true, true) => Ok(None),
                (false, _) => unused("shared"),
                (true, false) => unused("shared_gate"),
            };
        };
        let sizes = Sizes {
            experts: 1,
            hidden: layer.hidden(),
            intermediate: shared.intermediate,
            gated: shared.activation.gated,
        };
        // SAFETY: this function's contract.
        let (expert, gate) = unsafe {
            (
                experts(&mut self.regions, &SHARED, a.shared, sizes)?,
                self.regions.optional_matrix("shared_gate", a.shared_gate)?,
            )
        };
        let gate = gate.map(|g| g.expect(1, layer.hidden())).transpose()?;
        Ok(Some(SharedPointers { expert, gate }))
    }

    /// Norm, bias and residual.
    ///
    /// # Safety
    /// As [`Self::read`].
    unsafe fn output_steps(&mut self, y: &Matrix, p: &mut MoePointers) -> Checked {
        let (a, hidden) = (self.a, self.layer.layer.hidden());
        let bias = Array::of("out_bias", a.out_bias, a.out_bias_len);
        p.out_bias = bias.exactly_or_absent(&mut self.regions, hidden)?;
        // SAFETY: this function's contract.
        unsafe {
            p.out_norm = norm(&mut self.regions, "out_norm", a.out_norm, hidden)?;
            p.residual = self.regions.residual(a.residual, y)?;
        }
        Ok(())
    }
}
