//! The grouped products of the sm_80, f32 and decode kernels: exact mode against the CPU's bits, tensor cores against f64 and against each other, on a GPU or on the
//! emulator (`scripts/emulate-cuda.sh`).
#![cfg(feature = "cuda")]

mod common;
#[path = "common/gpu.rs"]
mod gpu;

use common::Rng;
use common::product::Stored;
use gpu::{Buffer, Gpu};
use moe_kernels::cuda::combine::DeviceRows;
use moe_kernels::cuda::grouped_gemm::{
    BiasPointers, GatherPointers, GroupPointers, GroupedGemm, Numerics, Placement, WeightPointers,
    plan_grouped_gemm,
};
use moe_kernels::cuda::{DeviceInfo, DevicePtr};
use moe_kernels::grouped_gemm::{
    Activation, ActivationFunction, Clamp, Gather, Groups, PackedMatrices, grouped_gemm_into,
    scratch_bytes,
};
use moe_kernels::{Cpu, DType, Error};
use proptest::prelude::*;

/// Few multiprocessors, so that a block has many tiles; not a Hopper, so that its kernels stay out.
const DEVICE: DeviceInfo = DeviceInfo {
    compute_capability: (8, 0),
    sm_count: 1,
    ..DeviceInfo::A100
};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Layout {
    /// Two matrices, rows with a gap between them.
    Separate,
    /// Gate rows, then up rows.
    Fused,
    /// Gate and up rows in turn.
    Interleaved,
    /// An allocation for each matrix of each expert, and for each bias.
    Table,
    /// An allocation for each expert: gate rows, then up rows.
    FusedTable,
    /// The same with gate and up rows in turn.
    InterleavedTable,
}

impl Layout {
    const ALL: [Self; 6] = [
        Self::Separate,
        Self::Fused,
        Self::Interleaved,
        Self::Table,
        Self::FusedTable,
        Self::InterleavedTable,
    ];

    /// The layout whose experts lie apart in this one.
    fn stacked(self) -> Self {
        match self {
            Self::Table => Self::Separate,
            Self::FusedTable => Self::Fused,
            Self::InterleavedTable => Self::Interleaved,
            other => other,
        }
    }
}

/// A product in host memory. Rows of an expert begin at multiples of `block`.
#[derive(Clone, Debug)]
struct Case {
    counts: Vec<usize>,
    block: usize,
    n: usize,
    k: usize,
    a: DType,
    w: DType,
    out: DType,
    activation: Activation,
    slots: usize,
    bias: bool,
    scale: bool,
    layout: Layout,
    numerics: Numerics,
    strict: bool,
    /// Rows that the plan is told of beyond those that there are: steers the choice of a tile.
    spare: usize,
    /// Offsets, counts and pairs are nonsense on the device.
    hostile: bool,
    seed: u64,
}

impl Case {
    fn new(dtype: DType, counts: &[usize], n: usize, k: usize) -> Self {
        Self {
            counts: counts.to_vec(),
            block: 1,
            n,
            k,
            a: dtype,
            w: dtype,
            out: DType::F32,
            activation: Activation::SWIGLU,
            slots: 2,
            bias: false,
            scale: false,
            layout: Layout::Fused,
            numerics: Numerics::TensorCores,
            strict: true,
            spare: 0,
            hostile: false,
            seed: 7,
        }
    }

    fn offsets(&self) -> Vec<usize> {
        let mut offsets = vec![0];
        for count in &self.counts {
            offsets.push(offsets[offsets.len() - 1] + count.next_multiple_of(self.block));
        }
        offsets
    }

    fn rows(&self) -> usize {
        self.offsets()[self.counts.len()]
    }

