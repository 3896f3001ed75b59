//! What a call does with shapes, strides, formats and bad input. Compared bit by bit: our kernels promise the same bits for a token wherever it lies.

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use moe_kernels::routing::RouterConfig;
use moe_kernels_candle::{Activation, Cpu, MoeLayer, Workspaces, experts};

const E: usize = 6;
const K: usize = 2;
const H: usize = 34;
const I: usize = 19;

/// Numbers that no symmetry can hide behind.
fn numbers<S: Into<candle_core::Shape>>(shape: S, dtype: DType, seed: u32) -> Tensor {
    let shape = shape.into();
    let data: Vec<f32> = (0..shape.elem_count() as u32)
        .map(|i| ((i + seed).wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0)
        .collect();
    Tensor::from_vec(data, shape, &Device::Cpu)
        .unwrap()
        .to_dtype(dtype)
        .unwrap()
}

fn weights(dtype: DType) -> [Tensor; 3] {
    [
        numbers((E, H), DType::F32, 1),
        numbers((E, 2 * I, H), dtype, 2),
        numbers((E, H, I), dtype, 3),
    ]
}

fn layer(dtype: DType) -> MoeLayer {
    let [gate, gate_up, down] = weights(dtype);
    let cpu = Cpu::new();
    let experts = experts::fused(&cpu, &gate_up, &down, Activation::SWIGLU).unwrap();
    MoeLayer::new(cpu, RouterConfig::mixtral(E, K), &gate, experts).unwrap()
}

fn bits(t: &Tensor) -> Vec<u32> {
    let flat = t.flatten_all().unwrap().to_dtype(DType::F32).unwrap();
    flat.to_vec1::<f32>()
        .unwrap()
        .iter()
        .map(|v| v.to_bits())
        .collect()
}

/// The error's text, without a backtrace.
fn refusal<T: std::fmt::Debug>(result: Result<T>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn any_leading_dimensions_and_every_format() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let layer = layer(dtype);
        let x = numbers((12, H), dtype, 4);
        let y = layer.forward(&x).unwrap();
        assert_eq!(
            (y.dims(), y.dtype(), y.is_contiguous()),
            ([12, H].as_slice(), dtype, true)
        );
        assert!(bits(&y).iter().any(|&v| v != 0));
        for shape in [vec![3, 4, H], vec![2, 3, 2, H], vec![1, 12, H]] {
            let z = layer.forward(&x.reshape(shape.clone()).unwrap()).unwrap();
            assert_eq!((z.dims(), bits(&z)), (shape.as_slice(), bits(&y)));
        }
        // One token alone, also without leading dimensions, and none at all.
        let one = layer.forward(&x.get(7).unwrap()).unwrap();
        assert_eq!(
            (one.dims(), bits(&one)),
            ([H].as_slice(), bits(&y.get(7).unwrap()))
        );
        let none = layer.forward(&x.narrow(0, 3, 0).unwrap()).unwrap();
        assert_eq!(none.dims(), [0, H]);
        // A model calls it as a module.
        assert_eq!(bits(&x.apply(&layer).unwrap()), bits(&y));
        assert_eq!(bits(&Module::forward(&layer, &x).unwrap()), bits(&y));
    }
}

#[test]
fn formats_mix() {
    let x = numbers((5, H), DType::F32, 4);
    let y = layer(DType::BF16).forward(&x).unwrap();
    assert_eq!(y.dtype(), DType::F32);
    let x = x.to_dtype(DType::BF16).unwrap();
    assert_eq!(layer(DType::F32).forward(&x).unwrap().dtype(), DType::BF16);
}

