//! The C boundary: the bits of the Rust calls, a status for everything that is wrong, and nothing written then.
#![allow(unsafe_code)] // what C does

#[path = "../fuzz/calls/mod.rs"]
mod calls;
mod common;

use bytemuck::Zeroable;
use calls::{capi, permutation, routing};
use common::{Rng, cases};
use half::{bf16, f16};
use moe_kernels::experts::{ExpertWeights, PackedExperts};
use moe_kernels::ffi::*;
use moe_kernels::grouped_gemm::Activation;
use moe_kernels::moe::{Gate, MoeLayer};
use moe_kernels::routing::{Router, RouterConfig, Routing};
use moe_kernels::{Cpu, DType, MatMut, MatRef};
use proptest::prelude::*;
use std::ffi::{CStr, c_void};
use std::ptr::{null, null_mut};

const T: usize = 11;
const H: usize = 40;
const I: usize = 24;
const E: usize = 6;
const K: usize = 2;

/// Thread counts that the build under test can serve: without the feature `parallel` calls run where they are made.
const THREADS: &[usize] = match cfg!(feature = "parallel") {
    true => &[0, 1, 3],
    false => &[0, 1],
};

fn last_error() -> String {
    // SAFETY: the text stays until this thread's next error.
    unsafe { CStr::from_ptr(moe_last_error()) }
        .to_string_lossy()
        .into_owned()
}

#[track_caller]
fn must(status: moe_status) {
    assert_eq!(status, MOE_OK, "{}", last_error());
}

fn matrix<V>(data: &[V], rows: usize, cols: usize, dtype: moe_dtype) -> moe_matrix {
    moe_matrix {
        data: data.as_ptr().cast(),
        bytes: size_of_val(data),
        rows,
        cols,
        row_stride: cols as isize,
        col_stride: 1,
        dtype,
        reserved: 0,
    }
}

/// A layer made through C, and the same one in Rust.
struct Pair {
    cpu: *mut moe_cpu,
    router: *mut moe_router,
    layer: *mut moe_layer,
    routing: *mut moe_routing,
    rust: MoeLayer,
    workspace: Vec<u8>,
}

impl Pair {
    fn new(threads: usize, dtype: DType) -> Self {
        let mut rng = Rng(7);
        let weights: Vec<[Vec<f32>; 2]> = (0..E)
            .map(|_| [rng.normals(2 * I * H), rng.normals(H * I)])
            .collect();
        let gate = rng.normals(E * H);
        let rust_cpu = Cpu::new();
        let mut experts = PackedExperts::new(&rust_cpu, H, I, Activation::SWIGLU, dtype).unwrap();
        for [up, down] in &weights {
            let up = MatRef::new(up, 2 * I, H).unwrap();
            let down = MatRef::new(down, H, I).unwrap();
            experts
                .push(
                    &rust_cpu,
                    &ExpertWeights::fused(up.into(), down.into()).unwrap(),
                )
                .unwrap();
        }
        let rust_gate =
            Gate::new(&rust_cpu, MatRef::new(&gate, E, H).unwrap().into(), None).unwrap();
        let router = Router::new(RouterConfig::mixtral(E, K)).unwrap();
        let rust = MoeLayer::new(router, experts)
            .unwrap()
            .with_gate(rust_gate)
            .unwrap();

        let options = moe_cpu_options {
            struct_size: size_of::<moe_cpu_options>(),
            threads,
            isa: null(),
        };
        let mut config = moe_router_config::zeroed();
        config.struct_size = size_of::<moe_router_config>();
        let act = moe_activation {
            struct_size: size_of::<moe_activation>(),
            function: MOE_ACT_SILU,
            gated: 1,
            ..Zeroable::zeroed()
        };
        let format = match dtype {
            DType::F16 => MOE_DTYPE_F16,
            DType::BF16 => MOE_DTYPE_BF16,
            _ => MOE_DTYPE_F32,
        };
        let (mut cpu, mut router, mut packed) = (null_mut(), null_mut(), null_mut());
        let (mut layer, mut routing, mut bytes) = (null_mut(), null_mut(), 0);
        // SAFETY: every struct and array lives here and is as long as it says.
        unsafe {
            must(moe_cpu_create(&options, &mut cpu));
            must(moe_router_config_family(
                &mut config,
                c"mixtral".as_ptr(),
                E,
                K,
            ));
            must(moe_router_create(&config, &mut router));
            must(moe_experts_create(cpu, H, I, &act, format, &mut packed));
            for [up, down] in &weights {
                let (up, down) = (
                    matrix(up, 2 * I, H, MOE_DTYPE_F32),
                    matrix(down, H, I, MOE_DTYPE_F32),
                );
                let w = moe_expert_weights {
                    struct_size: size_of::<moe_expert_weights>(),
                    gate_up: &up,
                    down: &down,
                    layout: MOE_LAYOUT_FUSED,
                    ..Zeroable::zeroed()
                };
                must(moe_experts_push(cpu, packed, &w));
            }
            must(moe_layer_create(router, &mut packed, &mut layer));
            assert!(packed.is_null());
            let gate = matrix(&gate, E, H, MOE_DTYPE_F32);
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
            must(moe_routing_reserve(cpu, routing, router, T));
            must(moe_layer_workspace_size(cpu, layer, T, &mut bytes));
        }
        Self {
            cpu,
            router,
            layer,
            routing,
            rust,
            workspace: vec![0; bytes],
        }
    }

