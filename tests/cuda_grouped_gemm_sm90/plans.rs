//! What plans take, and how they launch.

use super::*;

fn some_params() -> GroupedGemmParams {
    GroupedGemmParams {
        a: DevicePtr(0x1000),
        up: DevicePtr(0x2000),
        gate: DevicePtr(0x3000),
        out: DevicePtr(0x4000),
        offsets: DevicePtr(0x5000),
        a_row_stride: 64,
        up_row_stride: 64,
        up_expert_stride: 64 * 64,
        gate_row_stride: 64,
        gate_expert_stride: 64 * 64,
        out_row_stride: 64,
        experts: 4,
        rows: 1000,
        n: 64,
        k: 64,
        slots: 1,
        a_rows: 1000,
        a_dtype: DType::BF16 as u32,
        w_dtype: DType::BF16 as u32,
        out_dtype: DType::F32 as u32,
        activation: ActivationParams::new(Some(Activation::SWIGLU)),
        ..bytemuck::Zeroable::zeroed()
    }
}

#[test]
fn a_plan_says_what_it_does_not_take() {
    let good = some_params();
    let device = DeviceInfo::H100;
    plan_grouped_gemm_sm90(&good, &device).unwrap();
    type Change = fn(&mut GroupedGemmParams);
    let refused: [(&str, Change); 14] = [
        ("a", |p| p.a = DevicePtr(0x1008)),
        ("up", |p| p.up = DevicePtr(0x2002)),
        ("gate", |p| p.gate = DevicePtr::NULL),
        ("out", |p| p.out = DevicePtr(0x4008)),
        ("n", |p| p.n = 60),
        ("k", |p| p.k = 63),
        ("a.row_stride", |p| p.a_row_stride = 68),
        ("up.row_stride", |p| p.up_row_stride = -64),
        ("up.expert_stride", |p| p.up_expert_stride = 1 << 40),
        ("out.row_stride", |p| p.out_row_stride = 65),
        ("weights", |p| p.flags = Flags::WEIGHT_TABLES),
        ("weights", |p| p.w_dtype = DType::F16 as u32),
        ("a", |p| p.a_dtype = DType::F32 as u32),
        ("out", |p| p.out_dtype = DType::F16 as u32),
    ];
    for (name, change) in refused {
        let mut params = good;
        change(&mut params);
        match plan_grouped_gemm_sm90(&params, &device) {
            Err(Error::Value { argument, .. }) => assert_eq!(argument, name),
            other => panic!("{name}: {other:?}"),
        }
    }
    let huge = GroupedGemmParams {
        rows: i32::MAX as u32,
        n: 1 << 30,
        ..good
    };
    assert!(matches!(
        plan_grouped_gemm_sm90(&huge, &device),
        Err(Error::Overflow { .. })
    ));
    assert!(plan_grouped_gemm_sm90(&good, &DeviceInfo::A100).is_err());
    // A plain product does not look at the gate; one expert needs no expert stride; a gathered row is addressed by 32 bits.
    let plain = GroupedGemmParams {
        gate: DevicePtr::NULL,
        activation: ActivationParams::new(None),
        experts: 1,
        up_expert_stride: 3,
        ..good
    };
    plan_grouped_gemm_sm90(&plain, &device).unwrap();
    let gathered = GroupedGemmParams {
        pair_of_row: DevicePtr(0x6000),
        a_row_stride: 1 << 31,
        ..good
    };
    assert!(plan_grouped_gemm_sm90(&gathered, &device).is_err());
}

#[test]
fn clusters_where_experts_have_several_row_tiles() {
    let device = DeviceInfo::H100;
    assert_eq!(cluster_for(128 * CLUSTER_ROWS, 128, &device), 2);
    assert_eq!(cluster_for(128 * CLUSTER_ROWS - 1, 128, &device), 1);
    assert_eq!(
        cluster_for(
            1 << 20,
            1,
            &DeviceInfo {
                sm_count: 1,
                ..device
            }
        ),
        1
    );
    let params = GroupedGemmParams {
        rows: 262_144,
        experts: 128,
        n: 768,
        k: 2048,
        ..some_params()
    };
    let launch = plan_grouped_gemm_sm90(&params, &device).unwrap();
    assert_eq!(
        (launch.grid, launch.cluster, launch.block),
        ([132, 1, 1], [2, 1, 1], [384, 1, 1])
    );
    assert!(launch.shared_bytes <= device.shared_per_block);
    assert_eq!(
        launch.tensor_maps()[1].boxes[..3],
        [TILE_K as u32, TILE_COLUMNS as u32 / 2, 1]
    );
}
