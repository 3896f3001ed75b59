//! The whole layer at the shapes of published models, from given logits.
//!
//! `cargo bench --bench moe` runs all, some ten minutes; `-- olmoe/bf16` selects by name. Ids are `moe/<shape>/<dtype>/<load>/<T>`. Criterion's "elements" are FLOPs. Below each of
//! its figures stand the median of our own clock, the roof (see `support/roof.rs`) and the share of it. Every answer is compared with the f64 reference first, batches take
//! turns, and the caches are swept before each call. Threads: `RAYON_NUM_THREADS`; instruction set: `MOE_KERNELS_ISA`.

#![allow(missing_docs)] // criterion's macros make public functions

mod support;

use criterion::{
    BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use moe_kernels::{Cpu, DType};
use std::time::{Duration, Instant};
use support::layer::measure::Machine;
use support::layer::seeded::Seeded;
use support::layer::source;
use support::load::Load;
use support::roof::Work;
use support::subject::{Batch, Subject};
use support::{check_memory, only_testing, progress, say_share, shapes, wanted};

const TOKENS: [usize; 4] = [1, 8, 64, 512];
/// Batches that take turns, so that a single token does not find its experts in the cache.
const TURNS: usize = 6;

fn forward(c: &mut Criterion) {
    let cpu = Cpu::from_env().expect("MOE_KERNELS_ISA");
    let names: &[&str] = match only_testing() {
        true => &["tiny"],
        false => &["qwen3-30b-a3b", "olmoe", "mixtral", "deepseek-v3"],
    };
    let mut machine = Machine::measure(&cpu);
    println!("{}, {} thread(s)", cpu.isa(), cpu.threads());
    for name in names {
        for dtype in DType::ALL {
            layer(c, &cpu, &mut machine, name, dtype);
        }
    }
}

/// One layer in one format: packed once, if any of its benchmarks is wanted.
fn layer(c: &mut Criterion, cpu: &Cpu, machine: &mut Machine, name: &str, dtype: DType) {
    let cells = [Load::Uniform, Load::Zipf].map(|load| TOKENS.map(|t| (load, t)));
    let id = |load: Load, t: usize| format!("moe/{name}/{dtype}/{load}/{t}");
    let cells: Vec<_> = cells.into_iter().flatten().collect();
    if !cells.iter().any(|&(load, t)| wanted(&id(load, t))) {
        return;
    }
    let architecture = shapes::named(name).expect("a known shape");
    check_memory(name, shapes::weight_bytes(&architecture, dtype)).expect("memory");
    let mut seeded = Seeded {
        architecture: architecture.clone(),
        seed: 0,
        dtype,
    };
    let built = source::build(cpu, &architecture, &mut seeded, dtype, progress().as_mut())
        .expect("packing");
    for (load, tokens) in cells.into_iter().filter(|&(l, t)| wanted(&id(l, t))) {
        let batch = |n| Batch::new(&architecture, dtype, load, 0, n, tokens);
        let batches: Vec<Batch> = (0..TURNS).map(batch).collect();
        let mut subject = Subject::new(cpu, &built, &architecture, dtype, tokens).expect("buffers");
        subject
            .check(&batches[0], &mut seeded, 1)
            .expect("an answer within rounding");
        let work = subject.work(&batches[0]);
        let times = bench(
            c,
            cpu,
            machine,
            &id(load, tokens),
            &mut subject,
            &batches,
            work,
        );
        say_share(&machine.ceilings, dtype, work, times);
    }
}

/// Criterion's run; the times of our own clock.
fn bench(
    c: &mut Criterion,
    cpu: &Cpu,
    machine: &mut Machine,
    id: &str,
    subject: &mut Subject<'_>,
    batches: &[Batch],
    work: Work,
) -> Vec<f64> {
    machine.begin(cpu);
    let mut times = Vec::new();
    let (group, parameter) = id.rsplit_once('/').expect("an id with slashes");
    let mut group = c.benchmark_group(group);
    group
        .sample_size(10)
        .sampling_mode(SamplingMode::Flat)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1))
        .throughput(Throughput::Elements(work.flops as u64));
    group.bench_function(BenchmarkId::from_parameter(parameter), |b| {
        b.iter_custom(|calls| {
            let mut total = Duration::ZERO;
            for _ in 0..calls {
                machine.sweep_caches(cpu);
                let start = Instant::now();
                subject
                    .forward(&batches[times.len() % batches.len()])
                    .expect("a call");
                let time = start.elapsed();
                times.push(time.as_secs_f64());
                total += time;
            }
            total
        });
    });
    group.finish();
    machine.look_again(cpu);
    times
}

criterion_group!(benches, forward);
criterion_main!(benches);
