//! The sort of pairs by expert, and the copy of rows in that order.

use super::{Result, Subject, Work, same, sets_beyond_l2};
use crate::data::{distinct_ids, spread};
use crate::gpu::{Buffer, Gpu};
use crate::tape::{Filled, Tape};
use moe_kernels::DType;
use moe_kernels::cuda::permute::{
    CopyRows, PermutePath, PermutePointers, plan_copy_rows, plan_permute_by, workspace_size_by,
};
use moe_kernels::cuda::{DeviceInfo, DevicePtr, Launch};
use moe_kernels::permute::PermuteOptions;

/// Ids come hot from the router.
const SETS: usize = 4;

struct Sorted {
    offsets: Vec<i32>,
    pair_of_row: Vec<u32>,
    row_of_pair: Vec<u32>,
}

/// The stable sort by its definition.
fn sorted(ids: &[i32], experts: usize) -> Sorted {
    let mut pair_of_row: Vec<u32> = (0..ids.len() as u32).collect();
    pair_of_row.sort_by_key(|&pair| ids[pair as usize]);
    let mut row_of_pair = vec![0; ids.len()];
    for (row, &pair) in pair_of_row.iter().enumerate() {
        row_of_pair[pair as usize] = row as u32;
    }
    let below = |e: usize| pair_of_row.partition_point(|&p| (ids[p as usize] as usize) < e) as i32;
    Sorted {
        offsets: (0..=experts).map(below).collect(),
        pair_of_row,
        row_of_pair,
    }
}

struct Set {
    ids: Buffer,
    counts: Buffer,
    offsets: Buffer,
    pair_of_row: Buffer,
    row_of_pair: Buffer,
    expected: Sorted,
}

pub struct Sort {
    path: PermutePath,
    pairs: usize,
    experts: usize,
    sets: Vec<Set>,
    workspace: Buffer,
}

impl Sort {
    /// On the path that is chosen for so many pairs, or on a given one.
    pub fn new(
        gpu: &Gpu,
        tokens: usize,
        experts: usize,
        top_k: usize,
        path: Option<PermutePath>,
    ) -> Result<Self> {
        let pairs = tokens * top_k;
        let path = path.unwrap_or(PermutePath::for_pairs(pairs));
        let set = |i: usize| -> Result<Set> {
            let ids = distinct_ids(200 + i as u64, tokens, experts, top_k);
            Ok(Set {
                ids: gpu.upload(&ids)?,
                counts: gpu.alloc(4 * experts)?,
                offsets: gpu.alloc(4 * (experts + 1))?,
                pair_of_row: gpu.alloc(4 * pairs)?,
                row_of_pair: gpu.alloc(4 * pairs)?,
                expected: sorted(&ids, experts),
            })
        };
        let options = PermuteOptions::default();
        let bytes = workspace_size_by(path, pairs, experts, &options, gpu.info())?;
        Ok(Self {
            path,
            pairs,
            experts,
            sets: (0..SETS.min(gpu.most_sets))
                .map(set)
                .collect::<Result<_>>()?,
            workspace: gpu.alloc(bytes)?,
        })
    }
}

impl Subject for Sort {
    fn sets(&self) -> usize {
        self.sets.len()
    }

    fn work(&self) -> Work {
        Work {
            flops: 0.0,
            bytes: 4.0 * (3 * self.pairs + 2 * self.experts + 1) as f64,
        }
    }

    fn plan(&self, device: &DeviceInfo, set: usize) -> Result<Vec<Launch>> {
        let set = &self.sets[set];
        let pointers = PermutePointers {
            ids: set.ids.ptr,
            counts: set.counts.ptr,
            offsets: set.offsets.ptr,
            pair_of_row: set.pair_of_row.ptr,
            row_of_pair: set.row_of_pair.ptr,
            workspace: self.workspace.ptr,
        };
        let options = PermuteOptions::default();
        let plan = plan_permute_by(
            self.path,
            self.pairs,
            self.experts,
            &options,
            &pointers,
            device,
        )?;
        Ok(plan.iter().cloned().collect())
    }