#[test]
fn strides_are_followed() {
    for dtype in [DType::F32, DType::BF16] {
        let layer = layer(dtype);
        let same = |x: &Tensor| {
            assert!(!x.is_contiguous());
            let y = layer.forward(x).unwrap();
            assert_eq!(
                bits(&y),
                bits(&layer.forward(&x.contiguous().unwrap()).unwrap())
            );
        };
        let wide = numbers((4, 3, 3 * H), dtype, 5);
        same(&wide.narrow(2, H, H).unwrap()); // columns of a wider matrix
        same(&numbers((H, 9), dtype, 6).t().unwrap()); // transposed
        same(&numbers((1, H), dtype, 7).broadcast_as((8, H)).unwrap()); // one row for all
        same(&wide.narrow(2, 0, H).unwrap().narrow(0, 1, 2).unwrap());
        same(&numbers((2, 5, 1, 3 * H), dtype, 8).narrow(3, 0, H).unwrap()); // a dimension of one in between
    }
}

#[test]
fn rows_that_are_not_evenly_spaced_are_refused() {
    let layer = layer(DType::F32);
    let x = numbers((3, 4, H), DType::F32, 9).transpose(0, 1).unwrap();
    let text = refusal(layer.forward(&x));
    assert!(
        text.contains("x: rows of shape [4, 3, 34]") && text.contains("contiguous()"),
        "{text}"
    );
    assert!(layer.forward(&x.contiguous().unwrap()).is_ok());
}

#[test]
fn into_an_existing_tensor() {
    let layer = layer(DType::BF16);
    for (x_dtype, y_dtype) in [
        (DType::BF16, DType::BF16),
        (DType::F32, DType::F32),
        (DType::BF16, DType::F32),
    ] {
        let x = numbers((2, 3, H), x_dtype, 10);
        // A slice of a wider tensor: its rows are 2·H apart, and what lies between them stays.
        let wide = Tensor::full(7f32, (2, 3, 2 * H), &Device::Cpu)
            .unwrap()
            .to_dtype(y_dtype)
            .unwrap();
        let y = wide.narrow(2, 0, H).unwrap();
        layer.forward_into(&x, &y).unwrap();
        let expected = layer.forward(&x).unwrap();
        if x_dtype == y_dtype {
            assert_eq!(bits(&y), bits(&expected));
        } else {
            assert_eq!(bits(&y.to_dtype(x_dtype).unwrap()), bits(&expected));
        }
        let rest = wide.narrow(2, H, H).unwrap();
        assert!(bits(&rest).iter().all(|&v| v == 7f32.to_bits()));
    }
    let x = numbers((4, H), DType::F32, 11);
    let before = bits(&x);
    assert!(refusal(layer.forward_into(&x, &x)).contains("shares storage"));
    let y = Tensor::zeros((3, H), DType::F32, &Device::Cpu).unwrap();
    assert!(refusal(layer.forward_into(&x, &y)).contains("y: expected shape"));
    let y = Tensor::zeros((H, 4), DType::F32, &Device::Cpu)
        .unwrap()
        .t()
        .unwrap();
    assert!(refusal(layer.forward_into(&x, &y)).contains("y: expected rows without gaps"));
    assert_eq!((bits(&x), bits(&y).iter().sum()), (before, 0u32));
}

#[test]
fn layouts_of_the_weights_pack_to_the_same_bits() {
    let dtype = DType::BF16;
    let [gate, gate_up, down] = weights(dtype);
    let cpu = Cpu::new();
    let x = numbers((9, H), dtype, 12);
    let answer = |experts| {
        let layer = MoeLayer::new(cpu, RouterConfig::mixtral(E, K), &gate, experts).unwrap();
        bits(&layer.forward(&x).unwrap())
    };
    let swiglu = Activation::SWIGLU;
    let expected = answer(experts::fused(&cpu, &gate_up, &down, swiglu).unwrap());

    // [E, H, 2I] and [E, I, H] in memory, seen through strides.
    let turn = |t: &Tensor| {
        t.transpose(1, 2)
            .unwrap()
            .contiguous()
            .unwrap()
            .transpose(1, 2)
            .unwrap()
    };
    assert!(!turn(&gate_up).is_contiguous());
    assert_eq!(
        answer(experts::fused(&cpu, &turn(&gate_up), &turn(&down), swiglu).unwrap()),
        expected
    );

    let (g, u) = (
        gate_up.narrow(1, 0, I).unwrap(),
        gate_up.narrow(1, I, I).unwrap(),
    );
    assert_eq!(
        answer(experts::stacked(&cpu, &g, &u, &down, swiglu).unwrap()),
        expected
    );

    let each = (0..E).map(|e| {
        Ok(experts::Expert {
            gate: g.get(e)?,
            up: u.get(e)?,
            down: down.get(e)?,
        })
    });
    assert_eq!(
        answer(experts::one_by_one(&cpu, each, swiglu).unwrap()),
        expected
    );
}

