//! Routing on the GPU against the CPU: ids equal, weights equal bit for bit, for every kind of router, every format, every kernel variant.
//!
//! Runs on a GPU, or on the emulator (`docs/gpu-testing.md`). Without either each test says that it did not run.
#![cfg(feature = "cuda")]

mod common;
#[path = "common/gpu.rs"]
mod gpu;
#[allow(dead_code)] // the CPU's tests use the rest
#[path = "routing/setups.rs"]
mod setups;

use common::{Rng, assert_same_bits, cases};
use gpu::Gpu;
use half::{bf16, f16};
use moe_kernels::cuda::routing::{
    MAX_LOGITS, MAX_TOP_K, RoutePointers, plan_route, workspace_size,
};
use moe_kernels::cuda::{DeviceInfo, DevicePtr};
use moe_kernels::routing::*;
use moe_kernels::{AnyMatRef, Cpu, DType, Error, MatRef};
use proptest::prelude::*;
use setups::Setup;

/// Words behind each output that must keep their poison.
const GUARD: usize = 33;

/// Logits in a format, and the same for both sides.
enum Encoded {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

impl Encoded {
    /// `[tokens, r]` at a row stride of `r + pad`; what is between rows is NaN.
    fn new(values: &[f32], r: usize, pad: usize, dtype: DType) -> Self {
        let mut padded = Vec::new();
        for row in values.chunks_exact(r) {
            padded.extend_from_slice(row);
            padded.extend(vec![f32::NAN; pad]);
        }
        match dtype {
            DType::F32 => Self::F32(padded),
            DType::F16 => Self::F16(padded.iter().map(|&x| f16::from_f32(x)).collect()),
            _ => Self::BF16(padded.iter().map(|&x| bf16::from_f32(x)).collect()),
        }
    }

    fn matrix(&self, tokens: usize, r: usize, pad: usize) -> AnyMatRef<'_> {
        match self {
            Self::F32(v) => MatRef::with_strides(v, tokens, r, r + pad, 1)
                .unwrap()
                .into(),
            Self::F16(v) => MatRef::with_strides(v, tokens, r, r + pad, 1)
                .unwrap()
                .into(),
            Self::BF16(v) => MatRef::with_strides(v, tokens, r, r + pad, 1)
                .unwrap()
                .into(),
        }
    }

    fn upload(&self, gpu: &Gpu) -> gpu::Buffer<u8> {
        match self {
            Self::F32(v) => gpu.upload(bytemuck::cast_slice(v)),
            Self::F16(v) => gpu.upload(bytemuck::cast_slice(v)),
            Self::BF16(v) => gpu.upload(bytemuck::cast_slice(v)),
        }
    }
}

/// What a call answers.
#[derive(Debug)]
struct Answer {
    ids: Vec<i32>,
    weights: Vec<f32>,
    shared: Vec<f32>,
}

fn on_cpu(setup: &Setup, dtype: DType, pad: usize) -> Answer {
    let (t, r) = (setup.tokens, setup.config.num_logits());
    let logits = Encoded::new(&setup.logits, r, pad, dtype);
    let noise = Encoded::new(&setup.noise_logits, r, pad, dtype);
    let mut input = RouteInput::new(logits.matrix(t, r, pad)).position(1000);
    if setup.config.noise_seed.is_some() {
        input = input.noise_logits(noise.matrix(t, r, pad));
    }
    if setup.config.selection == Selection::Given {
        input = input.given_ids(&setup.given_ids);
    }
    let mut routing = Routing::new();
    setup
        .router()
        .route(&Cpu::new(), &input, &mut routing)
        .expect(setup.name);
    Answer {
        ids: routing.ids().to_vec(),
        weights: routing.weights().to_vec(),
        shared: routing.shared_weights().to_vec(),
    }
}

/// Output memory, poisoned, with a guard behind it.
fn poisoned(gpu: &Gpu, len: usize) -> gpu::Buffer<u32> {
    gpu.filled(len + GUARD, 0xa5)
}

