//! Router losses against the f64 reference and the published files; the same bits on every ISA and for any number of threads.

mod common;

use common::{Rng, assert_same_bits, cpus, with_threads};
use half::{bf16, f16};
use moe_kernels::losses::{
    LossScratch, load_balancing, router_z, switch_load_balancing, update_bias,
};
use moe_kernels::{AnyMatRef, Cpu, Error, MatRef, reference};
use proptest::prelude::*;
use safetensors::{Dtype, SafeTensors};

/// A loss to run.
#[derive(Clone, Debug)]
enum Loss {
    Balance { k: usize, mask: Option<Vec<f32>> },
    Switch { group: usize },
    Z,
}

impl Loss {
    fn run(
        &self,
        cpu: &Cpu,
        z: AnyMatRef<'_>,
        grad: Option<&mut [f32]>,
        s: &mut LossScratch,
    ) -> Result<f64, Error> {
        match self {
            Self::Balance { k, mask } => load_balancing(cpu, z, *k, mask.as_deref(), grad, s),
            Self::Switch { group } => switch_load_balancing(cpu, z, *group, grad, s),
            Self::Z => router_z(cpu, z, grad, s),
        }
    }

    /// The value, and the gradient in place of what is in `grad`.
    fn value(&self, z: AnyMatRef<'_>, grad: &mut [f32]) -> f64 {
        let scratch = &mut LossScratch::default();
        self.run(&Cpu::new(), z, Some(grad), scratch).unwrap()
    }

    fn reference(&self, logits: &[f32], num_experts: usize) -> reference::Loss {
        let z: Vec<f64> = logits.iter().map(|&z| f64::from(z)).collect();
        match self {
            Self::Balance { k, mask } => {
                let mask: Vec<f64> = mask.iter().flatten().map(|&m| f64::from(m)).collect();
                reference::load_balancing_loss(&z, num_experts, *k, &mask)
            }
            Self::Switch { group } => {
                reference::switch_load_balancing_loss(&z, num_experts, *group)
            }
            Self::Z => reference::router_z_loss(&z, num_experts),
        }
    }
}

fn logits(rows: usize, num_experts: usize, seed: u64, size: f32) -> Vec<f32> {
    Rng(seed)
        .normals(rows * num_experts)
        .iter()
        .map(|z| z * size)
        .collect()
}

/// Value and gradient agree with the expected ones to `rtol` of the largest expected number.
#[track_caller]
fn assert_close(value: f64, grad: &[f32], want: &reference::Loss, rtol: f64, what: &str) {
    assert!(
        (value - want.value).abs() <= rtol * want.value.abs(),
        "{what}: {value}, not {}",
        want.value
    );
    let largest = want.grad_logits.iter().fold(0f64, |m, g| m.max(g.abs()));
    for (i, (g, w)) in grad.iter().zip(&want.grad_logits).enumerate() {
        let error = (f64::from(*g) - w).abs();
        assert!(
            error <= rtol * largest + NOISE,
            "{what}: gradient {i} is {g}, not {w}"
        );
    }
}

/// Where every f is alike the gradient is 0, and the reference's is f64 rounding noise: E² · 2⁻⁵³ for E up to 130.
const NOISE: f64 = 2e-12;

/// p has a relative error of a few units of 2⁻²⁴: exp (1), the rounding of z − max amplified by at most |z − max| (some 40 here), sum and division.
const RTOL: f64 = 64.0 / 16_777_216.0;

