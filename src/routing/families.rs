//! Named routers of published models: one line each for users. The table in [`crate::routing`] finds the one for a model.
//!
//! Where a model's config has a switch (`norm_topk_prob`, a scale of 1, groups of 1), the constructor takes the published setting and the
//! field can be changed afterwards. Correction bias and per-expert scale are tensors: give them to the [`Router`](super::Router).

use super::config::*;

impl RouterConfig {
    /// Softmax, the K best, divided by their sum (R1).
    ///
    /// Mixtral, MiniMax-Text-01, Qwen3-VL-MoE, Qwen3.5-MoE, Hunyuan-MoE v1.
    pub fn mixtral(num_experts: usize, top_k: usize) -> Self {
        Self {
            renorm: Renorm::Sum,
            ..Self::new(num_experts, top_k)
        }
    }

    /// As [`mixtral`](Self::mixtral): `norm_topk_prob` is on in what was published (R1).
    ///
    /// Qwen3-MoE, Qwen3-Next, Qwen3-Omni, Mellum.
    pub fn qwen3_moe(num_experts: usize, top_k: usize) -> Self {
        Self::mixtral(num_experts, top_k)
    }

    /// Softmax, the K best, as they are (R2).
    ///
    /// Qwen1.5-MoE, Qwen2-MoE, Jamba.
    pub fn qwen2_moe(num_experts: usize, top_k: usize) -> Self {
        Self::new(num_experts, top_k)
    }

    /// As [`qwen2_moe`](Self::qwen2_moe) (R2).
    ///
    /// OLMoE, FlexOlmo.
    pub fn olmoe(num_experts: usize, top_k: usize) -> Self {
        Self::new(num_experts, top_k)
    }

    /// Softmax, the K best, × scale (R2).
    ///
    /// DeepSeek-V2-Lite (`topk_method` "greedy"; its scale is 1).
    pub fn deepseek_v2(num_experts: usize, top_k: usize, scale: f32) -> Self {
        Self {
            scale,
            ..Self::new(num_experts, top_k)
        }
    }

    /// Softmax; groups by their best expert, the others' scores set to 0; the K best, × scale (R3).
    ///
    /// DeepSeek-V2 (`topk_method` "group_limited_greedy": 160 experts, K = 6, 8 groups of which 3, scale 16).
    pub fn deepseek_v2_grouped(
        num_experts: usize,
        top_k: usize,
        n_group: usize,
        topk_group: usize,
        scale: f32,
    ) -> Self {
        Self {
            selection: grouped(n_group, topk_group, GroupScore::Max, MaskedFill::Zero),
            ..Self::deepseek_v2(num_experts, top_k, scale)
        }
    }

    /// Softmax, the K best, divided by their p-norm (R4).
    ///
    /// DBRX (`moe_normalize_expert_weights`: p = 1).
    pub fn dbrx(num_experts: usize, top_k: usize, p: f32) -> Self {
        Self {
            renorm: Renorm::PNorm(p),
            ..Self::new(num_experts, top_k)
        }
    }

    /// The K best logits, softmax over them (R5). The router's own bias belongs to the logits.
    ///
    /// gpt-oss.
    pub fn gpt_oss(num_experts: usize, top_k: usize) -> Self {
        Self {
            selection: by(RankBy::Logit),
            weights: WeightSource::SoftmaxSelectedLogits,
            ..Self::new(num_experts, top_k)
        }
    }

    /// As [`gpt_oss`](Self::gpt_oss) (R5).
    ///
    /// GraniteMoE and its variants, Aria, JetMoE, Cohere2-MoE with softmax.
    pub fn granite(num_experts: usize, top_k: usize) -> Self {
        Self::gpt_oss(num_experts, top_k)
    }

    /// Sigmoid; score + correction bias ranks, groups by the sum of their best two; divided by (sum + 1e-20), × scale (R6).
    ///
    /// DeepSeek-V3, V3.1, V3.2 and R1 (256 experts, K = 8, 8 groups of which 4, scale 2.5), and with other numbers, often one group of one: Kimi K2,
    /// GLM-4.5 and later, dots1, Bailing and Ling, EXAONE-MoE, Nemotron-H, MiMo-V2, Hunyuan v4, Solar Open.
    pub fn deepseek_v3(
        num_experts: usize,
        top_k: usize,
        n_group: usize,
        topk_group: usize,
        scale: f32,
    ) -> Self {
        Self {
            score: Score::Sigmoid,
            selection: grouped(n_group, topk_group, GroupScore::Top2Sum, MaskedFill::NegInf),
            renorm: Renorm::SumPlusEps(1e-20),
            scale,
            ..Self::new(num_experts, top_k)
        }
    }

