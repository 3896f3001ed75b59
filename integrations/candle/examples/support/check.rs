//! Whether two implementations of a block agree, and how far they may differ.
//!
//! **Experts.** u is the format's unit roundoff. In f16 and bf16 candle rounds what follows each operation: both projections, the activation, their product, the
//! expert's output, its weight, the weighted output, K sums; ours h and y; both round the residual sum and the norm. Errors of so many independent roundings add up to √(13 + K)·u of the
//! size of a token's output, taken over its features. In f32 a dot product of n terms is off by √n·u, twice over H and once over I; K sums and the activation add
//! what `K + 16` covers.
//!
//! **Weights.** Candle computes logits and softmax in the tensors' format: the logit z is off by u·(|z| + √H·2⁻²⁴), its distance to the maximum by 2·u·max|z| more, exp and the
//! division by u each, so that a weight is off by m = u·(3·max|z| + 2) + √H·2⁻²⁴·max|z|, relatively. Two experts can change places when their logits are within 2·m.

use candle_core::{DType, Result, Tensor, bail};

/// Unit roundoff.
pub fn unit(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 2f64.powi(-8),
        DType::F16 => 2f64.powi(-11),
        _ => 2f64.powi(-24),
    }
}

/// The bound on the relative RMS difference of a token's features when the routing is the same.
pub fn expert_bound(dtype: DType, sizes: super::Sizes) -> f64 {
    let (h, i, k) = (
        sizes.hidden as f64,
        sizes.intermediate.max(sizes.shared) as f64,
        sizes.top_k as f64,
    );
    match dtype {
        DType::F32 => unit(dtype) * (2.0 * h.sqrt() + i.sqrt() + k + 16.0),
        _ => unit(dtype) * (13.0 + k).sqrt(),
    }
}

/// The bound m on the relative difference of a weight.
pub fn weight_bound(dtype: DType, hidden: usize, largest_logit: f64) -> f64 {
    let dot = (hidden as f64).sqrt() * unit(DType::F32) * largest_logit;
    unit(dtype) * (3.0 * largest_logit + 2.0) + dot
}

/// The largest relative RMS difference of a token, over those that `wanted` names; an error when it exceeds `bound`, or a feature is eight times as far off.
pub fn compare(
    theirs: &Tensor,
    ours: &Tensor,
    bound: f64,
    wanted: impl Fn(usize) -> bool,
) -> Result<f64> {
    let (theirs, ours) = (theirs.to_vec2::<f32>()?, ours.to_vec2::<f32>()?);
    let mut worst = 0f64;
    for (t, (a, b)) in theirs
        .iter()
        .zip(&ours)
        .enumerate()
        .filter(|(t, _)| wanted(*t))
    {
        let n = a.len() as f64;
        let size = (a.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n).sqrt();
        let differences = a
            .iter()
            .zip(b)
            .map(|(&a, &b)| (f64::from(a) - f64::from(b)).abs());
        let rms = (differences.clone().map(|d| d * d).sum::<f64>() / n).sqrt() / size;
        let largest = differences.fold(0.0, f64::max) / size;
        // Written so that NaN fails.
        if !(rms <= bound && largest <= 8.0 * bound) {
            bail!(
                "token {t}: relative RMS difference {rms:.2e}, largest {largest:.2e}, bound {bound:.2e}"
            );
        }
        worst = worst.max(rms);
    }
    Ok(worst)
}

/// Candle's routing by the operations that its blocks call: ids `[T, K]`, weights `[T, K]` in f32, logits `[T, E]`.
pub struct Routing {
    pub ids: Tensor,
    pub weights: Tensor,
    pub logits: Tensor,
}

impl Routing {
    pub fn of(x: &Tensor, gate: &Tensor, top_k: usize, normalise: bool) -> Result<Self> {
        let x = x.reshape(((), x.dim(candle_core::D::Minus1)?))?;
        let logits = x.matmul(&gate.t()?)?;
        let probabilities = candle_nn::ops::softmax_last_dim(&logits)?;
        let ids = probabilities
            .arg_sort_last_dim(false)?
            .narrow(1, 0, top_k)?
            .contiguous()?;
        let mut weights = probabilities.gather(&ids, 1)?.to_dtype(DType::F32)?;
        if normalise {
            weights = weights.broadcast_div(&weights.sum_keepdim(1)?)?;
        }
        let logits = logits.to_dtype(DType::F32)?;
        Ok(Self {
            ids,
            weights,
            logits,
        })
    }

    /// For each token whether exact routing selects the same experts; an error when it does not although the logits are further apart than
    /// rounding in `dtype` explains. `exact` holds logits in f32.
    pub fn agrees(&self, exact: &Tensor, dtype: DType, hidden: usize) -> Result<Vec<bool>> {
        let (ids, logits) = (self.ids.to_vec2::<u32>()?, exact.to_vec2::<f32>()?);
        let mut agreed = Vec::new();
        for (t, (ids, z)) in ids.iter().zip(&logits).enumerate() {
            let mut order: Vec<usize> = (0..z.len()).collect();
            order.sort_by(|&a, &b| z[b].total_cmp(&z[a]));
            let last = f64::from(z[order[ids.len() - 1]]);
            let largest = z.iter().map(|z| f64::from(z.abs())).fold(0.0, f64::max);
            let margin = 2.0 * weight_bound(dtype, hidden, largest);
            let others = ids
                .iter()
                .filter(|id| !order[..ids.len()].contains(&(**id as usize)));
            let mut same = true;
            for &id in others {
                same = false;
                let found = f64::from(z[id as usize]);
                if found < last - margin {
                    bail!(
                        "token {t}: expert {id} was selected with logit {found}, {margin:.2e} is the margin below {last}"
                    );
                }
            }
            agreed.push(same);
        }
        Ok(agreed)
    }

    /// The largest |z|.
    pub fn largest_logit(&self) -> Result<f64> {
        Ok(f64::from(
            self.logits
                .abs()?
                .flatten_all()?
                .max(0)?
                .to_scalar::<f32>()?,
        ))
    }
}