    fn rust_forward(&self, x: &[f32]) -> Vec<f32> {
        let cpu = Cpu::new();
        let mut y = vec![0.0; T * H];
        let mut routing = Routing::new();
        let mut workspace = vec![0; self.rust.workspace_size(&cpu, T).unwrap()];
        let (x, out) = (
            MatRef::new(x, T, H).unwrap(),
            MatMut::new(&mut y, T, H).unwrap(),
        );
        self.rust
            .forward(&cpu, x.into(), out.into(), &mut routing, &mut workspace)
            .unwrap();
        y
    }

    fn call(&mut self, x: *const moe_matrix, y: *const moe_matrix_mut) -> moe_forward {
        moe_forward {
            struct_size: size_of::<moe_forward>(),
            x,
            y,
            workspace: self.workspace.as_mut_ptr(),
            workspace_bytes: self.workspace.len(),
            ..Zeroable::zeroed()
        }
    }

    fn forward(&self, call: &moe_forward) -> moe_status {
        // SAFETY: the handles live as long as `self`; callers' memory is as long as they say.
        unsafe { moe_layer_forward(self.cpu, self.layer, self.routing, call) }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // SAFETY: living handles, used no more.
        unsafe {
            for status in [
                moe_layer_destroy(self.layer),
                moe_routing_destroy(self.routing),
                moe_router_destroy(self.router),
                moe_cpu_destroy(self.cpu),
            ] {
                must(status);
            }
        }
    }
}

#[test]
fn a_layer_has_the_bits_of_the_rust_call() {
    let x = Rng(3).normals(T * H);
    for dtype in DType::ALL {
        for &threads in THREADS {
            let mut pair = Pair::new(threads, dtype);
            // x with gaps and y with gaps.
            let mut wide = vec![f32::NAN; T * (H + 5)];
            for (row, from) in wide.chunks_exact_mut(H + 5).zip(x.chunks_exact(H)) {
                row[..H].copy_from_slice(from);
            }
            let mut x_view = matrix(&wide, T, H, MOE_DTYPE_F32);
            x_view.row_stride = (H + 5) as isize;
            let mut out = vec![-7.0f32; T * (H + 3)];
            let y_view = moe_matrix_mut {
                data: out.as_mut_ptr().cast(),
                bytes: size_of_val(&out[..]),
                rows: T,
                cols: H,
                row_stride: (H + 3) as isize,
                dtype: MOE_DTYPE_F32,
                reserved: 0,
            };
            let call = pair.call(&x_view, &y_view);
            must(pair.forward(&call));
            let expected = pair.rust_forward(&x);
            for (row, expected) in out.chunks_exact(H + 3).zip(expected.chunks_exact(H)) {
                common::assert_same_bits(&row[..H], expected, "y");
                assert_eq!(row[H..], [-7.0; 3]);
            }
        }
    }
}