#[test]
fn logits_and_routing_from_elsewhere() {
    let layer = layer(DType::F32);
    let [gate, ..] = weights(DType::F32);
    let x = numbers((7, H), DType::F32, 13);
    let logits = x.matmul(&gate.t().unwrap()).unwrap();
    let y = layer.forward_logits(&x, &logits).unwrap();
    // Candle's product sums in another order: close, not the same bits.
    let difference = (layer.forward(&x).unwrap() - &y)
        .unwrap()
        .abs()
        .unwrap()
        .max_all()
        .unwrap();
    assert!(difference.to_scalar::<f32>().unwrap() < 1e-4);

    let probabilities = candle_nn::ops::softmax_last_dim(&logits).unwrap();
    let ids = probabilities
        .arg_sort_last_dim(false)
        .unwrap()
        .narrow(1, 0, K)
        .unwrap()
        .contiguous()
        .unwrap();
    let weights = probabilities.gather(&ids, 1).unwrap();
    let weights = weights
        .broadcast_div(&weights.sum_keepdim(1).unwrap())
        .unwrap();
    let routed = layer.forward_routed(&x, &ids, &weights).unwrap();
    let difference = (&routed - &y).unwrap().abs().unwrap().max_all().unwrap();
    assert!(difference.to_scalar::<f32>().unwrap() < 1e-4);
    let ids_i64 = ids.to_dtype(DType::I64).unwrap();
    assert_eq!(
        bits(&layer.forward_routed(&x, &ids_i64, &weights).unwrap()),
        bits(&routed)
    );

    // Weights of another scale give another answer: they are used as they are.
    let doubled = layer
        .forward_routed(&x, &ids, &(&weights * 2.0).unwrap())
        .unwrap();
    assert_ne!(bits(&doubled), bits(&routed));

    for (ids, weights, expected) in [
        (
            Tensor::full(E as u32, (7, K), &Device::Cpu).unwrap(),
            weights.clone(),
            "ids: expected ids in 0..6",
        ),
        (
            Tensor::full(u32::MAX, (7, K), &Device::Cpu).unwrap(),
            weights.clone(),
            "ids: expected ids in 0..6",
        ),
        (
            ids.narrow(0, 0, 6).unwrap(),
            weights.narrow(0, 0, 6).unwrap(),
            "ids: expected 7 rows",
        ),
        (
            ids.narrow(1, 0, 1).unwrap().contiguous().unwrap(),
            weights.narrow(1, 0, 1).unwrap().contiguous().unwrap(),
            "ids: expected [.., 2]",
        ),
        (
            ids.clone(),
            weights.narrow(0, 0, 6).unwrap(),
            "weights: expected shape [7, 2]",
        ),
        (
            weights.clone(),
            weights.clone(),
            "ids: expected u32, i32 or i64",
        ),
        (
            ids.clone(),
            weights.to_dtype(DType::BF16).unwrap(),
            "weights: expected f32",
        ),
    ] {
        let text = refusal(layer.forward_routed(&x, &ids, &weights));
        assert!(text.contains(expected), "{text}");
    }
    let text = refusal(layer.forward_logits(&x, &logits.narrow(0, 0, 6).unwrap()));
    assert!(text.contains("logits"), "{text}");
}

