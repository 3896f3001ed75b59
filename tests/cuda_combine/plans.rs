//! What plans refuse, and their grids.

use super::*;

#[test]
fn plans_say_what_is_wrong() {
    let rows = |at: u64, stride| DeviceRows {
        ptr: DevicePtr(at << 20),
        stride,
        dtype: DType::BF16,
    };
    let (weights, row_of_pair) = (DevicePtr(2 << 20), DevicePtr(3 << 20));
    let pairs = |ys, weights, row_of_pair, identity| Routed::Pairs {
        ys,
        rows: 10,
        slots: 2,
        weights,
        row_of_pair,
        identity,
    };
    let fine = CombineOperands::new(
        5,
        64,
        pairs(rows(1, 64), weights, row_of_pair, None),
        rows(4, 64),
    );
    let plan = |operands: &CombineOperands| plan_combine(operands, &DeviceInfo::A100);
    let routed = |ys, weights, row_of_pair, identity| CombineOperands {
        routed: pairs(ys, weights, row_of_pair, identity),
        ..fine
    };
    let ys = rows(1, 64);
    let identity = Identity {
        ids: DevicePtr(5 << 20),
        num_experts: 7,
        x: rows(6, 64),
    };
    let with_identity = |identity| routed(ys, weights, row_of_pair, Some(identity));
    let sum = SharedSum {
        experts: 2,
        expert_stride: 256,
        weights: DevicePtr::NULL,
    };
    let several = |shared_sum| CombineOperands {
        shared: Some(Shared::Add(rows(7, 64))),
        shared_sum: Some(shared_sum),
        ..fine
    };
    let apart = IdentityApart {
        ids: identity.ids,
        weights,
        slots: 2,
        num_experts: 7,
        x: identity.x,
        scale: 1.0,
    };
    let beside = |identity_apart| CombineOperands {
        identity_apart: Some(identity_apart),
        ..fine
    };
    let normed = |eps, multiplier, weight| CombineOperands {
        norm: Some(Norm {
            weight,
            eps,
            multiplier,
        }),
        ..fine
    };
    let norm = DevicePtr(9 << 20);
    for fine in [fine, several(sum), beside(apart), normed(1e-5, 1.0, norm)] {
        plan(&fine).unwrap();
    }
    assert_eq!(plan(&beside(apart)).unwrap().kernel, "moe_combine_any_4");
    let null = DevicePtr::NULL;
    for (name, operands) in [
        ("ys", routed(rows(0, 64), weights, row_of_pair, None)),
        ("ys", routed(rows(1, 63), weights, row_of_pair, None)),
        ("weights", routed(ys, DevicePtr(6), row_of_pair, None)),
        ("row_of_pair", routed(ys, weights, null, None)),
        (
            "routed sum",
            CombineOperands {
                routed: Routed::Sum(rows(0, 64)),
                ..fine
            },
        ),
        ("weights", routed(ys, null, row_of_pair, Some(identity))),
        (
            "ids",
            with_identity(Identity {
                ids: null,
                ..identity
            }),
        ),
        (
            "x",
            with_identity(Identity {
                x: rows(0, 64),
                ..identity
            }),
        ),
        (
            "routed_scale",
            CombineOperands {
                routed_scale: f32::NAN,
                ..fine
            },
        ),
        (
            "shared",
            CombineOperands {
                shared: Some(Shared::Add(rows(7, 3))),
                ..fine
            },
        ),
        (
            "shared gate",
            CombineOperands {
                shared: Some(Shared::SigmoidGate(rows(7, 64), null)),
                ..fine
            },
        ),
        (
            "shared_sum.experts",
            several(SharedSum { experts: 0, ..sum }),
        ),
        (
            "shared_sum.weights",
            several(SharedSum {
                weights: DevicePtr(2),
                ..sum
            }),
        ),
        (
            "shared experts",
            several(SharedSum {
                expert_stride: usize::MAX,
                ..sum
            }),
        ),
        (
            "shared_sum",
            CombineOperands {
                shared_sum: Some(sum),
                ..fine
            },
        ),
        (
            "identity_apart.slots",
            beside(IdentityApart { slots: 3, ..apart }),
        ),
        (
            "identity_apart.scale",
            beside(IdentityApart {
                scale: f32::NAN,
                ..apart
            }),
        ),
        (
            "identity_apart.weights",
            beside(IdentityApart {
                weights: null,
                ..apart
            }),
        ),
        ("ids", beside(IdentityApart { ids: null, ..apart })),
        (
            "x",
            beside(IdentityApart {
                x: rows(0, 64),
                ..apart
            }),
        ),
        (
            "identity_apart",
            CombineOperands {
                identity_apart: Some(apart),
                ..with_identity(identity)
            },
        ),
        ("eps", normed(-1.0, 1.0, norm)),
        ("multiplier", normed(1e-5, f32::INFINITY, norm)),
        ("norm", normed(1e-5, 1.0, null)),
        (
            "bias",
            CombineOperands {
                bias: DevicePtr(3),
                ..fine
            },
        ),
        (
            "residual",
            CombineOperands {
                residual: Some(rows(8, 1)),
                ..fine
            },
        ),
        (
            "out",
            CombineOperands {
                out: rows(0, 64),
                ..fine
            },
        ),
        (
            "T·K",
            CombineOperands {
                tokens: usize::MAX,
                ..fine
            },
        ),
    ] {
        match plan(&operands) {
            Err(Error::Value { argument, .. }) => assert_eq!(argument, name),
            Err(Error::Overflow { what }) => assert_eq!(what, name),
            other => panic!("{name}: {other:?}"),
        }
    }
}

/// The grid covers every column of every token, for any shape.
#[test]
fn grids_cover_everything() {
    let rows = DeviceRows {
        ptr: DevicePtr(1 << 20),
        stride: 1 << 20,
        dtype: DType::BF16,
    };
    for tokens in [1usize, 2, 7, 100, 4096, 70_000, 1 << 20] {
        for hidden in [1usize, 8, 64, 768, 1000, 4096, 7168, 16384] {
            let routed = Routed::Pairs {
                ys: rows,
                rows: 1 << 20,
                slots: 8,
                weights: rows.ptr,
                row_of_pair: rows.ptr,
                identity: None,
            };
            let launch = plan_combine(
                &CombineOperands::new(tokens, hidden, routed, rows),
                &DeviceInfo::H100,
            )
            .unwrap();
            let field =
                |at: usize| u32::from_le_bytes(launch.params()[at..at + 4].try_into().unwrap());
            let (threads, tiles) = (field(168 + 12), field(168 + 16));
            let columns = if hidden.is_multiple_of(8) { 8 } else { 1 };
            assert!(threads.is_power_of_two() && (32..=256).contains(&threads));
            assert!(launch.block[0] <= 256 && launch.block[0].is_multiple_of(threads));
            assert!(u64::from(tiles) * u64::from(threads) * columns >= hidden as u64);
            assert_eq!(launch.grid[0], tiles);
            let groups = launch.block[0] / threads;
            assert!(
                launch.grid[1] == 65535
                    || u64::from(launch.grid[1]) * u64::from(groups) >= tokens as u64
            );
        }
    }
}
