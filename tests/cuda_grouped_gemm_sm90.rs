//! The grouped product on Hopper against f64: on a GPU, or on the emulator (`scripts/emulate-cuda.sh`), whose answer depends on a seed
//! (`MOE_EMULATED_SEED`) that shuffles threads and delays copies, products and barriers.
#![cfg(feature = "cuda")]

mod common;
#[path = "common/gpu.rs"]
mod gpu;

use common::Rng;
use gpu::{Buffer, Gpu};
use half::{bf16, f16};
use moe_kernels::cuda::grouped_gemm::params::{ActivationParams, Flags, GroupedGemmParams};
use moe_kernels::cuda::grouped_gemm::sm80::plan_grouped_gemm_sm80;
use moe_kernels::cuda::grouped_gemm::sm90::{
    CLUSTER_ROWS, TILE_COLUMNS, TILE_K, TILE_ROWS, cluster_for, plan_grouped_gemm_sm90,
    plan_with_cluster,
};
use moe_kernels::cuda::{DeviceInfo, DevicePtr, Launch};
use moe_kernels::grouped_gemm::{Activation, ActivationFunction, Clamp};
use moe_kernels::reference::{self, MlpSpec};
use moe_kernels::{DType, Error};

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

/// A product: its shape and what it does.
#[derive(Clone)]
struct Case {
    counts: Vec<usize>,
    /// Rows of an expert begin at multiples of this.
    block: usize,
    n: usize,
    k: usize,
    dtype: DType,
    out: DType,
    activation: Option<Activation>,
    /// 0: contiguous rows; else the pairs of a token.
    slots: usize,
    bias: bool,
    scale: bool,
    /// Weights of gate and up in alternating rows of one matrix.
    interleaved: bool,
    cluster: u32,
    /// Multiprocessors to plan for: with few of them a block has many tiles.
    sms: u32,
    seed: u64,
}

impl Case {
    fn plain(counts: &[usize], n: usize, k: usize) -> Self {
        Self {
            counts: counts.to_vec(),
            block: 1,
            n,
            k,
            dtype: DType::BF16,
            out: DType::BF16,
            activation: None,
            slots: 0,
            bias: false,
            scale: false,
            interleaved: false,
            cluster: 1,
            sms: 6,
            seed: 1,
        }
    }

    fn gated(counts: &[usize], n: usize, k: usize) -> Self {
        Self {
            activation: Some(Activation::SWIGLU),
            slots: 2,
            ..Self::plain(counts, n, k)
        }
    }

    fn is_gated(&self) -> bool {
        self.activation.is_some_and(|a| a.gated)
    }

    fn offsets(&self) -> Vec<i32> {
        let mut offsets = vec![0];
        for count in &self.counts {
            offsets.push(offsets[offsets.len() - 1] + count.next_multiple_of(self.block) as i32);
        }
        offsets
    }

    fn rows(&self) -> usize {
        *self.offsets().last().unwrap() as usize
    }
}

/// Values as the format holds them.
fn round(dtype: DType, v: f32) -> f32 {
    match dtype {
        DType::F16 => f16::from_f32(v).to_f32(),
        DType::BF16 => bf16::from_f32(v).to_f32(),
        _ => v,
    }
}

fn bits_of(dtype: DType, v: &[f32]) -> Vec<u16> {
    v.iter()
        .map(|&v| match dtype {
            DType::F16 => f16::from_f32(v).to_bits(),
            _ => bf16::from_f32(v).to_bits(),
        })
        .collect()
}

/// A case's numbers, rounded to its format.
struct Data {
    a: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    gate_bias: Vec<f32>,
    up_bias: Vec<f32>,
    scale: Vec<f32>,
    pair_of_row: Vec<u32>,
}

