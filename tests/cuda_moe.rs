//! The whole layer on the GPU (or the emulator) against the CPU's: equal ids and weights always, equal bits where f32 is exact, a derived tolerance on tensor cores, equal bits in any
//! batch and with experts in allocations of their own, and a graph that is captured once and replayed with other data.
#![cfg(feature = "cuda")]

mod common;
#[path = "common/gpu.rs"]
mod gpu;
#[path = "common/near.rs"]
mod near;

use common::{Rng, assert_same_bits, product::Stored};
use cudarc::driver::{CudaSlice, CudaStream};
use gpu::{Buffer, Gpu};
use moe_kernels::cuda::combine::DeviceRows;
use moe_kernels::cuda::moe::*;
use moe_kernels::cuda::{
    DeviceMat, DeviceMatMut, DevicePtr, DeviceVec, DeviceVecMut, Module, TensorTable,
};
use moe_kernels::experts::{ExpertWeights, PackedExperts};
use moe_kernels::grouped_gemm::{Activation, ActivationFunction};
use moe_kernels::moe::{Forward, Gate, MoeLayer, SharedCombine, SharedExperts};
use moe_kernels::norm::RmsNorm;
use moe_kernels::routing::{NullExperts, Router, RouterConfig, Routing};
use moe_kernels::{AnyMatRef, Cpu, DType, Error, MatMut, MatRef};
use near::Near;

/// How gate and up rows lie in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Up {
    Plain,
    Fused,
    Interleaved,
    Separate,
}

/// A layer to be computed on both sides.
#[derive(Clone, Debug)]
struct Case {
    name: &'static str,
    config: RouterConfig,
    hidden: usize,
    intermediate: usize,
    activation: Activation,
    up: Up,
    biases: bool,
    correction_bias: bool,
    shared: Option<(usize, SharedJoin)>,
    weight_on_input: bool,
    routed_scale: f32,
    /// Norm, bias and residual.
    output_steps: bool,
}

impl Case {
    fn new(name: &'static str, config: RouterConfig) -> Self {
        Self {
            name,
            config,
            hidden: 40,
            intermediate: 24,
            activation: Activation::SWIGLU,
            up: Up::Fused,
            biases: false,
            correction_bias: false,
            shared: None,
            weight_on_input: false,
            routed_scale: 1.0,
            output_steps: false,
        }
    }
}

fn cases() -> Vec<Case> {
    let mut identity = RouterConfig::mixtral(5, 3);
    identity.null_experts = NullExperts::Identity(2);
    let base = Case::new;
    vec![
        base("mixtral", RouterConfig::mixtral(8, 2)),
        Case {
            shared: Some((32, SharedJoin::SigmoidGate)),
            ..base("qwen2_moe", RouterConfig::qwen2_moe(6, 4))
        },
        Case {
            shared: Some((16, SharedJoin::Add)),
            correction_bias: true,
            ..base("deepseek_v3", RouterConfig::deepseek_v3(16, 4, 4, 2, 2.5))
        },
        Case {
            activation: Activation::GPT_OSS,
            up: Up::Interleaved,
            biases: true,
            ..base("gpt_oss", RouterConfig::gpt_oss(8, 4))
        },
        Case {
            weight_on_input: true,
            shared: Some((24, SharedJoin::Add)),
            ..base("llama4", RouterConfig::llama4(4, 1))
        },
        Case {
            activation: Activation::plain(ActivationFunction::Relu2),
            up: Up::Plain,
            biases: true,
            routed_scale: 0.7,
            output_steps: true,
            ..base("norms", RouterConfig::mixtral(5, 2))
        },
        Case {
            shared: Some((8, SharedJoin::Average)),
            up: Up::Separate,
            activation: Activation::gated(ActivationFunction::GeluTanh),
            ..base("average", RouterConfig::olmoe(6, 2))
        },
        base("identity", identity),
        base("dense", RouterConfig::dense(4)),
        // Multiples of nothing.
        Case {
            hidden: 67,
            intermediate: 37,
            shared: Some((5, SharedJoin::SigmoidGate)),
            ..base("odd", RouterConfig::mixtral(7, 3))
        },
        Case {
            hidden: 1,
            intermediate: 1,
            ..base("smallest", RouterConfig::mixtral(1, 1))
        },
    ]
}

