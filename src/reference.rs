//! The specification: every operation of the crate, in f64, written the obvious way.
//!
//! It takes plain slices, returns `Vec`s, imports nothing from the rest of the crate and shares no code
//! and no tricks with it. So when a fast path and this module disagree, one of them is wrong, and this is
//! the one to check by eye. The tests of every backend compare with it, and it is public so that anybody
//! can fuzz their own kernels against it. Read it in this order:
//!
//! | file | holds |
//! |---|---|
//! | `math.rs` | softmax, erf and other elementary functions |
//! | `router.rs` | what a router is, as plain data: [`RouterSpec`] |
//! | `routing.rs` | logits to experts and weights: [`route`] |
//! | `losses.rs` | balancing losses with gradients, load statistics |
//! | `permute.rs` | pairs sorted by expert: [`permute`] |
//! | `grouped_gemm.rs` | [`grouped_gemm`], activations, [`combine`] |
//! | `moe.rs` | the layer: [`moe_layer`] |
//!
//! [`RouterSpec::from`] and [`MlpSpec::from`] say here what a configuration of the crate says there.
//!
//! It is a test oracle: lengths that do not fit are bugs of the caller, and every function here
//! **panics** on them, with a message. The rest of the crate returns errors instead.
//!
//! # Vocabulary
//!
//! | letter | meaning |
//! |---|---|
//! | T | tokens |
//! | H | hidden size: a token is H numbers |
//! | I | intermediate size of an expert (Is: of the shared expert) |
//! | E | experts that compute |
//! | N | null experts, ids E..E+N, which compute nothing (identity or zero) |
//! | C | candidates among which a token chooses: E + N; n² for product keys |
//! | R | rows of the router: C + jointly scored shared experts; 2n for product keys |
//! | K | choices ("slots") of a token |
//! | pair | one choice: `pair = t·K + slot` |
//! | row | position of a pair after sorting by expert |
//!
//! Matrices are row-major; weights have their output features first, so `y = x · Wᵀ`. `[T,H]` is a slice
//! of T·H numbers. An empty slice stands for an optional thing that is absent. Ids are `i32`; −1 is a
//! choice that was dropped.
//!
//! # The flow
//!
//! ```text
//! x[T,H] ─router_logits→ logits[T,R] ─route→ ids[T,K], weights[T,K] ─permute→ offsets, pair_of_row, row_of_pair
//! x      ─grouped_gemm(w_gate, w_up)→ gate, up ─activate→ h ─grouped_gemm(w_down)→ ys ─combine→ y[T,H]
//! ```
//!
//! [`moe_layer`] is all of it, written a second time as a loop over tokens and their choices.

mod grouped_gemm;
mod losses;
mod math;
mod moe;
mod permute;
mod router;
mod routing;

pub use grouped_gemm::{
    Activation, Clamp, MlpSpec, combine, gamma, grouped_gemm, grouped_gemm_abs,
};
pub use losses::{
    LoadStats, Loss, idle_experts, load_balancing_loss, load_stats, router_z_loss,
    switch_load_balancing_loss, update_bias,
};
pub use math::{
    dot, erf, erfc, linear, log_sigmoid, logsumexp, rms_norm, sigmoid, softmax, softplus,
};
pub use moe::{
    LatentSpec, LayerInputs, LayerResult, LayerSpec, LayerWeights, MlpWeights, PostNorm,
    SharedCombine, SharedSpec, mlp, mlp_hidden, moe_layer,
};
pub use permute::{Permutation, permute, permute_rows, unpermute_rows};
pub use router::{
    Capacity, Fill, GroupScore, Groups, InputNorm, KeyLayout, Method, NullKind, Renorm, RouterSpec,
    Score, SelectOn, WeightsFrom,
};
pub use routing::{
    RouteResult, apply_capacity, expert_choice, finish_logits, group_mask, noisy_logits,
    product_keys, raw_weights, renormalize, route, router_logits, score, select, sparsemixer,
    top_k,
};

#[cfg(test)]
/// n numbers in −1..1 that look random, the same for the same seed.
fn noise(seed: u64, n: usize) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

#[cfg(test)]
/// Panics unless each |a − b| <= tolerance · max(1, |b|).
fn assert_close(a: &[f64], b: &[f64], tolerance: f64) {
    assert_eq!(a.len(), b.len());
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        let close = (a - b).abs() <= tolerance * b.abs().max(1.0);
        assert!(close || a.is_nan() && b.is_nan(), "[{i}]: {a} is not {b}");
    }
}
