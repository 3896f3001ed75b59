//! The combine on the GPU against the CPU: the same bits from the same inputs, for every option, format, alignment and number of slots.
#![cfg(feature = "cuda")]

mod common;
#[path = "common/gpu.rs"]
mod gpu;

use common::{Rng, cases};
use gpu::{Buffer, Gpu};
use half::{bf16, f16};
use moe_kernels::combine as cpu;
use moe_kernels::cuda::combine::*;
use moe_kernels::cuda::{DeviceInfo, DevicePtr};
use moe_kernels::norm::RmsNorm;
use moe_kernels::permute::NO_ROW;
use moe_kernels::{AnyMatMut, AnyMatRef, Cpu, DType, Element, Error, MatMut, MatRef};
use proptest::prelude::*;

/// A matrix on both sides: f32 values that the format holds exactly, and rows in device memory with poison between and before them.
struct Matrix {
    values: Vec<f32>,
    rows: usize,
    width: usize,
    device: DeviceRows,
    buffer: Buffer<u8>,
}

/// How matrices lie in memory: elements between rows, and before the first one.
#[derive(Clone, Copy, Debug)]
struct Layout {
    gap: usize,
    shift: usize,
}

fn to_bytes(dtype: DType, v: f32) -> Vec<u8> {
    match dtype {
        DType::F32 => v.to_le_bytes().to_vec(),
        DType::F16 => f16::from_f32(v).to_le_bytes().to_vec(),
        DType::BF16 => bf16::from_f32(v).to_le_bytes().to_vec(),
        other => panic!("{other}"),
    }
}

fn from_bytes(dtype: DType, bytes: &[u8]) -> f32 {
    match dtype {
        DType::F32 => bytemuck::pod_read_unaligned(bytes),
        DType::F16 => bytemuck::pod_read_unaligned::<f16>(bytes).to_f32(),
        DType::BF16 => bytemuck::pod_read_unaligned::<bf16>(bytes).to_f32(),
        other => panic!("{other}"),
    }
}

impl Matrix {
    fn new(gpu: &Gpu, values: Vec<f32>, width: usize, dtype: DType, layout: Layout) -> Self {
        let rows = values.len() / width;
        let (size, stride) = (dtype.size(), width + layout.gap);
        let mut bytes = vec![0xff; (layout.shift + rows * stride) * size];
        let mut exact = Vec::with_capacity(values.len());
        for (i, &v) in values.iter().enumerate() {
            let at = (layout.shift + i / width * stride + i % width) * size;
            let stored = to_bytes(dtype, v);
            exact.push(from_bytes(dtype, &stored));
            bytes[at..at + size].copy_from_slice(&stored);
        }
        let buffer = gpu.upload(&bytes);
        let ptr = buffer.ptr().add((layout.shift * size) as u64);
        Self {
            values: exact,
            rows,
            width,
            device: DeviceRows { ptr, stride, dtype },
            buffer,
        }
    }

    fn view(&self) -> MatRef<'_, f32> {
        MatRef::new(&self.values, self.rows, self.width).unwrap()
    }
}

/// One problem on both sides, with every operand that there can be.
struct Problem {
    gpu: Gpu,
    tokens: usize,
    slots: usize,
    width: usize,
    layout: Layout,
    ys: Matrix,
    weights: Vec<f32>,
    row_of_pair: Vec<u32>,
    ids: Vec<i32>,
    x: Matrix,
    shared: Matrix,
    gate: Vec<f32>,
    norm: Vec<f32>,
    bias: Vec<f32>,
    residual: Matrix,
    device: Vec<Buffer<f32>>,
    device_rows: Buffer<u32>,
    device_ids: Buffer<i32>,
}

const NUM_EXPERTS: usize = 7;

/// What follows the sum.
#[derive(Clone, Copy, Debug, Default)]
struct Steps {
    scale: Option<f32>,
    shared: u8,
    norm: bool,
    bias: bool,
    residual: bool,
    identity: bool,
    without_weights: bool,
    given_sum: bool,
}

fn dtypes() -> impl Strategy<Value = DType> + Clone {
    prop::sample::select(vec![DType::F32, DType::F16, DType::BF16])
}