/// Weights of a case, rounded to `dtype` so that both sides hold the same numbers.
struct Weights {
    dtype: DType,
    gate_w: Vec<f32>,
    gate_b: Vec<f32>,
    /// `[E, 2I, H]` gate rows first, or `[E, I, H]`.
    up: Vec<f32>,
    down: Vec<f32>,
    up_bias: Vec<f32>,
    down_bias: Vec<f32>,
    correction: Vec<f32>,
    shared_up: Vec<f32>,
    shared_down: Vec<f32>,
    shared_gate: Vec<f32>,
    norm: Vec<f32>,
    out_bias: Vec<f32>,
}

fn rounded(dtype: DType, v: Vec<f32>) -> Vec<f32> {
    Stored::new(dtype, &v).to_f32()
}

impl Weights {
    fn new(case: &Case, dtype: DType) -> Self {
        let mut rng = Rng(case.name.bytes().map(u64::from).sum());
        let (h, i, e) = (case.hidden, case.intermediate, case.config.num_experts);
        let is = case.shared.map_or(0, |(i, _)| i);
        let wide = if case.activation.gated { 2 } else { 1 };
        let mut scaled = |n: usize, fan_in: usize| {
            let scale = 1.0 / (fan_in.max(1) as f32).sqrt();
            rounded(
                dtype,
                rng.normals(n).into_iter().map(|v| v * scale).collect(),
            )
        };
        Self {
            dtype,
            gate_w: scaled(case.config.num_logits() * h, h),
            gate_b: scaled(case.config.num_logits(), 4),
            up: scaled(e * wide * i * h, h),
            down: scaled(e * h * i, i),
            up_bias: scaled(e * wide * i, 1),
            down_bias: scaled(e * h, 1),
            correction: scaled(case.config.selectable(), 1),
            shared_up: scaled(wide * is * h, h),
            shared_down: scaled(h * is, is),
            shared_gate: scaled(h, h),
            norm: scaled(h, 1),
            out_bias: scaled(h, 1),
        }
    }

    /// The same rows as they lie on the device.
    fn rows_on_device(&self, case: &Case) -> Vec<f32> {
        let (h, i) = (case.hidden, case.intermediate);
        match case.up {
            Up::Interleaved => interleave(&self.up, i, h),
            _ => self.up.clone(),
        }
    }

    fn up_bias_on_device(&self, case: &Case) -> Vec<f32> {
        match case.up {
            Up::Interleaved => interleave(&self.up_bias, case.intermediate, 1),
            _ => self.up_bias.clone(),
        }
    }
}

/// `[E, 2I, width]` with gate rows first, to gate and up rows in turn.
fn interleave(m: &[f32], i: usize, width: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(m.len());
    for expert in m.chunks(2 * i * width) {
        for row in 0..i {
            out.extend_from_slice(&expert[row * width..][..width]);
            out.extend_from_slice(&expert[(i + row) * width..][..width]);
        }
    }
    out
}

fn view(m: &[f32], rows: usize, cols: usize) -> AnyMatRef<'_> {
    MatRef::new(m, rows, cols).unwrap().into()
}

fn packed(
    cpu: &Cpu,
    case: &Case,
    w: &Weights,
    up: &[f32],
    down: &[f32],
    count: usize,
    i: usize,
    biases: bool,
) -> PackedExperts {
    let (h, gated) = (case.hidden, case.activation.gated);
    let wide = if gated { 2 * i } else { i };
    let mut experts = PackedExperts::new(cpu, h, i, case.activation, w.dtype).unwrap();
    for e in 0..count {
        let up = &up[e * wide * h..][..wide * h];
        let down = view(&down[e * h * i..][..h * i], h, i);
        let mut expert = match gated {
            true => ExpertWeights::fused(view(up, wide, h), down).unwrap(),
            false => ExpertWeights::plain(view(up, i, h), down),
        };
        if biases {
            let up = &w.up_bias[e * wide..][..wide];
            let (gate, up) = if gated {
                (Some(&up[..i]), &up[i..])
            } else {
                (None, up)
            };
            expert = expert.with_biases(gate, Some(up), Some(&w.down_bias[e * h..][..h]));
        }
        experts.push(cpu, &expert).unwrap();
    }
    experts
}

