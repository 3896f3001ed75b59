//! Tensor-core products for Hopper (compute capability 9.0): plans for `kernels/grouped_gemm_sm90.cu`.
//!
//! One persistent block for each multiprocessor finds its tiles of 128 rows and 192 columns of B from the counts on the device: 96 columns of gate and the
//! same 96 of up where the product is gated, 192 columns otherwise. One warpgroup feeds a ring of five stages in shared memory (B by the tensor memory
//! accelerator; A too, or gathered row by row), two others take tiles in turn, so that one finishes and stores a tile while the other multiplies the next.
//!
//! # What it takes
//! bf16 or f16, A and weights alike; out in that format or in f32; N, K and all row strides multiples of 8 elements, addresses multiples of 16 bytes, and
//! weights in one allocation, whatever its strides: separate gate and up, halves of one matrix, alternating rows. [`plan_grouped_gemm_sm90`] refuses the rest
//! with an [`Error`] that names it; the sm_80 kernels take it all and run on the same device.
//!
//! # Experts in an allocation each
//! A tensor map describes one allocation, so tables of addresses ([`Placement::Table`](super::Placement::Table)) go to the sm_80 kernels. The other way would be an array of maps in
//! device memory, one for each expert and half, from which the producer takes that of its tile. It would keep wgmma, but only the driver can encode a map, for the boxes of this very
//! kernel: a table would no longer be addresses that any framework can write, its plan no longer arithmetic, and E·2 descriptors of 128 bytes would go through the descriptor cache
//! in place of two. What that costs cannot be said without a GPU. Few rows lose nothing by it: the kernels for those do not use TMA. For many, put experts into one allocation.
//!
//! # Clusters
//! With more than one row tile an expert, two blocks form a cluster: they take neighbouring row tiles and the same columns, and each fetches half of B for
//! both. That lowers the traffic from L2 from 53 to 37 bytes a cycle and multiprocessor, less than the 40 or so that an H100's L2 gives. An odd last row tile is
//! taken by both, with neighbouring columns, so nobody idles. [`CLUSTER_ROWS`] rows for each expert on average are the threshold: below it most experts have one
//! row tile, nothing could be shared, and memory sets the pace.
//!
//! # Bits
//! An element is one chain of 16-wide steps in ascending k, in f32, whatever the tile's place, the cluster or the grid: the same bits alone and in any
//! batch (D1, D2). They are not those of the CPU or of the sm_80 kernels, since the hardware sums 16 products in its own order.

use super::params::{Flags, GroupedGemmParams};
use crate::cuda::plan::{DeviceInfo, DevicePtr, Launch, Module, Swizzle, TensorMap};
use crate::element::DType;
use crate::error::{Error, Result};

/// Rows of a tile (`TILE_M` there).
pub const TILE_ROWS: usize = 128;
/// Rows of B in a tile, gate and up together (`TILE_N` there).
pub const TILE_COLUMNS: usize = 192;
/// Elements of k in a stage (`TILE_K` there).
pub const TILE_K: usize = 64;
/// From this many rows for each expert on average, two blocks share their tiles of B.
pub const CLUSTER_ROWS: usize = 192;

/// Rows of one box of B.
const BOX_ROWS: usize = TILE_COLUMNS / 2;
/// A producing and two multiplying warpgroups.
const THREADS: u32 = 384;
/// `SHARED_BYTES` there: five stages of 40 KiB, four mailboxes with their side tables, barriers.
const SHARED_BYTES: u32 = 5 * 40960 + 4 * 16 + 4 * 1280 + (10 + 8 + 2) * 8;
/// Every address and stride of the tensor memory accelerator.
const ALIGNMENT: u64 = 16;
/// Bytes of an element of A and B.
const ELEMENT: u64 = 2;

/// Plans a grouped product on Hopper. `params` describe it, already checked as a product of any kernel.
///
/// # Errors
/// [`Error::Value`] naming what these kernels do not take, as the [module](self) lists it; [`Error::Overflow`] for more than 2³¹ tiles.
pub fn plan_grouped_gemm_sm90(params: &GroupedGemmParams, device: &DeviceInfo) -> Result<Launch> {
    let blocks_per_cluster = cluster_for(params.rows as usize, params.experts as usize, device);
    plan_with_cluster(params, blocks_per_cluster, device)
}

