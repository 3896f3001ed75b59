//! What a grouped product reads and writes, as plain data.

use super::DECODE_ROWS;
use crate::cuda::combine::DeviceRows;
use crate::cuda::plan::DevicePtr;
use crate::element::DType;
use crate::grouped_gemm::Activation;

/// How products are summed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Numerics {
    /// f16 and bf16 on tensor cores with f32 sums; f32 (and mixed formats) exactly.
    #[default]
    TensorCores,
    /// The same, but f32 on tensor cores with inputs rounded to TF32's ten bits of mantissa.
    Tf32,
    /// Every format by chains of f32 fused multiply-adds: the CPU's bits.
    Exact,
    /// The same as if the weights were f32, whatever they are: the bits of the CPU's gates, whose weights are packed in f32. Differs from `Exact` for bf16 weights alone,
    /// whose chains take k in another order.
    ExactWidened,
}

/// How one finds an expert's matrix, or its bias, from the address of all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Placement {
    /// One allocation: the address is that of expert 0's first element, the others follow at equal distances.
    Strided {
        /// Elements from one expert to the next.
        expert_stride: usize,
    },
    /// One allocation for each expert: the address is that of a table, u64 `[experts]` in device memory, with an address for each expert.
    Table {
        /// Elements from each address of the table to the first one that counts: 0, or for the second half of fused matrices the first half's length.
        offset: usize,
        /// Bytes that every address in the table is a multiple of, a power of two; the driver's allocations are at 256. The host does not read the table: an address
        /// that breaks this promise is a misaligned access on the device. 16 is what the fast kernels ask for.
        alignment: usize,
    },
}

impl Placement {
    /// The distance that the kernels multiply with the expert, or add to what a table says.
    pub(super) fn stride(self) -> usize {
        match self {
            Self::Strided { expert_stride } => expert_stride,
            Self::Table { offset, .. } => offset,
        }
    }

    pub(super) fn is_table(self) -> bool {
        matches!(self, Self::Table { .. })
    }

    /// The same matrices from `elements` on: their address and placement.
    pub(in crate::cuda) fn behind(
        self,
        ptr: DevicePtr,
        dtype: DType,
        elements: usize,
    ) -> (DevicePtr, Self) {
        match self {
            Self::Strided { .. } => {
                let bytes = elements.wrapping_mul(dtype.size()) as u64;
                (ptr.add(bytes), self)
            }
            Self::Table { offset, alignment } => {
                let offset = offset.wrapping_add(elements);
                (ptr, Self::Table { offset, alignment })
            }
        }
    }
}

/// Matrices `[experts, N, K]` in device memory, out-features first, the K in-features of a row neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightPointers {
    /// The first element, or the table. Fastest where matrices begin at multiples of 16 bytes and the strides are such, too.
    pub ptr: DevicePtr,
    /// Format of the elements.
    pub dtype: DType,
    /// Elements from one out-feature to the next.
    pub row_stride: usize,
    /// From expert to expert. One kind for both matrices of a gated product.
    pub placement: Placement,
}

/// Biases `[experts, N]` in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BiasPointers {
    /// The first element, or the table.
    pub ptr: DevicePtr,
    /// Format of the elements; one for all biases of a product.
    pub dtype: DType,
    /// Elements from one out-feature to the next.
    pub stride: usize,
    /// From expert to expert. One kind for both biases of a gated product.
    pub placement: Placement,
}

impl WeightPointers {
    /// Matrices in one allocation: `row_stride` elements from one out-feature to the next, `expert_stride` from one expert to the next.
    pub fn strided(ptr: DevicePtr, dtype: DType, row_stride: usize, expert_stride: usize) -> Self {
        Self {
            ptr,
            dtype,
            row_stride,
            placement: Placement::Strided { expert_stride },
        }
    }

    /// Matrices in an allocation each: `table` is u64 `[experts]` in device memory, addresses that are multiples of `alignment` bytes ([`Placement::Table`]).
    pub fn table(table: DevicePtr, dtype: DType, row_stride: usize, alignment: usize) -> Self {
        Self {
            ptr: table,
            dtype,
            row_stride,
            placement: Placement::Table {
                offset: 0,
                alignment,
            },
        }
    }
}

impl BiasPointers {
    /// Biases in one allocation, the columns of an expert neighbours, `expert_stride` elements from one expert to the next.
    pub fn strided(ptr: DevicePtr, dtype: DType, expert_stride: usize) -> Self {
        Self {
            ptr,
            dtype,
            stride: 1,
            placement: Placement::Strided { expert_stride },
        }
    }

    /// Biases in an allocation each: `table` is u64 `[experts]` in device memory, addresses that are multiples of the element's size.
    pub fn table(table: DevicePtr, dtype: DType) -> Self {
        Self {
            ptr: table,
            dtype,
            stride: 1,
            placement: Placement::Table {
                offset: 0,
                alignment: dtype.size(),
            },
        }
    }
}

/// Which rows belong to which expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GroupPointers {
    /// `offsets` i32 `[experts + 1]` and `counts` i32 `[experts]`, from a sort.
    Ragged {
        /// `[experts + 1]`
        offsets: DevicePtr,
        /// `[experts]`
        counts: DevicePtr,
        /// How many.
        experts: usize,
    },
    /// All rows are the first matrix's.
    Single,
}

/// Rows of A by pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatherPointers {
    /// u32 `[rows]`
    pub pair_of_row: DevicePtr,
    /// Pairs of a token.
    pub slots: usize,
    /// f32 `[pairs]`, a factor on each pair's input; [`DevicePtr::NULL`] for none.
    pub input_scale: DevicePtr,
}

/// One grouped product. Plain data.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupedGemm {
    /// `[a_rows, K]`
    pub a: DeviceRows,
    /// Rows of A.
    pub a_rows: usize,
    /// Rows of A by pair; `None`: row r is row r.
    pub gather: Option<GatherPointers>,
    /// Which rows are whose.
    pub groups: GroupPointers,
    /// `[experts, N, K]` of a gated product.
    pub gate: Option<WeightPointers>,
    /// `[experts, N, K]`
    pub up: WeightPointers,
    /// `[experts, N]`
    pub gate_bias: Option<BiasPointers>,
    /// `[experts, N]`
    pub up_bias: Option<BiasPointers>,
    /// What happens to the sums.
    pub activation: Activation,
    /// `[rows, N]`
    pub out: DeviceRows,
    /// The most rows that there may be.
    pub rows: usize,
    /// Columns of the output.
    pub n: usize,
    /// Columns of A.
    pub k: usize,
    /// How it is summed.
    pub numerics: Numerics,
    /// One class of bits for every number of rows.
    pub strict: bool,
}

impl GroupedGemm {
    pub(super) fn experts(&self) -> usize {
        match self.groups {
            GroupPointers::Ragged { experts, .. } => experts,
            GroupPointers::Single => 1,
        }
    }

    /// Whether the operands are of one 16-bit format.
    pub(super) fn is_16_bit(&self) -> bool {
        self.a.dtype != DType::F32 && self.up.dtype == self.a.dtype
    }

    /// Whether the kernels for few rows are taken.
    pub(super) fn is_decode(&self) -> bool {
        !self.strict && self.rows <= DECODE_ROWS.saturating_mul(self.experts())
    }
}
