//! `cargo run --release --example host_tensors`: a layer on the memory of another framework's CPU tensors, where it lies.
//!
//! Frameworks describe a tensor by bytes, a format, a shape, strides and an offset. [`HostTensor`] is that description, and [`HostTensor::matrix`] all
//! that it takes to hand one over: no element is copied or converted on the way in, and the result is written into the caller's tensor.
//!
//! Three hosts bring the same layer in bf16:
//!
//! * as mistral.rs stacks experts: `gate_up [E, 2I, H]`, `down [E, H, I]`, x `[B·S, H]`;
//! * as checkpoints of Llama 4's kind hold them: `gate_up [E, H, 2I]`, `down [E, I, H]`, read through their strides, and x a window of wider rows;
//! * as burn's flex backend holds tensors: one byte buffer with offsets, and x `[S, B, H]` permuted to `[B, S, H]`, whose rows have no single stride, so that it is
//!   called once for each b.
//!
//! All three must give the same bits, within a derived distance of the f64 reference. Exits with an error when they do not.

use half::bf16;
use moe_kernels::experts::{ExpertWeights, PackedExperts};
use moe_kernels::grouped_gemm::Activation;
use moe_kernels::moe::{Gate, MoeLayer};
use moe_kernels::reference as oracle;
use moe_kernels::routing::{Router, RouterConfig, Routing};
use moe_kernels::{AnyMatRef, Cpu, DType, MatMut, MatRef};

/// Whatever went wrong, as text: the hosts have errors of their own.
type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

const B: usize = 3;
const S: usize = 5;
const E: usize = 6;
const K: usize = 2;
const H: usize = 72;
const I: usize = 40;

/// A tensor as another framework describes it. Strides count elements, and some frameworks allow negative ones.
#[derive(Clone, Copy)]
struct HostTensor<'a> {
    bytes: &'a [u8],
    dtype: DType,
    shape: [usize; 3],
    strides: [isize; 3],
    offset: usize,
}

impl<'a> HostTensor<'a> {
    fn contiguous(data: &'a [bf16], shape: [usize; 3]) -> Self {
        Self {
            bytes: bytemuck::cast_slice(data),
            dtype: DType::BF16,
            shape,
            strides: [(shape[1] * shape[2]) as isize, shape[2] as isize, 1],
            offset: 0,
        }
    }

    /// Two dimensions in the other order.
    fn permuted(mut self, a: usize, b: usize) -> Self {
        self.shape.swap(a, b);
        self.strides.swap(a, b);
        self
    }

    /// The matrix `[i]` of the tensor. What the kernels cannot read is refused here or there, never misread.
    fn matrix(&self, i: usize) -> Result<AnyMatRef<'a>> {
        let [n, rows, cols] = self.shape;
        let strides = self.strides.map(usize::try_from);
        let [Ok(outer), Ok(row), Ok(col)] = strides else {
            return Err("negative strides: make the tensor contiguous first".into());
        };
        if i >= n {
            return Err(format!("matrix {i} of {n}").into());
        }
        let start = outer
            .checked_mul(i)
            .and_then(|at| at.checked_add(self.offset));
        // An error, not undefined behaviour, where the bytes are not aligned for their format.
        macro_rules! view {
            ($t:ty) => {{
                let data: &[$t] =
                    bytemuck::try_cast_slice(self.bytes).map_err(|e| e.to_string())?;
                let data = start
                    .and_then(|start| data.get(start..))
                    .ok_or("the offset is outside")?;
                Ok(MatRef::with_strides(data, rows, cols, row, col)?.into())
            }};
        }
        match self.dtype {
            DType::F32 => view!(f32),
            DType::F16 => view!(half::f16),
            DType::BF16 => view!(bf16),
            other => Err(format!("no format {other}").into()),
        }
    }
}

