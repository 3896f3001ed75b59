//! What plans refuse, and how much memory they want.

use super::*;

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
    let plan = |pairs, experts, options: &PermuteOptions, pointers| {
        plan_permute(pairs, experts, options, &pointers, info).map(drop)
    };
    let fine = PermuteOptions::default();
    let refused = |name: &str, pairs, experts, options: &PermuteOptions, pointers| match plan(
        pairs, experts, options, pointers,
    )
    .unwrap_err()
    {
        Error::Value { argument, .. } => assert_eq!(argument, name),
        Error::Overflow { what } => assert_eq!(what, name),
        other => panic!("{other}"),
    };
    plan(100, 8, &fine, pointers()).unwrap();
    refused("num_experts", 100, 0, &fine, pointers());
    refused("num_experts", 100, 4097, &fine, pointers());
    refused("rows as i32", 1 << 31, 8, &fine, pointers());
    refused("block", 100, 8, &in_blocks(0), pointers());
    refused("rows as u32", 100, 8, &in_blocks(usize::MAX), pointers());
    let beyond = PermuteOptions {
        local: Some(0..9),
        ..fine.clone()
    };
    refused("local", 100, 8, &beyond, pointers());
    let nowhere = PermutePointers {
        ids: DevicePtr::NULL,
        ..pointers()
    };
    refused("ids", 100, 8, &fine, nowhere);
    let misaligned = PermutePointers {
        row_of_pair: DevicePtr(0x1002),
        ..pointers()
    };
    refused("row_of_pair", 100, 8, &fine, misaligned);
    let absent = PermutePointers {
        workspace: DevicePtr::NULL,
        ..pointers()
    };
    plan(ONE_LAUNCH_PAIRS, 8, &fine, absent).unwrap();
    refused("workspace", ONE_LAUNCH_PAIRS + 1, 8, &fine, absent);
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