    fn data(&self) -> Data {
        let mut rng = Rng(self.seed);
        let (e, rows) = (self.counts.len(), self.rows());
        let tokens = rows.div_ceil(self.slots.max(1)).max(1);
        let a_rows = if self.slots == 0 { rows.max(1) } else { tokens };
        let mut pairs: Vec<u32> = (0..(tokens * self.slots.max(1)) as u32).collect();
        for i in (1..pairs.len()).rev() {
            pairs.swap(i, rng.below(i + 1));
        }
        let mut pair_of_row = vec![u32::MAX; rows];
        let offsets = self.offsets();
        for (first, &count) in offsets.iter().zip(&self.counts) {
            pair_of_row[*first..first + count].fill_with(|| pairs.pop().unwrap());
        }
        let weight = |rng: &mut Rng| {
            let v: Vec<f32> = rng.normals(e * self.n * self.k);
            Stored::new(self.w, &v.iter().map(|x| x * 0.3).collect::<Vec<_>>())
        };
        Data {
            x: Stored::new(self.a, &rng.normals(a_rows * self.k)),
            a_rows,
            pair_of_row,
            scale: (0..tokens * self.slots.max(1))
                .map(|_| 0.5 + rng.unit())
                .collect(),
            gate: weight(&mut rng),
            up: weight(&mut rng),
            gate_bias: rng.normals(e * self.n),
            up_bias: rng.normals(e * self.n),
        }
    }
}

struct Data {
    x: Stored,
    a_rows: usize,
    pair_of_row: Vec<u32>,
    scale: Vec<f32>,
    gate: Stored,
    up: Stored,
    gate_bias: Vec<f32>,
    up_bias: Vec<f32>,
}

fn bytes(v: &Stored) -> Vec<u8> {
    match v {
        Stored::F32(v) => v.iter().flat_map(|x| x.to_ne_bytes()).collect(),
        Stored::F16(v) => v.iter().flat_map(|x| x.to_bits().to_ne_bytes()).collect(),
        Stored::BF16(v) => v.iter().flat_map(|x| x.to_bits().to_ne_bytes()).collect(),
    }
}

/// The CPU's answer, `[rows, n]`; rows of padding are NaN.
fn on_cpu(case: &Case, data: &Data, out: DType) -> Vec<f32> {
    let cpu = Cpu::new();
    let (n, k, e, rows) = (case.n, case.k, case.counts.len(), case.rows());
    let (gate, up) = (data.gate.to_f32(), data.up.to_f32());
    let mut packed = match case.activation.gated {
        true => PackedMatrices::new_gated(&cpu, n, k, case.w).unwrap(),
        false => PackedMatrices::new(&cpu, n, k, case.w).unwrap(),
    };
    for i in 0..e {
        let matrix = |v: &[f32]| Stored::new(case.w, &v[i * n * k..][..n * k]);
        let (g, u) = (matrix(&gate), matrix(&up));
        let gate_bias = case.bias.then(|| &data.gate_bias[i * n..][..n]);
        let up_bias = case.bias.then(|| &data.up_bias[i * n..][..n]);
        if case.activation.gated {
            packed
                .push_gated(&cpu, g.view(n, k), u.view(n, k), gate_bias, up_bias)
                .unwrap();
        } else {
            packed.push(&cpu, u.view(n, k), up_bias).unwrap();
        }
    }
    let offsets = case.offsets();
    let mut result = Stored::new(out, &vec![f32::NAN; rows * n]);
    let gather = (case.slots > 0).then(|| Gather {
        pair_of_row: &data.pair_of_row,
        slots: case.slots,
        input_scale: case
            .scale
            .then_some(&data.scale[..data.a_rows * case.slots]),
    });
    grouped_gemm_into(
        &cpu,
        data.x.view(data.a_rows, k),
        gather,
        &packed,
        Groups::Ragged {
            offsets: &offsets,
            counts: &case.counts,
        },
        Some(case.activation),
        result.view_mut(rows, n),
        &mut vec![0; scratch_bytes(&cpu)],
    )
    .unwrap();
    result.to_f32()
}

/// Matrices of `n` rows as they lie in memory, all experts' one after another: gate and up, which may be one, with elements from row to row and where up begins.
fn lay_out(case: &Case, data: &Data) -> (Vec<Vec<u8>>, usize, usize) {
    let (e, n, k, size) = (case.counts.len(), case.n, case.k, case.w.size());
    let (gate, up) = (bytes(&data.gate), bytes(&data.up));
    let row = |v: &[u8], r: usize| v[r * k * size..][..k * size].to_vec();
    if case.layout.stacked() == Layout::Separate {
        let stride = k.next_multiple_of(8) + 8;
        let spread = |v: &[u8]| {
            let mut all = vec![0xff; e * n * stride * size];
            for i in 0..e * n {
                all[i * stride * size..][..k * size].copy_from_slice(&row(v, i));
            }
            all
        };
        return (vec![spread(&gate), spread(&up)], stride, 0);
    }
    let fused = case.layout.stacked() == Layout::Fused;
    let mut all = Vec::new();
    for expert in 0..e {
        let rows = expert * n..(expert + 1) * n;
        if fused {
            rows.clone().for_each(|r| all.extend(row(&gate, r)));
            rows.for_each(|r| all.extend(row(&up, r)));
        } else {
            rows.for_each(|r| all.extend([row(&gate, r), row(&up, r)].concat()));
        }
    }
    let (second, stride) = if fused { (n * k, k) } else { (k, 2 * k) };
    (vec![all], stride, second)
}

