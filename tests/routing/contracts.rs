//! What holds whatever the logits are: ids in range and distinct, bad rows harm no other, nothing depends on what a buffer held before.

use crate::assert_equal;
use crate::common::{Rng, assert_same_bits, cpus};
use crate::setups::{self, Setup};
use half::{bf16, f16};
use moe_kernels::reference;
use moe_kernels::routing::*;
use moe_kernels::{Cpu, MatMut, MatRef};
use proptest::prelude::*;

/// Ids are distinct and in range, dropped pairs weigh 0, and the permutation has a row for each pair of an expert.
fn assert_valid(setup: &Setup, routing: &Routing) {
    let config = &setup.config;
    let slots = config.slots();
    let name = setup.name;
    assert_eq!(routing.ids().len(), setup.tokens * slots, "{name}");
    assert_eq!(routing.weights().len(), setup.tokens * slots, "{name}");
    assert_eq!(
        routing.shared_weights().len(),
        setup.tokens * config.joint_shared,
        "{name}"
    );
    let dropping = config.capacity.is_some()
        || matches!(
            config.selection,
            Selection::Given | Selection::ExpertChoice { .. }
        );
    for ids in routing.ids().chunks(slots) {
        let mut kept: Vec<i32> = ids.iter().copied().filter(|&id| id != DROPPED).collect();
        assert!(dropping || kept.len() == slots, "{name}: {ids:?}");
        kept.sort_unstable();
        assert!(kept.windows(2).all(|w| w[0] < w[1]), "{name}: {ids:?}");
        assert!(
            kept.iter()
                .all(|id| (0..config.selectable() as i32).contains(id)),
            "{name}: {ids:?}"
        );
    }
    for (&id, &w) in routing.ids().iter().zip(routing.weights()) {
        let null =
            matches!(config.null_experts, NullExperts::Zero(_)) && id >= config.num_experts as i32;
        assert!(
            !(id == DROPPED || null) || w.to_bits() == 0,
            "{name}: id {id} weighs {w}"
        );
    }
    let expected = reference::permute(routing.ids(), 0..config.num_experts, 1);
    assert_eq!(routing.permutation().offsets(), expected.offsets, "{name}");
}

const BAD: [f32; 9] = [
    f32::NAN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    -0.0,
    1e-42,
    -1e38,
    1e38,
    100.0,
    -200.0,
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn bad_logits_give_valid_ids_and_harm_no_other_row(
        seed in any::<u64>(),
        e in 1usize..70,
        k in prop_oneof![1usize..10, 17usize..70],
        share in 1usize..5,
    ) {
        let tokens = 7;
        let mut rng = Rng(seed);
        for mut setup in setups::all(seed, e, k, tokens, 1.0) {
            let clean = setup.route(&Cpu::new());
            let r = setup.config.num_logits();
            for (i, z) in setup.logits.iter_mut().enumerate() {
                // Tokens 0, 2, 4 and 6 are left alone.
                if i / r % 2 == 1 && rng.below(share) == 0 {
                    *z = BAD[rng.below(BAD.len())];
                }
            }
            let routings: Vec<Routing> = cpus().iter().map(|cpu| setup.route(cpu)).collect();
            for routing in &routings {
                assert_valid(&setup, routing);
                assert_equal(routing, &routings[0], setup.name);
            }
            if setup.looks_across() {
                continue;
            }
            let slots = setup.config.slots();
            for t in (0..tokens).step_by(2) {
                let row = t * slots..(t + 1) * slots;
                prop_assert_eq!(&routings[0].ids()[row.clone()], &clean.ids()[row.clone()]);
                assert_same_bits(&routings[0].weights()[row.clone()], &clean.weights()[row], setup.name);
            }
        }
    }
}

