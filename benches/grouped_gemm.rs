//! The grouped product at the shapes of published models, against the `gemm` crate called for each expert.
//!
//! `cargo bench --bench grouped_gemm` prints, for each shape, medians of interleaved runs (ours, rival, ours, rival, …), GFLOP/s, the share of the FMA peak measured
//! in the same process, and then criterion's own figures. Answers are checked before anything is timed.

#![allow(unsafe_code)] // the rival's API takes raw pointers
#![allow(missing_docs)] // criterion's macros make public functions

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use moe_kernels::cpu::roofline;
use moe_kernels::grouped_gemm::{Groups, PackedMatrices, grouped_gemm_into, scratch_bytes};
use moe_kernels::{Cpu, DType, MatMut, MatRef};
use std::hint::black_box;
use std::time::{Duration, Instant};

/// rows spread evenly over experts, N × K each.
struct Problem {
    name: &'static str,
    rows: usize,
    experts: usize,
    n: usize,
    k: usize,
    offsets: Vec<usize>,
    counts: Vec<usize>,
    x: Vec<f32>,
    w: Vec<f32>,
}

fn random(seed: u64, n: usize, scale: f32) -> Vec<f32> {
    let mut state = seed;
    (0..n)
        .map(|_| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * scale
        })
        .collect()
}

impl Problem {
    fn new(name: &'static str, rows: usize, experts: usize, n: usize, k: usize) -> Self {
        // Uneven on purpose: expert e gets between half and one and a half of its fair share.
        let mut counts: Vec<usize> = (0..experts)
            .map(|e| rows / experts / 2 + (e * 7919 % experts) * (rows / experts) / experts)
            .collect();
        let rest = rows - counts.iter().sum::<usize>();
        counts[experts / 2] += rest;
        let mut offsets = vec![0];
        for c in &counts {
            offsets.push(offsets.last().unwrap() + c);
        }
        Self {
            name,
            rows,
            experts,
            n,
            k,
            offsets,
            counts,
            x: random(1, rows * k, 1.0),
            w: random(2, experts * n * k, 0.05),
        }
    }

    fn flops(&self) -> f64 {
        2.0 * self.rows as f64 * self.n as f64 * self.k as f64
    }

    fn pack(&self, cpu: &Cpu, dtype: DType) -> PackedMatrices {
        let mut packed = PackedMatrices::new(cpu, self.n, self.k, dtype).unwrap();
        for w in self.w.chunks(self.n * self.k) {
            packed
                .push(cpu, MatRef::new(w, self.n, self.k).unwrap().into(), None)
                .unwrap();
        }
        packed
    }

    fn ours(&self, cpu: &Cpu, packed: &PackedMatrices, out: &mut [f32], scratch: &mut [u8]) {
        grouped_gemm_into(
            cpu,
            MatRef::new(&self.x, self.rows, self.k).unwrap().into(),
            None,
            packed,
            Groups::Ragged {
                offsets: &self.offsets,
                counts: &self.counts,
            },
            None,
            MatMut::new(out, self.rows, self.n).unwrap().into(),
            scratch,
        )
        .unwrap();
    }

    /// The rival: the `gemm` crate, one call an expert, on as many threads.
    fn gemm_crate(&self, threads: usize, out: &mut [f32]) {
        let parallelism = if threads == 1 {
            gemm::Parallelism::None
        } else {
            gemm::Parallelism::Rayon(threads)
        };
        for e in 0..self.experts {
            let (m, n, k) = (self.counts[e], self.n, self.k);
            let first = self.offsets[e];
            // SAFETY: m × n of `out`, m × k of `x` and n × k of `w` begin at these offsets and are row-major.
            unsafe {
                gemm::gemm(
                    m,
                    n,
                    k,
                    out.as_mut_ptr().add(first * n),
                    1,
                    n as isize,
                    false,
                    self.x.as_ptr().add(first * k),
                    1,
                    k as isize,
                    self.w.as_ptr().add(e * n * k),
                    k as isize,
                    1,
                    0.0,
                    1.0,
                    false,
                    false,
                    false,
                    parallelism,
                );
            }
        }
    }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Both within rounding of an f64 sum at sampled places.
fn check(p: &Problem, ours: &[f32], theirs: &[f32]) {
    for sample in 0..200 {
        let (r, j) = (sample * 37 % p.rows, sample * 101 % p.n);
        let e = (0..p.experts).find(|&e| r < p.offsets[e + 1]).unwrap();
        let (a, w) = (&p.x[r * p.k..][..p.k], &p.w[(e * p.n + j) * p.k..][..p.k]);
        let exact: f64 = a
            .iter()
            .zip(w)
            .map(|(a, w)| f64::from(*a) * f64::from(*w))
            .sum();
        let bound: f64 = a
            .iter()
            .zip(w)
            .map(|(a, w)| f64::from((a * w).abs()))
            .sum::<f64>()
            * p.k as f64
            * f64::from(f32::EPSILON);
        for (who, out) in [("ours", ours), ("gemm crate", theirs)] {
            let found = f64::from(out[r * p.n + j]);
            assert!(
                (found - exact).abs() <= bound,
                "{who} [{r}, {j}]: {found} is not {exact}"
            );
        }
    }
}

fn compare(p: &Problem, cpu: &Cpu) {
    let packed = p.pack(cpu, DType::F32);
    let mut scratch = vec![0u8; scratch_bytes(cpu)];
    let (mut a, mut b) = (vec![0.0; p.rows * p.n], vec![0.0; p.rows * p.n]);
    p.ours(cpu, &packed, &mut a, &mut scratch);
    p.gemm_crate(cpu.threads(), &mut b);
    check(p, &a, &b);
    let peak = roofline::fma_peak(cpu, Duration::from_millis(300));
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        let start = Instant::now();
        p.ours(cpu, &packed, black_box(&mut a), &mut scratch);
        ours.push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        p.gemm_crate(cpu.threads(), black_box(&mut b));
        theirs.push(start.elapsed().as_secs_f64());
    }
    let (ours, theirs) = (median(ours), median(theirs));
    let peak = peak.max(roofline::fma_peak(cpu, Duration::from_millis(300)));
    println!(
        "{:28} {:6} {} thread(s): ours {:8.2} ms {:6.1} GFLOP/s ({:4.1}% of {:.1}), gemm crate {:8.2} ms, ratio {:.2}",
        p.name,
        cpu.isa().name(),
        cpu.threads(),
        ours * 1e3,
        p.flops() / ours / 1e9,
        100.0 * p.flops() / ours / peak,
        peak / 1e9,
        theirs * 1e3,
        theirs / ours
    );
}

fn grouped_gemm(c: &mut Criterion) {
    let cpu = Cpu::from_env().unwrap();
    let problems = [
        Problem::new("qwen3 gate_up T=512", 4096, 128, 1536, 2048),
        Problem::new("qwen3 down T=512", 4096, 128, 2048, 768),
    ];
    for p in &problems {
        compare(p, &cpu);
        compare(p, &cpu.single_threaded());
    }
    let mut group = c.benchmark_group("grouped_gemm");
    group.sample_size(10);
    for p in &problems {
        for dtype in DType::ALL {
            let packed = p.pack(&cpu, dtype);
            let mut out = vec![0.0; p.rows * p.n];
            let mut scratch = vec![0u8; scratch_bytes(&cpu)];
            group.throughput(Throughput::Elements(p.flops() as u64));
            group.bench_function(BenchmarkId::new(p.name, dtype), |b| {
                b.iter(|| p.ours(&cpu, &packed, &mut out, &mut scratch));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, grouped_gemm);
criterion_main!(benches);
