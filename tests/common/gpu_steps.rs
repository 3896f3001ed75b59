//! A layer with every step that a layer may have, from one description, on the CPU and on the GPU.

use crate::common::{Rng, product::Stored, product::bytes, product::rounded};
use crate::gpu::{Buffer, Gpu};
use moe_kernels::cuda::combine::{DeviceRows, Norm};
use moe_kernels::cuda::moe::*;
use moe_kernels::cuda::{DeviceMat, DeviceMatMut, DevicePtr, DeviceVec, DeviceVecMut};
use moe_kernels::experts::{ExpertWeights, PackedExperts};
use moe_kernels::grouped_gemm::Activation;
use moe_kernels::moe::{self as cpu, Forward, MoeLayer, SharedCombine, SharedExperts};
use moe_kernels::norm::RmsNorm;
use moe_kernels::routing::{Router, RouterConfig, Routing};
use moe_kernels::{AnyMatRef, Cpu, DType, Error, MatMut, MatRef};
use std::ops::Range;

const EPS: f32 = 1e-5;
const MULTIPLIER: f32 = 0.75;
const POSITION: u64 = 11;

#[derive(Clone, Copy, Debug)]
pub struct Shared {
    pub count: usize,
    pub intermediate: usize,
    pub join: SharedJoin,
}

/// A layer to be computed on both sides.
#[derive(Clone, Debug)]
pub struct Case {
    pub name: &'static str,
    pub config: RouterConfig,
    pub hidden: usize,
    pub intermediate: usize,
    pub activation: Activation,
    pub latent: Option<Latent>,
    pub gate_norm: bool,
    pub post_norm: Option<PostNorm>,
    pub shared: Option<Shared>,
    pub weight_on_input: bool,
    pub routed_scale: f32,
    pub local: Option<Range<usize>>,
    /// Norm, bias and residual.
    pub output_steps: bool,
}

impl Case {
    pub fn new(name: &'static str, config: RouterConfig) -> Self {
        Self {
            name,
            config,
            hidden: 40,
            intermediate: 24,
            activation: Activation::SWIGLU,
            latent: None,
            gate_norm: false,
            post_norm: None,
            shared: None,
            weight_on_input: false,
            routed_scale: 1.0,
            local: None,
            output_steps: false,
        }
    }

    fn local(&self) -> Range<usize> {
        self.local.clone().unwrap_or(0..self.config.num_experts)
    }

    /// L, or H.
    fn width(&self) -> usize {
        self.latent.map_or(self.hidden, |l| l.width)
    }

    /// Rows of a first projection.
    fn wide(&self, intermediate: usize) -> usize {
        intermediate * if self.activation.gated { 2 } else { 1 }
    }
}

/// Matrices, in the layer's format on both sides, and vectors, in f32.
pub struct Weights {
    dtype: DType,
    matrices: [Vec<f32>; 9],
    vectors: [Vec<f32>; 5],
}

// Their places.
const GATE: usize = 0;
const NOISE: usize = 1;
const W_IN: usize = 2;
const W_OUT: usize = 3;
const UP: usize = 4; // and down

const SHARED_UP: usize = 6; // and down

const SHARED_GATE: usize = 8;
const GATE_NORM: usize = 0;
const LATENT_NORM: usize = 1;
const POST_NORM: usize = 2;
const OUT_NORM: usize = 3;
const OUT_BIAS: usize = 4;