impl Problem {
    fn new(
        gpu: Gpu,
        seed: u64,
        [tokens, slots, width]: [usize; 3],
        formats: [DType; 4],
        layout: Layout,
    ) -> Self {
        let mut rng = Rng(seed);
        let pairs = tokens * slots;
        let mut row_of_pair: Vec<u32> = (0..pairs as u32).collect();
        for i in (1..pairs).rev() {
            row_of_pair.swap(i, rng.below(i + 1));
        }
        let mut ids = vec![0; pairs];
        for (row, id) in row_of_pair.iter_mut().zip(&mut ids) {
            match rng.below(6) {
                0 => *row = NO_ROW,
                1 => (*row, *id) = (NO_ROW, NUM_EXPERTS as i32 + rng.below(3) as i32),
                _ => {}
            }
        }
        let [ys_format, x_format, shared_format, residual_format] = formats;
        let mut matrix = |rows: usize, format| {
            Matrix::new(&gpu, rng.normals(rows * width), width, format, layout)
        };
        let ys = matrix(pairs, ys_format);
        let (x, shared, residual) = (
            matrix(tokens, x_format),
            matrix(tokens, shared_format),
            matrix(tokens, residual_format),
        );
        let weights = rng.normals(pairs);
        let (gate, norm, bias) = (rng.normals(tokens), rng.normals(width), rng.normals(width));
        // Vectors begin where the layout says, too.
        let device = [&weights, &gate, &norm, &bias]
            .map(|v| gpu.upload(&[vec![f32::NAN; layout.shift], v.clone()].concat()))
            .into();
        let (device_rows, device_ids) = (gpu.upload(&row_of_pair), gpu.upload(&ids));
        Self {
            gpu,
            tokens,
            slots,
            width,
            layout,
            ys,
            weights,
            row_of_pair,
            ids,
            x,
            shared,
            gate,
            norm,
            bias,
            residual,
            device,
            device_rows,
            device_ids,
        }
    }

    fn vector(&self, i: usize) -> DevicePtr {
        self.device[i].ptr().add(4 * self.layout.shift as u64)
    }

    fn on_gpu(&self, steps: Steps, out: DeviceRows) -> CombineOperands {
        let routed = match steps.given_sum {
            true => Routed::Sum(self.shared.device),
            false => Routed::Pairs {
                ys: self.ys.device,
                rows: self.ys.rows,
                slots: self.slots,
                weights: if steps.without_weights {
                    DevicePtr::NULL
                } else {
                    self.vector(0)
                },
                row_of_pair: self.device_rows.ptr(),
                identity: steps.identity.then(|| Identity {
                    ids: self.device_ids.ptr(),
                    num_experts: NUM_EXPERTS,
                    x: self.x.device,
                }),
            },
        };
        CombineOperands {
            routed_scale: steps.scale.unwrap_or(1.0),
            shared: match steps.shared {
                1 => Some(Shared::Add(self.shared.device)),
                2 => Some(Shared::SigmoidGate(self.shared.device, self.vector(1))),
                3 => Some(Shared::Average(self.shared.device)),
                _ => None,
            },
            norm: steps.norm.then(|| Norm {
                weight: self.vector(2),
                eps: 1e-5,
                multiplier: 0.5,
            }),
            bias: if steps.bias {
                self.vector(3)
            } else {
                DevicePtr::NULL
            },
            residual: steps.residual.then_some(self.residual.device),
            ..CombineOperands::new(self.tokens, self.width, routed, out)
        }
    }

    fn on_cpu<T: Element>(&self, steps: Steps, out: &mut [T])
    where
        for<'a> AnyMatMut<'a>: From<MatMut<'a, T>>,
    {
        let norm = RmsNorm::new(&self.norm, 1e-5)
            .unwrap()
            .with_multiplier(0.5)
            .unwrap();
        let routed = match steps.given_sum {
            true => cpu::Routed::Sum(self.shared.view()),
            false => cpu::Routed::Pairs {
                ys: self.ys.view(),
                weights: (!steps.without_weights).then_some(&self.weights),
                row_of_pair: &self.row_of_pair,
                slots: self.slots,
                identity: steps.identity.then(|| cpu::Identity {
                    ids: &self.ids,
                    num_experts: NUM_EXPERTS,
                    x: self.x.view().into(),
                }),
            },
        };
        let mut operands = cpu::Combine::new(routed);
        operands.routed_scale = steps.scale.unwrap_or(1.0);
        operands.shared = match steps.shared {
            1 => Some(cpu::Shared::Add(self.shared.view())),
            2 => Some(cpu::Shared::SigmoidGate(self.shared.view(), &self.gate)),
            3 => Some(cpu::Shared::Average(self.shared.view())),
            _ => None,
        };
        operands.norm = steps.norm.then_some(&norm);
        operands.bias = steps.bias.then_some(&self.bias);
        operands.residual = steps
            .residual
            .then(|| AnyMatRef::from(self.residual.view()));
        let out = MatMut::new(out, self.tokens, self.width).unwrap();
        cpu::combine_into(&Cpu::new(), &operands, out.into()).unwrap();
    }

