//! What defines a product's bits, matrices of any format, and activations.

use half::{bf16, f16};
use moe_kernels::grouped_gemm::{Activation, ActivationFunction, Clamp};
use moe_kernels::{AnyMatMut, AnyMatRef, DType, MatMut, MatRef};

/// The definition of one output element: a chain of FMAs in the documented order.
pub fn chain(dtype: DType, a: &[f32], w: &[f32]) -> f32 {
    let mut sum = 0.0f32;
    match dtype {
        DType::BF16 => {
            let at = |v: &[f32], k: usize| v.get(k).copied().unwrap_or(0.0);
            for k in (0..a.len()).step_by(2) {
                sum = at(a, k + 1).mul_add(at(w, k + 1), sum);
                sum = a[k].mul_add(w[k], sum);
            }
        }
        _ => {
            for (x, w) in a.iter().zip(w) {
                sum = x.mul_add(*w, sum);
            }
        }
    }
    sum
}

/// x in any format, as its own matrix.
pub enum Stored {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

impl Stored {
    pub fn new(dtype: DType, v: &[f32]) -> Self {
        match dtype {
            DType::F16 => Self::F16(v.iter().map(|&x| f16::from_f32(x)).collect()),
            DType::BF16 => Self::BF16(v.iter().map(|&x| bf16::from_f32(x)).collect()),
            _ => Self::F32(v.to_vec()),
        }
    }

    pub fn view(&self, rows: usize, cols: usize) -> AnyMatRef<'_> {
        match self {
            Self::F32(v) => MatRef::new(v, rows, cols).unwrap().into(),
            Self::F16(v) => MatRef::new(v, rows, cols).unwrap().into(),
            Self::BF16(v) => MatRef::new(v, rows, cols).unwrap().into(),
        }
    }

    pub fn view_mut(&mut self, rows: usize, cols: usize) -> AnyMatMut<'_> {
        match self {
            Self::F32(v) => MatMut::new(v, rows, cols).unwrap().into(),
            Self::F16(v) => MatMut::new(v, rows, cols).unwrap().into(),
            Self::BF16(v) => MatMut::new(v, rows, cols).unwrap().into(),
        }
    }

    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            Self::F32(v) => v.clone(),
            Self::F16(v) => v.iter().map(|x| x.to_f32()).collect(),
            Self::BF16(v) => v.iter().map(|x| x.to_f32()).collect(),
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        match self {
            Self::F32(v) => bytemuck::cast_slice(v).to_vec(),
            Self::F16(v) => bytemuck::cast_slice(v).to_vec(),
            Self::BF16(v) => bytemuck::cast_slice(v).to_vec(),
        }
    }
}

/// bf16 subnormals (f32 with a zero exponent) as the contract reads them.
pub fn flushed(v: &[f32]) -> Vec<f32> {
    v.iter()
        .map(|x| {
            if x.to_bits() & 0x7f80_0000 == 0 {
                f32::copysign(0.0, *x)
            } else {
                *x
            }
        })
        .collect()
}

/// Numbers as a format keeps them.
pub fn rounded(dtype: DType, v: &[f32]) -> Vec<f32> {
    Stored::new(dtype, v).to_f32()
}

/// The bytes of numbers in a format.
pub fn bytes(dtype: DType, v: &[f32]) -> Vec<u8> {
    Stored::new(dtype, v).bytes()
}

/// The numbers whose bytes these are.
pub fn numbers(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    let stored = match dtype {
        DType::F16 => Stored::F16(bytemuck::pod_collect_to_vec(bytes)),
        DType::BF16 => Stored::BF16(bytemuck::pod_collect_to_vec(bytes)),
        _ => Stored::F32(bytemuck::pod_collect_to_vec(bytes)),
    };
    stored.to_f32()
}

/// Every activation that can be asked for.
pub fn activations() -> Vec<Activation> {
    use ActivationFunction::*;
    let mut all = Vec::new();
    for function in [Identity, Silu, Gelu, GeluTanh, Relu, Relu2] {
        for gated in [true, false] {
            for clamp in [
                Clamp::None,
                Clamp::Pre { limit: 0.7 },
                Clamp::Post { limit: 0.5 },
                Clamp::Post { limit: 0.3 },
            ] {
                all.push(Activation {
                    function,
                    gated,
                    clamp,
                });
            }
        }
    }
    all.push(Activation::GPT_OSS);
    all.push(Activation {
        clamp: Clamp::GptOss {
            limit: 0.8,
            alpha: 1.3,
        },
        ..Activation::SWIGLU
    });
    for (gate, up) in [(0.9, 1.1), (1.5, 0.8), (0.0, 1.1), (0.9, 0.0)] {
        all.push(Activation {
            clamp: Clamp::Softcap { gate, up },
            ..Activation::SWIGLU
        });
    }
    all
}