impl Data {
    fn new(case: &Case) -> Self {
        let mut rng = Rng(case.seed);
        let (e, n, k, rows) = (case.counts.len(), case.n, case.k, case.rows());
        let mut values = |len: usize, by: f32| -> Vec<f32> {
            (0..len)
                .map(|_| round(case.dtype, rng.normal() * by))
                .collect()
        };
        let by = 1.0 / (k as f32).sqrt();
        let a_rows = rows.max(1);
        let (mut a, gate, up) = (
            values(a_rows * k, 1.0),
            values(e * n * k, by),
            values(e * n * k, by),
        );
        let (gate_bias, up_bias) = (values(e * n, 1.0), values(e * n, 1.0));
        let mut scale: Vec<f32> = values(a_rows * case.slots.max(1), 1.0);
        // Pairs in a random order; rows of padding have none, and where rows are contiguous hold infinities that nobody may see.
        let mut order: Vec<u32> = (0..(a_rows * case.slots.max(1)) as u32).collect();
        let mut rng = Rng(case.seed ^ 77);
        for i in (1..order.len()).rev() {
            order.swap(i, rng.below(i + 1));
        }
        let mut pair_of_row = vec![u32::MAX; rows];
        let offsets = case.offsets();
        let real = |r: usize| {
            (0..e).any(|e| (offsets[e] as usize..offsets[e] as usize + case.counts[e]).contains(&r))
        };
        for r in 0..rows {
            if real(r) {
                pair_of_row[r] = order[r];
            } else if case.slots == 0 {
                a[r * k..][..k].fill(f32::INFINITY);
                scale[r] = f32::NAN;
            }
        }
        Self {
            a,
            gate,
            up,
            gate_bias,
            up_bias,
            scale,
            pair_of_row,
        }
    }
}

/// What comes out: the whole buffer, with a canary before and behind.
const CANARY: usize = 64;

struct Device {
    buffers: Vec<Buffer<u16>>,
    floats: Vec<Buffer<f32>>,
    ints: Vec<Buffer<i32>>,
    pairs: Buffer<u32>,
    out: Buffer<u8>,
}

fn upload(gpu: &Gpu, case: &Case, data: &Data) -> (Device, GroupedGemmParams) {
    let (e, n, k, rows) = (case.counts.len(), case.n, case.k, case.rows());
    let element = case.out.size();
    let weights = if case.interleaved {
        // Row 2i of gate, row 2i + 1 of up.
        let rows = data.gate.chunks(k).zip(data.up.chunks(k));
        vec![
            rows.flat_map(|(g, u)| [g, u].concat())
                .collect::<Vec<f32>>(),
        ]
    } else {
        vec![data.gate.clone(), data.up.clone()]
    };
    let mut buffers = vec![gpu.upload(&bits_of(case.dtype, &data.a))];
    buffers.extend(weights.iter().map(|w| gpu.upload(&bits_of(case.dtype, w))));
    let floats = vec![
        gpu.upload(&data.gate_bias),
        gpu.upload(&data.up_bias),
        gpu.upload(&data.scale),
    ];
    let counts: Vec<i32> = case.counts.iter().map(|&c| c as i32).collect();
    let ints = vec![gpu.upload(&case.offsets()), gpu.upload(&counts)];
    let pairs = gpu.upload(&data.pair_of_row);
    let out = gpu.filled::<u8>((2 * CANARY + rows * n) * element, 0xff);
    let row = k as i64 * if case.interleaved { 2 } else { 1 };
    let present = |yes: bool, ptr: DevicePtr| if yes { ptr } else { DevicePtr::NULL };
    let gated = case.is_gated();
    let up = if case.interleaved {
        buffers[1].ptr().add(2 * k as u64)
    } else {
        buffers[2].ptr()
    };
    let params = GroupedGemmParams {
        a: buffers[0].ptr(),
        pair_of_row: present(case.slots > 0, pairs.ptr()),
        input_scale: present(case.scale, floats[2].ptr()),
        offsets: ints[0].ptr(),
        counts: ints[1].ptr(),
        gate: present(gated, buffers[1].ptr()),
        up,
        gate_bias: present(case.bias && gated, floats[0].ptr()),
        up_bias: present(case.bias, floats[1].ptr()),
        out: out.ptr().add((CANARY * element) as u64),
        a_row_stride: k as i64,
        gate_row_stride: row,
        gate_expert_stride: n as i64 * row,
        up_row_stride: row,
        up_expert_stride: n as i64 * row,
        gate_bias_expert_stride: n as i64,
        up_bias_expert_stride: n as i64,
        out_row_stride: n as i64,
        gate_bias_stride: 1,
        up_bias_stride: 1,
        experts: e as u32,
        rows: rows as u32,
        n: n as u32,
        k: k as u32,
        slots: case.slots.max(1) as u32,
        flags: Flags::ALIGNED_OUT,
        a_dtype: case.dtype as u32,
        w_dtype: case.dtype as u32,
        bias_dtype: DType::F32 as u32,
        out_dtype: case.out as u32,
        a_rows: (data.a.len() / k) as u32,
        reserved: 0,
        activation: ActivationParams::new(case.activation),
    };
    (
        Device {
            buffers,
            floats,
            ints,
            pairs,
            out,
        },
        params,
    )
}