impl Weights {
    pub fn new(case: &Case, dtype: DType) -> Self {
        let mut rng = Rng(case.name.bytes().map(u64::from).sum());
        let (h, i, l) = (case.hidden, case.intermediate, case.width());
        let (e, r) = (case.local().len(), case.config.num_logits());
        let (count, si) = case.shared.map_or((0, 0), |s| (s.count, s.intermediate));
        let shapes = [
            (r, h),
            (r, h),
            (l, h),
            (h, l),
            (e * case.wide(i), l),
            (e * l, i),
            (count * case.wide(si), h),
            (count * h, si),
            (1, h),
        ];
        Self {
            dtype,
            matrices: shapes.map(|(rows, fan_in)| {
                let scale = 1.0 / (fan_in.max(1) as f32).sqrt();
                let v: Vec<f32> = rng.normals(rows * fan_in);
                rounded(dtype, &v.iter().map(|v| v * scale).collect::<Vec<_>>())
            }),
            vectors: [h, l, l, h, h].map(|n| rng.normals(n)),
        }
    }
}

/// What both sides give.
pub struct Output {
    pub y: Vec<f32>,
    pub ids: Vec<i32>,
    pub weights: Vec<f32>,
}

// ---- on the CPU ----

fn view(m: &[f32], rows: usize, cols: usize) -> AnyMatRef<'_> {
    MatRef::new(m, rows, cols).unwrap().into()
}

fn packed(
    cpu: &Cpu,
    case: &Case,
    w: &Weights,
    place: usize,
    [n, i, h]: [usize; 3],
) -> PackedExperts {
    let wide = case.wide(i);
    let mut experts = PackedExperts::new(cpu, h, i, case.activation, w.dtype).unwrap();
    for e in 0..n {
        let up = view(&w.matrices[place][e * wide * h..][..wide * h], wide, h);
        let down = view(&w.matrices[place + 1][e * h * i..][..h * i], h, i);
        let expert = match case.activation.gated {
            true => ExpertWeights::fused(up, down).unwrap(),
            false => ExpertWeights::plain(up, down),
        };
        experts.push(cpu, &expert).unwrap();
    }
    experts
}

fn cpu_layer(cpu: &Cpu, case: &Case, w: &Weights) -> MoeLayer {
    let (h, l, r) = (case.hidden, case.width(), case.config.num_logits());
    let norm = |place: usize| {
        let norm = RmsNorm::new(&w.vectors[place], EPS).unwrap();
        norm.with_multiplier(MULTIPLIER).unwrap()
    };
    let matrix = |place: usize, rows, cols| view(&w.matrices[place], rows, cols);
    let router = Router::new(case.config.clone()).unwrap();
    let sizes = [case.local().len(), case.intermediate, l];
    let experts = packed(cpu, case, w, UP, sizes);
    let mut layer = match case.latent {
        None => MoeLayer::new(router, experts).unwrap(),
        Some(space) => {
            let (w_in, w_out) = (matrix(W_IN, l, h), matrix(W_OUT, h, l));
            let mut latent = cpu::Latent::new(cpu, w_in, w_out, w.dtype).unwrap();
            if space.norm {
                latent = latent.with_norm(norm(LATENT_NORM)).unwrap();
            }
            MoeLayer::new_latent(router, experts, latent).unwrap()
        }
    };
    let mut gate = cpu::Gate::new(cpu, matrix(GATE, r, h), None).unwrap();
    if case.gate_norm {
        gate = gate.with_input_norm(norm(GATE_NORM)).unwrap();
    }
    if case.config.noise_seed.is_some() {
        gate = gate.with_noise(cpu, matrix(NOISE, r, h)).unwrap();
    }
    layer = layer.with_gate(gate).unwrap();
    layer = layer.with_first_expert(case.local().start).unwrap();
    layer = layer.with_routed_scale(case.routed_scale).unwrap();
    if case.weight_on_input {
        layer = layer.with_weight_on_input();
    }
    layer = match case.post_norm {
        None => layer,
        Some(PostNorm::ScaleFirst) => layer
            .with_post_norm(cpu::PostNorm::ScaleFirst(norm(POST_NORM)))
            .unwrap(),
        Some(_) => layer
            .with_post_norm(cpu::PostNorm::NormFirst(norm(POST_NORM)))
            .unwrap(),
    };
    if let Some(s) = case.shared {
        let experts = packed(cpu, case, w, SHARED_UP, [s.count, s.intermediate, h]);
        let shared = match s.join {
            SharedJoin::SigmoidGate => {
                SharedExperts::with_sigmoid_gate(cpu, experts, matrix(SHARED_GATE, 1, h))
            }
            SharedJoin::Average => SharedExperts::new(experts, SharedCombine::Average),
            SharedJoin::RouterWeighted => {
                SharedExperts::new(experts, SharedCombine::RouterWeighted)
            }
            _ => SharedExperts::new(experts, SharedCombine::Add),
        };
        layer = layer.with_shared(shared.unwrap()).unwrap();
    }
    if case.output_steps {
        layer = layer.with_out_norm(norm(OUT_NORM)).unwrap();
        layer = layer.with_out_bias(&w.vectors[OUT_BIAS]).unwrap();
    }
    layer
}