/// The CPU's layer.
fn cpu_layer(cpu: &Cpu, case: &Case, w: &Weights) -> MoeLayer {
    let (h, r) = (case.hidden, case.config.num_logits());
    let mut router = Router::new(case.config.clone()).unwrap();
    if case.correction_bias {
        router = router.with_correction_bias(&w.correction).unwrap();
    }
    let experts = packed(
        cpu,
        case,
        w,
        &w.up,
        &w.down,
        case.config.num_experts,
        case.intermediate,
        case.biases,
    );
    let bias = case.biases.then_some(&w.gate_b[..]);
    let gate = Gate::new(cpu, view(&w.gate_w, r, h), bias).unwrap();
    let mut layer = MoeLayer::new(router, experts)
        .unwrap()
        .with_gate(gate)
        .unwrap()
        .with_routed_scale(case.routed_scale)
        .unwrap();
    if let Some((i, join)) = case.shared {
        let experts = packed(cpu, case, w, &w.shared_up, &w.shared_down, 1, i, false);
        layer = layer
            .with_shared(match join {
                SharedJoin::SigmoidGate => {
                    SharedExperts::with_sigmoid_gate(cpu, experts, view(&w.shared_gate, 1, h))
                        .unwrap()
                }
                SharedJoin::Average => SharedExperts::new(experts, SharedCombine::Average).unwrap(),
                _ => SharedExperts::new(experts, SharedCombine::Add).unwrap(),
            })
            .unwrap();
    }
    if case.weight_on_input {
        layer = layer.with_weight_on_input();
    }
    if case.output_steps {
        let norm = RmsNorm::new(&w.norm, 1e-5).unwrap();
        layer = layer
            .with_out_norm(norm)
            .unwrap()
            .with_out_bias(&w.out_bias)
            .unwrap();
    }
    layer
}

/// What a side has computed.
struct Answer {
    y: Vec<f32>,
    ids: Vec<i32>,
    weights: Vec<f32>,
}

fn on_cpu(case: &Case, w: &Weights, x: &Stored, tokens: usize, residual: &[f32]) -> Answer {
    let (cpu, h) = (Cpu::new(), case.hidden);
    let layer = cpu_layer(&cpu, case, w);
    let mut forward = Forward::default();
    if case.output_steps {
        forward.residual = Some(view(residual, tokens, h));
    }
    let mut y = vec![f32::NAN; tokens * h];
    let mut workspace = vec![0xff; layer.workspace_size(&cpu, tokens).unwrap()];
    let out = MatMut::new(&mut y, tokens, h).unwrap().into();
    let mut routing = Routing::new();
    layer
        .forward_with(
            &cpu,
            x.view(tokens, h),
            &forward,
            out,
            &mut routing,
            &mut workspace,
        )
        .unwrap();
    Answer {
        y,
        ids: routing.ids().to_vec(),
        weights: routing.weights().to_vec(),
    }
}

/// The GPU's layer with its weights on the device.
struct OnGpu<'g> {
    gpu: &'g Gpu,
    case: Case,
    dtype: DType,
    layer: CudaMoeLayer,
    gate_w: Buffer<u8>,
    gate_b: Buffer<f32>,
    up: Buffer<u8>,
    down: Buffer<u8>,
    up_bias: Buffer<u8>,
    down_bias: Buffer<u8>,
    correction: Buffer<f32>,
    shared_up: Buffer<u8>,
    shared_down: Buffer<u8>,
    shared_gate: Buffer<u8>,
    norm: Buffer<f32>,
    out_bias: Buffer<f32>,
    /// The experts' tensors once more, each in an allocation of its own, where the calls are to take those.
    apart: Option<Apart>,
}

type Table = TensorTable<u8, CudaSlice<u8>>;

/// One allocation for each expert and tensor.
struct Apart {
    /// One, or gate and up.
    up: Vec<Table>,
    down: Table,
    up_bias: Table,
    down_bias: Table,
}

impl Apart {
    fn new(gpu: &Gpu, case: &Case, w: &Weights) -> Self {
        let (h, i) = (case.hidden, case.intermediate);
        let wide = if case.activation.gated { 2 * i } else { i };
        // Matrices [rows, cols], each from row `first` of the rows that an expert has in `all`.
        let table = |all: &[f32], per_expert: usize, first: usize, rows: usize, cols: usize| {
            let tensors = all.chunks(per_expert * cols).map(|expert| {
                let rows = &expert[first * cols..][..rows * cols];
                gpu.upload(&bytes(w.dtype, rows)).bytes
            });
            TensorTable::from_bytes(&gpu.stream, tensors.collect(), w.dtype, rows, cols).unwrap()
        };
        let up = w.rows_on_device(case);
        Self {
            up: match case.up {
                Up::Separate => vec![table(&up, wide, 0, i, h), table(&up, wide, i, i, h)],
                _ => vec![table(&up, wide, 0, wide, h)],
            },
            down: table(&w.down, h, 0, h, i),
            up_bias: table(&w.up_bias_on_device(case), 1, 0, 1, wide),
            down_bias: table(&w.down_bias, 1, 0, 1, h),
        }
    }

