//! Refuses what the kernels do not do, and operands that are not what a config wants.

use super::{MAX_LOGITS, MAX_TOP_K, RoutePointers, row_width, workspace_size};
use crate::cuda::plan::DevicePtr;
use crate::element::DType;
use crate::error::{Error, Result};
use crate::routing::{RouterConfig, Selection, WeightSource};

/// Refuses what the kernels do not do.
pub(super) fn check_config(config: &RouterConfig) -> Result<()> {
    config.validate()?;
    let all = matches!(
        config.selection,
        Selection::Dense | Selection::ExpertChoice { .. }
    );
    if !all && config.top_k > MAX_TOP_K {
        let expected = format_args!("at most {MAX_TOP_K} on a GPU").to_string();
        return Err(Error::value("top_k", expected, config.top_k));
    }
    if row_width(config) > MAX_LOGITS {
        let field = match () {
            () if config.num_experts > MAX_LOGITS => "num_experts",
            () if config.selectable() > MAX_LOGITS => "null_experts",
            () => "joint_shared",
        };
        let expected = format!("at most {MAX_LOGITS} logits of a token on a GPU");
        return Err(Error::value(field, expected, row_width(config)));
    }
    if config.selection == Selection::Dense && config.weights == WeightSource::JointWithShared {
        let expected = "Score or SoftmaxSelectedLogits, with Dense on a GPU";
        return Err(Error::value("weights", expected, "JointWithShared"));
    }
    Ok(())
}

/// An operand is there when it is wanted and only then, and at a multiple of `align` bytes.
fn check_pointer(
    argument: &'static str,
    pointer: DevicePtr,
    align: u64,
    wanted: bool,
) -> Result<()> {
    if wanted == pointer.is_null() {
        let (expected, found) = match wanted {
            true => ("device memory", "no pointer"),
            false => ("none with this config", "a pointer"),
        };
        return Err(Error::value(argument, expected, found));
    }
    if !pointer.is_aligned(align) {
        let expected = format!("an address at a multiple of {align} bytes");
        return Err(Error::value(
            argument,
            expected,
            format_args!("{:#x}", pointer.0),
        ));
    }
    Ok(())
}

pub(super) fn check_pointers(config: &RouterConfig, dtype: DType, p: &RoutePointers) -> Result<()> {
    let ranks = matches!(
        config.selection,
        Selection::TopK { .. } | Selection::ProductKeys { .. }
    );
    let workspace = workspace_size(config, 1)? > 0;
    let has = |pointer: DevicePtr| !pointer.is_null();
    for (argument, pointer, align, wanted) in [
        ("logits", p.logits, dtype.size() as u64, true),
        (
            "noise_logits",
            p.noise_logits,
            dtype.size() as u64,
            config.noise_seed.is_some(),
        ),
        (
            "correction_bias",
            p.correction_bias,
            4,
            ranks && has(p.correction_bias),
        ),
        (
            "per_expert_scale",
            p.per_expert_scale,
            4,
            has(p.per_expert_scale),
        ),
        (
            "given_ids",
            p.given_ids,
            4,
            config.selection == Selection::Given,
        ),
        ("ids", p.ids, 4, true),
        ("weights", p.weights, 4, true),
        (
            "shared_weights",
            p.shared_weights,
            4,
            config.joint_shared > 0,
        ),
        (
            "workspace",
            p.workspace,
            8,
            workspace || has(p.workspace), // one for several routers may be passed along
        ),
    ] {
        check_pointer(argument, pointer, align, wanted)?;
    }
    Ok(())
}
