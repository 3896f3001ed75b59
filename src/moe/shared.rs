//! The experts that every token visits.

use super::product;
use crate::combine::Shared;
use crate::cpu::Cpu;
use crate::element::DType;
use crate::error::{Error, Result};
use crate::experts::PackedExperts;
use crate::grouped_gemm::{Groups, PackedMatrices};
use crate::matrix::{AnyMatRef, MatMut, MatRef};
use crate::routing::Routing;
use crate::workspace::any_mat_mut;

/// How the shared experts' output S(x) joins the routed sum.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum SharedCombine {
    /// `y + Σ S_j(x)`
    Add,
    /// `y + σ(x · g) · Σ S_j(x)`, g `[1, H]` (Qwen2-MoE); see [`SharedExperts::with_sigmoid_gate`].
    SigmoidGate(PackedMatrices),
    /// `(y + Σ S_j(x)) / 2` (Cohere 2 MoE)
    Average,
    /// `y + Σ γ_j · S_j(x)`, γ the router's joint shared weights (Inkling).
    RouterWeighted,
}

/// Experts that every token visits.
#[derive(Clone, Debug)]
pub struct SharedExperts {
    pub(super) experts: PackedExperts,
    pub(super) combine: SharedCombine,
}

impl SharedExperts {
    /// Shared experts and how they join.
    ///
    /// # Errors
    /// [`Error::Value`] when there are none; [`Error::Shape`] naming `gate` unless a sigmoid gate is one matrix `[1, H]`.
    pub fn new(experts: PackedExperts, combine: SharedCombine) -> Result<Self> {
        if experts.is_empty() {
            return Err(Error::value("shared experts", "at least one", 0));
        }
        if let SharedCombine::SigmoidGate(gate) = &combine {
            let (expected, found) = ([1, 1, experts.hidden()], [gate.len(), gate.n(), gate.k()]);
            if gate.is_gated() || found != expected {
                return Err(Error::shape("gate", expected, found));
            }
        }
        Ok(Self { experts, combine })
    }

    /// Shared experts behind a sigmoid gate `w [1, H]`.
    ///
    /// # Errors
    /// [`Error::Shape`] naming `gate`, [`Error::Value`] when there are no experts.
    pub fn with_sigmoid_gate(cpu: &Cpu, experts: PackedExperts, w: AnyMatRef<'_>) -> Result<Self> {
        w.expect("gate", 1, experts.hidden())?;
        let mut gate = PackedMatrices::new(cpu, 1, w.cols(), DType::F32)?;
        gate.push(cpu, w, None)?;
        Self::new(experts, SharedCombine::SigmoidGate(gate))
    }

    /// [`Error::PackedFor`] unless all of it was packed for `cpu`'s instruction set.
    pub(super) fn check_isa(&self, cpu: &Cpu) -> Result<()> {
        self.experts.check_isa(cpu)?;
        match &self.combine {
            SharedCombine::SigmoidGate(gate) => gate.check_isa("shared gate", cpu),
            _ => Ok(()),
        }
    }

    /// `S(x) [T, H]` in f32, and its gate's logits.
    pub(super) fn run<'w>(
        &self,
        cpu: &Cpu,
        x: AnyMatRef<'_>,
        routing: &Routing,
        h: &mut [u8],
        y: &'w mut [f32],
        gate: &'w mut [f32],
        scratch: &mut [u8],
    ) -> Result<Shared<'w>> {
        let (tokens, hidden) = (x.rows(), x.cols());
        let (sum, single) = y.split_at_mut(tokens * hidden);
        let n = self.experts.len();
        for expert in 0..n {
            let groups = Groups::Single {
                rows: tokens,
                expert,
            };
            let width = self.experts.intermediate();
            let h = any_mat_mut(h, x.dtype(), tokens, width)?;
            let out = if n == 1 { &mut *sum } else { &mut *single };
            let out = MatMut::new(out, tokens, hidden)?.into();
            self.experts
                .forward_into(cpu, x, None, groups, h, out, scratch)?;
            let gamma = |t: usize| match self.combine {
                SharedCombine::RouterWeighted => routing.shared_weights()[t * n + expert],
                _ => 1.0,
            };
            if n == 1 {
                if matches!(self.combine, SharedCombine::RouterWeighted) {
                    for (t, row) in sum.chunks_exact_mut(hidden).enumerate() {
                        row.iter_mut().for_each(|v| *v *= gamma(t));
                    }
                }
            } else {
                accumulate(sum, single, hidden, expert == 0, &gamma);
            }
        }
        let s = MatRef::new(&*sum, tokens, hidden)?;
        Ok(match &self.combine {
            SharedCombine::Add | SharedCombine::RouterWeighted => Shared::Add(s),
            SharedCombine::Average => Shared::Average(s),
            SharedCombine::SigmoidGate(weights) => {
                let out = MatMut::new(&mut *gate, tokens, 1)?.into();
                product(cpu, x, weights, 0, out, scratch)?;
                Shared::SigmoidGate(s, gate)
            }
        })
    }
}

/// `sum[t] = γ(t) · y[t]`, plus the old sum after the first expert; one rounding for each operation, in expert order.
fn accumulate(
    sum: &mut [f32],
    y: &[f32],
    hidden: usize,
    first: bool,
    gamma: &dyn Fn(usize) -> f32,
) {
    let rows = sum.chunks_exact_mut(hidden).zip(y.chunks_exact(hidden));
    for (t, (sum, y)) in rows.enumerate() {
        let gamma = gamma(t);
        for (sum, &y) in sum.iter_mut().zip(y) {
            let term = gamma * y;
            *sum = if first { term } else { *sum + term };
        }
    }
}
