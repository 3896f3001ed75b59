//! The grouped product at the safe level, on a GPU or on the emulator (`scripts/emulate-cuda.sh`): every layout of the weights against the definition of the bits, tables of
//! tensors and their streams, graph capture, and what is refused.
#![cfg(feature = "cuda")]

mod common;
#[path = "common/gpu.rs"]
mod gpu;

use common::Rng;
use common::product::{bytes, chain};
use cudarc::driver::{CudaSlice, CudaStream};
use gpu::{Buffer, Gpu};
use moe_kernels::cuda::grouped_gemm::{GatherViews, GroupViews, GroupedGemmViews};
use moe_kernels::cuda::moe::UpViews;
use moe_kernels::cuda::{Cuda, DeviceMat, DeviceMatMut, DeviceVec, TensorTable, WeightViews};
use moe_kernels::grouped_gemm::{Activation, ActivationFunction, Clamp};
use moe_kernels::{DType, Error};

const EXPERTS: usize = 3;
const COUNTS: [i32; EXPERTS] = [2, 0, 5];
const OFFSETS: [i32; EXPERTS + 1] = [0, 4, 4, 9];
/// The last row of each expert's block of four is padding.
const ROWS: usize = 10;
const N: usize = 12;
const K: usize = 20;
const SLOTS: usize = 2;
const A_ROWS: usize = 6;

/// Exact in f32, so that the definition of the bits is all that one needs.
const GATED: Activation = Activation::gated(ActivationFunction::Relu);
const PLAIN: Activation = Activation::plain(ActivationFunction::Identity);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Layout {
    Plain,
    Fused,
    Interleaved,
    Separate,
}

const LAYOUTS: [Layout; 4] = [
    Layout::Plain,
    Layout::Fused,
    Layout::Interleaved,
    Layout::Separate,
];

/// Numbers of a product, the weights as `[E, N, K]`.
struct Data {
    a: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    gate_bias: Vec<f32>,
    up_bias: Vec<f32>,
    scale: Vec<f32>,
    pairs: Vec<u32>,
}

impl Data {
    fn new(seed: u64) -> Self {
        let mut rng = Rng(seed);
        Self {
            a: rng.normals(A_ROWS * K),
            gate: rng.normals(EXPERTS * N * K),
            up: rng.normals(EXPERTS * N * K),
            gate_bias: rng.normals(EXPERTS * N),
            up_bias: rng.normals(EXPERTS * N),
            scale: rng.normals(A_ROWS * SLOTS),
            pairs: (0..ROWS)
                .map(|_| rng.below(A_ROWS * SLOTS) as u32)
                .collect(),
        }
    }

    /// The definition, NaN in rows of no expert.
    fn expected(&self, gated: bool) -> Vec<f32> {
        let mut out = vec![f32::NAN; ROWS * N];
        for e in 0..EXPERTS {
            for r in OFFSETS[e] as usize..(OFFSETS[e] + COUNTS[e]) as usize {
                let pair = self.pairs[r] as usize;
                let a: Vec<f32> = self.a[pair / SLOTS * K..][..K]
                    .iter()
                    .map(|v| v * self.scale[pair])
                    .collect();
                for c in 0..N {
                    let at = e * N + c;
                    let sum =
                        |w: &[f32], b: &[f32]| chain(DType::F32, &a, &w[at * K..][..K]) + b[at];
                    let up = sum(&self.up, &self.up_bias);
                    out[r * N + c] = match gated {
                        true => sum(&self.gate, &self.gate_bias).max(0.0) * up,
                        false => up,
                    };
                }
            }
        }
        out
    }

    /// Weights, or biases as matrices of width 1, as a layout has them: each tensor with its rows an expert.
    fn tensors(
        &self,
        layout: Layout,
        gate: &[f32],
        up: &[f32],
        width: usize,
    ) -> Vec<(Vec<f32>, usize)> {
        let joined = |by: usize| {
            let parts = gate.chunks(by * width).zip(up.chunks(by * width));
            parts
                .flat_map(|(g, u)| [g, u].concat())
                .collect::<Vec<f32>>()
        };
        match layout {
            Layout::Plain => vec![(up.to_vec(), N)],
            Layout::Fused => vec![(joined(N), 2 * N)],
            Layout::Interleaved => vec![(joined(1), 2 * N)],
            Layout::Separate => vec![(gate.to_vec(), N), (up.to_vec(), N)],
        }
    }
}

