//! The grouped product on Hopper against f64: on a GPU, or on the emulator (`scripts/emulate-cuda.sh`), whose answer depends on a seed
//! (`MOE_EMULATED_SEED`) that shuffles threads and delays copies, products and barriers.
#![cfg(feature = "cuda")]

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/gpu.rs"]
mod gpu;

mod case;
mod expected;
mod on_gpu;
mod plans;

use case::*;
use common::product::{activations, bytes, numbers, rounded};
use common::{Rng, assert_same_bits};
use expected::*;
use gpu::{Buffer, Gpu};
use moe_kernels::cuda::grouped_gemm::params::{ActivationParams, Flags, GroupedGemmParams};
use moe_kernels::cuda::grouped_gemm::sm80::plan_grouped_gemm_sm80;
use moe_kernels::cuda::grouped_gemm::sm90::{
    CLUSTER_ROWS, TILE_COLUMNS, TILE_K, TILE_ROWS, cluster_for, plan_grouped_gemm_sm90,
    plan_with_cluster,
};
use moe_kernels::cuda::{DeviceInfo, DevicePtr, Launch};
use moe_kernels::grouped_gemm::Activation;
use moe_kernels::reference::{self, MlpSpec};
use moe_kernels::{DType, Error};
use on_gpu::*;

/// The device, if it is a Hopper.
fn hopper() -> Option<Gpu> {
    let gpu = gpu::open()?;
    if gpu.cuda.device_info().compute_capability == (9, 0) {
        return Some(gpu);
    }
    let required = std::env::var("MOE_KERNELS_REQUIRE").unwrap_or_default();
    assert!(
        !required.split(',').any(|word| word.trim() == "sm_90"),
        "a Hopper GPU is required"
    );
    eprintln!(
        "NOT RUN: compute capability {:?}, not 9.0",
        gpu.cuda.device_info().compute_capability
    );
    None
}

fn run_and_check(gpu: &Gpu, case: &Case) -> Vec<f32> {
    let data = Data::new(case);
    let found = run(gpu, case, &data);
    check(case, &data, &found);
    found
}

#[test]
fn one_tile() {
    let Some(gpu) = hopper() else { return };
    run_and_check(&gpu, &Case::plain(&[TILE_ROWS], TILE_COLUMNS, TILE_K));
    run_and_check(&gpu, &Case::gated(&[TILE_ROWS], TILE_COLUMNS / 2, TILE_K));
}

/// The same data through Hopper's kernels and through those of Ampere, on one device.
///
/// Products of 16-bit numbers are exact in f32, so both kernels compute Σ a·w with one error for each of the K additions and none else, in their own order: each is within
/// γ(K + 2)·Σ|a·w| of the exact sum, with 2⁻²³ for the unit, since tensor cores may cut. That error goes through bias, activation and rounding, which are the same operations on both
/// sides, as `visit_expected` bounds it: so the two are at most twice the bound apart. f32 output shows the sums themselves.
#[test]
fn hopper_and_ampere_agree() {
    let Some(gpu) = hopper() else { return };
    for dtype in [DType::BF16, DType::F16] {
        for out in [DType::F32, dtype] {
            for (slots, activation, k) in [
                (0, None, TILE_K),
                (2, Some(Activation::SWIGLU), 5 * TILE_K + 24),
                (3, Some(Activation::GPT_OSS), 3 * TILE_K),
            ] {
                let case = Case {
                    dtype,
                    out,
                    activation,
                    slots,
                    block: 4,
                    bias: slots > 0,
                    scale: slots == 3,
                    interleaved: slots == 2,
                    ..Case::plain(&[TILE_ROWS + 1, 0, 17, 1], TILE_COLUMNS / 2 + 8, k)
                };
                let data = Data::new(&case);
                let hopper = run(&gpu, &case, &data);
                let ampere = run_planned(&gpu, &case, &data, plan_grouped_gemm_sm80);
                let what = format!("{dtype} to {out}, {slots} slots, K = {k}");
                let mut elements = 0;
                visit_expected(&case, &data, |at, _, bound| {
                    let apart = (f64::from(hopper[at]) - f64::from(ampere[at])).abs();
                    assert!(
                        apart <= 2.0 * bound,
                        "{what}: element {at} is {:e} on Hopper, {:e} on Ampere, {bound:e} twice allowed",
                        hopper[at],
                        ampere[at]
                    );
                    elements += 1;
                });
                assert_eq!(elements, case.counts.iter().sum::<usize>() * case.n);
                check(&case, &data, &ampere);
            }
        }
    }
}