    /// [`deepseek_v3`](Self::deepseek_v3) with one group (R6).
    ///
    /// GLM-4.5 (160 experts, K = 8, scale 2.5) and GLM-4.5-Air (128 experts, K = 8, scale 1).
    pub fn glm4_moe(num_experts: usize, top_k: usize, scale: f32) -> Self {
        Self::deepseek_v3(num_experts, top_k, 1, 1, scale)
    }

    /// [`deepseek_v3`](Self::deepseek_v3) with one group (R6).
    ///
    /// Kimi K2 (384 experts, K = 8, scale 2.827).
    pub fn kimi_k2(num_experts: usize, top_k: usize, scale: f32) -> Self {
        Self::deepseek_v3(num_experts, top_k, 1, 1, scale)
    }

    /// Sigmoid; score + correction bias ranks; divided by the sum (R7).
    ///
    /// MiniMax-M2, MiniMax-M3, Step-3.7. AFMoE and Hunyuan v3: `renorm = SumPlusEps(1e-20)` and a scale.
    /// Muse Spark: `SumPlusEps(1e-15)`, a scale and `logit_multiplier`.
    pub fn minimax_m2(num_experts: usize, top_k: usize) -> Self {
        Self {
            score: Score::Sigmoid,
            renorm: Renorm::Sum,
            ..Self::new(num_experts, top_k)
        }
    }

    /// As [`minimax_m2`](Self::minimax_m2), divided by (sum + 1e-6), × scale (R7).
    ///
    /// LFM2-MoE.
    pub fn lfm2_moe(num_experts: usize, top_k: usize, scale: f32) -> Self {
        Self {
            renorm: Renorm::SumPlusEps(1e-6),
            scale,
            ..Self::minimax_m2(num_experts, top_k)
        }
    }

    /// As [`minimax_m2`](Self::minimax_m2) on softly capped logits `c·tanh(z/c)`; a cap of 0 is none (R7, R20).
    ///
    /// Laguna, whose factor is on the routed sum, not on the weights.
    pub fn laguna(num_experts: usize, top_k: usize, softcap: f32) -> Self {
        Self {
            logit_softcap: softcap,
            ..Self::minimax_m2(num_experts, top_k)
        }
    }

    /// The K best logits, their sigmoids divided by their sum (R8).
    ///
    /// Cohere2-MoE with sigmoid, Flint.
    pub fn cohere2_sigmoid(num_experts: usize, top_k: usize) -> Self {
        Self {
            renorm: Renorm::Sum,
            ..Self::llama4(num_experts, top_k)
        }
    }

    /// Logit + correction bias ranks; the weight is the sigmoid of the logit without bias, divided by the sum (R9).
    ///
    /// Kolibri 1.
    pub fn kolibri1(num_experts: usize, top_k: usize) -> Self {
        Self::cohere2_sigmoid(num_experts, top_k)
    }

    /// The K best logits, their sigmoids as they are (R10). The weight multiplies the expert's input, which is the layer's concern.
    ///
    /// Llama 4 (K = 1).
    pub fn llama4(num_experts: usize, top_k: usize) -> Self {
        Self {
            score: Score::Sigmoid,
            selection: by(RankBy::Logit),
            ..Self::new(num_experts, top_k)
        }
    }

    /// Softmax; score + correction bias ranks; divided by the sum, but by no less than 1e-12 (R11).
    ///
    /// ERNIE 4.5.
    pub fn ernie4_5(num_experts: usize, top_k: usize) -> Self {
        Self {
            renorm: Renorm::SumClampMin(1e-12),
            ..Self::new(num_experts, top_k)
        }
    }

    /// Softmax over experts and identity experts; score + correction bias ranks; × scale (R11).
    ///
    /// LongCat-Flash (512 experts, 256 identity experts, K = 12, scale 6).
    pub fn longcat_flash(
        num_experts: usize,
        identity_experts: usize,
        top_k: usize,
        scale: f32,
    ) -> Self {
        Self {
            null_experts: NullExperts::Identity(identity_experts),
            scale,
            ..Self::new(num_experts, top_k)
        }
    }

    /// Softmax over experts and one that is skipped; score + correction bias ranks; as it is (R11).
    ///
    /// ZAYA1 (K = 1).
    pub fn zaya(num_experts: usize, top_k: usize) -> Self {
        Self {
            null_experts: NullExperts::Zero(1),
            ..Self::new(num_experts, top_k)
        }
    }

    /// Softmax; groups by the sum of their best two, the others' scores set to 0; divided by (sum + 1e-20), × scale (R12).
    ///
    /// Mistral 4.
    pub fn mistral4(
        num_experts: usize,
        top_k: usize,
        n_group: usize,
        topk_group: usize,
        scale: f32,
    ) -> Self {
        Self {
            selection: grouped(n_group, topk_group, GroupScore::Top2Sum, MaskedFill::Zero),
            renorm: Renorm::SumPlusEps(1e-20),
            scale,
            ..Self::new(num_experts, top_k)
        }
    }

