//! The layer on a GPU, or on the emulated driver (`scripts/candle-cuda.sh test`), against the CPU's.
//!
//! Tensors are made on the CPU and copied: the emulated driver has none of candle's own kernels.
#![cfg(feature = "cuda")]

mod both;
mod refusals;

use both::*;
use candle_core::{DType, Device, Result, Tensor};
use moe_kernels::cuda::moe::{CudaMoeLayer as Plain, SharedExpert, SharedJoin};
use moe_kernels::experts::PackedExperts;
use moe_kernels::moe::{self, Gate, SharedExperts};
use moe_kernels::routing::{Router, RouterConfig};
use moe_kernels::{AnyMatRef, MatRef};
use moe_kernels_candle::cuda::{CudaMoeLayer, CudaWorkspaces, Experts, SharedWeights, Weights};
use moe_kernels_candle::{Activation, Cpu, MoeLayer, experts, moe_kernels};

#[test]
fn f32_has_the_bits_of_the_cpu() {
    let Some(device) = open() else { return };
    for sizes in [ODD, EVEN] {
        let both = Both::new(&device, sizes, DType::F32);
        for tokens in [1, 7, 50] {
            let x = numbers((tokens, sizes.h), DType::F32, 4);
            let on_gpu = x.to_device(&device).unwrap();
            let y = both.gpu.forward(&on_gpu).unwrap();
            assert!(y.is_contiguous() && y.device().is_cuda());
            let expected = bits(&both.cpu.forward(&x).unwrap());
            assert!(expected.iter().any(|&v| v != 0));
            assert_eq!((y.dims(), bits(&y)), (x.dims(), expected), "{sizes:?}");

            // Logits in each format, which the CPU reads alike.
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let logits = numbers((tokens, sizes.e), dtype, 5);
                let on_device = logits.to_device(&device).unwrap();
                let y = both.gpu.forward_logits(&on_gpu, &on_device).unwrap();
                let expected = both.cpu.forward_logits(&x, &logits).unwrap();
                assert_eq!(bits(&y), bits(&expected));
            }
            let (ids, weights) = both.routing(&x);
            let weights = (weights * 1.5).unwrap();
            let expected = both.cpu.forward_routed(&x, &ids, &weights).unwrap();
            let weights = weights.to_device(&device).unwrap();
            for ids in [&ids, &ids.to_dtype(DType::I32).unwrap()] {
                let ids = ids.to_device(&device).unwrap();
                let y = both.gpu.forward_routed(&on_gpu, &ids, &weights).unwrap();
                assert_eq!(bits(&y), bits(&expected));
            }
        }
    }
}

#[test]
fn sixteen_bits_have_the_ids_of_the_cpu_and_agree() {
    let Some(device) = open() else { return };
    for (dtype, ulp) in [(DType::BF16, 2f32.powi(-7)), (DType::F16, 2f32.powi(-10))] {
        for sizes in [ODD, EVEN] {
            let both = Both::new(&device, sizes, dtype);
            // Few rows and many take different kernels.
            for tokens in [1, 5, 90] {
                let x = numbers((tokens, sizes.h), dtype, 6);
                let on_gpu = x.to_device(&device).unwrap();
                let y = both.gpu.forward(&on_gpu).unwrap();
                assert_eq!(y.dtype(), dtype);
                let (found, expected) = (values(&y), values(&both.cpu.forward(&x).unwrap()));
                let bound = both.bound(&x, &expected, ulp);
                for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    let difference = (found - expected).abs();
                    assert!(
                        difference <= bound[at],
                        "{sizes:?} {dtype:?} T = {tokens}, element {at}: {found} for {expected}, bound {}",
                        bound[at]
                    );
                }
                // The CPU's ids and weights give the same bits: they are the GPU's own.
                let (ids, weights) = both.routing(&x);
                let ids = ids.to_device(&device).unwrap();
                let weights = weights.to_device(&device).unwrap();
                let routed = both.gpu.forward_routed(&on_gpu, &ids, &weights).unwrap();
                assert_eq!(bits(&routed), bits(&y));
                // And the same twice.
                assert_eq!(bits(&both.gpu.forward(&on_gpu).unwrap()), bits(&y));
            }
        }
    }
}