/// One allocation for each expert and the table of their addresses. The bytes that it keeps must live.
fn upload_apart(gpu: &Gpu, all: &[u8], experts: usize) -> (Vec<Buffer<u8>>, Buffer<u64>) {
    let one = all.len() / experts;
    // From the last to the first, so that addresses do not ascend.
    let mut buffers: Vec<_> = (0..experts)
        .rev()
        .map(|e| gpu.upload(&all[e * one..][..one]))
        .collect();
    buffers.reverse();
    let addresses: Vec<u64> = buffers.iter().map(|b| b.ptr().0).collect();
    let table = gpu.upload(&addresses);
    (buffers, table)
}

/// What must live while a launch runs.
#[derive(Default)]
struct Kept {
    buffers: Vec<Buffer<u8>>,
    tables: Vec<Buffer<u64>>,
}

impl Kept {
    /// Uploads what all experts have, apart or not: the address to begin at.
    fn upload(&mut self, gpu: &Gpu, all: &[u8], experts: usize, apart: bool) -> DevicePtr {
        if !apart {
            self.buffers.push(gpu.upload(all));
            return self.buffers[self.buffers.len() - 1].ptr();
        }
        let (buffers, table) = upload_apart(gpu, all, experts);
        let ptr = table.ptr();
        self.buffers.extend(buffers);
        self.tables.push(table);
        ptr
    }
}

/// Weights on the device as the layout has them: what must live, and gate and up.
fn upload_weights(gpu: &Gpu, case: &Case, data: &Data) -> (Kept, WeightPointers, WeightPointers) {
    let (e, n) = (case.counts.len(), case.n);
    let (matrices, stride, second) = lay_out(case, data);
    let apart = case.layout != case.layout.stacked();
    let mut kept = Kept::default();
    let ptrs: Vec<DevicePtr> = matrices
        .iter()
        .map(|m| kept.upload(gpu, m, e, apart))
        .collect();
    let rows = if ptrs.len() == 1 {
        2 * n * case.k
    } else {
        n * stride
    };
    let pointers = |ptr: DevicePtr, first: usize| match apart {
        false => WeightPointers::strided(
            ptr.add((first * case.w.size()) as u64),
            case.w,
            stride,
            rows,
        ),
        true => WeightPointers {
            placement: Placement::Table {
                offset: first,
                alignment: 256,
            },
            ..WeightPointers::table(ptr, case.w, stride, 256)
        },
    };
    let (gate, up) = (ptrs[0], ptrs[ptrs.len() - 1]);
    (kept, pointers(gate, 0), pointers(up, second))
}