#[test]
fn a_row_of_nan_takes_the_first_experts_with_weights_nan() {
    for mut setup in setups::all(5, 24, 6, 3, 1.0) {
        let r = setup.config.num_logits();
        setup.logits[r..2 * r].fill(f32::NAN);
        let ranked = matches!(
            setup.config.selection,
            Selection::TopK { .. }
                | Selection::SparseMixer { .. }
                | Selection::ProductKeys { stacked: false }
        );
        if !ranked || setup.config.capacity.is_some() {
            continue;
        }
        for cpu in cpus() {
            let routing = setup.route(&cpu);
            let k = setup.config.top_k;
            assert!(
                routing.ids()[k..2 * k].iter().copied().eq(0..k as i32),
                "{}",
                setup.name
            );
            assert!(
                routing.weights()[k..2 * k].iter().all(|w| w.is_nan()),
                "{}",
                setup.name
            );
            let others = routing.weights()[..k]
                .iter()
                .chain(&routing.weights()[2 * k..]);
            assert!(others.into_iter().all(|w| !w.is_nan()), "{}", setup.name);
        }
    }
}

/// With NegInf, experts outside the best groups rank below NaN; with Zero they beat a negative value.
/// −f32::MAX is what many frameworks mask with. It ranks above −∞ and NaN, also where it is the K-th best.
#[test]
fn the_lowest_finite_logit_is_a_choice_like_any_other() {
    for cpu in cpus() {
        for config in [RouterConfig::gpt_oss(3, 2), RouterConfig::llama4(3, 2)] {
            let router = Router::new(config).unwrap();
            let logits = [
                f32::MIN,
                1.0,
                f32::NEG_INFINITY,
                f32::NAN,
                f32::MIN,
                f32::MIN,
            ];
            let input = RouteInput::new(MatRef::new(&logits, 2, 3).unwrap());
            let mut routing = Routing::new();
            router.route(&cpu, &input, &mut routing).unwrap();
            assert_eq!(routing.ids(), [1, 0, 1, 2], "{}", cpu.isa());
        }
    }
}

