//! Packed experts from tensors.
//!
//! | tensors | from |
//! |---|---|
//! | `gate_up [E,2I,H]`, gate rows first, `down [E,H,I]`: `candle_transformers::fused_moe::FusedMoe` | [`fused`] |
//! | `gate_up [E,H,2I]`, `down [E,I,H]` | [`fused`] of `transpose(1, 2)`: no element moves |
//! | `gate [E,I,H]`, `up [E,I,H]`, `down [E,H,I]`: `FusedMoeGGUF`, dequantized | [`stacked`] |
//! | three tensors an expert: the blocks of qwen3_moe, qwen2_moe, mixtral, deepseek2 | [`one_by_one`] |
//!
//! Packing keeps the weights' format (f32, f16 or bf16), reads them through their strides and copies them once. What was packed does not refer to the
//! tensors, which may be dropped; [`one_by_one`] asks for an expert's tensors when their turn comes, so that a model need not be in memory twice.
//!
//! Packed experts belong to the instruction set of the [`Cpu`] that they were packed for; a [`MoeLayer`](crate::MoeLayer) needs the same one.

use crate::view::{format, refused, with_matrix};
use candle_core::{Context, Result, Tensor, bail};
use moe_kernels::Cpu;
use moe_kernels::experts::{ExpertWeights, PackedExperts};
use moe_kernels::grouped_gemm::Activation;

/// One expert's projections, out-features first as in `candle_nn::Linear`.
#[derive(Clone, Debug)]
pub struct Expert {
    /// `[I, H]` (`w1` of Mixtral)
    pub gate: Tensor,
    /// `[I, H]` (`w3` of Mixtral)
    pub up: Tensor,
    /// `[H, I]` (`w2` of Mixtral)
    pub down: Tensor,
}

/// Experts whose gate and up projections are one tensor: `gate_up [E, 2I, H]`, gate rows first, and `down [E, H, I]`.
///
/// # Errors
/// Tensors of other shapes or formats, or not on the CPU; an activation that is not gated.
pub fn fused(
    cpu: &Cpu,
    gate_up: &Tensor,
    down: &Tensor,
    activation: Activation,
) -> Result<PackedExperts> {
    let (experts, width, hidden) = gate_up.dims3()?;
    if down.dims() != [experts, hidden, width / 2] || width % 2 != 0 {
        bail!(
            "down: expected [E, H, I] for gate_up [E, 2·I, H] = {:?}, got {:?}",
            gate_up.dims(),
            down.dims()
        );
    }
    let dtype = format("gate_up", gate_up.dtype())?;
    let mut packed =
        PackedExperts::new(cpu, hidden, width / 2, activation, dtype).map_err(refused)?;
    for e in 0..experts {
        with_matrix("gate_up", &gate_up.get(e)?, |gate_up| {
            with_matrix("down", &down.get(e)?, |down| {
                let expert = ExpertWeights::fused(gate_up, down);
                expert
                    .and_then(|expert| packed.push(cpu, &expert))
                    .map_err(refused)
            })
        })
        .with_context(|| format!("expert {e}"))?;
    }
    Ok(packed)
}

/// Experts in three tensors: `gate [E, I, H]`, `up [E, I, H]`, `down [E, H, I]`.
///
/// # Errors
/// As [`fused`].
pub fn stacked(
    cpu: &Cpu,
    gate: &Tensor,
    up: &Tensor,
    down: &Tensor,
    activation: Activation,
) -> Result<PackedExperts> {
    let (experts, _, _) = gate.dims3()?;
    if up.dims() != gate.dims() || down.rank() != 3 || down.dims()[0] != experts {
        bail!(
            "experts: expected gate and up [E, I, H], down [E, H, I], got {:?}, {:?}, {:?}",
            gate.dims(),
            up.dims(),
            down.dims()
        );
    }
    one_by_one(
        cpu,
        (0..experts).map(|e| {
            Ok(Expert {
                gate: gate.get(e)?,
                up: up.get(e)?,
                down: down.get(e)?,
            })
        }),
        activation,
    )
}

/// Experts one after the other; the first one's shapes and format are those of all.
///
/// # Errors
/// As [`fused`]; the iterator's own; no expert at all.
pub fn one_by_one(
    cpu: &Cpu,
    experts: impl IntoIterator<Item = Result<Expert>>,
    activation: Activation,
) -> Result<PackedExperts> {
    let mut packed: Option<PackedExperts> = None;
    for (e, expert) in experts.into_iter().enumerate() {
        let expert = expert.with_context(|| format!("expert {e}"))?;
        let packed = match &mut packed {
            Some(packed) => packed,
            none => {
                let (intermediate, hidden) = expert.gate.dims2()?;
                let dtype = format("gate", expert.gate.dtype())?;
                let new = PackedExperts::new(cpu, hidden, intermediate, activation, dtype);
                none.insert(new.map_err(refused)?)
            }
        };
        push(cpu, packed, &expert).with_context(|| format!("expert {e}"))?;
    }
    match packed {
        Some(packed) => Ok(packed),
        None => bail!("experts: expected at least one"),
    }
}

fn push(cpu: &Cpu, packed: &mut PackedExperts, expert: &Expert) -> Result<()> {
    with_matrix("gate", &expert.gate, |gate| {
        with_matrix("up", &expert.up, |up| {
            with_matrix("down", &expert.down, |down| {
                let weights = ExpertWeights::gated(gate, up, down);
                packed.push(cpu, &weights).map(drop).map_err(refused)
            })
        })
    })
}