/// The GPU's answer `[rows, n]` as f32 and the kernel that gave it. Checks that nothing but real rows was written.
fn on_gpu(gpu: &Gpu, case: &Case, data: &Data) -> (Vec<f32>, &'static str) {
    let (n, k, rows, size) = (case.n, case.k, case.rows(), case.out.size());
    let stride = if n.is_multiple_of(8) { n + 8 } else { n + 3 };
    let x = gpu.upload(&bytes(&data.x));
    let pairs = gpu.upload(&data.pair_of_row);
    let scale = gpu.upload(&data.scale);
    let offsets: Vec<i32> = case.offsets().iter().map(|&o| o as i32).collect();
    let counts: Vec<i32> = case.counts.iter().map(|&c| c as i32).collect();
    let (mut offsets, mut counts) = (gpu.upload(&offsets), gpu.upload(&counts));
    let mut pairs = pairs;
    if case.hostile {
        let e = case.counts.len();
        let bad = |i: usize| [2, i32::MAX, -7, 1000, 0, i32::MIN, 3, 1][i % 8];
        gpu.write(
            &mut offsets,
            &(0..=e).map(|i| bad(i + 3)).collect::<Vec<_>>(),
        );
        gpu.write(&mut counts, &(0..e).map(bad).collect::<Vec<_>>());
        gpu.write(&mut pairs, &vec![u32::MAX - 1; rows]);
    }
    let capacity = rows + case.spare;
    let out = gpu.filled::<u8>(capacity * stride * size, 0xff);
    let (mut kept, gate, up) = upload_weights(gpu, case, data);
    let apart = case.layout == Layout::Table;
    let mut bias = |b: &[f32]| {
        let ptr = kept.upload(gpu, bytemuck::cast_slice(b), case.counts.len(), apart);
        match apart {
            false => BiasPointers::strided(ptr, DType::F32, n),
            true => BiasPointers::table(ptr, DType::F32),
        }
    };
    let gated = case.activation.gated;
    let product = GroupedGemm {
        a: DeviceRows {
            ptr: x.ptr(),
            dtype: case.a,
            stride: k,
        },
        a_rows: data.a_rows,
        gather: (case.slots > 0).then(|| GatherPointers {
            pair_of_row: pairs.ptr(),
            slots: case.slots,
            input_scale: if case.scale {
                scale.ptr()
            } else {
                DevicePtr::NULL
            },
        }),
        groups: GroupPointers::Ragged {
            offsets: offsets.ptr(),
            counts: counts.ptr(),
            experts: case.counts.len(),
        },
        gate: gated.then_some(gate),
        up,
        gate_bias: (case.bias && gated).then(|| bias(&data.gate_bias)),
        up_bias: case.bias.then(|| bias(&data.up_bias)),
        activation: case.activation,
        out: DeviceRows {
            ptr: out.ptr(),
            dtype: case.out,
            stride,
        },
        rows: capacity,
        n,
        k,
        numerics: case.numerics,
        strict: case.strict,
    };
    // pair_of_row covers the rows that there are; the spare ones belong to no expert.
    let launch = plan_grouped_gemm(&product, &DEVICE).unwrap();
    if !launch.is_empty() {
        gpu.launch(&launch);
    }
    let raw = gpu.download(&out);
    let mut real = vec![false; capacity];
    for (o, c) in case.offsets().iter().zip(&case.counts) {
        real[*o..o + c].fill(true);
    }
    let mut values = vec![f32::NAN; rows * n];
    for r in 0..capacity {
        for c in 0..stride {
            let element = &raw[(r * stride + c) * size..][..size];
            if (real[r] || case.hostile) && c < n {
                values[r * n + c] = decoded(case.out, element);
            } else {
                assert!(
                    element.iter().all(|&b| b == 0xff),
                    "{case:?}: row {r}, column {c} was written"
                );
            }
        }
    }
    (values, launch.kernel)
}

fn decoded(dtype: DType, b: &[u8]) -> f32 {
    match dtype {
        DType::F16 => half::f16::from_bits(u16::from_ne_bytes([b[0], b[1]])).to_f32(),
        DType::BF16 => half::bf16::from_bits(u16::from_ne_bytes([b[0], b[1]])).to_f32(),
        _ => f32::from_ne_bytes([b[0], b[1], b[2], b[3]]),
    }
}

/// Compares with f64: sums within (K + 4)·2⁻²³·Σ|a||w| (a tensor core may truncate), TF32 inputs within 2⁻¹¹ each; then through an activation of slope ≤ 1.13.
fn check_against_f64(case: &Case, data: &Data, found: &[f32]) {
    let (n, k) = (case.n, case.k);
    let (x, gate, up) = (data.x.to_f32(), data.gate.to_f32(), data.up.to_f32());
    let input = if case.numerics == Numerics::Tf32 {
        2f64.powi(-10)
    } else {
        0.0
    };
    let relative = (k as f64 + 4.0) * 2f64.powi(-23) + input;
    let rounding = match case.out {
        DType::BF16 => 2f64.powi(-8),
        DType::F16 => 2f64.powi(-11),
        _ => 2f64.powi(-21),
    };
    let offsets = case.offsets();
    for e in 0..case.counts.len() {
        for r in offsets[e]..offsets[e] + case.counts[e] {
            let pair = data.pair_of_row[r] as usize;
            let source = pair.checked_div(case.slots).unwrap_or(r);
            let scale = if case.scale && case.slots > 0 {
                f64::from(data.scale[pair])
            } else {
                1.0
            };
            for c in 0..n {
                let sum = |w: &[f32], bias: &[f32]| {
                    let (mut s, mut m) = (0.0, 0.0);
                    for i in 0..k {
                        let p = f64::from(x[source * k + i])
                            * f64::from(w[(e * n + c) * k + i])
                            * scale;
                        s += p;
                        m += p.abs();
                    }
                    let b = if case.bias {
                        f64::from(bias[e * n + c])
                    } else {
                        0.0
                    };
                    (s + b, (m + b.abs()) * relative + 1e-30)
                };
                let (u, du) = sum(&up, &data.up_bias);
                let (expected, tolerance) = if case.activation.gated {
                    let (g, dg) = sum(&gate, &data.gate_bias);
                    let silu = g / (1.0 + (-g).exp());
                    (silu * u, silu.abs() * du + 1.13 * dg * (u.abs() + du))
                } else {
                    (u, du)
                };
                let tolerance = tolerance + expected.abs() * rounding + 6e-8;
                let v = f64::from(found[r * n + c]);
                assert!(
                    (v - expected).abs() <= tolerance,
                    "{case:?}: row {r}, column {c}: {v}, expected {expected} within {tolerance:e}"
                );
            }
        }
    }
}