    fn views<'a>(&'a self, stream: &'a CudaStream, case: &Case) -> ExpertViews<'a> {
        let up = |i: usize| self.up[i].view(stream).into();
        let up = match case.up {
            Up::Plain => UpViews::Plain(up(0)),
            Up::Fused => UpViews::Fused(up(0)),
            Up::Interleaved => UpViews::Interleaved(up(0)),
            Up::Separate => UpViews::Separate(up(0), up(1)),
        };
        let mut experts = ExpertViews::new(up, self.down.view(stream));
        if case.biases {
            experts.up_bias = Some(self.up_bias.view(stream).into());
            experts.down_bias = Some(self.down_bias.view(stream).into());
        }
        experts
    }
}

/// Bytes of numbers in a format.
fn bytes(dtype: DType, v: &[f32]) -> Vec<u8> {
    match Stored::new(dtype, v) {
        Stored::F32(v) => bytemuck::cast_slice(&v).to_vec(),
        Stored::F16(v) => bytemuck::cast_slice(&v).to_vec(),
        Stored::BF16(v) => bytemuck::cast_slice(&v).to_vec(),
    }
}

fn cuda_layer(case: &Case, dtype: DType) -> CudaMoeLayer {
    let mut layer = CudaMoeLayer::new(
        case.config.clone(),
        case.hidden,
        case.intermediate,
        case.activation,
        dtype,
    )
    .unwrap();
    layer = layer.with_routed_scale(case.routed_scale).unwrap();
    if case.weight_on_input {
        layer = layer.with_weight_on_input();
    }
    if let Some((intermediate, join)) = case.shared {
        let shared = SharedExpert::new(intermediate, case.activation, join);
        layer = layer.with_shared(shared).unwrap();
    }
    layer
}

/// What changes from call to call.
struct Data {
    tokens: usize,
    x: Buffer<u8>,
    residual: Buffer<f32>,
    y: Buffer<f32>,
    workspace: Buffer<u8>,
}

impl<'g> OnGpu<'g> {
    fn new(gpu: &'g Gpu, case: &Case, w: &Weights, layer: CudaMoeLayer) -> Self {
        let d = w.dtype;
        Self {
            gpu,
            case: case.clone(),
            dtype: d,
            layer,
            gate_w: gpu.upload(&bytes(d, &w.gate_w)),
            gate_b: gpu.upload(&w.gate_b),
            up: gpu.upload(&bytes(d, &w.rows_on_device(case))),
            down: gpu.upload(&bytes(d, &w.down)),
            up_bias: gpu.upload(&bytes(d, &w.up_bias_on_device(case))),
            down_bias: gpu.upload(&bytes(d, &w.down_bias)),
            correction: gpu.upload(&w.correction),
            shared_up: gpu.upload(&bytes(d, &w.shared_up)),
            shared_down: gpu.upload(&bytes(d, &w.shared_down)),
            shared_gate: gpu.upload(&bytes(d, &w.shared_gate)),
            norm: gpu.upload(&w.norm),
            out_bias: gpu.upload(&w.out_bias),
            apart: None,
        }
    }

    fn data(&self, x: &[f32], residual: &[f32]) -> Data {
        let tokens = x.len() / self.case.hidden;
        let size = self
            .layer
            .workspace_size(tokens, self.gpu.cuda.device_info())
            .unwrap();
        Data {
            tokens,
            x: self.gpu.upload(&bytes(self.dtype, x)),
            residual: self.gpu.upload(residual),
            y: self.gpu.filled(x.len(), 0xff),
            workspace: self.gpu.filled(size, 0xff),
        }
    }

    /// Numbers in the layer's format as a matrix.
    fn mat<'a>(&'a self, buffer: &'a Buffer<u8>, rows: usize, cols: usize) -> DeviceMat<'a> {
        DeviceMat::from_bytes(&self.gpu.stream, &buffer.bytes, self.dtype, rows, cols).unwrap()
    }

