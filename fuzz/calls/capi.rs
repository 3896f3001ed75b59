//! Calls of the C interface with arguments of every kind of wrong: null, misaligned, overlapping, short, negative and huge strides, unknown constants, handles
//! of any state. A call has to refuse or do its work; it must not write what is not its own.
//!
//! Memory is as long as the call is told, always: a lie about that cannot be found by any library.
#![allow(unsafe_code)]

use super::bytes::Bytes;
use super::memory::Memories;
use moe_kernels::ffi::*;
use std::ptr::{null, null_mut};
use std::sync::OnceLock;

/// One run: a few handles, then calls until the bytes are used up.
pub fn run(data: &[u8]) {
    let mut d = Bytes(data);
    let mut world = World::new(&mut d);
    for _ in 0..24 {
        if d.is_empty() {
            break;
        }
        world.call(&mut d);
    }
}

struct Cpus([usize; 3]);

/// One thread, two threads, the scalar code; made once. Addresses, since pointers are not `Sync`. A library without the feature `parallel` has one thread only; whoever
/// includes this file cannot ask for the library's features, so the library is asked.
fn cpus() -> [*const moe_cpu; 3] {
    static CPUS: OnceLock<Cpus> = OnceLock::new();
    let made = CPUS.get_or_init(|| {
        Cpus(
            [(1, null()), (2, null()), (0, c"scalar".as_ptr())].map(|(threads, isa)| {
                let mut options = moe_cpu_options {
                    struct_size: size_of::<moe_cpu_options>(),
                    threads,
                    isa,
                };
                let mut cpu = null_mut();
                // SAFETY: valid options and a place for the handle.
                let mut status = unsafe { moe_cpu_create(&options, &mut cpu) };
                if threads > 1 && status == MOE_ERROR_UNSUPPORTED {
                    options.threads = 1;
                    // SAFETY: as above; no handle was made.
                    status = unsafe { moe_cpu_create(&options, &mut cpu) };
                }
                assert_eq!(status, MOE_OK);
                cpu as usize
            }),
        )
    });
    made.0.map(|address| address as *const moe_cpu)
}

struct World {
    tokens: usize,
    hidden: usize,
    intermediate: usize,
    experts: usize,
    slots: usize,
    logits: usize,
    cpu: *const moe_cpu,
    router: *mut moe_router,
    routing: *mut moe_routing,
    permutation: *mut moe_permutation,
    matrices: *mut moe_matrices,
    packed: *mut moe_experts,
    layer: *mut moe_layer,
}

/// A struct's size: right but for once in a while.
fn struct_size<T>(d: &mut Bytes<'_>) -> usize {
    match d.rarely(96) {
        true => d.pick(&[0, 1, size_of::<T>() - 1, usize::MAX, 5000]),
        false => size_of::<T>(),
    }
}

fn activation(d: &mut Bytes<'_>, gated: u32) -> moe_activation {
    moe_activation {
        struct_size: struct_size::<moe_activation>(d),
        function: d.constant(7),
        gated,
        clamp: d.constant(6),
        limit: d.f32(),
        alpha: d.f32(),
    }
}