/// The output rows as f32, after a look at the canaries and at the rows of padding.
fn run(gpu: &Gpu, case: &Case, data: &Data) -> Vec<f32> {
    run_planned(gpu, case, data, |params, info| {
        plan_with_cluster(params, case.cluster, info)
    })
}

/// The same by the kernel of a plan.
fn run_planned(
    gpu: &Gpu,
    case: &Case,
    data: &Data,
    plan: impl Fn(&GroupedGemmParams, &DeviceInfo) -> Result<Launch, Error>,
) -> Vec<f32> {
    let (device, params) = upload(gpu, case, data);
    let info = DeviceInfo {
        sm_count: case.sms,
        ..*gpu.cuda.device_info()
    };
    gpu.launch(&plan(&params, &info).unwrap());
    let bytes = gpu.download(&device.out);
    drop((device.buffers, device.floats, device.ints, device.pairs));
    let edge = CANARY * case.out.size();
    assert!(
        bytes[..edge].iter().all(|&b| b == 0xff),
        "written before the output"
    );
    assert!(
        bytes[bytes.len() - edge..].iter().all(|&b| b == 0xff),
        "written behind the output"
    );
    let values: Vec<f32> = bytes[edge..bytes.len() - edge]
        .chunks(case.out.size())
        .map(|c| match case.out {
            DType::F16 => f16::from_le_bytes([c[0], c[1]]).to_f32(),
            DType::BF16 => bf16::from_le_bytes([c[0], c[1]]).to_f32(),
            _ => f32::from_le_bytes([c[0], c[1], c[2], c[3]]),
        })
        .collect();
    let inside = bytes[edge..bytes.len() - edge].chunks(case.n * case.out.size());
    for (r, row) in inside.enumerate() {
        if data.pair_of_row[r] == u32::MAX {
            assert!(
                row.iter().all(|&b| b == 0xff),
                "row {r} is padding and was written"
            );
        }
    }
    values
}

/// Σ a·w and Σ |a·w| of one output in f64.
fn dot(a: &[f32], w: &[f32]) -> (f64, f64) {
    a.iter().zip(w).fold((0.0, 0.0), |(sum, abs), (a, w)| {
        let p = f64::from(*a) * f64::from(*w);
        (sum + p, abs + p.abs())
    })
}

/// Fails unless every value is within the rounding errors of f32 sums, the activation's and the output's.
fn check(case: &Case, data: &Data, found: &[f32]) {
    visit_expected(case, data, |at, expected, bound| {
        let v = f64::from(found[at]);
        assert!(
            (v - expected).abs() <= bound,
            "row {} column {}: {v:e}, expected {expected:e} ± {bound:e}",
            at / case.n,
            at % case.n
        );
    });
}

