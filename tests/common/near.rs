//! Numbers in f64 with a bound on the error of whoever computes them in f32 and 16 bits, in whatever order: tolerances that are derived, operation by operation.

use moe_kernels::DType;
use moe_kernels::grouped_gemm::{Activation, ActivationFunction};
use moe_kernels::reference::{MlpSpec, gamma};

/// One rounding of f32 to nearest.
const ROUNDING: f64 = 1.0 / (1u64 << 24) as f64;
/// One addition of a tensor core, which may cut instead of rounding.
const CUT: f64 = 2.0 * ROUNDING;
/// A function of f32 is good to so much of its argument's size.
const FUNCTION: f64 = 8.0 * CUT;

/// A value, and how far from it a computed one may be.
#[derive(Clone, Copy, Debug, Default)]
pub struct Near {
    pub value: f64,
    pub error: f64,
}

impl From<f32> for Near {
    fn from(value: f32) -> Self {
        let value = f64::from(value);
        Self { value, error: 0.0 }
    }
}

impl Near {
    /// The largest that the computed value's size can be.
    fn size(self) -> f64 {
        self.value.abs() + self.error
    }

    fn with(value: f64, error: f64) -> Self {
        Self { value, error }
    }

    /// Rounded to a format: half a unit in the last of 8 or 11 bits; or half the smallest step of f16, or bf16's smallest normal number, below which the CPU takes zero.
    pub fn rounded(self, dtype: DType) -> Self {
        let (relative, least) = match dtype {
            DType::BF16 => (2f64.powi(-8), 2f64.powi(-126)),
            DType::F16 => (2f64.powi(-11), 2f64.powi(-25)),
            _ => (ROUNDING, 0.0),
        };
        let rounding = (self.size() * relative).max(least);
        Self::with(self.value, self.error + rounding)
    }

    /// A sum, rounded to f32.
    pub fn plus(self, other: Self) -> Self {
        Self::with(self.value + other.value, self.error + other.error).rounded(DType::F32)
    }

    /// A product, rounded to f32.
    pub fn times(self, other: Self) -> Self {
        let error = self.size() * other.size() - self.value.abs() * other.value.abs();
        Self::with(self.value * other.value, error).rounded(DType::F32)
    }

    /// `1 / (1 + exp(−x))`, no steeper than 1/4.
    pub fn sigmoid(self) -> Self {
        let value = 1.0 / (1.0 + (-self.value).exp());
        Self::with(value, self.error / 4.0 + FUNCTION)
    }
}

/// `Σ a·w`: the factors' errors as they are; and of the sums, whatever their order, one for each addition and two more, of the sum of the products' sizes (products of
/// numbers of 16 bits are exact in f32; others are rounded once).
pub fn dot(a: &[Near], w: &[f32]) -> Near {
    let (mut sum, mut error, mut sizes) = (0.0, 0.0, 0.0);
    for (a, w) in a.iter().zip(w) {
        let w = f64::from(*w);
        sum += a.value * w;
        error += a.error * w.abs();
        sizes += a.size() * w.abs();
    }
    Near::with(sum, error + gamma(a.len() + 2, CUT) * sizes)
}

/// `act(g) · u`, or `act(u)`. Clamps are no steeper than 1 and commute with the bound; the functions are no steeper than 1.2, but for the square, which is 2|z| steep;
/// gated ones are no larger than |g|. gpt-oss multiplies by u + 1.
fn activate(activation: Activation, g: Near, u: Near) -> Near {
    let spec = MlpSpec::from(activation);
    let value = spec.activate(g.value, u.value);
    let z = if activation.gated { g } else { u };
    let (steepness, function) = match activation.function {
        ActivationFunction::Relu2 => (2.0 * z.size(), FUNCTION * z.size() * z.size()),
        _ => (1.2, FUNCTION * z.size()),
    };
    let own = steepness * z.error + function;
    match activation.gated {
        true => Near::with(value, z.size() * u.error + own * (u.size() + 1.0)),
        false => Near::with(value, own),
    }
}

/// The weights of one expert: gate rows, then up rows `[2I, H]`, or up rows alone; their biases; `[H, I]`; its biases.
pub struct Mlp<'a> {
    pub activation: Activation,
    pub dtype: DType,
    pub up: &'a [f32],
    pub up_bias: Option<&'a [f32]>,
    pub down: &'a [f32],
    pub down_bias: Option<&'a [f32]>,
}

impl Mlp<'_> {
    /// The expert's output for one row: h is rounded to the format, and the output to f32.
    pub fn of(&self, x: &[Near]) -> Vec<Near> {
        let biased = |sum: Near, bias: Option<&[f32]>, i: usize| match bias {
            Some(bias) => sum.plus(bias[i].into()),
            None => sum,
        };
        let hidden = x.len();
        let rows = self.up.len() / hidden;
        let sums: Vec<Near> = (0..rows)
            .map(|r| biased(dot(x, &self.up[r * hidden..][..hidden]), self.up_bias, r))
            .collect();
        let width = if self.activation.gated {
            rows / 2
        } else {
            rows
        };
        let h: Vec<Near> = (0..width)
            .map(|i| activate(self.activation, sums[i], sums[rows - width + i]))
            .map(|h| h.rounded(self.dtype))
            .collect();
        (0..hidden)
            .map(|c| biased(dot(&h, &self.down[c * width..][..width]), self.down_bias, c))
            .map(|y| y.rounded(DType::F32))
            .collect()
    }
}

/// `y / √(mean(y²) + eps) · weight`. The root of a mean square is a norm: it changes by no more than that of the errors does.
pub fn rms_norm(y: &[Near], weight: &[f32], eps: f64) -> Vec<Near> {
    let mean =
        |of: &dyn Fn(&Near) -> f64| y.iter().map(|v| of(v).powi(2)).sum::<f64>() / y.len() as f64;
    let root = (mean(&|v| v.value) + eps).sqrt();
    // The squares' sum and the root are computed in f32, too.
    let root_error = mean(&|v| v.error).sqrt() + gamma(y.len() + 4, CUT) * root;
    assert!(root_error < root, "the norm's bound says nothing");
    let least = root - root_error;
    y.iter()
        .zip(weight)
        .map(|(v, &w)| {
            let error = v.error / least + v.value.abs() * root_error / (root * least);
            Near::with(v.value / root, error)
                .rounded(DType::F32)
                .times(w.into())
        })
        .collect()
}