type Table = TensorTable<f32, CudaSlice<f32>>;

/// A tensor for all experts, or one for each.
enum Tensor {
    Stacked(CudaSlice<f32>, usize),
    Table(Table),
}

impl Tensor {
    /// `values [E, rows, cols]`.
    fn new(gpu: &Gpu, values: &[f32], rows: usize, cols: usize, apart: bool) -> Self {
        if !apart {
            return Self::Stacked(gpu.stream.clone_htod(values).unwrap(), EXPERTS * rows);
        }
        let tensors = values
            .chunks(rows * cols)
            .map(|v| gpu.stream.clone_htod(v).unwrap())
            .collect();
        Self::Table(TensorTable::new(&gpu.stream, tensors, rows, cols).unwrap())
    }

    fn view<'a>(&'a self, stream: &'a CudaStream, cols: usize) -> WeightViews<'a> {
        match self {
            Self::Stacked(all, rows) => DeviceMat::new(stream, all, *rows, cols).unwrap().into(),
            Self::Table(table) => table.view(stream).into(),
        }
    }
}

/// The product's operands on the device.
struct Device {
    layout: Layout,
    a: CudaSlice<f32>,
    weights: Vec<Tensor>,
    bias: Tensor,
    offsets: CudaSlice<i32>,
    counts: CudaSlice<i32>,
    pairs: CudaSlice<u32>,
    scale: CudaSlice<f32>,
}

impl Device {
    fn new(gpu: &Gpu, data: &Data, layout: Layout, apart: bool, bias_apart: bool) -> Self {
        let stream = &gpu.stream;
        let weights = data.tensors(layout, &data.gate, &data.up, K);
        // Biases of separate weights are one tensor, the gate's first.
        let biases = match layout {
            Layout::Separate => Layout::Fused,
            other => other,
        };
        let (bias, width) = &data.tensors(biases, &data.gate_bias, &data.up_bias, 1)[0];
        Self {
            layout,
            a: stream.clone_htod(&data.a).unwrap(),
            weights: weights
                .iter()
                .map(|(w, rows)| Tensor::new(gpu, w, *rows, K, apart))
                .collect(),
            bias: match bias_apart {
                true => Tensor::new(gpu, bias, 1, *width, true),
                false => Tensor::Stacked(stream.clone_htod(bias).unwrap(), EXPERTS),
            },
            offsets: stream.clone_htod(&OFFSETS).unwrap(),
            counts: stream.clone_htod(&COUNTS).unwrap(),
            pairs: stream.clone_htod(&data.pairs).unwrap(),
            scale: stream.clone_htod(&data.scale).unwrap(),
        }
    }

    fn gated(&self) -> bool {
        self.layout != Layout::Plain
    }

    fn up<'a>(&'a self, stream: &'a CudaStream) -> UpViews<'a> {
        let view = |i: usize| self.weights[i].view(stream, K);
        match self.layout {
            Layout::Plain => UpViews::Plain(view(0)),
            Layout::Fused => UpViews::Fused(view(0)),
            Layout::Interleaved => UpViews::Interleaved(view(0)),
            Layout::Separate => UpViews::Separate(view(0), view(1)),
        }
    }

    fn groups<'a>(&'a self, stream: &'a CudaStream) -> GroupViews<'a> {
        GroupViews::Ragged {
            offsets: DeviceVec::new(stream, &self.offsets),
            counts: DeviceVec::new(stream, &self.counts),
            experts: EXPERTS,
        }
    }

    /// The whole product, everything used.
    fn views<'a>(&'a self, stream: &'a CudaStream) -> GroupedGemmViews<'a> {
        let a = DeviceMat::new(stream, &self.a, A_ROWS, K).unwrap();
        let activation = if self.gated() { GATED } else { PLAIN };
        let mut views = GroupedGemmViews::new(a, self.groups(stream), self.up(stream), activation);
        views.gather = Some(GatherViews {
            pair_of_row: DeviceVec::new(stream, &self.pairs),
            slots: SLOTS,
            input_scale: Some(DeviceVec::new(stream, &self.scale)),
        });
        let width = if self.gated() { 2 * N } else { N };
        views.bias = Some(self.bias.view(stream, width));
        views
    }
}

