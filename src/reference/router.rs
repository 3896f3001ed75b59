//! What a router is, as plain data.

/// How logits become scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Score {
    /// [`softmax`](super::softmax) over all R rows of the token.
    Softmax,
    /// [`sigmoid`](super::sigmoid) of each.
    Sigmoid,
    /// `sqrt(softplus(z))` of each (DeepSeek-V4).
    SqrtSoftplus,
    /// The logit itself.
    Identity,
}

/// What the correction bias is added to, and the choice is made by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SelectOn {
    /// The score.
    Score,
    /// The logit.
    Logit,
}

/// How a group of experts is scored, from the selection values of its members.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum GroupScore {
    /// The best member (DeepSeek-V2).
    Max,
    /// The sum of the two best members (DeepSeek-V3); of one, if there is only one.
    Top2Sum,
}

/// What the selection value of an expert outside the chosen groups becomes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fill {
    /// Worse than everything, NaN included: such an expert comes last.
    NegInf,
    /// Zero, so it can beat a chosen expert whose value is negative. A NaN stays NaN.
    Zero,
}

/// Group-limited selection: the C candidates are split into `n_group` contiguous groups of one size, and
/// only the best `topk_group` groups take part.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Groups {
    /// Number of groups; divides C.
    pub n_group: usize,
    /// Groups that are kept.
    pub topk_group: usize,
    /// How a group is scored.
    pub score: GroupScore,
    /// What happens to the others.
    pub fill: Fill,
}

/// Where the K experts of a token come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Method {
    /// The K best candidates by selection value. See [`top_k`](super::top_k).
    TopK,
    /// Given by the caller: ids `[T,K]` and, if not empty, the weights `[T,K]` that go with them as they
    /// are. With empty weights, they are computed from the logits like anybody's.
    Given {
        /// `[T,K]`, in 0..C, or −1 for no expert.
        ids: Vec<i32>,
        /// `[T,K]`, or empty.
        weights: Vec<f64>,
    },
    /// Phi-3.5-MoE's sparsemixer at inference. See [`sparsemixer`](super::sparsemixer).
    Sparsemixer {
        /// Half the relative distance from the best logit beyond which others are masked.
        jitter_eps: f64,
    },
    /// n² = E experts named by pairs of 2n keys (Doge); experts beyond a square are never chosen. See [`product_keys`](super::product_keys); then as `TopK`.
    ProductKey {
        /// How the 2n logits of T tokens lie in memory.
        layout: KeyLayout,
    },
    /// Each expert takes its `capacity` best tokens (Zhou et al. 2022). See [`expert_choice`](super::expert_choice). Here K = C.
    ExpertChoice {
        /// Tokens per expert.
        capacity: usize,
    },
    /// Every candidate, in index order. Here K = C.
    Dense,
}

/// How the logits of a product-key router lie in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum KeyLayout {
    /// `[T, 2n]`: each token has its n first keys, then its n second keys.
    PerToken,
    /// `[2, T, n]`: the T·2n numbers are read as if all first keys came before all second keys. This is
    /// what Doge's code in HF transformers does with the `[T, 2n]` output of its router, so there a
    /// token's experts depend on the batch.
    BatchHalves,
}

/// A limit on the tokens that an expert accepts. See [`apply_capacity`](super::apply_capacity).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Capacity {
    /// Tokens that one expert accepts within one scope.
    pub per_expert: usize,
    /// Tokens after which the count restarts (Switch: the sequence length); `None` is the whole batch.
    pub scope_tokens: Option<usize>,
    /// Serve tokens by falling top-1 score, not in order.
    pub batch_prioritized: bool,
    /// Renormalise over all K choices before dropping; otherwise over those that remain.
    pub normalize_before_drop: bool,
}

/// What the weight of a chosen expert is, before renormalisation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum WeightsFrom {
    /// Its score, without the correction bias.
    Score,
    /// The softmax of the logits of the chosen experts.
    SoftmaxSelectedLogits,
    /// `sigmoid / Σ sigmoid` over the chosen experts and the jointly scored shared experts (Inkling).
    JointWithShared,
}

/// How the K weights of a token are renormalised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Renorm {
    /// Not at all.
    None,
    /// `w / Σw`.
    Sum,
    /// `w / (Σw + eps)`.
    SumPlusEps(f64),
    /// `w / max(Σw, eps)`. GShard and NLLB: this, with a [`Capacity`].
    SumClampMin(f64),
    /// `w / (Σ|w|ᵖ)^(1/p)` (DBRX).
    PNorm(f64),
}

