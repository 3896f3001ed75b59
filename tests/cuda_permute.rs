//! Sorting pairs by expert on the GPU, and copies of rows, against the CPU: equal, element by element.
#![cfg(feature = "cuda")]

#[path = "common/gpu.rs"]
mod gpu;

use gpu::{Buffer, Gpu};
use half::{bf16, f16};
use moe_kernels::cuda::permute::*;
use moe_kernels::cuda::{DeviceInfo, DevicePtr};
use moe_kernels::permute::{
    NO_PAIR, Permutation, PermuteOptions, permute_rows_into, unpermute_rows_into,
};
use moe_kernels::{AnyMatMut, AnyMatRef, Cpu, DType, Element, Error, MatMut, MatRef};
use proptest::prelude::*;

const BOTH: [PermutePath; 2] = [PermutePath::OneLaunch, PermutePath::ThreeLaunches];

/// A permutation on the device, and its outputs on the host.
struct Sorted {
    offsets: Buffer<i32>,
    pair_of_row: Buffer<u32>,
    row_of_pair: Buffer<u32>,
    counts: Buffer<i32>,
}

/// Sorts on the GPU. Outputs and workspace are poisoned before; `shift` ids lie before the first, so that it is not at 16 bytes.
fn sort(
    gpu: &Gpu,
    path: PermutePath,
    ids: &[i32],
    num_experts: usize,
    options: &PermuteOptions,
    shift: usize,
) -> Sorted {
    let info = gpu.cuda.device_info();
    let mut shifted = vec![7; shift];
    shifted.extend_from_slice(ids);
    let ids_buffer = gpu.upload(&shifted);
    let bytes = workspace_size_by(path, ids.len(), num_experts, options, info).unwrap();
    let workspace = gpu.filled::<u8>(bytes, 0xab);
    let sorted = Sorted {
        offsets: gpu.filled(num_experts + 1, 0xab),
        counts: gpu.filled(num_experts, 0xab),
        pair_of_row: gpu.filled(max_rows(ids.len(), num_experts, options).unwrap(), 0xab),
        row_of_pair: gpu.filled(ids.len(), 0xab),
    };
    let pointers = PermutePointers {
        ids: ids_buffer.ptr().add(4 * shift as u64),
        counts: sorted.counts.ptr(),
        offsets: sorted.offsets.ptr(),
        pair_of_row: sorted.pair_of_row.ptr(),
        row_of_pair: sorted.row_of_pair.ptr(),
        workspace: workspace.ptr(),
    };
    let plan = plan_permute_by(path, ids.len(), num_experts, options, &pointers, info).unwrap();
    assert_eq!(
        plan.len(),
        if path == PermutePath::OneLaunch { 1 } else { 3 }
    );
    for launch in plan.iter() {
        gpu.launch(launch);
    }
    gpu.synchronize(); // the workspace is freed here
    sorted
}

/// What the CPU says. Ids that it refuses are −1 for it: the GPU passes them over.
fn on_cpu(ids: &[i32], num_experts: usize, options: &PermuteOptions) -> Permutation {
    let limit = (num_experts + options.num_null) as i32;
    let ids: Vec<i32> = (ids.iter())
        .map(|&id| if (0..limit).contains(&id) { id } else { -1 })
        .collect();
    let mut p = Permutation::default();
    p.sort(&Cpu::new(), &ids, num_experts, options).unwrap();
    p
}

