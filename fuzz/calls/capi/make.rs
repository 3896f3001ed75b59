//! Handles that may be missing.

use super::*;

fn router_config(d: &mut Bytes<'_>, experts: usize) -> moe_router_config {
    let mut config = moe_router_config {
        struct_size: size_of::<moe_router_config>(),
        num_experts: 0,
        ..Zeroable::zeroed()
    };
    let k = d.size(1 + d.0.len() % experts.min(4));
    // SAFETY: a struct of this size.
    let status = unsafe { moe_router_config_init(&mut config, experts, k) };
    assert_eq!(status, MOE_OK);
    if d.rarely(2) {
        return config;
    }
    config.struct_size = struct_size::<moe_router_config>(d);
    config.num_experts = d.size(experts);
    config.num_null = d.pick(&[0, 0, 0, 2]);
    config.null_kind = d.constant(4);
    config.joint_shared = d.pick(&[0, 0, 0, 1]);
    config.n_group = d.pick(&[0, 0, 1, 2, experts]);
    config.topk_group = d.size(1);
    config.tokens_per_expert = d.size(3);
    config.capacity = d.size(3);
    config.scope_tokens = d.size(4);
    config.score = d.constant(5);
    config.selection = d.pick(&[0, 0, 0, 1, 2, 3, 4, 5, 6]);
    config.rank_by = d.constant(3);
    config.group_score = d.constant(3);
    config.masked_fill = d.constant(3);
    config.weights = d.constant(4);
    config.renorm = d.constant(6);
    config.has_capacity = u32::from(d.rarely(4));
    config.batch_prioritized = d.constant(3);
    config.normalize_before_drop = d.constant(2);
    config.has_noise_seed = u32::from(d.rarely(6));
    config.stacked_keys = d.constant(2);
    config.logit_multiplier = d.f32();
    config.logit_softcap = d.f32();
    config.jitter_eps = d.f32();
    config.renorm_value = d.f32();
    config.scale = d.f32();
    config
}

impl World {
    /// Handles that may be missing: a router, sets of matrices and experts, a layer of them.
    pub(super) fn make(&mut self, d: &mut Bytes<'_>) {
        let config = router_config(d, self.experts);
        let gated = d.constant(2);
        let act = activation(d, gated);
        let (h, i) = (d.size(self.hidden), d.size(self.intermediate));
        let dtype = d.constant(4);
        // SAFETY: the structs live here, the handles are null or living, memory is as long as it is told.
        unsafe {
            if self.router.is_null() {
                moe_router_create(&config, &mut self.router);
            }
            self.slots = moe_router_slots(self.router).max(1);
            self.logits = moe_router_num_logits(self.router);
            if self.matrices.is_null() {
                moe_matrices_create(self.cpu, i, h, dtype, gated, &mut self.matrices);
            }
            if self.packed.is_null() {
                moe_experts_create(self.cpu, h, i, &act, dtype, &mut self.packed);
            }
        }
        let count = d.size(self.experts).min(12);
        for _ in 0..count {
            self.push_matrices(d, gated);
            self.push_expert(d, gated);
        }
        // SAFETY: as above.
        unsafe {
            if self.layer.is_null() {
                moe_layer_create(self.router, &mut self.packed, &mut self.layer);
            }
        }
        if d.rarely(2) {
            self.set_gate(d);
        }
    }

    pub(super) fn push_matrices(&mut self, d: &mut Bytes<'_>, gated: u32) {
        let mut m = Memories::default();
        let gate = match gated == 1 || d.rarely(32) {
            true => m.matrix(d, self.intermediate, self.hidden, 0),
            false => null(),
        };
        let up = m.matrix(d, self.intermediate, self.hidden, 0);
        let (bias, len) = m.maybe::<f32>(d, 4, self.intermediate);
        // SAFETY: handles are null or living, memory is as long as it is told.
        let status =
            unsafe { moe_matrices_push(self.cpu, self.matrices, gate, up, null(), bias, len) };
        m.check(status, "matrices_push");
    }

    pub(super) fn push_expert(&mut self, d: &mut Bytes<'_>, gated: u32) {
        let mut m = Memories::default();
        let layout = d.constant(4);
        let (h, i) = (self.hidden, self.intermediate);
        let separate = layout == MOE_LAYOUT_SEPARATE;
        let weights = moe_expert_weights {
            struct_size: struct_size::<moe_expert_weights>(d),
            gate: match separate && gated == 1 {
                true => m.matrix(d, i, h, 0),
                false => null(),
            },
            up: match separate {
                true => m.matrix(d, i, h, 0),
                false => null(),
            },
            gate_up: match separate {
                true => null(),
                false => m.matrix(d, 2 * i, h, 0),
            },
            down: m.matrix(d, h, i, 0),
            gate_bias: null(),
            gate_bias_len: 0,
            up_bias: null(),
            up_bias_len: 0,
            down_bias: null(),
            down_bias_len: d.below(3),
            layout,
            reserved: u32::from(d.rarely(96)),
        };
        let weights = match d.rarely(4) {
            true => {
                let ((up_bias, up_bias_len), (down_bias, down_bias_len)) =
                    (m.slice(d, i, false), m.slice(d, h, false));
                moe_expert_weights {
                    up_bias,
                    up_bias_len,
                    down_bias,
                    down_bias_len,
                    ..weights
                }
            }
            false => weights,
        };
        // SAFETY: as above.
        let status = unsafe { moe_experts_push(self.cpu, self.packed, &weights) };
        m.check(status, "experts_push");
    }

    pub(super) fn set_gate(&mut self, d: &mut Bytes<'_>) {
        let mut m = Memories::default();
        let w = m.matrix(d, self.logits.min(64), self.hidden, 0);
        let noise = m.matrix(d, self.logits.min(64), self.hidden, 8);
        let (bias, len) = m.slice::<f32>(d, self.logits.min(64), false);
        let norm = self.norm(d, &mut m);
        let norm = if d.rarely(4) { &raw const norm } else { null() };
        // SAFETY: as above.
        let status = unsafe { moe_layer_set_gate(self.cpu, self.layer, w, bias, len, noise, norm) };
        m.check(status, "set_gate");
    }
}