fn poisoned(gpu: &Gpu) -> Buffer<f32> {
    gpu.filled(ROWS * N, 0xff)
}

fn queue(gpu: &Gpu, views: &GroupedGemmViews<'_>, out: &mut Buffer<f32>) -> Result<(), Error> {
    let mut out = out.view_mut();
    let mut out = DeviceMatMut::new(&gpu.stream, &mut out, ROWS, N)?;
    gpu.cuda.grouped_gemm_into(&gpu.stream, views, &mut out)
}

#[test]
fn every_layout_apart_or_not_is_the_definition() {
    let Some(gpu) = gpu::open() else { return };
    let data = Data::new(5);
    for layout in LAYOUTS {
        for (apart, bias_apart) in [(false, false), (true, true), (true, false), (false, true)] {
            let device = Device::new(&gpu, &data, layout, apart, bias_apart);
            let mut out = poisoned(&gpu);
            queue(&gpu, &device.views(&gpu.stream), &mut out).unwrap();
            let what = format!("{layout:?} {apart} {bias_apart}");
            common::assert_same_bits(&gpu.download(&out), &data.expected(device.gated()), &what);
        }
    }
}

/// Without gather, for one expert, through a table of bytes, in a format of 16 bits: whole numbers, so that every sum is exact.
#[test]
fn one_expert_in_16_bits_by_a_table_of_bytes() {
    let Some(gpu) = gpu::open() else { return };
    let mut rng = Rng(3);
    for dtype in [DType::BF16, DType::F16] {
        let mut whole =
            |n: usize| -> Vec<f32> { (0..n).map(|_| rng.below(9) as f32 - 4.0).collect() };
        let (a, w) = (whole(ROWS * K), whole(N * K));
        let a_bytes = gpu.stream.clone_htod(&bytes(dtype, &a)).unwrap();
        let w_bytes = gpu.stream.clone_htod(&bytes(dtype, &w)).unwrap();
        let table =
            TensorTable::from_bytes(&gpu.stream, vec![w_bytes.as_view()], dtype, N, K).unwrap();
        assert_eq!((table.len(), table.is_empty()), (1, false));
        let mat = DeviceMat::from_bytes(&gpu.stream, &a_bytes, dtype, ROWS, K).unwrap();
        let weights = UpViews::Plain(table.view(&gpu.stream).into());
        let views = GroupedGemmViews::new(mat, GroupViews::Single, weights, PLAIN);
        let mut out = poisoned(&gpu);
        queue(&gpu, &views, &mut out).unwrap();
        drop(views);
        assert_eq!(table.into_tensors().len(), 1);
        let expected: Vec<f32> = (0..ROWS * N)
            .map(|i| chain(DType::F32, &a[i / N * K..][..K], &w[i % N * K..][..K]))
            .collect();
        assert_eq!(gpu.download(&out), expected, "{dtype}");
    }
}

#[test]
fn a_call_is_captured_and_replayed_with_other_data() {
    let Some(gpu) = gpu::open() else { return };
    let (first, second) = (Data::new(1), Data::new(2));
    let mut device = Device::new(&gpu, &first, Layout::Fused, true, true);
    let mut out = poisoned(&gpu);
    queue(&gpu, &device.views(&gpu.stream), &mut out).unwrap(); // loads the kernel
    gpu.write(&mut out, &[f32::NAN; ROWS * N]);
    let graph = gpu.capture(|| queue(&gpu, &device.views(&gpu.stream), &mut out).unwrap());
    let captured = gpu.download(&out);
    assert!(
        captured.iter().all(|v| v.is_nan()),
        "a capture runs nothing"
    );
    let mixed = Data {
        a: second.a.clone(),
        ..first
    };
    gpu.stream.memcpy_htod(&second.a, &mut device.a).unwrap();
    graph.launch().unwrap();
    common::assert_same_bits(&gpu.download(&out), &mixed.expected(true), "a replay");
}

