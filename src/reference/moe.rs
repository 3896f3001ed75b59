//! The layer: everything as a loop over tokens and their choices.

mod spec;

pub use spec::{
    LatentSpec, LayerInputs, LayerResult, LayerSpec, LayerWeights, MlpWeights, PostNorm,
    SharedCombine, SharedSpec,
};

use super::grouped_gemm::MlpSpec;
use super::math::{at_or, dot, linear, rms_norm, rows_of, sigmoid};
use super::router::NullKind;
use super::routing::{finish_logits, noisy_logits, route, router_logits};

/// The intermediate values of one expert for one token: `activate(x·w_gateᵀ, x·w_upᵀ)`, `[I]`.
pub fn mlp_hidden(spec: &MlpSpec, w: &MlpWeights, x: &[f64]) -> Vec<f64> {
    let up = linear(x, x.len(), w.up, w.b_up);
    let gate = if spec.gated {
        linear(x, x.len(), w.gate, w.b_gate)
    } else {
        up.clone()
    };
    gate.iter()
        .zip(&up)
        .map(|(g, u)| spec.activate(*g, *u))
        .collect()
}

/// One expert for one token: `mlp_hidden · w_downᵀ`.
pub fn mlp(spec: &MlpSpec, w: &MlpWeights, x: &[f64]) -> Vec<f64> {
    let h = mlp_hidden(spec, w, x);
    linear(&h, h.len(), w.down, w.b_down)
}

/// The whole layer, one token and one choice at a time, without sorting anything.
///
/// An expert that nobody chose is not looked at, whatever its weights hold.
pub fn moe_layer(spec: &LayerSpec, w: &LayerWeights, inputs: &LayerInputs) -> LayerResult {
    let (hidden, router) = (spec.hidden, &spec.router);
    let tokens = rows_of(inputs.x, hidden, "moe_layer: x");
    let check = |v: &[f64], len: usize, what: &str| {
        assert!(
            v.is_empty() || v.len() == len,
            "{what} has {} elements, not {len}",
            v.len()
        );
    };
    check(
        inputs.given_logits,
        tokens * router.router_rows(),
        "given_logits",
    );
    check(inputs.residual, inputs.x.len(), "residual");
    check(w.out_bias, hidden, "out_bias");

    // Route.
    let mut logits = if !inputs.given_logits.is_empty() {
        finish_logits(router, inputs.given_logits, w.router_b)
    } else if w.router_w.is_empty() {
        Vec::new() // ids and weights are both given
    } else {
        router_logits(
            router,
            inputs.x,
            hidden,
            w.router_w,
            w.router_b,
            w.router_in_scale,
        )
    };
    if !inputs.normals.is_empty() {
        logits = noisy_logits(
            &logits,
            &linear(inputs.x, hidden, w.router_noise_w, &[]),
            inputs.normals,
        );
    }
    let routing = route(router, &logits);
    let k = routing.slots;
    assert_eq!(routing.ids.len(), tokens * k, "the routing is not [T,K]");

    let (mut y_routed, mut y) = (Vec::new(), Vec::new());
    for (t, x) in inputs.x.chunks_exact(hidden).enumerate() {
        // The routed experts.
        let expert_x = match spec.latent {
            None => x.to_vec(),
            Some(latent) => {
                let low = linear(x, hidden, w.latent_in_w, &[]);
                assert_eq!(low.len(), latent.width, "latent_in_w is not [L,H]");
                latent
                    .in_norm_eps
                    .map_or(low.clone(), |eps| rms_norm(&low, w.latent_in_norm_w, eps))
            }
        };
        let mut sum = vec![0.0; expert_x.len()];
        let mut identity = vec![0.0; hidden];
        for pair in t * k..(t + 1) * k {
            let (id, weight) = (routing.ids[pair], routing.weights[pair]);
            if id < 0 {
                continue;
            }
            let id = id as usize;
            if id >= router.num_experts {
                if router.null_kind == NullKind::Identity {
                    add(&mut identity, weight, x);
                }
                continue;
            }
            let (in_weight, out_weight) = if spec.weight_on_input {
                (weight, 1.0)
            } else {
                (1.0, weight)
            };
            let weighted_x: Vec<f64> = expert_x.iter().map(|v| v * in_weight).collect();
            let mut out = mlp(
                &spec.experts,
                &w.experts.expert(id, router.num_experts),
                &weighted_x,
            );
            if let Some(norm) = spec.post_norm {
                out = norm.of(&out, w.expert_post_norm_w);
            }
            add(&mut sum, out_weight, &out);
        }
        if let Some(latent) = spec.latent {
            sum = linear(&sum, latent.width, w.latent_out_w, &[]);
        }
        add(&mut sum, 1.0, &identity);
        let routed: Vec<f64> = sum.iter().map(|v| v * spec.routed_out_scale).collect();

        // The shared experts.
        let mut out = routed.clone();
        if let Some(shared) = &spec.shared {
            let mut h = mlp_hidden(&shared.mlp, &w.shared, x);
            if shared.combine == SharedCombine::RouterWeighted {
                let n = router.num_joint_shared;
                assert!(
                    n > 0 && h.len().is_multiple_of(n),
                    "Is is not a multiple of num_joint_shared"
                );
                let slice = h.len() / n;
                for (i, v) in h.iter_mut().enumerate() {
                    *v *= routing.shared_weights[t * n + i / slice];
                }
            }
            let shared_y = linear(&h, h.len(), w.shared.down, w.shared.b_down);
            let gate = match shared.combine {
                SharedCombine::SigmoidGate => sigmoid(dot(x, w.shared_gate_w)),
                _ => 1.0,
            };
            add(&mut out, gate, &shared_y);
            if shared.combine == SharedCombine::Average {
                out.iter_mut().for_each(|v| *v /= 2.0);
            }
        }

        // The output.
        if let Some(eps) = spec.out_norm_eps {
            out = rms_norm(&out, w.out_norm_w, eps);
        }
        for (h, v) in out.iter_mut().enumerate() {
            *v += at_or(w.out_bias, h, 0.0);
            *v += at_or(inputs.residual, t * hidden + h, 0.0);
        }
        y_routed.extend(routed);
        y.extend(out);
    }
    LayerResult {
        router_logits: logits,
        ids: routing.ids,
        weights: routing.weights,
        y_routed,
        y,
    }
}

/// `sum += factor · v`.
fn add(sum: &mut [f64], factor: f64, v: &[f64]) {
    assert_eq!(sum.len(), v.len(), "add: lengths differ");
    for (s, v) in sum.iter_mut().zip(v) {
        *s += factor * v;
    }
}

#[cfg(test)]
mod tests;