/// The first `len` words of an output, whose guard must be whole.
fn unguarded<T: bytemuck::Pod>(gpu: &Gpu, buffer: &gpu::Buffer<u32>, len: usize) -> Vec<T> {
    let words = gpu.download(buffer);
    assert!(
        words[len..].iter().all(|&w| w == 0xa5a5_a5a5),
        "written beyond the end"
    );
    bytemuck::cast_slice(&words[..len]).to_vec()
}

/// Routes `tokens` tokens on the GPU, the first at row `first` of the logits.
fn on_gpu_from(
    gpu: &Gpu,
    setup: &Setup,
    dtype: DType,
    pad: usize,
    first: usize,
    tokens: usize,
) -> Answer {
    let (r, slots) = (setup.config.num_logits(), setup.config.slots());
    let rows = |v: &[f32]| match v.len() {
        0 => Vec::new(),
        _ => v[first * r..(first + tokens) * r].to_vec(),
    };
    let logits = Encoded::new(&rows(&setup.logits), r, pad, dtype).upload(gpu);
    let noise = Encoded::new(&rows(&setup.noise_logits), r, pad, dtype).upload(gpu);
    let bias = gpu.upload(&setup.bias);
    let scale = gpu.upload(&setup.per_expert_scale);
    let given = match setup.given_ids.len() {
        0 => Vec::new(),
        _ => setup.given_ids[first * slots..(first + tokens) * slots].to_vec(),
    };
    let given = gpu.upload(&given);
    let ids = poisoned(gpu, tokens * slots);
    let weights = poisoned(gpu, tokens * slots);
    let shared = poisoned(gpu, tokens * setup.config.joint_shared);
    let bytes = workspace_size(&setup.config, tokens).expect(setup.name);
    let workspace = poisoned(gpu, bytes / 4);
    let some = |ptr: DevicePtr, wanted| if wanted { ptr } else { DevicePtr::NULL };
    let pointers = RoutePointers {
        logits: logits.ptr(),
        logits_stride: (r + pad) as u64,
        noise_logits: some(noise.ptr(), setup.config.noise_seed.is_some()),
        noise_stride: (r + pad) as u64,
        correction_bias: some(bias.ptr(), bias.len() > 0),
        per_expert_scale: some(scale.ptr(), scale.len() > 0),
        given_ids: some(given.ptr(), setup.config.selection == Selection::Given),
        ids: ids.ptr(),
        weights: weights.ptr(),
        shared_weights: some(shared.ptr(), setup.config.joint_shared > 0),
        workspace: some(workspace.ptr(), bytes > 0),
    };
    let plan = plan_route(
        &setup.config,
        tokens,
        dtype,
        1000 + first as u64,
        &pointers,
        gpu.cuda.device_info(),
    )
    .expect(setup.name);
    for launch in plan.iter() {
        gpu.launch(launch);
    }
    unguarded::<u32>(gpu, &workspace, bytes / 4);
    Answer {
        ids: unguarded(gpu, &ids, tokens * slots),
        weights: unguarded(gpu, &weights, tokens * slots),
        shared: unguarded(gpu, &shared, tokens * setup.config.joint_shared),
    }
}

fn on_gpu(gpu: &Gpu, setup: &Setup, dtype: DType, pad: usize) -> Answer {
    on_gpu_from(gpu, setup, dtype, pad, 0, setup.tokens)
}

#[track_caller]
fn assert_equal(found: &Answer, expected: &Answer, what: &str) {
    assert_eq!(found.ids, expected.ids, "{what}: ids");
    assert_same_bits(&found.weights, &expected.weights, what);
    assert_same_bits(&found.shared, &expected.shared, what);
    // NaN weights have one pattern of bits, too: `assert_same_bits` would not see another.
    for w in found.weights.iter().chain(&found.shared) {
        assert!(
            !w.is_nan() || w.to_bits() == f32::NAN.to_bits(),
            "{what}: {:08x}",
            w.to_bits()
        );
    }
}