fn case() -> impl Strategy<Value = (usize, usize, Loss, u64, f32)> {
    // Rows around the chunk of 256, columns around the lanes; E = 1 too.
    let rows = prop::sample::select(vec![1usize, 2, 3, 31, 255, 256, 257, 511, 513]);
    let experts = prop::sample::select(vec![
        1usize, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 130,
    ]);
    (rows, experts, any::<u64>(), 0.1f32..6.0).prop_flat_map(|(rows, experts, seed, size)| {
        let divisors: Vec<usize> = (1..=rows).filter(|d| rows % d == 0).collect();
        let mask = prop::option::of(prop::sample::select(divisors.clone()).prop_flat_map(|t| {
            // At least one token counts.
            prop::collection::vec(prop::bool::weighted(0.7), t).prop_map(|mut m| {
                m[0] = true;
                m.into_iter()
                    .map(|m| f32::from(u8::from(m)))
                    .collect::<Vec<f32>>()
            })
        }));
        let loss = prop_oneof![
            (1..=experts, mask).prop_map(|(k, mask)| Loss::Balance { k, mask }),
            prop::sample::select(divisors).prop_map(|group| Loss::Switch { group }),
            Just(Loss::Z),
        ];
        loss.prop_map(move |loss| (rows, experts, loss, seed, size))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn losses_and_gradients_match_the_reference((rows, experts, loss, seed, size) in case()) {
        let z = logits(rows, experts, seed, size);
        let m = MatRef::new(&z, rows, experts).unwrap();
        let want = loss.reference(&z, experts);
        let mut first: Option<(f64, Vec<f32>)> = None;
        let mut scratch = LossScratch::default();
        for cpu in cpus() {
            for threads in [1, 2, 7] {
                let mut grad = vec![f32::NAN; rows * experts];
                let value = with_threads(threads, || loss.run(&cpu, m.into(), Some(&mut grad), &mut scratch)).unwrap();
                assert_close(value, &grad, &want, RTOL, &format!("{loss:?}"));
                // Without a gradient the value has the same bits.
                let alone = loss.run(&cpu, m.into(), None, &mut scratch).unwrap();
                prop_assert_eq!(alone.to_bits(), value.to_bits());
                if let Some((v, g)) = &first {
                    prop_assert_eq!(v.to_bits(), value.to_bits());
                    assert_same_bits(&grad, g, "gradient");
                } else {
                    first = Some((value, grad));
                }
            }
        }
    }
}

#[test]
fn formats_and_strides_read_the_same_numbers() {
    let (rows, experts) = (70, 13);
    let z: Vec<bf16> = logits(rows, experts, 1, 2.0)
        .iter()
        .map(|&z| bf16::from_f32(z))
        .collect();
    let wide: Vec<f32> = z.iter().map(|z| z.to_f32()).collect();
    let halves: Vec<f16> = wide.iter().map(|&z| f16::from_f32(z)).collect();
    let transposed: Vec<f32> = (0..rows * experts)
        .map(|i| wide[i % rows * experts + i / rows])
        .collect();
    let views: [AnyMatRef<'_>; 4] = [
        MatRef::new(&wide, rows, experts).unwrap().into(),
        MatRef::new(&z, rows, experts).unwrap().into(),
        MatRef::new(&halves, rows, experts).unwrap().into(),
        MatRef::new(&transposed, experts, rows)
            .unwrap()
            .transposed()
            .into(),
    ];
    // bf16 numbers of moderate size are exact in f16 as well.
    assert!(halves.iter().zip(&wide).all(|(h, w)| h.to_f32() == *w));
    let loss = Loss::Balance { k: 3, mask: None };
    let want = loss.reference(&wide, experts);
    for view in views {
        let mut grad = vec![f32::NAN; rows * experts];
        let value = loss.value(view, &mut grad);
        assert_close(value, &grad, &want, RTOL, "view");
    }
}

#[test]
fn a_masked_row_is_not_read() {
    let (tokens, experts) = (6, 5);
    let mask = vec![1.0, 0.0, 1.0, 1.0, 0.0, 0.5];
    let clean = logits(2 * tokens, experts, 2, 2.0);
    let mut z = clean.clone();
    for row in [1, 4, 7, 10] {
        z[row * experts..(row + 1) * experts].fill(f32::NAN);
    }
    let loss = Loss::Balance {
        k: 2,
        mask: Some(mask),
    };
    let want = loss.reference(&clean, experts);
    let mut grad = vec![f32::NAN; z.len()];
    let m = MatRef::new(&z, 2 * tokens, experts).unwrap();
    let value = loss.value(m.into(), &mut grad);
    assert_close(value, &grad, &want, RTOL, "mask");
    assert!(grad[experts..2 * experts].iter().all(|&g| g == 0.0));

    // Nothing counts: nothing to balance.
    grad.fill(f32::NAN);
    let none = Loss::Balance {
        k: 2,
        mask: Some(vec![0.0; 4]),
    };
    let value = none.value(m.into(), &mut grad);
    assert_eq!(value, 0.0);
    assert!(grad.iter().all(|&g| g == 0.0));
}

#[test]
fn no_rows_and_bad_numbers() {
    let empty = MatRef::<f32>::new(&[], 0, 4).unwrap();
    let all = [
        Loss::Balance {
            k: 1,
            mask: Some(vec![]),
        },
        Loss::Switch { group: 3 },
        Loss::Z,
    ];
    for loss in &all {
        assert_eq!(loss.value(empty.into(), &mut []), 0.0);
    }
    // A NaN, an infinity: the loss is not finite, and nothing panics.
    for bad in [f32::NAN, f32::INFINITY] {
        let z = [0.0, 1.0, bad, 2.0];
        let m = MatRef::new(&z, 2, 2).unwrap();
        for loss in [
            Loss::Balance { k: 1, mask: None },
            Loss::Switch { group: 1 },
            Loss::Z,
        ] {
            let mut grad = [0.0; 4];
            let value = loss.value(m.into(), &mut grad);
            assert!(!value.is_finite());
        }
    }
    // Logits of −∞ are experts that are switched off.
    let z = [0.0, f32::NEG_INFINITY, 0.0];
    let m = MatRef::new(&z, 1, 3).unwrap();
    let mut grad = [f32::NAN; 3];
    let value = Loss::Z.value(m.into(), &mut grad);
    let ln2 = std::f64::consts::LN_2;
    assert!((value - ln2 * ln2).abs() < 1e-7);
    assert_eq!(grad[1], 0.0);
}

#[test]
fn bad_arguments_are_named_and_nothing_is_written() {
    let z = [0f32; 12];
    let m = MatRef::new(&z, 6, 2).unwrap();
    let narrow = MatRef::new(&z, 6, 0).unwrap();
    let balance = |k, mask: &[f32]| Loss::Balance {
        k,
        mask: Some(mask.to_vec()),
    };
    let plain = |k| Loss::Balance { k, mask: None };
    for (loss, m, len, name) in [
        (plain(0), m, 12, "top_k"),
        (plain(3), m, 12, "top_k"),
        (plain(1), m, 11, "grad"),
        (plain(1), m, 13, "grad"),
        (plain(1), narrow, 0, "logits"),
        (balance(1, &[]), m, 12, "mask"),
        (balance(1, &[1.0; 4]), m, 12, "mask"),
        (balance(1, &[1.0, f32::NAN]), m, 12, "mask"),
        (balance(1, &[1.0, -1.0]), m, 12, "mask"),
        (Loss::Switch { group: 0 }, m, 12, "group_tokens"),
        (Loss::Switch { group: 4 }, m, 12, "logits"),
        (Loss::Switch { group: 3 }, m, 1, "grad"),
        (Loss::Z, m, 1, "grad"),
        (Loss::Z, narrow, 0, "logits"),
    ] {
        let mut grad = vec![f32::NAN; len];
        match loss.run(
            &Cpu::new(),
            m.into(),
            Some(&mut grad),
            &mut LossScratch::default(),
        ) {
            Err(Error::Value { argument, .. } | Error::Shape { argument, .. }) => {
                assert_eq!(argument, name)
            }
            other => panic!("{loss:?}: {other:?}"),
        }
        assert!(grad.iter().all(|g| g.is_nan()));
    }
}

#[test]
fn biases_move_against_the_load() {
    let mut bias = [0.25f32, -1.0, 0.0, 3.0];
    let load = [10, 0, 5, 5];
    let want = reference::update_bias(&bias.map(f64::from), &load, 0.125);
    update_bias(&mut bias, &load, 0.125).unwrap();
    assert_eq!(bias.map(f64::from).to_vec(), want);
    // Loads whose sum does not fit usize.
    update_bias(&mut bias, &[usize::MAX, usize::MAX, 0, usize::MAX], 1.0).unwrap();
    assert_eq!(f64::from(bias[2]), want[2] + 1.0);
    let before = bias;
    assert!(matches!(
        update_bias(&mut bias, &[1], 0.1),
        Err(Error::Shape {
            argument: "load",
            ..
        })
    ));
    assert!(matches!(
        update_bias(&mut bias, &load, f32::NAN),
        Err(Error::Value {
            argument: "rate",
            ..
        })
    ));
    assert_eq!(bias, before);
    update_bias(&mut [], &[], 0.1).unwrap();
}

/// A tensor as f64 numbers.
fn numbers(file: &SafeTensors<'_>, name: &str) -> Vec<f64> {
    let t = file.tensor(name).unwrap();
    let data = t.data();
    match t.dtype() {
        Dtype::F64 => data
            .chunks_exact(8)
            .map(|b| f64::from_le_bytes(b.try_into().unwrap()))
            .collect(),
        Dtype::F32 => data
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()).into())
            .collect(),
        Dtype::I32 => data
            .chunks_exact(4)
            .map(|b| i32::from_le_bytes(b.try_into().unwrap()).into())
            .collect(),
        other => panic!("{name}: {other:?}"),
    }
}

