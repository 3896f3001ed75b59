//! The stages against the CPU's stages through C.

use crate::common::{Rng, assert_same_bits};
use crate::world::*;
use crate::{E, H, I, K, T, must};
use bytemuck::Zeroable;
use moe_kernels::ffi::*;
use std::ptr::{null, null_mut};

/// What the CPU's stages give, from one router handle.
struct OnCpu {
    cpu: CpuHandle,
    routing: *mut moe_routing,
    ids: Vec<i32>,
    weights: Vec<f32>,
    offsets: Vec<usize>,
    counts: Vec<usize>,
    pair_of_row: Vec<u32>,
    row_of_pair: Vec<u32>,
}

impl OnCpu {
    fn new(router: &RouterHandle, logits: &moe_matrix, alignment: usize) -> Self {
        let (cpu, mut routing) = (CpuHandle::new(), null_mut());
        let input = moe_route_input {
            struct_size: size_of::<moe_route_input>(),
            logits,
            row_alignment: alignment,
            ..Zeroable::zeroed()
        };
        let mut view = moe_permutation_view {
            struct_size: size_of::<moe_permutation_view>(),
            ..Zeroable::zeroed()
        };
        let mut routed = moe_routing_view {
            struct_size: size_of::<moe_routing_view>(),
            ..Zeroable::zeroed()
        };
        // SAFETY: living handles, structs as long as they say; what a view shows stays until the handle is used again.
        unsafe {
            must(moe_routing_create(&mut routing));
            must(moe_route(cpu.0, router.0, &input, routing));
            must(moe_routing_get(routing, &mut routed));
            must(moe_routing_get_permutation(routing, &mut view));
            let of = |p: *const u32, n| std::slice::from_raw_parts(p, n).to_vec();
            let sizes = |p: *const usize, n| std::slice::from_raw_parts(p, n).to_vec();
            Self {
                cpu,
                routing,
                ids: std::slice::from_raw_parts(routed.ids, T * K).to_vec(),
                weights: std::slice::from_raw_parts(routed.weights, T * K).to_vec(),
                offsets: sizes(view.offsets, E + 1),
                counts: sizes(view.counts, E),
                pair_of_row: of(view.pair_of_row, view.num_rows),
                row_of_pair: of(view.row_of_pair, T * K),
            }
        }
    }
}

impl Drop for OnCpu {
    fn drop(&mut self) {
        // SAFETY: a living handle, used no more.
        must(unsafe { moe_routing_destroy(self.routing) });
    }
}

fn as_usize(v: Vec<i32>) -> Vec<usize> {
    v.into_iter().map(|v| v as usize).collect()
}

