//! What a layer on the GPU (or the emulator) may have besides experts: a latent space, norms, several shared experts, identity experts beside weights on the input,
//! noise of its own. All against the CPU's layer: ids and weights bit for bit in every format, y bit for bit where sums are exact, and within what roundings to 16
//! bits may do on tensor cores.
#![cfg(feature = "cuda")]

mod common;
#[path = "common/gpu.rs"]
mod gpu;
#[path = "common/gpu_steps.rs"]
mod steps;

use common::{Rng, assert_same_bits, product::rounded};
use gpu::Gpu;
use moe_kernels::cuda::DevicePtr;
use moe_kernels::cuda::grouped_gemm::Numerics;
use moe_kernels::cuda::moe::*;
use moe_kernels::grouped_gemm::{Activation, ActivationFunction};
use moe_kernels::routing::{NullExperts, RouterConfig};
use moe_kernels::{DType, Error};
use steps::{Case, OnGpu, Shared, Weights, on_cpu};

fn identity(mut config: RouterConfig, count: usize) -> RouterConfig {
    config.null_experts = NullExperts::Identity(count);
    config
}

fn latent(width: usize, norm: bool) -> Option<Latent> {
    Some(Latent { width, norm })
}

fn shared(count: usize, intermediate: usize, join: SharedJoin) -> Option<Shared> {
    Some(Shared {
        count,
        intermediate,
        join,
    })
}

fn cases() -> Vec<Case> {
    let base = Case::new;
    vec![
        Case {
            latent: latent(24, false),
            activation: Activation::plain(ActivationFunction::Relu2),
            shared: shared(1, 48, SharedJoin::Add),
            routed_scale: 2.5,
            ..base("nemotron_h", RouterConfig::deepseek_v3(16, 4, 4, 2, 1.0))
        },
        // The projection out writes y itself.
        Case {
            latent: latent(16, false),
            ..base("latent alone", RouterConfig::mixtral(6, 2))
        },
        Case {
            latent: latent(16, true),
            post_norm: Some(PostNorm::ScaleFirst),
            output_steps: true,
            ..base("muse_spark", RouterConfig::mixtral(8, 3))
        },
        Case {
            gate_norm: true,
            post_norm: Some(PostNorm::NormFirst),
            activation: Activation::gated(ActivationFunction::GeluTanh),
            ..base("gemma4", RouterConfig::gemma4(8, 2))
        },
        Case {
            shared: shared(2, 16, SharedJoin::RouterWeighted),
            ..base("inkling", RouterConfig::inkling(8, 3, 2, 8.0))
        },
        Case {
            shared: shared(1, 16, SharedJoin::RouterWeighted),
            ..base("one weighed", RouterConfig::inkling(5, 2, 1, 1.0))
        },
        // The router weighs experts whose weights nobody asks for.
        Case {
            shared: shared(3, 8, SharedJoin::Add),
            ..base("weighed in vain", RouterConfig::inkling(5, 2, 2, 1.0))
        },
        Case {
            shared: shared(2, 32, SharedJoin::Average),
            output_steps: true,
            ..base("cohere2_moe", RouterConfig::gpt_oss(6, 2))
        },
        Case {
            shared: shared(MAX_SHARED, 8, SharedJoin::SigmoidGate),
            ..base("many gated", RouterConfig::qwen2_moe(6, 2))
        },
        Case {
            weight_on_input: true,
            routed_scale: 0.7,
            ..base("on input", identity(RouterConfig::mixtral(5, 3), 3))
        },
        Case {
            weight_on_input: true,
            latent: latent(8, false),
            routed_scale: 0.7,
            shared: shared(2, 8, SharedJoin::Add),
            output_steps: true,
            ..base("all apart", identity(RouterConfig::mixtral(4, 3), 4))
        },
        Case {
            latent: latent(8, false),
            ..base("latent identity", identity(RouterConfig::mixtral(4, 3), 2))
        },
        Case {
            gate_norm: true,
            ..base("noisy", RouterConfig::noisy_top_k(8, 2, 1234))
        },
        // Experts of another layer have no rows, which no norm may touch, and identity experts are the first layer's.
        Case {
            local: Some(2..5),
            latent: latent(24, true),
            post_norm: Some(PostNorm::NormFirst),
            ..base("a part", identity(RouterConfig::mixtral(8, 4), 2))
        },
        // Multiples of nothing.
        Case {
            hidden: 67,
            intermediate: 37,
            latent: latent(19, true),
            gate_norm: true,
            post_norm: Some(PostNorm::NormFirst),
            shared: shared(3, 5, SharedJoin::SigmoidGate),
            output_steps: true,
            ..base("odd", identity(RouterConfig::mixtral(7, 3), 2))
        },
    ]
}