/// Each operand of a call comes from another stream, and nothing but cudarc's events orders them: tensors, the table, the product; then the table goes, and what
/// comes into its memory may not come too early.
#[test]
fn tables_take_part_in_cudarcs_events() {
    if gpu::open().is_none() {
        return;
    }
    // A context of its own handle, with event tracking on.
    let cuda = Cuda::new(0).unwrap();
    let streams: Vec<_> = (0..4)
        .map(|_| cuda.context().new_stream().unwrap())
        .collect();
    let [tensors, tables, products, reader] = &streams[..] else {
        unreachable!()
    };
    let (n, k) = (16, 64);
    for round in 0..4 {
        let value = round as f32 + 1.0;
        let experts: Vec<CudaSlice<f32>> = (0..2)
            .map(|e| {
                tensors
                    .clone_htod(&vec![value * (e + 1) as f32; n * k])
                    .unwrap()
            })
            .collect();
        let table = TensorTable::new(tables, experts, n, k).unwrap();
        let a = tensors.clone_htod(&vec![1.0f32; 4 * k]).unwrap();
        let offsets = tables.clone_htod(&[0, 2, 4]).unwrap();
        let counts = tables.clone_htod(&[2, 2]).unwrap();
        let mut out = reader.alloc_zeros::<f32>(4 * n).unwrap();
        let groups = GroupViews::Ragged {
            offsets: DeviceVec::new(products, &offsets),
            counts: DeviceVec::new(products, &counts),
            experts: 2,
        };
        let weights = UpViews::Plain(table.view(products).into());
        let mat = DeviceMat::new(products, &a, 4, k).unwrap();
        let views = GroupedGemmViews::new(mat, groups, weights, PLAIN);
        let mut y = DeviceMatMut::new(products, &mut out, 4, n).unwrap();
        cuda.grouped_gemm_into(products, &views, &mut y).unwrap();
        drop((views, y));
        // Owned again, and written at once. On a device without stream-ordered allocation, as the emulator's, freeing the table waits for the product anyway, so that the
        // table's own word to the streams (`release`) counts on others only.
        for mut tensor in table.into_tensors() {
            let nan = vec![f32::NAN; n * k];
            tensors.memcpy_htod(&nan, &mut tensor).unwrap();
        }
        // Now, and not after the product that the next line waits for.
        tensors.synchronize().unwrap();
        let found = reader.clone_dtoh(&out).unwrap();
        reader.synchronize().unwrap();
        let expected: Vec<f32> = (0..4 * n)
            .map(|i| value * k as f32 * if i < 2 * n { 1.0 } else { 2.0 })
            .collect();
        assert_eq!(found, expected, "round {round}");
    }
}

/// What an error names.
fn argument(error: &Error) -> String {
    match error {
        Error::Value { argument, .. }
        | Error::Shape { argument, .. }
        | Error::BufferTooSmall { argument, .. } => (*argument).to_owned(),
        Error::Overflow { what } => (*what).to_owned(),
        other => panic!("{other:?}"),
    }
}

/// Changes one operand of a good call.
type Change = for<'a> fn(&mut GroupedGemmViews<'a>, &'a CudaStream, &'a Spare);

/// Memory to put in the wrong place.
struct Spare {
    floats: CudaSlice<f32>,
    ints: CudaSlice<i32>,
    pairs: CudaSlice<u32>,
    /// Two tensors `[N, K]`, and three `[N, K]` and `[1, 2N]`.
    two: Table,
    three: Table,
    biases: Table,
    other_stream: std::sync::Arc<CudaStream>,
}

impl Spare {
    fn new(gpu: &Gpu) -> Self {
        let table = |count: usize, n: usize, k: usize| {
            let tensors = (0..count).map(|_| gpu.stream.alloc_zeros::<f32>(n * k).unwrap());
            TensorTable::new(&gpu.stream, tensors.collect(), n, k).unwrap()
        };
        Self {
            floats: gpu.stream.alloc_zeros(4096).unwrap(),
            ints: gpu.stream.alloc_zeros(2).unwrap(),
            pairs: gpu.stream.alloc_zeros(ROWS - 1).unwrap(),
            two: table(2, N, K),
            three: table(3, N, K),
            biases: table(3, 1, 2 * N),
            other_stream: gpu.cuda.context().new_stream().unwrap(),
        }
    }