pub fn on_cpu(case: &Case, w: &Weights, dtype: DType, x: &[f32], residual: &[f32]) -> Output {
    let (cpu, h) = (Cpu::new(), case.hidden);
    let tokens = x.len() / h;
    let layer = cpu_layer(&cpu, case, w);
    let mut forward = Forward {
        position: POSITION,
        ..Forward::default()
    };
    if case.output_steps {
        forward.residual = Some(view(residual, tokens, h));
    }
    let (mut y, mut routing) = (vec![f32::NAN; x.len()], Routing::new());
    let mut workspace = vec![0xff; layer.workspace_size(&cpu, tokens).unwrap()];
    let (x, out) = (
        Stored::new(dtype, x),
        MatMut::new(&mut y, tokens, h).unwrap(),
    );
    let x = x.view(tokens, h);
    layer
        .forward_with(&cpu, x, &forward, out.into(), &mut routing, &mut workspace)
        .unwrap();
    let (ids, weights) = (routing.ids().to_vec(), routing.weights().to_vec());
    Output { y, ids, weights }
}

// ---- on the GPU ----

pub fn cuda_layer(case: &Case, dtype: DType) -> CudaMoeLayer {
    let (h, i) = (case.hidden, case.intermediate);
    let mut layer = CudaMoeLayer::new(case.config.clone(), h, i, case.activation, dtype).unwrap();
    layer = layer.with_routed_scale(case.routed_scale).unwrap();
    layer = layer.with_local_experts(case.local()).unwrap();
    if case.weight_on_input {
        layer = layer.with_weight_on_input();
    }
    if case.gate_norm {
        layer = layer.with_gate_norm();
    }
    if let Some(latent) = case.latent {
        layer = layer.with_latent(latent).unwrap();
    }
    if let Some(order) = case.post_norm {
        layer = layer.with_post_norm(order);
    }
    if let Some(s) = case.shared {
        let shared = SharedExpert {
            count: s.count,
            ..SharedExpert::new(s.intermediate, case.activation, s.join)
        };
        layer = layer.with_shared(shared).unwrap();
    }
    layer
}

/// The GPU's layer with its weights on the device.
pub struct OnGpu<'g> {
    gpu: &'g Gpu,
    case: Case,
    dtype: DType,
    pub layer: CudaMoeLayer,
    matrices: [Buffer<u8>; 9],
    vectors: [Buffer<f32>; 5],
}

/// What changes from call to call.
pub struct Data {
    tokens: usize,
    pub x: Buffer<u8>,
    residual: Buffer<f32>,
    pub y: Buffer<f32>,
    workspace: Buffer<u8>,
}

impl<'g> OnGpu<'g> {
    pub fn new(gpu: &'g Gpu, case: &Case, w: &Weights, layer: CudaMoeLayer) -> Self {
        Self {
            gpu,
            case: case.clone(),
            dtype: w.dtype,
            layer,
            matrices: std::array::from_fn(|n| gpu.upload(&bytes(w.dtype, &w.matrices[n]))),
            vectors: std::array::from_fn(|n| gpu.upload(&w.vectors[n])),
        }
    }

