//! A problem on both sides.

use super::*;

/// A matrix on both sides: f32 values that the format holds exactly, and rows in device memory with poison between and before them.
pub struct Matrix {
    pub values: Vec<f32>,
    pub rows: usize,
    pub width: usize,
    pub device: DeviceRows,
    pub buffer: Buffer<u8>,
}

/// How matrices lie in memory: elements between rows, and before the first one.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    pub gap: usize,
    pub shift: usize,
}

impl Layout {
    pub const DENSE: Self = Self { gap: 0, shift: 0 };
}

impl Matrix {
    pub fn new(gpu: &Gpu, values: &[f32], width: usize, dtype: DType, layout: Layout) -> Self {
        let Layout { gap, shift } = layout;
        let (rows, stride) = (values.len() / width, width + gap);
        let mut spread = vec![f32::NAN; shift + rows * stride];
        for (row, values) in values.chunks(width).enumerate() {
            spread[shift + row * stride..][..width].copy_from_slice(values);
        }
        let buffer = gpu.upload(&bytes(dtype, &spread));
        let ptr = buffer.ptr().add((shift * dtype.size()) as u64);
        Self {
            values: rounded(dtype, values),
            rows,
            width,
            device: DeviceRows { ptr, stride, dtype },
            buffer,
        }
    }

    pub fn view(&self) -> MatRef<'_, f32> {
        MatRef::new(&self.values, self.rows, self.width).unwrap()
    }
}

/// One problem on both sides, with every operand that there can be.
pub struct Problem {
    pub gpu: Gpu,
    pub tokens: usize,
    pub slots: usize,
    pub width: usize,
    pub layout: Layout,
    pub ys: Matrix,
    pub weights: Vec<f32>,
    pub row_of_pair: Vec<u32>,
    pub ids: Vec<i32>,
    pub x: Matrix,
    pub shared: Matrix,
    pub gate: Vec<f32>,
    pub norm: Vec<f32>,
    pub bias: Vec<f32>,
    pub residual: Matrix,
    pub device: Vec<Buffer<f32>>,
    pub device_rows: Buffer<u32>,
    pub device_ids: Buffer<i32>,
}

pub const NUM_EXPERTS: usize = 7;

/// What follows the sum.
#[derive(Clone, Copy, Debug, Default)]
pub struct Steps {
    pub scale: Option<f32>,
    pub shared: u8,
    pub norm: bool,
    pub bias: bool,
    pub residual: bool,
    pub identity: bool,
    pub without_weights: bool,
    pub given_sum: bool,
}

impl Problem {
    pub fn new(
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
            Matrix::new(&gpu, &rng.normals(rows * width), width, format, layout)
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

    pub fn vector(&self, i: usize) -> DevicePtr {
        self.device[i].ptr().add(4 * self.layout.shift as u64)
    }

    pub fn on_gpu(&self, steps: Steps, out: DeviceRows) -> CombineOperands {
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

    pub fn on_cpu<T: Element>(&self, steps: Steps, out: &mut [T])
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
    pub fn expected(&self, steps: Steps, dtype: DType) -> Vec<f32> {
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
    pub fn check(&self, steps: Steps, dtype: DType) -> &'static str {
        let poison = vec![f32::NAN; self.tokens * self.width];
        let out = Matrix::new(&self.gpu, &poison, self.width, dtype, self.layout);
        let launch =
            plan_combine(&self.on_gpu(steps, out.device), self.gpu.cuda.device_info()).unwrap();
        let before = self.gpu.download(&out.buffer);
        self.gpu.launch(&launch);
        let after = self.gpu.download(&out.buffer);
        let expected = self.expected(steps, dtype);
        let (size, stride) = (dtype.size(), out.device.stride);
        let (all, mut untouched) = (numbers(dtype, &after), before);
        for (i, e) in expected.iter().enumerate() {
            let at = self.layout.shift + i / self.width * stride + i % self.width;
            let found = all[at];
            assert!(
                found.to_bits() == e.to_bits() || found.is_nan() && e.is_nan(),
                "{}: token {} column {}: {found:e} is not {e:e}; {steps:?}",
                launch.kernel,
                i / self.width,
                i % self.width,
            );
            let bytes = at * size..(at + 1) * size;
            untouched[bytes.clone()].copy_from_slice(&after[bytes]);
        }
        assert!(
            untouched == after,
            "{}: written between rows",
            launch.kernel
        );
        launch.kernel
    }
}
