//! Any ids, experts and alignment against the reference: the same permutation, or a refusal that changes nothing.

use super::bytes::Bytes;
use moe_kernels::permute::{NO_PAIR, NO_ROW, Permutation, PermuteOptions};
use moe_kernels::{Cpu, reference};

pub fn run(data: &[u8]) {
    let mut d = Bytes(data);
    let cpu = Cpu::new().single_threaded();
    let mut p = Permutation::default();
    // One permutation sorts again and again, so that what an earlier call left is seen.
    for _ in 0..3 {
        sort(&mut d, &cpu, &mut p);
    }
}

fn sort(d: &mut Bytes<'_>, cpu: &Cpu, p: &mut Permutation) {
    let experts = d.pick(&[1, 2, 5, 8, 40, 130, 0, usize::MAX]);
    let spread = 1 + d.below(experts.clamp(1, 130));
    let num_null = d.pick(&[0, 0, 0, 3, usize::MAX]);
    let pairs = 3 * usize::from(d.u8());
    let ids: Vec<i32> = (0..pairs)
        .map(|_| match d.u8() {
            255 => d.u32() as i32,
            0..=9 => -1,
            v => (usize::from(v) % (spread + num_null.min(1))) as i32,
        })
        .collect();
    let first = d.below(experts.min(200) + 2);
    let options = PermuteOptions {
        block: d.pick(&[1, 1, 1, 2, 7, 64, 0, usize::MAX]),
        local: d.rarely(2).then(|| first..d.below(experts.min(200) + 2)),
        num_null,
    };
    let before = p.clone();
    let found = p.sort(cpu, &ids, experts, &options);
    let limit = experts.saturating_add(num_null);
    let local = options.local.clone().unwrap_or(0..experts);
    let ids_hold = ids
        .iter()
        .all(|&id| id == -1 || usize::try_from(id).is_ok_and(|id| id < limit));
    let options_hold = (1..=i32::MAX as usize).contains(&experts)
        && options.block > 0
        && local.start <= local.end
        && local.end <= experts;
    if !(ids_hold && options_hold) {
        assert!(found.is_err(), "{ids:?}, {experts} experts, {options:?}");
    }
    if found.is_err() {
        // A block that is all of memory fits only where nothing has to be padded.
        assert!(
            !(ids_hold && options_hold) || options.block == usize::MAX,
            "{found:?}: {ids:?}, {experts} experts, {options:?}"
        );
        assert_eq!(
            format!(
                "{:?}",
                (p.offsets(), p.counts(), p.pair_of_row(), p.row_of_pair())
            ),
            format!(
                "{:?}",
                (
                    before.offsets(),
                    before.counts(),
                    before.pair_of_row(),
                    before.row_of_pair()
                )
            )
        );
        return;
    }
    if options.block == usize::MAX {
        assert_eq!(p.num_rows(), 0);
        return;
    }
    check(p, &ids, local, options.block);
}

fn check(p: &Permutation, ids: &[i32], local: std::ops::Range<usize>, block: usize) {
    let expected = reference::permute(ids, local.clone(), block);
    assert_eq!(p.offsets()[local.start..=local.end], expected.offsets);
    assert!(p.offsets()[..local.start].iter().all(|&o| o == 0));
    assert!(p.offsets()[local.end..].iter().all(|&o| o == p.num_rows()));
    let narrow = |v: &[i64], none: u32| -> Vec<u32> {
        v.iter()
            .map(|&n| u32::try_from(n).unwrap_or(none))
            .collect()
    };
    assert_eq!(p.pair_of_row(), narrow(&expected.pair_of_row, NO_PAIR));
    assert_eq!(p.row_of_pair(), narrow(&expected.row_of_pair, NO_ROW));
    for (e, &count) in p.counts().iter().enumerate() {
        let wanted = ids
            .iter()
            .filter(|&&id| usize::try_from(id) == Ok(e) && local.contains(&e))
            .count();
        assert_eq!(count, wanted, "expert {e}");
    }
}