#[track_caller]
fn check(gpu: &Gpu, setup: &Setup, dtype: DType, pad: usize) {
    let what = format!(
        "{} E={} K={} T={} {dtype}",
        setup.name,
        setup.config.num_experts,
        setup.config.slots(),
        setup.tokens
    );
    let found = on_gpu(gpu, setup, dtype, pad);
    assert_equal(&found, &on_cpu(setup, dtype, pad), &what);
}

/// Replaces rows by what kernels stumble over.
fn make_adversarial(setup: &mut Setup, rng: &mut Rng) {
    let r = setup.config.num_logits();
    let special = [
        f32::NAN,
        -f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MAX,
        f32::MIN,
        f32::MIN_POSITIVE,
        f32::from_bits(1),
        -f32::from_bits(0x7f_ffff),
        -0.0,
        0.0,
        88.8,
        -104.0,
    ];
    for (t, row) in setup.logits.chunks_exact_mut(r).enumerate() {
        match t % 11 {
            0 => row.fill(f32::NAN),
            1 => row.fill(special[rng.below(special.len())]),
            2 => row
                .iter_mut()
                .for_each(|z| *z = special[rng.below(special.len())]),
            3 => row.iter_mut().for_each(|z| *z = rng.below(3) as f32 - 1.0), // ties
            4 => row[rng.below(r)] = f32::NAN,
            5 => row[rng.below(r)] = f32::INFINITY,
            6 => row.iter_mut().for_each(|z| *z *= 40.0), // softmax underflows
            7 => row.iter_mut().for_each(|z| *z = *z * 1e-3 - 120.0), // sigmoids vanish
            8 => row
                .iter_mut()
                .for_each(|z| *z = if rng.below(2) == 0 { -0.0 } else { 0.0 }),
            9 => row.iter_mut().for_each(|z| {
                *z = if rng.below(8) == 0 {
                    *z
                } else {
                    f32::NEG_INFINITY
                }
            }),
            _ => {}
        }
    }
    for (i, z) in setup.noise_logits.iter_mut().enumerate() {
        if i % 29 == 3 {
            *z = special[rng.below(special.len())];
        }
    }
}

/// (E, K, T): E at one below, at and one above each seam of the kernels: 1, 2, 4, 8 and 16 numbers a lane, then 4 and 16 numbers a thread of a block. The last
/// two are slow on the emulator and get fewer tokens there.
fn sizes(gpu: &Gpu) -> Vec<(usize, usize, usize)> {
    let few = if gpu.is_emulated() { 4 } else { 11 };
    vec![
        (1, 1, 11),
        (2, 2, 13),
        (7, 3, 14),
        (8, 2, 25),
        (31, 8, 12),
        (32, 4, 12),
        (33, 33, 12),
        (64, 6, 30),
        (65, 64, 11),
        (128, 8, 25),
        (129, 40, 11),
        (160, 6, 11),
        (256, 8, 12),
        (257, 12, 11),
        (384, 8, 11),
        (512, 10, 11),
        (513, 8, 11),
        (1000, 16, 11),
        (1025, 64, few),
        (4096, 8, few),
    ]
}

#[test]
fn every_router_at_every_width_gives_the_bits_of_the_cpu() {
    let Some(gpu) = gpu::open() else { return };
    let mut rng = Rng(5);
    for (i, (e, k, tokens)) in sizes(&gpu).into_iter().enumerate() {
        for setup in setups::all(100 + i as u64, e, k, tokens, 2.0) {
            if setup.config.num_logits() > MAX_LOGITS {
                continue; // with null experts or shared ones: refused, see below
            }
            let dtype = DType::ALL[rng.below(3)];
            check(&gpu, &setup, dtype, rng.below(2) * 3);
        }
    }
}

#[test]
fn bad_logits_give_the_bits_of_the_cpu() {
    let Some(gpu) = gpu::open() else { return };
    let mut rng = Rng(6);
    for (i, (e, k, tokens)) in sizes(&gpu).into_iter().enumerate() {
        for mut setup in setups::all(200 + i as u64, e, k, tokens, 2.0) {
            if setup.config.num_logits() > MAX_LOGITS {
                continue;
            }
            make_adversarial(&mut setup, &mut rng);
            check(&gpu, &setup, DType::F32, 0);
        }
    }
}