fn check(
    gpu: &Gpu,
    path: PermutePath,
    ids: &[i32],
    experts: usize,
    options: &PermuteOptions,
    shift: usize,
) {
    let expected = on_cpu(ids, experts, options);
    let sorted = sort(gpu, path, ids, experts, options, shift);
    let as_usize = |v: Vec<i32>| v.into_iter().map(|n| n as usize).collect::<Vec<_>>();
    assert_eq!(
        as_usize(gpu.download(&sorted.offsets)),
        expected.offsets(),
        "offsets"
    );
    assert_eq!(
        as_usize(gpu.download(&sorted.counts)),
        expected.counts(),
        "counts"
    );
    let pair_of_row = gpu.download(&sorted.pair_of_row);
    let (rows, beyond) = pair_of_row.split_at(expected.num_rows());
    assert!(
        rows == expected.pair_of_row(),
        "pair_of_row: first difference at {:?}",
        first_difference(rows, expected.pair_of_row())
    );
    assert!(
        beyond.iter().all(|&pair| pair == NO_PAIR),
        "beyond the last row"
    );
    let row_of_pair = gpu.download(&sorted.row_of_pair);
    assert!(
        row_of_pair == expected.row_of_pair(),
        "row_of_pair: first difference at {:?}",
        first_difference(&row_of_pair, expected.row_of_pair())
    );
}

fn first_difference(a: &[u32], b: &[u32]) -> Option<(usize, u32, u32)> {
    (a.iter().zip(b).enumerate()).find_map(|(i, (&a, &b))| (a != b).then_some((i, a, b)))
}

/// Ids of all kinds: all experts alike, a few that take most, one that takes all, wrong ones, dropped ones, null experts.
fn ids(len: usize, experts: usize, skew: u8, seed: u64) -> Vec<i32> {
    let mut state = seed | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let one = (next() % experts as u64) as i32;
    (0..len)
        .map(|_| {
            let any = (next() % experts as u64) as i32;
            match (skew, next() % 16) {
                (0, _) => any,
                (1, n) => {
                    if n == 0 {
                        any
                    } else {
                        any % 3
                    }
                }
                (2, _) => one,
                (_, 0) => -1,
                (_, 1) => i32::MIN + any,
                (_, 2) => i32::MAX - any,
                (_, 3) => experts as i32 + any % 5,
                _ => any,
            }
        })
        .collect()
}

fn options(experts: usize, block: usize, local: (f64, f64), num_null: usize) -> PermuteOptions {
    let at = |x: f64| (x * (experts + 1) as f64) as usize;
    let local = match local {
        (a, _) if a < 0.4 => None,
        (a, b) => Some(at(a.min(b)).min(experts)..at(a.max(b)).min(experts)),
    };
    PermuteOptions {
        block,
        local,
        num_null,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) })]

    /// Chunks have 1024 pairs in one launch: a few of them.
    #[test]
    fn equals_the_cpu(
        len in prop_oneof![0..70usize, 1000..1050usize, 0..5000usize],
        experts in prop::sample::select(vec![1, 7, 31, 33, 64, 256, 513, 4096]),
        block in prop::sample::select(vec![1, 1, 2, 3, 16, 64, 128]),
        local in (0.0..1.0f64, 0.0..1.0f64),
        num_null in prop::sample::select(vec![0, 1, 4]),
        skew in 0..4u8,
        shift in 0..4usize,
        seed: u64,
    ) {
        let Some(gpu) = gpu::open() else { return Ok(()) };
        let options = options(experts, block, local, num_null);
        let ids = ids(len, experts, skew, seed);
        for path in BOTH {
            check(&gpu, path, &ids, experts, &options, shift);
        }
    }
}

#[test]
fn the_worked_example() {
    let Some(gpu) = gpu::open() else { return };
    for path in BOTH {
        let p = sort(
            &gpu,
            path,
            &[2, 0, 2, 3, 0, 2],
            4,
            &PermuteOptions {
                block: 2,
                ..Default::default()
            },
            0,
        );
        assert_eq!(gpu.download(&p.offsets), [0, 2, 2, 6, 8]);
        assert_eq!(gpu.download(&p.counts), [2, 0, 3, 1]);
        let expected = [1, 4, 0, 2, 5, NO_PAIR, 3, NO_PAIR, NO_PAIR, NO_PAIR];
        assert_eq!(
            gpu.download(&p.pair_of_row),
            expected[..max_rows(
                6,
                4,
                &PermuteOptions {
                    block: 2,
                    ..Default::default()
                }
            )
            .unwrap()]
        );
        assert_eq!(gpu.download(&p.row_of_pair), [2, 0, 3, 6, 1, 4]);
    }
}

