//! [`RouterConfig`]: what a router does with its logits, as plain data.

/// What turns a logit z into a score s.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Score {
    /// `exp(z − max) / Σ exp(z − max)` over all rows of the router, null experts and joint shared experts included.
    Softmax,
    /// `1 / (1 + exp(−z))`
    Sigmoid,
    /// `√(ln(1 + exp(z)))` (DeepSeek-V4)
    SqrtSoftplus,
    /// `z`
    Identity,
}

/// What the selection ranks; the correction bias is added to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RankBy {
    /// The score.
    Score,
    /// The logit (Kolibri's bias acts there; for a monotonic score without bias the order is the same but for rounding).
    Logit,
}

/// How a group of experts is scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GroupScore {
    /// Its best value (DeepSeek-V2).
    Max,
    /// The sum of its best two values (DeepSeek-V3); of its only one where a group has one.
    Top2Sum,
}

/// What values outside the chosen groups become.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MaskedFill {
    /// They rank below everything, NaN included, so that K may not exceed the experts of the kept groups.
    NegInf,
    /// Zero, which can still win against a negative value; its weight is then the expert's own. NaN stays NaN.
    Zero,
}

/// Selection limited to the best groups of experts: E is split into `n_group` contiguous groups, the best `topk_group` are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GroupLimit {
    /// Number of groups; divides the number of selectable experts.
    pub n_group: usize,
    /// Groups kept, at most `n_group`.
    pub topk_group: usize,
    /// How a group is scored.
    pub score: GroupScore,
    /// What the other groups' values become.
    pub fill: MaskedFill,
}

/// Limited room in each expert: pairs beyond it are dropped (id [`DROPPED`](super::DROPPED), weight 0).
///
/// Places are taken slot by slot: all first choices, then all second choices (GShard, Lepikhin et al. 2020; Switch,
/// Fedus et al. 2021, where K = 1; NLLB). Null experts have room for all.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Capacity {
    /// Pairs that an expert accepts in one scope; 0 drops every pair.
    pub per_expert: usize,
    /// Tokens of a scope (a sequence); the count starts again with each. `None`: all tokens of the call are one scope.
    pub scope_tokens: Option<usize>,
    /// Serve tokens by their best score, falling, instead of by position (Riquelme et al. 2021). Equal scores go by position.
    pub batch_prioritized: bool,
    /// Renormalise weights before dropping, over all K, or (`false`) after, over the pairs that were kept.
    pub normalize_before_drop: bool,
}

/// How experts are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Selection {
    /// The K best by value; equal values go to the lower index (of groups too).
    TopK {
        /// What is ranked.
        rank_by: RankBy,
        /// Limit to the best groups.
        groups: Option<GroupLimit>,
    },
    /// Ids come from the caller (a token-id table, hash routing); weights still come from the scores. Ids *and* weights from
    /// the caller need no router: see [`Routing::set_given`](super::Routing::set_given).
    Given,
    /// PhiMoE's sparsemixer (Liu et al. 2023) at inference: K = 2, each weight a softmax over the experts within
    /// `2·jitter_eps` of the best remaining one.
    SparseMixer {
        /// Half the relative distance within which experts stay in the softmax.
        jitter_eps: f32,
    },
    /// Product keys (Lample et al. 2019; Doge): logits are two rows of n = √E, expert i·n + j scores `a_i + b_j`.
    ProductKeys {
        /// Doge reads the `[T, 2n]` logits as two stacked `[T, n]` matrices, which mixes neighbouring tokens. `false` gives
        /// token t its own two halves.
        stacked: bool,
    },
    /// Each expert takes its best `per_expert` tokens of the call, by score (Zhou et al. 2022; equal scores go to the lower token).
    /// A token may get no expert, or up to E: those that took it fill its first slots, best score first; the other slots are
    /// [`DROPPED`](super::DROPPED).
    ExpertChoice {
        /// Tokens that an expert takes; all of them when there are fewer.
        per_expert: usize,
    },
    /// Every expert, in index order (Jacobs et al. 1991).
    Dense,
}

/// Where a weight comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WeightSource {
    /// The score of the selected expert, without correction bias.
    Score,
    /// Softmax over the selected logits (gpt-oss).
    SoftmaxSelectedLogits,
    /// `σ(z) / Σ σ(z)`, the sum over the selected and the last [`RouterConfig::joint_shared`] rows of the router, which score shared
    /// experts (Inkling). Only with [`Score::Sigmoid`] and [`Renorm::None`]. Ratios survive where every σ(z) would underflow.
    JointWithShared,
}

