//! The combine on the GPU against the CPU: the same bits from the same inputs, for every option, format, alignment and number of slots.
#![cfg(feature = "cuda")]

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/gpu.rs"]
mod gpu;

mod plans;
mod problem;

use common::product::{bytes, numbers, rounded};
use common::{Rng, cases};
use gpu::{Buffer, Gpu};
use half::{bf16, f16};
use moe_kernels::combine as cpu;
use moe_kernels::cuda::combine::*;
use moe_kernels::cuda::{DeviceInfo, DevicePtr};
use moe_kernels::norm::RmsNorm;
use moe_kernels::permute::NO_ROW;
use moe_kernels::{AnyMatMut, AnyMatRef, Cpu, DType, Element, Error, MatMut, MatRef};
use problem::*;
use proptest::prelude::*;

fn dtypes() -> impl Strategy<Value = DType> + Clone {
    prop::sample::select(vec![DType::F32, DType::F16, DType::BF16])
}

fn steps() -> impl Strategy<Value = Steps> {
    let some = prop::bool::weighted(0.3);
    (
        prop::option::of(prop::sample::select(vec![1.0f32, 1.5, -0.3])),
        0..4u8,
        [some; 6],
    )
        .prop_map(
            |(scale, shared, [norm, bias, residual, identity, without_weights, given_sum])| Steps {
                scale,
                shared,
                norm,
                bias,
                residual,
                identity,
                without_weights: without_weights && !identity,
                given_sum,
            },
        )
}

proptest! {
    #![proptest_config(cases(96))]

    #[test]
    fn bits_are_those_of_the_cpu(
        seed: u64,
        tokens in prop::sample::select(vec![0usize, 1, 2, 5, 17]),
        slots in prop::sample::select(vec![1usize, 2, 7, 8, 9, 16, 64]),
        width in prop::sample::select(vec![1usize, 4, 7, 8, 32, 33, 100, 256, 264, 520, 1032, 2056]),
        formats in [dtypes(), dtypes(), dtypes(), dtypes()],
        out in dtypes(),
        layout in prop::sample::select(vec![(0, 0), (0, 0), (8, 8), (1, 0), (0, 1), (3, 2)]),
        steps in steps(),
    ) {
        let Some(gpu) = gpu::open() else { return Ok(()) };
        let layout = Layout { gap: layout.0, shift: layout.1 };
        Problem::new(gpu, seed, [tokens, slots, width], formats, layout).check(steps, out);
    }
}

/// Every kernel runs, chosen by format, alignment, width and steps.
#[test]
fn every_kernel_is_reached() {
    let dense = Layout::DENSE;
    let odd = Layout { gap: 1, shift: 0 };
    let (f32_, f16_, bf16_) = (DType::F32, DType::F16, DType::BF16);
    let identity = Steps {
        identity: true,
        ..Steps::default()
    };
    let norm = Steps {
        norm: true,
        ..Steps::default()
    };
    let plain = Steps::default();
    for (ys, out, width, layout, steps, kernel) in [
        (f32_, f32_, 260, dense, plain, "moe_combine_f32_f32"),
        (f32_, f16_, 264, dense, plain, "moe_combine_f32_f16"),
        (f32_, bf16_, 264, dense, plain, "moe_combine_f32_bf16"),
        (f16_, f32_, 264, dense, plain, "moe_combine_f16_f32"),
        (f16_, f16_, 264, dense, plain, "moe_combine_f16_f16"),
        (bf16_, f32_, 264, dense, plain, "moe_combine_bf16_f32"),
        (bf16_, bf16_, 264, dense, plain, "moe_combine_bf16_bf16"),
        (bf16_, f16_, 264, dense, plain, "moe_combine_any_4"),
        (bf16_, bf16_, 264, dense, identity, "moe_combine_any_4"),
        (bf16_, bf16_, 263, dense, plain, "moe_combine_any_1"),
        (f32_, f32_, 260, odd, plain, "moe_combine_any_1"),
        (f32_, f32_, 260, dense, norm, "moe_combine_norm_4"),
        (f16_, f32_, 261, dense, norm, "moe_combine_norm_1"),
    ] {
        let Some(gpu) = gpu::open() else { return };
        let p = Problem::new(gpu, 5, [4, 8, width], [ys, f32_, f32_, f32_], layout);
        assert_eq!(p.check(steps, out), kernel);
    }
}

/// Tiles narrower and wider than a block, several tokens in a block, one token on many multiprocessors.
#[test]
fn tiles_of_all_shapes() {
    for (tokens, width) in [
        (1, 8192),
        (3, 768),
        (700, 64),
        (300, 512),
        (2, 7168),
        (40, 1536),
    ] {
        let Some(gpu) = gpu::open() else { return };
        let p = Problem::new(gpu, 9, [tokens, 2, width], [DType::BF16; 4], Layout::DENSE);
        p.check(
            Steps {
                residual: true,
                ..Steps::default()
            },
            DType::BF16,
        );
    }
}

/// NaN, infinities, zeros of both signs and subnormal numbers, in rows, weights and results.
#[test]
fn special_values() {
    for (width, dtype) in [
        (64, DType::F32),
        (64, DType::F16),
        (64, DType::BF16),
        (63, DType::F16),
        (63, DType::BF16),
    ] {
        let Some(gpu) = gpu::open() else { return };
        let mut p = Problem::new(
            gpu,
            3,
            [6, 4, width],
            [dtype, DType::F32, DType::F32, DType::F32],
            Layout::DENSE,
        );
        let special = [
            f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            0.0,
            -0.0,
            1e-40,
            -3e-8,
            6e-5,
            65520.0,
            3.4e38,
            1.5e-45,
            -65536.0,
        ];
        let values = (0..p.ys.values.len()).map(|i| {
            if i % 3 == 0 {
                special[i / 3 % special.len()]
            } else {
                p.ys.values[i]
            }
        });
        p.ys = Matrix::new(&p.gpu, &values.collect::<Vec<_>>(), width, dtype, p.layout);
        for (i, w) in p.weights.iter_mut().enumerate() {
            *w = special[i % special.len()];
        }
        p.device[0] = p.gpu.upload(&p.weights);
        for out in [DType::F32, DType::F16, DType::BF16] {
            p.check(Steps::default(), out);
            p.check(
                Steps {
                    without_weights: true,
                    ..Steps::default()
                },
                out,
            );
            p.check(
                Steps {
                    norm: true,
                    shared: 2,
                    ..Steps::default()
                },
                out,
            );
        }
    }
}

/// The residual may be the output itself.
#[test]
fn in_place_over_the_residual() {
    let Some(gpu) = gpu::open() else { return };
    let p = Problem::new(
        gpu,
        4,
        [5, 3, 264],
        [DType::F32, DType::F32, DType::F32, DType::BF16],
        Layout::DENSE,
    );
    let steps = Steps {
        residual: true,
        ..Steps::default()
    };
    let launch = plan_combine(
        &p.on_gpu(steps, p.residual.device),
        p.gpu.cuda.device_info(),
    )
    .unwrap();
    p.gpu.launch(&launch);
    let found = numbers(DType::BF16, &p.gpu.download(&p.residual.buffer));
    assert_eq!(found, p.expected(steps, DType::BF16));
}
