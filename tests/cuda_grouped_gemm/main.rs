//! The grouped products of the sm_80, f32 and decode kernels: exact mode against the CPU's bits, tensor cores against f64 and against each other, on a GPU or on the
//! emulator (`scripts/emulate-cuda.sh`).
#![cfg(feature = "cuda")]

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/gpu.rs"]
mod gpu;

mod case;
mod expected;
mod on_gpu;
mod plans;

use case::*;
use common::Rng;
use common::product::{Stored, numbers};
use expected::*;
use gpu::{Buffer, Gpu};
use moe_kernels::cuda::combine::DeviceRows;
use moe_kernels::cuda::grouped_gemm::{
    BiasPointers, GatherPointers, GroupPointers, GroupedGemm, Numerics, Placement, WeightPointers,
    plan_grouped_gemm,
};
use moe_kernels::cuda::{DeviceInfo, DevicePtr};
use moe_kernels::grouped_gemm::{
    Activation, ActivationFunction, Clamp, Gather, Groups, PackedMatrices, grouped_gemm_into,
    scratch_bytes,
};
use moe_kernels::{Cpu, DType, Error};
use on_gpu::*;
use proptest::prelude::*;

/// Few multiprocessors, so that a block has many tiles; not a Hopper, so that its kernels stay out.
const DEVICE: DeviceInfo = DeviceInfo {
    compute_capability: (8, 0),
    sm_count: 1,
    ..DeviceInfo::A100
};

const LINEAR: Activation = Activation::plain(ActivationFunction::Identity);

#[test]
fn exact_products_have_the_bits_of_the_cpu() {
    let Some(gpu) = gpu::open() else { return };
    let formats = [
        (DType::F32, DType::F32),
        (DType::BF16, DType::BF16),
        (DType::F16, DType::F16),
        (DType::F32, DType::BF16),
        (DType::BF16, DType::F32),
    ];
    for (i, (a, w)) in formats.into_iter().enumerate() {
        for (k, scale) in [(1, false), (40, false), (77, true)] {
            let case = Case {
                a,
                w,
                bias: i % 2 == 0,
                scale,
                block: 4,
                numerics: Numerics::Exact,
                ..Case::new(a, &[3, 0, 19, 1], 24, k)
            };
            let data = case.data();
            let (found, _) = on_gpu(&gpu, &case, &data);
            common::assert_same_bits(
                &found,
                &on_cpu(&case, &data, case.out),
                &format!("{case:?}"),
            );
        }
    }
}

/// Weights of 16 bits that count as f32: the bits of the CPU with the same numbers in f32, which differ from those of bf16's own chain.
#[test]
fn widened_weights_have_the_bits_of_f32() {
    let Some(gpu) = gpu::open() else { return };
    for w in [DType::BF16, DType::F16] {
        for (k, x) in [(1, w), (77, w), (64, DType::F32)] {
            let case = |numerics| Case {
                a: x,
                w,
                bias: true,
                numerics,
                ..Case::new(w, &[3, 0, 19], 24, k)
            };
            let widened = case(Numerics::ExactWidened);
            let mut data = widened.data();
            let (found, _) = on_gpu(&gpu, &widened, &data);
            let (exact, _) = on_gpu(&gpu, &case(Numerics::Exact), &data);
            data.gate = Stored::F32(data.gate.to_f32());
            data.up = Stored::F32(data.up.to_f32());
            let in_f32 = Case {
                w: DType::F32,
                ..widened.clone()
            };
            common::assert_same_bits(
                &found,
                &on_cpu(&in_f32, &data, case(Numerics::Exact).out),
                &format!("{widened:?}"),
            );
            let same = common::bits(&found) == common::bits(&exact);
            assert_eq!(same, w == DType::F16 || k == 1, "{w} {k}");
        }
    }
}

