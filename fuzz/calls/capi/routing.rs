//! Routing, sorting, and reading the results.

use super::*;

impl World {
    pub(super) fn route(&mut self, d: &mut Bytes<'_>) {
        let mut m = Memories::default();
        let (t, r) = (self.tokens, self.logits.min(64));
        let ids: Vec<i32> = (0..t * self.slots)
            .map(|_| d.below(self.experts + 1) as i32 - 1)
            .collect();
        let mut input = moe_route_input {
            struct_size: struct_size::<moe_route_input>(d),
            logits: m.matrix(d, t, r, 0),
            noise_logits: m.matrix(d, t, r, 6),
            given_ids: null(),
            given_ids_len: 0,
            position: u64::from(d.u32()) << 32,
            first_local: d.pick(&[0, 0, 1, usize::MAX]),
            num_local: d.size(0),
            row_alignment: d.pick(&[0, 1, 4, 64]),
        };
        if d.rarely(3) {
            (input.given_ids, input.given_ids_len) = m.filled(d, &ids);
        }
        // SAFETY: as above.
        let status = unsafe { moe_route(self.cpu, self.router, &input, self.routing) };
        m.check(status, "route");
    }

    pub(super) fn given(&mut self, d: &mut Bytes<'_>) {
        let mut m = Memories::default();
        let pairs = self.tokens * self.slots;
        let ids: Vec<i32> = (0..pairs)
            .map(|_| match d.rarely(200) {
                true => d.u32() as i32,
                false => d.below(self.experts) as i32,
            })
            .collect();
        let ((ids, num_ids), (weights, num_weights)) =
            (m.filled(d, &ids), m.slice::<f32>(d, pairs, false));
        let given = moe_given_routing {
            struct_size: struct_size::<moe_given_routing>(d),
            num_experts: d.size(self.experts),
            slots: d.size(self.slots),
            num_null: d.size(0),
            ids,
            weights,
            num_pairs: num_ids.min(num_weights),
            null_kind: d.constant(3),
            reserved: 0,
        };
        // SAFETY: as above.
        let status = unsafe { moe_routing_set_given(self.cpu, self.routing, &given) };
        m.check(status, "set_given");
    }

    pub(super) fn sort(&mut self, d: &mut Bytes<'_>) {
        let mut m = Memories::default();
        let ids: Vec<i32> = (0..self.tokens * self.slots)
            .map(|_| match d.rarely(200) {
                true => d.u32() as i32,
                false => d.below(self.experts + 1) as i32 - 1,
            })
            .collect();
        let (ids, n) = m.filled(d, &ids);
        let options = moe_permute_options {
            struct_size: struct_size::<moe_permute_options>(d),
            block: d.pick(&[0, 1, 3, 64, usize::MAX]),
            first_local: d.pick(&[0, 0, 0, 1, 2]),
            num_local: d.size(0),
            num_null: d.pick(&[0, 0, 1, usize::MAX]),
        };
        let options = if d.rarely(3) {
            null()
        } else {
            &raw const options
        };
        let experts = d.size(self.experts);
        // SAFETY: as above.
        let status =
            unsafe { moe_permutation_sort(self.cpu, self.permutation, ids, n, experts, options) };
        m.check(status, "sort");
    }

    pub(super) fn read(&mut self, d: &mut Bytes<'_>) {
        let mut m = Memories::default();
        let (t, pairs, e) = (self.tokens, self.tokens * self.slots, self.experts);
        let ((ids, ids_len), (weights, weights_len)) =
            (m.slice(d, pairs, true), m.slice(d, pairs, true));
        let (shared_weights, shared_weights_len) = m.slice(d, t, true);
        let buffers = moe_routing_buffers {
            struct_size: struct_size::<moe_routing_buffers>(d),
            ids,
            ids_len,
            weights,
            weights_len,
            shared_weights,
            shared_weights_len,
        };
        let max_tokens = d.size(t);
        // SAFETY: as above.
        let status = unsafe {
            if d.rarely(4) {
                moe_routing_reserve(self.cpu, self.routing, self.router, max_tokens);
            }
            moe_routing_read(self.routing, &buffers)
        };
        m.check(status, "routing_read");
        let mut m = Memories::default();
        let ((offsets, offsets_len), (counts, counts_len)) =
            (m.slice(d, e + 1, true), m.slice(d, e, true));
        let (pair_of_row, pair_of_row_len) = m.slice(d, pairs, true);
        let (row_of_pair, row_of_pair_len) = m.slice(d, pairs, true);
        let buffers = moe_permutation_buffers {
            struct_size: struct_size::<moe_permutation_buffers>(d),
            offsets,
            offsets_len,
            counts,
            counts_len,
            pair_of_row,
            pair_of_row_len,
            row_of_pair,
            row_of_pair_len,
        };
        // SAFETY: as above.
        let status = unsafe {
            match d.rarely(2) {
                true => moe_permutation_read(self.permutation, &buffers),
                false => moe_routing_read_permutation(self.routing, &buffers),
            }
        };
        m.check(status, "permutation_read");
    }
}
