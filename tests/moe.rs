//! The contracts of the whole layer: the same bits on every ISA (D3), for every thread count and run (D1), and in any batch (D2).

mod common;

use common::layers::{Recipe, recipes};
use common::{Rng, assert_same_bits, cases, cpus, hash_bits, with_threads};
use half::{bf16, f16};
use moe_kernels::moe::{Forward, MoeLayer, RouteFrom};
use moe_kernels::routing::{GivenRouting, RouterConfig, Routing};
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

#[test]
fn a_token_has_the_same_bits_alone_and_at_every_position_of_a_batch() {
    const BATCH: usize = 300;
    for recipe in recipes() {
        let hidden = recipe.hidden;
        for cpu in cpus() {
            if cpu.isa() == Isa::Scalar && recipe.name != "mixtral" {
                continue; // the ISAs agree bit for bit (above); the slow one need not repeat it all
            }
            let layer = recipe.layer(&cpu, DType::BF16);
            let mut rng = Rng(3);
            let token = rng.normals(hidden);
            let mut x = rng.normals(BATCH * hidden);
            // Every position of one recipe; emulators, which set `PROPTEST_CASES`, want fewer.
            let positions = cases(BATCH as u32).cases.max(1) as usize;
            let every =
                BATCH.div_ceil(positions.min(if recipe.name == "mixtral" { BATCH } else { 13 }));
            for position in (0..BATCH).step_by(every) {
                let saved = x[position * hidden..][..hidden].to_vec();
                x[position * hidden..][..hidden].copy_from_slice(&token);
                let y = run(&cpu, &layer, &x, 0);
                // Noise belongs to a position; nothing else does.
                let alone = run(&cpu, &layer, &token, position as u64);
                let what = format!("{} {} at {position}", recipe.name, cpu.isa());
                assert_same_bits(&y[position * hidden..][..hidden], &alone, &what);
                x[position * hidden..][..hidden].copy_from_slice(&saved);
            }
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

/// Two layers with half of the experts each add up to the whole (expert parallelism), up to the order of the sum.
#[test]
fn expert_ranges_add_up() {
    let recipe = Recipe::new("mixtral", RouterConfig::mixtral(8, 3));
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
    if cpu.isa() != Isa::Scalar {
        let other = Cpu::with_isa(Isa::Scalar).unwrap();
        let mut y = vec![7.5f32; 3 * hidden];
        let error = layer
            .forward(
                &other,
                mat(3, hidden),
                MatMut::new(&mut y, 3, hidden).unwrap().into(),
                &mut Routing::new(),
                &mut vec![0; enough.max(layer.workspace_size(&other, 3).unwrap())],
            )
            .unwrap_err();
        assert!(matches!(error, Error::PackedFor { .. }), "{error}");
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