#[test]
fn half_precision_goes_in_and_out() {
    let x = Rng(3).normals(T * H);
    let mut pair = Pair::new(1, DType::BF16);
    let (half_x, mut half_y): (Vec<bf16>, _) = (
        x.iter().map(|&v| bf16::from_f32(v)).collect(),
        vec![f16::NAN; T * H],
    );
    let x_view = matrix(&half_x, T, H, MOE_DTYPE_BF16);
    let y_view = moe_matrix_mut {
        data: half_y.as_mut_ptr().cast(),
        bytes: size_of_val(&half_y[..]),
        rows: T,
        cols: H,
        row_stride: H as isize,
        dtype: MOE_DTYPE_F16,
        reserved: 0,
    };
    let call = pair.call(&x_view, &y_view);
    must(pair.forward(&call));
    let cpu = Cpu::new();
    let (mut y, mut routing) = (vec![f16::NAN; T * H], Routing::new());
    let mut workspace = vec![0; pair.rust.workspace_size(&cpu, T).unwrap()];
    let (x, out) = (
        MatRef::new(&half_x, T, H).unwrap(),
        MatMut::new(&mut y, T, H).unwrap(),
    );
    pair.rust
        .forward(&cpu, x.into(), out.into(), &mut routing, &mut workspace)
        .unwrap();
    assert_eq!(
        half_y.iter().map(|v| v.to_bits()).collect::<Vec<_>>(),
        y.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
    );
    assert!(y.iter().all(|v| v.is_finite()));
}

/// One thing that is wrong with a call of the layer, and what it is refused as.
#[derive(Clone, Copy, Debug)]
enum Wrong {
    NullX,
    NullData,
    NullY,
    Misaligned,
    NegativeStride,
    HugeStride,
    HugeRows,
    ShortX,
    ShortY,
    TooFewColumns,
    Dtype,
    Reserved,
    OverlapXy,
    OverlapWorkspace,
    RowsOverlap,
    ShortWorkspace,
    StructSize,
    NewerStruct,
    NullRouting,
    OtherHandle,
    StrayLogits,
    GivenIds,
}

const WRONG: [(Wrong, moe_status); 22] = [
    (Wrong::NullX, MOE_ERROR_NULL),
    (Wrong::NullData, MOE_ERROR_NULL),
    (Wrong::NullY, MOE_ERROR_NULL),
    (Wrong::Misaligned, MOE_ERROR_MISALIGNED),
    (Wrong::NegativeStride, MOE_ERROR_VALUE),
    (Wrong::HugeStride, MOE_ERROR_OVERFLOW),
    (Wrong::HugeRows, MOE_ERROR_OVERFLOW),
    (Wrong::ShortX, MOE_ERROR_BUFFER_TOO_SMALL),
    (Wrong::ShortY, MOE_ERROR_BUFFER_TOO_SMALL),
    (Wrong::TooFewColumns, MOE_ERROR_SHAPE),
    (Wrong::Dtype, MOE_ERROR_VALUE),
    (Wrong::Reserved, MOE_ERROR_VALUE),
    (Wrong::OverlapXy, MOE_ERROR_OVERLAP),
    (Wrong::OverlapWorkspace, MOE_ERROR_OVERLAP),
    (Wrong::RowsOverlap, MOE_ERROR_VALUE),
    (Wrong::ShortWorkspace, MOE_ERROR_BUFFER_TOO_SMALL),
    (Wrong::StructSize, MOE_ERROR_STRUCT_SIZE),
    (Wrong::NewerStruct, MOE_ERROR_STRUCT_SIZE),
    (Wrong::NullRouting, MOE_ERROR_NULL),
    (Wrong::OtherHandle, MOE_ERROR_HANDLE),
    (Wrong::StrayLogits, MOE_ERROR_SHAPE),
    (Wrong::GivenIds, MOE_ERROR_VALUE),
];

/// A caller whose header has one field more.
#[repr(C)]
struct Newer {
    call: moe_forward,
    more: u64,
}