/// One below, at and one above a tile's rows, an empty expert, one row; columns and k with tails; every block with several tiles.
const RAGGED: [usize; 8] = [
    TILE_ROWS + 1,
    0,
    TILE_ROWS - 1,
    1,
    TILE_ROWS,
    2 * TILE_ROWS,
    0,
    3 * TILE_ROWS - 8,
];

#[test]
fn ragged_rows_columns_and_k() {
    let Some(gpu) = hopper() else { return };
    for (cluster, sms) in [(1, 3), (2, 4)] {
        for slots in [0, 3] {
            let tails = |case: Case| Case {
                cluster,
                sms,
                slots,
                ..case
            };
            run_and_check(
                &gpu,
                &tails(Case::plain(&RAGGED, TILE_COLUMNS + 8, 2 * TILE_K + 8)),
            );
            run_and_check(
                &gpu,
                &tails(Case::gated(&RAGGED, TILE_COLUMNS / 2 + 8, TILE_K - 8)),
            );
        }
    }
}

#[test]
fn more_steps_than_stages() {
    let Some(gpu) = hopper() else { return };
    // 5 stages: one step fewer, as many, one more, and more than twice around.
    for steps in [1, 4, 5, 6, 13] {
        for (cluster, slots) in [(1, 0), (2, 2)] {
            let case = Case::gated(&[150, 3, 300], 104, steps * TILE_K);
            run_and_check(
                &gpu,
                &Case {
                    cluster,
                    sms: 2,
                    slots,
                    seed: steps as u64,
                    ..case
                },
            );
        }
    }
}

#[test]
fn an_odd_number_of_column_tiles_and_of_row_tiles() {
    let Some(gpu) = hopper() else { return };
    // The last row tile is shared out by columns; with three of them one block computes a tile outside N.
    for counts in [
        &[TILE_ROWS][..],
        &[3 * TILE_ROWS],
        &[1, 1, 5 * TILE_ROWS, 40],
    ] {
        for column_tiles in 1..4 {
            let case = Case::plain(counts, column_tiles * TILE_COLUMNS, TILE_K);
            run_and_check(
                &gpu,
                &Case {
                    cluster: 2,
                    sms: 4,
                    ..case
                },
            );
        }
    }
}

#[test]
fn more_row_tiles_than_a_band() {
    let Some(gpu) = hopper() else { return };
    // Bands of 8 row tiles, or pairs of them.
    for (cluster, tiles) in [(1, 9), (2, 17)] {
        let case = Case::plain(&[100, tiles * TILE_ROWS - 60], 2 * TILE_COLUMNS, 16);
        run_and_check(
            &gpu,
            &Case {
                cluster,
                sms: 6,
                slots: 4,
                ..case
            },
        );
    }
}

#[test]
fn every_format() {
    let Some(gpu) = hopper() else { return };
    for dtype in [DType::F16, DType::BF16] {
        for out in [dtype, DType::F32] {
            let base = Case {
                dtype,
                out,
                cluster: 2,
                ..Case::gated(&[70, 140], 136, 80)
            };
            run_and_check(&gpu, &base);
            run_and_check(
                &gpu,
                &Case {
                    activation: None,
                    slots: 0,
                    ..base
                },
            );
        }
    }
}

#[test]
fn every_activation_with_bias_and_factors() {
    let Some(gpu) = hopper() else { return };
    for (i, activation) in activations().into_iter().enumerate() {
        let case = Case {
            activation: Some(activation),
            dtype: [DType::BF16, DType::F16][i % 2],
            out: DType::F32,
            bias: true,
            scale: i % 3 == 0,
            slots: i % 4,
            seed: i as u64,
            ..Case::plain(&[33, 0, 90], 104, 40)
        };
        run_and_check(&gpu, &case);
    }
}

