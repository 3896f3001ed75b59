//! What a call through the C interface costs beyond the Rust call: `cargo bench --features capi --bench capi`.
//!
//! The layer is as small as one can be, so that checks and handles are a large part of a call and show. Rust and C take turns of 64 calls on the same data; the table has
//! the median time of a call and the median of the differences between neighbouring turns. Fails when a difference is over 2 µs.

#![allow(missing_docs, unsafe_code)] // it calls as C does

use bytemuck::Zeroable;
use moe_kernels::experts::{ExpertWeights, PackedExperts};
use moe_kernels::ffi::*;
use moe_kernels::grouped_gemm::Activation;
use moe_kernels::moe::{Forward, Gate, MoeLayer, RouteFrom};
use moe_kernels::routing::{RouteInput, Router, RouterConfig, Routing};
use moe_kernels::{Cpu, DType, MatMut, MatRef};
use std::process::ExitCode;
use std::ptr::{null, null_mut};
use std::time::Instant;

const H: usize = 64;
const I: usize = 32;
const E: usize = 8;
const K: usize = 2;
/// Calls of a turn.
const CALLS: u32 = 64;
/// At most so many microseconds more.
const MOST_US: f64 = 2.0;

fn must(status: moe_status) {
    assert_eq!(status, MOE_OK);
}

fn view(data: &[f32], rows: usize, cols: usize) -> moe_matrix {
    moe_matrix {
        data: data.as_ptr().cast(),
        bytes: size_of_val(data),
        rows,
        cols,
        row_stride: cols as isize,
        col_stride: 1,
        dtype: MOE_DTYPE_F32,
        reserved: 0,
    }
}

/// Handles of the same layer as the Rust one.
struct C {
    cpu: *mut moe_cpu,
    router: *mut moe_router,
    layer: *mut moe_layer,
    routing: *mut moe_routing,
}

fn through_c(up: &[f32], down: &[f32], gate: &[f32]) -> C {
    let (mut cpu, mut router, mut experts) = (null_mut(), null_mut(), null_mut());
    let (mut layer, mut routing) = (null_mut(), null_mut());
    let mut config = moe_router_config::zeroed();
    config.struct_size = size_of::<moe_router_config>();
    let act = moe_activation {
        struct_size: size_of::<moe_activation>(),
        function: MOE_ACT_SILU,
        gated: 1,
        ..Zeroable::zeroed()
    };
    let (up, down, gate) = (view(up, 2 * I, H), view(down, H, I), view(gate, E, H));
    let weights = moe_expert_weights {
        struct_size: size_of::<moe_expert_weights>(),
        gate_up: &up,
        down: &down,
        layout: MOE_LAYOUT_FUSED,
        ..Zeroable::zeroed()
    };
    // SAFETY: structs and arrays live here, as long as they say.
    unsafe {
        must(moe_cpu_create(null(), &mut cpu));
        must(moe_router_config_family(
            &mut config,
            c"mixtral".as_ptr(),
            E,
            K,
        ));
        must(moe_router_create(&config, &mut router));
        must(moe_experts_create(
            cpu,
            H,
            I,
            &act,
            MOE_DTYPE_F32,
            &mut experts,
        ));
        for _ in 0..E {
            must(moe_experts_push(cpu, experts, &weights));
        }
        must(moe_layer_create(router, &mut experts, &mut layer));
        must(moe_layer_set_gate(
            cpu,
            layer,
            &gate,
            null(),
            0,
            null(),
            null(),
        ));
        must(moe_routing_create(&mut routing));
    }
    C {
        cpu,
        router,
        layer,
        routing,
    }
}

