//! The way into a narrower space and out of it again.

use super::plan::Call;
use super::{CudaMoeLayer, NormView};
use crate::cuda::DeviceMat;
use crate::cuda::combine::{DeviceRows, Norm};
use crate::cuda::grouped_gemm::Numerics;
use crate::cuda::norm::NormRows;
use crate::cuda::stages::Door;
use crate::element::DType;
use crate::error::{Error, Result};

/// A narrower space in which routed experts work; see [`CudaMoeLayer::with_latent`].
///
/// z and the weighted sum are kept in f32, as on the CPU, but for products on tensor cores, which take them in the layer's 16 bits, one rounding more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Latent {
    /// L
    pub width: usize,
    /// Whether z is normalised (Muse Spark).
    pub norm: bool,
}

/// The latent projections' weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LatentPointers {
    /// `[L, H]`
    pub w_in: DeviceRows,
    /// `[H, L]`
    pub w_out: DeviceRows,
    /// Weight `[L]` and numbers, when and only when z is normalised.
    pub norm: Option<Norm>,
}

/// The latent projections' weights.
#[derive(Debug)]
pub struct LatentViews<'a> {
    /// `[L, H]`
    pub w_in: DeviceMat<'a>,
    /// `[H, L]`
    pub w_out: DeviceMat<'a>,
    /// Weight `[L]` and numbers, when and only when z is normalised.
    pub norm: Option<NormView<'a>>,
}

impl LatentViews<'_> {
    pub(super) fn check(
        &self,
        door: &Door<'_>,
        width: usize,
        hidden: usize,
    ) -> Result<LatentPointers> {
        Ok(LatentPointers {
            w_in: door.mat("latent.w_in", &self.w_in, width, hidden)?,
            w_out: door.mat("latent.w_out", &self.w_out, hidden, width)?,
            norm: door.norm("latent.norm", &self.norm, width)?,
        })
    }
}

impl CudaMoeLayer {
    /// The format of a product's input that the layer makes itself: what tensor cores take if these weights go there, else the CPU's f32.
    fn latent_dtype(&self, weights: DType) -> DType {
        match self.numerics {
            Numerics::Exact | Numerics::ExactWidened => DType::F32,
            _ if weights == self.dtype => self.dtype,
            _ => DType::F32,
        }
    }

    /// What a call brings for a latent layer is there, and only then.
    pub(super) fn check_latent(&self, pointers: Option<&LatentPointers>) -> Result<()> {
        if pointers.is_some() != self.latent.is_some() {
            let expected = "weights when and only when the layer is latent";
            return Err(Error::value("latent", expected, "the opposite"));
        }
        let norm = pointers.is_some_and(|p| p.norm.is_some());
        if norm != self.latent.is_some_and(|l| l.norm) {
            let expected = "a norm when and only when the layer's latent input has one";
            return Err(Error::value("latent.norm", expected, "the opposite"));
        }
        Ok(())
    }
}

impl Call<'_> {
    /// The routed experts' input: `z = norm(x · W_inᵀ)`, or x itself.
    pub(super) fn enter(&mut self) -> Result<DeviceRows> {
        let (layer, x) = (self.layer, self.pointers.x);
        let (Some(Latent { width, .. }), Some(latent)) = (layer.latent, self.pointers.latent)
        else {
            return Ok(x);
        };
        let dtype = layer.latent_dtype(self.pointers.experts.up.dtype);
        let Some(norm) = latent.norm else {
            let z = self.rows(self.pieces.latent, width, dtype);
            self.dense(x, latent.w_in, width, layer.hidden, z)?;
            return Ok(z);
        };
        let raw = self.rows(self.pieces.latent, width, DType::F32);
        self.dense(x, latent.w_in, width, layer.hidden, raw)?;
        let z = self.rows(self.pieces.latent_norm, width, dtype);
        self.norm_rows(&NormRows::new(self.tokens, width, raw, norm, z))?;
        Ok(z)
    }

    /// Where the weighted sum of a latent layer goes. z is not needed by then, so that the sum has its place.
    pub(super) fn latent_sum(&self) -> Option<DeviceRows> {
        let (width, latent) = (self.layer.latent?.width, self.pointers.latent?);
        let dtype = self.layer.latent_dtype(latent.w_out.dtype);
        Some(self.rows(self.pieces.latent, width, dtype))
    }

    /// `out = sum · W_outᵀ`
    pub(super) fn leave(&mut self, sum: DeviceRows, out: DeviceRows) -> Result<()> {
        let (Some(space), Some(latent)) = (self.layer.latent, self.pointers.latent) else {
            return Ok(());
        };
        self.dense(sum, latent.w_out, self.layer.hidden, space.width, out)
    }
}
