//! The experts of a layer: two packed projections and the activation between them.
//!
//! ```text
//! h  = act( x · W_gate_upᵀ + b )        [rows, I]    gather by pair_of_row
//! ys = h · W_downᵀ + b                  [rows, H]
//! ```

use crate::cpu::Cpu;
use crate::element::DType;
use crate::error::{Error, Result};
use crate::grouped_gemm::{
    Activation, Gather, Groups, PackedMatrices, experts_into, grouped_gemm_into,
};
use crate::matrix::{AnyMatMut, AnyMatRef};

/// One expert's weights as the caller has them: strided views, out-features first.
///
/// Checkpoints come in several layouts; each is a view or two:
///
/// | in memory | view |
/// |---|---|
/// | `gate [I,H]`, `up [I,H]`, `down [H,I]` | [`ExpertWeights::gated`] |
/// | `gate_up [2I,H]`, gate rows first | [`ExpertWeights::fused`] |
/// | `gate_up [H,2I]`, gate columns first (Llama 4, Aria) | [`ExpertWeights::fused`] of the [transposed](AnyMatRef::transposed) views |
/// | `gate_up [H,2I]`, columns alternating (gpt-oss) | [`ExpertWeights::interleaved`] of the transposed views |
/// | `up [I,H]`, `down [H,I]` (Nemotron-H, Switch, NLLB) | [`ExpertWeights::plain`] |
#[derive(Clone, Copy, Debug)]
pub struct ExpertWeights<'a> {
    /// `[I, H]`; `None` when the experts are not gated.
    pub gate: Option<AnyMatRef<'a>>,
    /// `[I, H]`
    pub up: AnyMatRef<'a>,
    /// `[H, I]`
    pub down: AnyMatRef<'a>,
    /// `[I]`, added before the activation.
    pub gate_bias: Option<&'a [f32]>,
    /// `[I]`, added before the activation.
    pub up_bias: Option<&'a [f32]>,
    /// `[H]`, added to the expert's output (and multiplied by the token's weight with it).
    pub down_bias: Option<&'a [f32]>,
}

impl<'a> ExpertWeights<'a> {
    /// An expert without a gate.
    pub fn plain(up: AnyMatRef<'a>, down: AnyMatRef<'a>) -> Self {
        Self {
            gate: None,
            up,
            down,
            gate_bias: None,
            up_bias: None,
            down_bias: None,
        }
    }

    /// An expert with separate gate and up projections.
    pub fn gated(gate: AnyMatRef<'a>, up: AnyMatRef<'a>, down: AnyMatRef<'a>) -> Self {
        Self {
            gate: Some(gate),
            ..Self::plain(up, down)
        }
    }

    /// An expert whose gate and up projections are the halves of one `[2I, H]` matrix.
    ///
    /// # Errors
    /// [`Error::Shape`] when its number of rows is odd.
    pub fn fused(gate_up: AnyMatRef<'a>, down: AnyMatRef<'a>) -> Result<Self> {
        let i = half_rows(&gate_up)?;
        let gate = gate_up.rows_from(0, 1, i)?;
        Ok(Self::gated(gate, gate_up.rows_from(i, 1, i)?, down))
    }

    /// An expert whose gate and up projections alternate in the rows of one `[2I, H]` matrix, gate first.
    ///
    /// # Errors
    /// [`Error::Shape`] when its number of rows is odd.
    pub fn interleaved(gate_up: AnyMatRef<'a>, down: AnyMatRef<'a>) -> Result<Self> {
        let i = half_rows(&gate_up)?;
        let gate = gate_up.rows_from(0, 2, i)?;
        let up = if i == 0 {
            gate
        } else {
            gate_up.rows_from(1, 2, i)?
        };
        Ok(Self::gated(gate, up, down))
    }

    /// The same expert with biases `[I]`, `[I]` and `[H]`.
    pub fn with_biases(
        self,
        gate: Option<&'a [f32]>,
        up: Option<&'a [f32]>,
        down: Option<&'a [f32]>,
    ) -> Self {
        Self {
            gate_bias: gate,
            up_bias: up,
            down_bias: down,
            ..self
        }
    }
}

fn half_rows(gate_up: &AnyMatRef<'_>) -> Result<usize> {
    if gate_up.rows().is_multiple_of(2) {
        Ok(gate_up.rows() / 2)
    } else {
        Err(Error::shape(
            "gate_up",
            "[2·I, H]",
            [gate_up.rows(), gate_up.cols()],
        ))
    }
}

/// All experts of a layer, packed for one instruction set.
///
/// They are added one at a time and stay where they are, so that a model can be packed expert by expert, and an expert can be added to a layer in use.
#[derive(Clone, Debug)]
pub struct PackedExperts {
    activation: Activation,
    up: PackedMatrices,
    down: PackedMatrices,
}