fn router_config(d: &mut Bytes<'_>, experts: usize) -> moe_router_config {
    let mut config = moe_router_config {
        struct_size: size_of::<moe_router_config>(),
        num_experts: 0,
        ..bytemuck::Zeroable::zeroed()
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
    fn new(d: &mut Bytes<'_>) -> Self {
        let mut world = Self {
            tokens: d.below(20),
            hidden: 1 + d.below(40),
            intermediate: 1 + d.below(24),
            experts: 1 + d.below(10),
            slots: 1,
            logits: 1,
            cpu: d.pick(&cpus()),
            router: null_mut(),
            routing: null_mut(),
            permutation: null_mut(),
            matrices: null_mut(),
            packed: null_mut(),
            layer: null_mut(),
        };
        // SAFETY: places for handles.
        unsafe {
            assert_eq!(moe_routing_create(&mut world.routing), MOE_OK);
            assert_eq!(moe_permutation_create(&mut world.permutation), MOE_OK);
        }
        world.make(d);
        world
    }

    /// Handles that may be missing: a router, sets of matrices and experts, a layer of them.
    fn make(&mut self, d: &mut Bytes<'_>) {
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

    fn push_matrices(&mut self, d: &mut Bytes<'_>, gated: u32) {
        let mut m = Memories::default();
        let gate = match gated == 1 || d.rarely(32) {
            true => m.matrix(d, self.intermediate, self.hidden, 0),
            false => null(),
        };
        let up = m.matrix(d, self.intermediate, self.hidden, 0);
        let (bias, len) = match d.rarely(4) {
            true => m.slice::<f32>(d, self.intermediate, false),
            false => (null_mut(), 0),
        };
        // SAFETY: handles are null or living, memory is as long as it is told.
        let status =
            unsafe { moe_matrices_push(self.cpu, self.matrices, gate, up, null(), bias, len) };
        m.check(status, "matrices_push");
    }

    fn push_expert(&mut self, d: &mut Bytes<'_>, gated: u32) {
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

    fn set_gate(&mut self, d: &mut Bytes<'_>) {
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

    fn norm(&self, d: &mut Bytes<'_>, m: &mut Memories) -> moe_rms_norm {
        let (weight, len) = m.slice::<f32>(d, self.hidden, false);
        moe_rms_norm {
            struct_size: struct_size::<moe_rms_norm>(d),
            weight,
            len,
            eps: d.f32(),
            multiplier: d.f32(),
        }
    }

    fn call(&mut self, d: &mut Bytes<'_>) {
        match d.below(16) {
            0..=2 => self.forward(d),
            3 => self.route(d),
            4 => self.given(d),
            5 => self.sort(d),
            6 => self.rows(d),
            7 => self.gemm(d),
            8 => self.experts_forward(d),
            9 | 10 => self.combine(d),
            11 => self.losses(d),
            12 => self.settings(d),
            13 => self.read(d),
            14 => self.shared(d),
            _ => {
                self.cpu = d.pick(&cpus());
                self.make(d);
            }
        }
    }

    fn forward(&mut self, d: &mut Bytes<'_>) {
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

    fn route(&mut self, d: &mut Bytes<'_>) {
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

    fn given(&mut self, d: &mut Bytes<'_>) {
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

    fn sort(&mut self, d: &mut Bytes<'_>) {
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

    fn sorted(&self) -> moe_permutation_view {
        let mut view = moe_permutation_view {
            struct_size: size_of::<moe_permutation_view>(),
            ..bytemuck::Zeroable::zeroed()
        };
        // SAFETY: a living handle and a struct of this size.
        let status = unsafe { moe_permutation_get(self.permutation, &mut view) };
        assert_eq!(status, MOE_OK);
        view
    }

    fn rows(&mut self, d: &mut Bytes<'_>) {
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

    /// The permutation's groups, or made-up ones.
    fn groups(&self, d: &mut Bytes<'_>, m: &mut Memories) -> (moe_groups, usize) {
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
        let (input_scale, input_scale_len) = match d.rarely(4) {
            true => m.slice(d, view.num_pairs, false),
            false => (null_mut(), 0),
        };
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
        (groups, view.num_rows)
    }

    fn gemm(&mut self, d: &mut Bytes<'_>) {
        let mut m = Memories::default();
        let (groups, rows) = self.groups(d, &mut m);
        let act = activation(d, 1);
        let act = if d.rarely(2) { null() } else { &raw const act };
        let from = if groups.pair_of_row.is_null() {
            rows
        } else {
            self.tokens
        };
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

    fn experts_forward(&mut self, d: &mut Bytes<'_>) {
        let mut m = Memories::default();
        let (groups, rows) = self.groups(d, &mut m);
        let from = if groups.pair_of_row.is_null() {
            rows
        } else {
            self.tokens
        };
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

    fn combine(&mut self, d: &mut Bytes<'_>) {
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
            ..bytemuck::Zeroable::zeroed()
        };
        if d.rarely(2) {
            (args.weights, args.weights_len) = {
                let (p, n) = m.slice::<f32>(d, pairs, false);
                (p, n)
            };
        }
        if d.rarely(3) {
            (args.ids, args.ids_len) = m.filled(d, &ids);
            args.x = m.matrix(d, t, h, 0);
        }
        if args.shared_kind == MOE_SHARED_SIGMOID_GATE {
            (args.shared_gate, args.shared_gate_len) = {
                let (p, n) = m.slice::<f32>(d, t, false);
                (p, n)
            };
        }
        if d.rarely(4) {
            (args.bias, args.bias_len) = {
                let (p, n) = m.slice::<f32>(d, h, false);
                (p, n)
            };
        }
        // SAFETY: as above.
        let status = unsafe { moe_combine(self.cpu, &args) };
        m.check(status, "combine");
    }

    fn losses(&mut self, d: &mut Bytes<'_>) {
        let mut m = Memories::default();
        let (t, e) = (self.tokens, self.experts);
        let logits = m.matrix(d, t, e, 0);
        let (mask, mask_len) = match d.rarely(2) {
            true => m.slice::<f32>(d, t, false),
            false => (null_mut(), 0),
        };
        let (grad, grad_len) = m.slice::<f32>(d, t * e, true);
        let (value, n) = m.slice::<f64>(d, 1, true);
        let value = if n == 0 { null_mut() } else { value };
        let k = d.size(1);
        let which = d.below(4);
        let (bias, len) = m.slice::<f32>(d, e, true);
        let (load, load_len) = m.slice::<usize>(d, e, false);
        // SAFETY: as above.
        let status = unsafe {
            match which {
                0 => moe_load_balancing_loss(
                    self.cpu, logits, k, mask, mask_len, grad, grad_len, value,
                ),
                1 => moe_switch_load_balancing_loss(self.cpu, logits, k, grad, grad_len, value),
                2 => moe_router_z_loss(self.cpu, logits, grad, grad_len, value),
                _ => moe_update_bias(bias, load, len.min(load_len), d.f32()),
            }
        };
        m.check(status, "losses");
    }

    fn settings(&mut self, d: &mut Bytes<'_>) {
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

    fn read(&mut self, d: &mut Bytes<'_>) {
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

    /// Shared experts, or a layer in a latent space; and handles of the wrong kind.
    fn shared(&mut self, d: &mut Bytes<'_>) {
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

impl Drop for World {
    fn drop(&mut self) {
        // SAFETY: each handle is null or living, and used no more.
        unsafe {
            for status in [
                moe_layer_destroy(self.layer),
                moe_experts_destroy(self.packed),
                moe_matrices_destroy(self.matrices),
                moe_permutation_destroy(self.permutation),
                moe_routing_destroy(self.routing),
                moe_router_destroy(self.router),
            ] {
                assert_eq!(status, MOE_OK);
            }
        }
    }
}