    pub fn data(&self, x: &[f32], residual: &[f32]) -> Data {
        let (tokens, info) = (x.len() / self.case.hidden, self.gpu.cuda.device_info());
        Data {
            tokens,
            x: self.gpu.upload(&bytes(self.dtype, x)),
            residual: self.gpu.upload(residual),
            y: self.gpu.filled(x.len(), 0xff),
            workspace: self
                .gpu
                .filled(self.layer.workspace_size(tokens, info).unwrap(), 0xff),
        }
    }

    /// The operands as plain data.
    pub fn pointers(&self, data: &Data) -> MoePointers {
        let (case, dtype) = (&self.case, self.dtype);
        let (h, i, l) = (case.hidden, case.intermediate, case.width());
        let rows = |ptr, stride, dtype| DeviceRows { ptr, stride, dtype };
        let matrix = |place: usize, cols| rows(self.matrices[place].ptr(), cols, dtype);
        let norm = |place: usize| Norm {
            weight: self.vectors[place].ptr(),
            eps: EPS,
            multiplier: MULTIPLIER,
        };
        let experts = |place: usize, i: usize, width: usize| {
            let at = |place: usize, n, k| {
                WeightPointers::contiguous(self.matrices[place].ptr(), dtype, n, k)
            };
            let (up, down) = (at(place, case.wide(i), width), at(place + 1, width, i));
            match case.activation.gated {
                true => ExpertPointers::fused(up, i, down),
                false => ExpertPointers::plain(up, down),
            }
        };
        let gate = GatePointers {
            weights: matrix(GATE, h),
            bias: None,
        };
        let mut pointers = MoePointers::new(
            rows(data.x.ptr(), h, dtype),
            RoutingPointers::Gate(gate),
            experts(UP, i, l),
            rows(data.y.ptr(), h, DType::F32),
            data.workspace.ptr(),
        );
        pointers.position = POSITION;
        pointers.gate_norm = case.gate_norm.then(|| norm(GATE_NORM));
        let noisy = case.config.noise_seed.is_some();
        pointers.gate_noise = noisy.then(|| matrix(NOISE, h));
        pointers.latent = case.latent.map(|space| LatentPointers {
            w_in: matrix(W_IN, h),
            w_out: matrix(W_OUT, l),
            norm: space.norm.then(|| norm(LATENT_NORM)),
        });
        pointers.post_norm = case.post_norm.map(|_| norm(POST_NORM));
        pointers.shared = case.shared.map(|s| SharedPointers {
            expert: experts(SHARED_UP, s.intermediate, h),
            gate: (s.join == SharedJoin::SigmoidGate).then(|| matrix(SHARED_GATE, h)),
        });
        if case.output_steps {
            pointers.out_norm = Some(norm(OUT_NORM));
            pointers.out_bias = self.vectors[OUT_BIAS].ptr();
            pointers.residual = Some(rows(data.residual.ptr(), h, DType::F32));
        }
        pointers
    }

    /// Numbers in the layer's format as a matrix.
    fn mat<'a>(&'a self, buffer: &'a Buffer<u8>, rows: usize, cols: usize) -> DeviceMat<'a> {
        DeviceMat::from_bytes(&self.gpu.stream, &buffer.bytes, self.dtype, rows, cols).unwrap()
    }