const LINEAR: Activation = Activation::plain(ActivationFunction::Identity);

#[test]
fn exact_products_have_the_bits_of_the_cpu() {
    let Some(gpu) = gpu::open() else { return };
    let formats = [
        (DType::F32, DType::F32),
        (DType::BF16, DType::BF16),
        (DType::F16, DType::F16),
        (DType::F32, DType::BF16),
        (DType::BF16, DType::F32),
    ];
    for (i, (a, w)) in formats.into_iter().enumerate() {
        for (k, scale) in [(1, false), (40, false), (77, true)] {
            let case = Case {
                a,
                w,
                bias: i % 2 == 0,
                scale,
                block: 4,
                numerics: Numerics::Exact,
                ..Case::new(a, &[3, 0, 19, 1], 24, k)
            };
            let data = case.data();
            let (found, _) = on_gpu(&gpu, &case, &data);
            common::assert_same_bits(
                &found,
                &on_cpu(&case, &data, case.out),
                &format!("{case:?}"),
            );
        }
    }
}

/// Weights of 16 bits that count as f32: the bits of the CPU with the same numbers in f32, which differ from those of bf16's own chain.
#[test]
fn widened_weights_have_the_bits_of_f32() {
    let Some(gpu) = gpu::open() else { return };
    for w in [DType::BF16, DType::F16] {
        for (k, x) in [(1, w), (77, w), (64, DType::F32)] {
            let case = |numerics| Case {
                a: x,
                w,
                bias: true,
                numerics,
                ..Case::new(w, &[3, 0, 19], 24, k)
            };
            let widened = case(Numerics::ExactWidened);
            let mut data = widened.data();
            let (found, _) = on_gpu(&gpu, &widened, &data);
            let (exact, _) = on_gpu(&gpu, &case(Numerics::Exact), &data);
            data.gate = Stored::F32(data.gate.to_f32());
            data.up = Stored::F32(data.up.to_f32());
            let in_f32 = Case {
                w: DType::F32,
                ..widened.clone()
            };
            common::assert_same_bits(
                &found,
                &on_cpu(&in_f32, &data, case(Numerics::Exact).out),
                &format!("{widened:?}"),
            );
            let same = common::bits(&found) == common::bits(&exact);
            assert_eq!(same, w == DType::F16 || k == 1, "{w} {k}");
        }
    }
}

