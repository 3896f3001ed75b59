//! The layer on a GPU, or on the emulated driver (`scripts/candle-cuda.sh test`), against the CPU's.
//!
//! Tensors are made on the CPU and copied: the emulated driver has none of candle's own kernels.
#![cfg(feature = "cuda")]

use candle_core::{DType, Device, Result, Tensor};
use moe_kernels::cuda::moe::{CudaMoeLayer as Plain, SharedExpert, SharedJoin};
use moe_kernels::experts::PackedExperts;
use moe_kernels::moe::{self, Gate, SharedExperts};
use moe_kernels::routing::{Router, RouterConfig, Routing};
use moe_kernels::{AnyMatRef, MatMut, MatRef};
use moe_kernels_candle::cuda::{CudaMoeLayer, CudaWorkspaces, Experts, SharedWeights, Weights};
use moe_kernels_candle::{Activation, Cpu, MoeLayer, experts, moe_kernels};

/// A layer's sizes: E, K, H, I.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    e: usize,
    k: usize,
    h: usize,
    i: usize,
}

/// Multiples of nothing: no load is a vector's.
const ODD: Sizes = Sizes {
    e: 6,
    k: 2,
    h: 34,
    i: 19,
};
/// What the tiles of tensor cores and Hopper's tensor maps take.
const EVEN: Sizes = Sizes {
    e: 4,
    k: 2,
    h: 64,
    i: 32,
};

/// The GPU, or `None` after saying so where there is none. With `cuda` in `MOE_KERNELS_REQUIRE` a missing GPU fails the test instead; one that is there but does not
/// work always does.
fn open() -> Option<Device> {
    match moe_kernels::cuda::Cuda::new(0) {
        Ok(_) => Some(Device::new_cuda(0).unwrap()),
        Err(why @ moe_kernels::Error::CudaUnavailable { .. }) => {
            let required = std::env::var("MOE_KERNELS_REQUIRE").unwrap_or_default();
            assert!(
                !required.split(',').any(|word| word.trim() == "cuda"),
                "cuda is required: {why}"
            );
            eprintln!("NOT RUN: no CUDA device ({why})");
            None
        }
        Err(why) => panic!("{why}"),
    }
}

