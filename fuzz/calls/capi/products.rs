//! Copies of rows, products, and the combine.

use super::*;

impl World {
    pub(super) fn sorted(&self) -> moe_permutation_view {
        let mut view = moe_permutation_view {
            struct_size: size_of::<moe_permutation_view>(),
            ..Zeroable::zeroed()
        };
        // SAFETY: a living handle and a struct of this size.
        let status = unsafe { moe_permutation_get(self.permutation, &mut view) };
        assert_eq!(status, MOE_OK);
        view
    }

    pub(super) fn rows(&mut self, d: &mut Bytes<'_>) {
        let mut m = Memories::default();
        let (view, h) = (self.sorted(), self.hidden);
        let slots = d.size(self.slots);
        let back = d.rarely(2);
        let (rows, pairs) = (view.num_rows, view.num_pairs);
        let (from, to) = match back {
            true => (rows, pairs),
            false => (pairs / slots.max(1), rows),
        };
        let (x, out) = (m.matrix(d, from, h, 0), m.output(d, to, h));
        // SAFETY: as above.
        let status = unsafe {
            match back {
                true => moe_unpermute_rows(self.cpu, self.permutation, x, out),
                false => moe_permute_rows(self.cpu, self.permutation, x, slots, out),
            }
        };
        m.check(status, "rows");
    }

    /// The permutation's groups, or made-up ones; rows of the input, and of the output.
    pub(super) fn groups(&self, d: &mut Bytes<'_>, m: &mut Memories) -> (moe_groups, usize, usize) {
        let view = self.sorted();
        let e = view.num_experts;
        // SAFETY: the view's arrays have these lengths.
        let (mut offsets, counts, pairs) = unsafe {
            (
                std::slice::from_raw_parts(view.offsets, e + 1).to_vec(),
                match e {
                    0 => Vec::new(),
                    _ => std::slice::from_raw_parts(view.counts, e).to_vec(),
                },
                match view.num_rows {
                    0 => Vec::new(),
                    n => std::slice::from_raw_parts(view.pair_of_row, n).to_vec(),
                },
            )
        };
        if d.rarely(24) {
            let at = d.below(offsets.len());
            offsets[at] = d.size(3);
        }
        let ((offsets, n), (counts, n_counts)) = (m.filled(d, &offsets), m.filled(d, &counts));
        let (pair_of_row, pair_of_row_len) = match d.rarely(4) {
            true => (null(), 0),
            false => m.filled(d, &pairs),
        };
        let (input_scale, input_scale_len) = m.maybe(d, 4, view.num_pairs);
        let groups = moe_groups {
            struct_size: struct_size::<moe_groups>(d),
            offsets,
            counts,
            experts: match d.rarely(200) {
                true => usize::MAX,
                false => n.saturating_sub(1).min(n_counts),
            },
            pair_of_row,
            pair_of_row_len,
            slots: d.size(self.slots),
            input_scale,
            input_scale_len,
        };
        let from = match pair_of_row.is_null() {
            true => view.num_rows,
            false => self.tokens,
        };
        (groups, from, view.num_rows)
    }

    pub(super) fn gemm(&mut self, d: &mut Bytes<'_>) {
        let mut m = Memories::default();
        let (groups, from, rows) = self.groups(d, &mut m);
        let act = activation(d, 1);
        let act = if d.rarely(2) { null() } else { &raw const act };
        let (x, out) = (
            m.matrix(d, from, self.hidden, 0),
            m.output(d, rows, self.intermediate),
        );
        // SAFETY: as above; no destructors run in the scratch.
        let status = unsafe {
            let mut scratch = vec![0u8; moe_scratch_bytes(self.cpu) - usize::from(d.rarely(64))];
            moe_grouped_gemm(
                self.cpu,
                self.matrices,
                x,
                &groups,
                act,
                out,
                scratch.as_mut_ptr(),
                scratch.len(),
            )
        };
        // Which rows are padding is seen in the library's own tests.
        m.check(status, "gemm");
    }

    pub(super) fn experts_forward(&mut self, d: &mut Bytes<'_>) {
        let mut m = Memories::default();
        let (groups, from, rows) = self.groups(d, &mut m);
        let x = m.matrix(d, from, self.hidden, 0);
        let (h, ys) = (
            m.output(d, rows, self.intermediate),
            m.output(d, rows, self.hidden),
        );
        // SAFETY: as above.
        let status = unsafe {
            let mut scratch = vec![0u8; moe_scratch_bytes(self.cpu)];
            moe_experts_forward(
                self.cpu,
                self.packed,
                x,
                &groups,
                h,
                ys,
                scratch.as_mut_ptr(),
                scratch.len(),
            )
        };
        m.check(status, "experts_forward");
    }

    pub(super) fn combine(&mut self, d: &mut Bytes<'_>) {
        let mut m = Memories::default();
        let (t, h, pairs) = (self.tokens, self.hidden, self.tokens * self.slots);
        let rows = d.size(pairs);
        let places: Vec<u32> = (0..pairs)
            .map(|_| match d.u8() {
                255 => d.u32(),
                0..=20 => MOE_NONE,
                v => u32::from(v) % (rows.clamp(1, 200) as u32),
            })
            .collect();
        let ids: Vec<i32> = (0..pairs)
            .map(|_| d.below(self.experts + 2) as i32 - 1)
            .collect();
        let norm = self.norm(d, &mut m);
        let ys = m.matrix(d, rows, h, 0);
        let (row_of_pair, row_of_pair_len) = m.filled(d, &places);
        let mut args = moe_combine_args {
            struct_size: struct_size::<moe_combine_args>(d),
            ys,
            row_of_pair,
            row_of_pair_len,
            slots: d.size(self.slots),
            num_experts: d.size(self.experts),
            shared: m.matrix(d, t, h, 3),
            norm: if d.rarely(4) { &raw const norm } else { null() },
            residual: m.matrix(d, t, h, 3),
            out: m.output(d, t, h),
            shared_kind: d.constant(4),
            routed_scale: d.f32(),
            ..Zeroable::zeroed()
        };
        (args.weights, args.weights_len) = m.maybe(d, 2, pairs);
        if d.rarely(3) {
            (args.ids, args.ids_len) = m.filled(d, &ids);
            args.x = m.matrix(d, t, h, 0);
        }
        if args.shared_kind == MOE_SHARED_SIGMOID_GATE {
            (args.shared_gate, args.shared_gate_len) = m.read(d, t);
        }
        (args.bias, args.bias_len) = m.maybe(d, 4, h);
        // SAFETY: as above.
        let status = unsafe { moe_combine(self.cpu, &args) };
        m.check(status, "combine");
    }
}
