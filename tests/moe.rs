//! The contracts of the whole layer: the same bits on every ISA (D3), for every thread count and run (D1), and in any batch (D2).

mod common;

use common::layers::{Recipe, recipes};
use common::{Rng, assert_same_bits, cases, cpus, hash_bits, with_threads};
use half::{bf16, f16};
use moe_kernels::experts::{ExpertWeights, PackedExperts};
use moe_kernels::grouped_gemm::{Activation, PackedMatrices};
use moe_kernels::moe::{
    Forward, Gate, Latent, MoeLayer, PostNorm, RouteFrom, SharedCombine, SharedExperts,
};
use moe_kernels::norm::RmsNorm;
use moe_kernels::routing::{GivenRouting, NullExperts, Router, RouterConfig, Routing};
use moe_kernels::{AnyMatRef, Cpu, DType, Error, Isa, MatMut, MatRef};

/// Runs a layer on f32 tokens whose first has position `position`; output, workspace and routing start poisoned.
fn run(cpu: &Cpu, layer: &MoeLayer, x: &[f32], position: u64) -> Vec<f32> {
    let tokens = x.len() / layer.hidden();
    let forward = Forward {
        position,
        ..Forward::default()
    };
    run_with(
        cpu,
        layer,
        MatRef::new(x, tokens, layer.hidden()).unwrap().into(),
        &forward,
    )
}

fn run_with(cpu: &Cpu, layer: &MoeLayer, x: AnyMatRef<'_>, forward: &Forward<'_>) -> Vec<f32> {
    let (tokens, hidden) = (x.rows(), x.cols());
    let mut y = vec![f32::NAN; tokens * hidden];
    let mut workspace = vec![0xff; layer.workspace_size(cpu, tokens).unwrap()];
    let mut routing = Routing::new();
    let out = MatMut::new(&mut y, tokens, hidden).unwrap().into();
    layer
        .forward_with(cpu, x, forward, out, &mut routing, &mut workspace)
        .unwrap();
    y
}

#[test]
fn every_isa_and_thread_count_gives_the_same_bits() {
    for recipe in recipes() {
        let x = Rng(1).normals(45 * recipe.hidden);
        for dtype in DType::ALL {
            let scalar = Cpu::with_isa(Isa::Scalar).unwrap().single_threaded();
            let expected = run(&scalar, &recipe.layer(&scalar, dtype), &x, 0);
            assert!(expected.iter().all(|v| v.is_finite()), "{}", recipe.name);
            for cpu in cpus() {
                let layer = recipe.layer(&cpu, dtype);
                for threads in [1, 2, 7] {
                    let found = with_threads(threads, || run(&cpu, &layer, &x, 0));
                    let what = format!("{} {dtype} {} {threads} threads", recipe.name, cpu.isa());
                    assert_same_bits(&found, &expected, &what);
                }
            }
        }
    }
}

/// x in half precision: h is rounded to it, on every ISA alike.
#[test]
fn half_precision_activations_keep_the_contract() {
    let recipe = &recipes()[2];
    let x = Rng(2).normals(20 * recipe.hidden);
    let x16: Vec<f16> = x.iter().map(|&v| f16::from_f32(v)).collect();
    let xb: Vec<bf16> = x.iter().map(|&v| bf16::from_f32(v)).collect();
    let mut expected: [Option<Vec<f32>>; 2] = [None, None];
    for cpu in cpus() {
        let layer = recipe.layer(&cpu, DType::BF16);
        let inputs: [AnyMatRef<'_>; 2] = [
            MatRef::new(&x16, 20, recipe.hidden).unwrap().into(),
            MatRef::new(&xb, 20, recipe.hidden).unwrap().into(),
        ];
        for (x, expected) in inputs.into_iter().zip(&mut expected) {
            let found = run_with(&cpu, &layer, x, &Forward::default());
            let expected = expected.get_or_insert_with(|| found.clone());
            assert_same_bits(&found, expected, &format!("{} {}", cpu.isa(), x.dtype()));
        }
    }
}