#[test]
fn what_is_wrong_is_refused_and_nothing_is_written() {
    let mut pair = Pair::new(1, DType::F32);
    let x = Rng(5).normals(T * H + 1);
    let ids = [0i32; T * K];
    for (wrong, expected) in WRONG {
        let mut out = vec![-7.0f32; T * H];
        let mut x_view = matrix(&x, T, H, MOE_DTYPE_F32);
        let mut y_view = moe_matrix_mut {
            data: out.as_mut_ptr().cast(),
            bytes: T * H * 4,
            rows: T,
            cols: H,
            row_stride: H as isize,
            dtype: MOE_DTYPE_F32,
            reserved: 0,
        };
        let logits = matrix(&x, T, E + 1, MOE_DTYPE_F32);
        let mut call = pair.call(null(), null());
        let (mut routing, mut x_null, mut y_null) = (pair.routing, false, false);
        match wrong {
            Wrong::NullX => x_null = true,
            Wrong::NullData => x_view.data = null(),
            Wrong::NullY => y_null = true,
            Wrong::Misaligned => {
                x_view.data = x_view.data.cast::<u8>().wrapping_add(1).cast();
                x_view.bytes -= 1;
            }
            Wrong::NegativeStride => x_view.row_stride = -(H as isize),
            Wrong::HugeStride => x_view.row_stride = isize::MAX,
            Wrong::HugeRows => x_view.rows = usize::MAX,
            Wrong::ShortX => x_view.bytes = T * H * 4 - 1,
            Wrong::ShortY => y_view.bytes = T * H * 4 - 1,
            Wrong::TooFewColumns => x_view.cols -= 1,
            Wrong::Dtype => y_view.dtype = 4,
            Wrong::Reserved => x_view.reserved = 1,
            Wrong::OverlapXy => {
                // y begins at x's last element.
                y_view.data = x_view
                    .data
                    .cast::<f32>()
                    .wrapping_add(T * H - 1)
                    .cast_mut()
                    .cast::<c_void>();
            }
            Wrong::OverlapWorkspace => {
                call.workspace = out.as_mut_ptr().cast::<u8>().wrapping_add(T * H * 4 - 1)
            }
            Wrong::RowsOverlap => y_view.row_stride = H as isize - 1,
            Wrong::ShortWorkspace => call.workspace_bytes -= 1,
            Wrong::StructSize => call.struct_size -= 8,
            Wrong::NewerStruct => call.struct_size = size_of::<Newer>(),
            Wrong::NullRouting => routing = null_mut(),
            Wrong::OtherHandle => routing = pair.router.cast(),
            Wrong::StrayLogits => call.logits = &logits,
            Wrong::GivenIds => (call.given_ids, call.given_ids_len) = (ids.as_ptr(), ids.len()),
        }
        call.x = if x_null { null() } else { &x_view };
        call.y = if y_null { null() } else { &y_view };
        let newer = Newer { call, more: 1 };
        // SAFETY: memory is as long as it is told, or the call is refused before it is touched.
        let status = unsafe { moe_layer_forward(pair.cpu, pair.layer, routing, &newer.call) };
        assert_eq!(status, expected, "{wrong:?}: {}", last_error());
        assert!(!last_error().is_empty());
        assert!(out.iter().all(|&v| v == -7.0), "{wrong:?}");
        let _ = newer.more;
    }
    // And the very same call with nothing wrong works, the newer struct with nothing new in it too.
    let mut out = vec![-7.0f32; T * H];
    let x_view = matrix(&x, T, H, MOE_DTYPE_F32);
    let y_view = moe_matrix_mut {
        data: out.as_mut_ptr().cast(),
        bytes: T * H * 4,
        rows: T,
        cols: H,
        row_stride: H as isize,
        dtype: MOE_DTYPE_F32,
        reserved: 0,
    };
    let mut call = pair.call(&x_view, &y_view);
    call.struct_size = size_of::<Newer>();
    let newer = Newer { call, more: 0 };
    // SAFETY: as above.
    must(unsafe {
        moe_layer_forward(
            pair.cpu,
            pair.layer,
            pair.routing,
            (&raw const newer).cast(),
        )
    });
    common::assert_same_bits(&out, &pair.rust_forward(&x[..T * H]), "y");
}

