//! The whole layer at the shapes of published models.
//!
//! `cargo bench --bench moe` runs all; `-- --quick` takes about a tenth of the time, `-- olmoe` selects by name. Weights and tokens are seeded as in
//! `examples/layer.rs`, whose check against the f64 reference runs before anything is timed.

#![allow(missing_docs)] // criterion's macros make public functions

#[path = "../examples/support/layer/mod.rs"]
mod layer;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use layer::measure::{Call, Sample};
use layer::seeded::{Seeded, tokens};
use layer::{oracle, shapes, source};
use moe_kernels::{Cpu, DType};
use std::hint::black_box;
use std::time::{Duration, Instant};

const TOKENS: [usize; 4] = [1, 8, 64, 512];
/// Inputs that take turns, so that a single token does not find its experts in the cache.
const TURNS: usize = 16;

fn forward(c: &mut Criterion) {
    let cpu = Cpu::from_env().expect("MOE_KERNELS_ISA");
    // `cargo test --benches` wants to know whether it runs, not how fast.
    let names: &[&str] = match std::env::args().any(|arg| arg == "--test") {
        true => &["tiny"],
        false => &["olmoe", "qwen3-30b-a3b"],
    };
    for &name in names {
        let architecture = shapes::named(name).expect("a known shape");
        for dtype in [DType::F32, DType::BF16] {
            let mut seeded = Seeded {
                architecture: architecture.clone(),
                seed: 0,
                dtype,
            };
            let built = source::build(
                &cpu,
                &architecture,
                &mut seeded,
                dtype,
                &mut std::io::stderr(),
            )
            .expect("packing");
            let mut group = c.benchmark_group(format!("moe/{name}/{dtype}"));
            group
                .sample_size(10)
                .measurement_time(Duration::from_secs(3));
            for t in TOKENS {
                let mut call = Call::new(&cpu, &built, &architecture, dtype, t).expect("buffers");
                let sample: Sample = call.sample(0).expect("a call");
                let checked =
                    oracle::check(&architecture, &mut seeded, dtype, &sample, 1).expect("a check");
                assert!(checked.passed(), "{name} {dtype} T = {t}: {checked:?}");
                let inputs: Vec<_> = (0..TURNS)
                    .map(|turn| tokens(0, turn * t, t, architecture.hidden, dtype))
                    .collect();
                let mut turn = 0;
                group.throughput(Throughput::Elements(t as u64));
                group.bench_function(BenchmarkId::from_parameter(t), |b| {
                    b.iter_custom(|calls| {
                        let mut total = Duration::ZERO;
                        for _ in 0..calls {
                            turn += 1;
                            call.set_input(&inputs[turn % TURNS]);
                            let start = Instant::now();
                            black_box(&mut call).forward().expect("a call");
                            total += start.elapsed();
                        }
                        total
                    });
                });
            }
            group.finish();
        }
    }
}

criterion_group!(benches, forward);
criterion_main!(benches);
