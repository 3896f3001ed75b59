//! What the layer on a GPU refuses, and that it says which argument.

use super::both::*;
use candle_core::{DType, Device, Tensor};
use moe_kernels::cuda::moe::CudaMoeLayer as Plain;
use moe_kernels::routing::RouterConfig;
use moe_kernels_candle::cuda::{CudaMoeLayer, Experts, Weights};
use moe_kernels_candle::{Activation, moe_kernels};

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
            "down: expected [E, H, I] for gate_up [E, 2·I, H] = [4, 64, 64], got [3, 64, 32]",
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
