//! The way into a narrower space and out of it again.

use super::{PostNorm, product};
use crate::combine::{Combine, combine_into};
use crate::cpu::Cpu;
use crate::cpu::norm::normalize_rows;
use crate::element::DType;
use crate::error::Result;
use crate::grouped_gemm::PackedMatrices;
use crate::matrix::{AnyMatRef, MatMut, MatRef};
use crate::norm::RmsNorm;

/// Routed experts that work in a narrower space: `z = norm(x · W_inᵀ)`, experts `L → I → L`, `y = (Σ w·ys) · W_outᵀ` (Nemotron-H, Muse Spark).
#[derive(Clone, Debug)]
pub struct Latent {
    down: PackedMatrices,
    norm: Option<PostNorm>,
    pub(super) up: PackedMatrices,
}

impl Latent {
    /// `w_in [L, H]` and `w_out [H, L]`, kept in `dtype`.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) naming `w_out`.
    pub fn new(cpu: &Cpu, w_in: AnyMatRef<'_>, w_out: AnyMatRef<'_>, dtype: DType) -> Result<Self> {
        w_out.expect("w_out", w_in.cols(), w_in.rows())?;
        let mut down = PackedMatrices::new(cpu, w_in.rows(), w_in.cols(), dtype)?;
        down.push(cpu, w_in, None)?;
        let mut up = PackedMatrices::new(cpu, w_out.rows(), w_out.cols(), dtype)?;
        up.push(cpu, w_out, None)?;
        Ok(Self {
            down,
            norm: None,
            up,
        })
    }

    /// Normalises the latent input.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) naming `latent norm`.
    pub fn with_norm(mut self, norm: RmsNorm) -> Result<Self> {
        norm.check("latent norm", self.width())?;
        self.norm = Some(PostNorm::NormFirst(norm));
        Ok(self)
    }

    /// L
    pub fn width(&self) -> usize {
        self.down.n()
    }

    /// [`Error::PackedFor`](crate::Error::PackedFor) unless both were packed for `cpu`'s instruction set.
    pub(super) fn check_isa(&self, cpu: &Cpu) -> Result<()> {
        self.down.check_isa("latent", cpu)?;
        self.up.check_isa("latent", cpu)
    }

    /// `z = norm(x · W_inᵀ)`
    pub(super) fn enter<'w>(
        &self,
        cpu: &Cpu,
        x: AnyMatRef<'_>,
        z: &'w mut [f32],
        scratch: &mut [u8],
    ) -> Result<AnyMatRef<'w>> {
        let out = MatMut::new(&mut *z, x.rows(), self.width())?.into();
        product(cpu, x, &self.down, 0, out, scratch)?;
        if let Some(norm) = &self.norm {
            normalize_rows(cpu, z, norm);
        }
        Ok(MatRef::new(&*z, x.rows(), self.width())?.into())
    }

    /// `out = (Σ weight · ys) · W_outᵀ`, through the sum in `buffer [T, L]`.
    pub(super) fn leave(
        &self,
        cpu: &Cpu,
        combine: &Combine<'_>,
        buffer: &mut [f32],
        out: &mut [f32],
        scratch: &mut [u8],
    ) -> Result<()> {
        let tokens = buffer.len() / self.width();
        combine_into(
            cpu,
            combine,
            MatMut::new(&mut *buffer, tokens, self.width())?.into(),
        )?;
        let sum = MatRef::new(&*buffer, tokens, self.width())?.into();
        product(
            cpu,
            sum,
            &self.up,
            0,
            MatMut::new(out, tokens, self.up.n())?.into(),
            scratch,
        )
    }
}