/// Every element that is written: its place, its value in f64, and how far from it a kernel's may be.
fn visit_expected(case: &Case, data: &Data, mut visit: impl FnMut(usize, f64, f64)) {
    let (n, k) = (case.n, case.k);
    let spec = case.activation.map(MlpSpec::from);
    // One rounding for each product of 16 and each addition in it at most, and the tensor cores may cut instead of rounding: twice the unit.
    let unit = reference::gamma(k + 2, 2f64.powi(-23));
    let ulp = match case.out {
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
        _ => 2f64.powi(-23),
    };
    let offsets = case.offsets();
    for (e, &count) in case.counts.iter().enumerate() {
        for r in offsets[e] as usize..offsets[e] as usize + count {
            let pair = data.pair_of_row[r] as usize;
            let (source, scaled) = match case.slots {
                0 => (r, r),
                slots => (pair / slots, pair),
            };
            let a = &data.a[source * k..][..k];
            for c in 0..n {
                let column = e * n + c;
                let side = |w: &[f32], bias: &[f32]| {
                    let (mut sum, mut abs) = dot(a, &w[column * k..][..k]);
                    if case.scale {
                        let s = f64::from(data.scale[scaled]);
                        (sum, abs) = (sum * s, abs * s.abs());
                    }
                    if case.bias {
                        let b = f64::from(bias[column]);
                        (sum, abs) = (sum + b, abs + b.abs());
                    }
                    (sum, abs * unit)
                };
                let (u, du) = side(&data.up, &data.up_bias);
                let (expected, error) = match &spec {
                    None => (u, du),
                    Some(spec) => {
                        let (g, dg) = if case.is_gated() {
                            side(&data.gate, &data.gate_bias)
                        } else {
                            (u, du)
                        };
                        let h = spec.activate(g, u);
                        // No function here is steeper than 1.2 + 2|z|; the activation itself is good to a few ulp of f32.
                        let steep = |z: f64| 1.2 + 2.0 * z.abs();
                        let gate =
                            steep(g) * dg + 8.0 * 2f64.powi(-23) * g.abs().max(1e-3) * steep(g);
                        match case.is_gated() {
                            true => (
                                h,
                                gate * (u.abs() + 1.0 + du)
                                    + steep(g) * (g.abs() + 1e-3) * du * 1.2,
                            ),
                            false => (h, gate),
                        }
                    }
                };
                let bound = error + ulp * expected.abs() + 2f64.powi(-25);
                visit(r * n + c, expected, bound);
            }
        }
    }
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

fn activations() -> Vec<Activation> {
    let functions = [
        ActivationFunction::Identity,
        ActivationFunction::Silu,
        ActivationFunction::Gelu,
        ActivationFunction::GeluTanh,
        ActivationFunction::Relu,
        ActivationFunction::Relu2,
    ];
    let mut all = Vec::new();
    for function in functions {
        for gated in [true, false] {
            for clamp in [
                Clamp::None,
                Clamp::Pre { limit: 0.7 },
                Clamp::Post { limit: 0.3 },
            ] {
                all.push(Activation {
                    function,
                    gated,
                    clamp,
                });
            }
        }
    }
    all.push(Activation::GPT_OSS);
    let clamp = Clamp::Softcap { gate: 1.5, up: 0.8 };
    all.push(Activation {
        clamp,
        ..Activation::SWIGLU
    });
    all
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
        common::assert_same_bits(&found, &all[first * n..][..count * n], &what);
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
        let found: Vec<f32> = bytes[2 * CANARY..bytes.len() - 2 * CANARY]
            .chunks(2)
            .map(|c| bf16::from_le_bytes([c[0], c[1]]).to_f32())
            .collect();
        common::assert_same_bits(&found, &expected, without);
    }
    let none = Case::gated(&[0, 0], 72, 64);
    let (_device, params) = upload(&gpu, &none, &Data::new(&none));
    assert!(
        plan_grouped_gemm_sm90(&params, gpu.cuda.device_info())
            .unwrap()
            .is_empty()
    );
}

