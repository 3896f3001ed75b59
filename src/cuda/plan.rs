//! What a kernel launch is, as plain data: no type of cudarc or of the driver, so that any framework can run it with whatever it has.
//!
//! A stage's `plan_*` function checks shapes and gives one or a few [`Launch`]es. To run one by hand: load the text that [`Module::ptx`] gives for the
//! device, look up [`Launch::kernel`] in it, and launch with `grid`, `block`, `cluster` and `shared_bytes`. The kernel's arguments are the bytes of
//! [`Launch::params`] (one struct by value), then each of [`Launch::tensor_maps`] encoded as a `CUtensorMap` by value. The raw level does all this.

use crate::element::DType;
use core::fmt;

/// An address in the device's memory, 0 for an absent operand. Plain data: nothing is owned, nothing is kept alive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct DevicePtr(pub u64);

impl DevicePtr {
    /// An absent operand.
    pub const NULL: Self = Self(0);

    /// Whether the operand is absent.
    pub const fn is_null(self) -> bool {
        self.0 == 0
    }

    /// Whether the address is a multiple of `bytes`, a power of two.
    pub const fn is_aligned(self, bytes: u64) -> bool {
        self.0 & (bytes - 1) == 0
    }

    /// The address `bytes` further on. Wraps, as pointers do: whoever uses the address answers for it.
    pub const fn add(self, bytes: u64) -> Self {
        Self(self.0.wrapping_add(bytes))
    }
}

/// A compute capability, major and minor: `(8, 0)` is an A100, `(9, 0)` an H100 or H200.
pub type ComputeCapability = (u32, u32);

/// What a plan has to know about the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Major and minor.
    pub compute_capability: ComputeCapability,
    /// Multiprocessors.
    pub sm_count: u32,
    /// Bytes of shared memory that one block may have after opting in.
    pub shared_per_block: u32,
    /// Bytes of the L2 cache.
    pub l2_bytes: u64,
}

impl DeviceInfo {
    /// An H100 or H200 SXM: 132 multiprocessors of compute capability 9.0. For plans made without a device.
    pub const H100: Self = Self {
        compute_capability: (9, 0),
        sm_count: 132,
        shared_per_block: 227 * 1024,
        l2_bytes: 50 << 20,
    };

    /// An A100: 108 multiprocessors of compute capability 8.0.
    pub const A100: Self = Self {
        compute_capability: (8, 0),
        sm_count: 108,
        shared_per_block: 163 * 1024,
        l2_bytes: 40 << 20,
    };
}

/// A kernel source file: `kernels/<stem>.cu`. [`Module::ptx`] gives its compiled text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Module {
    /// Logits to ids and weights.
    Routing,
    /// Ids to offsets and both permutations; copies of rows.
    Permute,
    /// The weighted sum.
    Combine,
    /// RMS norms of rows.
    Norm,
    /// Exact f32 products.
    GroupedGemmF32,
    /// Tensor-core products for everything from Ampere on.
    GroupedGemmSm80,
    /// Products of few rows.
    GroupedGemmDecode,
    /// Tensor-core products for Hopper. Only devices of compute capability 9.0 can load it.
    GroupedGemmSm90,
}

impl Module {
    /// Every module.
    pub const ALL: [Self; 8] = [
        Self::Routing,
        Self::Permute,
        Self::Combine,
        Self::Norm,
        Self::GroupedGemmF32,
        Self::GroupedGemmSm80,
        Self::GroupedGemmDecode,
        Self::GroupedGemmSm90,
    ];

    /// The stem of its files: `grouped_gemm_sm80` for `kernels/grouped_gemm_sm80.cu`.
    pub const fn stem(self) -> &'static str {
        match self {
            Self::Routing => "routing",
            Self::Permute => "permute",
            Self::Combine => "combine",
            Self::Norm => "norm",
            Self::GroupedGemmF32 => "grouped_gemm_f32",
            Self::GroupedGemmSm80 => "grouped_gemm_sm80",
            Self::GroupedGemmDecode => "grouped_gemm_decode",
            Self::GroupedGemmSm90 => "grouped_gemm_sm90",
        }
    }
}

impl fmt::Display for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.stem())
    }
}

/// How a tensor map spreads a box over the banks of shared memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Swizzle {
    /// Rows as they are.
    #[default]
    None,
    /// Within 32 bytes.
    Bytes32,
    /// Within 64 bytes.
    Bytes64,
    /// Within 128 bytes: 16-byte chunk c of row r lands at chunk c xor (r mod 8).
    Bytes128,
}