#[test]
fn masked_experts_rank_as_documented() {
    let route = |config: RouterConfig, bias: &[f32], logits: &[f32]| {
        let router = Router::new(config)
            .unwrap()
            .with_correction_bias(bias)
            .unwrap();
        let mut routing = Routing::new();
        let input = RouteInput::new(MatRef::new(logits, 1, logits.len()).unwrap());
        router.route(&Cpu::new(), &input, &mut routing).unwrap();
        routing.ids().to_vec()
    };
    // Two groups of three; group 1 wins by its best two. Its third is NaN, and still before anything of group 0.
    let logits = [0.0, 1.0, 2.0, 9.0, f32::NAN, 8.0];
    let sigmoid = RouterConfig::deepseek_v3(6, 3, 2, 1, 1.0);
    assert_eq!(route(sigmoid.clone(), &[0.0; 6], &logits), [3, 5, 4]);
    // Filled with 0, the first masked expert beats the kept one whose score + bias is negative; NaN comes after all.
    let mut zero = sigmoid;
    if let Selection::TopK {
        groups: Some(groups),
        ..
    } = &mut zero.selection
    {
        groups.fill = MaskedFill::Zero;
    }
    assert_eq!(
        route(
            zero,
            &[0.0, 0.0, 0.0, 0.0, 0.0, -3.0],
            &[0.0, 1.0, 2.0, 99.0, 99.0, 0.0]
        ),
        [3, 4, 0]
    );
    // Equal groups: the lower one, and inside it the lower expert.
    let v3 = RouterConfig::deepseek_v3(6, 2, 3, 1, 1.0);
    assert_eq!(
        route(v3, &[0.0; 6], &[1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        [0, 1]
    );
}

#[test]
fn a_bias_of_minus_infinity_switches_an_expert_off_while_others_are_left() {
    let off = f32::NEG_INFINITY;
    let router = Router::new(RouterConfig::minimax_m2(4, 3)).unwrap();
    let router = router.with_correction_bias(&[0.0, off, 0.0, 0.0]).unwrap();
    let mut routing = Routing::new();
    let logits = [1.0, 9.0, f32::NEG_INFINITY, 2.0];
    router
        .route(
            &Cpu::new(),
            &RouteInput::new(MatRef::new(&logits, 1, 4).unwrap()),
            &mut routing,
        )
        .unwrap();
    assert_eq!(routing.ids(), [3, 0, 2]);
}

/// Buffers of other routers, of more and fewer tokens, leave no trace.
#[test]
fn a_reused_routing_equals_a_fresh_one() {
    let mut reused = Routing::new();
    for (seed, tokens) in [(1, 20), (2, 3), (3, 0), (4, 33), (5, 1)] {
        for setup in setups::all(seed, 36, 5, tokens, 1.0) {
            for cpu in cpus() {
                let input = setup.input(0, tokens);
                let fresh = setup.route(&cpu);
                setup.router().route(&cpu, &input, &mut reused).unwrap();
                assert_equal(&reused, &fresh, setup.name);
                assert_valid(&setup, &reused);
                // The same call once more, and after ids of other sizes.
                setup.router().route(&cpu, &input, &mut reused).unwrap();
                assert_equal(&reused, &fresh, setup.name);
                let given = GivenRouting::new(9, 2, &[1, 8, 3, 3], &[0.5; 4]);
                reused.set_given(&cpu, &given).unwrap();
                setup.router().route(&cpu, &input, &mut reused).unwrap();
                assert_equal(&reused, &fresh, setup.name);
                assert_valid(&setup, &reused);
            }
        }
    }
}

/// Logits in f16 and bf16 widen exactly; strides do not matter.
#[test]
fn formats_and_strides_of_logits() {
    let (tokens, e) = (9, 37);
    let router = Router::new(RouterConfig::mixtral(e, 5)).unwrap();
    let z = Rng(8).normals(tokens * e);
    let transposed: Vec<f32> = (0..z.len())
        .map(|i| z[i % tokens * e + i / tokens])
        .collect();
    let (half, brain): (Vec<f16>, Vec<bf16>) = z
        .iter()
        .map(|&x| (f16::from_f32(x), bf16::from_f32(x)))
        .unzip();
    let (half_wide, brain_wide): (Vec<f32>, Vec<f32>) = half
        .iter()
        .zip(&brain)
        .map(|(h, b)| (h.to_f32(), b.to_f32()))
        .unzip();
    for cpu in cpus() {
        let route = |input: RouteInput<'_>| {
            let mut routing = Routing::new();
            router.route(&cpu, &input, &mut routing).unwrap();
            routing
        };
        let plain = |z: &[f32]| route(RouteInput::new(MatRef::new(z, tokens, e).unwrap()));
        let strided = MatRef::new(&transposed, e, tokens).unwrap().transposed();
        assert_equal(&route(RouteInput::new(strided)), &plain(&z), "transposed");
        let f16 = route(RouteInput::new(MatRef::new(&half, tokens, e).unwrap()));
        assert_equal(&f16, &plain(&half_wide), "f16");
        let bf16 = route(RouteInput::new(MatRef::new(&brain, tokens, e).unwrap()));
        assert_equal(&bf16, &plain(&brain_wide), "bf16");
    }
}

/// Multiplier and softcap against the oracle; noise by what is known about it.
#[test]
fn effective_logits() {
    let (tokens, e) = (3, 41);
    let z = Rng(2).normals(tokens * e);
    let logits = MatRef::new(&z, tokens, e).unwrap();
    for cpu in cpus() {
        let effective = |config: &RouterConfig, input: &RouteInput<'_>| {
            let mut out = vec![f32::NAN; tokens * e];
            let router = Router::new(config.clone()).unwrap();
            router
                .effective_logits_into(&cpu, input, MatMut::new(&mut out, tokens, e).unwrap())
                .unwrap();
            out
        };
        let plain = RouterConfig::mixtral(e, 2);
        let input = RouteInput::new(logits);
        assert_same_bits(&effective(&plain, &input), &z, "nothing to do");
        let mut config = plain.clone();
        (config.logit_multiplier, config.logit_softcap) = (0.7, 1.5);
        let mut spec = reference::RouterSpec::top_k(e, 2);
        (spec.logit_mul, spec.logit_softcap) = (f64::from(0.7f32), 1.5);
        let wide: Vec<f64> = z.iter().map(|&x| x.into()).collect();
        for (found, expected) in effective(&config, &input)
            .iter()
            .zip(reference::finish_logits(&spec, &wide, &[]))
        {
            // Multiplied, divided, tanh (2 ulp), multiplied.
            assert!(
                (f64::from(*found) - expected).abs() <= 6.0 / (1 << 24) as f64 * expected.abs(),
                "{found} {expected}"
            );
        }
        // softplus(−∞) = 0: no noise. softplus(ln(e − 1)) = 1: the normals themselves, which differ by seed and by position alone.
        let (still, one) = (
            vec![f32::NEG_INFINITY; z.len()],
            vec![0.541_324_85f32; z.len()],
        );
        let noisy = |seed, noise: &[f32], position| {
            let input = RouteInput::new(logits)
                .noise_logits(MatRef::new(noise, tokens, e).unwrap())
                .position(position);
            effective(&RouterConfig::noisy_top_k(e, 2, seed), &input)
        };
        assert_same_bits(&noisy(1, &still, 0), &z, "no noise");
        let noise: Vec<f32> = noisy(1, &one, 0)
            .iter()
            .zip(&z)
            .map(|(n, z)| n - z)
            .collect();
        let mean = noise.iter().sum::<f32>() / noise.len() as f32;
        let square = noise.iter().map(|n| n * n).sum::<f32>() / noise.len() as f32;
        assert!(
            mean.abs() < 0.5 && (0.5..2.0).contains(&square),
            "{mean} {square}"
        );
        assert_ne!(noisy(1, &one, 0), noisy(2, &one, 0));
        let moved: Vec<f32> = noisy(1, &one, 1)
            .iter()
            .zip(&z)
            .map(|(n, z)| n - z)
            .collect();
        let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
        assert!(close(&moved[..e], &noise[e..2 * e]) && !close(&moved[..e], &noise[..e]));
    }
}