/// Numbers that no symmetry can hide behind, on the CPU.
fn numbers<S: Into<candle_core::Shape>>(shape: S, dtype: DType, seed: u32) -> Tensor {
    let shape = shape.into();
    let data: Vec<f32> = (0..shape.elem_count() as u32)
        .map(|i| ((i + seed).wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0)
        .collect();
    let data = Tensor::from_vec(data, shape, &Device::Cpu).unwrap();
    data.to_dtype(dtype).unwrap()
}

fn values(t: &Tensor) -> Vec<f32> {
    let t = t.to_device(&Device::Cpu).unwrap();
    let t = t.flatten_all().unwrap().to_dtype(DType::F32).unwrap();
    t.to_vec1().unwrap()
}

fn bits(t: &Tensor) -> Vec<u32> {
    values(t).iter().map(|v| v.to_bits()).collect()
}

/// The error's text, without a backtrace.
fn refusal<T: std::fmt::Debug>(result: Result<T>) -> String {
    result.unwrap_err().to_string()
}

/// One layer twice.
struct Both {
    sizes: Sizes,
    /// `gate [E, H]`, `gate_up [E, 2I, H]`, `down [E, H, I]` on the CPU.
    weights: [Tensor; 3],
    cpu: MoeLayer,
    gpu: CudaMoeLayer,
}

impl Both {
    fn new(device: &Device, sizes: Sizes, dtype: DType) -> Self {
        let Sizes { e, k, h, i } = sizes;
        let gate = numbers((e, h), DType::F32, 1);
        let gate_up = numbers((e, 2 * i, h), dtype, 2);
        let down = numbers((e, h, i), dtype, 3);
        let (cpu, router) = (Cpu::new(), RouterConfig::mixtral(e, k));
        let packed = experts::fused(&cpu, &gate_up, &down, Activation::SWIGLU).unwrap();
        let on = |t: &Tensor| t.to_device(device).unwrap();
        let experts = Experts::fused(&on(&gate_up), &on(&down)).unwrap();
        Self {
            sizes,
            cpu: MoeLayer::new(cpu, router.clone(), &gate, packed).unwrap(),
            gpu: CudaMoeLayer::new(router, &on(&gate), experts, Activation::SWIGLU).unwrap(),
            weights: [gate, gate_up, down],
        }
    }

    /// The CPU's ids and weights `[T, K]` for x.
    fn routing(&self, x: &Tensor) -> (Tensor, Tensor) {
        let (tokens, h) = x.dims2().unwrap();
        let (x, mut y) = (values(x), vec![0.0; tokens * h]);
        let (cpu, layer) = (self.cpu.cpu(), self.cpu.layer());
        let mut routing = Routing::new();
        let mut workspace = vec![0; layer.workspace_size(&cpu, tokens).unwrap()];
        let out = MatMut::new(&mut y, tokens, h).unwrap().into();
        let x = MatRef::new(&x, tokens, h).unwrap().into();
        layer
            .forward(&cpu, x, out, &mut routing, &mut workspace)
            .unwrap();
        let shape = (tokens, self.sizes.k);
        let ids: Vec<u32> = routing.ids().iter().map(|&id| id as u32).collect();
        (
            Tensor::from_vec(ids, shape, &Device::Cpu).unwrap(),
            Tensor::from_slice(routing.weights(), shape, &Device::Cpu).unwrap(),
        )
    }

    /// How far y may be from the CPU's in a 16-bit format: an `ulp` of each h and of y, since sums in another order may round the other way.
    fn bound(&self, x: &Tensor, y: &[f32], ulp: f32) -> Vec<f32> {
        let Sizes { k, h, i, .. } = self.sizes;
        let [_, gate_up, down] = self.weights.each_ref().map(values);
        let (ids, weights) = self.routing(x);
        let (ids, weights) = (ids.flatten_all().unwrap(), values(&weights));
        let (ids, x) = (ids.to_vec1::<u32>().unwrap(), values(x));
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let mut bound: Vec<f32> = y.iter().map(|y| ulp * y.abs() + 1e-6).collect();
        for (pair, (&id, weight)) in ids.iter().zip(weights).enumerate() {
            let (token, id) = (pair / k, id as usize);
            let x = &x[token * h..][..h];
            let row = |r: usize| dot(&gate_up[(id * 2 * i + r) * h..][..h], x);
            let hidden: Vec<f32> = (0..i)
                .map(|r| (row(r) / (1.0 + (-row(r)).exp()) * row(i + r)).abs())
                .collect();
            for c in 0..h {
                let down = down[(id * h + c) * i..][..i].iter();
                let size: f32 = down.zip(&hidden).map(|(d, h)| d.abs() * h).sum();
                bound[token * h + c] += ulp * weight * size;
            }
        }
        bound
    }
}

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

/// The calls' tensors on other devices, of other formats, shapes and strides.
#[test]
fn bad_tensors_are_refused_by_name() {
    let Some(device) = open() else { return };
    let Sizes { e, k, h, .. } = ODD;
    let both = Both::new(&device, ODD, DType::F32);
    let layer = &both.gpu;
    let on = |t: Tensor| t.to_device(&device).unwrap();
    let host = numbers((6, h), DType::F32, 30);
    let x = on(host.clone());
    let (ids, weights) = both.routing(&host);
    let (on_ids, on_weights) = (on(ids.clone()), on(weights.clone()));
    let logits = numbers((6, e), DType::F32, 31);
    let y = Tensor::zeros((6, h), DType::F32, &device).unwrap();
    let there =
        "expected a tensor on Cuda { gpu_id: 0 }, where the layer's weights are, got one on Cpu";
    let other_order = numbers((3, 4, h), DType::F32, 32)
        .to_device(&device)
        .unwrap();
    let bf16 = on(numbers((6, h), DType::BF16, 33));
    for (result, expected) in [
        (layer.forward(&host), format!("x: {there}")),
        (layer.forward_logits(&x, &logits), format!("logits: {there}")),
        (layer.forward_routed(&x, &ids, &on_weights), format!("ids: {there}")),
        (layer.forward_routed(&x, &on_ids, &weights), format!("weights: {there}")),
        (
            both.cpu.forward(&x),
            "x: expected a tensor on Cpu, where the layer's weights are, got one on Cuda { gpu_id: 0 }".into(),
        ),
        (layer.forward(&bf16), "x: expected f32, got bf16".into()),
        (
            layer.forward(&on(numbers((6, h), DType::F64, 0))),
            "x: expected f32, f16 or bf16, got F64".into(),
        ),
        (
            layer.forward(&on(numbers((6, h + 1), DType::F32, 0))),
            "x: expected shape [.., 34], got [6, 35]".into(),
        ),
        (
            layer.forward(&on(Tensor::new(1f32, &Device::Cpu).unwrap())),
            "x: expected a tensor [.., H]".into(),
        ),
        (
            layer.forward(&other_order.transpose(0, 1).unwrap()),
            "x: rows of shape [4, 3, 34]".into(),
        ),
        (
            layer.forward(&on(numbers((h, 6), DType::F32, 0)).t().unwrap()),
            "x: expected rows without gaps".into(),
        ),
        (
            layer.forward(&on(numbers((1, h), DType::F32, 0)).broadcast_as((6, h)).unwrap()),
            "x: expected rows that do not overlap".into(),
        ),
        (
            layer.forward_logits(&x, &on(numbers((5, e), DType::F32, 0))),
            "logits: expected 6 rows".into(),
        ),
        (
            layer.forward_logits(&x, &x),
            "logits: expected shape [.., 6]".into(),
        ),
        (
            layer.forward_routed(&x, &on_ids.narrow(0, 0, 5).unwrap(), &on_weights.narrow(0, 0, 5).unwrap()),
            "ids: expected 6 rows".into(),
        ),
        (layer.forward_routed(&x, &x, &on_weights), format!("ids: expected [.., {k}]")),
        (
            layer.forward_routed(&x, &on_ids, &x),
            format!("weights: expected shape [6, {k}], that of ids"),
        ),
        (
            layer.forward_routed(&x, &on(ids.to_dtype(DType::I64).unwrap()), &on_weights),
            "ids: expected u32 or i32 on a GPU, got I64".into(),
        ),
        (
            layer.forward_routed(&x, &on_ids, &on(weights.to_dtype(DType::BF16).unwrap())),
            "weights: expected f32, got BF16".into(),
        ),
        (
            layer.forward_routed(&x, &on(ids.t().unwrap().contiguous().unwrap()).t().unwrap(), &on_weights),
            "ids: expected a contiguous tensor".into(),
        ),
        (layer.forward_into(&x, &host).map(|()| x.clone()), format!("y: {there}")),
        (
            layer.forward_into(&x, &y.narrow(0, 0, 5).unwrap()).map(|()| x.clone()),
            "y: expected shape [6, 34], that of x".into(),
        ),
        (layer.forward_into(&x, &x).map(|()| x.clone()), "shares storage".into()),
    ] {
        let text = refusal(result);
        assert!(text.contains(&expected), "{text}, not {expected}");
    }
    // Nothing was written, and the layer still works.
    assert!(values(&y).iter().all(|&v| v == 0.0));
    assert_eq!(bits(&x), bits(&host));
    assert_eq!(
        bits(&layer.forward(&x).unwrap()),
        bits(&both.cpu.forward(&host).unwrap())
    );
}

#[test]
fn bad_weights_are_refused_by_name() {
    let Some(device) = open() else { return };
    let Sizes { e, k, h, i } = EVEN;
    let on = |t: &Tensor| t.to_device(&device).unwrap();
    let host = [
        numbers((e, 2 * i, h), DType::BF16, 1),
        numbers((e, h, i), DType::BF16, 2),
    ];
    let [gate_up, down] = host.each_ref().map(on);
    let f32_down = on(&numbers((e, h, i), DType::F32, 2));
    let turned = on(&numbers((e, h, 2 * i), DType::BF16, 3))
        .transpose(1, 2)
        .unwrap();
    for (result, expected) in [
        (
            Experts::fused(&host[0], &host[1]),
            "down: expected a tensor on a CUDA device, got one on Cpu",
        ),
        (
            Experts::fused(&host[0], &down),
            "gate_up: expected a tensor on Cuda { gpu_id: 0 }",
        ),
        (
            Experts::fused(&gate_up, &f32_down),
            "gate_up: expected F32, the format of down, got BF16",
        ),
        (
            Experts::fused(&gate_up, &down.narrow(0, 0, 3).unwrap()),
            "down: expected [4, 64, 32]",
        ),
        (
            Experts::fused(&gate_up.narrow(1, 0, 2 * i - 1).unwrap(), &down),
            "down: expected",
        ),
        (
            Experts::fused(&gate_up.flatten_all().unwrap(), &down),
            "gate_up: expected [E, N, K]",
        ),
        (
            Experts::fused(&turned, &down),
            "gate_up: expected in-features that are neighbours",
        ),
        (
            Experts::separate(&gate_up, &gate_up.narrow(1, 0, i).unwrap(), &down),
            "gate: expected shape",
        ),
        (
            Experts::plain(&on(&numbers((e, i, h), DType::U32, 0)), &down),
            "up: expected f32, f16 or bf16",
        ),
    ] {
        let text = refusal(result);
        assert!(text.contains(expected), "{text}, not {expected}");
    }

    let experts = Experts::fused(&gate_up, &down).unwrap();
    let gate = numbers((e, h), DType::F32, 4);
    let layer = |router, gate: &Tensor, activation| {
        CudaMoeLayer::new(router, gate, experts.clone(), activation)
    };
    let router = || RouterConfig::mixtral(e, k);
    let swiglu = Activation::SWIGLU;
    let narrow = on(&gate.narrow(1, 0, h - 1).unwrap());
    let plain = Activation::plain(moe_kernels::grouped_gemm::ActivationFunction::Relu);
    let mut noisy = router();
    noisy.noise_seed = Some(1);
    for (result, expected) in [
        (
            layer(router(), &gate, swiglu),
            "gate: expected a tensor on Cuda { gpu_id: 0 }",
        ),
        (
            layer(router(), &narrow, swiglu),
            "gate: expected shape [4, 64]",
        ),
        (
            layer(RouterConfig::mixtral(5, k), &on(&gate), swiglu),
            "experts: expected E, I, H = [5, 32, 64]",
        ),
        (
            layer(RouterConfig::mixtral(e, e + 1), &on(&gate), swiglu),
            "top_k",
        ),
        (layer(router(), &on(&gate), plain), "experts.gate"),
        (layer(noisy, &on(&gate), swiglu), "noise"),
    ] {
        let text = refusal(result);
        assert!(text.contains(expected), "{text}, not {expected}");
    }

    // Without a gate a call has to bring what it would give; and a weight is no place for an output.
    let plain = Plain::new(router(), h, i, swiglu, moe_kernels::DType::BF16).unwrap();
    let layer = CudaMoeLayer::from_layer(plain, Weights::new(experts)).unwrap();
    let x = on(&numbers((2 * i, h), DType::BF16, 5));
    assert!(refusal(layer.forward(&x)).contains("gate: expected weights"));
    let logits = on(&numbers((2 * i, e), DType::BF16, 6));
    assert!(layer.forward_logits(&x, &logits).is_ok());
    let text = refusal(layer.forward_into(&x, &gate_up.get(1).unwrap()));
    assert!(text.contains("shares its storage with no weight"), "{text}");
}