/// Microseconds of one of `CALLS` calls.
fn turn(call: &mut dyn FnMut()) -> f64 {
    let began = Instant::now();
    (0..CALLS).for_each(|_| call());
    began.elapsed().as_secs_f64() * 1e6 / f64::from(CALLS)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// One line; whether C costs little enough.
fn compare(name: &str, turns: usize, rust: &mut dyn FnMut(), c: &mut dyn FnMut()) -> bool {
    turn(rust); // first touches
    turn(c);
    let pairs: Vec<(f64, f64)> = (0..turns).map(|_| (turn(rust), turn(c))).collect();
    let difference = median(pairs.iter().map(|(rust, c)| c - rust).collect());
    let (rust, c): (Vec<f64>, Vec<f64>) = pairs.into_iter().unzip();
    println!(
        "{name:<28} Rust {:>8.3} µs   C {:>8.3} µs   difference {difference:>+7.3} µs",
        median(rust),
        median(c)
    );
    difference <= MOST_US
}

fn main() -> ExitCode {
    // `cargo test --benches` only wants to see that it runs.
    let turns = if std::env::args().any(|a| a == "--bench") {
        2000
    } else {
        2
    };
    let numbers: Vec<f32> = (0..2 * I * H)
        .map(|i| (i % 17) as f32 / 64.0 - 0.125)
        .collect();
    let (up, down, gate) = (&numbers[..], &numbers[..H * I], &numbers[..E * H]);
    let cpu = Cpu::new().single_threaded();
    let mut experts = PackedExperts::new(&cpu, H, I, Activation::SWIGLU, DType::F32).unwrap();
    for _ in 0..E {
        let (up, down) = (
            MatRef::new(up, 2 * I, H).unwrap(),
            MatRef::new(down, H, I).unwrap(),
        );
        experts
            .push(&cpu, &ExpertWeights::fused(up.into(), down.into()).unwrap())
            .unwrap();
    }
    let router = Router::new(RouterConfig::mixtral(E, K)).unwrap();
    let rust_gate = Gate::new(&cpu, MatRef::new(gate, E, H).unwrap().into(), None).unwrap();
    let layer = MoeLayer::new(router.clone(), experts)
        .unwrap()
        .with_gate(rust_gate)
        .unwrap();
    let c = through_c(up, down, gate);

    println!("{}, one thread, H {H}, I {I}, E {E}, K {K}, f32", cpu.isa());
    let mut fine = true;
    for tokens in [1, 16] {
        let x: Vec<f32> = (0..tokens * H)
            .map(|i| (i % 13) as f32 / 16.0 - 0.4)
            .collect();
        let logits: Vec<f32> = (0..tokens * E).map(|i| (i % 7) as f32).collect();
        let (mut y, mut y_c) = (vec![0.0f32; tokens * H], vec![0.0f32; tokens * H]);
        let (mut routing, bytes) = (Routing::new(), layer.workspace_size(&cpu, tokens).unwrap());
        let (mut workspace, mut workspace_c) = (vec![0u8; bytes], vec![0u8; bytes]);

        let x_view = view(&x, tokens, H);
        let y_view = moe_matrix_mut {
            data: y_c.as_mut_ptr().cast(),
            bytes: size_of_val(&y_c[..]),
            rows: tokens,
            cols: H,
            row_stride: H as isize,
            dtype: MOE_DTYPE_F32,
            reserved: 0,
        };
        let logits_view = view(&logits, tokens, E);
        let call = moe_forward {
            struct_size: size_of::<moe_forward>(),
            x: &x_view,
            y: &y_view,
            logits: &logits_view,
            workspace: workspace_c.as_mut_ptr(),
            workspace_bytes: bytes,
            ..Zeroable::zeroed()
        };
        fine &= compare(
            &format!("moe_layer_forward, T = {tokens}"),
            turns,
            &mut || {
                let (x, y) = (
                    MatRef::new(&x, tokens, H).unwrap(),
                    MatMut::new(&mut y, tokens, H).unwrap(),
                );
                let logits = MatRef::new(&logits, tokens, E).unwrap();
                let forward = Forward {
                    route: RouteFrom::Logits(logits.into()),
                    ..Forward::default()
                };
                layer
                    .forward_with(
                        &cpu,
                        x.into(),
                        &forward,
                        y.into(),
                        &mut routing,
                        &mut workspace,
                    )
                    .unwrap();
            },
            // SAFETY: living handles, memory as long as it is told.
            &mut || must(unsafe { moe_layer_forward(c.cpu, c.layer, c.routing, &call) }),
        );
        assert!(y == y_c && y[0] != 0.0, "not the same answer");

        let input = moe_route_input {
            struct_size: size_of::<moe_route_input>(),
            logits: &logits_view,
            ..Zeroable::zeroed()
        };
        let mut rust_routing = Routing::new();
        fine &= compare(
            &format!("moe_route, T = {tokens}"),
            turns,
            &mut || {
                let logits = MatRef::new(&logits, tokens, E).unwrap();
                router
                    .route(&cpu, &RouteInput::new(logits), &mut rust_routing)
                    .unwrap();
            },
            // SAFETY: as above.
            &mut || must(unsafe { moe_route(c.cpu, c.router, &input, c.routing) }),
        );
    }
    // SAFETY: living handles, used no more.
    unsafe {
        must(moe_layer_destroy(c.layer));
        must(moe_routing_destroy(c.routing));
        must(moe_router_destroy(c.router));
        must(moe_cpu_destroy(c.cpu));
    }
    match fine {
        true => ExitCode::SUCCESS,
        false => {
            eprintln!("a call costs more than {MOST_US} µs beyond Rust's");
            ExitCode::FAILURE
        }
    }
}
