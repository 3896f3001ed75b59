//! What plans refuse, and what they choose for tables. Needs no GPU.

use super::*;

#[test]
fn a_plan_says_what_is_wrong_with_a_table() {
    let rows = |ptr, stride| DeviceRows {
        ptr: DevicePtr(ptr),
        dtype: DType::BF16,
        stride,
    };
    let table = |ptr| WeightPointers::table(DevicePtr(ptr), DType::BF16, 64, 16);
    let good = GroupedGemm {
        a: rows(0x1000, 64),
        a_rows: 100,
        gather: None,
        groups: GroupPointers::Ragged {
            offsets: DevicePtr(0x2000),
            counts: DevicePtr(0x3000),
            experts: 4,
        },
        gate: Some(table(0x4000)),
        up: table(0x5008),
        gate_bias: Some(BiasPointers::table(DevicePtr(0x6000), DType::F32)),
        up_bias: Some(BiasPointers::table(DevicePtr(0x6100), DType::F32)),
        activation: Activation::SWIGLU,
        out: rows(0x7000, 64),
        rows: 100,
        n: 64,
        k: 64,
        numerics: Numerics::TensorCores,
        strict: true,
    };
    let kernel =
        |p: &GroupedGemm, device: &DeviceInfo| plan_grouped_gemm(p, device).unwrap().kernel;
    // Hopper's own kernels want one allocation.
    for device in [DEVICE, DeviceInfo::H100] {
        assert_eq!(kernel(&good, &device), "moe_grouped_gemm_sm80_bf16_m32");
    }
    let stacked = |ptr| WeightPointers::strided(DevicePtr(ptr), DType::BF16, 64, 64 * 64);
    let one_allocation = GroupedGemm {
        gate: Some(stacked(0x10000)),
        up: stacked(0x20000),
        ..good
    };
    assert!(kernel(&one_allocation, &DeviceInfo::H100).contains("sm90"));
    let at = |offset, alignment| Placement::Table { offset, alignment };
    let with = |placement| GroupedGemm {
        up: WeightPointers {
            placement,
            ..good.up
        },
        ..good
    };
    // What is not known to be aligned is read element by element.
    for placement in [at(0, 8), at(4, 16), at(4, 256)] {
        assert!(kernel(&with(placement), &DEVICE).ends_with("_unaligned"));
    }
    assert!(!kernel(&with(at(64 * 64, 32)), &DEVICE).ends_with("_unaligned"));
    let bias = |ptr, placement| {
        Some(BiasPointers {
            ptr: DevicePtr(ptr),
            dtype: DType::F32,
            stride: 1,
            placement,
        })
    };
    let refused = [
        ("weights", with(at(0, 0))),
        ("weights", with(at(0, 1))),
        ("weights", with(at(0, 48))),
        (
            "weights",
            GroupedGemm {
                up: table(0),
                ..good
            },
        ),
        (
            "weights",
            GroupedGemm {
                up: table(0x5004),
                ..good
            },
        ),
        (
            "gate",
            GroupedGemm {
                gate: Some(stacked(0x10000)),
                ..good
            },
        ),
        (
            "bias",
            GroupedGemm {
                up_bias: bias(0x6100, Placement::Strided { expert_stride: 64 }),
                ..good
            },
        ),
        (
            "bias",
            GroupedGemm {
                up_bias: bias(0x6104, at(0, 4)),
                ..good
            },
        ),
        (
            "bias",
            GroupedGemm {
                up_bias: bias(0x6100, at(0, 2)),
                ..good
            },
        ),
        (
            "bias",
            GroupedGemm {
                up_bias: bias(0, at(0, 4)),
                ..good
            },
        ),
    ];
    for (name, product) in refused {
        match plan_grouped_gemm(&product, &DEVICE) {
            Err(Error::Value { argument, .. }) => assert_eq!(argument, name, "{product:?}"),
            other => panic!("{name}: {other:?}"),
        }
    }
    for placement in [at(usize::MAX / 2, 16), at(usize::MAX, 16)] {
        let planned = plan_grouped_gemm(&with(placement), &DEVICE);
        assert!(
            matches!(planned, Err(Error::Overflow { .. })),
            "{planned:?}"
        );
    }
}
