//! The layer against the CPU's through C: the same router handle, the same bits.

use crate::common::assert_same_bits;
use crate::operands::*;
use crate::world::*;
use crate::{E, H, I, K, T, last_error, must};
use bytemuck::Zeroable;
use moe_kernels::ffi::*;
use std::ptr::null_mut;

fn cases() -> Vec<Case> {
    let base = Case::PLAIN;
    vec![
        base.clone(),
        Case::FULL,
        Case {
            logits: true,
            ..Case::FULL
        },
        Case {
            family: c"gpt_oss",
            layout: MOE_LAYOUT_INTERLEAVED,
            clamp: MOE_CLAMP_GPT_OSS,
            biases: true,
            ..base.clone()
        },
        Case {
            family: c"llama4",
            weight_on_input: 1,
            shared: Some(MOE_JOIN_ADD),
            ..base.clone()
        },
        Case {
            layout: MOE_LAYOUT_SEPARATE,
            shared: Some(MOE_JOIN_AVERAGE),
            ..base.clone()
        },
        // Exact in 16 bits, too.
        Case {
            family: c"qwen2_moe",
            dtype: MOE_DTYPE_BF16,
            shared: Some(MOE_JOIN_SIGMOID_GATE),
            ..base.clone()
        },
        Case {
            layout: MOE_LAYOUT_SEPARATE,
            gated: 0,
            dtype: MOE_DTYPE_F16,
            output_steps: true,
            ..base
        },
    ]
}

#[test]
fn a_layer_has_the_bits_of_the_cpu() {
    let Some(mut device) = Device::open() else {
        return;
    };
    for case in cases() {
        let router = case.router();
        let mut on = Operands::new(&mut device, &case, &router);
        on.link();
        // SAFETY: a living handle and stream, structs that live here, memory of this context.
        must(unsafe { moe_cuda_layer_forward(on.layer, device.stream(), &on.args()) });
        let what = format!("{:?} {}", case.family, case.layout);
        assert_same_bits(&device.read(on.y_place), &on_cpu(&case, &router), &what);
    }
}

/// y = y + layer(x), in place.
#[test]
fn a_residual_may_be_the_output() {
    let Some(mut device) = Device::open() else {
        return;
    };
    let (case, router) = (Case::FULL, Case::FULL.router());
    let mut on = Operands::new(&mut device, &case, &router);
    on.y = on.residual;
    // What is there once has no stride to walk.
    (on.shared_gate.row_stride, on.shared_up.expert_stride) = (isize::MAX, isize::MAX);
    on.link();
    let y = device.put(&Numbers::new(&case).residual);
    (on.y.data, on.residual.data) = (y.data, y.data);
    // SAFETY: as above.
    must(unsafe { moe_cuda_layer_forward(on.layer, device.stream(), &on.args()) });
    assert_same_bits(&device.read(y), &on_cpu(&case, &router), "in place");
}

