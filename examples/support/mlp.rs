//! The experts and the shared experts of a case.

use super::fields::Fields;
use super::file::{Result, Tensor, Values, malformed};
use super::tensors::{Tensors, common_dtype};
use moe_kernels::experts::ExpertWeights;
use moe_kernels::grouped_gemm::{Activation, ActivationFunction, Clamp};
use moe_kernels::{AnyMatRef, DType, MatRef};

/// `count` MLPs `outer → inner → outer` of one kind.
#[derive(Clone, Debug)]
pub struct Mlp {
    pub activation: Activation,
    pub count: usize,
    /// I
    pub inner: usize,
    /// H, or L in a latent space.
    pub outer: usize,
    /// `[count, I, L]`
    pub gate: Option<Tensor>,
    /// `[count, I, L]`
    pub up: Tensor,
    /// `[count, L, I]`
    pub down: Tensor,
    /// `[count, I]`
    pub gate_bias: Option<Vec<f32>>,
    /// `[count, I]`
    pub up_bias: Option<Vec<f32>>,
    /// `[count, L]`
    pub down_bias: Option<Vec<f32>>,
}

impl Mlp {
    /// The format that holds all weights.
    pub fn dtype(&self) -> DType {
        common_dtype([&self.up, &self.down].into_iter().chain(&self.gate))
    }

    /// One of them, as the crate takes it.
    pub fn expert(&self, e: usize) -> moe_kernels::Result<ExpertWeights<'_>> {
        let (inner, outer) = (self.inner, self.outer);
        let gate = match &self.gate {
            Some(gate) => Some(matrix(gate, e, inner, outer)?),
            None => None,
        };
        fn part(bias: &Option<Vec<f32>>, e: usize, n: usize) -> Option<&[f32]> {
            bias.as_ref()?.get(e * n..(e + 1) * n)
        }
        let up = matrix(&self.up, e, inner, outer)?;
        let down = matrix(&self.down, e, outer, inner)?;
        let weights = ExpertWeights {
            gate,
            ..ExpertWeights::plain(up, down)
        };
        Ok(weights.with_biases(
            part(&self.gate_bias, e, inner),
            part(&self.up_bias, e, inner),
            part(&self.down_bias, e, outer),
        ))
    }

    /// Part `j` of `n` of a single wide one: neurons `j·I/n .. (j + 1)·I/n`.
    pub fn slice(&self, j: usize, n: usize) -> moe_kernels::Result<ExpertWeights<'_>> {
        let (inner, outer) = (self.inner, self.outer);
        let (width, start) = (inner / n, j * (inner / n));
        let rows = |t| matrix(t, 0, inner, outer)?.rows_from(start, 1, width);
        let down = matrix(&self.down, 0, outer, inner)?.transposed();
        let weights = ExpertWeights {
            gate: match &self.gate {
                Some(gate) => Some(rows(gate)?),
                None => None,
            },
            ..ExpertWeights::plain(
                rows(&self.up)?,
                down.rows_from(start, 1, width)?.transposed(),
            )
        };
        // Not the last bias, which belongs to all of them: see `read_shared`.
        let [gate_bias, up_bias] =
            [&self.gate_bias, &self.up_bias].map(|bias| bias.as_ref()?.get(start..start + width));
        Ok(weights.with_biases(gate_bias, up_bias, None))
    }
}

/// Matrix `e` of a stack of `rows × cols` ones.
pub fn matrix(
    tensor: &Tensor,
    e: usize,
    rows: usize,
    cols: usize,
) -> moe_kernels::Result<AnyMatRef<'_>> {
    let start = e * rows * cols;
    Ok(match &tensor.values {
        Values::F32(v) => MatRef::new(&v[start..], rows, cols)?.into(),
        Values::F16(v) => MatRef::new(&v[start..], rows, cols)?.into(),
        Values::BF16(v) => MatRef::new(&v[start..], rows, cols)?.into(),
        Values::F64(_) | Values::Integers(_) => MatRef::<f32>::new(&[], rows, cols)?.into(), // never: see `Tensors::weight`
    })
}

/// The MLP that every token goes through.
#[derive(Clone, Debug)]
pub struct Shared {
    /// All shared experts side by side, `count` of 1.
    pub mlp: Mlp,
    /// How many they are.
    pub count: usize,
    pub combine: Combine,
    /// `[H]`, with [`Combine::SigmoidGate`].
    pub gate_w: Option<Vec<f32>>,
}

/// How shared experts join the routed sum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Combine {
    Add,
    SigmoidGate,
    Average,
    RouterWeighted,
}

/// Reads `w_gate`, `w_up`, `w_down` and their biases.
pub fn read_experts(
    meta: &Fields,
    tensors: &mut Tensors,
    count: usize,
    outer: usize,
) -> Result<Mlp> {
    let inner = match tensors.get("w_up") {
        Some(Tensor { shape, .. }) if shape.len() == 3 => shape[1],
        Some(Tensor { shape, .. }) => {
            return malformed(format!(
                "tensor w_up: expected shape [E, I, L], got {shape:?}"
            ));
        }
        None => return malformed("missing tensor w_up"),
    };
    read_mlp(meta, tensors, "", &[count], inner, outer)
}