#[test]
fn many_tokens_meet_in_capacity_and_expert_choice() {
    let Some(gpu) = gpu::open() else { return };
    for setup in setups::all(31, 12, 3, 300, 1.0) {
        if setup.looks_across() {
            check(&gpu, &setup, DType::F32, 0);
        }
    }
    // Ties: who is served first is decided by position alone.
    for mut setup in setups::all(32, 6, 2, 270, 1.0) {
        if setup.looks_across() {
            setup
                .logits
                .iter_mut()
                .for_each(|z| *z = (*z * 2.0).round());
            check(&gpu, &setup, DType::BF16, 1);
        }
    }
}

#[test]
fn a_token_alone_has_the_bits_that_it_has_in_any_batch() {
    let Some(gpu) = gpu::open() else { return };
    for setup in setups::all(41, 70, 5, 9, 2.0)
        .iter()
        .filter(|s| !s.looks_across())
    {
        let batch = on_gpu(&gpu, setup, DType::F32, 0);
        let (k, shared) = (setup.config.slots(), setup.config.joint_shared);
        for t in [0, 4, 8] {
            let alone = on_gpu_from(&gpu, setup, DType::F32, 0, t, 1);
            let expected = Answer {
                ids: batch.ids[t * k..][..k].to_vec(),
                weights: batch.weights[t * k..][..k].to_vec(),
                shared: batch.shared[t * shared..][..shared].to_vec(),
            };
            assert_equal(&alone, &expected, &format!("{} token {t}", setup.name));
        }
    }
}

/// Each finite f16 and bf16, each NaN: what a router with score Identity reports of its own logits.
#[test]
fn every_16_bit_number_is_widened_as_on_the_cpu() {
    let Some(gpu) = gpu::open() else { return };
    for dtype in [DType::F16, DType::BF16] {
        let mut setup = setups::all(1, 4096, 1, 16, 1.0)
            .into_iter()
            .find(|s| s.name == "dense")
            .unwrap();
        setup.config.score = Score::Identity;
        setup.per_expert_scale.clear();
        setup.logits = (0..=u16::MAX)
            .map(|b| match dtype {
                DType::F16 => f16::from_bits(b).to_f32(),
                _ => bf16::from_bits(b).to_f32(),
            })
            .collect();
        check(&gpu, &setup, dtype, 0);
    }
}

/// sigmoid, √softplus, tanh (softcap of 1), and normal·softplus + z, each of many bit patterns: dense routers report them one by one.
#[test]
fn functions_have_the_bits_of_the_cpu() {
    let Some(gpu) = gpu::open() else { return };
    let mut rng = Rng(77);
    let dense = |change: &dyn Fn(&mut RouterConfig)| {
        let mut config = RouterConfig::dense(4096);
        change(&mut config);
        config
    };
    let configs = [
        ("sigmoid", dense(&|c| c.score = Score::Sigmoid)),
        ("sqrt softplus", dense(&|c| c.score = Score::SqrtSoftplus)),
        (
            "tanh",
            dense(&|c| {
                c.score = Score::Identity;
                c.logit_softcap = 1.0;
            }),
        ),
        (
            "noise",
            dense(&|c| {
                c.score = Score::Identity;
                c.noise_seed = Some(0xfeed_f00d_dead_beef);
            }),
        ),
        ("exp", dense(&|c| c.score = Score::Softmax)),
    ];
    let tokens = if gpu.is_emulated() { 32 } else { 512 };
    for (name, config) in configs {
        let mut any = |scale: f32| -> Vec<f32> {
            (0..tokens * 4096)
                .map(|i| match i % 3 {
                    0 if name != "exp" => f32::from_bits(rng.next_u64() as u32),
                    1 => rng.normal() * scale,
                    _ => rng.normal() * 20.0,
                })
                .collect()
        };
        let setup = Setup {
            name,
            noise_logits: if config.noise_seed.is_some() {
                any(0.1)
            } else {
                vec![]
            },
            logits: any(0.5),
            config,
            bias: vec![],
            per_expert_scale: vec![],
            tokens,
            given_ids: vec![],
        };
        check(&gpu, &setup, DType::F32, 0);
    }
}

