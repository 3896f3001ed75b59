//! The weighted sum of each token's rows, bf16 rows and result. Bytes: each row read once, each token written once.

use super::{Result, Subject, Work, near, sets_beyond_l2};
use crate::data::{distinct_ids, normals, spread};
use crate::gpu::{Buffer, Gpu};
use crate::tape::{Filled, Tape};
use half::bf16;
use moe_kernels::DType;
use moe_kernels::cuda::combine::{CombineOperands, DeviceRows, Routed, plan_combine};
use moe_kernels::cuda::{DeviceInfo, Launch};

pub struct Combine {
    tokens: usize,
    hidden: usize,
    top_k: usize,
    weights: (Vec<f32>, Buffer),
    row_of_pair: (Vec<u32>, Buffer),
    sets: Vec<(Filled, Buffer)>,
}

impl Combine {
    pub fn new(gpu: &Gpu, tokens: usize, hidden: usize, top_k: usize) -> Result<Self> {
        let (pairs, experts) = (tokens * top_k, 16 * top_k);
        let ids = distinct_ids(3, tokens, experts, top_k);
        let mut pair_of_row: Vec<u32> = (0..pairs as u32).collect();
        pair_of_row.sort_by_key(|&pair| ids[pair as usize]);
        let mut rows = vec![0; pairs];
        for (row, &pair) in pair_of_row.iter().enumerate() {
            rows[pair as usize] = row as u32;
        }
        let weights = normals(5, pairs);
        let set = |i: usize| -> Result<(Filled, Buffer)> {
            let ys = gpu.filled(Tape::Input, 7919 * i, pairs * hidden)?;
            Ok((ys, gpu.alloc(2 * tokens * hidden)?))
        };
        let bytes = 2 * (pairs + tokens) * hidden;
        Ok(Self {
            tokens,
            hidden,
            top_k,
            weights: (weights.clone(), gpu.upload(&weights)?),
            row_of_pair: (rows.clone(), gpu.upload(&rows)?),
            sets: (0..sets_beyond_l2(gpu, bytes))
                .map(set)
                .collect::<Result<_>>()?,
        })
    }
}

impl Subject for Combine {
    fn sets(&self) -> usize {
        self.sets.len()
    }

    fn work(&self) -> Work {
        let pairs = self.tokens * self.top_k;
        Work {
            flops: 0.0,
            bytes: (2 * (pairs + self.tokens) * self.hidden + 8 * pairs) as f64,
        }
    }

    fn plan(&self, device: &DeviceInfo, set: usize) -> Result<Vec<Launch>> {
        let (ys, out) = &self.sets[set];
        let rows = |ptr| DeviceRows {
            ptr,
            stride: self.hidden,
            dtype: DType::BF16,
        };
        let routed = Routed::Pairs {
            ys: rows(ys.buffer.ptr),
            rows: self.tokens * self.top_k,
            slots: self.top_k,
            weights: self.weights.1.ptr,
            row_of_pair: self.row_of_pair.1.ptr,
            identity: None,
        };
        let operands = CombineOperands::new(self.tokens, self.hidden, routed, rows(out.ptr));
        Ok(vec![plan_combine(&operands, device)?])
    }

    fn poison(&self, gpu: &Gpu, set: usize) -> Result<()> {
        gpu.poison(&self.sets[set].1)
    }

    fn check(&self, gpu: &Gpu, set: usize) -> Result<()> {
        let (h, k) = (self.hidden, self.top_k);
        let (ys, out) = &self.sets[set];
        gpu.all_written::<u16>(out)?;
        for token in spread(self.tokens, 64) {
            let found: Vec<bf16> = gpu.download(out, token * h, h)?;
            let rows: Vec<(f64, Vec<f32>)> = (token * k..token * k + k)
                .map(|pair| {
                    let row = self.row_of_pair.0[pair] as usize;
                    (f64::from(self.weights.0[pair]), ys.numbers(row * h, h))
                })
                .collect();
            for (column, found) in found.iter().enumerate() {
                let terms = rows.iter().map(|(w, row)| w * f64::from(row[column]));
                let (sum, all) = terms.fold((0.0, 0.0), |(s, a), t| (s + t, a + t.abs()));
                let tolerance = all * k as f64 * f64::from(f32::EPSILON) + sum.abs() / 256.0;
                let place = format!("token {token}, column {column}");
                near(&place, found.to_f64(), sum, tolerance)?;
            }
        }
        Ok(())
    }
}
