//! The products that are computed, and their operands.

use super::*;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Layout {
    /// Two matrices, rows with a gap between them.
    Separate,
    /// Gate rows, then up rows.
    Fused,
    /// Gate and up rows in turn.
    Interleaved,
    /// An allocation for each matrix of each expert, and for each bias.
    Table,
    /// An allocation for each expert: gate rows, then up rows.
    FusedTable,
    /// The same with gate and up rows in turn.
    InterleavedTable,
}

impl Layout {
    pub const ALL: [Self; 6] = [
        Self::Separate,
        Self::Fused,
        Self::Interleaved,
        Self::Table,
        Self::FusedTable,
        Self::InterleavedTable,
    ];

    /// The layout whose experts lie apart in this one.
    pub fn stacked(self) -> Self {
        match self {
            Self::Table => Self::Separate,
            Self::FusedTable => Self::Fused,
            Self::InterleavedTable => Self::Interleaved,
            other => other,
        }
    }
}

/// A product in host memory. Rows of an expert begin at multiples of `block`.
#[derive(Clone, Debug)]
pub struct Case {
    pub counts: Vec<usize>,
    pub block: usize,
    pub n: usize,
    pub k: usize,
    pub a: DType,
    pub w: DType,
    pub out: DType,
    pub activation: Activation,
    pub slots: usize,
    pub bias: bool,
    pub scale: bool,
    pub layout: Layout,
    pub numerics: Numerics,
    pub strict: bool,
    /// Rows that the plan is told of beyond those that there are: steers the choice of a tile.
    pub spare: usize,
    /// Offsets, counts and pairs are nonsense on the device.
    pub hostile: bool,
    pub seed: u64,
}

impl Case {
    pub fn new(dtype: DType, counts: &[usize], n: usize, k: usize) -> Self {
        Self {
            counts: counts.to_vec(),
            block: 1,
            n,
            k,
            a: dtype,
            w: dtype,
            out: DType::F32,
            activation: Activation::SWIGLU,
            slots: 2,
            bias: false,
            scale: false,
            layout: Layout::Fused,
            numerics: Numerics::TensorCores,
            strict: true,
            spare: 0,
            hostile: false,
            seed: 7,
        }
    }

    pub fn offsets(&self) -> Vec<usize> {
        let mut offsets = vec![0];
        for count in &self.counts {
            offsets.push(offsets[offsets.len() - 1] + count.next_multiple_of(self.block));
        }
        offsets
    }

    pub fn rows(&self) -> usize {
        self.offsets()[self.counts.len()]
    }

    pub fn data(&self) -> Data {
        let mut rng = Rng(self.seed);
        let (e, rows) = (self.counts.len(), self.rows());
        let tokens = rows.div_ceil(self.slots.max(1)).max(1);
        let a_rows = if self.slots == 0 { rows.max(1) } else { tokens };
        let mut pairs: Vec<u32> = (0..(tokens * self.slots.max(1)) as u32).collect();
        for i in (1..pairs.len()).rev() {
            pairs.swap(i, rng.below(i + 1));
        }
        let mut pair_of_row = vec![u32::MAX; rows];
        let offsets = self.offsets();
        for (first, &count) in offsets.iter().zip(&self.counts) {
            pair_of_row[*first..first + count].fill_with(|| pairs.pop().unwrap());
        }
        let weight = |rng: &mut Rng| {
            let v: Vec<f32> = rng.normals(e * self.n * self.k);
            Stored::new(self.w, &v.iter().map(|x| x * 0.3).collect::<Vec<_>>())
        };
        Data {
            x: Stored::new(self.a, &rng.normals(a_rows * self.k)),
            a_rows,
            pair_of_row,
            scale: (0..tokens * self.slots.max(1))
                .map(|_| 0.5 + rng.unit())
                .collect(),
            gate: weight(&mut rng),
            up: weight(&mut rng),
            gate_bias: rng.normals(e * self.n),
            up_bias: rng.normals(e * self.n),
        }
    }
}

pub struct Data {
    pub x: Stored,
    pub a_rows: usize,
    pub pair_of_row: Vec<u32>,
    pub scale: Vec<f32>,
    pub gate: Stored,
    pub up: Stored,
    pub gate_bias: Vec<f32>,
    pub up_bias: Vec<f32>,
}