    /// Queues the layer.
    fn forward(&self, data: &mut Data) -> Result<(), Error> {
        let (stream, case, tokens) = (&*self.gpu.stream, &self.case, data.tokens);
        let (h, i, e, r) = (
            case.hidden,
            case.intermediate,
            case.config.num_experts,
            case.config.num_logits(),
        );
        let (gate_b, correction) = (self.gate_b.view(), self.correction.view());
        let (out_bias, norm) = (self.out_bias.view(), self.norm.view());
        let wide = if case.activation.gated { 2 } else { 1 };
        let (gate_half, up_half);
        let up = match case.up {
            Up::Plain => UpViews::Plain(self.mat(&self.up, e * i, h).into()),
            Up::Fused => UpViews::Fused(self.mat(&self.up, e * 2 * i, h).into()),
            Up::Interleaved => UpViews::Interleaved(self.mat(&self.up, e * 2 * i, h).into()),
            Up::Separate => {
                // Tensors of their own, made from the fused one.
                let all = self.gpu.download(&self.up);
                let row = h * self.dtype.size();
                let half = |second: bool| -> Vec<u8> {
                    all.chunks(2 * i * row)
                        .flat_map(|expert| {
                            expert[usize::from(second) * i * row..][..i * row].to_vec()
                        })
                        .collect()
                };
                gate_half = self.gpu.upload(&half(false));
                up_half = self.gpu.upload(&half(true));
                UpViews::Separate(
                    self.mat(&gate_half, e * i, h).into(),
                    self.mat(&up_half, e * i, h).into(),
                )
            }
        };
        let mut experts = ExpertViews::new(up, self.mat(&self.down, e * h, i));
        if case.biases {
            experts.up_bias = Some(self.mat(&self.up_bias, e, wide * i).into());
            experts.down_bias = Some(self.mat(&self.down_bias, e, h).into());
        }
        if let Some(apart) = &self.apart {
            experts = apart.views(stream, case);
        }
        let gate = GateViews {
            weights: self.mat(&self.gate_w, r, h),
            bias: case.biases.then(|| DeviceVec::new(stream, &gate_b)),
        };
        let mut operands = MoeOperands::new(
            self.mat(&data.x, tokens, h),
            RouteSource::Gate(gate),
            experts,
        );
        if case.correction_bias {
            operands.correction_bias = Some(DeviceVec::new(stream, &correction));
        }
        if let Some((i, join)) = case.shared {
            let up = self.mat(&self.shared_up, wide * i, h);
            let up = if case.activation.gated {
                UpViews::Fused(up.into())
            } else {
                UpViews::Plain(up.into())
            };
            operands.shared = Some(SharedViews {
                expert: ExpertViews::new(up, self.mat(&self.shared_down, h, i)),
                gate: (join == SharedJoin::SigmoidGate).then(|| self.mat(&self.shared_gate, 1, h)),
            });
        }
        let residual = DeviceMat::from_bytes(stream, &data.residual.bytes, DType::F32, tokens, h);
        if case.output_steps {
            operands.residual = Some(residual.unwrap());
            operands.out_bias = Some(DeviceVec::new(stream, &out_bias));
            operands.out_norm = Some(NormView {
                weight: DeviceVec::new(stream, &norm),
                eps: 1e-5,
                multiplier: 1.0,
            });
        }
        let mut y = DeviceMatMut::from_bytes(stream, &mut data.y.bytes, DType::F32, tokens, h)?;
        let mut workspace = DeviceVecMut::new(stream, &mut data.workspace.bytes);
        self.layer
            .forward_into(&self.gpu.cuda, stream, &operands, &mut y, &mut workspace)
    }

    fn run(&self, x: &[f32], residual: &[f32]) -> Vec<f32> {
        self.answer(x, residual).y
    }

    fn answer(&self, x: &[f32], residual: &[f32]) -> Answer {
        let mut data = self.data(x, residual);
        self.forward(&mut data).unwrap();
        let y = self.gpu.download(&data.y);
        let pairs = data.tokens * self.case.config.slots();
        let Some(places) = self.places(&data) else {
            return Answer {
                y,
                ids: Vec::new(),
                weights: Vec::new(),
            };
        };
        let workspace = self.gpu.download(&data.workspace);
        let [ids, weights] = places.map(|at| {
            workspace[at..][..pairs * 4]
                .chunks(4)
                .map(|b| b.try_into().unwrap())
        });
        Answer {
            y,
            ids: ids.map(i32::from_ne_bytes).collect(),
            weights: weights.map(f32::from_ne_bytes).collect(),
        }
    }