    /// What the CPU writes, in the format, as f32.
    fn expected(&self, steps: Steps, dtype: DType) -> Vec<f32> {
        fn run<T: Element>(p: &Problem, steps: Steps) -> Vec<f32>
        where
            for<'a> AnyMatMut<'a>: From<MatMut<'a, T>>,
        {
            let mut out = vec![T::default(); p.tokens * p.width];
            p.on_cpu(steps, &mut out);
            out.into_iter().map(Element::to_f32).collect()
        }
        match dtype {
            DType::F32 => run::<f32>(self, steps),
            DType::F16 => run::<f16>(self, steps),
            DType::BF16 => run::<bf16>(self, steps),
            other => panic!("{other}"),
        }
    }

    /// Runs both; returns the kernel's name.
    fn check(&self, steps: Steps, dtype: DType) -> &'static str {
        let poison = vec![f32::NAN; self.tokens * self.width];
        let out = Matrix::new(&self.gpu, poison, self.width, dtype, self.layout);
        let launch =
            plan_combine(&self.on_gpu(steps, out.device), self.gpu.cuda.device_info()).unwrap();
        let before = self.gpu.download(&out.buffer);
        self.gpu.launch(&launch);
        let after = self.gpu.download(&out.buffer);
        let expected = self.expected(steps, dtype);
        let (size, stride) = (dtype.size(), out.device.stride);
        let mut untouched = before;
        for (i, e) in expected.iter().enumerate() {
            let at = (self.layout.shift + i / self.width * stride + i % self.width) * size;
            let found = from_bytes(dtype, &after[at..at + size]);
            assert!(
                found.to_bits() == e.to_bits() || found.is_nan() && e.is_nan(),
                "{}: token {} column {}: {found:e} is not {e:e}; {steps:?}",
                launch.kernel,
                i / self.width,
                i % self.width,
            );
            untouched[at..at + size].copy_from_slice(&after[at..at + size]);
        }
        assert!(
            untouched == after,
            "{}: written between rows",
            launch.kernel
        );
        launch.kernel
    }
}

fn steps() -> impl Strategy<Value = Steps> {
    let some = prop::bool::weighted(0.3);
    (
        prop::option::of(prop::sample::select(vec![1.0f32, 1.5, -0.3])),
        0..4u8,
        [some; 6],
    )
        .prop_map(
            |(scale, shared, [norm, bias, residual, identity, without_weights, given_sum])| Steps {
                scale,
                shared,
                norm,
                bias,
                residual,
                identity,
                without_weights: without_weights && !identity,
                given_sum,
            },
        )
}

proptest! {
    #![proptest_config(cases(96))]

    #[test]
    fn bits_are_those_of_the_cpu(
        seed: u64,
        tokens in prop::sample::select(vec![0usize, 1, 2, 5, 17]),
        slots in prop::sample::select(vec![1usize, 2, 7, 8, 9, 16, 64]),
        width in prop::sample::select(vec![1usize, 4, 7, 8, 32, 33, 100, 256, 264, 520, 1032, 2056]),
        formats in [dtypes(), dtypes(), dtypes(), dtypes()],
        out in dtypes(),
        layout in prop::sample::select(vec![(0, 0), (0, 0), (8, 8), (1, 0), (0, 1), (3, 2)]),
        steps in steps(),
    ) {
        let Some(gpu) = gpu::open() else { return Ok(()) };
        let layout = Layout { gap: layout.0, shift: layout.1 };
        Problem::new(gpu, seed, [tokens, slots, width], formats, layout).check(steps, out);
    }
}

