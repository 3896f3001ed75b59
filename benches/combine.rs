//! Combine at the shapes of published models: gigabytes a second by the least traffic (ys read once, y written once), beside the read bandwidth
//! measured in the same run and a plain Rust loop.
//!
//! `cargo bench --bench combine` checks every answer against f64, prints a table (medians of interleaved runs: ours, plain, read, ours, …), and then
//! criterion's own figures. `MOE_KERNELS_ISA` chooses the instruction set.

#![allow(missing_docs)] // criterion's macros make public functions

#[path = "support/micro.rs"]
mod micro;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use micro::{distinct_ids, medians, normals, quick};
use moe_kernels::combine::{Combine, Routed, combine_into};
use moe_kernels::cpu::roofline::{read_bandwidth, read_buffer};
use moe_kernels::permute::Permutation;
use moe_kernels::{AnyMatMut, Cpu, DType, MatMut, MatRef};
use std::hint::black_box;
use std::time::Duration;

struct Problem {
    name: &'static str,
    tokens: usize,
    hidden: usize,
    slots: usize,
    ys: Vec<f32>,
    weights: Vec<f32>,
    permutation: Permutation,
}

impl Problem {
    fn new(name: &'static str, tokens: usize, hidden: usize, experts: usize, slots: usize) -> Self {
        let mut permutation = Permutation::default();
        let ids = distinct_ids(7, tokens, experts, slots);
        permutation
            .sort(&Cpu::new(), &ids, experts, &Default::default())
            .unwrap();
        Self {
            name,
            tokens,
            hidden,
            slots,
            ys: normals(1, tokens * slots * hidden),
            weights: normals(2, tokens * slots),
            permutation,
        }
    }

    fn run(&self, cpu: &Cpu, out: AnyMatMut<'_>) {
        let routed = Routed::Pairs {
            ys: MatRef::new(&self.ys, self.tokens * self.slots, self.hidden).unwrap(),
            weights: Some(&self.weights),
            row_of_pair: self.permutation.row_of_pair(),
            slots: self.slots,
            identity: None,
        };
        combine_into(cpu, &Combine::new(routed), out).unwrap();
    }

    /// What is written first: slot after slot over the row.
    fn plain(&self, out: &mut [f32]) {
        for (t, y) in out.chunks_exact_mut(self.hidden).enumerate() {
            y.fill(0.0);
            for pair in t * self.slots..(t + 1) * self.slots {
                let row = self.permutation.row_of_pair()[pair] as usize;
                let (w, ys) = (self.weights[pair], &self.ys[row * self.hidden..]);
                for (y, x) in y.iter_mut().zip(ys) {
                    *y += w * x;
                }
            }
        }
    }

    /// Tokens here and there against f64.
    fn check(&self, out: &[f32], epsilon: f64) {
        for t in [0, self.tokens / 2, self.tokens - 1] {
            for c in 0..self.hidden {
                let (mut sum, mut size) = (0.0, 0.0);
                for pair in t * self.slots..(t + 1) * self.slots {
                    let row = self.permutation.row_of_pair()[pair] as usize;
                    let x = f64::from(self.ys[row * self.hidden + c]);
                    sum += f64::from(self.weights[pair]) * x;
                    size += (f64::from(self.weights[pair]) * x).abs();
                }
                let found = f64::from(out[t * self.hidden + c]);
                let allowed = epsilon * size * self.slots as f64;
                assert!(
                    (found - sum).abs() <= allowed,
                    "{}: {found} is not {sum}",
                    self.name
                );
            }
        }
    }

    /// The least that has to move.
    fn bytes(&self, out: DType) -> usize {
        self.tokens * self.hidden * (self.slots * 4 + out.size())
    }
}

fn problems() -> Vec<Problem> {
    let tokens = if quick() { 64 } else { 4096 };
    let mut all = Vec::new();
    for t in [1, tokens] {
        all.push(Problem::new("qwen3 H 2048 K 8", t, 2048, 128, 8));
        all.push(Problem::new("mixtral H 4096 K 2", t, 4096, 8, 2));
    }
    all
}

fn table(problems: &[Problem]) {
    let all = Cpu::from_env().expect("MOE_KERNELS_ISA");
    let buffer = read_buffer(if quick() { 1 << 16 } else { 1 << 26 });
    println!("isa {}; medians; GB/s by the least traffic", all.isa());
    println!(
        "{:20} {:>5} {:>5} {:>7} {:>11} {:>7} {:>7} {:>7} {:>11}",
        "shape", "T", "y", "threads", "µs", "GB/s", "read", "share", "plain µs"
    );
    for problem in problems {
        let n = problem.tokens * problem.hidden;
        let mut plain = vec![0.0f32; n];
        problem.plain(&mut plain);
        problem.check(&plain, 2.4e-7);
        for cpu in [all.single_threaded(), all] {
            let (mut y, mut half) = (vec![f32::NAN; n], vec![bf16::NAN; n]);
            let (t, h) = (problem.tokens, problem.hidden);
            problem.run(&cpu, MatMut::new(&mut y, t, h).unwrap().into());
            problem.check(&y, 2.4e-7);
            problem.run(&cpu, MatMut::new(&mut half, t, h).unwrap().into());
            problem.check(&half.iter().map(|x| x.to_f32()).collect::<Vec<_>>(), 8e-3);
            let mut read = Vec::new();
            let times = medians(
                t,
                &mut [
                    &mut || problem.run(&cpu, MatMut::new(&mut y, t, h).unwrap().into()),
                    &mut || problem.run(&cpu, MatMut::new(&mut half, t, h).unwrap().into()),
                    &mut || problem.plain(black_box(&mut plain)),
                    &mut || {
                        if t > 1 {
                            read.push(read_bandwidth(&cpu, &buffer, Duration::ZERO));
                        }
                    },
                ],
            );
            read.sort_by(f64::total_cmp);
            let read = read.get(read.len() / 2).copied();
            for (dtype, time) in [(DType::F32, times[0]), (DType::BF16, times[1])] {
                let rate = problem.bytes(dtype) as f64 / time;
                // One token lies in the cache: no share of the memory's bandwidth.
                let (gb, share) = read.map_or(("-".into(), "-".into()), |read| {
                    (
                        format!("{:.1}", read / 1e9),
                        format!("{:.0}%", 100.0 * rate / read),
                    )
                });
                println!(
                    "{:20} {:>5} {:>5} {:>7} {:>11.2} {:>7.1} {:>7} {:>7} {:>11.2}",
                    problem.name,
                    t,
                    dtype.name(),
                    cpu.threads(),
                    time * 1e6,
                    rate / 1e9,
                    gb,
                    share,
                    times[2] * 1e6
                );
            }
        }
    }
}

fn bench(c: &mut Criterion) {
    let problems = problems();
    table(&problems);
    let cpu = Cpu::from_env().expect("MOE_KERNELS_ISA");
    let mut group = c.benchmark_group("combine");
    for problem in &problems {
        let (t, h) = (problem.tokens, problem.hidden);
        let mut y = vec![0.0f32; t * h];
        group.throughput(Throughput::Bytes(problem.bytes(DType::F32) as u64));
        group.bench_function(BenchmarkId::new(problem.name, t), |b| {
            b.iter(|| problem.run(&cpu, MatMut::new(black_box(&mut y), t, h).unwrap().into()));
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(800));
    targets = bench
}
criterion_main!(benches);
