//! The grouped product at the safe level.
#![allow(unsafe_code)] // one block: the launch of a plan whose operands were checked here

use super::operands::{GatherPointers, GroupPointers, GroupedGemm, Numerics};
use super::plan_grouped_gemm;
use crate::cuda::moe::{UpNames, UpViews};
use crate::cuda::stages::Door;
use crate::cuda::{Cuda, DeviceMat, DeviceMatMut, DevicePtr, DeviceVec, WeightViews};
use crate::error::{Error, Result};
use crate::grouped_gemm::Activation;
use crate::shape::pairs;
use cudarc::driver::CudaStream;

/// Which rows of the output belong to which expert.
#[derive(Debug)]
#[non_exhaustive]
pub enum GroupViews<'a> {
    /// Expert e has the `counts[e]` rows from `offsets[e]` on. What [`Cuda::permute_into`] writes; numbers that lead outside the output are cut off.
    Ragged {
        /// `[experts + 1]`
        offsets: DeviceVec<'a, i32>,
        /// `[experts]`
        counts: DeviceVec<'a, i32>,
        /// How many.
        experts: usize,
    },
    /// All rows are the one expert's.
    Single,
}

/// Rows of A by pair: row r of the output is a product of row `pair_of_row[r] / slots` of A.
#[derive(Debug)]
pub struct GatherViews<'a> {
    /// `[rows]` of the output. What comes of a pair beyond A is unspecified; nothing beyond A is read.
    pub pair_of_row: DeviceVec<'a, u32>,
    /// Pairs of a row of A.
    pub slots: usize,
    /// `[rows of A · slots]`, a factor on each pair's input.
    pub input_scale: Option<DeviceVec<'a, f32>>,
}

/// What [`Cuda::grouped_gemm_into`] reads.
#[derive(Debug)]
pub struct GroupedGemmViews<'a> {
    /// `[rows of A, K]`; as many rows as the output has, unless they are gathered.
    pub a: DeviceMat<'a>,
    /// Rows of A by pair; `None`: row r of the output is a product of row r.
    pub gather: Option<GatherViews<'a>>,
    /// Which rows are whose.
    pub groups: GroupViews<'a>,
    /// `[experts, N, K]`, and as many of the gate where the activation is gated, in any layout.
    pub weights: UpViews<'a>,
    /// `[experts, N]`, or `[experts, 2N]` as [`ExpertViews::up_bias`](crate::cuda::moe::ExpertViews::up_bias).
    pub bias: Option<WeightViews<'a>>,
    /// What happens to the sums.
    pub activation: Activation,
    /// How they are formed.
    pub numerics: Numerics,
    /// One class of bits for every number of rows.
    pub strict: bool,
}

impl<'a> GroupedGemmViews<'a> {
    /// A product without gather and bias.
    pub fn new(
        a: DeviceMat<'a>,
        groups: GroupViews<'a>,
        weights: UpViews<'a>,
        activation: Activation,
    ) -> Self {
        Self {
            a,
            gather: None,
            groups,
            weights,
            bias: None,
            activation,
            numerics: Numerics::default(),
            strict: false,
        }
    }
}

