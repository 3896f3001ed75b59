//! The GPU's side: weights on the device, together or apart, and calls.

use super::*;

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

/// A first projection from its tensors: one, or gate and up.
fn up_views<'a>(case: &Case, up: WeightViews<'a>, second: Option<WeightViews<'a>>) -> UpViews<'a> {
    match case.up {
        _ if !case.activation.gated => UpViews::Plain(up),
        Up::Fused => UpViews::Fused(up),
        Up::Interleaved => UpViews::Interleaved(up),
        Up::Separate => UpViews::Separate(up, second.expect("the up rows")),
    }
}

type Table = TensorTable<u8, CudaSlice<u8>>;

/// The routed experts' tensors in an allocation for each expert and tensor.
pub struct Apart {
    up: Table,
    separate_up: Option<Table>,
    down: Table,
    up_bias: Table,
    down_bias: Table,
}

impl Apart {
    pub fn new(gpu: &Gpu, case: &Case, w: &Weights) -> Self {
        let (all, l, i) = (w.on_device(case), case.width(), case.intermediate);
        let table = |place: usize, rows: usize, cols: usize| {
            let tensors = all[place].chunks(rows * cols);
            let tensors = tensors.map(|expert| gpu.upload(&bytes(w.dtype, expert)).bytes);
            TensorTable::from_bytes(&gpu.stream, tensors.collect(), w.dtype, rows, cols).unwrap()
        };
        let (wide, separate) = (case.wide(i), case.up == Up::Separate);
        Self {
            up: table(UP, if separate { i } else { wide }, l),
            separate_up: separate.then(|| table(SEPARATE_UP, i, l)),
            down: table(DOWN, l, i),
            up_bias: table(UP_BIAS, 1, wide),
            down_bias: table(DOWN_BIAS, 1, l),
        }
    }

    fn views<'a>(&'a self, stream: &'a CudaStream, case: &Case) -> ExpertViews<'a> {
        let second = self.separate_up.as_ref().map(|t| t.view(stream).into());
        let up = up_views(case, self.up.view(stream).into(), second);
        let mut experts = ExpertViews::new(up, self.down.view(stream));
        if case.biases {
            experts.up_bias = Some(self.up_bias.view(stream).into());
            experts.down_bias = Some(self.down_bias.view(stream).into());
        }
        experts
    }
}