    fn poison(&self, gpu: &Gpu, set: usize) -> Result<()> {
        let set = &self.sets[set];
        [
            &set.counts,
            &set.offsets,
            &set.pair_of_row,
            &set.row_of_pair,
        ]
        .into_iter()
        .try_for_each(|buffer| gpu.poison(buffer))
    }

    fn check(&self, gpu: &Gpu, set: usize) -> Result<()> {
        let set = &self.sets[set];
        let (e, n, expected) = (self.experts, self.pairs, &set.expected);
        let counts: Vec<i32> = expected.offsets.windows(2).map(|w| w[1] - w[0]).collect();
        same("counts", &gpu.download(&set.counts, 0, e)?, &counts)?;
        same(
            "offsets",
            &gpu.download(&set.offsets, 0, e + 1)?,
            &expected.offsets,
        )?;
        same(
            "pair_of_row",
            &gpu.download(&set.pair_of_row, 0, n)?,
            &expected.pair_of_row,
        )?;
        same(
            "row_of_pair",
            &gpu.download(&set.row_of_pair, 0, n)?,
            &expected.row_of_pair,
        )
    }
}

/// bf16 rows `[T, H]` copied into the order of the sort, `[T·K, H]`. Bytes: each of the T·K rows read and written, as for any copy; a source row is read K times, far apart.
pub struct CopyOfRows {
    hidden: usize,
    tokens: usize,
    top_k: usize,
    index: Buffer,
    pair_of_row: Vec<u32>,
    sets: Vec<(Filled, Buffer)>,
}

impl CopyOfRows {
    pub fn new(gpu: &Gpu, tokens: usize, hidden: usize, top_k: usize) -> Result<Self> {
        let experts = 16 * top_k;
        let pair_of_row = sorted(&distinct_ids(3, tokens, experts, top_k), experts).pair_of_row;
        let set = |i: usize| -> Result<(Filled, Buffer)> {
            let x = gpu.filled(Tape::Input, 7919 * i, tokens * hidden)?;
            Ok((x, gpu.alloc(2 * tokens * top_k * hidden)?))
        };
        let bytes = 2 * tokens * (1 + top_k) * hidden;
        Ok(Self {
            hidden,
            tokens,
            top_k,
            index: gpu.upload(&pair_of_row)?,
            pair_of_row,
            sets: (0..sets_beyond_l2(gpu, bytes))
                .map(set)
                .collect::<Result<_>>()?,
        })
    }
}

impl Subject for CopyOfRows {
    fn sets(&self) -> usize {
        self.sets.len()
    }

    fn work(&self) -> Work {
        let rows = self.tokens * self.top_k;
        Work {
            flops: 0.0,
            bytes: (rows * (2 * 2 * self.hidden + 4)) as f64,
        }
    }

    fn plan(&self, device: &DeviceInfo, set: usize) -> Result<Vec<Launch>> {
        let (x, out) = &self.sets[set];
        let copy = CopyRows {
            src: x.buffer.ptr,
            src_rows: self.tokens,
            src_stride: self.hidden,
            out: out.ptr,
            out_stride: self.hidden,
            index: self.index.ptr,
            rows: self.tokens * self.top_k,
            used: DevicePtr::NULL,
            divisor: self.top_k,
            width: self.hidden,
            dtype: DType::BF16,
        };
        Ok(vec![plan_copy_rows(&copy, device)?])
    }

    fn poison(&self, gpu: &Gpu, set: usize) -> Result<()> {
        gpu.poison(&self.sets[set].1)
    }

    fn check(&self, gpu: &Gpu, set: usize) -> Result<()> {
        let (x, out) = &self.sets[set];
        gpu.all_written::<u16>(out)?;
        for row in spread(self.pair_of_row.len(), 256) {
            let found: Vec<half::bf16> = gpu.download(out, row * self.hidden, self.hidden)?;
            let token = self.pair_of_row[row] as usize / self.top_k;
            let found: Vec<f32> = found.iter().map(|v| v.to_f32()).collect();
            let expected = x.numbers(token * self.hidden, self.hidden);
            same(&format!("row {row}"), &found, &expected)?;
        }
        Ok(())
    }
}