/// Ids and weights of one call are the routing of the next; halves of the experts add up to the whole.
#[test]
fn given_routing_and_parts_of_the_experts() {
    let Some(mut device) = Device::open() else {
        return;
    };
    let (case, router) = (Case::PLAIN, Case::PLAIN.router());
    let mut on = Operands::new(&mut device, &case, &router);
    on.link();
    let whole = on_cpu(&case, &router);
    let (ids, weights) = (device.poisoned(T * K), device.poisoned(T * K));
    let n = Numbers::new(&case);
    // The router's own answer, from logits that the CPU's gate made.
    let (cpu, mut routing) = (CpuHandle::new(), null_mut());
    let (mut host_ids, mut host_weights) = (vec![0i32; T * K], vec![0f32; T * K]);
    let logits = n.logits.host(0, T, E);
    let input = moe_route_input {
        struct_size: size_of::<moe_route_input>(),
        logits: &logits,
        ..Zeroable::zeroed()
    };
    let buffers = moe_routing_buffers {
        struct_size: size_of::<moe_routing_buffers>(),
        ids: host_ids.as_mut_ptr(),
        ids_len: T * K,
        weights: host_weights.as_mut_ptr(),
        weights_len: T * K,
        ..Zeroable::zeroed()
    };
    // SAFETY: living handles, structs and arrays as long as they say.
    unsafe {
        must(moe_routing_create(&mut routing));
        must(moe_route(cpu.0, router.0, &input, routing));
        must(moe_routing_read(routing, &buffers));
        must(moe_routing_destroy(routing));
    }
    let (given_ids, given_weights) = (device.put(&host_ids), device.put(&host_weights));
    let route = moe_cuda_route_args {
        struct_size: size_of::<moe_cuda_route_args>(),
        logits: &on.logits,
        ids: ids.data,
        ids_len: ids.len,
        weights: weights.data,
        weights_len: weights.len,
        ..Zeroable::zeroed()
    };
    let mut y = Vec::new();
    for (ids, weights) in [(ids, weights), (given_ids, given_weights)] {
        let mut args = on.args();
        (args.gate, args.gate_bias, args.gate_bias_len) = (std::ptr::null(), 0, 0);
        (args.ids, args.ids_len) = (ids.data, ids.len);
        (args.weights, args.weights_len) = (weights.data, weights.len);
        // SAFETY: as above.
        unsafe {
            must(moe_cuda_route(router.0, device.stream(), &route));
            must(moe_cuda_layer_forward(on.layer, device.stream(), &args));
        }
        y.push(device.read::<f32>(on.y_place));
    }
    assert_eq!(device.read::<i32>(ids), host_ids);
    assert_same_bits(&device.read(weights), &host_weights, "weights");
    assert_same_bits(&y[0], &y[1], "given routing");
    let logits = Case {
        logits: true,
        ..Case::PLAIN
    };
    assert_same_bits(&y[0], &on_cpu(&logits, &router), "routing from logits");

    let mut sum = vec![0.0f32; T * H];
    for first in [0, E / 2] {
        let config = moe_cuda_layer_config {
            first_local: first,
            num_local: E / 2,
            ..config(&case)
        };
        let part = create(&config, &case.activation(), &router).unwrap();
        let skipped = (first * 2 * I * H * 4) as u64;
        let (mut up, mut down) = (on.up, on.down);
        (up.data, up.experts, up.bytes) = (up.data + skipped, E / 2, up.bytes / 2);
        (down.data, down.experts, down.bytes) = (down.data + skipped / 2, E / 2, down.bytes / 2);
        let experts = moe_cuda_expert_weights {
            gate_up: &up,
            down: &down,
            ..on.experts
        };
        let mut args = on.args();
        args.experts = &experts;
        // SAFETY: as above.
        unsafe {
            must(moe_cuda_layer_forward(part, device.stream(), &args));
            device.gpu().synchronize();
            must(moe_cuda_layer_destroy(part));
        }
        for (s, v) in sum.iter_mut().zip(device.read::<f32>(on.y_place)) {
            *s += v;
        }
    }
    for (found, expected) in sum.iter().zip(&whole) {
        assert!((found - expected).abs() < 1e-5, "{found} {expected}");
    }
}

/// Prepared and then captured at once: what a call loads is loaded, and it does nothing that a capture forbids.
#[test]
fn a_prepared_call_can_be_captured() {
    let Some(mut device) = Device::open() else {
        return;
    };
    let (case, router) = (Case::FULL, Case::FULL.router());
    let mut on = Operands::new(&mut device, &case, &router);
    on.link();
    // SAFETY: as above.
    must(unsafe { moe_cuda_layer_prepare(on.layer, &on.args()) });
    assert!(device.is_poisoned(on.y_place));
    let graph = device.gpu().capture(|| {
        // SAFETY: as above.
        must(unsafe { moe_cuda_layer_forward(on.layer, device.stream(), &on.args()) });
    });
    assert!(device.is_poisoned(on.y_place));
    for _ in 0..2 {
        graph.launch().unwrap();
        assert_same_bits(
            &device.read(on.y_place),
            &on_cpu(&case, &router),
            "a replay",
        );
    }
}