/// How a token's K weights are divided.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Renorm {
    /// Not at all.
    None,
    /// By their sum.
    Sum,
    /// By their sum plus a small number.
    SumPlusEps(f32),
    /// By their sum, but by no less than a small number.
    SumClampMin(f32),
    /// By their p-norm `(Σ |w|^p)^(1/p)`, p > 0 (DBRX).
    PNorm(f32),
}

/// Experts without weights, with ids E, E + 1, …
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum NullExperts {
    /// None.
    #[default]
    None,
    /// So many that return their input: `y += w·x` (LongCat-Flash).
    Identity(usize),
    /// So many that return nothing; their weight is reported as 0 (Zaya).
    Zero(usize),
}

impl NullExperts {
    /// How many there are.
    pub fn count(self) -> usize {
        match self {
            Self::None => 0,
            Self::Identity(n) | Self::Zero(n) => n,
        }
    }
}

/// Everything that distinguishes one family's router from another's, in the order of the computation.
///
/// 1. logits `z ← z · logit_multiplier`, then, with a softcap c > 0, `z ← c · tanh(z / c)`;
/// 2. scores;
/// 3. selection of K experts, by score or logit plus correction bias;
/// 4. weights, renormalisation, `· scale`, `· per-expert scale`;
/// 5. capacity.
///
/// Start from a family's constructor, or from [`RouterConfig::new`], and change fields.
///
/// ```
/// use moe_kernels::routing::{Renorm, RouterConfig, Score};
/// let mut config = RouterConfig::mixtral(8, 2);
/// assert_eq!((config.score, config.renorm), (Score::Softmax, Renorm::Sum));
/// config.scale = 2.5;
/// config.validate()?;
/// # Ok::<(), moe_kernels::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct RouterConfig {
    /// E: experts that have weights.
    pub num_experts: usize,
    /// K: experts selected for a token. Ignored by [`Selection::Dense`] and [`Selection::ExpertChoice`], whose slots are E.
    pub top_k: usize,
    /// Experts without weights that can be selected too.
    pub null_experts: NullExperts,
    /// Rows at the end of the router that score shared experts; only with [`WeightSource::JointWithShared`].
    pub joint_shared: usize,
    /// Factor on every logit.
    pub logit_multiplier: f32,
    /// `c·tanh(z/c)` when greater than zero.
    pub logit_softcap: f32,
    /// Score function.
    pub score: Score,
    /// How experts are chosen.
    pub selection: Selection,
    /// Where weights come from.
    pub weights: WeightSource,
    /// How they are divided.
    pub renorm: Renorm,
    /// Factor on every weight, after the division.
    pub scale: f32,
    /// Limited room in each expert.
    pub capacity: Option<Capacity>,
    /// Seed of noisy top-k (Shazeer et al. 2017): `z + N(0,1) · softplus(noise logit)`, the normals drawn by counter from
    /// (seed, token position, expert). `None`: no noise.
    pub noise_seed: Option<u64>,
}

impl RouterConfig {
    /// Softmax over all, the K best by score, weights as they are. Change fields from there.
    pub fn new(num_experts: usize, top_k: usize) -> Self {
        Self {
            num_experts,
            top_k,
            null_experts: NullExperts::None,
            joint_shared: 0,
            logit_multiplier: 1.0,
            logit_softcap: 0.0,
            score: Score::Softmax,
            selection: Selection::TopK {
                rank_by: RankBy::Score,
                groups: None,
            },
            weights: WeightSource::Score,
            renorm: Renorm::None,
            scale: 1.0,
            capacity: None,
            noise_seed: None,
        }
    }

    /// Experts that can be selected: E and the null experts.
    pub fn selectable(&self) -> usize {
        self.num_experts.saturating_add(self.null_experts.count())
    }

    /// R: columns of the logits. 2·√E for product keys, else E, null experts and joint shared experts.
    pub fn num_logits(&self) -> usize {
        match self.selection {
            Selection::ProductKeys { .. } => 2 * self.num_experts.isqrt(),
            _ => self.selectable().saturating_add(self.joint_shared),
        }
    }

    /// Columns of the ids and weights: K, or E where every expert may serve a token.
    pub fn slots(&self) -> usize {
        match self.selection {
            Selection::Dense | Selection::ExpertChoice { .. } => self.num_experts,
            _ => self.top_k,
        }
    }
}
