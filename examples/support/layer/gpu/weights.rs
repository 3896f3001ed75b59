//! A layer's weights in device memory, one expert below the other.

use super::super::device::{Gpu, Matrix, Vector, encode};
use super::super::shapes::Join;
use super::super::source::{SharedTensors, Source};
use super::super::tensor::{Expert, Matrix as HostMatrix, round_to};
use super::super::{Result, fail};
use super::OnGpu;
use moe_kernels::cuda::WeightViews;
use moe_kernels::cuda::moe::{ExpertViews, GateViews, SharedViews, UpViews};
use moe_kernels::{AnyMatRef, DType};
use rayon::prelude::*;
use std::io::Write;
use std::time::{Duration, Instant};

/// Experts as the kernels take them.
struct Experts {
    /// `[E·2I, H]`: for each expert the gate rows, then the up rows.
    gate_up: Matrix,
    /// `[E·H, I]`
    down: Matrix,
    /// `[E, 2I]`
    gate_up_bias: Option<Matrix>,
    /// `[E, H]`
    down_bias: Option<Matrix>,
    inner: usize,
    hidden: usize,
}

/// Everything that a call reads besides x.
pub struct Weights {
    /// `[R, H]` in its own format.
    gate: Matrix,
    gate_bias: Option<Vector<f32>>,
    correction: Option<Vector<f32>>,
    experts: Experts,
    shared: Option<(Experts, Option<Matrix>)>,
    /// How long it took to make and copy them.
    pub uploading: Duration,
}

impl Weights {
    /// Takes the source's tensors to the GPU, an expert at a time.
    pub fn upload(
        on: &OnGpu<'_>,
        source: &mut dyn Source,
        progress: &mut dyn Write,
    ) -> Result<Self> {
        let (gpu, a, start) = (on.gpu, on.architecture, Instant::now());
        let router = source.router()?;
        let count = a.experts();
        let mut experts = Experts::zeros(on, count, a.intermediate, a.biases)?;
        let mut shown = Instant::now();
        for e in 0..count {
            experts.put(on, e, &source.expert(e)?)?;
            if e + 1 == count || shown.elapsed() > Duration::from_millis(100) {
                shown = Instant::now();
                write!(progress, "\ruploading expert {:4} of {count}", e + 1)?;
                progress.flush()?;
            }
        }
        writeln!(progress)?;
        let shared = match (a.shared, source.shared()?) {
            (Some(shape), Some(tensors)) => {
                Some(upload_shared(on, shape.intermediate, shape.join, &tensors)?)
            }
            _ => None,
        };
        let vector = |v: &Option<Vec<f32>>| v.as_ref().map(|v| Vector::new(gpu, v)).transpose();
        let weights = Self {
            gate: as_it_is(gpu, &router.weight)?,
            gate_bias: vector(&router.bias)?,
            correction: vector(&router.correction)?,
            experts,
            shared,
            uploading: start.elapsed(),
        };
        gpu.synchronize()?;
        Ok(weights)
    }

    /// The same in memory of its own.
    pub fn duplicate(&self, gpu: &Gpu) -> Result<Self> {
        let vector = |v: &Option<Vector<f32>>| -> Result<Option<Vector<f32>>> {
            let Some(v) = v else { return Ok(None) };
            Ok(Some(Vector::new(gpu, &v.read(gpu)?)?))
        };
        let shared = match &self.shared {
            Some((experts, gate)) => Some((
                experts.duplicate(gpu)?,
                gate.as_ref().map(|g| g.duplicate(gpu)).transpose()?,
            )),
            None => None,
        };
        Ok(Self {
            gate: self.gate.duplicate(gpu)?,
            gate_bias: vector(&self.gate_bias)?,
            correction: vector(&self.correction)?,
            experts: self.experts.duplicate(gpu)?,
            shared,
            uploading: self.uploading,
        })
    }

    /// Bytes of the matrices.
    pub fn size(&self) -> u64 {
        let shared = self
            .shared
            .as_ref()
            .map_or(0, |(experts, _)| experts.size());
        self.gate.size() + self.experts.size() + shared
    }

    /// Bytes of the gate's matrix.
    pub fn gate_size(&self) -> u64 {
        self.gate.size()
    }

    pub fn gate_views<'a>(&'a self, gpu: &'a Gpu) -> Result<GateViews<'a>> {
        Ok(GateViews {
            weights: self.gate.view(&gpu.stream)?,
            bias: self.gate_bias.as_ref().map(|b| b.view(&gpu.stream)),
        })
    }

    pub fn correction(&self) -> Option<&Vector<f32>> {
        self.correction.as_ref()
    }

    pub fn expert_views<'a>(&'a self, gpu: &'a Gpu) -> Result<ExpertViews<'a>> {
        self.experts.views(gpu)
    }

    pub fn shared_views<'a>(&'a self, gpu: &'a Gpu) -> Result<Option<SharedViews<'a>>> {
        let Some((experts, gate)) = &self.shared else {
            return Ok(None);
        };
        Ok(Some(SharedViews {
            expert: experts.views(gpu)?,
            gate: gate.as_ref().map(|g| g.view(&gpu.stream)).transpose()?,
        }))
    }
}