/// Every kernel runs, chosen by format, alignment, width and steps.
#[test]
fn every_kernel_is_reached() {
    let dense = Layout { gap: 0, shift: 0 };
    let odd = Layout { gap: 1, shift: 0 };
    let (f32_, f16_, bf16_) = (DType::F32, DType::F16, DType::BF16);
    let identity = Steps {
        identity: true,
        ..Steps::default()
    };
    let norm = Steps {
        norm: true,
        ..Steps::default()
    };
    let plain = Steps::default();
    for (ys, out, width, layout, steps, kernel) in [
        (f32_, f32_, 260, dense, plain, "moe_combine_f32_f32"),
        (f32_, f16_, 264, dense, plain, "moe_combine_f32_f16"),
        (f32_, bf16_, 264, dense, plain, "moe_combine_f32_bf16"),
        (f16_, f32_, 264, dense, plain, "moe_combine_f16_f32"),
        (f16_, f16_, 264, dense, plain, "moe_combine_f16_f16"),
        (bf16_, f32_, 264, dense, plain, "moe_combine_bf16_f32"),
        (bf16_, bf16_, 264, dense, plain, "moe_combine_bf16_bf16"),
        (bf16_, f16_, 264, dense, plain, "moe_combine_any_4"),
        (bf16_, bf16_, 264, dense, identity, "moe_combine_any_4"),
        (bf16_, bf16_, 263, dense, plain, "moe_combine_any_1"),
        (f32_, f32_, 260, odd, plain, "moe_combine_any_1"),
        (f32_, f32_, 260, dense, norm, "moe_combine_norm_4"),
        (f16_, f32_, 261, dense, norm, "moe_combine_norm_1"),
    ] {
        let Some(gpu) = gpu::open() else { return };
        let p = Problem::new(gpu, 5, [4, 8, width], [ys, f32_, f32_, f32_], layout);
        assert_eq!(p.check(steps, out), kernel);
    }
}

/// Tiles narrower and wider than a block, several tokens in a block, one token on many multiprocessors.
#[test]
fn tiles_of_all_shapes() {
    for (tokens, width) in [
        (1, 8192),
        (3, 768),
        (700, 64),
        (300, 512),
        (2, 7168),
        (40, 1536),
    ] {
        let Some(gpu) = gpu::open() else { return };
        let p = Problem::new(
            gpu,
            9,
            [tokens, 2, width],
            [DType::BF16; 4],
            Layout { gap: 0, shift: 0 },
        );
        p.check(
            Steps {
                residual: true,
                ..Steps::default()
            },
            DType::BF16,
        );
    }
}

/// NaN, infinities, zeros of both signs and subnormal numbers, in rows, weights and results.
#[test]
fn special_values() {
    for (width, dtype) in [
        (64, DType::F32),
        (64, DType::F16),
        (64, DType::BF16),
        (63, DType::F16),
        (63, DType::BF16),
    ] {
        let Some(gpu) = gpu::open() else { return };
        let mut p = Problem::new(
            gpu,
            3,
            [6, 4, width],
            [dtype, DType::F32, DType::F32, DType::F32],
            Layout { gap: 0, shift: 0 },
        );
        let special = [
            f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            0.0,
            -0.0,
            1e-40,
            -3e-8,
            6e-5,
            65520.0,
            3.4e38,
            1.5e-45,
            -65536.0,
        ];
        let values = (0..p.ys.values.len()).map(|i| {
            if i % 3 == 0 {
                special[i / 3 % special.len()]
            } else {
                p.ys.values[i]
            }
        });
        p.ys = Matrix::new(&p.gpu, values.collect(), width, dtype, p.layout);
        for (i, w) in p.weights.iter_mut().enumerate() {
            *w = special[i % special.len()];
        }
        p.device[0] = p.gpu.upload(&p.weights);
        for out in [DType::F32, DType::F16, DType::BF16] {
            p.check(Steps::default(), out);
            p.check(
                Steps {
                    without_weights: true,
                    ..Steps::default()
                },
                out,
            );
            p.check(
                Steps {
                    norm: true,
                    shared: 2,
                    ..Steps::default()
                },
                out,
            );
        }
    }
}

