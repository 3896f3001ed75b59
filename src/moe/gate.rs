//! The projection from tokens to logits.

use super::{PostNorm, product};
use crate::cpu::Cpu;
use crate::cpu::norm::normalize_rows;
use crate::element::DType;
use crate::error::Result;
use crate::grouped_gemm::PackedMatrices;
use crate::matrix::{AnyMatMut, AnyMatRef, MatRef};
use crate::norm::RmsNorm;

/// The projection from tokens to logits: `logits = norm(x) · Wᵀ + b`, always in f32.
#[derive(Clone, Debug)]
pub struct Gate {
    pub(super) weights: PackedMatrices,
    pub(super) noise: Option<PackedMatrices>,
    pub(super) input_norm: Option<PostNorm>,
}

impl Gate {
    /// A gate `w [R, H]` with an optional bias `[R]`; weights of any format are widened to f32.
    ///
    /// # Errors
    /// [`Error`](crate::Error) naming `w` or `bias`.
    pub fn new(cpu: &Cpu, w: AnyMatRef<'_>, bias: Option<&[f32]>) -> Result<Self> {
        let mut weights = PackedMatrices::new(cpu, w.rows(), w.cols(), DType::F32)?;
        weights.push(cpu, w, bias)?;
        Ok(Self {
            weights,
            noise: None,
            input_norm: None,
        })
    }

    /// Noise logits `x · W_noiseᵀ`, `[R, H]`, for a router with a noise seed (Shazeer et al. 2017).
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) naming `noise`.
    pub fn with_noise(mut self, cpu: &Cpu, w: AnyMatRef<'_>) -> Result<Self> {
        w.expect("noise", self.weights.n(), self.weights.k())?;
        let mut noise = PackedMatrices::new(cpu, w.rows(), w.cols(), DType::F32)?;
        noise.push(cpu, w, None)?;
        self.noise = Some(noise);
        Ok(self)
    }

    /// Normalises the gate's input: `x / √(mean(x²) + eps) · weight · mul` (Gemma 4).
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) naming `input_norm`.
    pub fn with_input_norm(mut self, norm: RmsNorm) -> Result<Self> {
        norm.check("input_norm", self.weights.k())?;
        self.input_norm = Some(PostNorm::NormFirst(norm));
        Ok(self)
    }

    /// [`Error::PackedFor`](crate::Error::PackedFor) unless all of it was packed for `cpu`'s instruction set.
    pub(super) fn check_isa(&self, cpu: &Cpu) -> Result<()> {
        self.weights.check_isa("gate", cpu)?;
        match &self.noise {
            Some(noise) => noise.check_isa("noise", cpu),
            None => Ok(()),
        }
    }

    /// Logits and noise logits; `buffer` is `[T, H]` floats for a normalised input.
    pub(super) fn logits_into(
        &self,
        cpu: &Cpu,
        x: AnyMatRef<'_>,
        buffer: &mut [f32],
        logits: AnyMatMut<'_>,
        noise: Option<AnyMatMut<'_>>,
        scratch: &mut [u8],
    ) -> Result<()> {
        let x = match &self.input_norm {
            Some(norm) => {
                for (t, row) in buffer.chunks_exact_mut(x.cols()).enumerate() {
                    x.widen_row(t, 0, row);
                }
                normalize_rows(cpu, buffer, norm);
                MatRef::new(&*buffer, x.rows(), x.cols())?.into()
            }
            None => x,
        };
        product(cpu, x, &self.weights, 0, logits, scratch)?;
        match (&self.noise, noise) {
            (Some(weights), Some(out)) => product(cpu, x, weights, 0, out, scratch),
            _ => Ok(()),
        }
    }
}
