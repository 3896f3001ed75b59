//! The whole layer, and what can be set in one.

use super::*;

impl World {
    pub(super) fn forward(&mut self, d: &mut Bytes<'_>) {
        let mut m = Memories::default();
        let (t, h) = (self.tokens, self.hidden);
        let mut needed = 0;
        // SAFETY: handles are null or living, `needed` is a place.
        unsafe { moe_layer_workspace_size(self.cpu, self.layer, t, &mut needed) };
        let route_only = d.rarely(5);
        let with_ids = d.rarely(6);
        let ids: Vec<i32> = (0..t * self.slots)
            .map(|p| (p % self.experts) as i32)
            .collect();
        let mut call = moe_forward {
            struct_size: struct_size::<moe_forward>(d),
            x: m.matrix(d, t, h, 0),
            y: null(),
            logits: match d.rarely(2) {
                true => m.matrix(d, t, self.logits.min(64), 0),
                false => null(),
            },
            given_ids: null(),
            given_ids_len: 0,
            residual: m.matrix(d, t, h, 4),
            position: u64::from(d.u32()),
            workspace: null_mut(),
            workspace_bytes: 0,
            use_routing: u32::from(d.rarely(6)),
            reserved: u32::from(d.rarely(96)),
        };
        if with_ids {
            (call.given_ids, call.given_ids_len) = m.filled(d, &ids);
        }
        if !route_only {
            call.y = m.output(d, t, h);
        }
        // Of any content, and written even by calls that are refused: not among the memories that are compared.
        let size = needed
            .min(1 << 24)
            .saturating_sub(usize::from(d.rarely(32)));
        let mut workspace = vec![0xcc; size];
        call.workspace = workspace.as_mut_ptr();
        call.workspace_bytes = size;
        // SAFETY: as above.
        let status = unsafe {
            match route_only {
                true => moe_layer_route(self.cpu, self.layer, self.routing, &call),
                false => moe_layer_forward(self.cpu, self.layer, self.routing, &call),
            }
        };
        m.check(status, "forward");
        let mut m = Memories::default();
        let (x, logits) = (m.matrix(d, t, h, 0), m.output(d, t, self.logits.min(64)));
        // SAFETY: as above.
        let status = unsafe {
            moe_layer_logits(
                self.cpu,
                self.layer,
                x,
                logits,
                workspace.as_mut_ptr(),
                workspace.len(),
            )
        };
        m.check(status, "logits");
    }

    pub(super) fn settings(&mut self, d: &mut Bytes<'_>) {
        let mut m = Memories::default();
        let norm = self.norm(d, &mut m);
        let (values, n) = m.slice::<f32>(d, self.hidden, false);
        let (bias, bias_len) = m.slice::<f32>(d, self.experts, false);
        let flag = d.constant(3);
        // SAFETY: as above.
        let status = unsafe {
            match d.below(9) {
                0 => moe_layer_set_first_expert(self.layer, d.size(0)),
                1 => moe_layer_set_weight_on_input(self.layer, flag),
                2 => moe_layer_set_routed_scale(self.layer, d.f32()),
                3 => moe_layer_set_post_norm(self.layer, &norm, flag),
                4 => moe_layer_set_out_norm(self.layer, &norm),
                5 => moe_layer_set_out_bias(self.layer, values, n),
                6 => moe_layer_set_correction_bias(self.layer, bias, bias_len),
                7 => moe_router_set_correction_bias(self.router, bias, bias_len),
                _ => moe_router_set_per_expert_scale(self.router, bias, bias_len),
            }
        };
        m.check(status, "settings");
    }

    /// Shared experts, or a layer in a latent space; and handles of the wrong kind.
    pub(super) fn shared(&mut self, d: &mut Bytes<'_>) {
        let mut m = Memories::default();
        let gate = m.matrix(d, 1, self.hidden, 2);
        let join = d.constant(5);
        // SAFETY: as above; a handle of another kind is a living handle too.
        let status = unsafe {
            match d.below(4) {
                0 | 1 => {
                    let status =
                        moe_layer_set_shared(self.cpu, self.layer, &mut self.packed, join, gate);
                    assert_eq!(status == MOE_OK, self.packed.is_null() && status == MOE_OK);
                    status
                }
                2 => {
                    let status = moe_layer_destroy(self.routing.cast());
                    assert_eq!(status, MOE_ERROR_HANDLE);
                    status
                }
                _ => {
                    let w_in = m.matrix(d, self.hidden, self.hidden + 3, 0);
                    let w_out = m.matrix(d, self.hidden + 3, self.hidden, 0);
                    let mut made = null_mut();
                    let format = d.constant(4);
                    let status = moe_layer_create_latent(
                        self.cpu,
                        self.router,
                        &mut self.packed,
                        w_in,
                        w_out,
                        format,
                        null(),
                        &mut made,
                    );
                    if status == MOE_OK {
                        moe_layer_destroy(self.layer);
                        self.layer = made;
                        self.hidden += 3;
                    }
                    status
                }
            }
        };
        m.check(status, "shared");
    }
}