/// The residual may be the output itself.
#[test]
fn in_place_over_the_residual() {
    let Some(gpu) = gpu::open() else { return };
    let p = Problem::new(
        gpu,
        4,
        [5, 3, 264],
        [DType::F32, DType::F32, DType::F32, DType::BF16],
        Layout { gap: 0, shift: 0 },
    );
    let steps = Steps {
        residual: true,
        ..Steps::default()
    };
    let launch = plan_combine(
        &p.on_gpu(steps, p.residual.device),
        p.gpu.cuda.device_info(),
    )
    .unwrap();
    p.gpu.launch(&launch);
    let found: Vec<f32> = p
        .gpu
        .download(&p.residual.buffer)
        .chunks(2)
        .map(|b| from_bytes(DType::BF16, b))
        .collect();
    assert_eq!(found, p.expected(steps, DType::BF16));
}

#[test]
fn plans_say_what_is_wrong() {
    let rows = |at: u64, stride| DeviceRows {
        ptr: DevicePtr(at << 20),
        stride,
        dtype: DType::BF16,
    };
    let (weights, row_of_pair) = (DevicePtr(2 << 20), DevicePtr(3 << 20));
    let pairs = |ys, weights, row_of_pair, identity| Routed::Pairs {
        ys,
        rows: 10,
        slots: 2,
        weights,
        row_of_pair,
        identity,
    };
    let fine = CombineOperands::new(
        5,
        64,
        pairs(rows(1, 64), weights, row_of_pair, None),
        rows(4, 64),
    );
    let argument =
        |operands: CombineOperands| match plan_combine(&operands, &DeviceInfo::A100).map(drop) {
            Err(Error::Value { argument, .. }) => argument,
            Err(Error::Overflow { what }) => what,
            other => panic!("{other:?}"),
        };
    assert!(plan_combine(&fine, &DeviceInfo::A100).is_ok());
    let routed = |routed| CombineOperands { routed, ..fine };
    assert_eq!(
        argument(routed(pairs(rows(0, 64), weights, row_of_pair, None))),
        "ys"
    );
    assert_eq!(
        argument(routed(pairs(rows(1, 63), weights, row_of_pair, None))),
        "ys"
    );
    assert_eq!(
        argument(routed(pairs(rows(1, 64), DevicePtr(6), row_of_pair, None))),
        "weights"
    );
    assert_eq!(
        argument(routed(pairs(rows(1, 64), weights, DevicePtr::NULL, None))),
        "row_of_pair"
    );
    assert_eq!(argument(routed(Routed::Sum(rows(0, 64)))), "routed sum");
    let identity = Identity {
        ids: DevicePtr(5 << 20),
        num_experts: 7,
        x: rows(6, 64),
    };
    assert_eq!(
        argument(routed(pairs(
            rows(1, 64),
            DevicePtr::NULL,
            row_of_pair,
            Some(identity)
        ))),
        "weights"
    );
    let no_ids = Identity {
        ids: DevicePtr::NULL,
        ..identity
    };
    assert_eq!(
        argument(routed(pairs(
            rows(1, 64),
            weights,
            row_of_pair,
            Some(no_ids)
        ))),
        "ids"
    );
    let no_x = Identity {
        x: rows(0, 64),
        ..identity
    };
    assert_eq!(
        argument(routed(pairs(rows(1, 64), weights, row_of_pair, Some(no_x)))),
        "x"
    );
    assert_eq!(
        argument(CombineOperands {
            routed_scale: f32::NAN,
            ..fine
        }),
        "routed_scale"
    );
    assert_eq!(
        argument(CombineOperands {
            shared: Some(Shared::Add(rows(7, 3))),
            ..fine
        }),
        "shared"
    );
    assert_eq!(
        argument(CombineOperands {
            shared: Some(Shared::SigmoidGate(rows(7, 64), DevicePtr::NULL)),
            ..fine
        }),
        "shared gate"
    );
    let sum = SharedSum {
        experts: 2,
        expert_stride: 256,
        weights: DevicePtr::NULL,
    };
    let several = |shared_sum| CombineOperands {
        shared: Some(Shared::Add(rows(7, 64))),
        shared_sum: Some(shared_sum),
        ..fine
    };
    assert!(plan_combine(&several(sum), &DeviceInfo::A100).is_ok());
    for (bad, expected) in [
        (SharedSum { experts: 0, ..sum }, "shared_sum.experts"),
        (
            SharedSum {
                weights: DevicePtr(2),
                ..sum
            },
            "shared_sum.weights",
        ),
        (
            SharedSum {
                expert_stride: usize::MAX,
                ..sum
            },
            "shared experts",
        ),
    ] {
        assert_eq!(argument(several(bad)), expected);
    }
    assert_eq!(
        argument(CombineOperands {
            shared_sum: Some(sum),
            ..fine
        }),
        "shared_sum"
    );
    let apart = IdentityApart {
        ids: identity.ids,
        weights,
        slots: 2,
        num_experts: 7,
        x: identity.x,
        scale: 1.0,
    };
    let beside = |identity_apart| CombineOperands {
        identity_apart: Some(identity_apart),
        ..fine
    };
    let launch = plan_combine(&beside(apart), &DeviceInfo::A100).unwrap();
    assert_eq!(launch.kernel, "moe_combine_any_4");
    for (bad, expected) in [
        (IdentityApart { slots: 3, ..apart }, "identity_apart.slots"),
        (
            IdentityApart {
                scale: f32::NAN,
                ..apart
            },
            "identity_apart.scale",
        ),
        (
            IdentityApart {
                weights: DevicePtr::NULL,
                ..apart
            },
            "identity_apart.weights",
        ),
        (
            IdentityApart {
                ids: DevicePtr::NULL,
                ..apart
            },
            "ids",
        ),
        (
            IdentityApart {
                x: rows(0, 64),
                ..apart
            },
            "x",
        ),
    ] {
        assert_eq!(argument(beside(bad)), expected);
    }
    assert_eq!(
        argument(CombineOperands {
            routed: pairs(rows(1, 64), weights, row_of_pair, Some(identity)),
            ..beside(apart)
        }),
        "identity_apart"
    );
    let norm = Norm {
        weight: DevicePtr(9 << 20),
        eps: 1e-5,
        multiplier: 1.0,
    };
    assert_eq!(
        argument(CombineOperands {
            norm: Some(Norm { eps: -1.0, ..norm }),
            ..fine
        }),
        "eps"
    );
    assert_eq!(
        argument(CombineOperands {
            norm: Some(Norm {
                multiplier: f32::INFINITY,
                ..norm
            }),
            ..fine
        }),
        "multiplier"
    );
    assert_eq!(
        argument(CombineOperands {
            norm: Some(Norm {
                weight: DevicePtr::NULL,
                ..norm
            }),
            ..fine
        }),
        "norm"
    );
    assert_eq!(
        argument(CombineOperands {
            bias: DevicePtr(3),
            ..fine
        }),
        "bias"
    );
    assert_eq!(
        argument(CombineOperands {
            residual: Some(rows(8, 1)),
            ..fine
        }),
        "residual"
    );
    assert_eq!(
        argument(CombineOperands {
            out: rows(0, 64),
            ..fine
        }),
        "out"
    );
    assert_eq!(
        argument(CombineOperands {
            tokens: usize::MAX,
            ..fine
        }),
        "T·K"
    );
}

