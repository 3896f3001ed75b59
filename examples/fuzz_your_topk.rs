//! `cargo run --release --features proptest --example fuzz_your_topk`: fuzzing somebody's kernel against this crate's reference.
//!
//! Three implementations of top-k meet [`moe_kernels::strategies`]: two with bugs that are common in the field and one that is right. For each bug the smallest
//! input that shows it is printed. Replace `candidates` with your own kernel. Exits with 0 when both bugs are found and the right one passes.

use moe_kernels::reference;
use moe_kernels::strategies::{Logits, logits};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestError, TestRunner};
use std::cmp::Ordering;
use std::process::ExitCode;

/// A top-k under test: the indices of the k best of a row, best first.
type TopK = fn(&[f32], usize) -> Vec<usize>;

/// Bug: `>=` lets the last of equal values win. Frameworks disagree about ties exactly so.
fn ties_to_the_higher_index(row: &[f32], k: usize) -> Vec<usize> {
    choose(row, k, |a, b| a >= b || b.is_nan())
}

/// Bug: a NaN wins no comparison, but loses none either; as the first candidate it stays.
fn nan_stays(row: &[f32], k: usize) -> Vec<usize> {
    choose(row, k, |a, b| a > b)
}

/// Right: a sort that keeps the order of equals, NaN behind −∞, −0 as 0.
fn right(row: &[f32], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|&a, &b| {
        let (a, b) = (row[a], row[b]);
        b.partial_cmp(&a)
            .unwrap_or_else(|| match (a.is_nan(), b.is_nan()) {
                (true, false) => Ordering::Greater,
                (false, true) => Ordering::Less,
                _ => Ordering::Equal,
            })
    });
    order.truncate(k);
    order
}

/// Takes k times the element that `beats` all before it.
fn choose(row: &[f32], k: usize, beats: fn(f32, f32) -> bool) -> Vec<usize> {
    let mut left: Vec<usize> = (0..row.len()).collect();
    let mut chosen = Vec::new();
    while chosen.len() < k && !left.is_empty() {
        let mut best = 0;
        for i in 1..left.len() {
            if beats(row[left[i]], row[left[best]]) {
                best = i;
            }
        }
        chosen.push(left.remove(best));
    }
    chosen
}

/// The first difference from the reference that proptest finds, shrunk; `None` when there is none in 2000 cases.
fn fuzz(top_k: TopK) -> Option<(Logits, usize)> {
    // The same cases in every run, and no file of failures.
    let config = Config {
        cases: 2000,
        failure_persistence: None,
        ..Config::default()
    };
    let mut runner = TestRunner::new_with_rng(
        config,
        proptest::test_runner::TestRng::deterministic_rng(Default::default()),
    );
    let result = runner.run(&(logits(1..=3, 1..=40), 1usize..=8), |(logits, k)| {
        let k = k.min(logits.experts);
        for row in logits.rows() {
            let wide: Vec<f64> = row.iter().map(|&z| z.into()).collect();
            prop_assert_eq!(top_k(row, k), reference::top_k(&wide, &[], k));
        }
        Ok(())
    });
    match result {
        Ok(()) => None,
        Err(TestError::Fail(_, (logits, k))) => Some((logits, k)),
        Err(TestError::Abort(why)) => {
            eprintln!("proptest gave up: {why}");
            None
        }
    }
}

fn main() -> ExitCode {
    let candidates: [(&str, TopK, bool); 3] = [
        ("ties to the higher index", ties_to_the_higher_index, true),
        ("a NaN stays first", nan_stays, true),
        ("right", right, false),
    ];
    let mut as_planned = true;
    for (name, top_k, has_bug) in candidates {
        let found = fuzz(top_k);
        as_planned &= found.is_some() == has_bug;
        let Some((logits, k)) = found else {
            println!("{name}: 2000 cases, no difference from the reference");
            continue;
        };
        println!(
            "{name}: differs, shrunk to {} row(s) of {} and k = {k}",
            logits.tokens(),
            logits.experts
        );
        for row in logits.rows() {
            let k = k.min(row.len());
            let wide: Vec<f64> = row.iter().map(|&z| z.into()).collect();
            let (found, expected) = (top_k(row, k), reference::top_k(&wide, &[], k));
            println!("    {row:?} gave {found:?}, the reference has {expected:?}");
        }
    }
    if as_planned {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
