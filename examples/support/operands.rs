//! The tensors of a case on their way to a GPU.

use super::backend::Unrun;
use super::case::{Latent, Layer, Norm};
use super::cuda::{Machine, input_norm, parts};
use super::device::{Gpu, Matrix, Vector};
use super::file::Tensor;
use super::mlp::Mlp;
use super::router::{InputNorm, Logits};
use super::run;
use super::tensors::dtype;
use moe_kernels::DType;
use moe_kernels::cuda::WeightViews;
use moe_kernels::cuda::moe::{ExpertViews, NormView, UpViews};

type Ran<T> = Result<T, Unrun>;

/// The tensors of a case in device memory.
pub struct Operands {
    pub x: Matrix,
    /// x as it is in the file.
    pub exact_x: Matrix,
    pub gate: Option<Matrix>,
    pub gate_bias: Option<Vector<f32>>,
    pub given_logits: Option<Matrix>,
    pub correction_bias: Option<Vector<f32>>,
    pub per_expert_scale: Option<Vector<f32>>,
    pub given_ids: Option<Vector<i32>>,
    pub experts: Experts,
    pub shared: Option<(Experts, Option<Matrix>)>,
    pub gate_norm: Option<NormOperand>,
    /// Into the latent space, its norm, and out of it.
    pub latent: Option<(Matrix, Option<NormOperand>, Matrix)>,
    pub post_norm: Option<NormOperand>,
    pub out_norm: Option<NormOperand>,
    pub out_bias: Option<Vector<f32>>,
}

impl Operands {
    pub fn upload(machine: &Machine, case: &Layer) -> Ran<Self> {
        let (gpu, gate) = (&machine.gpu, &case.gate);
        let (tokens, hidden, columns) = (case.tokens, case.hidden, gate.config.num_logits());
        let floats = |v: &Option<Vec<f32>>| v.as_ref().map(|v| Vector::new(gpu, v)).transpose();
        let x = |dtype| Matrix::new(gpu, dtype, &case.x, tokens, hidden);
        let (w, bias, given) = match &gate.logits {
            Logits::Linear { w, .. } => (Some(w), floats(&gate.bias)?, None),
            Logits::Given(z) => (None, None, Some(run::biased(z, gate.bias.as_deref()))),
            Logits::None => (None, None, None),
        };
        Ok(Self {
            x: x(machine.activations())?,
            exact_x: x(DType::F32)?,
            gate: w
                .map(|w| tensor(gpu, w, weights_dtype(w), columns, hidden))
                .transpose()?,
            gate_bias: bias,
            given_logits: given
                .map(|z| Matrix::new(gpu, DType::F32, &z, tokens, columns))
                .transpose()?,
            correction_bias: floats(&gate.correction_bias)?,
            per_expert_scale: floats(&gate.per_expert_scale)?,
            given_ids: gate
                .given_ids
                .as_ref()
                .map(|ids| Vector::new(gpu, ids))
                .transpose()?,
            experts: Experts::upload(machine, &case.experts, 1)?,
            shared: match &case.shared {
                Some(shared) => Some((
                    Experts::upload(machine, &shared.mlp, parts(shared))?,
                    shared
                        .gate_w
                        .as_ref()
                        .map(|w| Matrix::new(gpu, DType::F32, w, 1, hidden))
                        .transpose()?,
                )),
                None => None,
            },
            gate_norm: match input_norm(gate) {
                Some(InputNorm { eps, mul, scale }) => Some(NormOperand {
                    w: Vector::new(gpu, scale)?,
                    eps: *eps,
                    multiplier: *mul,
                }),
                None => None,
            },
            latent: match &case.latent {
                Some(latent) => Some(upload_latent(machine, latent, hidden)?),
                None => None,
            },
            post_norm: NormOperand::upload(gpu, case.post_norm.as_ref().map(|p| &p.0))?,
            out_norm: NormOperand::upload(gpu, case.out_norm.as_ref())?,
            out_bias: floats(&case.out_bias)?,
        })
    }
}

fn upload_latent(
    machine: &Machine,
    latent: &Latent,
    hidden: usize,
) -> Ran<(Matrix, Option<NormOperand>, Matrix)> {
    let gpu = &machine.gpu;
    let dtype = machine.dtype.unwrap_or(latent.dtype());
    Ok((
        tensor(gpu, &latent.in_w, dtype, latent.width, hidden)?,
        NormOperand::upload(gpu, latent.in_norm.as_ref())?,
        tensor(gpu, &latent.out_w, dtype, hidden, latent.width)?,
    ))
}