/// The grid covers every column of every token, for any shape.
#[test]
fn grids_cover_everything() {
    let rows = DeviceRows {
        ptr: DevicePtr(1 << 20),
        stride: 1 << 20,
        dtype: DType::BF16,
    };
    for tokens in [1usize, 2, 7, 100, 4096, 70_000, 1 << 20] {
        for hidden in [1usize, 8, 64, 768, 1000, 4096, 7168, 16384] {
            let routed = Routed::Pairs {
                ys: rows,
                rows: 1 << 20,
                slots: 8,
                weights: rows.ptr,
                row_of_pair: rows.ptr,
                identity: None,
            };
            let launch = plan_combine(
                &CombineOperands::new(tokens, hidden, routed, rows),
                &DeviceInfo::H100,
            )
            .unwrap();
            let field =
                |at: usize| u32::from_le_bytes(launch.params()[at..at + 4].try_into().unwrap());
            let (threads, tiles) = (field(168 + 12), field(168 + 16));
            let columns = if hidden.is_multiple_of(8) { 8 } else { 1 };
            assert!(threads.is_power_of_two() && (32..=256).contains(&threads));
            assert!(launch.block[0] <= 256 && launch.block[0].is_multiple_of(threads));
            assert!(u64::from(tiles) * u64::from(threads) * columns >= hidden as u64);
            assert_eq!(launch.grid[0], tiles);
            let groups = launch.block[0] / threads;
            assert!(
                launch.grid[1] == 65535
                    || u64::from(launch.grid[1]) * u64::from(groups) >= tokens as u64
            );
        }
    }
}