#[test]
fn every_exact_shape_and_activation_has_the_bits_of_the_cpu() {
    let Some(gpu) = gpu::open() else { return };
    use ActivationFunction::*;
    let clamps = [
        Clamp::None,
        Clamp::Pre { limit: 0.5 },
        Clamp::Post { limit: 0.25 },
        Clamp::GptOss {
            limit: 0.75,
            alpha: 1.702,
        },
        Clamp::Softcap { gate: 0.8, up: 0.0 },
    ];
    let mut kernels = std::collections::BTreeSet::new();
    for (i, function) in [Identity, Silu, Gelu, GeluTanh, Relu, Relu2]
        .into_iter()
        .enumerate()
    {
        for (j, clamp) in clamps.into_iter().enumerate() {
            let gated = matches!(clamp, Clamp::GptOss { .. }) || (i + j) % 2 == 0;
            let case = Case {
                activation: Activation {
                    function,
                    gated,
                    clamp,
                },
                bias: true,
                spare: if j % 2 == 0 { 200 } else { 0 },
                layout: [Layout::Fused, Layout::Interleaved, Layout::Separate][(i + j) % 3],
                seed: (i * 10 + j) as u64,
                ..Case::new(DType::F32, &[5, 0, 18], 24, 36)
            };
            let data = case.data();
            let (found, kernel) = on_gpu(&gpu, &case, &data);
            kernels.insert(kernel);
            common::assert_same_bits(
                &found,
                &on_cpu(&case, &data, case.out),
                &format!("{case:?}"),
            );
        }
    }
    let expected = [
        "moe_grouped_gemm_f32_exact_m128",
        "moe_grouped_gemm_f32_exact_m16",
    ];
    assert_eq!(kernels.into_iter().collect::<Vec<_>>(), expected);
}

/// The tiles that plans choose from one below, at and above each seam, told of so many rows for each of two experts.
#[test]
fn every_tile_gives_the_same_bits_near_f64() {
    let Some(gpu) = gpu::open() else { return };
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        // K: below, at and above a block of 32 and one of 64.
        for (k, activation) in [(8, LINEAR), (72, Activation::SWIGLU), (104, LINEAR)] {
            let base = Case {
                activation,
                bias: true,
                block: 4,
                layout: Layout::Separate,
                numerics: if dtype == DType::F32 {
                    Numerics::Tf32
                } else {
                    Numerics::TensorCores
                },
                ..Case::new(dtype, &[17, 9], 72, k)
            };
            let data = base.data();
            let mut first: Option<Vec<f32>> = None;
            let mut kernels = std::collections::BTreeSet::new();
            for spare in [0, 12, 100, 200, 300] {
                let case = Case {
                    spare,
                    ..base.clone()
                };
                let (found, kernel) = on_gpu(&gpu, &case, &data);
                if kernels.insert(kernel) {
                    check_against_f64(&case, &data, &found);
                }
                let first = first.get_or_insert_with(|| found.clone());
                common::assert_same_bits(&found, first, kernel);
            }
            assert_eq!(
                kernels.len(),
                if dtype == DType::F32 { 2 } else { 4 },
                "{kernels:?}"
            );
        }
    }
}

/// A row alone, among others of its expert, and elsewhere in the batch: the same bits, in the decode class and in that of the tiles.
#[test]
fn rows_do_not_depend_on_their_batch() {
    let Some(gpu) = gpu::open() else { return };
    for (dtype, strict) in [
        (DType::BF16, false),
        (DType::F16, false),
        (DType::BF16, true),
        (DType::F16, true),
    ] {
        let whole = Case {
            slots: 0,
            strict,
            ..Case::new(dtype, &[1, 0, 11, 2, 0, 0, 3, 0], 40, 328)
        };
        let data = whole.data();
        let (all, kernel) = on_gpu(&gpu, &whole, &data);
        assert_eq!(kernel.contains("decode"), !strict, "{kernel}");
        check_against_f64(&whole, &data, &all);
        let x = data.x.to_f32();
        for (expert, row) in [(0, 0), (2, 1), (2, 9), (2, 11), (3, 13), (6, 16)] {
            let mut counts = vec![0; 8];
            counts[expert] = 1;
            let alone = Case {
                counts,
                ..whole.clone()
            };
            let mut one = alone.data();
            one.x = Stored::new(dtype, &x[row * whole.k..][..whole.k]);
            (one.gate, one.up) = (
                Stored::new(dtype, &data.gate.to_f32()),
                Stored::new(dtype, &data.up.to_f32()),
            );
            let (found, kernel) = on_gpu(&gpu, &alone, &one);
            common::assert_same_bits(&found, &all[row * whole.n..][..whole.n], kernel);
        }
    }
}