    /// `√softplus`; score + correction bias ranks; divided by (sum + 1e-20), × scale (R13).
    ///
    /// DeepSeek-V4. Its first layers take their ids from a table of token ids: set `selection` to [`Selection::Given`].
    pub fn deepseek_v4(num_experts: usize, top_k: usize, scale: f32) -> Self {
        Self {
            score: Score::SqrtSoftplus,
            renorm: Renorm::SumPlusEps(1e-20),
            scale,
            ..Self::new(num_experts, top_k)
        }
    }

    /// Sigmoid; score + correction bias ranks; weights normalised jointly with those of the shared experts, × scale (R14).
    ///
    /// Inkling.
    pub fn inkling(num_experts: usize, top_k: usize, shared: usize, scale: f32) -> Self {
        Self {
            joint_shared: shared,
            score: Score::Sigmoid,
            weights: WeightSource::JointWithShared,
            scale,
            ..Self::new(num_experts, top_k)
        }
    }

    /// Two masked softmaxes (R15), K = 2.
    ///
    /// Phi-3.5-MoE (16 experts, `router_jitter_noise` 0.01).
    pub fn phimoe(num_experts: usize, jitter_eps: f32) -> Self {
        Self {
            selection: Selection::SparseMixer { jitter_eps },
            ..Self::new(num_experts, 2)
        }
    }

    /// Softmax, the best one as it is, and room for `per_expert` tokens of each sequence (R16).
    ///
    /// Switch Transformers.
    pub fn switch(num_experts: usize, per_expert: usize, sequence_tokens: usize) -> Self {
        Self {
            capacity: Some(Capacity {
                per_expert,
                scope_tokens: Some(sequence_tokens),
                batch_prioritized: false,
                normalize_before_drop: true,
            }),
            ..Self::new(num_experts, 1)
        }
    }

    /// Softmax, the best two, room for `per_expert` tokens, divided by max(p1 + p2, 2⁻²³) over what was kept (R17).
    ///
    /// NLLB-MoE, GShard. Its options are [`Capacity::batch_prioritized`] and [`Capacity::normalize_before_drop`].
    pub fn nllb(num_experts: usize, per_expert: usize) -> Self {
        Self {
            // By logit: the second choice is the best other logit, also where all other probabilities round to 0.
            selection: by(RankBy::Logit),
            renorm: Renorm::SumClampMin(f32::EPSILON),
            capacity: Some(Capacity {
                per_expert,
                scope_tokens: None,
                batch_prioritized: false,
                normalize_before_drop: false,
            }),
            ..Self::new(num_experts, 2)
        }
    }

    /// As [`mixtral`](Self::mixtral), × a scale of each expert (R18), see [`Router::with_per_expert_scale`](super::Router::with_per_expert_scale).
    /// The norm and scale of the router's input come before the logits.
    ///
    /// Gemma 4.
    pub fn gemma4(num_experts: usize, top_k: usize) -> Self {
        Self::mixtral(num_experts, top_k)
    }

    /// Product keys over E = n² experts, softmax over the selected sums (R19), with Doge's reading of the logits as two stacked matrices.
    ///
    /// Doge.
    pub fn doge(num_experts: usize, top_k: usize) -> Self {
        Self {
            score: Score::Identity,
            selection: Selection::ProductKeys { stacked: true },
            weights: WeightSource::SoftmaxSelectedLogits,
            ..Self::new(num_experts, top_k)
        }
    }

    /// The K best of logits + N(0,1)·softplus(noise logits), softmax over them (R21).
    ///
    /// Shazeer et al. 2017, at training; without noise it is [`gpt_oss`](Self::gpt_oss).
    pub fn noisy_top_k(num_experts: usize, top_k: usize, seed: u64) -> Self {
        Self {
            noise_seed: Some(seed),
            ..Self::gpt_oss(num_experts, top_k)
        }
    }

    /// Softmax; each expert takes its best `per_expert` tokens (R22).
    ///
    /// Zhou et al. 2022, where `per_expert` = T · capacity factor / E.
    pub fn expert_choice(num_experts: usize, per_expert: usize) -> Self {
        Self {
            selection: Selection::ExpertChoice { per_expert },
            ..Self::new(num_experts, num_experts)
        }
    }

    /// Every expert, weighted by softmax (R23).
    ///
    /// Jacobs et al. 1991; soft mixtures.
    pub fn dense(num_experts: usize) -> Self {
        Self {
            selection: Selection::Dense,
            ..Self::new(num_experts, num_experts)
        }
    }
}

fn by(rank_by: RankBy) -> Selection {
    Selection::TopK {
        rank_by,
        groups: None,
    }
}

fn grouped(n_group: usize, topk_group: usize, score: GroupScore, fill: MaskedFill) -> Selection {
    Selection::TopK {
        rank_by: RankBy::Score,
        groups: Some(GroupLimit {
            n_group,
            topk_group,
            score,
            fill,
        }),
    }
}