#[test]
fn given_ids_and_weights_are_taken_as_they_are() {
    let mut routing = Routing::new();
    let ids = [5, 1, DROPPED, 0, 2, 6];
    let weights = [0.5, f32::NAN, 9.0, -1.0, 2.0, 3.0];
    for (null, last) in [(NullExperts::Identity(4), 3.0), (NullExperts::Zero(4), 0.0)] {
        let given = GivenRouting::new(3, 2, &ids, &weights).null_experts(null);
        routing.set_given(&Cpu::new(), &given).unwrap();
        assert_eq!(
            (routing.tokens(), routing.slots(), routing.num_experts()),
            (3, 2, 3)
        );
        assert_eq!(routing.ids(), ids);
        let first = if null == NullExperts::Zero(4) {
            0.0
        } else {
            0.5
        };
        assert_same_bits(
            routing.weights(),
            &[first, f32::NAN, 0.0, -1.0, 2.0, last],
            "given",
        );
        assert_eq!(routing.permutation().offsets(), [0, 1, 2, 3]);
    }
}

/// Masks are often the least finite number. Below it there is −∞ and then NaN, where the batch kernel once looked for candidates and found none: experts came
/// twice. (Found by the fuzz target `routing`.)
#[test]
fn experts_masked_by_the_least_finite_number_are_still_distinct() {
    let configs = [
        RouterConfig::gpt_oss(40, 4),
        RouterConfig::olmoe(40, 4),
        RouterConfig::mixtral(40, 4),
        RouterConfig::llama4(40, 4),
        RouterConfig::minimax_m2(40, 4),
    ];
    for cpu in cpus() {
        for config in &configs {
            for open in [0, 1, 2, 5] {
                let mut logits = vec![f32::MIN; 40];
                for (i, z) in logits.iter_mut().rev().take(open).enumerate() {
                    *z = i as f32;
                }
                let router = Router::new(config.clone()).unwrap();
                let mut routing = Routing::new();
                let input = RouteInput::new(MatRef::new(&logits, 1, 40).unwrap());
                router.route(&cpu, &input, &mut routing).unwrap();
                // By logit and by score alike: the open ones from the last of them on, then the lowest indices.
                let expected: Vec<i32> = (40 - open as i32..40).chain(0..4).take(4).collect();
                assert_eq!(routing.ids(), expected, "{config:?}, {open} open, {cpu:?}");
                let all_equal = open == 0 && config.renorm == Renorm::None;
                let even = match config.weights {
                    WeightSource::SoftmaxSelectedLogits => 0.25,
                    _ => 1.0 / 40.0,
                };
                if all_equal && config.score == Score::Softmax {
                    assert!(
                        routing.weights().iter().all(|w| (w - even).abs() < 1e-6),
                        "{:?}",
                        routing.weights()
                    );
                }
            }
        }
    }
}