#[test]
fn every_exact_shape_and_activation_has_the_bits_of_the_cpu() {
    let Some(gpu) = gpu::open() else { return };
    use ActivationFunction::*;
    let clamps = [
        Clamp::None,
        Clamp::Pre { limit: 0.5 },
        Clamp::Post { limit: 0.25 },
        Clamp::GptOss {
            limit: 0.75,
            alpha: 1.702,
        },
        Clamp::Softcap { gate: 0.8, up: 0.0 },
    ];
    let mut kernels = std::collections::BTreeSet::new();
    for (i, function) in [Identity, Silu, Gelu, GeluTanh, Relu, Relu2]
        .into_iter()
        .enumerate()
    {
        for (j, clamp) in clamps.into_iter().enumerate() {
            let gated = matches!(clamp, Clamp::GptOss { .. }) || (i + j) % 2 == 0;
            let case = Case {
                activation: Activation {
                    function,
                    gated,
                    clamp,
                },
                bias: true,
                spare: if j % 2 == 0 { 200 } else { 0 },
                layout: [Layout::Fused, Layout::Interleaved, Layout::Separate][(i + j) % 3],
                seed: (i * 10 + j) as u64,
                ..Case::new(DType::F32, &[5, 0, 18], 24, 36)
            };
            let data = case.data();
            let (found, kernel) = on_gpu(&gpu, &case, &data);
            kernels.insert(kernel);
            common::assert_same_bits(
                &found,
                &on_cpu(&case, &data, case.out),
                &format!("{case:?}"),
            );
        }
    }
    let expected = [
        "moe_grouped_gemm_f32_exact_m128",
        "moe_grouped_gemm_f32_exact_m16",
    ];
    assert_eq!(kernels.into_iter().collect::<Vec<_>>(), expected);
}

/// The tiles that plans choose from one below, at and above each seam, told of so many rows for each of two experts.
#[test]
fn every_tile_gives_the_same_bits_near_f64() {
    let Some(gpu) = gpu::open() else { return };
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        // K: below, at and above a block of 32 and one of 64.
        for (k, activation) in [(8, LINEAR), (72, Activation::SWIGLU), (104, LINEAR)] {
            let base = Case {
                activation,
                bias: true,
                block: 4,
                layout: Layout::Separate,
                numerics: if dtype == DType::F32 {
                    Numerics::Tf32
                } else {
                    Numerics::TensorCores
                },
                ..Case::new(dtype, &[17, 9], 72, k)
            };
            let data = base.data();
            let mut first: Option<Vec<f32>> = None;
            let mut kernels = std::collections::BTreeSet::new();
            for spare in [0, 12, 100, 200, 300] {
                let case = Case {
                    spare,
                    ..base.clone()
                };
                let (found, kernel) = on_gpu(&gpu, &case, &data);
                if kernels.insert(kernel) {
                    check_against_f64(&case, &data, &found);
                }
                let first = first.get_or_insert_with(|| found.clone());
                common::assert_same_bits(&found, first, kernel);
            }
            assert_eq!(
                kernels.len(),
                if dtype == DType::F32 { 2 } else { 4 },
                "{kernels:?}"
            );
        }
    }
}

/// A row alone, among others of its expert, and elsewhere in the batch: the same bits, in the decode class and in that of the tiles.
#[test]
fn rows_do_not_depend_on_their_batch() {
    let Some(gpu) = gpu::open() else { return };
    for (dtype, strict) in [
        (DType::BF16, false),
        (DType::F16, false),
        (DType::BF16, true),
        (DType::F16, true),
    ] {
        let whole = Case {
            slots: 0,
            strict,
            ..Case::new(dtype, &[1, 0, 11, 2, 0, 0, 3, 0], 40, 328)
        };
        let data = whole.data();
        let (all, kernel) = on_gpu(&gpu, &whole, &data);
        assert_eq!(kernel.contains("decode"), !strict, "{kernel}");
        check_against_f64(&whole, &data, &all);
        let x = data.x.to_f32();
        for (expert, row) in [(0, 0), (2, 1), (2, 9), (2, 11), (3, 13), (6, 16)] {
            let mut counts = vec![0; 8];
            counts[expert] = 1;
            let alone = Case {
                counts,
                ..whole.clone()
            };
            let mut one = alone.data();
            one.x = Stored::new(dtype, &x[row * whole.k..][..whole.k]);
            (one.gate, one.up) = (
                Stored::new(dtype, &data.gate.to_f32()),
                Stored::new(dtype, &data.up.to_f32()),
            );
            let (found, kernel) = on_gpu(&gpu, &alone, &one);
            common::assert_same_bits(&found, &all[row * whole.n..][..whole.n], kernel);
        }
    }
}