/// The losses that published models compute, from files of `tests/data/cases`.
#[test]
fn published_losses() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/cases");
    let mut found = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if !name.starts_with("loss_") {
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let case = &header.metadata().as_ref().unwrap()["case"];
        let case: serde_json::Value = serde_json::from_str(case).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let experts = *file.tensor("logits").unwrap().shape().last().unwrap();
        let z: Vec<f32> = numbers(&file, "logits").iter().map(|&z| z as f32).collect();
        let loss = match case["loss_kind"].as_str().unwrap() {
            "router_z" => Loss::Z,
            "load_balancing" => Loss::Balance {
                k: case["top_k"].as_u64().unwrap() as usize,
                mask: (case["masked"] == true).then(|| {
                    numbers(&file, "attention_mask")
                        .iter()
                        .map(|&m| m as f32)
                        .collect()
                }),
            },
            other => panic!("{name}: {other}"),
        };
        let want = reference::Loss {
            value: numbers(&file, "value_f64")[0],
            grad_logits: numbers(&file, "grad_logits"),
        };
        let m = MatRef::new(&z, z.len() / experts, experts).unwrap();
        for cpu in cpus() {
            let mut grad = vec![f32::NAN; z.len()];
            let value = loss
                .run(&cpu, m.into(), Some(&mut grad), &mut LossScratch::default())
                .unwrap();
            assert_close(value, &grad, &want, case["rtol"].as_f64().unwrap(), &name);
        }
        found += 1;
    }
    assert!(found >= 2, "{found} loss files");
}
