//! A matrix that owns its numbers, in the format that they came in.

use super::Result;
use half::{bf16, f16};
use moe_kernels::{AnyMatMut, AnyMatRef, DType, MatMut, MatRef};

/// The numbers of a tensor.
#[derive(Clone, Debug)]
pub enum Values {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

impl Values {
    pub fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::F16(_) => DType::F16,
            Self::BF16(_) => DType::BF16,
        }
    }

    /// Little-endian bytes of a format; a rest that is no whole number is left out.
    pub fn from_bytes(dtype: DType, bytes: &[u8]) -> Self {
        match dtype {
            DType::F16 => Self::F16(elements(bytes, f16::from_le_bytes)),
            DType::BF16 => Self::BF16(elements(bytes, bf16::from_le_bytes)),
            _ => Self::F32(elements(bytes, f32::from_le_bytes)),
        }
    }

    /// Widened, which is exact.
    pub fn f32s(&self) -> Vec<f32> {
        match self {
            Self::F32(v) => v.clone(),
            Self::F16(v) => v.iter().map(|v| v.to_f32()).collect(),
            Self::BF16(v) => v.iter().map(|v| v.to_f32()).collect(),
        }
    }
}

fn elements<const N: usize, T>(bytes: &[u8], one: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks().0.iter().map(|b| one(*b)).collect()
}

/// A matrix as it lies in a file: row-major `[rows, cols]`, or its transpose when the file has in-features first.
#[derive(Clone, Debug)]
pub struct Matrix {
    pub values: Values,
    pub rows: usize,
    pub cols: usize,
    /// `values` are `[cols, rows]`.
    pub transposed: bool,
}

impl Matrix {
    pub fn new(values: Values, rows: usize, cols: usize) -> Self {
        Self {
            values,
            rows,
            cols,
            transposed: false,
        }
    }

    /// `[rows, cols]`, out-features first, whatever the file has.
    pub fn view(&self) -> Result<AnyMatRef<'_>> {
        let (rows, cols) = match self.transposed {
            false => (self.rows, self.cols),
            true => (self.cols, self.rows),
        };
        let view = self.values.matrix(rows, cols)?;
        Ok(if self.transposed {
            view.transposed()
        } else {
            view
        })
    }
}

/// Element (i, j) of a view as the kernels see it in a set of `dtype`: rounded to nearest, bf16 subnormals read as zero.
pub fn seen_as(view: &AnyMatRef<'_>, dtype: DType, i: usize, j: usize) -> f64 {
    let value = match view {
        AnyMatRef::F32(m) => m.get(i, j),
        AnyMatRef::F16(m) => m.get(i, j).map(f16::to_f32),
        AnyMatRef::BF16(m) => m.get(i, j).map(bf16::to_f32),
        _ => None,
    };
    f64::from(round_to(value.unwrap_or(f32::NAN), dtype))
}

/// A number after a trip through `dtype`.
pub fn round_to(value: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F16 => f16::from_f32(value).to_f32(),
        DType::BF16 => {
            let rounded = bf16::from_f32(value).to_f32();
            if rounded.is_subnormal() { 0.0 } else { rounded }
        }
        _ => value,
    }
}

/// The weights of one expert, or of a shared expert.
#[derive(Clone, Debug)]
pub struct Expert {
    /// Gate and up projection.
    pub gate_up: GateUp,
    /// `[H, I]`
    pub down: Matrix,
    /// `[I]`
    pub gate_bias: Option<Vec<f32>>,
    /// `[I]`
    pub up_bias: Option<Vec<f32>>,
    /// `[H]`
    pub down_bias: Option<Vec<f32>>,
}

/// How gate and up lie.
#[derive(Clone, Debug)]
pub enum GateUp {
    /// Two matrices `[I, H]`.
    Separate(Matrix, Matrix),
    /// One `[2I, H]`: gate rows, then up rows.
    Fused(Matrix),
    /// One `[2I, H]`: rows alternate, gate first.
    Interleaved(Matrix),
}

impl Expert {
    /// The views that the crate packs.
    pub fn views(&self) -> Result<moe_kernels::experts::ExpertWeights<'_>> {
        use moe_kernels::experts::ExpertWeights;
        let down = self.down.view()?;
        let weights = match &self.gate_up {
            GateUp::Separate(gate, up) => ExpertWeights::gated(gate.view()?, up.view()?, down),
            GateUp::Fused(both) => ExpertWeights::fused(both.view()?, down)?,
            GateUp::Interleaved(both) => ExpertWeights::interleaved(both.view()?, down)?,
        };
        Ok(weights.with_biases(
            self.gate_bias.as_deref(),
            self.up_bias.as_deref(),
            self.down_bias.as_deref(),
        ))
    }
}

impl Values {
    /// n zeros of a format.
    pub fn zeros(dtype: DType, n: usize) -> Self {
        match dtype {
            DType::F16 => Self::F16(vec![f16::ZERO; n]),
            DType::BF16 => Self::BF16(vec![bf16::ZERO; n]),
            _ => Self::F32(vec![0.0; n]),
        }
    }

    /// Numbers rounded to a format.
    pub fn from_f32s(dtype: DType, values: &[f32]) -> Self {
        match dtype {
            DType::F16 => Self::F16(values.iter().map(|&v| f16::from_f32(v)).collect()),
            DType::BF16 => Self::BF16(values.iter().map(|&v| bf16::from_f32(v)).collect()),
            _ => Self::F32(values.to_vec()),
        }
    }

    /// The first rows·cols numbers as a matrix.
    pub fn matrix(&self, rows: usize, cols: usize) -> Result<AnyMatRef<'_>> {
        Ok(match self {
            Self::F32(v) => MatRef::new(v, rows, cols)?.into(),
            Self::F16(v) => MatRef::new(v, rows, cols)?.into(),
            Self::BF16(v) => MatRef::new(v, rows, cols)?.into(),
        })
    }

    /// As [`matrix`](Self::matrix), to write.
    pub fn matrix_mut(&mut self, rows: usize, cols: usize) -> Result<AnyMatMut<'_>> {
        Ok(match self {
            Self::F32(v) => MatMut::new(v, rows, cols)?.into(),
            Self::F16(v) => MatMut::new(v, rows, cols)?.into(),
            Self::BF16(v) => MatMut::new(v, rows, cols)?.into(),
        })
    }
}