#[test]
fn handles_in_use_are_busy_and_experts_stay_with_the_caller_on_error() {
    let pair = Pair::new(1, DType::F32);
    let mut experts = null_mut();
    let act = moe_activation {
        struct_size: size_of::<moe_activation>(),
        function: MOE_ACT_SILU,
        gated: 1,
        ..Zeroable::zeroed()
    };
    let mut layer = null_mut();
    // SAFETY: living handles and places.
    unsafe {
        must(moe_experts_create(
            pair.cpu,
            H,
            I,
            &act,
            MOE_DTYPE_F32,
            &mut experts,
        ));
        let kept = experts;
        assert_eq!(
            moe_layer_create(pair.router, &mut experts, &mut layer),
            MOE_ERROR_VALUE
        ); // there are none
        assert_eq!(
            moe_layer_set_shared(pair.cpu, pair.layer, &mut experts, MOE_JOIN_ADD, null()),
            MOE_ERROR_VALUE
        );
        assert!(experts == kept && layer.is_null());
        assert_eq!(moe_experts_len(experts), 0);
        must(moe_experts_destroy(experts));
        must(moe_experts_destroy(null_mut()));
    }
}

/// Calls from several threads share handles as const; each has its own routing.
#[test]
fn threads_share_a_layer() {
    let pair = Pair::new(*THREADS.last().unwrap(), DType::F32);
    let x = Rng(9).normals(T * H);
    let expected = pair.rust_forward(&x);
    let (cpu, layer, bytes) = (pair.cpu as usize, pair.layer as usize, pair.workspace.len());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let (mut out, mut workspace) = (vec![0.0f32; T * H], vec![0u8; bytes]);
                let x_view = matrix(&x, T, H, MOE_DTYPE_F32);
                let y_view = moe_matrix_mut {
                    data: out.as_mut_ptr().cast(),
                    bytes: T * H * 4,
                    rows: T,
                    cols: H,
                    row_stride: H as isize,
                    dtype: MOE_DTYPE_F32,
                    reserved: 0,
                };
                let call = moe_forward {
                    struct_size: size_of::<moe_forward>(),
                    x: &x_view,
                    y: &y_view,
                    workspace: workspace.as_mut_ptr(),
                    workspace_bytes: bytes,
                    ..Zeroable::zeroed()
                };
                let mut routing = null_mut();
                // SAFETY: the handles live until the scope ends; memory is as long as it is told.
                unsafe {
                    must(moe_routing_create(&mut routing));
                    for _ in 0..20 {
                        must(moe_layer_forward(
                            cpu as *const _,
                            layer as *const _,
                            routing,
                            &call,
                        ));
                    }
                    must(moe_routing_destroy(routing));
                }
                common::assert_same_bits(&out, &expected, "y");
            });
        }
    });
}

/// Without the feature `parallel` a handle of several threads is refused and none is made.
#[test]
fn threads_are_given_or_refused() {
    const PARALLEL: bool = cfg!(feature = "parallel");
    let (made, lacking) = match PARALLEL {
        true => (MOE_OK, ""),
        false => (MOE_ERROR_UNSUPPORTED, "feature `parallel`"),
    };
    let mut cases = vec![(0, MOE_OK, "", 1), (1, MOE_OK, "", 1)];
    cases.extend([2, 3].map(|n| (n, made, lacking, n)));
    cases.extend([4097, usize::MAX].map(|n| (n, MOE_ERROR_VALUE, "at most 4096", 0)));
    for (threads, status, message, count) in cases {
        let options = moe_cpu_options {
            struct_size: size_of::<moe_cpu_options>(),
            threads,
            isa: null(),
        };
        let mut cpu = null_mut();
        // SAFETY: valid options and a place for the handle, which is ended once.
        unsafe {
            let found = moe_cpu_create(&options, &mut cpu);
            assert_eq!(found, status, "{threads} threads: {}", last_error());
            if status == MOE_OK {
                assert_eq!(moe_cpu_threads(cpu), count, "{threads} threads");
                must(moe_cpu_destroy(cpu));
            } else {
                assert!(cpu.is_null(), "{threads} threads");
                let error = last_error();
                assert!(
                    error.starts_with("threads: ") && error.contains(message),
                    "{error}"
                );
            }
        }
    }
}

