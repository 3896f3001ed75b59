//! Sorting pairs by expert on the GPU, and copies of rows, against the CPU: equal, element by element.
#![cfg(feature = "cuda")]

#[path = "../common/gpu.rs"]
mod gpu;

mod plans;
mod rows;

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
    let sizes = |buffer| -> Vec<usize> {
        let sizes: Vec<i32> = gpu.download(buffer);
        sizes.into_iter().map(|n| n as usize).collect()
    };
    assert_eq!(sizes(&sorted.offsets), expected.offsets(), "offsets");
    assert_eq!(sizes(&sorted.counts), expected.counts(), "counts");
    let pair_of_row = gpu.download(&sorted.pair_of_row);
    let (rows, beyond) = pair_of_row.split_at(expected.num_rows());
    assert_same("pair_of_row", rows, expected.pair_of_row());
    assert!(
        beyond.iter().all(|&pair| pair == NO_PAIR),
        "beyond the last row"
    );
    let row_of_pair = gpu.download(&sorted.row_of_pair);
    assert_same("row_of_pair", &row_of_pair, expected.row_of_pair());
}

/// Fails with the first difference alone: there may be millions.
#[track_caller]
fn assert_same(what: &str, found: &[u32], expected: &[u32]) {
    let mut pairs = found.iter().zip(expected).enumerate();
    let first = pairs.find(|(_, (f, e))| f != e);
    assert!(found == expected, "{what}: first difference at {first:?}");
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
                (1, 0) => any,
                (1, _) => any % 3,
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

fn in_blocks(block: usize) -> PermuteOptions {
    PermuteOptions {
        block,
        ..PermuteOptions::default()
    }
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
    let options = in_blocks(2);
    for path in BOTH {
        let p = sort(&gpu, path, &[2, 0, 2, 3, 0, 2], 4, &options, 0);
        assert_eq!(gpu.download(&p.offsets), [0, 2, 2, 6, 8]);
        assert_eq!(gpu.download(&p.counts), [2, 0, 3, 1]);
        let expected = [1, 4, 0, 2, 5, NO_PAIR, 3, NO_PAIR, NO_PAIR, NO_PAIR];
        let rows = max_rows(6, 4, &options).unwrap();
        assert_eq!(gpu.download(&p.pair_of_row), expected[..rows]);
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
                check(&gpu, path, &ids, 7, &in_blocks(4), 0);
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
    let options = in_blocks(16);
    let len = ONE_LAUNCH_PAIRS + 1000;
    for (len, experts, skew, seed, shift) in [
        (40_000, 4096, 0, 5, 0),
        (len, 4096, 1, 6, 0),
        (len, 60, 3, 7, 1),
    ] {
        let (path, ids) = (PermutePath::for_pairs(len), ids(len, experts, skew, seed));
        check(&gpu, path, &ids, experts, &options, shift);
    }
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
        &in_blocks(128),
        0,
    );
}