#[test]
fn leading_dimensions_slices_and_outputs_that_exist() {
    let Some(device) = open() else { return };
    let h = ODD.h;
    for dtype in [DType::F32, DType::BF16] {
        let both = Both::new(&device, ODD, dtype);
        let x = numbers((12, h), dtype, 7).to_device(&device).unwrap();
        let y = both.gpu.forward(&x).unwrap();
        for shape in [vec![3, 4, h], vec![2, 3, 2, h], vec![1, 12, h]] {
            let z = both
                .gpu
                .forward(&x.reshape(shape.clone()).unwrap())
                .unwrap();
            assert_eq!((z.dims(), bits(&z)), (shape.as_slice(), bits(&y)));
        }
        assert_eq!(
            both.gpu
                .forward(&x.narrow(0, 3, 0).unwrap())
                .unwrap()
                .dims(),
            [0, h]
        );
        let one = both.gpu.forward(&x.get(7).unwrap()).unwrap();
        assert_eq!(one.dims(), [h]);
        assert_eq!(bits(&x.apply(&both.gpu).unwrap()), bits(&y));

        // Columns of a wider matrix, from its third row on.
        let wide = numbers((4, 3, 3 * h), dtype, 8);
        let part = |t: &Tensor| t.narrow(2, h, h).unwrap().narrow(0, 1, 3).unwrap();
        let expected = part(&wide)
            .contiguous()
            .unwrap()
            .to_device(&device)
            .unwrap();
        let expected = bits(&both.gpu.forward(&expected).unwrap());
        let x = part(&wide.to_device(&device).unwrap());
        assert!(!x.is_contiguous());
        assert_eq!(bits(&both.gpu.forward(&x).unwrap()), expected);

        // Into a slice of a wider tensor: what lies between the rows stays.
        let host = Tensor::full(7f32, (4, 3, 2 * h), &Device::Cpu).unwrap();
        let wide = host.to_dtype(dtype).unwrap().to_device(&device).unwrap();
        let y = wide.narrow(2, 0, h).unwrap().narrow(0, 1, 3).unwrap();
        both.gpu.forward_into(&x, &y).unwrap();
        assert_eq!(bits(&y), expected);
        let rest = [wide.narrow(2, h, h).unwrap(), wide.get(0).unwrap()];
        for rest in rest {
            assert!(values(&rest).iter().all(|&v| v == 7.0));
        }
    }
    // Another format than x's.
    let both = Both::new(&device, EVEN, DType::BF16);
    let x = numbers((5, EVEN.h), DType::BF16, 9)
        .to_device(&device)
        .unwrap();
    let y = Tensor::zeros((5, EVEN.h), DType::F32, &device).unwrap();
    both.gpu.forward_into(&x, &y).unwrap();
    let y = y.to_device(&Device::Cpu).unwrap().to_dtype(DType::BF16);
    assert_eq!(bits(&y.unwrap()), bits(&both.gpu.forward(&x).unwrap()));
}

#[test]
fn weights_are_used_where_they_are() {
    let Some(device) = open() else { return };
    let Sizes { e, k, h, i } = ODD;
    let both = Both::new(&device, ODD, DType::BF16);
    let [gate, gate_up, down] = &both.weights;
    let gate = gate.to_device(&device).unwrap();
    let x = numbers((9, h), DType::BF16, 10).to_device(&device).unwrap();
    let expected = bits(&both.gpu.forward(&x).unwrap());
    let answer = |experts: Result<Experts>| {
        let router = RouterConfig::mixtral(e, k);
        let layer = CudaMoeLayer::new(router, &gate, experts.unwrap(), Activation::SWIGLU);
        bits(&layer.unwrap().forward(&x).unwrap())
    };
    // All layers of a model in one tensor, of which this is the second, its rows wider than they need be.
    let padded = |t: &Tensor| {
        let (e, n, k) = t.dims3().unwrap();
        let rest = numbers((e, n, 6), DType::BF16, 11);
        let wide = Tensor::cat(&[t, &rest], 2).unwrap();
        let all = Tensor::stack(&[&wide.zeros_like().unwrap(), &wide], 0).unwrap();
        let all = all.to_device(&device).unwrap();
        all.get(1).unwrap().narrow(2, 0, k).unwrap()
    };
    let (both_up, on_down) = (padded(gate_up), padded(down));
    assert!(!both_up.is_contiguous());
    assert_eq!(answer(Experts::fused(&both_up, &on_down)), expected);
    let (g, u) = (both_up.narrow(1, 0, i), both_up.narrow(1, i, i));
    let separate = Experts::separate(&g.unwrap(), &u.unwrap(), &on_down);
    assert_eq!(answer(separate), expected);
    let (g, u) = (gate_up.narrow(1, 0, i), gate_up.narrow(1, i, i));
    let alternating = Tensor::stack(&[&g.unwrap(), &u.unwrap()], 2).unwrap();
    let alternating = alternating.reshape((e, 2 * i, h)).unwrap();
    let alternating = alternating.to_device(&device).unwrap();
    let interleaved = Experts::interleaved(&alternating, &on_down);
    assert_eq!(answer(interleaved), expected);
}