/// Sizes of the structs are the interface: on 64-bit systems they may only grow, with new fields at the end and `FIRST_SIZE` left as it was.
#[cfg(target_pointer_width = "64")]
#[test]
fn structs_keep_their_sizes() {
    let sizes = [
        size_of::<moe_matrix>(),
        size_of::<moe_matrix_mut>(),
        size_of::<moe_cpu_options>(),
        size_of::<moe_router_config>(),
        size_of::<moe_route_input>(),
        size_of::<moe_given_routing>(),
        size_of::<moe_routing_view>(),
        size_of::<moe_routing_buffers>(),
        size_of::<moe_permute_options>(),
        size_of::<moe_permutation_view>(),
        size_of::<moe_permutation_buffers>(),
        size_of::<moe_activation>(),
        size_of::<moe_groups>(),
        size_of::<moe_expert_weights>(),
        size_of::<moe_rms_norm>(),
        size_of::<moe_combine_args>(),
        size_of::<moe_forward>(),
    ];
    assert_eq!(
        sizes,
        [
            56, 48, 24, 160, 72, 64, 56, 56, 40, 64, 72, 32, 72, 96, 32, 160, 88
        ]
    );
}

#[test]
fn families_have_their_names() {
    for (name, expected) in [
        (c"mixtral", RouterConfig::mixtral(8, 2)),
        (c"gpt_oss", RouterConfig::gpt_oss(8, 2)),
        (c"deepseek_v3", RouterConfig::deepseek_v3(8, 2, 1, 1, 1.0)),
        (c"llama4", RouterConfig::llama4(8, 2)),
        (c"ernie4_5", RouterConfig::ernie4_5(8, 2)),
    ] {
        let mut config = moe_router_config::zeroed();
        config.struct_size = size_of::<moe_router_config>();
        let (mut router, mut cpu, mut routing) = (null_mut(), null_mut(), null_mut());
        let logits = Rng(1).normals(8 * 5);
        let view = matrix(&logits, 5, 8, MOE_DTYPE_F32);
        let input = moe_route_input {
            struct_size: size_of::<moe_route_input>(),
            logits: &view,
            ..Zeroable::zeroed()
        };
        let (mut ids, mut weights) = (vec![-9i32; 10], vec![-9.0f32; 10]);
        let buffers = moe_routing_buffers {
            struct_size: size_of::<moe_routing_buffers>(),
            ids: ids.as_mut_ptr(),
            ids_len: 10,
            weights: weights.as_mut_ptr(),
            weights_len: 10,
            ..Zeroable::zeroed()
        };
        // SAFETY: structs and arrays live here and are as long as they say.
        unsafe {
            must(moe_router_config_family(&mut config, name.as_ptr(), 8, 2));
            must(moe_router_create(&config, &mut router));
            must(moe_cpu_create(null(), &mut cpu));
            must(moe_routing_create(&mut routing));
            must(moe_route(cpu, router, &input, routing));
            must(moe_routing_read(routing, &buffers));
            must(moe_routing_destroy(routing));
            must(moe_router_destroy(router));
            must(moe_cpu_destroy(cpu));
        }
        let mut rust = Routing::new();
        let input = moe_kernels::routing::RouteInput::new(MatRef::new(&logits, 5, 8).unwrap());
        Router::new(expected)
            .unwrap()
            .route(&Cpu::new(), &input, &mut rust)
            .unwrap();
        assert_eq!(ids, rust.ids(), "{name:?}");
        common::assert_same_bits(&weights, rust.weights(), "weights");
    }
}

proptest! {
    #![proptest_config(cases(2000))]

    /// What the fuzz target does, on seeded bytes: see `fuzz/calls/capi.rs`.
    #[test]
    fn arbitrary_calls_are_refused_or_done(data in prop::collection::vec(any::<u8>(), 0..1500)) {
        capi::run(&data);
    }

    #[test]
    fn arbitrary_logits_route_as_the_reference(data in prop::collection::vec(any::<u8>(), 0..3000)) {
        routing::run(&data);
    }

    #[test]
    fn arbitrary_ids_sort_as_the_reference(data in prop::collection::vec(any::<u8>(), 0..1500)) {
        permutation::run(&data);
    }
}
