//! The C boundary: the bits of the Rust calls, a status for everything that is wrong, and nothing written then.
#![allow(unsafe_code)] // what C does

#[path = "../../fuzz/calls/mod.rs"]
mod calls;
#[path = "../common/mod.rs"]
mod common;

mod handles;
mod layer;
mod pair;
mod refused;

use bytemuck::Zeroable;
use calls::{capi, permutation, routing};
use common::{Rng, assert_same_bits, cases};
use half::{bf16, f16};
use moe_kernels::experts::{ExpertWeights, PackedExperts};
use moe_kernels::ffi::*;
use moe_kernels::grouped_gemm::Activation;
use moe_kernels::moe::{Gate, MoeLayer};
use moe_kernels::routing::{RouteInput, Router, RouterConfig, Routing};
use moe_kernels::{AnyMatMut, AnyMatRef, Cpu, DType, Element, MatMut, MatRef};
use pair::Pair;
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

fn format(dtype: DType) -> moe_dtype {
    match dtype {
        DType::F16 => MOE_DTYPE_F16,
        DType::BF16 => MOE_DTYPE_BF16,
        _ => MOE_DTYPE_F32,
    }
}

fn matrix<V: Element>(data: &[V], rows: usize, cols: usize) -> moe_matrix {
    moe_matrix {
        data: data.as_ptr().cast(),
        bytes: size_of_val(data),
        rows,
        cols,
        row_stride: cols as isize,
        col_stride: 1,
        dtype: format(V::DTYPE),
        reserved: 0,
    }
}

fn matrix_mut<V: Element>(data: &mut [V], rows: usize, cols: usize) -> moe_matrix_mut {
    moe_matrix_mut {
        data: data.as_mut_ptr().cast(),
        bytes: size_of_val(data),
        rows,
        cols,
        row_stride: cols as isize,
        dtype: format(V::DTYPE),
        reserved: 0,
    }
}

fn swiglu() -> moe_activation {
    moe_activation {
        struct_size: size_of::<moe_activation>(),
        function: MOE_ACT_SILU,
        gated: 1,
        ..Zeroable::zeroed()
    }
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
        let view = matrix(&logits, 5, 8);
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
        let input = RouteInput::new(MatRef::new(&logits, 5, 8).unwrap());
        Router::new(expected)
            .unwrap()
            .route(&Cpu::new(), &input, &mut rust)
            .unwrap();
        assert_eq!(ids, rust.ids(), "{name:?}");
        assert_same_bits(&weights, rust.weights(), "weights");
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
