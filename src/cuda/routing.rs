//! Ids and weights from logits on the GPU: plans for `kernels/routing.cu`.
//!
//! Ids and the bits of weights are those of [`Router::route`](crate::routing::Router::route), whatever the GPU, the batch and the format of the logits, NaN and
//! ties included (contract D4): sums run in the same 32 lanes, exp and its relatives are the same polynomials over IEEE operations, ranking is by the same integer
//! keys, and nothing is decided by an atomic. One thing differs, because a kernel cannot return an error: a given id that the CPU refuses counts as dropped.
//!
//! What a plan takes is a [`RouterConfig`]; the tensors of a router and the operands of a call are addresses. Everything stays on the device, so that the launches can be
//! captured in a CUDA graph and replayed with other logits.
//!
//! | router | launches |
//! |---|---|
//! | [`Selection::TopK`], [`Selection::Given`], [`Selection::SparseMixer`], [`Selection::ProductKeys`], [`Selection::Dense`] | one |
//! | Dense with a renormalisation | two: its sum runs over E slots in slot order |
//! | with a [`Capacity`](crate::routing::Capacity) | one more that drops; one to order tokens where they are batch-prioritised; one to renormalise after dropping |
//! | [`Selection::ExpertChoice`] | four: scores, each expert's last token, each token's experts, weights |
//!
//! # What stays on the CPU
//!
//! Each is an [`Error::Value`](crate::Error::Value) that names the field:
//!
//! * `top_k` above [`MAX_TOP_K`]: choices live in two registers of a warp's lanes. (Dense and expert choice have E slots and no such limit.)
//! * more than [`MAX_LOGITS`] logits of a token, null experts and joint shared experts included: a row lives in the registers of one block;
//! * [`WeightSource::JointWithShared`](crate::routing::WeightSource::JointWithShared) with [`Selection::Dense`]: no model has it, and its sum over E slots would need a kernel of its own.
//!
//! Auxiliary losses and load statistics are not here either: they are sums over a batch for training.
//!
//! ```
//! use moe_kernels::DType;
//! use moe_kernels::cuda::{DeviceInfo, DevicePtr};
//! use moe_kernels::cuda::routing::{RoutePointers, plan_route};
//! use moe_kernels::routing::RouterConfig;
//! let pointers = RoutePointers { // addresses of device memory
//!     logits: DevicePtr(0x1000), ids: DevicePtr(0x100000), weights: DevicePtr(0x200000),
//!     ..RoutePointers::default()
//! };
//! let plan = plan_route(&RouterConfig::mixtral(128, 8), 1000, DType::BF16, 0, &pointers, &DeviceInfo::H100)?;
//! assert_eq!(plan.len(), 1);
//! assert_eq!((plan[0].kernel, plan[0].grid, plan[0].block), ("moe_routing_plain_4", [250, 1, 1], [128, 1, 1]));
//! # Ok::<(), moe_kernels::Error>(())
//! ```

mod check;
mod params;

use super::plan::{DeviceInfo, DevicePtr, Launch, Module};
use crate::element::DType;
use crate::error::Result;
use crate::routing::{GroupLimit, Renorm, RouterConfig, Selection};
use crate::shape::pairs;
use check::{check_config, check_pointers};
use core::ops::Deref;
use params::params;

/// The most choices of a token.
pub const MAX_TOP_K: usize = 64;

/// The most logits of a token: experts, null experts and joint shared experts; for product keys the E = n² sums.
pub const MAX_LOGITS: usize = 4096;

/// The largest row of the kernels for plain routers, and their largest K.
const PLAIN_LOGITS: usize = 512;
const PLAIN_TOP_K: usize = 32;
/// Threads of a block that orders tokens by importance.
const ORDER_TOKENS: usize = 128;

/// Where the operands of a call are, in device memory. [`DevicePtr::NULL`] for what is absent; the default is nothing but absent operands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoutePointers {
    /// In: logits `[T, R]`, R = [`RouterConfig::num_logits`], in the plan's format.
    pub logits: DevicePtr,
    /// Elements from one row of logits to the next; 0 stands for R.
    pub logits_stride: u64,
    /// In: noise logits `[T, R]` in the same format, wanted when and only when the config has a [`RouterConfig::noise_seed`].
    pub noise_logits: DevicePtr,
    /// Elements from one row of noise logits to the next; 0 stands for R.
    pub noise_stride: u64,
    /// In, optional: f32 `[E + null experts]`, added to what the selection ranks. NaN in it ranks its expert as NaN.
    pub correction_bias: DevicePtr,
    /// In, optional: f32 `[E]`.
    pub per_expert_scale: DevicePtr,
    /// In: i32 `[T, K]`, wanted when and only when the selection is [`Selection::Given`].
    pub given_ids: DevicePtr,
    /// Out: i32 `[T, slots]`.
    pub ids: DevicePtr,
    /// Out: f32 `[T, slots]`.
    pub weights: DevicePtr,
    /// Out: f32 `[T, joint_shared]`, wanted when and only when that is not empty.
    pub shared_weights: DevicePtr,
    /// [`workspace_size`] bytes, at a multiple of 8; absent where that is 0. Its contents do not matter before and mean nothing after.
    pub workspace: DevicePtr,
}

/// The launches of a routing, to be queued in order on one stream. Derefs to a slice; empty when there are no tokens.
#[derive(Clone, Debug)]
pub struct RoutePlan {
    launches: [Launch; 4],
    len: usize,
}

impl Deref for RoutePlan {
    type Target = [Launch];

    fn deref(&self) -> &[Launch] {
        &self.launches[..self.len]
    }
}