/// Where the matrices lie has no part in the bits: every layout against the first, in each family of kernels, aligned and not.
#[test]
fn layouts_and_tables_give_the_same_bits() {
    let Some(gpu) = gpu::open() else { return };
    let modes = [
        (DType::BF16, Numerics::TensorCores, true, "sm80"),
        (DType::F16, Numerics::TensorCores, false, "decode"),
        (DType::F32, Numerics::TensorCores, true, "exact_m16"),
        (DType::F32, Numerics::Tf32, true, "tf32"),
        (DType::BF16, Numerics::Exact, true, "exact_any"),
    ];
    for (dtype, numerics, strict, family) in modes {
        for (n, k) in [(24, 72), (17, 35)] {
            for activation in [Activation::SWIGLU, LINEAR] {
                let base = Case {
                    numerics,
                    strict,
                    activation,
                    bias: true,
                    ..Case::new(dtype, &[3, 0, 6, 1], n, k)
                };
                let data = base.data();
                let results = Layout::ALL.map(|layout| {
                    let case = Case {
                        layout,
                        ..base.clone()
                    };
                    on_gpu(&gpu, &case, &data)
                });
                for ((found, kernel), layout) in results.iter().zip(Layout::ALL) {
                    // Tables of aligned matrices take the fast kernels, as one allocation does; an odd half of a fused matrix does not begin on 16 bytes.
                    let aligned = k.is_multiple_of(8) || layout.stacked() == Layout::Separate;
                    let slow = kernel.contains("unaligned")
                        || family == "exact_m16" && kernel.contains("exact_any");
                    assert!(kernel.contains(family) || slow, "{layout:?}: {kernel}");
                    if family != "exact_any" && (activation.gated || aligned) {
                        let a_aligned = (k * base.a.size()).is_multiple_of(16);
                        assert_eq!(slow, !(aligned && a_aligned), "{layout:?}: {kernel}");
                    }
                    common::assert_same_bits(found, &results[0].0, &format!("{layout:?} {kernel}"));
                }
            }
        }
    }
}

#[test]
fn no_rows_write_nothing_and_one_expert_may_have_all() {
    let Some(gpu) = gpu::open() else { return };
    for dtype in [DType::BF16, DType::F32] {
        for counts in [vec![0, 0, 0], vec![0, 70, 0]] {
            let case = Case {
                spare: 4,
                ..Case::new(dtype, &counts, 16, 24)
            };
            let data = case.data();
            let (found, _) = on_gpu(&gpu, &case, &data);
            check_against_f64(&case, &data, &found);
        }
    }
}

/// What the host knows bounds what kernels touch, however wrong the device's numbers are: the emulator and memcheck tell of the rest.
#[test]
fn numbers_on_the_device_cannot_lead_outside() {
    let Some(gpu) = gpu::open() else { return };
    for (dtype, strict) in [
        (DType::BF16, false),
        (DType::BF16, true),
        (DType::F32, true),
    ] {
        let case = Case {
            strict,
            hostile: true,
            ..Case::new(dtype, &[3, 0, 2, 2, 1, 0, 0, 0], 24, 40)
        };
        on_gpu(&gpu, &case, &case.data());
    }
}

#[test]
fn more_experts_than_a_chunk_of_the_schedule() {
    let Some(gpu) = gpu::open() else { return };
    for strict in [false, true] {
        let mut counts = vec![0; 300];
        for (i, c) in [(0, 2), (127, 1), (128, 3), (200, 1), (299, 2)] {
            counts[i] = c;
        }
        let case = Case {
            strict,
            ..Case::new(DType::BF16, &counts, 8, 16)
        };
        let data = case.data();
        let (found, _) = on_gpu(&gpu, &case, &data);
        check_against_f64(&case, &data, &found);
    }
}

proptest! {
    #![proptest_config(common::cases(24))]
    #[test]
    fn products_are_near_f64(
        counts in prop::collection::vec(prop_oneof![Just(0usize), 1usize..6, 7usize..40], 1..5),
        (n, k) in (1usize..50, 1usize..140),
        round in any::<bool>(),
        dtype in prop::sample::select(DType::ALL.to_vec()),
        out in prop::sample::select(DType::ALL.to_vec()),
        (block, slots, gated) in (1usize..9, 0usize..4, any::<bool>()),
        (bias, scale, strict) in any::<(bool, bool, bool)>(),
        layout in prop::sample::select(Layout::ALL.to_vec()),
        tf32 in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let Some(gpu) = gpu::open() else { return Ok(()) };
        let (n, k) = if round { (n.next_multiple_of(8), k.next_multiple_of(8)) } else { (n, k) };
        let case = Case {
            counts, block, n, k, a: dtype, w: dtype, out,
            activation: if gated { Activation::SWIGLU } else { LINEAR },
            slots, bias, scale: scale && slots > 0, layout,
            numerics: if tf32 { Numerics::Tf32 } else { Numerics::TensorCores },
            strict, spare: 0, hostile: false, seed,
        };
        let data = case.data();
        let (found, _) = on_gpu(&gpu, &case, &data);
        check_against_f64(&case, &data, &found);
    }
}
