//! What the benches of single stages share: seeded data and interleaved medians. They need no layer, and so nothing else of this folder.
#![allow(dead_code)] // each bench uses its own part

use std::time::{Duration, Instant};

/// `cargo test --benches` wants to know whether it runs, not how fast.
pub fn quick() -> bool {
    std::env::args().any(|arg| arg == "--test")
}

/// A small generator (SplitMix64).
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 24) as f32
    }
}

/// Roughly normal numbers: the sum of four uniforms, variance 1.
pub fn normals(seed: u64, n: usize) -> Vec<f32> {
    let mut rng = Rng(seed);
    let mut one = || (rng.unit() + rng.unit() + rng.unit() + rng.unit() - 2.0) * 1.732_050_8;
    (0..n).map(|_| one()).collect()
}

/// `[tokens, slots]` ids, distinct in a token.
pub fn distinct_ids(seed: u64, tokens: usize, experts: usize, slots: usize) -> Vec<i32> {
    let mut rng = Rng(seed);
    let mut all: Vec<i32> = (0..experts as i32).collect();
    let mut ids = Vec::new();
    for _ in 0..tokens {
        for slot in 0..slots {
            all.swap(slot, slot + rng.next() as usize % (experts - slot));
        }
        ids.extend_from_slice(&all[..slots]);
    }
    ids
}

/// Seconds of one call of each, the median of interleaved runs (first, second, …, first, …). Short calls are repeated inside a run.
pub fn medians(tokens: usize, calls: &mut [&mut dyn FnMut()]) -> Vec<f64> {
    let repeat = if quick() { 1 } else { (4096 / tokens).max(1) };
    let mut times = vec![Vec::new(); calls.len()];
    let end = Instant::now() + Duration::from_millis(if quick() { 1 } else { 600 });
    while Instant::now() < end || times[0].len() < 5 {
        for (times, call) in times.iter_mut().zip(calls.iter_mut()) {
            let start = Instant::now();
            (0..repeat).for_each(|_| call());
            times.push(start.elapsed().as_secs_f64() / repeat as f64);
        }
    }
    times
        .iter_mut()
        .map(|times| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        })
        .collect()
}