    /// Where a call's ids and weights lie in its workspace: the sort's parameters begin with the address of the ids, and the router's have that of the weights behind it. `None`
    /// without tokens.
    fn places(&self, data: &Data) -> Option<[usize; 2]> {
        // The other operands may be anywhere: a plan does not follow addresses.
        let (case, any) = (&self.case, DevicePtr(1 << 20));
        let rows = |stride: usize| DeviceRows {
            ptr: any,
            stride,
            dtype: self.dtype,
        };
        let w = |n: usize, k: usize| WeightPointers::contiguous(any, self.dtype, n, k);
        let experts = |i: usize| ExpertPointers {
            gate: case.activation.gated.then(|| w(i, case.hidden)),
            ..ExpertPointers::plain(w(i, case.hidden), w(case.hidden, i))
        };
        let gate = RoutingPointers::Gate(GatePointers {
            weights: rows(case.hidden),
            bias: None,
        });
        let base = data.workspace.ptr();
        let pointers = MoePointers {
            correction_bias: if case.correction_bias {
                any
            } else {
                DevicePtr::NULL
            },
            shared: case.shared.map(|(i, join)| SharedPointers {
                expert: experts(i),
                gate: (join == SharedJoin::SigmoidGate).then(|| rows(case.hidden)),
            }),
            ..MoePointers::new(
                rows(case.hidden),
                gate,
                experts(case.intermediate),
                rows(case.hidden),
                base,
            )
        };
        let info = self.gpu.cuda.device_info();
        let plan = self.layer.plan(data.tokens, &pointers, info).unwrap();
        let words = |module: Module| -> Option<Vec<u64>> {
            let launch = plan.iter().find(|l| l.module == module)?;
            Some(
                launch
                    .params()
                    .chunks_exact(8)
                    .map(|b| u64::from_ne_bytes(b.try_into().unwrap()))
                    .collect(),
            )
        };
        let ids = words(Module::Permute)?[0];
        let router = words(Module::Routing).expect("a router");
        let at = router
            .iter()
            .position(|&word| word == ids)
            .expect("the ids");
        Some([ids, router[at + 1]].map(|address| (address - base.0) as usize))
    }
}

/// Runs a case on both sides, with experts in one allocation or apart; ids and weights must be the same. The GPU's y, the CPU's answer, and every element in f64 with
/// the error that it may have.
fn both(
    gpu: &Gpu,
    case: &Case,
    dtype: DType,
    tokens: usize,
    apart: bool,
) -> (Vec<f32>, Answer, Vec<Near>) {
    let w = Weights::new(case, dtype);
    let mut rng = Rng(tokens as u64 + 1);
    let x = rounded(dtype, rng.normals(tokens * case.hidden));
    let residual = rng.normals(tokens * case.hidden);
    let mut on = OnGpu::new(gpu, case, &w, cuda_layer(case, dtype));
    on.apart = apart.then(|| Apart::new(gpu, case, &w));
    let found = on.answer(&x, &residual);
    let expected = on_cpu(case, &w, &Stored::new(dtype, &x), tokens, &residual);
    let what = format!("{} {dtype} T = {tokens}", case.name);
    assert_eq!(found.ids, expected.ids, "{what}: ids");
    assert_same_bits(
        &found.weights,
        &expected.weights,
        &format!("{what}: weights"),
    );
    let near = near(case, &w, &x, &residual, &expected);
    (found.y, expected, near)
}

/// The layer in f64 from given ids and weights, with bounds for what f32 sums in any order and roundings to the layer's format may change: each dot product by its length and the
/// sum of its terms' sizes, h by its rounding to 16 bits, which then goes through W_down element by element, and so on to y (see `common/near.rs`).
fn near(case: &Case, w: &Weights, x: &[f32], residual: &[f32], routed: &Answer) -> Vec<Near> {
    let (h, slots) = (case.hidden, case.config.slots());
    x.chunks(h)
        .enumerate()
        .flat_map(|(t, x)| {
            let pairs = t * slots..(t + 1) * slots;
            let (ids, weights) = (&routed.ids[pairs.clone()], &routed.weights[pairs]);
            let x: Vec<Near> = x.iter().map(|&v| v.into()).collect();
            near_token(case, w, &x, &residual[t * h..][..h], ids, weights)
        })
        .collect()
}