#[test]
fn given_ids_out_of_range_count_as_dropped() {
    let Some(gpu) = gpu::open() else { return };
    let mut setup = setups::all(9, 8, 3, 40, 1.0)
        .into_iter()
        .find(|s| s.name == "deepseek_v4 given")
        .unwrap();
    let mut clean = setup.given_ids.clone();
    for (i, id) in setup.given_ids.iter_mut().enumerate() {
        if let Some(bad) = [8, i32::MAX, -2, i32::MIN].get(i % 7) {
            *id = *bad;
            clean[i] = DROPPED;
        }
    }
    let found = on_gpu(&gpu, &setup, DType::F32, 0);
    setup.given_ids = clean;
    assert_equal(&found, &on_cpu(&setup, DType::F32, 0), "given");
}

/// A config of any combination of fields.
fn any_config() -> impl Strategy<Value = RouterConfig> {
    let e = prop_oneof![
        1usize..=9,
        30usize..=34,
        60usize..=68,
        Just(96),
        Just(128),
        Just(130),
        Just(256)
    ];
    let scores = prop::sample::select(vec![
        Score::Softmax,
        Score::Sigmoid,
        Score::SqrtSoftplus,
        Score::Identity,
    ]);
    let renorms = prop::sample::select(vec![
        Renorm::None,
        Renorm::Sum,
        Renorm::SumPlusEps(1e-20),
        Renorm::SumClampMin(1e-3),
        Renorm::PNorm(1.0),
        Renorm::PNorm(2.0),
        Renorm::PNorm(0.7),
    ]);
    let selection = (
        any::<bool>(),
        any::<u32>(),
        any::<bool>(),
        any::<bool>(),
        0u8..8,
    );
    let capacity = prop::option::weighted(
        0.25,
        (
            0usize..6,
            prop::option::of(1usize..12),
            any::<bool>(),
            any::<bool>(),
        ),
    );
    let logit = (
        prop_oneof![3 => Just(1.0f32), 1 => -2.0f32..2.0],
        prop_oneof![3 => Just(0.0f32), 1 => 0.1f32..30.0],
        prop::option::weighted(0.2, any::<u64>()),
    );
    (
        e,
        1usize..12,
        scores,
        renorms,
        selection,
        capacity,
        logit,
        0u8..6,
        -2.0f32..3.0,
    )
        .prop_map(
            |(
                e,
                k,
                score,
                renorm,
                (by_logit, groups, top2, zero, kind),
                capacity,
                logit,
                nulls,
                scale,
            )| {
                let mut config = RouterConfig::new(e, k.min(e));
                config.score = score;
                config.renorm = renorm;
                config.scale = scale;
                config.null_experts = match nulls {
                    0 => NullExperts::Identity(1 + e / 2),
                    1 => NullExperts::Zero(2),
                    _ => NullExperts::None,
                };
                if nulls == 2 {
                    config.weights = WeightSource::SoftmaxSelectedLogits;
                }
                if nulls == 3 {
                    config.score = Score::Sigmoid;
                    config.renorm = Renorm::None;
                    config.weights = WeightSource::JointWithShared;
                    config.joint_shared = 1 + groups as usize % 40;
                }
                (
                    config.logit_multiplier,
                    config.logit_softcap,
                    config.noise_seed,
                ) = logit;
                config.capacity = capacity.map(
                    |(per_expert, scope_tokens, batch_prioritized, normalize_before_drop)| {
                        Capacity {
                            per_expert,
                            scope_tokens,
                            batch_prioritized,
                            normalize_before_drop,
                        }
                    },
                );
                let n = config.selectable();
                let divisors: Vec<usize> = (1..=n).filter(|d| n.is_multiple_of(*d)).collect();
                let n_group = divisors[groups as usize % divisors.len()];
                let limit = GroupLimit {
                    n_group,
                    topk_group: 1 + (groups >> 16) as usize % n_group,
                    score: if top2 {
                        GroupScore::Top2Sum
                    } else {
                        GroupScore::Max
                    },
                    fill: if zero {
                        MaskedFill::Zero
                    } else {
                        MaskedFill::NegInf
                    },
                };
                config.selection = match kind {
                    0 => Selection::Given,
                    1 => Selection::ProductKeys { stacked: top2 },
                    2 => Selection::SparseMixer {
                        jitter_eps: 0.01 + scale.abs() * 0.1,
                    },
                    3 => Selection::ExpertChoice {
                        per_expert: 1 + groups as usize % 9,
                    },
                    4 => Selection::Dense,
                    _ => Selection::TopK {
                        rank_by: if by_logit {
                            RankBy::Logit
                        } else {
                            RankBy::Score
                        },
                        groups: (groups % 2 == 0).then_some(limit),
                    },
                };
                if kind == 2 {
                    config.top_k = 2;
                }
                config
            },
        )
        .prop_filter("combinations that no model defines", |c| {
            c.validate().is_ok() && workspace_size(c, 1).is_ok()
        })
}

