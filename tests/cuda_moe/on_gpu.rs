//! The GPU's side: weights on the device, together or apart, and calls.

use super::*;

/// The GPU's layer with its weights on the device.
pub struct OnGpu<'g> {
    pub gpu: &'g Gpu,
    pub case: Case,
    pub dtype: DType,
    pub layer: CudaMoeLayer,
    pub gate_w: Buffer<u8>,
    pub gate_b: Buffer<f32>,
    pub up: Buffer<u8>,
    pub down: Buffer<u8>,
    pub up_bias: Buffer<u8>,
    pub down_bias: Buffer<u8>,
    pub correction: Buffer<f32>,
    pub shared_up: Buffer<u8>,
    pub shared_down: Buffer<u8>,
    pub shared_gate: Buffer<u8>,
    pub norm: Buffer<f32>,
    pub out_bias: Buffer<f32>,
    /// The experts' tensors once more, each in an allocation of its own, where the calls are to take those.
    pub apart: Option<Apart>,
}

pub type Table = TensorTable<u8, CudaSlice<u8>>;

/// One allocation for each expert and tensor.
pub struct Apart {
    /// One, or gate and up.
    pub up: Vec<Table>,
    pub down: Table,
    pub up_bias: Table,
    pub down_bias: Table,
}

impl Apart {
    pub fn new(gpu: &Gpu, case: &Case, w: &Weights) -> Self {
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

    pub fn views<'a>(&'a self, stream: &'a CudaStream, case: &Case) -> ExpertViews<'a> {
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
pub fn bytes(dtype: DType, v: &[f32]) -> Vec<u8> {
    match Stored::new(dtype, v) {
        Stored::F32(v) => bytemuck::cast_slice(&v).to_vec(),
        Stored::F16(v) => bytemuck::cast_slice(&v).to_vec(),
        Stored::BF16(v) => bytemuck::cast_slice(&v).to_vec(),
    }
}

pub fn cuda_layer(case: &Case, dtype: DType) -> CudaMoeLayer {
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
pub struct Data {
    pub tokens: usize,
    pub x: Buffer<u8>,
    pub residual: Buffer<f32>,
    pub y: Buffer<f32>,
    pub workspace: Buffer<u8>,
}

impl<'g> OnGpu<'g> {
    pub fn new(gpu: &'g Gpu, case: &Case, w: &Weights, layer: CudaMoeLayer) -> Self {
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

    pub fn data(&self, x: &[f32], residual: &[f32]) -> Data {
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
    pub fn mat<'a>(&'a self, buffer: &'a Buffer<u8>, rows: usize, cols: usize) -> DeviceMat<'a> {
        DeviceMat::from_bytes(&self.gpu.stream, &buffer.bytes, self.dtype, rows, cols).unwrap()
    }

    /// Queues the layer.
    pub fn forward(&self, data: &mut Data) -> Result<(), Error> {
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

    pub fn run(&self, x: &[f32], residual: &[f32]) -> Vec<f32> {
        self.answer(x, residual).y
    }

    pub fn answer(&self, x: &[f32], residual: &[f32]) -> Answer {
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
    pub fn places(&self, data: &Data) -> Option<[usize; 2]> {
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