fn near_token(
    case: &Case,
    w: &Weights,
    x: &[Near],
    residual: &[f32],
    ids: &[i32],
    weights: &[f32],
) -> Vec<Near> {
    let h = case.hidden;
    let mut y = near_routed(case, w, x, ids, weights);
    let mut each = |f: &dyn Fn(Near, usize) -> Near| {
        y = y.iter().enumerate().map(|(c, &v)| f(v, c)).collect();
    };
    each(&|v, _| v.times(case.routed_scale.into()));
    if let Some((_, join)) = case.shared {
        let s = near_expert(case, w, &w.shared_up, &w.shared_down, None).of(x);
        let gate = near::dot(x, &w.shared_gate[..h]).sigmoid();
        each(&|v, c| match join {
            SharedJoin::SigmoidGate => v.plus(s[c].times(gate)),
            SharedJoin::Average => v.plus(s[c]).times(0.5.into()),
            _ => v.plus(s[c]),
        });
    }
    if case.output_steps {
        y = near::rms_norm(&y, &w.norm, 1e-5);
        let last = y.iter().zip(&w.out_bias).zip(residual);
        y = last
            .map(|((v, &b), &r)| v.plus(b.into()).plus(r.into()))
            .collect();
    }
    y
}

/// The sum over a token's pairs.
fn near_routed(case: &Case, w: &Weights, x: &[Near], ids: &[i32], weights: &[f32]) -> Vec<Near> {
    let (h, e) = (case.hidden, case.config.num_experts);
    let mut y = vec![Near::default(); h];
    for (&id, &weight) in ids.iter().zip(weights) {
        let Ok(id) = usize::try_from(id) else {
            continue;
        };
        let weight = Near::from(weight);
        if id >= e {
            // An identity expert.
            y = y
                .iter()
                .zip(x)
                .map(|(y, &x)| y.plus(weight.times(x)))
                .collect();
            continue;
        }
        let wide = w.up.len() / (e * h);
        let up = &w.up[id * wide * h..][..wide * h];
        let down = &w.down[id * h * case.intermediate..][..h * case.intermediate];
        let expert = near_expert(case, w, up, down, Some(id));
        let output = match case.weight_on_input {
            // The CPU rounds the product to the format, a tensor-core kernel multiplies the sums.
            true => expert.of(&x
                .iter()
                .map(|v| v.times(weight).rounded(w.dtype))
                .collect::<Vec<_>>()),
            false => expert.of(x).iter().map(|v| v.times(weight)).collect(),
        };
        y = y.iter().zip(output).map(|(y, v)| y.plus(v)).collect();
    }
    y
}

/// An expert, with the biases of expert `id` where there are some.
fn near_expert<'a>(
    case: &Case,
    w: &'a Weights,
    up: &'a [f32],
    down: &'a [f32],
    id: Option<usize>,
) -> near::Mlp<'a> {
    let bias = |all: &'a [f32]| {
        let width = all.len() / case.config.num_experts;
        id.filter(|_| case.biases)
            .map(|id| &all[id * width..][..width])
    };
    near::Mlp {
        activation: case.activation,
        dtype: w.dtype,
        up,
        up_bias: bias(&w.up_bias),
        down,
        down_bias: bias(&w.down_bias),
    }
}

#[test]
fn f32_layers_have_the_cpus_bits() {
    let Some(gpu) = gpu::open() else { return };
    for case in cases() {
        for (tokens, apart) in [(0, false), (1, false), (3, true), (18, false), (18, true)] {
            let (found, expected, near) = both(&gpu, &case, DType::F32, tokens, apart);
            let what = format!("{} T = {tokens}, apart: {apart}", case.name);
            assert_same_bits(&found, &expected.y, &what);
            check_near(&found, &near, &what);
        }
    }
}

/// Fails for an element that is further from its value in f64 than the roundings on the way to it allow, or when many are near that bound: a rounding error is spread over its
/// bound, with a root mean square of 1/√3 of it, and sums of several have less.
fn check_near(found: &[f32], near: &[Near], what: &str) {
    assert_eq!(found.len(), near.len(), "{what}");
    let (mut squares, mut bounds) = (0.0, 0.0);
    for (i, (&f, n)) in found.iter().zip(near).enumerate() {
        let difference = (f64::from(f) - n.value).abs();
        assert!(
            difference <= n.error,
            "{what}: element {i} is {f:e}, {:e} within {:e} expected",
            n.value,
            n.error
        );
        squares += difference * difference;
        bounds += n.error * n.error;
    }
    if found.len() >= 64 {
        let share = (squares / bounds).sqrt();
        assert!(share <= 0.58, "{what}: errors are {share} of their bounds");
    }
}