/// Calls from several threads share a layer's handle; each has its own y and workspace.
#[test]
fn threads_share_a_layer() {
    let Some(mut device) = Device::open() else {
        return;
    };
    let (case, router) = (Case::PLAIN, Case::PLAIN.router());
    let mut on = Operands::new(&mut device, &case, &router);
    on.link();
    let places: Vec<_> = (0..4)
        .map(|_| {
            (
                device.poisoned(T * H),
                device.put(&vec![0u8; on.workspace.len]),
            )
        })
        .collect();
    let (layer, context) = (on.layer as usize, device.gpu().cuda.context().clone());
    let shared = (
        &on.x as *const _ as usize,
        &on.experts as *const _ as usize,
        &on.gate as *const _ as usize,
    );
    std::thread::scope(|scope| {
        for (y, workspace) in &places {
            let (context, bias) = (&context, on.gate_bias);
            scope.spawn(move || {
                context.bind_to_thread().unwrap();
                let stream = context.new_stream().unwrap();
                let y = device_matrix(y.data, T, H, MOE_DTYPE_F32);
                let args = moe_cuda_forward {
                    struct_size: size_of::<moe_cuda_forward>(),
                    x: shared.0 as *const _,
                    y: &y,
                    gate: shared.2 as *const _,
                    gate_bias: bias.data,
                    gate_bias_len: bias.len,
                    experts: shared.1 as *const _,
                    workspace: workspace.data,
                    workspace_bytes: workspace.len,
                    ..Zeroable::zeroed()
                };
                // SAFETY: handle, structs and memory live until the scope ends, after the stream has run.
                must(unsafe {
                    moe_cuda_layer_forward(layer as *const _, stream.cu_stream().cast(), &args)
                });
                stream.synchronize().unwrap();
            });
        }
    });
    let expected = on_cpu(&case, &router);
    for (y, _) in places {
        assert_same_bits(&device.read(y), &expected, "a thread");
    }
}

#[test]
fn no_tokens_are_no_work() {
    let Some(mut device) = Device::open() else {
        return;
    };
    let (case, router) = (Case::FULL, Case::FULL.router());
    let mut on = Operands::new(&mut device, &case, &router);
    (on.x.rows, on.y.rows, on.residual.rows) = (0, 0, 0);
    (on.x.data, on.x.bytes) = (0, 0);
    on.link();
    // SAFETY: as above.
    must(unsafe { moe_cuda_layer_forward(on.layer, device.stream(), &on.args()) });
    assert!(device.is_poisoned(on.y_place));
}

#[test]
fn the_device_is_described() {
    let Some(device) = Device::open() else { return };
    assert_eq!(moe_cuda_is_available(), 1, "{}", last_error());
    let mut found = moe_cuda_device::zeroed();
    found.struct_size = size_of::<moe_cuda_device>();
    // SAFETY: a struct as long as it says.
    must(unsafe { moe_cuda_device_query(&mut found) });
    let info = device.gpu().cuda.device_info();
    assert_eq!(
        (found.compute_major, found.compute_minor),
        info.compute_capability
    );
    assert_eq!(
        (found.sm_count, found.l2_bytes),
        (info.sm_count, info.l2_bytes)
    );
    assert!(found.driver_version >= 11_040 && found.shared_per_block >= 48 << 10);
    // A thread without a context is told so.
    let status = std::thread::spawn(|| {
        let mut found = moe_cuda_device::zeroed();
        found.struct_size = size_of::<moe_cuda_device>();
        // SAFETY: as above.
        (unsafe { moe_cuda_device_query(&mut found) }, last_error())
    });
    let (status, text) = status.join().unwrap();
    assert_eq!(status, MOE_ERROR_UNSUPPORTED);
    assert!(text.contains("no context is current"), "{text}");
}