/// D2: every position of batches around the tiles' sizes holds another token; each must have the bits that it has alone.
#[test]
fn a_token_has_the_same_bits_alone_and_at_every_position_of_a_batch() {
    // Emulators, which set `PROPTEST_CASES`, want fewer.
    let all = cases(300).cases >= 100;
    let sizes: &[usize] = if all {
        &[2, 5, 7, 13, 32, 97, 300]
    } else {
        &[7, 40]
    };
    let most = sizes.iter().copied().max().unwrap();
    for recipe in recipes() {
        let hidden = recipe.hidden;
        let x = Rng(3).normals(most * hidden);
        for cpu in cpus() {
            for dtype in DType::ALL {
                if !all && dtype != DType::BF16 {
                    continue;
                }
                let layer = recipe.layer(&cpu, dtype);
                // Noise belongs to a position; nothing else does.
                let alone: Vec<f32> = x
                    .chunks(hidden)
                    .enumerate()
                    .flat_map(|(t, token)| run(&cpu, &layer, token, t as u64))
                    .collect();
                for &tokens in sizes {
                    let found = run(&cpu, &layer, &x[..tokens * hidden], 0);
                    let what = format!("{} {dtype} {} T = {tokens}", recipe.name, cpu.isa());
                    assert_same_bits(&found, &alone[..tokens * hidden], &what);
                }
            }
        }
    }
}

/// D2 again, for one token that wanders through a batch whose other tokens stay.
#[test]
fn a_wandering_token_keeps_its_bits() {
    const BATCH: usize = 300;
    let recipe = &recipes()[0];
    let hidden = recipe.hidden;
    let step = BATCH.div_ceil(cases(BATCH as u32).cases.clamp(1, BATCH as u32) as usize);
    for cpu in cpus() {
        let layer = recipe.layer(&cpu, DType::F32);
        let mut rng = Rng(5);
        let (token, others) = (rng.normals(hidden), rng.normals(BATCH * hidden));
        let alone = run(&cpu, &layer, &token, 0);
        for position in (0..BATCH).step_by(step) {
            let mut x = others.clone();
            x[position * hidden..][..hidden].copy_from_slice(&token);
            let y = run(&cpu, &layer, &x, 0);
            let what = format!("{} at {position}", cpu.isa());
            assert_same_bits(&y[position * hidden..][..hidden], &alone, &what);
        }
    }
}

/// These hashes were computed once, on x86-64; any other architecture must find the same (D3). `MOE_KERNELS_BLESS=1` prints new ones.
#[test]
fn bits_are_those_on_record() {
    let recorded = include_str!("data/moe_bits.txt");
    let mut found = String::new();
    for recipe in recipes() {
        for dtype in DType::ALL {
            let cpu = *cpus().last().unwrap();
            let x = Rng(9).normals(33 * recipe.hidden);
            let hash = hash_bits(&run(&cpu, &recipe.layer(&cpu, dtype), &x, 0));
            found += &format!("{:12} {dtype:4} {hash:016x}\n", recipe.name);
        }
    }
    if std::env::var_os("MOE_KERNELS_BLESS").is_some() {
        std::fs::write(
            concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/moe_bits.txt"),
            &found,
        )
        .unwrap();
    } else {
        assert_eq!(found, recorded);
    }
}

#[test]
fn no_tokens_is_not_an_error() {
    for recipe in recipes() {
        let cpu = Cpu::new();
        assert!(
            run(&cpu, &recipe.layer(&cpu, DType::F32), &[], 0).is_empty(),
            "{}",
            recipe.name
        );
    }
}

/// Everything to one expert, which leaves the others empty: by a routing that the caller gives.
#[test]
fn one_expert_takes_all_by_given_routing() {
    let recipe = Recipe::new("mixtral", RouterConfig::mixtral(8, 2));
    let (tokens, hidden) = (130, recipe.hidden);
    let x = Rng(4).normals(tokens * hidden);
    for cpu in cpus() {
        let layer = recipe.layer(&cpu, DType::F32);
        let mut routing = Routing::new();
        let (ids, weights) = (vec![5; tokens], vec![1.0; tokens]);
        let given = GivenRouting::new(8, 1, &ids, &weights);
        routing.set_given(&cpu, &given).unwrap();
        assert_eq!(routing.permutation().counts()[5], tokens);
        let mut y = vec![f32::NAN; tokens * hidden];
        let mut workspace = vec![0xff; layer.workspace_size(&cpu, tokens).unwrap()];
        let forward = Forward {
            route: RouteFrom::Routing,
            ..Forward::default()
        };
        let x_ref = MatRef::new(&x, tokens, hidden).unwrap().into();
        let out = MatMut::new(&mut y, tokens, hidden).unwrap().into();
        layer
            .forward_with(&cpu, x_ref, &forward, out, &mut routing, &mut workspace)
            .unwrap();
        // Each token alone goes the same way.
        let mut one = Routing::new();
        one.set_given(&cpu, &GivenRouting::new(8, 1, &[5], &[1.0]))
            .unwrap();
        let mut y1 = vec![f32::NAN; hidden];
        let x1 = MatRef::new(&x[7 * hidden..][..hidden], 1, hidden)
            .unwrap()
            .into();
        let out = MatMut::new(&mut y1, 1, hidden).unwrap().into();
        layer
            .forward_with(&cpu, x1, &forward, out, &mut one, &mut workspace)
            .unwrap();
        assert_same_bits(&y[7 * hidden..][..hidden], &y1, "token 7");
    }
}