/// Sums in another order than the CPU's, and h rounded to 16 bits on both sides: both sides are near the same layer in f64, each within the bound that follows
/// from its roundings.
#[test]
fn layers_in_16_bits_are_near_the_same_in_f64() {
    let Some(gpu) = gpu::open() else { return };
    for case in cases() {
        for dtype in [DType::BF16, DType::F16] {
            for (tokens, apart) in [(1, false), (5, false), (33, false), (33, true)] {
                let (found, expected, near) = both(&gpu, &case, dtype, tokens, apart);
                let what = format!("{} {dtype} T = {tokens}, apart: {apart}", case.name);
                check_near(&found, &near, &format!("{what}, the GPU"));
                check_near(&expected.y, &near, &format!("{what}, the CPU"));
            }
        }
    }
}

/// Few rows, so that both ways take the same kernels on a Hopper, too.
#[test]
fn experts_apart_have_the_bits_of_experts_in_one_allocation() {
    let Some(gpu) = gpu::open() else { return };
    for case in cases() {
        for dtype in DType::ALL {
            let [together, apart] = [false, true].map(|apart| both(&gpu, &case, dtype, 3, apart).0);
            assert_same_bits(&apart, &together, &format!("{} {dtype}", case.name));
        }
    }
}

#[test]
fn a_token_has_the_same_bits_alone_and_in_any_batch_in_strict_mode() {
    let Some(gpu) = gpu::open() else { return };
    for case in cases().into_iter().take(4) {
        for dtype in DType::ALL {
            let w = Weights::new(&case, dtype);
            let mut rng = Rng(9);
            let x = rounded(dtype, rng.normals(70 * case.hidden));
            let residual = rng.normals(70 * case.hidden);
            let on = OnGpu::new(&gpu, &case, &w, cuda_layer(&case, dtype).with_strict());
            let all = on.run(&x, &residual);
            for tokens in [1usize, 2, 17] {
                let part = on.run(
                    &x[..tokens * case.hidden],
                    &residual[..tokens * case.hidden],
                );
                assert_same_bits(
                    &part,
                    &all[..part.len()],
                    &format!("{} {dtype} T = {tokens}", case.name),
                );
            }
            let last = on.run(&x[69 * case.hidden..], &residual[69 * case.hidden..]);
            assert_same_bits(
                &last,
                &all[69 * case.hidden..],
                &format!("{} {dtype} the last token", case.name),
            );
            assert_same_bits(
                &on.run(&x, &residual),
                &all,
                &format!("{} {dtype} again", case.name),
            );
        }
    }
}

#[test]
fn a_graph_is_captured_once_and_replayed_with_other_data() {
    let Some(gpu) = gpu::open() else { return };
    let (case, dtype) = (&cases()[1], DType::BF16);
    let w = Weights::new(case, dtype);
    let mut rng = Rng(77);
    let inputs: Vec<Vec<f32>> = (0..3)
        .map(|_| rounded(dtype, rng.normals(9 * case.hidden)))
        .collect();
    let residual = vec![0.0; 9 * case.hidden];
    let on = OnGpu::new(&gpu, case, &w, cuda_layer(case, dtype));
    // The first call loads the kernels, which a capture forbids.
    let expected: Vec<Vec<f32>> = inputs.iter().map(|x| on.run(x, &residual)).collect();
    assert_ne!(expected[0], expected[1]);
    let mut data = on.data(&inputs[0], &residual);
    let graph = gpu.capture(|| on.forward(&mut data).unwrap());
    let before = gpu.download(&data.y);
    assert!(
        before.iter().all(|v| v.is_nan()),
        "a capture must not run anything"
    );
    for (x, expected) in inputs
        .iter()
        .zip(&expected)
        .chain([(&inputs[0], &expected[0])])
    {
        gpu.write(&mut data.x, &bytes(dtype, x));
        let poison = vec![f32::NAN; data.y.len()];
        gpu.write(&mut data.y, &poison);
        graph.launch().unwrap();
        assert_same_bits(&gpu.download(&data.y), expected, "a replay");
    }
}