impl PackedExperts {
    /// An empty set for experts `H → I → H` with weights kept in `dtype`.
    ///
    /// # Errors
    /// [`Error::Value`] for a zero size or a bad activation, [`Error::Overflow`].
    pub fn new(
        cpu: &Cpu,
        hidden: usize,
        intermediate: usize,
        activation: Activation,
        dtype: DType,
    ) -> Result<Self> {
        activation.validate()?;
        let up = if activation.gated {
            PackedMatrices::new_gated(cpu, intermediate, hidden, dtype)?
        } else {
            PackedMatrices::new(cpu, intermediate, hidden, dtype)?
        };
        Ok(Self {
            activation,
            up,
            down: PackedMatrices::new(cpu, hidden, intermediate, dtype)?,
        })
    }

    /// Packs one more expert; returns its index. Weights are rounded to the set's format where theirs differs.
    ///
    /// # Errors
    /// [`Error`] naming the matrix or bias at fault; the set is unchanged then.
    pub fn push(&mut self, cpu: &Cpu, expert: &ExpertWeights<'_>) -> Result<usize> {
        self.check_isa(cpu)?;
        expert
            .down
            .expect("down", self.hidden(), self.intermediate())?;
        self.down.check_bias("down_bias", expert.down_bias)?;
        match (expert.gate, self.activation.gated) {
            (Some(gate), true) => {
                self.up
                    .push_gated(cpu, gate, expert.up, expert.gate_bias, expert.up_bias)?
            }
            (None, false) => self.up.push(cpu, expert.up, expert.up_bias)?,
            (gate, gated) => {
                let words = |yes| {
                    if yes {
                        "a gate projection"
                    } else {
                        "no gate projection"
                    }
                };
                return Err(Error::value("gate", words(gated), words(gate.is_some())));
            }
        };
        self.down.push(cpu, expert.down, expert.down_bias)
    }

    /// Number of experts.
    pub fn len(&self) -> usize {
        self.down.len()
    }

    /// Whether there are none yet.
    pub fn is_empty(&self) -> bool {
        self.down.is_empty()
    }

    /// H: what an expert reads and writes.
    pub fn hidden(&self) -> usize {
        self.up.k()
    }

    /// I: the width between its projections.
    pub fn intermediate(&self) -> usize {
        self.up.n()
    }

    /// The activation between the projections.
    pub fn activation(&self) -> Activation {
        self.activation
    }

    /// The format of the packed weights.
    pub fn dtype(&self) -> DType {
        self.down.dtype()
    }

    /// Bytes of the packed weights.
    pub fn bytes(&self) -> usize {
        self.up.bytes() + self.down.bytes()
    }

    /// [`Error::PackedFor`] unless these experts were packed for `cpu`'s instruction set.
    pub(crate) fn check_isa(&self, cpu: &Cpu) -> Result<()> {
        self.up.check_isa("experts", cpu)
    }

    /// `h[r] = act(A[r] · W_gate_upᵀ + b)`: the first projection, `[rows, I]`.
    ///
    /// # Errors
    /// As [`grouped_gemm_into`].
    pub fn up_into(
        &self,
        cpu: &Cpu,
        x: AnyMatRef<'_>,
        gather: Option<Gather<'_>>,
        groups: Groups<'_>,
        h: AnyMatMut<'_>,
        scratch: &mut [u8],
    ) -> Result<()> {
        let activation = Some(self.activation);
        grouped_gemm_into(cpu, x, gather, &self.up, groups, activation, h, scratch)
    }

    /// `ys[r] = h[r] · W_downᵀ + b`: the second projection, `[rows, H]`.
    ///
    /// # Errors
    /// As [`grouped_gemm_into`].
    pub fn down_into(
        &self,
        cpu: &Cpu,
        h: AnyMatRef<'_>,
        groups: Groups<'_>,
        ys: AnyMatMut<'_>,
        scratch: &mut [u8],
    ) -> Result<()> {
        grouped_gemm_into(cpu, h, None, &self.down, groups, None, ys, scratch)
    }
    /// Both: [`up_into`](Self::up_into), then [`down_into`](Self::down_into), with the same bits but sharing the work out once: what the layer calls.
    ///
    /// # Errors
    /// As [`grouped_gemm_into`], naming `h` or `ys`; nothing is written then.
    pub fn forward_into(
        &self,
        cpu: &Cpu,
        x: AnyMatRef<'_>,
        gather: Option<Gather<'_>>,
        groups: Groups<'_>,
        h: AnyMatMut<'_>,
        ys: AnyMatMut<'_>,
        scratch: &mut [u8],
    ) -> Result<()> {
        let weights = (&self.up, &self.down);
        experts_into(
            cpu,
            x,
            gather,
            weights,
            groups,
            self.activation,
            h,
            ys,
            scratch,
        )
    }
}
