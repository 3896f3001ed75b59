//! The layers that are measured.

use super::layer::shapes::{Architecture, named as published};
use super::layer::{Result, fail};
use moe_kernels::DType;
use moe_kernels::routing::RouterConfig;

/// Their names: three published layers, a cut one, and one for smoke tests.
pub const NAMES: [&str; 5] = ["qwen3-30b-a3b", "olmoe", "mixtral", "deepseek-v3", "tiny"];

/// A layer by name: routed experts only.
///
/// # Errors
/// A list of the names.
pub fn named(name: &str) -> Result<Architecture> {
    let found = match name {
        "mixtral" => published("mixtral-8x7b"),
        "deepseek-v3" => published(name).map(deepseek),
        _ if NAMES.contains(&name) => published(name),
        _ => None,
    };
    match found {
        Some(architecture) => Ok(Architecture {
            shared: None,
            ..architecture
        }),
        None => fail(format!(
            "unknown shape {name:?}; known are {}",
            NAMES.join(", ")
        )),
    }
}

/// 32 of the 256 experts, which one machine holds, behind the router that all rivals have: softmax, top 8, renormalised.
fn deepseek(all: Architecture) -> Architecture {
    Architecture {
        name: "deepseek-v3, 32 of 256 experts".into(),
        router: RouterConfig::qwen3_moe(32, all.router.top_k),
        correction_bias: false,
        ..all
    }
}

/// Bytes of the experts' weights.
pub fn weight_bytes(architecture: &Architecture, dtype: DType) -> usize {
    architecture.experts() * architecture.expert_elements() * dtype.size()
}
