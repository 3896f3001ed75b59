//! Layers that cannot be, and operands that come without being wanted or are missing.

use super::*;

#[test]
fn what_a_layer_wants_and_only_that_has_to_come() {
    let Some(gpu) = gpu::open() else { return };
    let all = Case {
        gate_norm: true,
        config: RouterConfig::noisy_top_k(4, 2, 1),
        ..case("muse_spark")
    };
    let plain = Case::new("plain", RouterConfig::mixtral(4, 2));
    let refused = |case: &Case, change: &dyn Fn(&mut MoePointers)| {
        let w = Weights::new(case, DType::F32);
        let on = OnGpu::new(&gpu, case, &w, cuda_layer(case, DType::F32));
        let data = on.data(&vec![0.0; case.hidden], &vec![0.0; case.hidden]);
        let mut pointers = on.pointers(&data);
        let plan = |p: &MoePointers| on.layer.plan(1, p, gpu.cuda.device_info());
        plan(&pointers).unwrap();
        change(&mut pointers);
        match plan(&pointers).unwrap_err() {
            Error::Value { argument, .. } => argument,
            other => panic!("{other}"),
        }
    };
    let w = Weights::new(&all, DType::F32);
    let on = OnGpu::new(&gpu, &all, &w, cuda_layer(&all, DType::F32));
    let data = on.data(&vec![0.0; all.hidden], &vec![0.0; all.hidden]);
    let some = on.pointers(&data);
    assert_eq!(refused(&all, &|p| p.gate_norm = None), "gate_norm");
    assert_eq!(refused(&all, &|p| p.gate_noise = None), "noise_logits");
    assert_eq!(
        refused(&all, &|p| p.noise_logits = p.gate_noise),
        "gate_noise"
    );
    assert_eq!(refused(&all, &|p| p.latent = None), "latent");
    let norm_gone =
        |p: &mut MoePointers| p.latent = p.latent.map(|l| LatentPointers { norm: None, ..l });
    assert_eq!(refused(&all, &norm_gone), "latent.norm");
    assert_eq!(refused(&all, &|p| p.post_norm = None), "post_norm");
    assert_eq!(
        refused(&plain, &|p| p.gate_norm = some.gate_norm),
        "gate_norm"
    );
    assert_eq!(
        refused(&plain, &|p| p.gate_noise = some.gate_noise),
        "gate_noise"
    );
    assert_eq!(refused(&plain, &|p| p.latent = some.latent), "latent");
    assert_eq!(
        refused(&plain, &|p| p.post_norm = some.post_norm),
        "post_norm"
    );
    let given = RoutingPointers::Given {
        ids: some.workspace,
        weights: some.workspace,
    };
    assert_eq!(refused(&all, &|p| p.routing = given), "gate_norm");
    assert_eq!(refused(&case("inkling"), &|p| p.routing = given), "routing");
    let nowhere = |p: &mut MoePointers| {
        let norm = p.gate_norm.as_mut().unwrap();
        norm.weight = DevicePtr::NULL;
    };
    assert_eq!(refused(&all, &nowhere), "norm");
}

#[test]
fn layers_that_cannot_be_are_refused() {
    let layer = |config| CudaMoeLayer::new(config, 8, 8, Activation::SWIGLU, DType::F32).unwrap();
    let argument = |r: Result<CudaMoeLayer, Error>| match r.unwrap_err() {
        Error::Value { argument, .. } => argument,
        other => panic!("{other}"),
    };
    let shared = |count, join| SharedExpert {
        count,
        ..SharedExpert::new(8, Activation::SWIGLU, join)
    };
    let plain = || layer(RouterConfig::mixtral(4, 2));
    let joint = || layer(RouterConfig::inkling(4, 2, 2, 1.0));
    let latent = |width| plain().with_latent(Latent { width, norm: false });
    assert_eq!(argument(latent(0)), "latent.width");
    assert_eq!(argument(latent(1 << 31)), "latent.width");
    for count in [0, MAX_SHARED + 1] {
        let refused = plain().with_shared(shared(count, SharedJoin::Add));
        assert_eq!(argument(refused), "shared.count");
    }
    for (layer, count) in [(plain(), 1), (joint(), 1), (joint(), 3)] {
        let refused = layer.with_shared(shared(count, SharedJoin::RouterWeighted));
        assert_eq!(argument(refused), "shared.count");
    }
    joint()
        .with_shared(shared(2, SharedJoin::RouterWeighted))
        .unwrap();
}