/// Route, sort, copy, multiply, sum, on the same operands on both sides, each stage compared.
#[test]
fn each_stage_has_the_bits_of_the_cpu() {
    let Some(mut device) = Device::open() else {
        return;
    };
    let stream = device.stream();
    let mut rng = Rng(23);
    let logits = Stored::new(MOE_DTYPE_BF16, &rng.normals(T * E));
    let (bias, scale) = (rng.normals(E), rng.normals(E));
    let router = RouterHandle::new(c"deepseek_v3", |config| {
        (config.n_group, config.topk_group) = (2, 1);
    });
    router.set(&bias, &scale);
    let (block, mut rows, mut bytes) = (4, 0, 0);
    let cpu = OnCpu::new(&router, &logits.host(0, T, E), block);

    // Routing.
    let device_logits = device.store(&logits, T, E);
    let (bias, scale) = (device.put(&bias), device.put(&scale));
    let (ids, weights) = (device.poisoned(T * K + 3), device.poisoned(T * K));
    let route = moe_cuda_route_args {
        struct_size: size_of::<moe_cuda_route_args>(),
        logits: &device_logits,
        correction_bias: bias.data,
        correction_bias_len: E,
        per_expert_scale: scale.data,
        per_expert_scale_len: E,
        ids: ids.data,
        ids_len: ids.len,
        weights: weights.data,
        weights_len: weights.len,
        ..Zeroable::zeroed()
    };
    // SAFETY: living handles, structs that live here, memory of the GPU as long as it is told. So in all of this test.
    must(unsafe { moe_cuda_route(router.0, stream, &route) });
    let found: Vec<i32> = device.read(ids);
    assert_eq!(found[..T * K], cpu.ids);
    assert_eq!(
        found[T * K..],
        [-1; 3],
        "beyond what is needed nothing is written"
    );
    assert_same_bits(&device.read(weights), &cpu.weights, "weights");

    // The sort.
    let options = moe_permute_options {
        struct_size: size_of::<moe_permute_options>(),
        block,
        ..Zeroable::zeroed()
    };
    // SAFETY: as above.
    must(unsafe { moe_cuda_permute_sizes(T * K, E, &options, &mut rows, &mut bytes) });
    assert_eq!((rows, bytes), (T * K + E * (block - 1), 0));
    let [counts, offsets, pair_of_row, row_of_pair] =
        [E, E + 1, rows, T * K].map(|len| device.poisoned(len));
    let sort = moe_cuda_permute_args {
        struct_size: size_of::<moe_cuda_permute_args>(),
        num_experts: E,
        options: &options,
        ids: ids.data,
        ids_len: T * K,
        counts: counts.data,
        counts_len: E,
        offsets: offsets.data,
        offsets_len: E + 1,
        pair_of_row: pair_of_row.data,
        pair_of_row_len: rows,
        row_of_pair: row_of_pair.data,
        row_of_pair_len: T * K,
        ..Zeroable::zeroed()
    };
    // SAFETY: as above.
    must(unsafe { moe_cuda_permute(stream, &sort) });
    assert_eq!(as_usize(device.read(counts)), cpu.counts);
    assert_eq!(as_usize(device.read(offsets)), cpu.offsets);
    let found: Vec<u32> = device.read(pair_of_row);
    let used = cpu.pair_of_row.len();
    assert_eq!(found[..used], cpu.pair_of_row);
    assert!(found[used..].iter().all(|&p| p == MOE_NONE));
    assert_eq!(device.read::<u32>(row_of_pair), cpu.row_of_pair);

    // Copies of rows.
    let x = Stored::new(MOE_DTYPE_F32, &rng.normals(T * H));
    let device_x = device.store(&x, T, H);
    let copied = device.poisoned(rows * H);
    let copied_view = device_matrix(copied.data, rows, H, MOE_DTYPE_F32);
    let copy = moe_cuda_copy_args {
        struct_size: size_of::<moe_cuda_copy_args>(),
        src: &device_x,
        out: &copied_view,
        index: pair_of_row.data,
        index_len: rows,
        used: offsets.data + 4 * E as u64,
        divisor: K,
    };
    // SAFETY: as above.
    must(unsafe { moe_cuda_copy_rows(stream, &copy) });
    let (found, mut expected) = (device.read::<f32>(copied), vec![0.0; used * H]);
    rows_on_cpu(&cpu, &x, &mut expected, used);
    assert_same_bits(&found[..used * H], &expected, "rows");
    assert!(
        found[used * H..].iter().all(|v| v.is_nan()),
        "rows beyond offsets[E]"
    );

    // The grouped product, gathered.
    let (gate, up) = (
        scaled(&mut rng, E * I * H, H),
        scaled(&mut rng, E * I * H, H),
    );
    let (gate, up) = (
        Stored::new(MOE_DTYPE_F32, &gate),
        Stored::new(MOE_DTYPE_F32, &up),
    );
    let up_bias = rng.normals(E * I);
    let [w_gate, w_up] = [&gate, &up].map(|w| device.store_weights(w, [E, I, H]));
    let w_bias = device.store(&Stored::new(MOE_DTYPE_F32, &up_bias), E, I);
    let act = moe_activation {
        struct_size: size_of::<moe_activation>(),
        function: MOE_ACT_GELU_TANH,
        gated: 1,
        ..Zeroable::zeroed()
    };
    let h = device.poisoned(rows * I);
    let h_view = device_matrix(h.data, rows, I, MOE_DTYPE_F32);
    let gemm = moe_cuda_gemm_args {
        struct_size: size_of::<moe_cuda_gemm_args>(),
        a: &device_x,
        pair_of_row: pair_of_row.data,
        pair_of_row_len: rows,
        slots: K,
        offsets: offsets.data,
        offsets_len: E + 1,
        counts: counts.data,
        counts_len: E,
        gate: &w_gate,
        up: &w_up,
        up_bias: &w_bias,
        activation: &act,
        out: &h_view,
        ..Zeroable::zeroed()
    };
    // SAFETY: as above.
    must(unsafe { moe_cuda_grouped_gemm(stream, &gemm) });
    let expected = product_on_cpu(&cpu, &x, &gate, &up, &up_bias, &act, used);
    let found = device.read::<f32>(h);
    for (row, &pair) in cpu.pair_of_row.iter().enumerate() {
        let found = &found[row * I..][..I];
        match pair {
            MOE_NONE => assert!(found.iter().all(|v| v.is_nan()), "padding is left as it is"),
            _ => assert_same_bits(found, &expected[row * I..][..I], "product"),
        }
    }

    // The weighted sum of rows, with a residual in place.
    let residual = rng.normals(T * I);
    let (y, ones) = (device.put(&residual), rng.normals(T));
    let shared = Stored::new(MOE_DTYPE_F32, &rng.normals(T * I));
    let (device_shared, gates) = (device.store(&shared, T, I), device.put(&ones));
    let y_view = device_matrix(y.data, T, I, MOE_DTYPE_F32);
    let combine = moe_cuda_combine_args {
        struct_size: size_of::<moe_cuda_combine_args>(),
        ys: &h_view,
        weights: weights.data,
        weights_len: T * K,
        row_of_pair: row_of_pair.data,
        row_of_pair_len: T * K,
        slots: K,
        shared: &device_shared,
        shared_gate: gates.data,
        shared_gate_len: T,
        shared_kind: MOE_SHARED_SIGMOID_GATE,
        residual: &y_view,
        out: &y_view,
        routed_scale: 0.5,
        ..Zeroable::zeroed()
    };
    // SAFETY: as above.
    must(unsafe { moe_cuda_combine(stream, &combine) });
    let residual = Stored::new(MOE_DTYPE_F32, &residual);
    let (ys, shared) = (Stored::new(MOE_DTYPE_F32, &expected), shared.host(0, T, I));
    let (ys, residual) = (ys.host(0, used, I), residual.host(0, T, I));
    let mut sum = vec![f32::NAN; T * I];
    let out = host_out(&mut sum, T, I);
    let args = moe_combine_args {
        struct_size: size_of::<moe_combine_args>(),
        ys: &ys,
        weights: cpu.weights.as_ptr(),
        weights_len: T * K,
        row_of_pair: cpu.row_of_pair.as_ptr(),
        row_of_pair_len: T * K,
        slots: K,
        shared: &shared,
        shared_gate: ones.as_ptr(),
        shared_gate_len: T,
        shared_kind: MOE_SHARED_SIGMOID_GATE,
        residual: &residual,
        out: &out,
        routed_scale: 0.5,
        ..Zeroable::zeroed()
    };
    // SAFETY: as above, on the host.
    must(unsafe { moe_combine(cpu.cpu.0, &args) });
    assert_same_bits(&device.read(y), &sum, "sum");
}