/// Any router with logits from `strategies` (ordinary, tied, extreme rows), bias and scales.
fn any_setup() -> impl Strategy<Value = Setup> {
    (any_config(), 1usize..14, any::<u64>()).prop_flat_map(|(config, tokens, seed)| {
        let r = config.num_logits();
        prop::collection::vec(logit_row(r), tokens).prop_map(move |rows| {
            let mut rng = Rng(seed);
            let ranks = matches!(
                config.selection,
                Selection::TopK { .. } | Selection::ProductKeys { .. }
            );
            let mut normals = |n: usize, wanted: bool| if wanted { rng.normals(n) } else { vec![] };
            let bias = normals(config.selectable(), ranks && seed % 3 == 0);
            let per_expert_scale = normals(config.num_experts, seed % 5 == 0);
            let noise_logits = normals(tokens * r, config.noise_seed.is_some());
            let given = config.selection == Selection::Given;
            Setup {
                name: "any",
                bias: bias
                    .iter()
                    .map(|b| if *b > 1.5 { f32::NEG_INFINITY } else { *b })
                    .collect(),
                per_expert_scale,
                tokens,
                logits: rows.concat(),
                noise_logits,
                given_ids: if given {
                    setups::given_ids(&mut rng, &config, tokens)
                } else {
                    vec![]
                },
                config: config.clone(),
            }
        })
    })
}

/// One token's logits: ordinary numbers, ties, extremes, one number everywhere. (As in `moe_kernels::strategies`, which is behind a feature.)
fn logit_row(r: usize) -> BoxedStrategy<Vec<f32>> {
    let special = prop::sample::select(vec![
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MAX,
        f32::MIN,
        f32::from_bits(1),
        -0.0,
        88.8,
        -104.0,
    ])
    .boxed();
    let tied = (-4i8..=4).prop_map(|n| f32::from(n) / 4.0).boxed();
    let ordinary = (-20.0f32..20.0).boxed();
    let mixed = prop_oneof![3 => ordinary.clone(), 1 => special.clone()].boxed();
    let row = move |element: BoxedStrategy<f32>| prop::collection::vec(element, r);
    prop_oneof![
        4 => row(ordinary),
        3 => row(tied),
        2 => row(mixed),
        1 => special.prop_map(move |z| vec![z; r]),
    ]
    .boxed()
}

#[test]
fn any_router_gives_the_bits_of_the_cpu() {
    let Some(gpu) = gpu::open() else { return };
    let mut runner = proptest::test_runner::TestRunner::new(cases(150));
    let dtype = prop::sample::select(DType::ALL.to_vec());
    runner
        .run(&(any_setup(), dtype, 0usize..3), |(setup, dtype, pad)| {
            check(&gpu, &setup, dtype, pad);
            Ok(())
        })
        .unwrap();
}

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
