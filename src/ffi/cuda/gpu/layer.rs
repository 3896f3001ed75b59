//! `moe_cuda_layer`'s handle.

use super::{RouterTensors, answer, numerics};
use crate::cuda::moe::{CudaMoeLayer, SharedExpert, SharedJoin};
use crate::ffi::cuda::{moe_cuda_layer, moe_cuda_layer_config};
use crate::ffi::grouped_gemm::activation;
use crate::ffi::handle::{check_place, give, handle, shared};
use crate::ffi::memory::{dtype, read_struct};
use crate::ffi::moe::{MOE_JOIN_ADD, MOE_JOIN_AVERAGE, MOE_JOIN_SIGMOID_GATE};
use crate::ffi::permute::local_range;
use crate::ffi::router::{flag, moe_router};
use crate::ffi::status::*;
use crate::grouped_gemm::Activation;

/// What [`moe_cuda_layer`] stands for.
pub(in crate::ffi) struct Layer {
    pub(super) layer: CudaMoeLayer,
    pub(super) activation: Activation,
    pub(super) tensors: RouterTensors,
}

handle!(moe_cuda_layer, Layer, b"moeculay");

/// # Safety
/// As `moe_cuda_layer_create`.
pub(in crate::ffi::cuda) unsafe fn layer_create(
    router: *const moe_router,
    config: *const moe_cuda_layer_config,
    out: *mut *mut moe_cuda_layer,
) -> Checked {
    // SAFETY: this function's contract.
    let (router, c) = unsafe {
        check_place(out)?;
        (shared(router)?, read_struct("config", config)?)
    };
    // SAFETY: this function's contract.
    let act = unsafe { activation(c.activation) }?;
    if c.reserved != 0 {
        return Err(Fault::value("config", "reserved = 0", c.reserved));
    }
    let format = dtype("dtype", c.dtype)?;
    let config = router.config().clone();
    if config.joint_shared != 0 {
        let expected = "0: this interface has no shared experts that the router weighs on a GPU";
        return Err(Fault::value("joint_shared", expected, config.joint_shared));
    }
    let mut layer = CudaMoeLayer::new(config, c.hidden, c.intermediate, act, format)?
        .with_numerics(numerics(c.numerics)?);
    if c.ys_dtype != 0 {
        layer = layer.with_ys_dtype(dtype("ys_dtype", c.ys_dtype)?);
    }
    if let Some(local) = local_range(c.first_local, c.num_local)? {
        layer = layer.with_local_experts(local)?;
    }
    if flag("strict", c.strict)? {
        layer = layer.with_strict();
    }
    if flag("weight_on_input", c.weight_on_input)? {
        layer = layer.with_weight_on_input();
    }
    if c.routed_scale != 0.0 {
        layer = layer.with_routed_scale(c.routed_scale)?;
    }
    // SAFETY: this function's contract.
    if let Some(expert) = unsafe { shared_expert(&c, act) }? {
        layer = layer.with_shared(expert)?;
    }
    let tensors = RouterTensors::of(&router);
    let layer = Layer {
        layer,
        activation: act,
        tensors,
    };
    // SAFETY: this function's contract.
    unsafe { give(out, layer) }
}

/// # Safety
/// As `moe_cuda_layer_create`.
unsafe fn shared_expert(
    c: &moe_cuda_layer_config,
    of_others: Activation,
) -> Checked<Option<SharedExpert>> {
    if c.shared_intermediate == 0 {
        if !c.shared_activation.is_null() {
            let expected = "NULL with shared_intermediate = 0";
            return Err(Fault::value("shared_activation", expected, "an activation"));
        }
        return match c.shared_join {
            0 => Ok(None),
            other => Err(Fault::value(
                "shared_join",
                "0 with shared_intermediate = 0",
                other,
            )),
        };
    }
    let join = match c.shared_join {
        MOE_JOIN_ADD => SharedJoin::Add,
        MOE_JOIN_SIGMOID_GATE => SharedJoin::SigmoidGate,
        MOE_JOIN_AVERAGE => SharedJoin::Average,
        other => {
            let expected = "MOE_JOIN_ADD, MOE_JOIN_SIGMOID_GATE or MOE_JOIN_AVERAGE on a GPU";
            return Err(Fault::value("shared_join", expected, other));
        }
    };
    let activation = match c.shared_activation.is_null() {
        true => of_others,
        // SAFETY: this function's contract.
        false => unsafe { activation(c.shared_activation) }?,
    };
    let intermediate = c.shared_intermediate;
    Ok(Some(SharedExpert::new(intermediate, activation, join)))
}

/// # Safety
/// As `moe_cuda_layer_workspace_size`.
pub(in crate::ffi::cuda) unsafe fn workspace_size(
    layer: *const moe_cuda_layer,
    max_tokens: usize,
    bytes: *mut usize,
) -> Checked {
    // SAFETY: this function's contract.
    let layer = unsafe { shared(layer) }?;
    let device = crate::cuda::current_device_info()?;
    let needed = layer.layer.workspace_size(max_tokens, &device)?;
    // SAFETY: this function's contract.
    unsafe { answer([("bytes", bytes)], [needed]) }
}