/// Numbers in (−scale, scale) that no symmetry can hide behind.
fn numbers(n: usize, seed: u32, scale: f32) -> Vec<bf16> {
    let number = |i: u32| {
        (i.wrapping_add(seed).wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n as u32)
        .map(|i| bf16::from_f32(number(i) * scale))
        .collect()
}

/// `[n, rows, cols]` as `[n, cols, rows]` in memory.
fn transposed(data: &[bf16], n: usize, rows: usize, cols: usize) -> Vec<bf16> {
    let at = |i: usize| data[(i / (rows * cols) * rows + i % rows) * cols + i / rows % cols];
    (0..n * rows * cols).map(at).collect()
}

/// The layer, packed once from wherever the weights lie. They are not needed afterwards.
fn layer(
    cpu: &Cpu,
    gate_up: HostTensor<'_>,
    down: HostTensor<'_>,
    gate: &[bf16],
) -> Result<MoeLayer> {
    let mut experts = PackedExperts::new(cpu, H, I, Activation::SWIGLU, gate_up.dtype)?;
    for e in 0..gate_up.shape[0] {
        experts.push(
            cpu,
            &ExpertWeights::fused(gate_up.matrix(e)?, down.matrix(e)?)?,
        )?;
    }
    let gate = Gate::new(cpu, MatRef::new(gate, E, H)?.into(), None)?;
    let router = Router::new(RouterConfig::mixtral(E, K))?;
    Ok(MoeLayer::new(router, experts)?.with_gate(gate)?)
}

/// One call for each matrix of x, into a contiguous `[B·S, H]`.
fn forward(cpu: &Cpu, layer: &MoeLayer, x: HostTensor<'_>) -> Result<Vec<bf16>> {
    let [n, rows, _] = x.shape;
    let mut y = vec![bf16::NAN; n * rows * H];
    let mut routing = Routing::with_capacity(rows, layer.router())?;
    let mut workspace = vec![0; layer.workspace_size(cpu, rows)?];
    for (i, y) in y.chunks_exact_mut(rows * H).enumerate() {
        let y = MatMut::new(y, rows, H)?.into();
        layer.forward(cpu, x.matrix(i)?, y, &mut routing, &mut workspace)?;
    }
    Ok(y)
}

/// The reference's answer, and how far an answer in bf16 may be from it.
///
/// h is rounded to bf16 (u = 2⁻⁸ of each |h|, weighted by |down|), y once more. Everything between is f32: chains of H and I terms and the routing's weights
/// stay below a tenth of u.
fn exact(gate_up: &[bf16], down: &[bf16], gate: &[bf16], x: &[bf16]) -> (Vec<f64>, Vec<f64>) {
    let wide = |v: &[bf16]| v.iter().map(|v| v.to_f64()).collect::<Vec<_>>();
    let (gate_up, down, gate, x) = (wide(gate_up), wide(down), wide(gate), wide(x));
    let halves = |upper: usize| {
        gate_up
            .chunks_exact(2 * I * H)
            .flat_map(move |m| m[upper * I * H..][..I * H].to_vec())
    };
    let (w_gate, w_up): (Vec<f64>, Vec<f64>) = (halves(0).collect(), halves(1).collect());
    let router = oracle::RouterSpec::from(&RouterConfig::mixtral(E, K));
    let mut spec = oracle::LayerSpec::new(H, router);
    spec.experts = Activation::SWIGLU.into();
    let experts = oracle::MlpWeights {
        gate: &w_gate,
        up: &w_up,
        down: &down,
        ..Default::default()
    };
    let weights = oracle::LayerWeights {
        router_w: &gate,
        experts,
        ..Default::default()
    };
    let inputs = oracle::LayerInputs {
        x: &x,
        ..Default::default()
    };
    let result = oracle::moe_layer(&spec, &weights, &inputs);

    let unit = 2f64.powi(-8);
    let mut bound: Vec<f64> = result.y.iter().map(|y| unit * y.abs()).collect();
    for (pair, (&id, weight)) in result.ids.iter().zip(&result.weights).enumerate() {
        let (t, id) = (pair / K, id as usize);
        let expert = oracle::MlpWeights {
            gate: &w_gate[id * I * H..][..I * H],
            up: &w_up[id * I * H..][..I * H],
            down: &[],
            ..Default::default()
        };
        let h = oracle::mlp_hidden(&spec.experts, &expert, &x[t * H..][..H]);
        for (j, bound) in bound[t * H..][..H].iter_mut().enumerate() {
            let row = &down[(id * H + j) * I..][..I];
            let terms: f64 = row.iter().zip(&h).map(|(w, h)| (w * h).abs()).sum();
            *bound += 1.1 * unit * weight * terms;
        }
    }
    (result.y, bound)
}

/// Runs the three hosts.
pub fn main() -> Result<()> {
    let cpu = Cpu::new();
    let (gate_up, down) = (numbers(E * 2 * I * H, 1, 0.2), numbers(E * H * I, 2, 0.3));
    let (gate, x) = (numbers(E * H, 3, 0.3), numbers(B * S * H, 4, 1.0));

    // mistral.rs: stacked experts, out-features first.
    let stacked = [
        HostTensor::contiguous(&gate_up, [E, 2 * I, H]),
        HostTensor::contiguous(&down, [E, H, I]),
    ];
    let plain = layer(&cpu, stacked[0], stacked[1], &gate)?;
    let expected = forward(&cpu, &plain, HostTensor::contiguous(&x, [1, B * S, H]))?;

    // in-features first in memory; x is the middle third of wider rows.
    let (gate_up_t, down_t) = (
        transposed(&gate_up, E, 2 * I, H),
        transposed(&down, E, H, I),
    );
    let other = layer(
        &cpu,
        HostTensor::contiguous(&gate_up_t, [E, H, 2 * I]).permuted(1, 2),
        HostTensor::contiguous(&down_t, [E, I, H]).permuted(1, 2),
        &gate,
    )?;
    let mut wide = vec![bf16::INFINITY; B * S * 3 * H];
    for (row, x) in wide.chunks_exact_mut(3 * H).zip(x.chunks_exact(H)) {
        row[H..2 * H].copy_from_slice(x);
    }
    let window = HostTensor {
        shape: [1, B * S, H],
        offset: H,
        ..HostTensor::contiguous(&wide, [1, B * S, 3 * H])
    };
    let windowed = forward(&cpu, &other, window)?;

    // burn: one buffer for everything, x [S, B, H] seen as [B, S, H].
    let x_t: Vec<bf16> = (0..S * B)
        .flat_map(|i| x[(i % B * S + i / B) * H..][..H].to_vec())
        .collect();
    let buffer = [&gate_up[..], &down, &x_t].concat();
    let at = |offset: usize, t: HostTensor<'_>| HostTensor {
        bytes: bytemuck::cast_slice(&buffer),
        offset,
        ..t
    };
    let pooled = layer(
        &cpu,
        at(0, stacked[0]),
        at(gate_up.len(), stacked[1]),
        &gate,
    )?;
    let permuted = HostTensor::contiguous(&x_t, [S, B, H]).permuted(0, 1);
    let permuted = at(gate_up.len() + down.len(), permuted);
    let pooled = forward(&cpu, &pooled, permuted)?;

    // A flipped tensor is refused.
    let flipped = HostTensor {
        strides: [1, -(H as isize), 1],
        ..HostTensor::contiguous(&x, [1, B * S, H])
    };
    if flipped.matrix(0).is_ok() {
        return Err("a negative stride was accepted".into());
    }

    let bits = |y: &[bf16]| y.iter().map(|y| y.to_bits()).collect::<Vec<_>>();
    if bits(&windowed) != bits(&expected) || bits(&pooled) != bits(&expected) {
        return Err("the hosts' layouts do not give the same bits".into());
    }
    let (y, bound) = exact(&gate_up, &down, &gate, &x);
    let mut worst = 0f64;
    for (i, (found, (y, bound))) in expected.iter().zip(y.iter().zip(&bound)).enumerate() {
        let share = (found.to_f64() - y).abs() / bound;
        if share.is_nan() || share > 1.0 {
            return Err(format!(
                "token {}, feature {}: {found}, expected {y} ± {bound}",
                i / H,
                i % H
            )
            .into());
        }
        worst = worst.max(share);
    }
    println!(
        "three hosts, the same {} bits; at most {:.0}% of the bound from the f64 reference",
        bits(&expected).len() * 16,
        worst * 100.0
    );
    Ok(())
}
