//! The whole layer on the GPU (or the emulator) against the CPU's: equal ids and weights always, equal bits where f32 is exact, a derived tolerance on tensor cores, equal bits in any
//! batch and with experts in allocations of their own, and a graph that is captured once and replayed with other data.
#![cfg(feature = "cuda")]

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/gpu.rs"]
mod gpu;
#[path = "../common/near.rs"]
mod near;

mod bounds;
mod case;
mod on_cpu;
mod on_gpu;

use bounds::*;
use case::*;
use common::{Rng, assert_same_bits, product::Stored};
use cudarc::driver::{CudaSlice, CudaStream};
use gpu::{Buffer, Gpu};
use moe_kernels::cuda::combine::DeviceRows;
use moe_kernels::cuda::moe::*;
use moe_kernels::cuda::{
    DeviceMat, DeviceMatMut, DevicePtr, DeviceVec, DeviceVecMut, Module, TensorTable,
};
use moe_kernels::experts::{ExpertWeights, PackedExperts};
use moe_kernels::grouped_gemm::{Activation, ActivationFunction};
use moe_kernels::moe::{Forward, Gate, MoeLayer, SharedCombine, SharedExperts};
use moe_kernels::norm::RmsNorm;
use moe_kernels::routing::{NullExperts, Router, RouterConfig, Routing};
use moe_kernels::{AnyMatRef, Cpu, DType, Error, MatMut, MatRef};
use near::Near;
use on_cpu::*;
use on_gpu::*;

/// Runs a case on both sides, with experts in one allocation or apart; ids and weights must be the same. The GPU's y, the CPU's answer, and every element in f64 with
/// the error that it may have.
fn both(
    gpu: &Gpu,
    case: &Case,
    dtype: DType,
    tokens: usize,
    apart: bool,
) -> (Vec<f32>, Answer, Vec<Near>) {
    let w = Weights::new(case, dtype);
    let mut rng = Rng(tokens as u64 + 1);
    let x = rounded(dtype, rng.normals(tokens * case.hidden));
    let residual = rng.normals(tokens * case.hidden);
    let mut on = OnGpu::new(gpu, case, &w, cuda_layer(case, dtype));
    on.apart = apart.then(|| Apart::new(gpu, case, &w));
    let found = on.answer(&x, &residual);
    let expected = on_cpu(case, &w, &Stored::new(dtype, &x), tokens, &residual);
    let what = format!("{} {dtype} T = {tokens}", case.name);
    assert_eq!(found.ids, expected.ids, "{what}: ids");
    assert_same_bits(
        &found.weights,
        &expected.weights,
        &format!("{what}: weights"),
    );
    let near = near(case, &w, &x, &residual, &expected);
    (found.y, expected, near)
}

#[test]
fn f32_layers_have_the_cpus_bits() {
    let Some(gpu) = gpu::open() else { return };
    for case in cases() {
        for (tokens, apart) in [(0, false), (1, false), (3, true), (18, false), (18, true)] {
            let (found, expected, near) = both(&gpu, &case, DType::F32, tokens, apart);
            let what = format!("{} T = {tokens}, apart: {apart}", case.name);
            assert_same_bits(&found, &expected.y, &what);
            check_near(&found, &near, &what);
        }
    }
}

/// Sums in another order than the CPU's, and h rounded to 16 bits on both sides: both sides are near the same layer in f64, each within the bound that follows
/// from its roundings.
#[test]
fn layers_in_16_bits_are_near_the_same_in_f64() {
    let Some(gpu) = gpu::open() else { return };
    for case in cases() {
        for dtype in [DType::BF16, DType::F16] {
            for (tokens, apart) in [(1, false), (5, false), (33, false), (33, true)] {
                let (found, expected, near) = both(&gpu, &case, dtype, tokens, apart);
                let what = format!("{} {dtype} T = {tokens}, apart: {apart}", case.name);
                check_near(&found, &near, &format!("{what}, the GPU"));
                check_near(&expected.y, &near, &format!("{what}, the CPU"));
            }
        }
    }
}

/// Few rows, so that both ways take the same kernels on a Hopper, too.
#[test]
fn experts_apart_have_the_bits_of_experts_in_one_allocation() {
    let Some(gpu) = gpu::open() else { return };
    for case in cases() {
        for dtype in DType::ALL {
            let [together, apart] = [false, true].map(|apart| both(&gpu, &case, dtype, 3, apart).0);
            assert_same_bits(&apart, &together, &format!("{} {dtype}", case.name));
        }
    }
}

#[test]
fn a_token_has_the_same_bits_alone_and_in_any_batch_in_strict_mode() {
    let Some(gpu) = gpu::open() else { return };
    for case in cases().into_iter().take(4) {
        for dtype in DType::ALL {
            let w = Weights::new(&case, dtype);
            let mut rng = Rng(9);
            let x = rounded(dtype, rng.normals(70 * case.hidden));
            let residual = rng.normals(70 * case.hidden);
            let on = OnGpu::new(&gpu, &case, &w, cuda_layer(&case, dtype).with_strict());
            let all = on.run(&x, &residual);
            for tokens in [1usize, 2, 17] {
                let part = on.run(
                    &x[..tokens * case.hidden],
                    &residual[..tokens * case.hidden],
                );
                assert_same_bits(
                    &part,
                    &all[..part.len()],
                    &format!("{} {dtype} T = {tokens}", case.name),
                );
            }
            let last = on.run(&x[69 * case.hidden..], &residual[69 * case.hidden..]);
            assert_same_bits(
                &last,
                &all[69 * case.hidden..],
                &format!("{} {dtype} the last token", case.name),
            );
            assert_same_bits(
                &on.run(&x, &residual),
                &all,
                &format!("{} {dtype} again", case.name),
            );
        }
    }
}

#[test]
fn a_graph_is_captured_once_and_replayed_with_other_data() {
    let Some(gpu) = gpu::open() else { return };
    let (case, dtype) = (&cases()[1], DType::BF16);
    let w = Weights::new(case, dtype);
    let mut rng = Rng(77);
    let inputs: Vec<Vec<f32>> = (0..3)
        .map(|_| rounded(dtype, rng.normals(9 * case.hidden)))
        .collect();
    let residual = vec![0.0; 9 * case.hidden];
    let on = OnGpu::new(&gpu, case, &w, cuda_layer(case, dtype));
    // The first call loads the kernels, which a capture forbids.
    let expected: Vec<Vec<f32>> = inputs.iter().map(|x| on.run(x, &residual)).collect();
    assert_ne!(expected[0], expected[1]);
    let mut data = on.data(&inputs[0], &residual);
    let graph = gpu.capture(|| on.forward(&mut data).unwrap());
    let before = gpu.download(&data.y);
    assert!(
        before.iter().all(|v| v.is_nan()),
        "a capture must not run anything"
    );
    for (x, expected) in inputs
        .iter()
        .zip(&expected)
        .chain([(&inputs[0], &expected[0])])
    {
        gpu.write(&mut data.x, &bytes(dtype, x));
        let poison = vec![f32::NAN; data.y.len()];
        gpu.write(&mut data.y, &poison);
        graph.launch().unwrap();
        assert_same_bits(&gpu.download(&data.y), expected, "a replay");
    }
}