#[test]
fn weights_in_alternating_rows() {
    let Some(gpu) = hopper() else { return };
    for cluster in [1, 2] {
        let case = Case::gated(&[200, 90], 120, 72);
        run_and_check(
            &gpu,
            &Case {
                interleaved: true,
                bias: true,
                cluster,
                ..case
            },
        );
    }
}

#[test]
fn rows_of_padding_are_neither_seen_nor_written() {
    let Some(gpu) = hopper() else { return };
    for (cluster, slots) in [(1, 0), (2, 0), (2, 2)] {
        let case = Case::plain(&[5, 0, 64, 130], 64, 64);
        run_and_check(
            &gpu,
            &Case {
                block: 64,
                cluster,
                slots,
                scale: true,
                ..case
            },
        );
    }
}

/// D2: a row has the same bits whatever rows are with it, and for any cluster and grid.
#[test]
fn a_row_has_the_same_bits_in_any_batch() {
    let Some(gpu) = hopper() else { return };
    let (n, k) = (104, 328);
    let whole = Case {
        out: DType::F32,
        bias: true,
        slots: 0,
        ..Case::gated(&[300], n, k)
    };
    let data = Data::new(&whole);
    let all = run(&gpu, &whole, &data);
    for (first, count, cluster, sms) in [
        (0, 1, 1, 1),
        (299, 1, 2, 2),
        (1, 128, 1, 4),
        (77, 200, 2, 6),
        (0, 300, 2, 2),
    ] {
        let case = Case {
            counts: vec![count],
            cluster,
            sms,
            ..whole.clone()
        };
        let part = Data {
            a: data.a[first * k..][..count * k].to_vec(),
            pair_of_row: data.pair_of_row[..count].to_vec(),
            scale: data.scale[..count].to_vec(),
            gate: data.gate.clone(),
            up: data.up.clone(),
            gate_bias: data.gate_bias.clone(),
            up_bias: data.up_bias.clone(),
        };
        let found = run(&gpu, &case, &part);
        let what = format!("rows {first} to {} alone", first + count);
        assert_same_bits(&found, &all[first * n..][..count * n], &what);
    }
}

/// Offsets and counts that lie do no harm: what they name beyond the output is not touched.
#[test]
fn wrong_counts_stay_inside_the_output() {
    let Some(gpu) = hopper() else { return };
    for slots in [0, 1] {
        let case = Case {
            slots,
            ..Case::plain(&[40, 50], 64, 64)
        };
        let data = Data::new(&case);
        let (mut device, params) = upload(&gpu, &case, &data);
        gpu.write(&mut device.ints[1], &[100_000, -3]);
        gpu.launch(&plan_with_cluster(&params, 2, gpu.cuda.device_info()).unwrap());
        let bytes = gpu.download(&device.out);
        let edge = CANARY * case.out.size();
        assert!(
            bytes[..edge]
                .iter()
                .chain(&bytes[bytes.len() - edge..])
                .all(|&b| b == 0xff)
        );
    }
}

/// One group without offsets, counts taken from offsets, and no rows at all.
#[test]
fn groups_in_every_form() {
    let Some(gpu) = hopper() else { return };
    let case = Case::plain(&[133], 72, 64);
    let data = Data::new(&case);
    let expected = run(&gpu, &case, &data);
    for without in ["counts", "offsets"] {
        let (device, mut params) = upload(&gpu, &case, &data);
        params.counts = DevicePtr::NULL;
        if without == "offsets" {
            params.offsets = DevicePtr::NULL;
        }
        gpu.launch(&plan_grouped_gemm_sm90(&params, gpu.cuda.device_info()).unwrap());
        let bytes = gpu.download(&device.out);
        let inside = &bytes[2 * CANARY..bytes.len() - 2 * CANARY];
        let found = numbers(DType::BF16, inside);
        assert_same_bits(&found, &expected, without);
    }
    let none = Case::gated(&[0, 0], 72, 64);
    let (_device, params) = upload(&gpu, &none, &Data::new(&none));
    assert!(
        plan_grouped_gemm_sm90(&params, gpu.cuda.device_info())
            .unwrap()
            .is_empty()
    );
}