/// Where the matrices lie has no part in the bits: every layout against the first, in each family of kernels, aligned and not.
#[test]
fn layouts_and_tables_give_the_same_bits() {
    let Some(gpu) = gpu::open() else { return };
    let modes = [
        (DType::BF16, Numerics::TensorCores, true, "sm80"),
        (DType::F16, Numerics::TensorCores, false, "decode"),
        (DType::F32, Numerics::TensorCores, true, "exact_m16"),
        (DType::F32, Numerics::Tf32, true, "tf32"),
        (DType::BF16, Numerics::Exact, true, "exact_any"),
    ];
    for (dtype, numerics, strict, family) in modes {
        for (n, k) in [(24, 72), (17, 35)] {
            for activation in [Activation::SWIGLU, LINEAR] {
                let base = Case {
                    numerics,
                    strict,
                    activation,
                    bias: true,
                    ..Case::new(dtype, &[3, 0, 6, 1], n, k)
                };
                let data = base.data();
                let results = Layout::ALL.map(|layout| {
                    let case = Case {
                        layout,
                        ..base.clone()
                    };
                    on_gpu(&gpu, &case, &data)
                });
                for ((found, kernel), layout) in results.iter().zip(Layout::ALL) {
                    // Tables of aligned matrices take the fast kernels, as one allocation does; an odd half of a fused matrix does not begin on 16 bytes.
                    let aligned = k.is_multiple_of(8) || layout.stacked() == Layout::Separate;
                    let slow = kernel.contains("unaligned")
                        || family == "exact_m16" && kernel.contains("exact_any");
                    assert!(kernel.contains(family) || slow, "{layout:?}: {kernel}");
                    if family != "exact_any" && (activation.gated || aligned) {
                        let a_aligned = (k * base.a.size()).is_multiple_of(16);
                        assert_eq!(slow, !(aligned && a_aligned), "{layout:?}: {kernel}");
                    }
                    common::assert_same_bits(found, &results[0].0, &format!("{layout:?} {kernel}"));
                }
            }
        }
    }
}

#[test]
fn a_plan_says_what_is_wrong_with_a_table() {
    let rows = |ptr, stride| DeviceRows {
        ptr: DevicePtr(ptr),
        dtype: DType::BF16,
        stride,
    };
    let table = |ptr| WeightPointers::table(DevicePtr(ptr), DType::BF16, 64, 16);
    let good = GroupedGemm {
        a: rows(0x1000, 64),
        a_rows: 100,
        gather: None,
        groups: GroupPointers::Ragged {
            offsets: DevicePtr(0x2000),
            counts: DevicePtr(0x3000),
            experts: 4,
        },
        gate: Some(table(0x4000)),
        up: table(0x5008),
        gate_bias: Some(BiasPointers::table(DevicePtr(0x6000), DType::F32)),
        up_bias: Some(BiasPointers::table(DevicePtr(0x6100), DType::F32)),
        activation: Activation::SWIGLU,
        out: rows(0x7000, 64),
        rows: 100,
        n: 64,
        k: 64,
        numerics: Numerics::TensorCores,
        strict: true,
    };
    let kernel =
        |p: &GroupedGemm, device: &DeviceInfo| plan_grouped_gemm(p, device).unwrap().kernel;
    // Hopper's own kernels want one allocation.
    for device in [DEVICE, DeviceInfo::H100] {
        assert_eq!(kernel(&good, &device), "moe_grouped_gemm_sm80_bf16_m32");
    }
    let stacked = |ptr| WeightPointers::strided(DevicePtr(ptr), DType::BF16, 64, 64 * 64);
    let one_allocation = GroupedGemm {
        gate: Some(stacked(0x10000)),
        up: stacked(0x20000),
        ..good
    };
    assert!(kernel(&one_allocation, &DeviceInfo::H100).contains("sm90"));
    let at = |offset, alignment| Placement::Table { offset, alignment };
    let with = |placement| GroupedGemm {
        up: WeightPointers {
            placement,
            ..good.up
        },
        ..good
    };
    // What is not known to be aligned is read element by element.
    for placement in [at(0, 8), at(4, 16), at(4, 256)] {
        assert!(kernel(&with(placement), &DEVICE).ends_with("_unaligned"));
    }
    assert!(!kernel(&with(at(64 * 64, 32)), &DEVICE).ends_with("_unaligned"));
    let bias = |ptr, placement| {
        Some(BiasPointers {
            ptr: DevicePtr(ptr),
            dtype: DType::F32,
            stride: 1,
            placement,
        })
    };
    let refused = [
        ("weights", with(at(0, 0))),
        ("weights", with(at(0, 1))),
        ("weights", with(at(0, 48))),
        (
            "weights",
            GroupedGemm {
                up: table(0),
                ..good
            },
        ),
        (
            "weights",
            GroupedGemm {
                up: table(0x5004),
                ..good
            },
        ),
        (
            "gate",
            GroupedGemm {
                gate: Some(stacked(0x10000)),
                ..good
            },
        ),
        (
            "bias",
            GroupedGemm {
                up_bias: bias(0x6100, Placement::Strided { expert_stride: 64 }),
                ..good
            },
        ),
        (
            "bias",
            GroupedGemm {
                up_bias: bias(0x6104, at(0, 4)),
                ..good
            },
        ),
        (
            "bias",
            GroupedGemm {
                up_bias: bias(0x6100, at(0, 2)),
                ..good
            },
        ),
        (
            "bias",
            GroupedGemm {
                up_bias: bias(0, at(0, 4)),
                ..good
            },
        ),
    ];
    for (name, product) in refused {
        match plan_grouped_gemm(&product, &DEVICE) {
            Err(Error::Value { argument, .. }) => assert_eq!(argument, name, "{product:?}"),
            other => panic!("{name}: {other:?}"),
        }
    }
    for placement in [at(usize::MAX / 2, 16), at(usize::MAX, 16)] {
        let planned = plan_grouped_gemm(&with(placement), &DEVICE);
        assert!(
            matches!(planned, Err(Error::Overflow { .. })),
            "{planned:?}"
        );
    }
}

