//! What the benchmarks rest on: loads that are what they say, a roof that is the longer time, dates, and a layer whose answers are checked.
#![allow(missing_docs)]

#[path = "../benches/support/mod.rs"]
mod support;

use moe_kernels::routing::{RouteInput, Router, RouterConfig, Routing};
use moe_kernels::{Cpu, DType, MatRef};
use std::time::{Duration, UNIX_EPOCH};
use support::host;
use support::layer::measure::Ceilings;
use support::layer::seeded::Seeded;
use support::layer::source;
use support::load::Load;
use support::roof::Bound;
use support::shapes;
use support::subject::{Batch, Subject};

/// Pairs of each expert, most popular first.
fn popularity(load: Load, tokens: usize, experts: usize, k: usize) -> Vec<usize> {
    let logits = load.logits(3, 0, tokens, experts);
    let router = Router::new(RouterConfig::mixtral(experts, k)).unwrap();
    let mut routing = Routing::with_capacity(tokens, &router).unwrap();
    let input = RouteInput::new(MatRef::new(&logits, tokens, experts).unwrap());
    router.route(&Cpu::new(), &input, &mut routing).unwrap();
    let mut counts = routing.permutation().counts().to_vec();
    counts.sort_unstable_by(|a, b| b.cmp(a));
    counts
}

#[test]
fn loads_are_uniform_or_zipf() {
    let (tokens, experts) = (40_000, 8);
    let harmonic: f64 = (1..=experts).map(|r| 1.0 / r as f64).sum();
    for (load, p) in [
        (Load::Uniform, vec![1.0 / experts as f64; experts]),
        (
            Load::Zipf,
            (1..=experts).map(|r| 1.0 / (harmonic * r as f64)).collect(),
        ),
    ] {
        for (count, p) in popularity(load, tokens, experts, 1).into_iter().zip(p) {
            let deviation = (tokens as f64 * p * (1.0 - p)).sqrt();
            let off = (count as f64 - tokens as f64 * p).abs();
            assert!(off < 5.0 * deviation, "{load}: {count} for p = {p}");
        }
    }
}

#[test]
fn batches_do_not_depend_on_their_size() {
    let (one, two) = (
        Load::Zipf.logits(0, 6, 1, 16),
        Load::Zipf.logits(0, 5, 2, 16),
    );
    assert_eq!(one, two[16..]);
}

#[test]
fn dates_follow_the_calendar() {
    for (days, date) in [
        (0, "1970-01-01"),
        (59, "1970-03-01"),
        (11_016, "2000-02-29"),
        (11_017, "2000-03-01"),
        (19_782, "2024-02-29"),
        (20_818, "2026-12-31"),
        (47_540, "2100-02-28"),
        (47_541, "2100-03-01"),
    ] {
        let time = UNIX_EPOCH + Duration::from_secs(86_400 * days + 86_399);
        assert_eq!(host::date(time), date);
    }
}

#[test]
fn every_shape_has_a_name_and_an_unknown_one_lists_them() {
    for name in shapes::NAMES {
        assert!(shapes::named(name).is_ok_and(|shape| shape.shared.is_none()));
    }
    let why = shapes::named("gpt-5").expect_err("unknown").0;
    assert!(shapes::NAMES.iter().all(|name| why.contains(name)), "{why}");
}

#[test]
fn the_subject_is_checked_and_its_roof_is_the_longer_time() {
    let cpu = Cpu::new();
    let shape = shapes::named("tiny").unwrap();
    for dtype in DType::ALL {
        let mut seeded = Seeded {
            architecture: shape.clone(),
            seed: 1,
            dtype,
        };
        let built = source::build(&cpu, &shape, &mut seeded, dtype, &mut std::io::sink()).unwrap();
        let mut subject = Subject::new(&cpu, &built, &shape, dtype, 9).unwrap();
        let batch = Batch::new(&shape, dtype, Load::Zipf, 1, 0, 9);
        subject.check(&batch, &mut seeded, 9).unwrap();
        let work = subject.work(&batch);
        assert_eq!(work.flops, (2 * 9 * 2 * 3 * 64 * 48) as f64);
        for (bandwidth, bound) in [(1.0, Bound::Bytes), (f64::INFINITY, Bound::Flops)] {
            let ceilings = Ceilings {
                fma_peak: 1e9,
                bf16_dot_peak: Some(2e9),
                read_bandwidth: bandwidth,
            };
            let roof = work.roof(&ceilings, dtype);
            let peak = if dtype == DType::BF16 { 2e9 } else { 1e9 };
            assert_eq!(roof.bound, bound);
            assert_eq!(
                roof.seconds,
                (work.flops / peak).max(work.bytes / bandwidth)
            );
        }
        // Another layer's weights: the check must notice.
        seeded.seed = 2;
        assert!(subject.check(&batch, &mut seeded, 9).is_err());
    }
}