impl Cuda {
    /// Queues the grouped product into `out [rows, N]`: `out[r] = act(A[src(r)] · W[e]ᵀ + b[e])` for the rows r of each expert e; see the [module](super) for the kernels
    /// and their bits. Rows of no expert keep what they hold, and all rows do where A has none. One launch: nothing is allocated, waited for or read back.
    ///
    /// ```no_run
    /// use moe_kernels::cuda::grouped_gemm::{GroupViews, GroupedGemmViews};
    /// use moe_kernels::cuda::moe::UpViews;
    /// use moe_kernels::cuda::{Cuda, DeviceMat, DeviceMatMut, DeviceVec, TensorTable};
    /// use moe_kernels::grouped_gemm::Activation;
    /// let cuda = Cuda::new(0)?;
    /// let stream = cuda.context().default_stream();
    /// # fn fine<T>(r: Result<T, cudarc::driver::DriverError>) -> T { r.unwrap() }
    /// // Two experts, each a tensor of its own with 4 gate rows above 4 up rows; five rows, the first three of expert 0.
    /// let (experts, rows, n, k) = (2, 5, 4, 8);
    /// let tensors = (0..experts).map(|_| fine(stream.alloc_zeros::<f32>(2 * n * k))).collect();
    /// let table = TensorTable::new(&stream, tensors, 2 * n, k)?;
    /// let (a, mut out) = (fine(stream.alloc_zeros::<f32>(rows * k)), fine(stream.alloc_zeros::<f32>(rows * n)));
    /// let (offsets, counts) = (fine(stream.clone_htod(&[0, 3, 5])), fine(stream.clone_htod(&[3, 2])));
    /// let groups = GroupViews::Ragged {
    ///     offsets: DeviceVec::new(&stream, &offsets), counts: DeviceVec::new(&stream, &counts), experts,
    /// };
    /// let weights = UpViews::Fused(table.view(&stream).into());
    /// let product = GroupedGemmViews::new(DeviceMat::new(&stream, &a, rows, k)?, groups, weights, Activation::SWIGLU);
    /// cuda.grouped_gemm_into(&stream, &product, &mut DeviceMatMut::new(&stream, &mut out, rows, n)?)?;
    /// # Ok::<(), moe_kernels::Error>(())
    /// ```
    ///
    /// # Errors
    /// An [`Error`] that names the operand, as [`plan_grouped_gemm`]; nothing is queued then.
    pub fn grouped_gemm_into(
        &self,
        stream: &CudaStream,
        views: &GroupedGemmViews<'_>,
        out: &mut DeviceMatMut<'_>,
    ) -> Result<()> {
        let door = Door { cuda: self, stream };
        let (rows, n) = (out.rows(), out.cols());
        out.expect(self, "out", stream, rows, n)?;
        let launch = plan_grouped_gemm(&views.check(&door, out)?, self.device_info())?;
        // SAFETY: every operand was checked to be a live view of this context for this stream, of the extent that `GroupedGemm` states; a table's tensors live and stay where they are
        // as long as its view. `out` is borrowed mutably, and the kernels bound what offsets, counts and pairs lead to.
        unsafe { self.launch(stream, &launch) }
    }
}

impl GroupedGemmViews<'_> {
    /// The operands as plain data, once each has the shape of the product.
    fn check(&self, door: &Door<'_>, out: &DeviceMatMut<'_>) -> Result<GroupedGemm> {
        let (rows, n) = (out.rows(), out.cols());
        let (a_rows, k) = (self.a.rows(), self.a.cols());
        let a = door.mat("a", &self.a, a_rows, k)?;
        let groups = self.groups.check(door)?;
        let experts = match groups {
            GroupPointers::Ragged { experts, .. } => experts,
            GroupPointers::Single => 1,
        };
        let gather = match &self.gather {
            Some(gather) => Some(gather.check(door, rows, a_rows)?),
            None if a_rows != rows => return Err(Error::shape("a", [rows, k], [a_rows, k])),
            None => None,
        };
        let names = UpNames {
            gate: "gate",
            up: "weights",
            bias: "bias",
        };
        let bias = self.bias.as_ref();
        let weights = self.weights.check(door, &names, [experts, n, k], bias)?;
        Ok(GroupedGemm {
            a,
            a_rows,
            gather,
            groups,
            gate: weights.gate,
            up: weights.up,
            gate_bias: weights.gate_bias,
            up_bias: weights.up_bias,
            activation: self.activation,
            out: out.as_rows(),
            rows,
            n,
            k,
            numerics: self.numerics,
            strict: self.strict,
        })
    }
}

impl GroupViews<'_> {
    fn check(&self, door: &Door<'_>) -> Result<GroupPointers> {
        let Self::Ragged {
            offsets,
            counts,
            experts,
        } = self
        else {
            return Ok(GroupPointers::Single);
        };
        let starts = experts
            .checked_add(1)
            .ok_or(Error::Overflow { what: "experts" })?;
        Ok(GroupPointers::Ragged {
            offsets: door.vec("offsets", offsets, starts)?,
            counts: door.vec("counts", counts, *experts)?,
            experts: *experts,
        })
    }
}

impl GatherViews<'_> {
    fn check(&self, door: &Door<'_>, rows: usize, a_rows: usize) -> Result<GatherPointers> {
        let pairs = pairs(a_rows, self.slots)?;
        let input_scale = match &self.input_scale {
            Some(scale) => door.vec("input_scale", scale, pairs)?,
            None => DevicePtr::NULL,
        };
        Ok(GatherPointers {
            pair_of_row: door.vec("pair_of_row", &self.pair_of_row, rows)?,
            slots: self.slots,
            input_scale,
        })
    }
}