    fn mat<'a>(&'a self, stream: &'a CudaStream, rows: usize, cols: usize) -> DeviceMat<'a> {
        DeviceMat::new(stream, &self.floats, rows, cols).unwrap()
    }
}

fn gather<'a, 'b>(views: &'b mut GroupedGemmViews<'a>) -> &'b mut GatherViews<'a> {
    views.gather.as_mut().unwrap()
}

/// Wrong operands of a call with fused weights, and the argument that the error names.
const REFUSED: &[(&str, Change)] = &[
    ("a", |v, _, s| v.a = s.mat(&s.other_stream, A_ROWS, K)),
    ("a", |v, _, _| v.gather = None), // six rows of A for ten of the output
    ("weights", |v, stream, s| v.a = s.mat(stream, A_ROWS, K + 1)),
    ("weights", |v, stream, s| v.a = s.mat(stream, A_ROWS, 0)),
    ("pair_of_row", |v, stream, s| {
        gather(v).pair_of_row = DeviceVec::new(stream, &s.pairs);
    }),
    ("slots", |v, _, _| gather(v).slots = 0),
    ("input_scale", |v, _, _| gather(v).slots = SLOTS + 1),
    ("T·K as u32", |v, _, _| gather(v).slots = 1 << 31),
    ("T·K", |v, _, _| gather(v).slots = usize::MAX),
    ("input_scale", |v, _, s| {
        gather(v).input_scale = Some(DeviceVec::new(&s.other_stream, &s.floats));
    }),
    ("offsets", |v, stream, s| {
        v.groups = GroupViews::Ragged {
            offsets: DeviceVec::new(stream, &s.ints),
            counts: DeviceVec::new(stream, &s.ints),
            experts: EXPERTS,
        };
    }),
    ("counts", |v, _, s| {
        if let GroupViews::Ragged { counts, .. } = &mut v.groups {
            *counts = DeviceVec::new(&s.other_stream, &s.ints);
        }
    }),
    ("counts", |v, stream, s| {
        if let GroupViews::Ragged { counts, .. } = &mut v.groups {
            *counts = DeviceVec::new(stream, &s.ints);
        }
    }),
    ("experts", |v, _, _| {
        if let GroupViews::Ragged { experts, .. } = &mut v.groups {
            *experts = usize::MAX;
        }
    }),
    ("weights", |v, _, _| {
        if let GroupViews::Ragged { experts, .. } = &mut v.groups {
            *experts = 2;
        }
    }),
    ("weights", |v, _, _| v.groups = GroupViews::Single),
    ("weights", |v, stream, s| {
        v.weights = UpViews::Fused(s.mat(stream, EXPERTS * N, K).into());
    }),
    ("weights", |v, _, s| {
        v.weights = UpViews::Fused(s.mat(&s.other_stream, EXPERTS * 2 * N, K).into());
    }),
    ("weights", |v, stream, s| {
        v.weights = UpViews::Fused(s.three.view(stream).into());
    }),
    ("weights", |v, stream, s| {
        v.weights = UpViews::Separate(s.three.view(stream).into(), s.two.view(stream).into());
    }),
    ("weights", |v, stream, s| {
        let gate = s.three.view(stream).into();
        v.weights = UpViews::Separate(gate, s.three.view(&s.other_stream).into());
    }),
    ("gate", |v, stream, s| {
        v.weights = UpViews::Separate(s.two.view(stream).into(), s.three.view(stream).into());
    }),
    // One launch has one way of finding matrices.
    ("gate", |v, stream, s| {
        let stacked = s.mat(stream, EXPERTS * N, K);
        v.weights = UpViews::Separate(stacked.into(), s.three.view(stream).into());
    }),
    ("gate", |v, _, _| v.activation = PLAIN),
    ("bias", |v, stream, s| {
        v.bias = Some(s.mat(stream, EXPERTS, N).into())
    }),
    ("bias", |v, stream, s| {
        v.bias = Some(s.mat(stream, EXPERTS + 1, 2 * N).into())
    }),
    ("bias", |v, stream, s| {
        v.bias = Some(s.three.view(stream).into())
    }),
    ("bias", |v, _, s| {
        v.bias = Some(s.biases.view(&s.other_stream).into())
    }),
    ("clamp.limit", |v, _, _| {
        v.activation.clamp = Clamp::Pre { limit: f32::NAN };
    }),
];

