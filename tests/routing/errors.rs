//! Every way in which a config, a tensor or an input is refused: the argument is named, and nothing is touched.

use moe_kernels::routing::*;
use moe_kernels::{Cpu, Error, MatMut, MatRef, Result};

/// The argument that an error names.
#[track_caller]
fn blamed<T: std::fmt::Debug>(result: Result<T>) -> &'static str {
    match result.expect_err("refused") {
        Error::Value { argument, .. } | Error::Shape { argument, .. } => argument,
        Error::Overflow { what } => what,
        other => panic!("{other}"),
    }
}

#[test]
fn configs_that_mean_nothing() {
    type Change = fn(&mut RouterConfig);
    fn groups(c: &mut RouterConfig, n_group: usize, topk_group: usize) {
        *c = RouterConfig::deepseek_v3(8, 4, n_group, topk_group, 1.0);
    }
    let cases: [(&str, Change); 51] = [
        ("num_experts", |c| c.num_experts = 0),
        ("num_experts", |c| c.num_experts = usize::MAX),
        ("num_experts", |c| c.num_experts = i32::MAX as usize),
        ("null_experts", |c| {
            c.null_experts = NullExperts::Zero(usize::MAX)
        }),
        ("null_experts", |c| {
            c.null_experts = NullExperts::Identity(i32::MAX as usize)
        }),
        ("joint_shared", |c| c.joint_shared = usize::MAX),
        ("joint_shared", |c| c.joint_shared = 1),
        ("top_k", |c| c.top_k = 0),
        ("top_k", |c| c.top_k = 9),
        ("logit_multiplier", |c| c.logit_multiplier = f32::NAN),
        ("logit_multiplier", |c| c.logit_multiplier = f32::INFINITY),
        ("logit_softcap", |c| c.logit_softcap = -1.0),
        ("logit_softcap", |c| c.logit_softcap = f32::NAN),
        ("logit_softcap", |c| c.logit_softcap = f32::INFINITY),
        ("scale", |c| c.scale = f32::NAN),
        ("scale", |c| c.scale = f32::NEG_INFINITY),
        ("renorm", |c| c.renorm = Renorm::SumPlusEps(-1.0)),
        ("renorm", |c| c.renorm = Renorm::SumPlusEps(f32::NAN)),
        ("renorm", |c| c.renorm = Renorm::SumClampMin(f32::INFINITY)),
        ("renorm", |c| c.renorm = Renorm::PNorm(0.0)),
        ("renorm", |c| c.renorm = Renorm::PNorm(-2.0)),
        ("renorm", |c| c.renorm = Renorm::PNorm(f32::NAN)),
        ("renorm", |c| c.renorm = Renorm::PNorm(f32::INFINITY)),
        ("n_group", |c| groups(c, 0, 0)),
        ("n_group", |c| groups(c, 3, 1)),
        ("n_group", |c| groups(c, 16, 1)),
        ("topk_group", |c| groups(c, 4, 0)),
        ("topk_group", |c| groups(c, 4, 5)),
        ("top_k", |c| groups(c, 4, 1)),
        ("joint_shared", |c| {
            c.weights = WeightSource::JointWithShared
        }),
        ("score", |c| {
            (c.joint_shared, c.weights) = (1, WeightSource::JointWithShared)
        }),
        ("renorm", |c| {
            *c = RouterConfig::inkling(8, 2, 1, 1.0);
            c.renorm = Renorm::Sum;
        }),
        ("jitter_eps", |c| *c = RouterConfig::phimoe(8, -0.1)),
        ("jitter_eps", |c| *c = RouterConfig::phimoe(8, f32::NAN)),
        ("top_k", |c| *c = RouterConfig::phimoe(1, 0.1)),
        ("top_k", |c| {
            (c.top_k, c.selection) = (3, Selection::SparseMixer { jitter_eps: 0.1 })
        }),
        ("weights", |c| {
            *c = RouterConfig::phimoe(8, 0.1);
            c.weights = WeightSource::SoftmaxSelectedLogits;
        }),
        ("joint_shared", |c| {
            *c = RouterConfig::inkling(8, 2, 1, 1.0);
            c.selection = Selection::SparseMixer { jitter_eps: 0.1 };
        }),
        ("num_experts", |c| *c = RouterConfig::doge(8, 2)),
        ("null_experts", |c| {
            *c = RouterConfig::doge(9, 2);
            c.null_experts = NullExperts::Zero(1);
        }),
        ("joint_shared", |c| {
            *c = RouterConfig::doge(9, 2);
            c.joint_shared = 1;
        }),
        ("per_expert", |c| *c = RouterConfig::expert_choice(8, 0)),
        ("null_experts", |c| {
            *c = RouterConfig::expert_choice(8, 1);
            c.null_experts = NullExperts::Identity(1);
        }),
        ("joint_shared", |c| {
            *c = RouterConfig::expert_choice(8, 1);
            c.joint_shared = 2;
        }),
        ("capacity", |c| {
            *c = RouterConfig::expert_choice(8, 1);
            c.capacity = RouterConfig::nllb(8, 1).capacity;
        }),
        ("weights", |c| {
            *c = RouterConfig::expert_choice(8, 1);
            c.weights = WeightSource::SoftmaxSelectedLogits;
        }),
        ("null_experts", |c| {
            *c = RouterConfig::dense(8);
            c.null_experts = NullExperts::Identity(1);
        }),
        ("capacity", |c| {
            *c = RouterConfig::dense(8);
            c.capacity = RouterConfig::nllb(8, 1).capacity;
        }),
        ("scope_tokens", |c| *c = RouterConfig::switch(8, 1, 0)),
        ("num_experts", |c| *c = RouterConfig::doge(0, 0)),
        ("num_experts", |c| *c = RouterConfig::dense(0)),
    ];
    for (field, change) in cases {
        let mut config = RouterConfig::mixtral(8, 2);
        change(&mut config);
        assert_eq!(blamed(config.validate()), field, "{config:?}");
        assert_eq!(blamed(Router::new(config)), field);
    }
}