/// One pair fewer than fills a step, a warp, a round, and one more.
#[test]
fn around_the_seams() {
    let Some(gpu) = gpu::open() else { return };
    for seam in [32, 64, 1024, 2048] {
        for len in [seam - 1, seam, seam + 1] {
            let ids = ids(len, 7, 3, len as u64);
            for path in BOTH {
                check(
                    &gpu,
                    path,
                    &ids,
                    7,
                    &PermuteOptions {
                        block: 4,
                        ..Default::default()
                    },
                    0,
                );
            }
        }
    }
}

#[test]
fn no_pairs_and_no_local_experts() {
    let Some(gpu) = gpu::open() else { return };
    for path in BOTH {
        for local in [None, Some(0..0), Some(3..3), Some(5..5), Some(2..4)] {
            for len in [0, 40] {
                let options = PermuteOptions {
                    block: 8,
                    local: local.clone(),
                    num_null: 0,
                };
                check(&gpu, path, &ids(len, 5, 0, 3), 5, &options, 0);
            }
        }
    }
}

/// Chunks of several rounds, in as many as the device wants, with all tables at their largest.
#[test]
fn three_launches_with_long_chunks() {
    let Some(gpu) = gpu::open() else { return };
    let options = PermuteOptions {
        block: 16,
        ..Default::default()
    };
    check(
        &gpu,
        PermutePath::for_pairs(40_000),
        &ids(40_000, 4096, 0, 5),
        4096,
        &options,
        0,
    );
    let len = ONE_LAUNCH_PAIRS + 1000;
    check(
        &gpu,
        PermutePath::for_pairs(len),
        &ids(len, 4096, 1, 6),
        4096,
        &options,
        0,
    );
    check(
        &gpu,
        PermutePath::for_pairs(len),
        &ids(len, 60, 3, 7),
        60,
        &options,
        1,
    );
}

/// A kernel's share of shared memory follows from the experts and is set once for all threads: whoever comes first, each gets as much as its launch needs. With more
/// than 2048 experts it has to be asked for; each round asks for more than the last.
#[test]
fn threads_sort_for_different_numbers_of_experts_at_once() {
    const THREADS: usize = 4;
    if gpu::open().is_none() {
        return;
    }
    let barrier = std::sync::Barrier::new(THREADS);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let barrier = &barrier;
            scope.spawn(move || {
                let gpu = gpu::open().expect("opened before");
                for round in 0..4 {
                    let experts = 2049 + 511 * round + 127 * ((thread + round) % THREADS);
                    let ids = ids(50, experts, 0, thread as u64);
                    barrier.wait();
                    check(
                        &gpu,
                        BOTH[round % 2],
                        &ids,
                        experts,
                        &PermuteOptions::default(),
                        0,
                    );
                }
            });
        }
    });
}

#[test]
fn a_million_pairs() {
    let Some(gpu) = gpu::open() else { return };
    let ids = ids((1 << 20) + 5, 256, 0, 11);
    assert_eq!(
        PermutePath::for_pairs(ids.len()),
        PermutePath::ThreeLaunches
    );
    check(
        &gpu,
        PermutePath::ThreeLaunches,
        &ids,
        256,
        &PermuteOptions {
            block: 128,
            ..Default::default()
        },
        0,
    );
}