/// Blocks of a cluster, by the rule of the [module](self): 1 or 2. `rows` of the output, the most that there may be.
pub fn cluster_for(rows: usize, experts: usize, device: &DeviceInfo) -> u32 {
    let shared = rows / CLUSTER_ROWS >= experts.max(1) && device.sm_count >= 2;
    if shared { 2 } else { 1 }
}

/// [`plan_grouped_gemm_sm90`] with clusters of one's own choice, 1 or 2. The bits are the same.
///
/// # Errors
/// As [`plan_grouped_gemm_sm90`].
pub fn plan_with_cluster(
    params: &GroupedGemmParams,
    cluster: u32,
    device: &DeviceInfo,
) -> Result<Launch> {
    check_device(cluster, device)?;
    let dtype = check_formats(params)?;
    check_layout(params)?;
    let gated = params.activation.gated != 0;
    let units = units(params, gated)?;
    let clusters = (device.sm_count / cluster).min(units);
    let up = weights(
        params.up,
        params.up_row_stride,
        params.up_expert_stride,
        dtype,
        params,
    );
    let gate = match gated {
        true => weights(
            params.gate,
            params.gate_row_stride,
            params.gate_expert_stride,
            dtype,
            params,
        ),
        false => up,
    };
    // A gathered A has no map: its rows are copied one by one.
    let a = if params.pair_of_row.is_null() {
        rows_of_a(params, dtype)
    } else {
        up
    };
    let kernel = match (dtype, gated) {
        (DType::F16, true) => "moe_grouped_gemm_sm90_f16_gated",
        (DType::F16, false) => "moe_grouped_gemm_sm90_f16_plain",
        (_, true) => "moe_grouped_gemm_sm90_bf16_gated",
        (_, false) => "moe_grouped_gemm_sm90_bf16_plain",
    };
    Ok(Launch::new(Module::GroupedGemmSm90, kernel, params)
        .grid([clusters * cluster, 1, 1])
        .block([THREADS, 1, 1])
        .cluster([cluster, 1, 1])
        .shared(SHARED_BYTES)
        .map(a)
        .map(gate)
        .map(up))
}

fn check_device(cluster: u32, device: &DeviceInfo) -> Result<()> {
    if device.compute_capability != (9, 0) {
        let found = device.compute_capability;
        return Err(Error::value(
            "device",
            "compute capability 9.0",
            format_args!("{}.{}", found.0, found.1),
        ));
    }
    if device.shared_per_block < SHARED_BYTES {
        let expected = format!("{SHARED_BYTES} bytes of shared memory a block");
        return Err(Error::value("device", expected, device.shared_per_block));
    }
    if !(1..=2).contains(&cluster) || device.sm_count < cluster {
        return Err(Error::value(
            "cluster",
            "1 or 2, and so many multiprocessors",
            cluster,
        ));
    }
    Ok(())
}

/// The format of A and the weights.
fn check_formats(params: &GroupedGemmParams) -> Result<DType> {
    let dtype = match DType::ALL.get(params.a_dtype as usize) {
        Some(&dtype) if dtype != DType::F32 => dtype,
        _ => {
            return Err(Error::value(
                "a",
                "bf16 or f16 for the kernels of Hopper",
                "another format",
            ));
        }
    };
    if params.w_dtype != params.a_dtype {
        return Err(Error::value(
            "weights",
            "the format of a for the kernels of Hopper",
            "another one",
        ));
    }
    if params.out_dtype != DType::F32 as u32 && params.out_dtype != params.a_dtype {
        return Err(Error::value(
            "out",
            "f32 or the format of a for the kernels of Hopper",
            "another format",
        ));
    }
    Ok(dtype)
}