fn some_params() -> GroupedGemmParams {
    GroupedGemmParams {
        a: DevicePtr(0x1000),
        up: DevicePtr(0x2000),
        gate: DevicePtr(0x3000),
        out: DevicePtr(0x4000),
        offsets: DevicePtr(0x5000),
        a_row_stride: 64,
        up_row_stride: 64,
        up_expert_stride: 64 * 64,
        gate_row_stride: 64,
        gate_expert_stride: 64 * 64,
        out_row_stride: 64,
        experts: 4,
        rows: 1000,
        n: 64,
        k: 64,
        slots: 1,
        a_rows: 1000,
        a_dtype: DType::BF16 as u32,
        w_dtype: DType::BF16 as u32,
        out_dtype: DType::F32 as u32,
        activation: ActivationParams::new(Some(Activation::SWIGLU)),
        ..bytemuck::Zeroable::zeroed()
    }
}

#[test]
fn a_plan_says_what_it_does_not_take() {
    let good = some_params();
    let device = DeviceInfo::H100;
    plan_grouped_gemm_sm90(&good, &device).unwrap();
    type Change = fn(&mut GroupedGemmParams);
    let refused: [(&str, Change); 14] = [
        ("a", |p| p.a = DevicePtr(0x1008)),
        ("up", |p| p.up = DevicePtr(0x2002)),
        ("gate", |p| p.gate = DevicePtr::NULL),
        ("out", |p| p.out = DevicePtr(0x4008)),
        ("n", |p| p.n = 60),
        ("k", |p| p.k = 63),
        ("a.row_stride", |p| p.a_row_stride = 68),
        ("up.row_stride", |p| p.up_row_stride = -64),
        ("up.expert_stride", |p| p.up_expert_stride = 1 << 40),
        ("out.row_stride", |p| p.out_row_stride = 65),
        ("weights", |p| p.flags = Flags::WEIGHT_TABLES),
        ("weights", |p| p.w_dtype = DType::F16 as u32),
        ("a", |p| p.a_dtype = DType::F32 as u32),
        ("out", |p| p.out_dtype = DType::F16 as u32),
    ];
    for (name, change) in refused {
        let mut params = good;
        change(&mut params);
        match plan_grouped_gemm_sm90(&params, &device) {
            Err(Error::Value { argument, .. }) => assert_eq!(argument, name),
            other => panic!("{name}: {other:?}"),
        }
    }
    let huge = GroupedGemmParams {
        rows: i32::MAX as u32,
        n: 1 << 30,
        ..good
    };
    assert!(matches!(
        plan_grouped_gemm_sm90(&huge, &device),
        Err(Error::Overflow { .. })
    ));
    assert!(plan_grouped_gemm_sm90(&good, &DeviceInfo::A100).is_err());
    // A plain product does not look at the gate; one expert needs no expert stride; a gathered row is addressed by 32 bits.
    let plain = GroupedGemmParams {
        gate: DevicePtr::NULL,
        activation: ActivationParams::new(None),
        experts: 1,
        up_expert_stride: 3,
        ..good
    };
    plan_grouped_gemm_sm90(&plain, &device).unwrap();
    let gathered = GroupedGemmParams {
        pair_of_row: DevicePtr(0x6000),
        a_row_stride: 1 << 31,
        ..good
    };
    assert!(plan_grouped_gemm_sm90(&gathered, &device).is_err());
}

#[test]
fn clusters_where_experts_have_several_row_tiles() {
    let device = DeviceInfo::H100;
    assert_eq!(cluster_for(128 * CLUSTER_ROWS, 128, &device), 2);
    assert_eq!(cluster_for(128 * CLUSTER_ROWS - 1, 128, &device), 1);
    assert_eq!(
        cluster_for(
            1 << 20,
            1,
            &DeviceInfo {
                sm_count: 1,
                ..device
            }
        ),
        1
    );
    let params = GroupedGemmParams {
        rows: 262_144,
        experts: 128,
        n: 768,
        k: 2048,
        ..some_params()
    };
    let launch = plan_grouped_gemm_sm90(&params, &device).unwrap();
    assert_eq!(
        (launch.grid, launch.cluster, launch.block),
        ([132, 1, 1], [2, 1, 1], [384, 1, 1])
    );
    assert!(launch.shared_bytes <= device.shared_per_block);
    assert_eq!(
        launch.tensor_maps()[1].boxes[..3],
        [TILE_K as u32, TILE_COLUMNS as u32 / 2, 1]
    );
}