/// Runs a case on both sides; ids and weights are compared here.
fn both(
    gpu: &Gpu,
    case: &Case,
    dtype: DType,
    tokens: usize,
    adjust: impl FnOnce(CudaMoeLayer) -> CudaMoeLayer,
) -> (Vec<f32>, Vec<f32>) {
    let w = Weights::new(case, dtype);
    let mut rng = Rng(tokens as u64 + 5);
    let x = rounded(dtype, &rng.normals(tokens * case.hidden));
    let residual = rng.normals(tokens * case.hidden);
    let on = OnGpu::new(gpu, case, &w, adjust(steps::cuda_layer(case, dtype)));
    let found = on.run(&x, &residual);
    let expected = on_cpu(case, &w, dtype, &x, &residual);
    let what = format!("{} {dtype} T = {tokens}", case.name);
    assert_eq!(found.ids, expected.ids, "{what}: ids");
    assert_same_bits(
        &found.weights,
        &expected.weights,
        &format!("{what}: weights"),
    );
    (found.y, expected.y)
}

#[test]
fn f32_layers_have_the_cpus_bits() {
    let Some(gpu) = gpu::open() else { return };
    for case in cases() {
        for tokens in [0, 1, 3, 18] {
            let (found, expected) = both(&gpu, &case, DType::F32, tokens, |layer| layer);
            assert_same_bits(&found, &expected, &format!("{} T = {tokens}", case.name));
        }
    }
}

#[test]
fn exact_layers_have_the_cpus_bits_in_16_bits() {
    let Some(gpu) = gpu::open() else { return };
    for case in cases() {
        for dtype in [DType::BF16, DType::F16] {
            for tokens in [1, 7] {
                let exact = |layer: CudaMoeLayer| layer.with_numerics(Numerics::Exact);
                let (found, expected) = both(&gpu, &case, dtype, tokens, exact);
                let what = format!("{} {dtype} T = {tokens}", case.name);
                assert_same_bits(&found, &expected, &what);
            }
        }
    }
}

/// Beside h, which both sides round, the GPU rounds a latent z and a latent sum to 16 bits. A rounding to nearest moves a number by at most eps / 2 of its size: a root
/// mean square of eps / √12. Weights of variance 1 / fan-in and norms hand noise on at its relative size; a gated activation, the product of two numbers that
/// both have it, at most doubles it. So z and h count twice, the sum once: √(4 + 4 + 1) · eps / √12 = 0.87 · eps of what y is made of, of which the largest |y| of 40
/// or more is twice the root mean square: eps / 2 of the largest. Without a latent space z and h are equal but for an h whose sum, taken in another order, falls on
/// the other side of a tie: half of that is more than enough. A single element may have four times as much.
#[test]
fn layers_in_16_bits_are_the_cpus_but_for_roundings() {
    let Some(gpu) = gpu::open() else { return };
    for case in cases() {
        for dtype in [DType::BF16, DType::F16] {
            let eps = if dtype == DType::BF16 {
                1.0 / 256.0
            } else {
                1.0 / 2048.0
            };
            for tokens in [1, 5, 33] {
                let (found, expected) = both(&gpu, &case, dtype, tokens, |layer| layer);
                let scale = expected.iter().map(|v| v.abs()).fold(1.0f32, f32::max);
                let part = if case.latent.is_some() { 2.0 } else { 4.0 };
                let allowed = eps * scale / part;
                let what = format!("{} {dtype} T = {tokens}", case.name);
                let mut squares = 0.0f64;
                for (n, (f, e)) in found.iter().zip(&expected).enumerate() {
                    let difference = (f - e).abs();
                    assert!(
                        difference <= 4.0 * allowed,
                        "{what}: element {n} is {f}, the CPU's {e}, scale {scale}"
                    );
                    squares += f64::from(difference * difference);
                }
                let rms = (squares / found.len() as f64).sqrt();
                assert!(
                    rms <= f64::from(allowed),
                    "{what}: rms {rms:e}, scale {scale}"
                );
            }
        }
    }
}