/// What a null expert contributes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NullKind {
    /// `weight · x` (LongCat).
    Identity,
    /// Nothing, and its weight is reported as 0 (Zaya).
    Zero,
}

/// RMS normalisation of what the router sees: `x / sqrt(mean(x²) + eps) · router_in_scale · mul`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct InputNorm {
    /// Added to the mean of squares.
    pub eps: f64,
    /// A constant factor.
    pub mul: f64,
}

/// A router, as plain data. Start from [`RouterSpec::top_k`] and change what differs.
#[derive(Clone, Debug, PartialEq)]
pub struct RouterSpec {
    /// E.
    pub num_experts: usize,
    /// N: candidates E..E+N, which compute nothing.
    pub num_null: usize,
    /// What those contribute.
    pub null_kind: NullKind,
    /// Shared experts that are scored by the last rows of the router.
    pub num_joint_shared: usize,
    /// K; ignored by `ExpertChoice` and `Dense`.
    pub top_k: usize,
    /// RMS normalisation of the router's input.
    pub input_norm: Option<InputNorm>,
    /// Factor on the logits.
    pub logit_mul: f64,
    /// `c · tanh(z/c)` on the logits; 0 for none.
    pub logit_softcap: f64,
    /// How logits become scores.
    pub score: Score,
    /// What the choice is made by.
    pub select_on: SelectOn,
    /// `[C]` or empty: added to the selection value, never to the weight.
    pub correction_bias: Vec<f64>,
    /// Group-limited selection.
    pub groups: Option<Groups>,
    /// Where the experts come from.
    pub method: Method,
    /// Where the weights come from.
    pub weights: WeightsFrom,
    /// How they are renormalised.
    pub renorm: Renorm,
    /// Factor on all weights.
    pub scale: f64,
    /// `[E]` or empty: a factor for each expert.
    pub per_expert_scale: Vec<f64>,
    /// A limit on the tokens of an expert.
    pub capacity: Option<Capacity>,
}

impl RouterSpec {
    /// Softmax over E experts, the best K, their scores as they are.
    pub fn top_k(num_experts: usize, top_k: usize) -> Self {
        Self {
            num_experts,
            num_null: 0,
            null_kind: NullKind::Identity,
            num_joint_shared: 0,
            top_k,
            input_norm: None,
            logit_mul: 1.0,
            logit_softcap: 0.0,
            score: Score::Softmax,
            select_on: SelectOn::Score,
            correction_bias: Vec::new(),
            groups: None,
            method: Method::TopK,
            weights: WeightsFrom::Score,
            renorm: Renorm::None,
            scale: 1.0,
            per_expert_scale: Vec::new(),
            capacity: None,
        }
    }

    /// C, the experts that a token can choose: E + N, or n² for product keys.
    pub fn candidates(&self) -> usize {
        match self.method {
            Method::ProductKey { .. } => self.num_keys() * self.num_keys(),
            _ => self.num_experts + self.num_null,
        }
    }

    /// R, the logits of a token.
    pub fn router_rows(&self) -> usize {
        match self.method {
            Method::ProductKey { .. } => 2 * self.num_keys(),
            _ => self.candidates() + self.num_joint_shared,
        }
    }

    /// K, the slots of a token in [`RouteResult`](super::RouteResult).
    pub fn slots(&self) -> usize {
        match self.method {
            Method::ExpertChoice { .. } | Method::Dense => self.candidates(),
            _ => self.top_k,
        }
    }

    /// n, the whole part of √E.
    pub(super) fn num_keys(&self) -> usize {
        self.num_experts.isqrt()
    }

    /// Panics on a description that means nothing.
    pub(super) fn check(&self) {
        let c = self.candidates();
        assert!(c > 0, "no experts");
        let given = matches!(self.method, Method::Given { .. });
        assert!(
            self.slots() > 0 && (given || self.slots() <= c),
            "k = {} of {c} candidates",
            self.slots()
        );
        let bias = self.correction_bias.len();
        assert!(
            bias == 0 || bias == c,
            "correction_bias has {bias} elements, not {c}"
        );
        let scale = self.per_expert_scale.len();
        assert!(
            scale == 0 || scale == self.num_experts,
            "per_expert_scale has {scale} elements"
        );
        let joint = self.weights == WeightsFrom::JointWithShared;
        assert!(
            joint || self.num_joint_shared == 0,
            "num_joint_shared without JointWithShared"
        );
    }
}