#[test]
fn a_bad_operand_is_named_and_nothing_is_queued() {
    let Some(gpu) = gpu::open() else { return };
    let device = Device::new(&gpu, &Data::new(5), Layout::Fused, false, false);
    let spare = Spare::new(&gpu);
    for (i, (name, change)) in REFUSED.iter().enumerate() {
        let mut out = poisoned(&gpu);
        let mut views = device.views(&gpu.stream);
        change(&mut views, &gpu.stream, &spare);
        let error = queue(&gpu, &views, &mut out).expect_err(name);
        assert_eq!(argument(&error), *name, "change {i}: {error}");
        drop(views);
        let untouched = gpu.download(&out);
        assert!(untouched.iter().all(|v| v.is_nan()), "change {i} wrote");
    }
    // The output, and the stream of the call.
    let views = device.views(&gpu.stream);
    let mut out = poisoned(&gpu);
    let mut call = |stream: &CudaStream, view: &CudaStream, rows: usize, cols: usize| {
        let mut memory = out.view_mut();
        let mut out = DeviceMatMut::new(view, &mut memory, rows, cols).unwrap();
        let called = gpu.cuda.grouped_gemm_into(stream, &views, &mut out);
        argument(&called.unwrap_err())
    };
    let (ours, other) = (&*gpu.stream, &*spare.other_stream);
    assert_eq!(call(ours, other, ROWS, N), "out");
    assert_eq!(call(other, other, ROWS, N), "a");
    assert_eq!(call(ours, ours, ROWS, N - 1), "weights");
    assert_eq!(call(ours, ours, ROWS, 0), "weights");
    assert!(gpu.download(&out).iter().all(|v| v.is_nan()));
    // And the good call is good.
    let mut out = poisoned(&gpu);
    queue(&gpu, &views, &mut out).unwrap();
    assert!(!gpu.download(&out)[0].is_nan());
}

#[test]
fn a_table_says_what_is_wrong_with_its_tensors() {
    let Some(gpu) = gpu::open() else { return };
    let stream = &gpu.stream;
    let memory = stream.alloc_zeros::<f32>(2 * N * K).unwrap();
    let refused = |tensors: Vec<cudarc::driver::CudaView<'_, f32>>, n: usize, k: usize| {
        argument(&TensorTable::new(stream, tensors, n, k).unwrap_err())
    };
    assert_eq!(
        refused(vec![memory.as_view(), memory.slice(1..N * K)], N, K),
        "tensors"
    );
    assert_eq!(refused(vec![memory.as_view()], usize::MAX, 2), "tensors");
    let bytes = stream.alloc_zeros::<u8>(N * K * 4 + 2).unwrap();
    let table = |from: usize, dtype: DType| {
        let views = vec![bytes.slice(from..)];
        TensorTable::from_bytes(stream, views, dtype, N, K).map(|t| t.view(stream).alignment())
    };
    assert_eq!(argument(&table(2, DType::F32).unwrap_err()), "tensors");
    assert_eq!(argument(&table(3, DType::F32).unwrap_err()), "tensors"); // also too short
    assert_eq!(table(0, DType::F32).unwrap(), 256);
    assert_eq!(table(2, DType::BF16).unwrap(), 2);
    // What one can ask a table, and a table of nothing.
    let both = vec![memory.slice(..N * K), memory.slice(N * K..)];
    let two = TensorTable::new(stream, both, N, K).unwrap();
    let view = two.view(stream);
    assert_eq!((view.experts(), view.rows(), view.cols()), (2, N, K));
    assert_eq!((view.dtype(), two.tensors().len()), (DType::F32, 2));
    let [first, second] = [0, 1].map(|i| two.tensors()[i].len());
    assert_eq!((first, second), (N * K, N * K));
    assert_eq!(view.alignment(), 64); // 960 bytes from the first to the second
    assert!(format!("{two:?}").contains("2 of f32 [12, 20]"), "{two:?}");
    let none = TensorTable::new(stream, Vec::<CudaSlice<f32>>::new(), N, K).unwrap();
    assert!(none.is_empty() && !none.view(stream).ptr().is_null());
}