#[test]
fn a_token_has_the_same_bits_alone_and_in_any_batch_in_strict_mode() {
    let Some(gpu) = gpu::open() else { return };
    let names = ["nemotron_h", "muse_spark", "cohere2_moe", "noisy", "odd"];
    for case in cases().into_iter().filter(|c| names.contains(&c.name)) {
        for dtype in [DType::BF16, DType::F16] {
            let w = Weights::new(&case, dtype);
            let mut rng = Rng(9);
            let x = rounded(dtype, &rng.normals(40 * case.hidden));
            let residual = rng.normals(40 * case.hidden);
            let layer = steps::cuda_layer(&case, dtype).with_strict();
            let on = OnGpu::new(&gpu, &case, &w, layer);
            let all = on.run(&x, &residual).y;
            for tokens in [1usize, 17] {
                let n = tokens * case.hidden;
                let part = on.run(&x[..n], &residual[..n]).y;
                let what = format!("{} {dtype} T = {tokens}", case.name);
                assert_same_bits(&part, &all[..n], &what);
            }
        }
    }
}

/// Nothing of the new stages allocates or waits, which a capture would refuse.
#[test]
fn a_graph_of_all_stages_is_replayed_with_other_data() {
    let Some(gpu) = gpu::open() else { return };
    let mut everything = cases().pop().unwrap();
    everything.config = identity(RouterConfig::noisy_top_k(7, 3, 5), 0);
    let dtype = DType::BF16;
    for case in [everything, cases().swap_remove(4)] {
        let w = Weights::new(&case, dtype);
        let mut rng = Rng(77);
        let n = 9 * case.hidden;
        let inputs: Vec<Vec<f32>> = (0..3).map(|_| rounded(dtype, &rng.normals(n))).collect();
        let residual = rng.normals(n);
        let on = OnGpu::new(&gpu, &case, &w, steps::cuda_layer(&case, dtype));
        // The first call loads the kernels, which a capture forbids.
        let expected: Vec<_> = inputs.iter().map(|x| on.run(x, &residual).y).collect();
        assert_ne!(expected[0], expected[1]);
        let mut data = on.data(&inputs[0], &residual);
        let graph = gpu.capture(|| on.forward(&mut data).unwrap());
        let before = gpu.download(&data.y);
        assert!(before.iter().all(|v| v.is_nan()), "a capture runs nothing");
        for (x, expected) in inputs.iter().zip(&expected) {
            gpu.write(&mut data.x, &common::product::bytes(dtype, x));
            gpu.write(&mut data.y, &vec![f32::NAN; n]);
            graph.launch().unwrap();
            assert_same_bits(&gpu.download(&data.y), expected, "a replay");
        }
    }
}