/// Two layers with some of the experts each add up to the whole (expert parallelism), up to the order of the sum. One of them answers for
/// identity experts, not both.
#[test]
fn expert_ranges_add_up() {
    let mut identity = RouterConfig::mixtral(8, 3);
    identity.null_experts = NullExperts::Identity(3);
    for config in [RouterConfig::mixtral(8, 3), identity] {
        let recipe = Recipe::new("mixtral", config);
        let (tokens, hidden) = (40, recipe.hidden);
        let x = Rng(6).normals(tokens * hidden);
        let cpu = Cpu::new();
        let whole = run(&cpu, &recipe.layer(&cpu, DType::F32), &x, 0);
        let mut sum = vec![0.0f32; whole.len()];
        for first in [0, 5] {
            let layer = recipe.part(&cpu, first, if first == 0 { 5 } else { 3 });
            for (s, v) in sum.iter_mut().zip(run(&cpu, &layer, &x, 0)) {
                *s += v;
            }
        }
        for (s, w) in sum.iter().zip(&whole) {
            assert!((s - w).abs() <= 1e-5 * w.abs().max(1.0), "{s} is not {w}");
        }
    }
}

/// A layer takes one more expert without packing the others again.
#[test]
fn an_expert_joins_a_packed_layer() {
    let recipe = Recipe::new("mixtral", RouterConfig::mixtral(8, 2));
    let (cpu, hidden) = (Cpu::new(), recipe.hidden);
    let x = Rng(8).normals(20 * hidden);
    let whole = recipe.part(&cpu, 0, 8);
    let mut experts = recipe.part(&cpu, 0, 7).into_experts();
    recipe.push(&cpu, &mut experts, 7);
    let gate = recipe.gate(&cpu);
    let router = whole.router().clone();
    let grown = MoeLayer::new(router, experts)
        .unwrap()
        .with_gate(gate)
        .unwrap();
    let what = "seven experts and one more";
    assert_same_bits(&run(&cpu, &grown, &x, 0), &run(&cpu, &whole, &x, 0), what);
}

#[test]
fn bad_input_is_named_and_nothing_is_written() {
    let recipe = Recipe::new("mixtral", RouterConfig::mixtral(8, 2));
    let cpu = Cpu::new();
    let layer = recipe.layer(&cpu, DType::F32);
    let (tokens, hidden) = (3, recipe.hidden);
    let data = vec![0.5f32; 4 * hidden];
    let mat = |rows, cols| AnyMatRef::from(MatRef::new(&data, rows, cols).unwrap());
    let enough = layer.workspace_size(&cpu, tokens).unwrap();
    let check = |argument: &str, x, forward: &Forward<'_>, (rows, cols), bytes| {
        let mut y = vec![7.5f32; 4 * hidden];
        let mut routing = Routing::new();
        let out = MatMut::new(&mut y, rows, cols).unwrap().into();
        let error = layer
            .forward_with(&cpu, x, forward, out, &mut routing, &mut vec![0; bytes])
            .expect_err(argument);
        assert!(
            error.to_string().starts_with(argument),
            "{argument}: {error}"
        );
        assert!(y.iter().all(|&v| v == 7.5), "{argument}");
    };
    let plain = Forward::default();
    check("x", mat(3, hidden - 1), &plain, (3, hidden), enough);
    check("y", mat(3, hidden), &plain, (2, hidden), enough);
    check("y", mat(3, hidden), &plain, (3, hidden + 1), enough);
    // x is f32, so every byte of the workspace is needed.
    check("workspace", mat(3, hidden), &plain, (3, hidden), enough - 1);
    let residual = Forward {
        residual: Some(mat(2, hidden)),
        ..plain
    };
    check("residual", mat(3, hidden), &residual, (3, hidden), enough);
    let from = |route| Forward { route, ..plain };
    check(
        "logits",
        mat(3, hidden),
        &from(RouteFrom::Logits(mat(3, 7))),
        (3, hidden),
        enough,
    );
    check(
        "routing",
        mat(3, hidden),
        &from(RouteFrom::Routing),
        (3, hidden),
        enough,
    );
    check(
        "given_ids",
        mat(3, hidden),
        &from(RouteFrom::GateAndIds(&[0; 6])),
        (3, hidden),
        enough,
    );
}

