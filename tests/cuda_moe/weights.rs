//! The weights of a case, the same numbers on both sides.

use super::*;

/// Matrices, in the layer's format on both sides, and vectors, in f32.
pub struct Weights {
    pub dtype: DType,
    pub matrices: Vec<Vec<f32>>,
    pub vectors: [Vec<f32>; VECTORS],
}

// Their places. Matrices:
pub const GATE: usize = 0;
pub const NOISE: usize = 1;
pub const W_IN: usize = 2;
pub const W_OUT: usize = 3;
pub const UP: usize = 4; // `[E, 2I, L]` gate rows first, or `[E, I, L]`
pub const DOWN: usize = 5;
pub const SHARED_UP: usize = 6;
pub const SHARED_DOWN: usize = 7;
pub const SHARED_GATE: usize = 8;
pub const UP_BIAS: usize = 9;
pub const DOWN_BIAS: usize = 10;
pub const SEPARATE_UP: usize = 11; // on the device, where gate and up rows are separate

// Vectors:
pub const GATE_NORM: usize = 0;
pub const LATENT_NORM: usize = 1;
pub const POST_NORM: usize = 2;
pub const OUT_NORM: usize = 3;
pub const OUT_BIAS: usize = 4;
pub const GATE_BIAS: usize = 5;
pub const CORRECTION: usize = 6;
pub const VECTORS: usize = 7;

impl Weights {
    pub fn new(case: &Case, dtype: DType) -> Self {
        let mut rng = Rng(case.name.bytes().map(u64::from).sum());
        let (h, i, l) = (case.hidden, case.intermediate, case.width());
        let (e, r) = (case.local().len(), case.config.num_logits());
        let (count, si) = case.shared.map_or((0, 0), |s| (s.count, s.intermediate));
        let mut scaled = |n: usize, fan_in: usize| -> Vec<f32> {
            let scale = 1.0 / (fan_in.max(1) as f32).sqrt();
            rng.normals(n).iter().map(|v| v * scale).collect()
        };
        let shapes = [
            (r, h),
            (r, h),
            (l, h),
            (h, l),
            (e * case.wide(i), l),
            (e * l, i),
            (count * case.wide(si), h),
            (count * h, si),
            (1, h),
        ];
        let mut matrices = shapes.map(|(n, k)| scaled(n * k, k)).to_vec();
        let vectors = [
            (h, 1),
            (l, 1),
            (l, 1),
            (h, 1),
            (h, 1),
            (r, 4),
            (case.config.selectable(), 1),
        ];
        let vectors = vectors.map(|(n, fan_in)| scaled(n, fan_in));
        matrices.extend([e * case.wide(i), e * l, 0].map(|n| scaled(n, 1)));
        Self {
            dtype,
            matrices: matrices.iter().map(|m| rounded(dtype, m)).collect(),
            vectors,
        }
    }

    /// The matrices as they lie on the device.
    pub fn on_device(&self, case: &Case) -> Vec<Vec<f32>> {
        let mut all = self.matrices.clone();
        let (i, l) = (case.intermediate, case.width());
        match case.up {
            Up::Fused => {}
            Up::Interleaved => {
                all[UP] = interleave(&self.matrices[UP], i, l);
                all[UP_BIAS] = interleave(&self.matrices[UP_BIAS], i, 1);
            }
            Up::Separate => {
                let halves: Vec<_> = self.matrices[UP].chunks(i * l).collect();
                let every_second = |n| halves[n..].iter().step_by(2).copied();
                let half = |n| every_second(n).flatten().copied().collect();
                (all[UP], all[SEPARATE_UP]) = (half(0), half(1));
            }
        }
        all
    }
}

/// `[E, 2I, width]` with gate rows first, to gate and up rows in turn.
fn interleave(m: &[f32], i: usize, width: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(m.len());
    for expert in m.chunks(2 * i * width) {
        for row in 0..i {
            out.extend_from_slice(&expert[row * width..][..width]);
            out.extend_from_slice(&expert[(i + row) * width..][..width]);
        }
    }
    out
}