    /// Queues the layer by the safe call.
    pub fn forward(&self, data: &mut Data) -> Result<(), Error> {
        let (stream, case, tokens) = (&*self.gpu.stream, &self.case, data.tokens);
        let (h, i, l) = (case.hidden, case.intermediate, case.width());
        let (e, r) = (case.local().len(), case.config.num_logits());
        let matrix = |place: usize, rows, cols| self.mat(&self.matrices[place], rows, cols);
        let views: [_; 5] = std::array::from_fn(|n| self.vectors[n].view());
        let norm = |place: usize| NormView {
            weight: DeviceVec::new(stream, &views[place]),
            eps: EPS,
            multiplier: MULTIPLIER,
        };
        let experts = |place: usize, n: usize, i: usize, width: usize| {
            let up = matrix(place, n * case.wide(i), width);
            let up = match case.activation.gated {
                true => UpViews::Fused(up.into()),
                false => UpViews::Plain(up.into()),
            };
            ExpertViews::new(up, matrix(place + 1, n * width, i))
        };
        let gate = GateViews {
            weights: matrix(GATE, r, h),
            bias: None,
        };
        let x = self.mat(&data.x, tokens, h);
        let mut o = MoeOperands::new(x, RouteSource::Gate(gate), experts(UP, e, i, l));
        o.position = POSITION;
        o.gate_norm = case.gate_norm.then(|| norm(GATE_NORM));
        let noisy = case.config.noise_seed.is_some();
        o.gate_noise = noisy.then(|| matrix(NOISE, r, h));
        o.latent = case.latent.map(|space| LatentViews {
            w_in: matrix(W_IN, l, h),
            w_out: matrix(W_OUT, h, l),
            norm: space.norm.then(|| norm(LATENT_NORM)),
        });
        o.post_norm = case.post_norm.map(|_| norm(POST_NORM));
        o.shared = case.shared.map(|s| SharedViews {
            expert: experts(SHARED_UP, s.count, s.intermediate, h),
            gate: (s.join == SharedJoin::SigmoidGate).then(|| matrix(SHARED_GATE, 1, h)),
        });
        if case.output_steps {
            o.out_norm = Some(norm(OUT_NORM));
            o.out_bias = Some(DeviceVec::new(stream, &views[OUT_BIAS]));
            let bytes = &data.residual.bytes;
            o.residual = Some(DeviceMat::from_bytes(stream, bytes, DType::F32, tokens, h)?);
        }
        let mut y = DeviceMatMut::from_bytes(stream, &mut data.y.bytes, DType::F32, tokens, h)?;
        let mut workspace = DeviceVecMut::new(stream, &mut data.workspace.bytes);
        self.layer
            .forward_into(&self.gpu.cuda, stream, &o, &mut y, &mut workspace)
    }

    /// The layer by its plan, whose workspace tells ids and weights, and by the safe call, which has to give the same.
    pub fn run(&self, x: &[f32], residual: &[f32]) -> Output {
        let mut data = self.data(x, residual);
        self.forward(&mut data).unwrap();
        let y = self.gpu.download(&data.y);
        let data = self.data(x, residual);
        let info = self.gpu.cuda.device_info();
        let plan = self.layer.plan(data.tokens, &self.pointers(&data), info);
        let (mut ids, mut weights) = (Vec::new(), Vec::new());
        for launch in plan.unwrap().iter() {
            self.gpu.launch(launch);
            if launch.kernel.starts_with("moe_routing") {
                // Addresses 5 and 6 of `RoutingParams`; a later stage may reuse nothing of what they point to before the download.
                let address = |n: usize| {
                    let bytes = &launch.params()[8 * n..][..8];
                    DevicePtr(u64::from_le_bytes(bytes.try_into().unwrap()))
                };
                let workspace = self.gpu.download(&data.workspace);
                let pairs = data.tokens * self.case.config.slots();
                let at = |n| {
                    let offset = (address(n).0 - data.workspace.ptr().0) as usize;
                    &workspace[offset..][..4 * pairs]
                };
                ids = bytemuck::pod_collect_to_vec(at(5));
                weights = bytemuck::pod_collect_to_vec(at(6));
            }
        }
        let planned = self.gpu.download(&data.y);
        crate::common::assert_same_bits(&planned, &y, "the plan and the safe call");
        Output { y, ids, weights }
    }
}