/// Each part of a layer knows the ISA that it was packed for, and the call that it does not fit writes nothing.
#[test]
fn parts_packed_for_another_isa_are_named() {
    let isas = Isa::available();
    let &[Isa::Scalar, .., last] = isas.as_slice() else {
        return; // one ISA: there is no other to pack for
    };
    let [scalar, other] = [Isa::Scalar, last].map(|isa| Cpu::with_isa(isa).unwrap());
    let h = 8;
    let w = vec![0.5f32; h * h];
    let view = |rows| AnyMatRef::from(MatRef::new(&w, rows, h).unwrap());
    let experts = |cpu: &Cpu| {
        let mut experts = PackedExperts::new(cpu, h, h, Activation::SWIGLU, DType::F32).unwrap();
        let mut weights = ExpertWeights::plain(view(h), view(h));
        weights.gate = Some(view(h));
        experts.push(cpu, &weights).unwrap();
        experts
    };
    let router = || Router::new(RouterConfig::mixtral(1, 1)).unwrap();
    let gate = |cpu: &Cpu| Gate::new(cpu, view(1), None).unwrap();
    let plain = |cpu: &Cpu| MoeLayer::new(router(), experts(cpu)).unwrap();
    let latent = |cpu: &Cpu| Latent::new(cpu, view(h), view(h), DType::F32).unwrap();
    let shared = |cpu: &Cpu| SharedExperts::new(experts(cpu), SharedCombine::Add).unwrap();
    let gated = |cpu: &Cpu| {
        let mut gate = PackedMatrices::new(cpu, 1, h, DType::F32)?;
        gate.push(cpu, view(1), None)?;
        SharedExperts::new(experts(&scalar), SharedCombine::SigmoidGate(gate))
    };
    let layers = [
        ("experts", plain(&other).with_gate(gate(&scalar)).unwrap()),
        ("gate", plain(&scalar).with_gate(gate(&other)).unwrap()),
        (
            "latent",
            MoeLayer::new_latent(router(), experts(&scalar), latent(&other))
                .unwrap()
                .with_gate(gate(&scalar))
                .unwrap(),
        ),
        (
            "experts",
            plain(&scalar)
                .with_gate(gate(&scalar))
                .unwrap()
                .with_shared(shared(&other))
                .unwrap(),
        ),
        (
            "shared gate",
            plain(&scalar)
                .with_gate(gate(&scalar))
                .unwrap()
                .with_shared(gated(&other).unwrap())
                .unwrap(),
        ),
    ];
    for (argument, layer) in layers {
        let mut y = vec![7.5f32; h];
        let mut routing = Routing::new();
        let mut workspace = vec![0; layer.workspace_size(&scalar, 1).unwrap()];
        let out = MatMut::new(&mut y, 1, h).unwrap().into();
        let error = layer
            .forward(&scalar, view(1), out, &mut routing, &mut workspace)
            .expect_err(argument);
        assert!(matches!(error, Error::PackedFor { .. }), "{error}");
        assert!(
            error.to_string().starts_with(argument),
            "{argument}: {error}"
        );
        assert!(
            y.iter().all(|&v| v == 7.5) && routing.tokens() == 0,
            "{argument}"
        );
    }
}

