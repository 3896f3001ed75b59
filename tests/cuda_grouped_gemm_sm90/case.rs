//! The products that are computed, and their operands.

use super::*;

/// A product: its shape and what it does.
#[derive(Clone)]
pub struct Case {
    pub counts: Vec<usize>,
    /// Rows of an expert begin at multiples of this.
    pub block: usize,
    pub n: usize,
    pub k: usize,
    pub dtype: DType,
    pub out: DType,
    pub activation: Option<Activation>,
    /// 0: contiguous rows; else the pairs of a token.
    pub slots: usize,
    pub bias: bool,
    pub scale: bool,
    /// Weights of gate and up in alternating rows of one matrix.
    pub interleaved: bool,
    pub cluster: u32,
    /// Multiprocessors to plan for: with few of them a block has many tiles.
    pub sms: u32,
    pub seed: u64,
}

impl Case {
    pub fn plain(counts: &[usize], n: usize, k: usize) -> Self {
        Self {
            counts: counts.to_vec(),
            block: 1,
            n,
            k,
            dtype: DType::BF16,
            out: DType::BF16,
            activation: None,
            slots: 0,
            bias: false,
            scale: false,
            interleaved: false,
            cluster: 1,
            sms: 6,
            seed: 1,
        }
    }

    pub fn gated(counts: &[usize], n: usize, k: usize) -> Self {
        Self {
            activation: Some(Activation::SWIGLU),
            slots: 2,
            ..Self::plain(counts, n, k)
        }
    }

    pub fn is_gated(&self) -> bool {
        self.activation.is_some_and(|a| a.gated)
    }

    pub fn offsets(&self) -> Vec<i32> {
        let mut offsets = vec![0];
        for count in &self.counts {
            offsets.push(offsets[offsets.len() - 1] + count.next_multiple_of(self.block) as i32);
        }
        offsets
    }

    pub fn rows(&self) -> usize {
        *self.offsets().last().unwrap() as usize
    }
}

/// A case's numbers, rounded to its format.
pub struct Data {
    pub a: Vec<f32>,
    pub gate: Vec<f32>,
    pub up: Vec<f32>,
    pub gate_bias: Vec<f32>,
    pub up_bias: Vec<f32>,
    pub scale: Vec<f32>,
    pub pair_of_row: Vec<u32>,
}

impl Data {
    pub fn new(case: &Case) -> Self {
        let mut rng = Rng(case.seed);
        let (e, n, k, rows) = (case.counts.len(), case.n, case.k, case.rows());
        let mut values = |len: usize, by: f32| -> Vec<f32> {
            let v: Vec<f32> = (0..len).map(|_| rng.normal() * by).collect();
            rounded(case.dtype, &v)
        };
        let by = 1.0 / (k as f32).sqrt();
        let a_rows = rows.max(1);
        let (mut a, gate, up) = (
            values(a_rows * k, 1.0),
            values(e * n * k, by),
            values(e * n * k, by),
        );
        let (gate_bias, up_bias) = (values(e * n, 1.0), values(e * n, 1.0));
        let mut scale: Vec<f32> = values(a_rows * case.slots.max(1), 1.0);
        // Pairs in a random order; rows of padding have none, and where rows are contiguous hold infinities that nobody may see.
        let mut order: Vec<u32> = (0..(a_rows * case.slots.max(1)) as u32).collect();
        let mut rng = Rng(case.seed ^ 77);
        for i in (1..order.len()).rev() {
            order.swap(i, rng.below(i + 1));
        }
        let mut pair_of_row = vec![u32::MAX; rows];
        let offsets = case.offsets();
        let real = |r: usize| {
            (0..e).any(|e| (offsets[e] as usize..offsets[e] as usize + case.counts[e]).contains(&r))
        };
        for r in 0..rows {
            if real(r) {
                pair_of_row[r] = order[r];
            } else if case.slots == 0 {
                a[r * k..][..k].fill(f32::INFINITY);
                scale[r] = f32::NAN;
            }
        }
        Self {
            a,
            gate,
            up,
            gate_bias,
            up_bias,
            scale,
            pair_of_row,
        }
    }
}