#[test]
fn configs_at_the_edge_of_what_means_something() {
    for config in [
        RouterConfig::mixtral(1, 1),
        RouterConfig::mixtral(8, 8),
        RouterConfig::zaya(4, 5),
        RouterConfig::deepseek_v3(8, 2, 4, 1, 1.0),
        RouterConfig::deepseek_v2_grouped(8, 8, 4, 1, 1.0),
        RouterConfig::switch(8, 0, 1),
        RouterConfig::doge(1, 1),
        RouterConfig::mixtral(i32::MAX as usize - 1, 1),
    ] {
        config.validate().unwrap();
    }
}

#[test]
fn tensors_that_do_not_fit() {
    let router = |config| Router::new(config).unwrap();
    let mixtral = || router(RouterConfig::mixtral(3, 2));
    assert_eq!(
        blamed(mixtral().with_correction_bias(&[0.0; 2])),
        "correction_bias"
    );
    assert_eq!(
        blamed(mixtral().with_correction_bias(&[])),
        "correction_bias"
    );
    assert_eq!(
        blamed(mixtral().with_correction_bias(&[0.0, f32::NAN, 0.0])),
        "correction_bias"
    );
    assert_eq!(
        blamed(mixtral().with_correction_bias(&[0.0, f32::INFINITY, 0.0])),
        "correction_bias"
    );
    assert_eq!(
        blamed(mixtral().with_per_expert_scale(&[1.0; 4])),
        "per_expert_scale"
    );
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert_eq!(
            blamed(mixtral().with_per_expert_scale(&[1.0, bad, 1.0])),
            "per_expert_scale"
        );
    }
    for config in [
        RouterConfig::dense(3),
        RouterConfig::phimoe(3, 0.1),
        RouterConfig::expert_choice(3, 1),
    ] {
        assert_eq!(
            blamed(router(config).with_correction_bias(&[0.0; 3])),
            "correction_bias"
        );
    }
    // A bias that is refused leaves the old one.
    let mut router = mixtral().with_correction_bias(&[1.0, 2.0, 3.0]).unwrap();
    assert_eq!(
        blamed(router.set_correction_bias(&[0.0, 0.0, f32::NAN])),
        "correction_bias"
    );
    assert_eq!(router.correction_bias(), Some(&[1.0, 2.0, 3.0][..]));
    assert_eq!(mixtral().correction_bias(), None);
    // Null experts have a bias, joint shared experts have none.
    self::Router::new(RouterConfig::zaya(3, 1))
        .unwrap()
        .with_correction_bias(&[0.0; 4])
        .unwrap();
    self::Router::new(RouterConfig::inkling(3, 1, 2, 1.0))
        .unwrap()
        .with_correction_bias(&[0.0; 3])
        .unwrap();
}