/// What a layer is made of is checked when it is put together.
#[test]
fn parts_that_do_not_fit_are_named() {
    let recipe = Recipe::new("mixtral", RouterConfig::mixtral(8, 2));
    let (cpu, h) = (Cpu::new(), recipe.hidden);
    let layer = || recipe.part(&cpu, 0, 5);
    let ones = vec![1.0f32; 9 * (h + 1)];
    let view = |rows, cols| AnyMatRef::from(MatRef::new(&ones, rows, cols).unwrap());
    let norm = |width| RmsNorm::new(&ones[..width], 0.0).unwrap();
    let experts = || recipe.part(&cpu, 0, 5).into_experts();
    let narrow = || PackedExperts::new(&cpu, h + 1, 3, Activation::SWIGLU, DType::F32).unwrap();
    let router = |config| Router::new(config).unwrap();
    let set = |n, k, count| {
        let mut set = PackedMatrices::new(&cpu, n, k, DType::F32).unwrap();
        for _ in 0..count {
            set.push(&cpu, view(n, k), None).unwrap();
        }
        SharedExperts::new(experts(), SharedCombine::SigmoidGate(set)).map(drop)
    };
    let gate = |rows, cols| Gate::new(&cpu, view(rows, cols), None).unwrap();
    let noisy = || gate(8, h).with_noise(&cpu, view(8, h)).unwrap();
    let weighted = SharedExperts::new(experts(), SharedCombine::RouterWeighted).unwrap();
    let latent = || Latent::new(&cpu, view(4, h), view(h, 4), DType::F32);
    let refusals = [
        (
            "experts",
            MoeLayer::new(router(RouterConfig::mixtral(4, 2)), experts()).map(drop),
        ),
        (
            "experts",
            MoeLayer::new(router(RouterConfig::mixtral(4, 2)), narrow()).map(drop),
        ),
        ("gate", layer().with_gate(gate(7, h)).map(drop)),
        ("gate", layer().with_gate(gate(8, h + 1)).map(drop)),
        ("gate", layer().with_gate(noisy()).map(drop)),
        (
            "bias",
            Gate::new(&cpu, view(8, h), Some(&ones[..7])).map(drop),
        ),
        ("noise", gate(8, h).with_noise(&cpu, view(7, h)).map(drop)),
        (
            "input_norm",
            gate(8, h).with_input_norm(norm(h - 1)).map(drop),
        ),
        ("first_expert", layer().with_first_expert(4).map(drop)),
        (
            "first_expert",
            layer().with_first_expert(usize::MAX).map(drop),
        ),
        (
            "post_norm",
            layer()
                .with_post_norm(PostNorm::NormFirst(norm(h + 1)))
                .map(drop),
        ),
        (
            "routed_scale",
            layer().with_routed_scale(f32::NAN).map(drop),
        ),
        (
            "routed_scale",
            layer().with_routed_scale(f32::INFINITY).map(drop),
        ),
        ("out_norm", layer().with_out_norm(norm(1)).map(drop)),
        ("out_bias", layer().with_out_bias(&ones[..h + 1]).map(drop)),
        (
            "shared experts",
            SharedExperts::new(narrow(), SharedCombine::Add).map(drop),
        ),
        ("shared", layer().with_shared(weighted).map(drop)),
        ("gate", set(2, h, 1)),
        ("gate", set(1, h - 1, 1)),
        ("gate", set(1, h, 0)),
        ("gate", set(1, h, 2)),
        (
            "w_out",
            Latent::new(&cpu, view(4, h), view(h, 5), DType::F32).map(drop),
        ),
        (
            "latent norm",
            latent().unwrap().with_norm(norm(5)).map(drop),
        ),
        (
            "latent",
            MoeLayer::new_latent(
                router(RouterConfig::mixtral(8, 2)),
                experts(),
                latent().unwrap(),
            )
            .map(drop),
        ),
        ("eps", RmsNorm::new(&ones[..h], f32::NAN).map(drop)),
        ("eps", RmsNorm::new(&ones[..h], -1.0).map(drop)),
        (
            "multiplier",
            norm(h).with_multiplier(f32::INFINITY).map(drop),
        ),
    ];
    for (argument, refusal) in refusals {
        let error = refusal.expect_err(argument).to_string();
        assert!(
            error.starts_with(&format!("{argument}:")),
            "{argument}: {error}"
        );
    }
}

/// Sizes are 64-bit and checked: many tokens give a size or an error, never a wrapped number.
#[test]
fn huge_sizes_are_sized_or_refused() {
    let recipe = Recipe::new("mixtral", RouterConfig::mixtral(8, 2));
    let cpu = Cpu::new();
    let layer = recipe.layer(&cpu, DType::F32);
    let bytes = layer.workspace_size(&cpu, 1 << 30).unwrap();
    assert!(bytes > (1 << 30) * 2 * 67 * 4, "{bytes}");
    for tokens in [1 << 31, 1 << 40, usize::MAX / 2, usize::MAX] {
        let error = layer.workspace_size(&cpu, tokens).unwrap_err();
        assert!(matches!(error, Error::Overflow { .. }), "{error}");
    }
}

#[test]
fn an_isa_that_the_cpu_lacks_is_an_error() {
    for isa in Isa::ALL {
        match Cpu::with_isa(isa) {
            Ok(cpu) => assert!(cpu.isa() == isa && isa.is_available()),
            Err(error) => {
                assert!(!isa.is_available());
                assert!(
                    matches!(error, Error::UnsupportedIsa { requested, .. } if requested == isa)
                );
            }
        }
    }
    assert!("avx1024".parse::<Isa>().is_err());
}