fn rows_on_cpu(cpu: &OnCpu, x: &Stored, out: &mut [f32], rows: usize) {
    let mut p = null_mut();
    let options = moe_permute_options {
        struct_size: size_of::<moe_permute_options>(),
        block: 4,
        ..Zeroable::zeroed()
    };
    let (x, out) = (x.host(0, T, H), host_out(out, rows, H));
    // SAFETY: living handles, structs and arrays as long as they say.
    unsafe {
        must(moe_permutation_create(&mut p));
        must(moe_permutation_sort(
            cpu.cpu.0,
            p,
            cpu.ids.as_ptr(),
            T * K,
            E,
            &options,
        ));
        must(moe_permute_rows(cpu.cpu.0, p, &x, K, &out));
        must(moe_permutation_destroy(p));
    }
}

fn product_on_cpu(
    cpu: &OnCpu,
    x: &Stored,
    gate: &Stored,
    up: &Stored,
    bias: &[f32],
    act: &moe_activation,
    rows: usize,
) -> Vec<f32> {
    let (mut set, mut out) = (null_mut(), vec![0.0; rows * I]);
    let groups = moe_groups {
        struct_size: size_of::<moe_groups>(),
        offsets: cpu.offsets.as_ptr(),
        counts: cpu.counts.as_ptr(),
        experts: E,
        pair_of_row: cpu.pair_of_row.as_ptr(),
        pair_of_row_len: rows,
        slots: K,
        ..Zeroable::zeroed()
    };
    // SAFETY: living handles, structs and arrays as long as they say.
    unsafe {
        must(moe_matrices_create(
            cpu.cpu.0,
            I,
            H,
            MOE_DTYPE_F32,
            1,
            &mut set,
        ));
        for e in 0..E {
            let [gate, up] = [gate, up].map(|w| w.host(e * I * H, I, H));
            must(moe_matrices_push(
                cpu.cpu.0,
                set,
                &gate,
                &up,
                null(),
                bias[e * I..].as_ptr(),
                I,
            ));
        }
        let mut scratch = vec![0u8; moe_scratch_bytes(cpu.cpu.0)];
        let (x, view) = (x.host(0, T, H), host_out(&mut out, rows, I));
        must(moe_grouped_gemm(
            cpu.cpu.0,
            set,
            &x,
            &groups,
            act,
            &view,
            scratch.as_mut_ptr(),
            scratch.len(),
        ));
        must(moe_matrices_destroy(set));
    }
    out
}