#[test]
fn bad_tensors_are_refused_by_name() {
    let layer = layer(DType::F32);
    let text = refusal(layer.forward(&numbers((3, H + 1), DType::F32, 0)));
    assert!(
        text.contains("x: expected shape [3, 34], got [3, 35]"),
        "{text}"
    );
    let text = refusal(layer.forward(&numbers((3, H), DType::F64, 0)));
    assert!(
        text.contains("x: expected f32, f16 or bf16, got F64"),
        "{text}"
    );
    let text = refusal(layer.forward(&Tensor::new(1f32, &Device::Cpu).unwrap()));
    assert!(text.contains("x: expected a tensor [.., H]"), "{text}");

    let cpu = Cpu::new();
    let [gate, gate_up, down] = weights(DType::F32);
    let pack =
        |gate_up: &Tensor, down: &Tensor| experts::fused(&cpu, gate_up, down, Activation::SWIGLU);
    assert!(refusal(pack(&gate_up, &down.narrow(0, 0, 5).unwrap())).contains("down: expected"));
    assert!(
        refusal(pack(&gate_up.narrow(1, 0, 2 * I - 1).unwrap(), &down)).contains("down: expected")
    );
    assert!(
        refusal(pack(&gate_up.to_dtype(DType::U32).unwrap(), &down))
            .contains("gate_up: expected f32, f16 or bf16")
    );
    let none: [Result<experts::Expert>; 0] = [];
    assert!(refusal(experts::one_by_one(&cpu, none, Activation::SWIGLU)).contains("at least one"));
    // The expert at fault is named.
    let each = (0..E).map(|e| {
        let rows = if e == 4 { I - 1 } else { I };
        Ok(experts::Expert {
            gate: gate_up.get(e)?.narrow(0, 0, rows)?,
            up: gate_up.get(e)?.narrow(0, I, I)?,
            down: down.get(e)?,
        })
    });
    let text = refusal(experts::one_by_one(&cpu, each, Activation::SWIGLU));
    assert!(text.contains("expert 4"), "{text}");
    // A gate of another width, and more selected experts than there are.
    let experts = pack(&gate_up, &down).unwrap();
    let other = gate.narrow(1, 0, H - 1).unwrap();
    let refused = MoeLayer::new(cpu, RouterConfig::mixtral(E, K), &other, experts.clone());
    assert!(refusal(refused).contains("gate: expected shape"));
    assert!(MoeLayer::new(cpu, RouterConfig::mixtral(E, E + 1), &gate, experts).is_err());
}

#[test]
fn a_backward_pass_is_an_error() {
    let layer = layer(DType::F32);
    let x = Var::from_tensor(&numbers((2, H), DType::F32, 14)).unwrap();
    let loss = layer.forward(x.as_tensor()).unwrap().sum_all().unwrap();
    assert!(refusal(loss.backward()).contains("moe-kernels"));
}

#[test]
fn threads_share_a_layer_and_workspaces_are_kept() {
    let workspaces = Workspaces::new();
    let layer = layer(DType::BF16).with_workspaces(workspaces.clone());
    let x = numbers((40, H), DType::BF16, 15);
    let expected = bits(&layer.forward(&x).unwrap());
    let idle = workspaces.idle_bytes();
    assert!(idle > 0);
    // Smaller calls need no more; the same one none at all.
    layer.forward(&x.narrow(0, 0, 3).unwrap()).unwrap();
    layer.forward(&x).unwrap();
    assert_eq!(workspaces.idle_bytes(), idle);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..20 {
                    assert_eq!(bits(&layer.forward(&x).unwrap()), expected);
                }
            });
        }
    });
    let after = workspaces.idle_bytes();
    assert!(after >= idle && after <= 5 * idle, "{after} of {idle}");
    workspaces.clear();
    assert_eq!(workspaces.idle_bytes(), 0);
}