#[test]
fn no_rows_write_nothing_and_one_expert_may_have_all() {
    let Some(gpu) = gpu::open() else { return };
    for dtype in [DType::BF16, DType::F32] {
        for counts in [vec![0, 0, 0], vec![0, 70, 0]] {
            let case = Case {
                spare: 4,
                ..Case::new(dtype, &counts, 16, 24)
            };
            let data = case.data();
            let (found, _) = on_gpu(&gpu, &case, &data);
            check_against_f64(&case, &data, &found);
        }
    }
}

/// What the host knows bounds what kernels touch, however wrong the device's numbers are: the emulator and memcheck tell of the rest.
#[test]
fn numbers_on_the_device_cannot_lead_outside() {
    let Some(gpu) = gpu::open() else { return };
    for (dtype, strict) in [
        (DType::BF16, false),
        (DType::BF16, true),
        (DType::F32, true),
    ] {
        let case = Case {
            strict,
            hostile: true,
            ..Case::new(dtype, &[3, 0, 2, 2, 1, 0, 0, 0], 24, 40)
        };
        on_gpu(&gpu, &case, &case.data());
    }
}

#[test]
fn more_experts_than_a_chunk_of_the_schedule() {
    let Some(gpu) = gpu::open() else { return };
    for strict in [false, true] {
        let mut counts = vec![0; 300];
        for (i, c) in [(0, 2), (127, 1), (128, 3), (200, 1), (299, 2)] {
            counts[i] = c;
        }
        let case = Case {
            strict,
            ..Case::new(DType::BF16, &counts, 8, 16)
        };
        let data = case.data();
        let (found, _) = on_gpu(&gpu, &case, &data);
        check_against_f64(&case, &data, &found);
    }
}

proptest! {
    #![proptest_config(common::cases(24))]
    #[test]
    fn products_are_near_f64(
        counts in prop::collection::vec(prop_oneof![Just(0usize), 1usize..6, 7usize..40], 1..5),
        (n, k) in (1usize..50, 1usize..140),
        round in any::<bool>(),
        dtype in prop::sample::select(DType::ALL.to_vec()),
        out in prop::sample::select(DType::ALL.to_vec()),
        (block, slots, gated) in (1usize..9, 0usize..4, any::<bool>()),
        (bias, scale, strict) in any::<(bool, bool, bool)>(),
        layout in prop::sample::select(Layout::ALL.to_vec()),
        tf32 in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let Some(gpu) = gpu::open() else { return Ok(()) };
        let (n, k) = if round { (n.next_multiple_of(8), k.next_multiple_of(8)) } else { (n, k) };
        let case = Case {
            counts, block, n, k, a: dtype, w: dtype, out,
            activation: if gated { Activation::SWIGLU } else { LINEAR },
            slots, bias, scale: scale && slots > 0, layout,
            numerics: if tf32 { Numerics::Tf32 } else { Numerics::TensorCores },
            strict, spare: 0, hostile: false, seed,
        };
        let data = case.data();
        let (found, _) = on_gpu(&gpu, &case, &data);
        check_against_f64(&case, &data, &found);
    }
}