/// Rows of `width` numbers with poison between them, copied there and back as the CPU does it.
fn copies<T: Element + bytemuck::Pod>(
    gpu: &Gpu,
    dtype: DType,
    width: usize,
    gap: usize,
    shift: usize,
) where
    for<'a> AnyMatMut<'a>: From<MatMut<'a, T>>,
    for<'a> AnyMatRef<'a>: From<MatRef<'a, T>>,
{
    let (tokens, slots, experts) = (9, 3, 4);
    let info = gpu.cuda.device_info();
    let options = PermuteOptions {
        block: 4,
        local: Some(1..4),
        num_null: 0,
    };
    let ids = ids(tokens * slots, experts, 0, width as u64);
    let expected = on_cpu(&ids, experts, &options);
    let sorted = sort(gpu, PermutePath::OneLaunch, &ids, experts, &options, 0);
    let stride = width + gap;
    let x: Vec<T> = (0..shift + tokens * stride)
        .map(|i| {
            bytemuck::pod_read_unaligned(&(i as u32 ^ 0x1234_5678).to_le_bytes()[..size_of::<T>()])
        })
        .collect();
    let x_buffer = gpu.upload(&x);
    let rows = max_rows(ids.len(), experts, &options).unwrap();
    let size = size_of::<T>();
    let out = gpu.filled::<u8>((shift + rows * stride) * size, 0xab);
    let back = gpu.filled::<u8>((shift + ids.len() * stride) * size, 0xab);
    let there = CopyRows {
        src: x_buffer.ptr().add((shift * size) as u64),
        src_rows: tokens,
        src_stride: stride,
        out: out.ptr().add((shift * size) as u64),
        out_stride: stride,
        index: sorted.pair_of_row.ptr(),
        rows,
        used: sorted.offsets.ptr().add(4 * experts as u64),
        divisor: slots,
        width,
        dtype,
    };
    let back_again = CopyRows {
        src: there.out,
        src_rows: rows,
        out: back.ptr().add((shift * size) as u64),
        index: sorted.row_of_pair.ptr(),
        rows: ids.len(),
        used: DevicePtr::NULL,
        divisor: 1,
        ..there
    };
    let aligned = (shift * size).is_multiple_of(16)
        && (width * size).is_multiple_of(16)
        && (gap * size).is_multiple_of(16);
    for copy in [&there, &back_again] {
        let launch = plan_copy_rows(copy, info).unwrap();
        let bytes = if aligned { 16 } else { size };
        assert_eq!(launch.kernel, format!("moe_permute_rows_{bytes}"));
        gpu.launch(&launch);
    }
    let poison: T = bytemuck::pod_read_unaligned(&vec![0xab; size]);
    let mut cpu_out = vec![poison; shift + rows * stride];
    let mut cpu_back = vec![poison; shift + ids.len() * stride];
    let view = |data: &mut [T], rows: usize, f: &dyn Fn(AnyMatMut<'_>)| {
        f(
            MatMut::with_row_stride(&mut data[shift..], rows, width, stride)
                .unwrap()
                .into(),
        );
    };
    let x_view = MatRef::with_strides(&x[shift..], tokens, width, stride, 1).unwrap();
    view(&mut cpu_out, expected.num_rows(), &|out| {
        permute_rows_into(&Cpu::new(), x_view.into(), &expected, slots, out).unwrap();
    });
    let out_view =
        MatRef::with_strides(&cpu_out[shift..], expected.num_rows(), width, stride, 1).unwrap();
    view(&mut cpu_back, ids.len(), &|back| {
        unpermute_rows_into(&Cpu::new(), out_view.into(), &expected, back).unwrap();
    });
    // Whole buffers: what lies between and beyond the rows is untouched.
    assert!(
        gpu.download(&out) == bytemuck::cast_slice::<T, u8>(&cpu_out),
        "rows of {width} {dtype}"
    );
    assert!(
        gpu.download(&back) == bytemuck::cast_slice::<T, u8>(&cpu_back),
        "pairs of {width} {dtype}"
    );
}

#[test]
fn rows_are_copied_there_and_back() {
    let Some(gpu) = gpu::open() else { return };
    for (width, gap, shift) in [
        (8, 0, 0),
        (8, 8, 8),
        (7, 1, 0),
        (1, 0, 1),
        (1024, 0, 0),
        (1032, 0, 0),
        (515, 3, 1),
        (16, 0, 1),
    ] {
        copies::<f32>(&gpu, DType::F32, width, gap, shift);
        copies::<f16>(&gpu, DType::F16, width, gap, shift);
        copies::<bf16>(&gpu, DType::BF16, width, gap, shift);
    }
}

