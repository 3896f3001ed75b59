//! What `kernels/routing.cu` reads of a config and a call.

use super::{RoutePointers, group_limit, leaves_raw, prioritized, row_width};
use crate::cuda::plan::DevicePtr;
use crate::element::DType;
use crate::error::{Error, Result};
use crate::routing::{
    GroupScore, MaskedFill, NullExperts, RankBy, Renorm, RouterConfig, Score, Selection,
    WeightSource,
};
use bytemuck::{Pod, Zeroable};

mod flag {
    pub const RANK_BY_LOGIT: u32 = 1;
    pub const GROUP_TOP2_SUM: u32 = 2;
    pub const GROUP_FILL_ZERO: u32 = 4;
    pub const ZERO_NULLS: u32 = 8;
    pub const STACKED_KEYS: u32 = 16;
    pub const NOISY: u32 = 32;
    pub const LEAVE_RAW: u32 = 64;
}

/// `RoutingParams` of `kernels/include/routing/params.cuh`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct RouteParams {
    logits: DevicePtr,
    noise_logits: DevicePtr,
    bias: DevicePtr,
    per_expert_scale: DevicePtr,
    given_ids: DevicePtr,
    ids: DevicePtr,
    weights: DevicePtr,
    shared_weights: DevicePtr,
    importance: DevicePtr,
    last_taken: DevicePtr,
    order: DevicePtr,
    logits_stride: u64,
    noise_stride: u64,
    seed: u64,
    position: u64,
    tokens: u32,
    columns: u32,
    width: u32,
    experts: u32,
    selectable: u32,
    slots: u32,
    shared: u32,
    keys: u32,
    groups: u32,
    kept_groups: u32,
    group_size: u32,
    group_magic: u32,
    per_expert: u32,
    pub(super) scope: u32,
    dtype: u32,
    noise_dtype: u32,
    score: u32,
    selection: u32,
    weight_source: u32,
    renorm: u32,
    flags: u32,
    multiplier: f32,
    softcap: f32,
    renorm_value: f32,
    scale: f32,
    reach: f32,
}
const _: () = assert!(size_of::<RouteParams>() == 15 * 8 + 26 * 4);

/// The kernels' view of a checked call. All sizes fit: T·R and T·slots are below 2³², a row is at most [`MAX_LOGITS`](super::MAX_LOGITS).
pub(super) fn params(
    config: &RouterConfig,
    tokens: usize,
    dtype: DType,
    position: u64,
    pointers: &RoutePointers,
) -> Result<RouteParams> {
    let columns = config.num_logits();
    let groups = group_limit(config);
    let group_size = groups.map_or(0, |g| config.selectable() / g.n_group);
    let per_expert = match (config.selection, config.capacity) {
        (Selection::ExpertChoice { per_expert }, _) => per_expert,
        (_, Some(capacity)) => capacity.per_expert,
        _ => 0,
    };
    let scope = config.capacity.and_then(|c| c.scope_tokens);
    let (renorm, renorm_value) = match config.renorm {
        Renorm::None => (0, 0.0),
        Renorm::Sum => (1, 0.0),
        Renorm::SumPlusEps(eps) => (2, eps),
        Renorm::SumClampMin(eps) => (3, eps),
        Renorm::PNorm(p) => (4, p),
    };
    let used = |pointer, wanted| if wanted { pointer } else { DevicePtr::NULL };
    let choice = matches!(config.selection, Selection::ExpertChoice { .. });
    Ok(RouteParams {
        logits: pointers.logits,
        noise_logits: pointers.noise_logits,
        bias: pointers.correction_bias,
        per_expert_scale: pointers.per_expert_scale,
        given_ids: pointers.given_ids,
        ids: pointers.ids,
        weights: pointers.weights,
        shared_weights: pointers.shared_weights,
        importance: used(pointers.workspace, prioritized(config)),
        last_taken: used(pointers.workspace, choice),
        order: used(
            pointers.workspace.add(tokens as u64 * 4),
            prioritized(config),
        ),
        logits_stride: stride("logits_stride", pointers.logits_stride, tokens, columns)?,
        noise_stride: stride("noise_stride", pointers.noise_stride, tokens, columns)?,
        seed: config.noise_seed.unwrap_or_default(),
        position,
        tokens: tokens as u32,
        columns: columns as u32,
        width: row_width(config) as u32,
        experts: config.num_experts as u32,
        selectable: config.selectable() as u32,
        slots: config.slots() as u32,
        shared: config.joint_shared as u32,
        keys: match config.selection {
            Selection::ProductKeys { .. } => config.num_experts.isqrt() as u32,
            _ => 0,
        },
        groups: groups.map_or(0, |g| g.n_group as u32),
        kept_groups: groups.map_or(0, |g| g.topk_group as u32),
        group_size: group_size as u32,
        group_magic: match group_size {
            0 | 1 => 0,
            n => ((1u64 << 32) / n as u64 + 1) as u32,
        },
        per_expert: per_expert.min(u32::MAX as usize) as u32,
        scope: scope.unwrap_or(tokens).clamp(1, tokens.max(1)) as u32,
        dtype: dtype_code(dtype),
        noise_dtype: dtype_code(dtype),
        score: match config.score {
            Score::Softmax => 0,
            Score::Sigmoid => 1,
            Score::SqrtSoftplus => 2,
            Score::Identity => 3,
        },
        selection: match config.selection {
            Selection::TopK { .. } => 0,
            Selection::Given => 1,
            Selection::SparseMixer { .. } => 2,
            Selection::ProductKeys { .. } => 3,
            Selection::ExpertChoice { .. } => 4,
            Selection::Dense => 5,
        },
        weight_source: match config.weights {
            WeightSource::Score => 0,
            WeightSource::SoftmaxSelectedLogits => 1,
            WeightSource::JointWithShared => 2,
        },
        renorm,
        flags: flags(config),
        multiplier: config.logit_multiplier,
        softcap: config.logit_softcap,
        renorm_value,
        scale: config.scale,
        reach: match config.selection {
            Selection::SparseMixer { jitter_eps } => 2.0 * jitter_eps,
            _ => 0.0,
        },
    })
}

fn dtype_code(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 2,
    }
}

fn flags(config: &RouterConfig) -> u32 {
    let by_logit = matches!(
        config.selection,
        Selection::TopK {
            rank_by: RankBy::Logit,
            ..
        }
    );
    let groups = group_limit(config);
    [
        (flag::RANK_BY_LOGIT, by_logit),
        (
            flag::GROUP_TOP2_SUM,
            groups.is_some_and(|g| g.score == GroupScore::Top2Sum),
        ),
        (
            flag::GROUP_FILL_ZERO,
            groups.is_some_and(|g| g.fill == MaskedFill::Zero),
        ),
        (
            flag::ZERO_NULLS,
            matches!(config.null_experts, NullExperts::Zero(_)),
        ),
        (
            flag::STACKED_KEYS,
            config.selection == Selection::ProductKeys { stacked: true },
        ),
        (flag::NOISY, config.noise_seed.is_some()),
        (flag::LEAVE_RAW, leaves_raw(config)),
    ]
    .iter()
    .filter(|(_, set)| *set)
    .fold(0, |flags, (bit, _)| flags | bit)
}

/// A row stride in elements: R where none is given.
fn stride(argument: &'static str, stride: u64, tokens: usize, columns: usize) -> Result<u64> {
    match stride {
        0 => Ok(columns as u64),
        n if n < columns as u64 && tokens > 1 => {
            let expected = format!("at least {columns} elements from row to row, or 0");
            Err(Error::value(argument, expected, n))
        }
        n => Ok(n),
    }
}