/// The GPU's layer with its weights on the device.
pub struct OnGpu<'g> {
    gpu: &'g Gpu,
    case: Case,
    dtype: DType,
    pub layer: CudaMoeLayer,
    matrices: Vec<Buffer<u8>>,
    vectors: [Buffer<f32>; VECTORS],
    /// The experts' tensors once more, where the calls are to take those.
    pub apart: Option<Apart>,
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
        let matrices = w.on_device(case);
        Self {
            gpu,
            case: case.clone(),
            dtype: w.dtype,
            layer,
            matrices: matrices
                .iter()
                .map(|m| gpu.upload(&bytes(w.dtype, m)))
                .collect(),
            vectors: std::array::from_fn(|n| gpu.upload(&w.vectors[n])),
            apart: None,
        }
    }

    pub fn data(&self, x: &[f32], residual: &[f32]) -> Data {
        let (tokens, info) = (x.len() / self.case.hidden, self.gpu.cuda.device_info());
        let size = self.layer.workspace_size(tokens, info).unwrap();
        Data {
            tokens,
            x: self.gpu.upload(&bytes(self.dtype, x)),
            residual: self.gpu.upload(residual),
            y: self.gpu.filled(x.len(), 0xff),
            workspace: self.gpu.filled(size, 0xff),
        }
    }

    /// The operands as plain data.
    pub fn pointers(&self, data: &Data) -> MoePointers {
        let (case, dtype) = (&self.case, self.dtype);
        let (h, l) = (case.hidden, case.width());
        let rows = |ptr, stride, dtype| DeviceRows { ptr, stride, dtype };
        let matrix = |place: usize, cols| rows(self.matrices[place].ptr(), cols, dtype);
        let norm = |place: usize| Norm {
            weight: self.vectors[place].ptr(),
            eps: EPS,
            multiplier: MULTIPLIER,
        };
        let gate = GatePointers {
            weights: matrix(GATE, h),
            bias: case.biases.then(|| self.vectors[GATE_BIAS].ptr()),
        };
        let mut pointers = MoePointers::new(
            rows(data.x.ptr(), h, dtype),
            RoutingPointers::Gate(gate),
            self.expert_pointers(UP, case.up, case.intermediate, l),
            rows(data.y.ptr(), h, DType::F32),
            data.workspace.ptr(),
        );
        pointers.position = POSITION;
        if case.correction_bias {
            pointers.correction_bias = self.vectors[CORRECTION].ptr();
        }
        pointers.gate_norm = case.gate_norm.then(|| norm(GATE_NORM));
        pointers.gate_noise = case.is_noisy().then(|| matrix(NOISE, h));
        pointers.latent = case.latent.map(|space| LatentPointers {
            w_in: matrix(W_IN, h),
            w_out: matrix(W_OUT, l),
            norm: space.norm.then(|| norm(LATENT_NORM)),
        });
        pointers.post_norm = case.post_norm.map(|_| norm(POST_NORM));
        pointers.shared = case.shared.map(|s| SharedPointers {
            expert: self.expert_pointers(SHARED_UP, Up::Fused, s.intermediate, h),
            gate: (s.join == SharedJoin::SigmoidGate).then(|| matrix(SHARED_GATE, h)),
        });
        if case.output_steps {
            pointers.out_norm = Some(norm(OUT_NORM));
            pointers.out_bias = self.vectors[OUT_BIAS].ptr();
            pointers.residual = Some(rows(data.residual.ptr(), h, DType::F32));
        }
        pointers
    }

    /// Experts in one allocation, with the first projection at `place`; the routed ones with their biases.
    fn expert_pointers(&self, place: usize, up: Up, i: usize, width: usize) -> ExpertPointers {
        let (case, dtype) = (&self.case, self.dtype);
        let at = |place: usize, n, k| {
            WeightPointers::contiguous(self.matrices[place].ptr(), dtype, n, k)
        };
        let bias = |place: usize, n| BiasPointers::contiguous(self.matrices[place].ptr(), dtype, n);
        let (wide, gated) = (case.wide(i), case.activation.gated);
        let (first, down) = (at(place, wide, width), at(place + 1, width, i));
        let experts = match up {
            _ if !gated => ExpertPointers::plain(first, down),
            Up::Fused => ExpertPointers::fused(first, i, down),
            Up::Interleaved => ExpertPointers::interleaved(first, down),
            Up::Separate => {
                ExpertPointers::gated(at(place, i, width), at(SEPARATE_UP, i, width), down)
            }
        };
        if !case.biases || place != UP {
            return experts;
        }
        let (first, down) = (bias(UP_BIAS, wide), Some(bias(DOWN_BIAS, width)));
        match up {
            _ if !gated => experts.with_biases(None, Some(first), down),
            Up::Interleaved => experts.with_interleaved_biases(first, down),
            _ => experts.with_fused_biases(first, i, down),
        }
    }

    /// Numbers in the layer's format as a matrix.
    fn mat<'a>(&'a self, buffer: &'a Buffer<u8>, rows: usize, cols: usize) -> DeviceMat<'a> {
        DeviceMat::from_bytes(&self.gpu.stream, &buffer.bytes, self.dtype, rows, cols).unwrap()
    }

    /// The routed experts in one allocation.
    fn expert_views(&self) -> ExpertViews<'_> {
        let (case, e, l) = (&self.case, self.case.local().len(), self.case.width());
        let matrix = |place: usize, rows, cols| self.mat(&self.matrices[place], rows, cols);
        let i = case.intermediate;
        let (separate, wide) = (case.up == Up::Separate, case.wide(i));
        let second = separate.then(|| matrix(SEPARATE_UP, e * i, l).into());
        let up = matrix(UP, e * if separate { i } else { wide }, l);
        let mut experts =
            ExpertViews::new(up_views(case, up.into(), second), matrix(DOWN, e * l, i));
        if case.biases {
            experts.up_bias = Some(matrix(UP_BIAS, e, wide).into());
            experts.down_bias = Some(matrix(DOWN_BIAS, e, l).into());
        }
        experts
    }

    fn shared_views(&self, s: Shared) -> SharedViews<'_> {
        let (case, h) = (&self.case, self.case.hidden);
        let matrix = |place: usize, rows, cols| self.mat(&self.matrices[place], rows, cols);
        let up = matrix(SHARED_UP, s.count * case.wide(s.intermediate), h).into();
        let up = match case.activation.gated {
            true => UpViews::Fused(up),
            false => UpViews::Plain(up),
        };
        SharedViews {
            expert: ExpertViews::new(up, matrix(SHARED_DOWN, s.count * h, s.intermediate)),
            gate: (s.join == SharedJoin::SigmoidGate).then(|| matrix(SHARED_GATE, 1, h)),
        }
    }

    /// Queues the layer by the safe call.
    pub fn forward(&self, data: &mut Data) -> Result<(), Error> {
        let (stream, case, tokens) = (&*self.gpu.stream, &self.case, data.tokens);
        let (h, l, r) = (case.hidden, case.width(), case.config.num_logits());
        let matrix = |place: usize, rows, cols| self.mat(&self.matrices[place], rows, cols);
        let views: [_; VECTORS] = std::array::from_fn(|n| self.vectors[n].view());
        let vector = |place: usize| DeviceVec::new(stream, &views[place]);
        let norm = |place: usize| NormView {
            weight: vector(place),
            eps: EPS,
            multiplier: MULTIPLIER,
        };
        let gate = GateViews {
            weights: matrix(GATE, r, h),
            bias: case.biases.then(|| vector(GATE_BIAS)),
        };
        let experts = match &self.apart {
            Some(apart) => apart.views(stream, case),
            None => self.expert_views(),
        };
        let x = self.mat(&data.x, tokens, h);
        let mut o = MoeOperands::new(x, RouteSource::Gate(gate), experts);
        o.position = POSITION;
        o.correction_bias = case.correction_bias.then(|| vector(CORRECTION));
        o.gate_norm = case.gate_norm.then(|| norm(GATE_NORM));
        o.gate_noise = case.is_noisy().then(|| matrix(NOISE, r, h));
        o.latent = case.latent.map(|space| LatentViews {
            w_in: matrix(W_IN, l, h),
            w_out: matrix(W_OUT, h, l),
            norm: space.norm.then(|| norm(LATENT_NORM)),
        });
        o.post_norm = case.post_norm.map(|_| norm(POST_NORM));
        o.shared = case.shared.map(|s| self.shared_views(s));
        if case.output_steps {
            o.out_norm = Some(norm(OUT_NORM));
            o.out_bias = Some(vector(OUT_BIAS));
            let bytes = &data.residual.bytes;
            o.residual = Some(DeviceMat::from_bytes(stream, bytes, DType::F32, tokens, h)?);
        }
        let mut y = DeviceMatMut::from_bytes(stream, &mut data.y.bytes, DType::F32, tokens, h)?;
        let mut workspace = DeviceVecMut::new(stream, &mut data.workspace.bytes);
        self.layer
            .forward_into(&self.gpu.cuda, stream, &o, &mut y, &mut workspace)
    }

    /// The layer by the safe call and, with experts in one allocation, by its plan, which has to give the same.
    pub fn run(&self, x: &[f32], residual: &[f32]) -> Answer {
        let mut data = self.data(x, residual);
        self.forward(&mut data).unwrap();
        let answer = self.answer(&data);
        if self.apart.is_none() {
            let data = self.data(x, residual);
            let info = self.gpu.cuda.device_info();
            let plan = self.layer.plan(data.tokens, &self.pointers(&data), info);
            for launch in plan.unwrap().iter() {
                self.gpu.launch(launch);
            }
            let planned = self.answer(&data);
            let what = "the plan and the safe call";
            assert_same_bits(&planned.y, &answer.y, what);
            assert_eq!(planned.ids, answer.ids, "{what}");
            assert_same_bits(&planned.weights, &answer.weights, what);
        }
        answer
    }

    /// What a call has left in y and in its workspace.
    fn answer(&self, data: &Data) -> Answer {
        let (base, info) = (data.workspace.ptr(), self.gpu.cuda.device_info());
        let places = self.layer.workspace_routing(data.tokens, base, info);
        let (places, workspace) = (places.unwrap(), self.gpu.download(&data.workspace));
        Answer {
            y: self.gpu.download(&data.y),
            ids: bytemuck::pod_collect_to_vec(&workspace[places.ids]),
            weights: bytemuck::pod_collect_to_vec(&workspace[places.weights]),
        }
    }
}