#[test]
fn inputs_that_do_not_fit_leave_the_routing_alone() {
    let cpu = Cpu::new();
    let z = [0.5f32; 64];
    let matrix = |rows, cols| MatRef::new(&z, rows, cols).unwrap();
    let mut routing = Routing::new();
    let given = GivenRouting::new(4, 2, &[1, 0], &[0.25, 0.75]);
    routing.set_given(&cpu, &given).unwrap();
    let mut refused = |config: &RouterConfig, input: RouteInput<'_>, argument: &str| {
        let router = Router::new(config.clone()).unwrap();
        assert_eq!(blamed(router.route(&cpu, &input, &mut routing)), argument);
        assert_eq!(
            (routing.ids(), routing.weights()),
            (&[1, 0][..], &[0.25, 0.75][..])
        );
        assert_eq!(
            (routing.tokens(), routing.slots(), routing.num_experts()),
            (1, 2, 4)
        );
        assert_eq!(routing.permutation().offsets(), [0, 1, 2, 2, 2]);
    };
    let plain = RouterConfig::mixtral(8, 2);
    refused(&plain, RouteInput::new(matrix(2, 7)), "logits");
    refused(&plain, RouteInput::new(matrix(2, 9)), "logits");
    refused(
        &plain,
        RouteInput::new(matrix(2, 8)).noise_logits(matrix(2, 8)),
        "noise_logits",
    );
    refused(
        &plain,
        RouteInput::new(matrix(2, 8)).given_ids(&[0; 4]),
        "given_ids",
    );
    refused(
        &plain,
        RouteInput::new(matrix(2, 8)).row_alignment(0),
        "block",
    );
    refused(
        &plain,
        RouteInput::new(matrix(2, 8)).local_experts(4..9),
        "local",
    );
    #[allow(clippy::reversed_empty_ranges)]
    refused(
        &plain,
        RouteInput::new(matrix(2, 8)).local_experts(4..3),
        "local",
    );
    refused(
        &plain,
        RouteInput::new(matrix(2, 8)).row_alignment(usize::MAX),
        "rows as u32",
    );
    let noisy = RouterConfig::noisy_top_k(8, 2, 1);
    refused(&noisy, RouteInput::new(matrix(2, 8)), "noise_logits");
    refused(
        &noisy,
        RouteInput::new(matrix(2, 8)).noise_logits(matrix(1, 8)),
        "noise_logits",
    );
    let mut hash = plain.clone();
    hash.selection = Selection::Given;
    refused(&hash, RouteInput::new(matrix(1, 8)), "given_ids");
    for bad in [
        &[0][..],
        &[0, 1, 2],
        &[0, 8],
        &[-2, 0],
        &[i32::MAX, 0],
        &[i32::MIN, 0],
    ] {
        refused(
            &hash,
            RouteInput::new(matrix(1, 8)).given_ids(bad),
            "given_ids",
        );
    }
    // T·K that does not fit u32: a matrix whose rows overlap needs no memory.
    let many = MatRef::with_strides(&z, 1 << 31, 8, 0, 1).unwrap();
    refused(&plain, RouteInput::new(many), "T·K as u32");
    assert_eq!(
        blamed(Routing::with_capacity(
            usize::MAX,
            &Router::new(plain.clone()).unwrap()
        )),
        "T·K"
    );

    let router = Router::new(plain).unwrap();
    let mut out = [7.0f32; 16];
    let out_matrix = MatMut::new(&mut out, 2, 7).unwrap();
    let input = RouteInput::new(matrix(2, 8));
    assert_eq!(
        blamed(router.effective_logits_into(&cpu, &input, out_matrix)),
        "out"
    );
    assert_eq!(out, [7.0; 16]);
}

#[test]
fn given_routings_that_do_not_fit() {
    let cpu = Cpu::new();
    let mut routing = Routing::new();
    routing
        .set_given(&cpu, &GivenRouting::new(4, 1, &[3], &[0.5]))
        .unwrap();
    let w = [0.0; 8];
    for (given, argument) in [
        (GivenRouting::new(4, 0, &[], &[]), "slots"),
        (GivenRouting::new(4, 2, &[0, 1, 2], &w[..3]), "ids"),
        (GivenRouting::new(4, 2, &[0, 1], &w[..3]), "weights"),
        (GivenRouting::new(4, 2, &[0, 4], &w[..2]), "ids"),
        (GivenRouting::new(4, 2, &[0, -2], &w[..2]), "ids"),
        (GivenRouting::new(0, 2, &[], &[]), "num_experts"),
        (
            GivenRouting::new(i32::MAX as usize, 2, &[], &[]),
            "num_experts",
        ),
        (
            GivenRouting::new(4, 2, &[], &[]).null_experts(NullExperts::Zero(usize::MAX)),
            "num_experts",
        ),
    ] {
        assert_eq!(blamed(routing.set_given(&cpu, &given)), argument);
        assert_eq!(
            (routing.ids(), routing.weights(), routing.slots()),
            (&[3][..], &[0.5][..], 1)
        );
    }
}
