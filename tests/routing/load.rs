//! Load statistics against the oracle.

use crate::setups;
use moe_kernels::routing::*;
use moe_kernels::{Cpu, Error, reference};

fn given(experts: usize, ids: &[i32]) -> Routing {
    let mut routing = Routing::new();
    let weights = vec![1.0; ids.len()];
    routing
        .set_given(&Cpu::new(), &GivenRouting::new(experts, 1, ids, &weights))
        .unwrap();
    routing
}

#[test]
fn statistics_are_those_of_the_oracle() {
    let mut reused = LoadStats::default();
    for setup in setups::all(3, 20, 4, 30, 1.0) {
        let routing = setup.route(&Cpu::new());
        let expected = reference::load_stats(routing.ids(), routing.num_experts());
        reused.replace(&routing);
        assert_eq!(reused, LoadStats::of(&routing));
        assert!(
            reused
                .counts()
                .iter()
                .copied()
                .eq(expected.counts.iter().map(|&c| c as u64))
        );
        assert_eq!(
            (reused.dropped(), reused.null()),
            (expected.dropped as u64, expected.null as u64)
        );
        assert_eq!(reused.tokens(), 30);
        for (e, fraction) in expected.fraction.iter().enumerate() {
            assert!((reused.fraction(e) - fraction).abs() < 1e-12);
        }
        assert!(
            (reused.entropy() - expected.entropy).abs() < 1e-9,
            "{}",
            setup.name
        );
        assert!(
            (reused.coefficient_of_variation() - expected.coefficient_of_variation).abs() < 1e-9
        );
    }
}

#[test]
fn balance_and_collapse_have_their_extremes() {
    let balanced = LoadStats::of(&given(4, &[0, 1, 2, 3]));
    assert!((balanced.entropy() - 4f64.ln()).abs() < 1e-15);
    assert_eq!(
        (
            balanced.coefficient_of_variation(),
            balanced.max_over_mean()
        ),
        (0.0, 1.0)
    );
    assert_eq!(balanced.unused().count(), 0);
    let collapsed = LoadStats::of(&given(4, &[2, 2, 2]));
    assert_eq!(
        (
            collapsed.entropy(),
            collapsed.max_over_mean(),
            collapsed.fraction(2)
        ),
        (0.0, 4.0, 1.0)
    );
    assert!((collapsed.coefficient_of_variation() - 3f64.sqrt()).abs() < 1e-15);
    assert!(collapsed.unused().eq([0, 1, 3]));
    for nothing in [
        LoadStats::of(&given(4, &[])),
        LoadStats::of(&given(4, &[DROPPED])),
        LoadStats::default(),
    ] {
        let numbers = [
            nothing.entropy(),
            nothing.coefficient_of_variation(),
            nothing.max_over_mean(),
            nothing.fraction(0),
        ];
        assert_eq!(numbers, [0.0; 4]);
    }
}

#[test]
fn calls_add_up() {
    let mut sum = LoadStats::of(&given(3, &[0, 1]));
    sum.add(&given(3, &[1, DROPPED])).unwrap();
    assert_eq!(
        (sum.counts(), sum.tokens(), sum.dropped(), sum.served()),
        (&[1, 2, 0][..], 4, 1, 3)
    );
    let before = sum.clone();
    assert!(matches!(
        sum.add(&given(4, &[3])),
        Err(Error::Value {
            argument: "routing",
            ..
        })
    ));
    assert_eq!(sum, before);
}

#[test]
fn the_monitor_sees_its_window() {
    let calls = [[0, 1, 3], [0, 0, 0], [3, 3, 0], [0, 0, 3], [2, 0, 0]];
    let mut monitor = LoadMonitor::new(4, 3).unwrap();
    for (n, ids) in calls.iter().enumerate() {
        monitor.observe(&given(4, ids)).unwrap();
        let window: Vec<Vec<usize>> = calls[(n + 1).saturating_sub(3)..=n]
            .iter()
            .map(|ids| reference::load_stats(ids, 4).counts)
            .collect();
        for e in 0..4 {
            assert_eq!(
                monitor.counts()[e],
                window.iter().map(|c| c[e] as u64).sum::<u64>()
            );
        }
        assert_eq!(monitor.is_full(), n >= 2);
        if n >= 2 {
            assert!(monitor.collapsed().eq(reference::idle_experts(&window)));
        } else {
            assert_eq!(monitor.collapsed().count(), 0);
        }
    }
    assert!((monitor.expected_idle() - 4.0 * 0.75f64.powi(9)).abs() < 1e-12);
    let before = monitor.clone();
    assert!(matches!(
        monitor.observe(&given(5, &[4])),
        Err(Error::Value {
            argument: "routing",
            ..
        })
    ));
    assert_eq!(monitor, before);
    assert!(matches!(
        LoadMonitor::new(0, 1),
        Err(Error::Value {
            argument: "num_experts",
            ..
        })
    ));
    assert!(matches!(
        LoadMonitor::new(1, 0),
        Err(Error::Value {
            argument: "window",
            ..
        })
    ));
    assert!(matches!(
        LoadMonitor::new(usize::MAX, 2),
        Err(Error::Overflow { .. })
    ));
    assert!(matches!(
        LoadMonitor::new(usize::MAX / 4, 2),
        Err(Error::Overflow { .. })
    ));
}