fn pointers() -> PermutePointers {
    let at = |n: u64| DevicePtr(n << 20);
    PermutePointers {
        ids: at(1),
        counts: at(2),
        offsets: at(3),
        pair_of_row: at(4),
        row_of_pair: at(5),
        workspace: at(6),
    }
}

#[test]
fn plans_say_what_is_wrong() {
    let info = &DeviceInfo::H100;
    let plan = |pairs, experts, options: PermuteOptions, pointers| {
        plan_permute(pairs, experts, &options, &pointers, info).map(drop)
    };
    let argument = |result: Result<(), Error>| match result.unwrap_err() {
        Error::Value { argument, .. } => argument,
        Error::Overflow { what } => what,
        other => panic!("{other}"),
    };
    let fine = PermuteOptions::default;
    assert!(plan(100, 8, fine(), pointers()).is_ok());
    assert_eq!(argument(plan(100, 0, fine(), pointers())), "num_experts");
    assert_eq!(argument(plan(100, 4097, fine(), pointers())), "num_experts");
    assert_eq!(
        argument(plan(1 << 31, 8, fine(), pointers())),
        "rows as i32"
    );
    assert_eq!(
        argument(plan(
            100,
            8,
            PermuteOptions { block: 0, ..fine() },
            pointers()
        )),
        "block"
    );
    assert_eq!(
        argument(plan(
            100,
            8,
            PermuteOptions {
                block: usize::MAX,
                ..fine()
            },
            pointers()
        )),
        "rows as u32"
    );
    assert_eq!(
        argument(plan(
            100,
            8,
            PermuteOptions {
                local: Some(0..9),
                ..fine()
            },
            pointers()
        )),
        "local"
    );
    assert_eq!(
        argument(plan(
            100,
            8,
            fine(),
            PermutePointers {
                ids: DevicePtr::NULL,
                ..pointers()
            }
        )),
        "ids"
    );
    assert_eq!(
        argument(plan(
            100,
            8,
            fine(),
            PermutePointers {
                row_of_pair: DevicePtr(0x1002),
                ..pointers()
            }
        )),
        "row_of_pair"
    );
    let absent = PermutePointers {
        workspace: DevicePtr::NULL,
        ..pointers()
    };
    assert!(plan(ONE_LAUNCH_PAIRS, 8, fine(), absent).is_ok());
    assert_eq!(
        argument(plan(ONE_LAUNCH_PAIRS + 1, 8, fine(), absent)),
        "workspace"
    );
}

/// A workspace for the most pairs serves fewer; shared memory stays within what the smallest GPU has; the largest sizes do not overflow.
#[test]
fn workspaces_grow_and_shared_memory_fits() {
    for info in [DeviceInfo::A100, DeviceInfo::H100] {
        for experts in [1, 60, 256, 4096] {
            let options = PermuteOptions::default();
            let mut largest = 0;
            for pairs in (0..22)
                .flat_map(|n| [(1usize << n) + 3, (3 << n) - 1])
                .chain([i32::MAX as usize])
            {
                let bytes = workspace_size(pairs, experts, &options, &info).unwrap();
                // What the kernels use: a row of the table for each chunk, and the totals.
                let plan = plan_permute(pairs, experts, &options, &pointers(), &info).unwrap();
                if plan.len() == 3 {
                    let chunks = plan[0].grid[0] as usize;
                    assert!(
                        (chunks + 1) * experts * 4 <= bytes,
                        "{pairs} pairs of {experts}"
                    );
                }
                largest = largest.max(bytes);
                assert!(
                    plan.iter()
                        .all(|l| l.shared_bytes <= (99 << 10) - 1024 && l.grid[0] > 0)
                );
            }
            assert_eq!(
                largest,
                workspace_size(i32::MAX as usize, experts, &options, &info).unwrap()
            );
        }
    }
}
