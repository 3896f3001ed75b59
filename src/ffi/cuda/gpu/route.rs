//! Ids and weights from logits.

use super::memory::{Array, DeviceRegions};
use super::{RouterTensors, answer};
use crate::cuda::raw::CurrentGpu;
use crate::cuda::routing::{RoutePointers, plan_route, workspace_size};
use crate::cuda::{DevicePtr, RawStream};
use crate::ffi::cuda::moe_cuda_route_args;
use crate::ffi::handle::shared;
use crate::ffi::memory::read_struct;
use crate::ffi::router::moe_router;
use crate::ffi::status::*;
use crate::routing::RouterConfig;
use crate::shape::pairs;
use core::ffi::c_void;

/// # Safety
/// As `moe_cuda_route_workspace_size`.
pub(in crate::ffi::cuda) unsafe fn route_workspace_size(
    router: *const moe_router,
    max_tokens: usize,
    bytes: *mut usize,
) -> Checked {
    // SAFETY: this function's contract.
    let router = unsafe { shared(router) }?;
    let needed = workspace_size(router.config(), max_tokens)?;
    // SAFETY: this function's contract.
    unsafe { answer([("bytes", bytes)], [needed]) }
}

/// # Safety
/// As `moe_cuda_route`.
pub(in crate::ffi::cuda) unsafe fn route(
    router: *const moe_router,
    stream: *mut c_void,
    args: *const moe_cuda_route_args,
) -> Checked {
    // SAFETY: this function's contract.
    let (router, a) = unsafe { (shared(router)?, read_struct("args", args)?) };
    let config = router.config();
    let mut regions = DeviceRegions::new();
    // SAFETY: this function's contract.
    let (logits, noise) = unsafe {
        (
            regions.matrix("logits", a.logits)?,
            regions.optional_matrix("noise_logits", a.noise_logits)?,
        )
    };
    let (tokens, columns) = (logits.rows, config.num_logits());
    let logits = logits.expect(tokens, columns)?;
    let noise = noise.map(|n| n.expect(tokens, columns)).transpose()?;
    if let Some(other) = noise.filter(|n| n.dtype != logits.dtype) {
        let expected = format_args!("{}, as the logits are", logits.dtype);
        return Err(Fault::value("noise_logits", expected, other.dtype));
    }
    let pointers = RoutePointers {
        logits: logits.ptr,
        logits_stride: logits.stride as u64,
        noise_logits: noise.map_or(DevicePtr::NULL, |n| n.ptr),
        noise_stride: noise.map_or(0, |n| n.stride as u64),
        ..arrays(&mut regions, &a, config, RouterTensors::of(&router), tokens)?
    };
    regions.apart()?;
    let gpu = CurrentGpu::get()?;
    let plan = plan_route(
        config,
        tokens,
        logits.dtype,
        a.position,
        &pointers,
        gpu.info(),
    )?;
    // SAFETY: the caller's promise for stream and memory, whose extents are what the caller says.
    Ok(unsafe { gpu.queue(RawStream(stream), plan.iter()) }?)
}

/// All operands but the matrices.
fn arrays(
    regions: &mut DeviceRegions,
    a: &moe_cuda_route_args,
    config: &RouterConfig,
    tensors: RouterTensors,
    tokens: usize,
) -> Checked<RoutePointers> {
    let pairs = pairs(tokens, config.slots())?;
    let (bias, len) = (a.correction_bias, a.correction_bias_len);
    let bias = Array::of("correction_bias", bias, len);
    let (scale, len) = (a.per_expert_scale, a.per_expert_scale_len);
    let scale = Array::of("per_expert_scale", scale, len);
    tensors.expect(bias, scale)?;
    let given = Array::of("given_ids", a.given_ids, a.given_ids_len);
    let (joint, len) = (a.shared_weights, a.shared_weights_len);
    let joint = Array::of("shared_weights", joint, len);
    let shared_weights = match config.joint_shared {
        0 => {
            joint.must_be_absent("none without joint shared experts")?;
            DevicePtr::NULL
        }
        n => joint.written(
            regions,
            crate::error::checked_mul(tokens, n, "shared_weights")?,
        )?,
    };
    let workspace = Array::bytes("workspace", a.workspace, a.workspace_bytes, 8);
    workspace.check_len(workspace_size(config, tokens)?)?;
    Ok(RoutePointers {
        given_ids: given.exactly_or_absent(regions, pairs)?,
        correction_bias: bias.exactly_or_absent(regions, config.selectable())?,
        per_expert_scale: scale.exactly_or_absent(regions, config.num_experts)?,
        ids: Array::of("ids", a.ids, a.ids_len).written(regions, pairs)?,
        weights: Array::of("weights", a.weights, a.weights_len).written(regions, pairs)?,
        shared_weights,
        workspace: workspace.scratch(regions)?,
        ..RoutePointers::default()
    })
}
