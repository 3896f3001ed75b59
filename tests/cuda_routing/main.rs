//! Routing on the GPU against the CPU: ids equal, weights equal bit for bit, for every kind of router, every format, every kernel variant.
//!
//! Runs on a GPU, or on the emulator (`docs/gpu-testing.md`). Without either each test says that it did not run.
#![cfg(feature = "cuda")]

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/gpu.rs"]
mod gpu;
#[path = "../../src/strategies/rows.rs"]
mod rows;
#[allow(dead_code)] // the CPU's tests use the rest
#[path = "../routing/setups.rs"]
mod setups;

mod any;
mod plans;
mod sides;

use any::any_setup;
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
use rows::{SPECIAL, logit_row};
use setups::Setup;
use sides::*;

/// Replaces rows by what kernels stumble over.
fn make_adversarial(setup: &mut Setup, rng: &mut Rng) {
    let r = setup.config.num_logits();
    let special = |rng: &mut Rng| SPECIAL[rng.below(SPECIAL.len())];
    for (t, row) in setup.logits.chunks_exact_mut(r).enumerate() {
        match t % 11 {
            0 => row.fill(f32::NAN),
            1 => row.fill(special(rng)),
            2 => row.iter_mut().for_each(|z| *z = special(rng)),
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
            *z = special(rng);
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