#[test]
fn what_a_layer_wants_and_only_that_has_to_come() {
    let Some(gpu) = gpu::open() else { return };
    let case = |name: &str| cases().into_iter().find(|c| c.name == name).unwrap();
    let all = Case {
        gate_norm: true,
        config: RouterConfig::noisy_top_k(4, 2, 1),
        ..case("muse_spark")
    };
    let plain = Case::new("plain", RouterConfig::mixtral(4, 2));
    let refused = |case: &Case, change: &dyn Fn(&mut MoePointers)| {
        let w = Weights::new(case, DType::F32);
        let on = OnGpu::new(&gpu, case, &w, steps::cuda_layer(case, DType::F32));
        let data = on.data(&vec![0.0; case.hidden], &vec![0.0; case.hidden]);
        let mut pointers = on.pointers(&data);
        let plan = |p: &MoePointers| on.layer.plan(1, p, gpu.cuda.device_info());
        plan(&pointers).unwrap();
        change(&mut pointers);
        match plan(&pointers).unwrap_err() {
            Error::Value { argument, .. } => argument,
            other => panic!("{other}"),
        }
    };
    let w = Weights::new(&all, DType::F32);
    let on = OnGpu::new(&gpu, &all, &w, steps::cuda_layer(&all, DType::F32));
    let data = on.data(&vec![0.0; all.hidden], &vec![0.0; all.hidden]);
    let some = on.pointers(&data);
    assert_eq!(refused(&all, &|p| p.gate_norm = None), "gate_norm");
    assert_eq!(refused(&all, &|p| p.gate_noise = None), "noise_logits");
    assert_eq!(
        refused(&all, &|p| p.noise_logits = p.gate_noise),
        "gate_noise"
    );
    assert_eq!(refused(&all, &|p| p.latent = None), "latent");
    let norm_gone =
        |p: &mut MoePointers| p.latent = p.latent.map(|l| LatentPointers { norm: None, ..l });
    assert_eq!(refused(&all, &norm_gone), "latent.norm");
    assert_eq!(refused(&all, &|p| p.post_norm = None), "post_norm");
    assert_eq!(
        refused(&plain, &|p| p.gate_norm = some.gate_norm),
        "gate_norm"
    );
    assert_eq!(
        refused(&plain, &|p| p.gate_noise = some.gate_noise),
        "gate_noise"
    );
    assert_eq!(refused(&plain, &|p| p.latent = some.latent), "latent");
    assert_eq!(
        refused(&plain, &|p| p.post_norm = some.post_norm),
        "post_norm"
    );
    let given = RoutingPointers::Given {
        ids: some.workspace,
        weights: some.workspace,
    };
    assert_eq!(refused(&all, &|p| p.routing = given), "gate_norm");
    assert_eq!(refused(&case("inkling"), &|p| p.routing = given), "routing");
    let nowhere = |p: &mut MoePointers| {
        let norm = p.gate_norm.as_mut().unwrap();
        norm.weight = DevicePtr::NULL;
    };
    assert_eq!(refused(&all, &nowhere), "norm");
}

#[test]
fn layers_that_cannot_be_are_refused() {
    let layer = |config| CudaMoeLayer::new(config, 8, 8, Activation::SWIGLU, DType::F32).unwrap();
    let argument = |r: Result<CudaMoeLayer, Error>| match r.unwrap_err() {
        Error::Value { argument, .. } => argument,
        other => panic!("{other}"),
    };
    let shared = |count, join| SharedExpert {
        count,
        ..SharedExpert::new(8, Activation::SWIGLU, join)
    };
    let plain = || layer(RouterConfig::mixtral(4, 2));
    let joint = || layer(RouterConfig::inkling(4, 2, 2, 1.0));
    let latent = |width| plain().with_latent(Latent { width, norm: false });
    assert_eq!(argument(latent(0)), "latent.width");
    assert_eq!(argument(latent(1 << 31)), "latent.width");
    for count in [0, MAX_SHARED + 1] {
        let refused = plain().with_shared(shared(count, SharedJoin::Add));
        assert_eq!(argument(refused), "shared.count");
    }
    for (layer, count) in [(plain(), 1), (joint(), 1), (joint(), 3)] {
        let refused = layer.with_shared(shared(count, SharedJoin::RouterWeighted));
        assert_eq!(argument(refused), "shared.count");
    }
    joint()
        .with_shared(shared(2, SharedJoin::RouterWeighted))
        .unwrap();
}