/// A norm's factor in device memory, and its numbers.
pub struct NormOperand {
    w: Vector<f32>,
    eps: f32,
    multiplier: f32,
}

impl NormOperand {
    fn upload(gpu: &Gpu, norm: Option<&Norm>) -> Ran<Option<Self>> {
        let Some(Norm { eps, w }) = norm else {
            return Ok(None);
        };
        Ok(Some(Self {
            w: Vector::new(gpu, w)?,
            eps: *eps,
            multiplier: 1.0,
        }))
    }

    pub fn view<'a>(&'a self, gpu: &'a Gpu) -> NormView<'a> {
        NormView {
            weight: self.w.view(&gpu.stream),
            eps: self.eps,
            multiplier: self.multiplier,
        }
    }
}

/// The format that a weight tensor has in the file.
fn weights_dtype(tensor: &Tensor) -> DType {
    dtype(tensor).unwrap_or(DType::F32)
}

fn tensor(gpu: &Gpu, tensor: &Tensor, dtype: DType, rows: usize, cols: usize) -> Ran<Matrix> {
    let values = tensor.f32s("weights").map_err(|why| why.to_string())?;
    Ok(Matrix::new(gpu, dtype, &values, rows, cols)?)
}

/// The weights of `count` MLPs, laid out as in the file: gate and up are tensors of their own.
pub struct Experts {
    gate: Option<Matrix>,
    up: Matrix,
    down: Matrix,
    /// `[E, 2I]`: the gate's bias, then the up projection's; `[E, I]` without a gate.
    up_bias: Option<Matrix>,
    down_bias: Option<Matrix>,
}

impl Experts {
    /// Each MLP as `parts` of neighbouring neurons. (The file's biases belong to whole ones.)
    fn upload(machine: &Machine, mlp: &Mlp, parts: usize) -> Ran<Self> {
        let gpu = &machine.gpu;
        let (count, inner, outer) = (mlp.count * parts, mlp.inner / parts, mlp.outer);
        let dtype = machine.dtype.unwrap_or(mlp.dtype());
        let up = |w| tensor(gpu, w, dtype, count * inner, outer);
        let bias = |b: Vec<f32>, width| Matrix::new(gpu, DType::F32, &b, count, width);
        let up_bias = match (&mlp.gate_bias, &mlp.up_bias) {
            (Some(gate), Some(up)) => {
                let experts = gate.chunks(inner.max(1)).zip(up.chunks(inner.max(1)));
                let both = experts.flat_map(|(g, u)| [g, u].concat()).collect();
                Some(bias(both, 2 * inner)?)
            }
            (None, Some(up)) => Some(bias(up.clone(), inner)?),
            _ => None,
        };
        Ok(Self {
            gate: mlp.gate.as_ref().map(up).transpose()?,
            up: up(&mlp.up)?,
            down: Matrix::new(
                gpu,
                dtype,
                &columns_apart(&mlp.down, outer, parts)?,
                count * outer,
                inner,
            )?,
            up_bias,
            down_bias: mlp
                .down_bias
                .as_ref()
                .map(|b| bias(b.clone(), outer))
                .transpose()?,
        })
    }

    pub fn views<'a>(&'a self, gpu: &'a Gpu) -> Ran<ExpertViews<'a>> {
        let view = |m: &'a Matrix| m.view(&gpu.stream).map(WeightViews::from);
        let up = match &self.gate {
            Some(gate) => UpViews::Separate(view(gate)?, view(&self.up)?),
            None => UpViews::Plain(view(&self.up)?),
        };
        Ok(ExpertViews {
            up_bias: self.up_bias.as_ref().map(view).transpose()?,
            down_bias: self.down_bias.as_ref().map(view).transpose()?,
            ..ExpertViews::new(up, view(&self.down)?)
        })
    }
}

/// Matrices of `rows` rows, each as `parts` matrices of neighbouring columns, one below the other.
fn columns_apart(tensor: &Tensor, rows: usize, parts: usize) -> Ran<Vec<f32>> {
    let values = tensor.f32s("weights").map_err(|why| why.to_string())?;
    if parts == 1 {
        return Ok(values);
    }
    let cols = values.len() / rows.max(1);
    let width = cols / parts;
    let mut apart = Vec::with_capacity(values.len());
    for part in 0..parts {
        for row in values.chunks(cols.max(1)) {
            apart.extend_from_slice(&row[part * width..][..width]);
        }
    }
    Ok(apart)
}