/// A workspace: prioritised capacity has one, and a short one is refused.
#[test]
fn routers_with_a_workspace() {
    let Some(mut device) = Device::open() else {
        return;
    };
    let router = RouterHandle::new(c"mixtral", |config| {
        (
            config.has_capacity,
            config.capacity,
            config.batch_prioritized,
        ) = (1, 3, 1);
    });
    let logits = Stored::new(MOE_DTYPE_F32, &Rng(3).normals(T * E));
    let cpu = OnCpu::new(&router, &logits.host(0, T, E), 1);
    let device_logits = device.store(&logits, T, E);
    let mut bytes = 0;
    // SAFETY: a living handle and a place.
    must(unsafe { moe_cuda_route_workspace_size(router.0, T, &mut bytes) });
    assert_eq!(bytes, 8 * T);
    let (ids, weights, workspace) = (
        device.poisoned(T * K),
        device.poisoned(T * K),
        device.put(&vec![0xa5u8; bytes]),
    );
    let mut route = moe_cuda_route_args {
        struct_size: size_of::<moe_cuda_route_args>(),
        logits: &device_logits,
        ids: ids.data,
        ids_len: T * K,
        weights: weights.data,
        weights_len: T * K,
        workspace: workspace.data,
        workspace_bytes: bytes - 1,
        ..Zeroable::zeroed()
    };
    // SAFETY: living handles, structs that live here, memory of the GPU as long as it is told.
    unsafe {
        let status = moe_cuda_route(router.0, device.stream(), &route);
        assert_eq!(status, MOE_ERROR_BUFFER_TOO_SMALL);
        route.workspace_bytes = bytes;
        must(moe_cuda_route(router.0, device.stream(), &route));
    }
    assert_eq!(device.read::<i32>(ids), cpu.ids);
    assert_same_bits(&device.read(weights), &cpu.weights, "weights");
    assert!(cpu.ids.contains(&-1), "some pair was dropped");
}
