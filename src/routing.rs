//! Gating: from logits to expert ids and weights.
//!
//! ```text
//!            RouterConfig ──new──▶ Router ◀── correction bias, per-expert scale
//!                                     │
//! logits [T,R] ──RouteInput──────▶ route ──▶ Routing: ids, weights [T,slots], permutation ──▶ LoadStats
//! ```
//!
//! T tokens, E experts, N null experts (ids E..E+N), K choices, R = E + N + joint shared columns of logits (2·√E for product keys).
//! In order: `z·multiplier`, softcap, noise → score → ranking by score or logit + bias, within groups → K ids → raw weights → renormalisation → `·scale`,
//! `·per-expert scale` → capacity.
//!
//! # Which constructor for which model
//!
//! What the published MoE families do, and how a [`RouterConfig`] says it. *bias* is [`Router::with_correction_bias`].
//!
//! | # | rule | constructor | families |
//! |---|---|---|---|
//! | R1 | softmax → K best → ÷ sum | [`mixtral`](RouterConfig::mixtral), [`qwen3_moe`](RouterConfig::qwen3_moe) | Mixtral, MiniMax-Text, Hunyuan v1, Qwen3-MoE, Qwen3-Next, Qwen3-VL, Qwen3-Omni, Qwen3.5, Mellum |
//! | R2 | softmax → K best (× scale) | [`qwen2_moe`](RouterConfig::qwen2_moe), [`olmoe`](RouterConfig::olmoe), [`deepseek_v2`](RouterConfig::deepseek_v2) | Qwen2-MoE, Jamba, OLMoE, FlexOlmo, DeepSeek-V2-Lite |
//! | R3 | R2 within groups by their best, others 0 | [`deepseek_v2_grouped`](RouterConfig::deepseek_v2_grouped) | DeepSeek-V2 |
//! | R4 | softmax → K best → ÷ p-norm | [`dbrx`](RouterConfig::dbrx) | DBRX |
//! | R5 | K best logits → softmax over them | [`gpt_oss`](RouterConfig::gpt_oss), [`granite`](RouterConfig::granite) | gpt-oss, GraniteMoE, Aria, JetMoE, Cohere2-MoE |
//! | R6 | sigmoid + bias; groups by best two, others −∞; ÷ (sum + 1e-20); × scale | [`deepseek_v3`](RouterConfig::deepseek_v3), [`glm4_moe`](RouterConfig::glm4_moe), [`kimi_k2`](RouterConfig::kimi_k2) | DeepSeek-V3/R1, GLM-4.5, dots1, Kimi, Bailing, EXAONE-MoE, Nemotron-H, MiMo-V2, Hunyuan v4 |
//! | R7 | R6 without groups, other epsilons | [`minimax_m2`](RouterConfig::minimax_m2), [`lfm2_moe`](RouterConfig::lfm2_moe), [`laguna`](RouterConfig::laguna) | MiniMax-M2, Step-3.7, Laguna; LFM2 (1e-6); AFMoE, Hunyuan v3 (1e-20); Muse Spark (1e-15): set `renorm` |
//! | R8 | sigmoid, ÷ sum | [`cohere2_sigmoid`](RouterConfig::cohere2_sigmoid) | Cohere2-MoE, Flint |
//! | R9 | logit + bias ranks, weight σ(logit) | [`kolibri1`](RouterConfig::kolibri1) | Kolibri 1 |
//! | R10 | σ of the K best logits, on the expert's input | [`llama4`](RouterConfig::llama4) | Llama 4 |
//! | R11 | softmax + bias ranks | [`ernie4_5`](RouterConfig::ernie4_5), [`longcat_flash`](RouterConfig::longcat_flash), [`zaya`](RouterConfig::zaya) | ERNIE 4.5, LongCat-Flash, ZAYA1 |
//! | R12 | softmax; groups by best two, others 0; ÷ (sum + 1e-20); × scale | [`mistral4`](RouterConfig::mistral4) | Mistral 4 |
//! | R13 | √softplus + bias, or ids from a table | [`deepseek_v4`](RouterConfig::deepseek_v4), [`Selection::Given`] | DeepSeek-V4 |
//! | R14 | sigmoid, normalised with the shared experts' | [`inkling`](RouterConfig::inkling) | Inkling |
//! | R15 | sparsemixer | [`phimoe`](RouterConfig::phimoe) | Phi-3.5-MoE |
//! | R16 | best one, capacity for each sequence | [`switch`](RouterConfig::switch) | Switch Transformers |
//! | R17 | best two, capacity, ÷ (p1 + p2) | [`nllb`](RouterConfig::nllb) | NLLB-MoE, GShard |
//! | R18 | R1 on a normed input, × per-expert scale | [`gemma4`](RouterConfig::gemma4), [`Router::with_per_expert_scale`] | Gemma 4 |
//! | R19 | product keys | [`doge`](RouterConfig::doge) | Doge |
//! | R20 | softcap; logit multiplier | fields [`logit_softcap`](RouterConfig::logit_softcap), [`logit_multiplier`](RouterConfig::logit_multiplier) | Laguna; Muse Spark |
//! | R21 | noisy K best | [`noisy_top_k`](RouterConfig::noisy_top_k), [`RouteInput::noise_logits`] | Shazeer et al. 2017 |
//! | R22 | experts choose tokens | [`expert_choice`](RouterConfig::expert_choice) | Zhou et al. 2022 |
//! | R23 | every expert | [`dense`](RouterConfig::dense) | Jacobs et al. 1991 |
//! | R24 | ids and weights from the caller | [`Routing::set_given`] | hash routing, any framework's router |
//!
//! A bias of the router itself (gpt-oss) belongs to the logits; the norm of the router's input (R18), what a weight multiplies (R10) and a factor on the
//! routed sum belong to the layer.
//!
//! # What is fixed to the bit
//!
//! Everything is f32. Softmax is `exp(z − max) / Σ`, the sum over 32 lane-strided partial sums and a butterfly, then one division for each score. Sums of a
//! token's weights run in slot order from +0.0. A weight is `w / divisor · scale · own scale`. Values rank as integers in the order NaN < −∞ < … < −0 = +0 <
//! … < +∞, equal ones by falling index, so the K best are the same however they are searched for. NaN weights have one pattern of bits.

mod config;
mod families;
mod load;
mod output;
mod router;
mod validate;

pub use config::*;
pub use load::*;
pub use output::*;
pub use router::*;

/// The id of a pair that no expert serves: dropped for lack of room, or never made. Its weight is 0.
pub const DROPPED: i32 = -1;