impl Experts {
    fn zeros(on: &OnGpu<'_>, count: usize, inner: usize, biases: bool) -> Result<Self> {
        let (gpu, dtype, hidden) = (on.gpu, on.dtype, on.architecture.hidden);
        let bias = |width| match biases {
            true => Matrix::zeros(gpu, DType::F32, count, width).map(Some),
            false => Ok(None),
        };
        Ok(Self {
            gate_up: Matrix::zeros(gpu, dtype, count * 2 * inner, hidden)?,
            down: Matrix::zeros(gpu, dtype, count * hidden, inner)?,
            gate_up_bias: bias(2 * inner)?,
            down_bias: bias(hidden)?,
            inner,
            hidden,
        })
    }

    /// Copies expert `e`.
    fn put(&mut self, on: &OnGpu<'_>, e: usize, expert: &Expert) -> Result<()> {
        let (gpu, dtype) = (on.gpu, on.dtype);
        let (inner, hidden) = (self.inner, self.hidden);
        let views = expert.views()?;
        let Some(gate) = &views.gate else {
            return fail("an expert without a gate projection");
        };
        for (view, shape) in [
            (gate, [inner, hidden]),
            (&views.up, [inner, hidden]),
            (&views.down, [hidden, inner]),
        ] {
            if [view.rows(), view.cols()] != shape {
                return fail(format!("expert {e} is not of the layer's shape"));
            }
        }
        let first = e * 2 * inner;
        self.gate_up.write_rows(gpu, first, &bytes(gate, dtype))?;
        self.gate_up
            .write_rows(gpu, first + inner, &bytes(&views.up, dtype))?;
        self.down
            .write_rows(gpu, e * hidden, &bytes(&views.down, dtype))?;
        if let Some(bias) = &mut self.gate_up_bias {
            let part = |b: Option<&[f32]>| b.map_or_else(|| vec![0.0; inner], <[f32]>::to_vec);
            let both = [part(views.gate_bias), part(views.up_bias)].concat();
            bias.write_rows(gpu, e, &encode(DType::F32, &both))?;
        }
        if let (Some(bias), Some(values)) = (&mut self.down_bias, views.down_bias) {
            bias.write_rows(gpu, e, &encode(DType::F32, values))?;
        }
        Ok(())
    }

    fn duplicate(&self, gpu: &Gpu) -> Result<Self> {
        let optional = |m: &Option<Matrix>| m.as_ref().map(|m| m.duplicate(gpu)).transpose();
        Ok(Self {
            gate_up: self.gate_up.duplicate(gpu)?,
            down: self.down.duplicate(gpu)?,
            gate_up_bias: optional(&self.gate_up_bias)?,
            down_bias: optional(&self.down_bias)?,
            ..*self
        })
    }

    fn size(&self) -> u64 {
        self.gate_up.size() + self.down.size()
    }

    fn views<'a>(&'a self, gpu: &'a Gpu) -> Result<ExpertViews<'a>> {
        let view = |m: &'a Matrix| m.view(&gpu.stream).map(WeightViews::from);
        let up = UpViews::Fused(view(&self.gate_up)?);
        Ok(ExpertViews {
            up_bias: self.gate_up_bias.as_ref().map(view).transpose()?,
            down_bias: self.down_bias.as_ref().map(view).transpose()?,
            ..ExpertViews::new(up, view(&self.down)?)
        })
    }
}

fn upload_shared(
    on: &OnGpu<'_>,
    inner: usize,
    join: Join,
    tensors: &SharedTensors,
) -> Result<(Experts, Option<Matrix>)> {
    let expert = &tensors.expert;
    let biases = [&expert.gate_bias, &expert.up_bias, &expert.down_bias];
    let biases = biases.iter().any(|b| b.is_some());
    let mut experts = Experts::zeros(on, 1, inner, biases)?;
    experts.put(on, 0, expert)?;
    let gate = match (join, &tensors.gate) {
        (Join::SigmoidGate, Some(gate)) => Some(as_it_is(on.gpu, gate)?),
        _ => None,
    };
    Ok((experts, gate))
}

/// A matrix in the format that it came in.
fn as_it_is(gpu: &Gpu, matrix: &HostMatrix) -> Result<Matrix> {
    let (view, dtype) = (matrix.view()?, matrix.values.dtype());
    let mut device = Matrix::zeros(gpu, dtype, view.rows(), view.cols())?;
    device.write_rows(gpu, 0, &bytes(&view, dtype))?;
    Ok(device)
}

/// The rows of a view, whatever its strides, as bytes of a format: the numbers that the CPU's layer packs.
fn bytes(view: &AnyMatRef<'_>, dtype: DType) -> Vec<u8> {
    let row = |i: usize| -> Vec<u8> {
        let value = |j| match view {
            AnyMatRef::F32(m) => m.get(i, j),
            AnyMatRef::F16(m) => m.get(i, j).map(f32::from),
            AnyMatRef::BF16(m) => m.get(i, j).map(f32::from),
            _ => None,
        };
        let values = (0..view.cols()).map(|j| round_to(value(j).unwrap_or(f32::NAN), dtype));
        encode(dtype, &values.collect::<Vec<f32>>())
    };
    let rows: Vec<Vec<u8>> = (0..view.rows()).into_par_iter().map(row).collect();
    rows.concat()
}