/// A tiled tensor in global memory, as the tensor memory accelerator addresses it. Dimension 0 is the contiguous one.
///
/// What lies outside the tensor reads as zero and is not written. The driver's rules (checked when it is encoded): `address` a multiple of 16, each
/// stride a multiple of 16 and below 2⁴⁰, each dimension from 1 to 2³², each box side from 1 to 256, the inner side of the box a multiple of 16 bytes and
/// no wider than the swizzle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMap {
    /// Where the tensor begins.
    pub address: DevicePtr,
    /// The format of its elements.
    pub dtype: DType,
    /// Dimensions in use, 1 to 5.
    pub rank: u32,
    /// Elements along each dimension; those beyond `rank` are ignored.
    pub dims: [u64; 5],
    /// Bytes from one element to the next along dimensions 1, 2, ...
    pub strides: [u64; 4],
    /// Sides of the box that one copy moves, in elements.
    pub boxes: [u32; 5],
    /// Where the box's bytes go in shared memory.
    pub swizzle: Swizzle,
}

impl TensorMap {
    /// Fills the unused places of a [`Launch`].
    const EMPTY: Self = Self {
        address: DevicePtr::NULL,
        dtype: DType::F32,
        rank: 0,
        dims: [0; 5],
        strides: [0; 4],
        boxes: [0; 5],
        swizzle: Swizzle::None,
    };
}

/// One kernel launch, complete but for the stream. Made without allocation: parameters and maps are stored inside.
///
/// ```
/// use moe_kernels::cuda::plan::{Launch, Module};
/// let launch = Launch::new(Module::Combine, "moe_combine_f32", &[7u32, 8]).grid([132, 1, 1]).block([256, 1, 1]);
/// assert_eq!(launch.params(), [7, 0, 0, 0, 8, 0, 0, 0]);
/// assert_eq!(launch.cluster, [1, 1, 1]);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// Where the kernel is.
    pub module: Module,
    /// Its name there.
    pub kernel: &'static str,
    /// Blocks along x, y and z; a zero anywhere means that there is nothing to do.
    pub grid: [u32; 3],
    /// Threads along x, y and z.
    pub block: [u32; 3],
    /// Blocks of a cluster; `[1, 1, 1]` for none.
    pub cluster: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    params: Params,
    maps: [TensorMap; Launch::MAX_MAPS],
    map_count: u32,
}

/// The parameter struct's bytes, aligned for any struct of 8-byte fields.
#[derive(Clone, PartialEq)]
#[repr(C, align(16))]
struct Params {
    bytes: [u8; Launch::MAX_PARAM_BYTES],
    len: usize,
}

impl fmt::Debug for Params {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.len)
    }
}

impl Launch {
    /// The largest parameter struct.
    pub const MAX_PARAM_BYTES: usize = 512;
    /// The most tensor maps.
    pub const MAX_MAPS: usize = 4;

    /// A launch of one block of one thread, with `params` as the kernel's first argument. A struct of more than [`Self::MAX_PARAM_BYTES`] does not compile.
    pub fn new<P: bytemuck::Pod>(module: Module, kernel: &'static str, params: &P) -> Self {
        const { assert!(size_of::<P>() <= Self::MAX_PARAM_BYTES) };
        let mut stored = Params {
            bytes: [0; Self::MAX_PARAM_BYTES],
            len: size_of::<P>(),
        };
        stored.bytes[..size_of::<P>()].copy_from_slice(bytemuck::bytes_of(params));
        Self {
            module,
            kernel,
            grid: [1; 3],
            block: [1; 3],
            cluster: [1; 3],
            shared_bytes: 0,
            params: stored,
            maps: [TensorMap::EMPTY; Self::MAX_MAPS],
            map_count: 0,
        }
    }

    /// Sets the blocks along x, y and z.
    pub fn grid(mut self, grid: [u32; 3]) -> Self {
        self.grid = grid;
        self
    }

    /// Sets the threads of a block along x, y and z.
    pub fn block(mut self, block: [u32; 3]) -> Self {
        self.block = block;
        self
    }

    /// Sets the blocks of a cluster.
    pub fn cluster(mut self, cluster: [u32; 3]) -> Self {
        self.cluster = cluster;
        self
    }

    /// Sets the bytes of dynamic shared memory.
    pub fn shared(mut self, bytes: u32) -> Self {
        self.shared_bytes = bytes;
        self
    }

    /// Adds a tensor map, the kernel's next argument. A fifth one is remembered as too many, and the launch refused.
    pub fn map(mut self, map: TensorMap) -> Self {
        if let Some(slot) = self.maps.get_mut(self.map_count as usize) {
            *slot = map;
        }
        self.map_count += 1;
        self
    }

    /// The kernel's first argument, byte for byte.
    pub fn params(&self) -> &[u8] {
        &self.params.bytes[..self.params.len]
    }

    /// The kernel's further arguments, in order.
    pub fn tensor_maps(&self) -> &[TensorMap] {
        &self.maps[..(self.map_count as usize).min(Self::MAX_MAPS)]
    }

    /// Whether there is nothing to launch: some side of the grid is zero.
    pub fn is_empty(&self) -> bool {
        self.grid.contains(&0)
    }

    /// Whether more maps were added than fit.
    pub(crate) fn has_too_many_maps(&self) -> bool {
        self.map_count as usize > Self::MAX_MAPS
    }
}