impl RoutePlan {
    /// One launch with these parameters, so far.
    fn new(first: Launch) -> Self {
        let launches = [first.clone(), first.clone(), first.clone(), first];
        Self { launches, len: 1 }
    }

    fn then(&mut self, launch: Launch) {
        self.launches[self.len] = launch;
        self.len += 1;
    }
}

/// Bytes of workspace for up to `max_tokens` tokens; 0 but for batch-prioritised capacity and expert choice.
///
/// # Errors
/// Those of [`RouterConfig::validate`], and [`Error::Value`](crate::Error::Value) for what stays on the CPU, see the [module](self).
pub fn workspace_size(config: &RouterConfig, max_tokens: usize) -> Result<usize> {
    check_config(config)?;
    pairs(max_tokens, config.slots())?;
    Ok(match config.selection {
        Selection::ExpertChoice { .. } => config.num_experts * 8,
        _ if prioritized(config) => max_tokens * 8,
        _ => 0,
    })
}

fn prioritized(config: &RouterConfig) -> bool {
    config.capacity.is_some_and(|c| c.batch_prioritized)
}

/// Logits of a token in the kernel's registers.
fn row_width(config: &RouterConfig) -> usize {
    match config.selection {
        Selection::ProductKeys { .. } => config.num_experts,
        _ => config.num_logits(),
    }
}

/// Limiting to all groups is no limit.
fn group_limit(config: &RouterConfig) -> Option<GroupLimit> {
    match config.selection {
        Selection::TopK { groups, .. } => groups.filter(|g| g.topk_group < g.n_group),
        _ => None,
    }
}

/// Whether weights are renormalised by a later launch.
fn leaves_raw(config: &RouterConfig) -> bool {
    match config.selection {
        Selection::ExpertChoice { .. } => true,
        Selection::Dense => config.renorm != Renorm::None,
        _ => config.capacity.is_some_and(|c| !c.normalize_before_drop),
    }
}

/// Whether the kernels for plain routers do it.
fn is_plain(config: &RouterConfig) -> bool {
    matches!(config.selection, Selection::TopK { .. })
        && group_limit(config).is_none()
        && config.top_k <= PLAIN_TOP_K
        && row_width(config) <= PLAIN_LOGITS
        && config.logit_softcap == 0.0
        && config.noise_seed.is_none()
        && config.joint_shared == 0
        && !prioritized(config)
}

/// The kernel for a config, and whether it takes a block for each token.
fn kernel(config: &RouterConfig) -> (&'static str, bool) {
    let width = row_width(config);
    if is_plain(config) {
        return match width {
            0..=32 => ("moe_routing_plain_1", false),
            33..=64 => ("moe_routing_plain_2", false),
            65..=128 => ("moe_routing_plain_4", false),
            129..=256 => ("moe_routing_plain_8", false),
            _ => ("moe_routing_plain_16", false),
        };
    }
    match width {
        0..=64 => ("moe_routing_general_2", false),
        65..=256 => ("moe_routing_general_8", false),
        257..=1024 => ("moe_routing_wide_4", true),
        _ => ("moe_routing_wide_16", true),
    }
}

/// Plans the routing of `tokens` rows of logits; `position` is that of the first token, by which noise is drawn. Any number of tokens, 0 included.
///
/// # Errors
/// Those of [`RouterConfig::validate`]; [`Error::Value`](crate::Error::Value) for what stays on the CPU (see the [module](self)), for an operand that is absent though it is
/// wanted, or there though it is not, or not at a multiple of its element's size, and for a stride below R; [`Error::Overflow`](crate::Error::Overflow) when T·K does not fit.
pub fn plan_route(
    config: &RouterConfig,
    tokens: usize,
    dtype: DType,
    position: u64,
    pointers: &RoutePointers,
    device: &DeviceInfo,
) -> Result<RoutePlan> {
    check_config(config)?;
    pairs(tokens, config.slots().max(config.num_logits()))?;
    if tokens > 0 {
        check_pointers(config, dtype, pointers)?;
    }
    let params = params(config, tokens, dtype, position, pointers)?;
    let launch = |kernel, grid: [usize; 2], threads: u32| {
        Launch::new(Module::Routing, kernel, &params)
            .grid([grid[0] as u32, grid[1] as u32, 1])
            .block([threads, 1, 1])
    };
    // Few tokens: a block each, so that they spread over the multiprocessors; many: four to a block.
    let warps = if tokens <= 2 * device.sm_count as usize {
        1
    } else {
        4
    };
    let by_warp = |kernel| launch(kernel, [tokens.div_ceil(warps), 1], 32 * warps as u32);
    let first = match kernel(config) {
        (kernel, true) => launch(kernel, [tokens, 1], 256),
        (kernel, false) => by_warp(kernel),
    };
    let mut plan = RoutePlan::new(first);
    if tokens == 0 {
        plan.len = 0;
        return Ok(plan);
    }
    if matches!(config.selection, Selection::ExpertChoice { .. }) {
        plan.then(launch("moe_routing_choose", [config.num_experts, 1], 256));
        plan.then(launch("moe_routing_chosen", [tokens, 1], 256));
    }
    if config.capacity.is_some() {
        let scope = params.scope as usize;
        let scopes = tokens.div_ceil(scope);
        if prioritized(config) {
            let blocks = scope
                .div_ceil(ORDER_TOKENS)
                .min(4 * device.sm_count.max(1) as usize);
            plan.then(launch(
                "moe_routing_order",
                [scopes, blocks],
                ORDER_TOKENS as u32,
            ));
        }
        plan.then(launch(
            "moe_routing_capacity",
            [scopes, config.num_experts],
            32,
        ));
    }
    if leaves_raw(config) {
        plan.then(by_warp("moe_routing_finish"));
    }
    Ok(plan)
}
