//! What plans refuse. Needs no GPU.

use super::*;

/// What a plan refuses, and which field it names. Needs no GPU.
#[test]
fn plans_refuse_what_stays_on_the_cpu_and_bad_operands() {
    let device = DeviceInfo::H100;
    let good = RoutePointers {
        logits: DevicePtr(256),
        ids: DevicePtr(256),
        weights: DevicePtr(256),
        ..RoutePointers::default()
    };
    let refused = |config: &RouterConfig, pointers: &RoutePointers| match plan_route(
        config,
        4,
        DType::F32,
        0,
        pointers,
        &device,
    ) {
        Err(Error::Value { argument, .. }) => argument,
        other => panic!("{other:?}"),
    };
    let plain = RouterConfig::mixtral(8, 2);
    assert_eq!(
        plan_route(&plain, 4, DType::F32, 0, &good, &device)
            .unwrap()
            .len(),
        1
    );
    assert!(
        plan_route(&plain, 0, DType::F32, 0, &RoutePointers::default(), &device)
            .unwrap()
            .is_empty()
    );
    assert_eq!(
        refused(&RouterConfig::mixtral(100, MAX_TOP_K + 1), &good),
        "top_k"
    );
    assert_eq!(
        refused(&RouterConfig::mixtral(MAX_LOGITS + 1, 2), &good),
        "num_experts"
    );
    assert_eq!(
        refused(&RouterConfig::longcat_flash(4096, 1, 2, 1.0), &good),
        "null_experts"
    );
    assert_eq!(
        refused(&RouterConfig::inkling(4096, 2, 1, 1.0), &good),
        "joint_shared"
    );
    assert_eq!(
        refused(&RouterConfig::doge(65 * 65, 2), &good),
        "num_experts"
    );
    let mut joint = RouterConfig::inkling(8, 2, 1, 1.0);
    joint.selection = Selection::Dense;
    assert_eq!(refused(&joint, &good), "weights");
    let with = |change: &dyn Fn(&mut RoutePointers)| {
        let mut pointers = good;
        change(&mut pointers);
        pointers
    };
    assert_eq!(
        refused(&plain, &with(&|p| p.logits = DevicePtr::NULL)),
        "logits"
    );
    assert_eq!(
        refused(&plain, &with(&|p| p.logits = DevicePtr(258))),
        "logits"
    );
    assert_eq!(refused(&plain, &with(&|p| p.ids = DevicePtr::NULL)), "ids");
    assert_eq!(
        refused(&plain, &with(&|p| p.weights = DevicePtr(6))),
        "weights"
    );
    assert_eq!(
        refused(&plain, &with(&|p| p.noise_logits = DevicePtr(256))),
        "noise_logits"
    );
    assert_eq!(
        refused(&plain, &with(&|p| p.given_ids = DevicePtr(256))),
        "given_ids"
    );
    assert_eq!(
        refused(&plain, &with(&|p| p.shared_weights = DevicePtr(256))),
        "shared_weights"
    );
    assert_eq!(
        refused(&plain, &with(&|p| p.logits_stride = 7)),
        "logits_stride"
    );
    let noisy = RouterConfig::noisy_top_k(8, 2, 1);
    assert_eq!(refused(&noisy, &good), "noise_logits");
    assert_eq!(
        refused(
            &RouterConfig::dense(8),
            &with(&|p| p.correction_bias = DevicePtr(256))
        ),
        "correction_bias"
    );
    assert_eq!(
        refused(&RouterConfig::expert_choice(8, 2), &good),
        "workspace"
    );
    assert_eq!(refused(&RouterConfig::mixtral(8, 0), &good), "top_k");
    assert!(matches!(
        plan_route(&plain, usize::MAX / 2, DType::F32, 0, &good, &device),
        Err(Error::Overflow { .. })
    ));
}