/// Reads `shared_w_gate`, `shared_w_up`, `shared_w_down` and what goes with them.
pub fn read_shared(meta: &Fields, tensors: &mut Tensors, hidden: usize) -> Result<Option<Shared>> {
    let count = meta.size("n")?.unwrap_or(0);
    let combine = meta.choice(
        "combine",
        "add",
        &[
            ("add", Combine::Add),
            ("none", Combine::Add),
            ("sigmoid_gate", Combine::SigmoidGate),
            ("average", Combine::Average),
            ("router_weighted", Combine::RouterWeighted),
        ],
    )?;
    if count == 0 {
        // Its other fields describe nothing.
        for name in [
            "act", "alpha", "bias", "clamp", "gated", "limit", "gate_cap", "up_cap",
        ] {
            meta.get(name);
        }
        return Ok(None);
    }
    let inner = match tensors.get("shared_w_up") {
        Some(Tensor { shape, .. }) if shape.len() == 2 => shape[0],
        Some(Tensor { shape, .. }) => {
            return malformed(format!(
                "tensor shared_w_up: expected shape [Is, H], got {shape:?}"
            ));
        }
        None => return malformed("missing tensor shared_w_up"),
    };
    if combine == Combine::RouterWeighted && inner % count != 0 {
        return malformed(format!(
            "tensor shared_w_up: {inner} rows are not {count} shared experts"
        ));
    }
    if combine == Combine::RouterWeighted && meta.flag("bias") {
        return Err(meta.unknown_value("bias", "true, with router_weighted,"));
    }
    let mlp = read_mlp(meta, tensors, "shared_", &[], inner, hidden)?;
    let gate_w = match combine {
        Combine::SigmoidGate => Some(tensors.vector("shared_gate_w", hidden)?),
        _ => None,
    };
    Ok(Some(Shared {
        mlp,
        count,
        combine,
        gate_w,
    }))
}

/// Reads an MLP whose tensors are stacked in the dimensions `stack`.
fn read_mlp(
    meta: &Fields,
    tensors: &mut Tensors,
    prefix: &str,
    stack: &[usize],
    inner: usize,
    outer: usize,
) -> Result<Mlp> {
    let activation = read_activation(meta)?;
    let count = stack.iter().product();
    let shape = |tail: &[usize]| [stack, tail].concat();
    let (wide, narrow) = (shape(&[inner, outer]), shape(&[outer, inner]));
    let gated = activation.gated;
    let gate = match gated {
        true => Some(tensors.weight(&format!("{prefix}w_gate"), &wide)?),
        false => None,
    };
    let up = tensors.weight(&format!("{prefix}w_up"), &wide)?;
    let down = tensors.weight(&format!("{prefix}w_down"), &narrow)?;
    let biased = meta.flag("bias");
    let mut bias = |name: &str, wanted: bool, n: usize| -> Result<Option<Vec<f32>>> {
        if !(biased && wanted) {
            return Ok(None);
        }
        let name = format!("{prefix}{name}");
        let tensor = tensors.weight(&name, &shape(&[n]))?;
        tensor.f32s(&name).map(Some)
    };
    Ok(Mlp {
        activation,
        count,
        inner,
        outer,
        gate,
        up,
        down,
        gate_bias: bias("b_gate", gated, inner)?,
        up_bias: bias("b_up", true, inner)?,
        down_bias: bias("b_down", true, outer)?,
    })
}

fn read_activation(meta: &Fields) -> Result<Activation> {
    use ActivationFunction as F;
    let function = meta.choice(
        "act",
        "silu",
        &[
            ("silu", F::Silu),
            ("swish", F::Silu),
            ("gelu", F::Gelu),
            ("gelu_tanh", F::GeluTanh),
            ("gelu_pytorch_tanh", F::GeluTanh),
            ("gelu_new", F::GeluTanh),
            ("relu", F::Relu),
            ("relu2", F::Relu2),
            ("identity", F::Identity),
        ],
    )?;
    let gated = match meta.get("gated") {
        Some(_) => meta.flag("gated"),
        None => true,
    };
    let limit = meta.f32_or("limit", 0.0)?;
    let alpha = meta.f32_or("alpha", 1.702)?;
    let gate = meta.f32_or("gate_cap", 0.0)?;
    let up = meta.f32_or("up_cap", 0.0)?;
    // A limit of 0 or infinity switches a clamp off, as the families' code does.
    let limited = limit > 0.0 && limit.is_finite();
    let clamp = match meta.word("clamp", "none")? {
        "none" => Clamp::None,
        "pre" | "post" if !limited => Clamp::None,
        "pre" => Clamp::Pre { limit },
        "post" => Clamp::Post { limit },
        "oai" => Clamp::GptOss {
            limit: if limited { limit } else { f32::MAX },
            alpha,
        },
        "softcap" => Clamp::Softcap { gate, up },
        other => return Err(meta.unknown_value("clamp", other)),
    };
    Ok(Activation {
        function,
        gated,
        clamp,
    })
}