#[test]
fn a_shared_expert_and_a_correction_bias() {
    let Some(device) = open() else { return };
    let Sizes { e, k, h, i } = EVEN;
    let both = Both::new(&device, EVEN, DType::F32);
    let shared_up = numbers((2 * 24, h), DType::F32, 20);
    let shared_down = numbers((h, 24), DType::F32, 21);
    let shared_gate = numbers((1, h), DType::F32, 22);
    let bias = values(&numbers((e,), DType::F32, 23));
    let config = RouterConfig::mixtral(e, k);

    // The CPU's, by the kernels' own interface.
    let cpu = Cpu::new();
    let [gate, gate_up, down] = &both.weights;
    let pack = |up: &Tensor, down: &Tensor| -> PackedExperts {
        experts::fused(&cpu, up, down, Activation::SWIGLU).unwrap()
    };
    let one = |t: &Tensor| t.unsqueeze(0).unwrap();
    let (gate_values, shared_values) = (values(gate), values(&shared_gate));
    let view =
        |v: &'static [f32], rows| -> AnyMatRef<'static> { MatRef::new(v, rows, h).unwrap().into() };
    let leak = |v: Vec<f32>| -> &'static [f32] { v.leak() };
    let shared = SharedExperts::with_sigmoid_gate(
        &cpu,
        pack(&one(&shared_up), &one(&shared_down)),
        view(leak(shared_values), 1),
    );
    let router = Router::new(config.clone()).unwrap();
    let router = router.with_correction_bias(&bias).unwrap();
    let layer = moe::MoeLayer::new(router, pack(gate_up, down))
        .unwrap()
        .with_gate(Gate::new(&cpu, view(leak(gate_values), e), None).unwrap())
        .unwrap()
        .with_shared(shared.unwrap())
        .unwrap();
    let on_cpu = MoeLayer::from_layer(cpu, layer);

    // The GPU's.
    let on = |t: &Tensor| t.to_device(&device).unwrap();
    let weights = Weights {
        gate: Some(on(gate)),
        shared: Some(SharedWeights {
            experts: Experts::fused(&on(&shared_up), &on(&shared_down)).unwrap(),
            gate: Some(on(&shared_gate)),
        }),
        correction_bias: Some(Tensor::from_vec(bias, (e,), &device).unwrap()),
        ..Weights::new(Experts::fused(&on(gate_up), &on(down)).unwrap())
    };
    let plain = Plain::new(config, h, i, Activation::SWIGLU, moe_kernels::DType::F32).unwrap();
    let shared = SharedExpert {
        count: 1,
        intermediate: 24,
        activation: Activation::SWIGLU,
        join: SharedJoin::SigmoidGate,
    };
    let plain = plain.with_shared(shared).unwrap();
    let on_gpu = CudaMoeLayer::from_layer(plain.clone(), weights.clone()).unwrap();
    let x = numbers((11, h), DType::F32, 24);
    let expected = bits(&on_cpu.forward(&x).unwrap());
    assert_eq!(bits(&on_gpu.forward(&on(&x)).unwrap()), expected);
    // Each of the two changes the answer.
    assert_ne!(bits(&both.gpu.forward(&on(&x)).unwrap()), expected);
    let unbiased = Weights {
        correction_bias: None,
        ..weights.clone()
    };
    let other = CudaMoeLayer::from_layer(plain.clone(), unbiased).unwrap();
    assert_ne!(bits(&other.forward(&on(&x)).unwrap()), expected);

    let without = |change: fn(&mut Weights)| {
        let mut weights = weights.clone();
        change(&mut weights);
        refusal(CudaMoeLayer::from_layer(plain.clone(), weights))
    };
    assert!(without(|w| w.shared = None).contains("shared: expected weights when"));
    let text = without(|w| w.shared.as_mut().unwrap().gate = None);
    assert!(text.contains("shared.gate: "), "{text}");
    let text = without(|w| w.correction_bias = w.gate.clone());
    assert!(
        text.contains("correction_bias: expected shape [4]"),
        "{text}"
    );
}

#[test]
fn workspaces_are_kept_and_streams_have_their_own() {
    let Some(device) = open() else { return };
    let workspaces = CudaWorkspaces::new();
    let both = Both::new(&device, EVEN, DType::F32);
    let layer = both.gpu.with_workspaces(workspaces.clone()).unwrap();
    let host = numbers((40, EVEN.h), DType::F32, 15);
    let x = host.to_device(&device).unwrap();
    let expected = bits(&layer.forward(&x).unwrap());
    let idle = workspaces.idle_bytes();
    assert!(idle > 0);
    // Smaller calls need no more; the same one none at all.
    layer.forward(&x.narrow(0, 0, 3).unwrap()).unwrap();
    assert_eq!(bits(&layer.forward(&x).unwrap()), expected);
    assert_eq!(workspaces.idle_bytes(), idle);

    // A stream of its own, which threads share. Its weights came by another stream; they are there, since results have been read.
    let other = Device::new_cuda_with_stream(0).unwrap();
    let x = host.to_device(&other).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..5 {
                    assert_eq!(bits(&layer.forward(&x).unwrap()), expected);
                }
            });
        }
    });
    let after = workspaces.idle_bytes();
    assert!(after >= 2 * idle && after <= 4 * idle, "{after} of {idle}");
    workspaces.clear();
    assert_eq!(workspaces.idle_bytes(), 0);
    assert_eq!(bits(&layer.forward(&x).unwrap()), expected);
}