/// What the copies of 16 bytes and the tensor maps need.
fn check_layout(params: &GroupedGemmParams) -> Result<()> {
    if params.flags & Flags::WEIGHT_TABLES != 0 {
        let expected = "weights in one allocation for the kernels of Hopper (the sm_80 kernels take a table of addresses)";
        return Err(Error::value("weights", expected, "a table of addresses"));
    }
    let multiple_of_8 = |argument, value: u64| match value % 8 {
        0 if value > 0 => Ok(()),
        _ => Err(Error::value(
            argument,
            "a multiple of 8 elements for the kernels of Hopper",
            value,
        )),
    };
    multiple_of_8("n", params.n.into())?;
    multiple_of_8("k", params.k.into())?;
    let gated = params.activation.gated != 0;
    let gathered = !params.pair_of_row.is_null();
    let strides = [
        ("a.row_stride", params.a_row_stride, true),
        ("up.row_stride", params.up_row_stride, true),
        (
            "up.expert_stride",
            params.up_expert_stride,
            params.experts > 1,
        ),
        ("gate.row_stride", params.gate_row_stride, gated),
        (
            "gate.expert_stride",
            params.gate_expert_stride,
            gated && params.experts > 1,
        ),
        ("out.row_stride", params.out_row_stride, true),
    ];
    for (argument, stride, used) in strides {
        if used {
            multiple_of_8(argument, stride.max(0) as u64)?;
            // The tensor memory accelerator's limit; gathered rows are addressed by 32 bits.
            let limit = if argument == "a.row_stride" && gathered {
                1 << 32
            } else {
                1u64 << 40
            };
            if stride as u64 >= limit / ELEMENT {
                return Err(Error::value(
                    argument,
                    format_args!("below {} elements", limit / ELEMENT),
                    stride,
                ));
            }
        }
    }
    for (argument, pointer, used) in [
        ("a", params.a, true),
        ("up", params.up, true),
        ("gate", params.gate, gated),
        ("out", params.out, true),
    ] {
        if used && (pointer.is_null() || !pointer.is_aligned(ALIGNMENT)) {
            return Err(Error::value(
                argument,
                "an address that is a multiple of 16 for the kernels of Hopper",
                format_args!("{:#x}", pointer.0),
            ));
        }
    }
    if gathered && params.slots == 0 {
        return Err(Error::value("slots", "at least 1", 0));
    }
    Ok(())
}

/// The most units of the schedule (`kernels/include/sm90_schedule.cuh`) that there can be, whatever the counts.
fn units(params: &GroupedGemmParams, gated: bool) -> Result<u32> {
    let columns = if gated { BOX_ROWS } else { TILE_COLUMNS } as u64;
    let column_tiles = u64::from(params.n).div_ceil(columns);
    let rows = u64::from(params.rows);
    // Full row tiles, and a last one for each expert that has rows.
    let row_tiles = rows / TILE_ROWS as u64 + u64::from(params.experts).min(rows);
    match row_tiles.checked_mul(column_tiles) {
        Some(units) if units < 1 << 31 => Ok(units as u32),
        _ => Err(Error::Overflow {
            what: "tiles of the product",
        }),
    }
}

/// `[E, N, K]` in boxes of 96 rows by 64 of k, as wgmma reads them.
fn weights(
    ptr: DevicePtr,
    row_stride: i64,
    expert_stride: i64,
    dtype: DType,
    params: &GroupedGemmParams,
) -> TensorMap {
    let row = row_stride as u64 * ELEMENT;
    // The stride of a single expert means nothing, but the driver wants a good one.
    let expert = if params.experts > 1 {
        expert_stride as u64 * ELEMENT
    } else {
        row
    };
    TensorMap {
        address: ptr,
        dtype,
        rank: 3,
        dims: [
            params.k.into(),
            params.n.into(),
            params.experts.into(),
            0,
            0,
        ],
        strides: [row, expert, 0, 0],
        boxes: [TILE_K as u32, BOX_ROWS as u32, 1, 0, 0],
        swizzle: Swizzle::Bytes128,
    }
}

/// `[rows, K]` in boxes of 128 rows by 64 of k.
fn rows_of_a(params: &GroupedGemmParams, dtype: DType) -> TensorMap {
    TensorMap {
        address: params.a,
        dtype,
        rank: 2,
        dims: [params.k.into(), params.a_rows.into(), 0, 0, 0],
        strides: [params.a_row_stride as u64 * ELEMENT, 0, 0, 0],
        boxes: [TILE_K as u32, TILE_ROWS as u32, 0, 0, 0],
        swizzle: Swizzle::Bytes128,
    }
}
