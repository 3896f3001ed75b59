//! Packing the experts' weights: gigabytes a second, read and written, beside the read bandwidth measured in the same run and `copy_from_slice` of as many
//! bytes.
//!
//! `cargo bench --bench packing` checks every answer, prints a table (medians of interleaved runs: ours, copy, read, ours, …) and then criterion's own
//! figures. `[N, K]` sources have contiguous rows, `[K, N]` ones contiguous columns; `f32→bf16` is converted on the way. "over" packs over an expert
//! (`replace`), whose memory is there; "new" is `push` into fresh memory, which the system has to find and clear page by page, beside `to_vec`.
//! `MOE_KERNELS_ISA` chooses the instruction set.

#![allow(missing_docs)] // criterion's macros make public functions

#[path = "support/micro.rs"]
mod micro;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::{bf16, f16};
use micro::{normals, quick};
use moe_kernels::cpu::roofline::{read_bandwidth, read_buffer};
use moe_kernels::grouped_gemm::{Groups, PackedMatrices, grouped_gemm_into, scratch_bytes};
use moe_kernels::{AnyMatRef, Cpu, DType, MatMut, MatRef};
use rayon::prelude::*;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// As many experts `[N, K]` as no cache holds.
struct Problem {
    source: DType,
    packed: DType,
    /// `[K, N]` in memory.
    columns: bool,
    n: usize,
    k: usize,
    /// The experts one after another, in the source's format.
    bytes: Vec<f32>,
}

impl Problem {
    fn new(source: DType, packed: DType, columns: bool) -> Self {
        let (n, k, megabytes) = if quick() {
            (96, 64, 1)
        } else {
            (2048, 2048, 256)
        };
        let count = (megabytes << 20) / source.size() / (n * k) * (n * k);
        // One expert's worth of numbers, over and over.
        let numbers: Vec<f32> = normals(1, n * k).into_iter().cycle().take(count).collect();
        let bytes = match source {
            DType::F32 => numbers,
            DType::F16 => words(numbers.iter().map(|&x| f16::from_f32(x).to_bits())),
            _ => words(numbers.iter().map(|&x| bf16::from_f32(x).to_bits())),
        };
        Self {
            source,
            packed,
            columns,
            n,
            k,
            bytes,
        }
    }

    fn name(&self) -> String {
        let layout = if self.columns { "[K, N]" } else { "[N, K]" };
        if self.source == self.packed {
            format!("{} {layout}", self.source)
        } else {
            format!("{}→{} {layout}", self.source, self.packed)
        }
    }

    fn experts(&self) -> usize {
        size_of_val(&self.bytes[..]) / (self.n * self.k * self.source.size())
    }

    /// Expert e as `[N, K]`.
    fn expert(&self, e: usize) -> AnyMatRef<'_> {
        let floats = self.n * self.k * self.source.size() / 4;
        let data = &self.bytes[e * floats..(e + 1) * floats];
        let (rows, cols) = if self.columns {
            (self.k, self.n)
        } else {
            (self.n, self.k)
        };
        let matrix: AnyMatRef<'_> = match self.source {
            DType::F32 => MatRef::new(data, rows, cols).unwrap().into(),
            DType::F16 => MatRef::<f16>::new(bytemuck::cast_slice(data), rows, cols)
                .unwrap()
                .into(),
            _ => MatRef::<bf16>::new(bytemuck::cast_slice(data), rows, cols)
                .unwrap()
                .into(),
        };
        if self.columns {
            matrix.transposed()
        } else {
            matrix
        }
    }

    fn pack(&self, cpu: &Cpu) -> PackedMatrices {
        let mut packed = PackedMatrices::new(cpu, self.n, self.k, self.packed).unwrap();
        for e in 0..self.experts() {
            packed.push(cpu, self.expert(e), None).unwrap();
        }
        packed
    }

    fn repack(&self, cpu: &Cpu, packed: &mut PackedMatrices) {
        for e in 0..self.experts() {
            packed.replace(cpu, e, self.expert(e), None).unwrap();
        }
    }

    /// Rows that are one at one place each give back columns of the matrix, exactly.
    fn check(&self, cpu: &Cpu, packed: &PackedMatrices) {
        let picked: Vec<usize> = (0..8).map(|i| i * (self.k - 1) / 7).collect();
        let mut x = vec![0.0f32; picked.len() * self.k];
        for (row, &k) in x.chunks_exact_mut(self.k).zip(&picked) {
            row[k] = 1.0;
        }
        let mut scratch = vec![0; scratch_bytes(cpu)];
        for expert in [0, self.experts() - 1] {
            let mut out = vec![f32::NAN; picked.len() * self.n];
            grouped_gemm_into(
                cpu,
                MatRef::new(&x, picked.len(), self.k).unwrap().into(),
                None,
                packed,
                Groups::Single {
                    rows: picked.len(),
                    expert,
                },
                None,
                MatMut::new(&mut out, picked.len(), self.n).unwrap().into(),
                &mut scratch,
            )
            .unwrap();
            for (out, &k) in out.chunks_exact(self.n).zip(&picked) {
                for (j, &found) in out.iter().enumerate() {
                    let wanted = self.element(expert, j, k);
                    assert!(
                        found == wanted,
                        "{}: {found} at [{j}, {k}] is not {wanted}",
                        self.name()
                    );
                }
            }
        }
    }

    fn element(&self, e: usize, j: usize, k: usize) -> f32 {
        let x = match self.expert(e) {
            AnyMatRef::F32(m) => m.get(j, k),
            AnyMatRef::F16(m) => m.get(j, k).map(f16::to_f32),
            AnyMatRef::BF16(m) => m.get(j, k).map(bf16::to_f32),
            _ => None,
        };
        let x = x.unwrap();
        match self.packed {
            DType::F32 => x,
            DType::F16 => f16::from_f32(x).to_f32(),
            _ => bf16::from_f32(x).to_f32(),
        }
    }

    /// Read once and written once.
    fn traffic(&self) -> usize {
        self.experts() * self.n * self.k * (self.source.size() + self.packed.size())
    }
}

/// Halves, two in a word of memory that holds any format.
fn words(halves: impl Iterator<Item = u16>) -> Vec<f32> {
    bytemuck::cast_slice::<u16, f32>(&halves.collect::<Vec<_>>()).to_vec()
}

fn copy(cpu: &Cpu, from: &[f32], to: &mut [f32]) {
    if cpu.threads() == 1 {
        return to.copy_from_slice(from);
    }
    // Four megabytes a task.
    to.par_chunks_mut(1 << 20)
        .zip(from.par_chunks(1 << 20))
        .for_each(|(to, from)| to.copy_from_slice(from));
}

/// Median seconds of each, in turns.
fn medians(calls: &mut [&mut dyn FnMut()]) -> Vec<f64> {
    let mut times = vec![Vec::new(); calls.len()];
    for round in 0..if quick() { 2 } else { 8 } {
        for (times, call) in times.iter_mut().zip(calls.iter_mut()) {
            let start = Instant::now();
            call();
            // The first finds out where memory is.
            if round > 0 {
                times.push(start.elapsed().as_secs_f64());
            }
        }
    }
    times.into_iter().map(median).collect()
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn line(p: &Problem, cpu: &Cpu, buffer: &[f32]) {
    let mut packed = p.pack(cpu);
    p.check(cpu, &packed);
    let mut to = vec![0.0f32; p.bytes.len()];
    let mut read = Vec::new();
    let times = medians(&mut [
        &mut || p.repack(cpu, &mut packed),
        &mut || copy(cpu, &p.bytes, black_box(&mut to)),
        &mut || read.push(read_bandwidth(cpu, buffer, Duration::ZERO)),
    ]);
    p.check(cpu, &packed);
    drop((packed, to));
    let fresh = medians(&mut [&mut || drop(black_box(p.pack(cpu))), &mut || {
        drop(black_box(p.bytes.to_vec()));
    }]);
    let read = median(read);
    let copied = 2.0 * size_of_val(&p.bytes[..]) as f64;
    let ours = p.traffic() as f64 / times[0];
    println!(
        "{:18} {:>7} {:>8.1} {:>8.1} {:>6.0}% {:>8.1} {:>6.2} {:>8.1} {:>8.1}",
        p.name(),
        cpu.threads(),
        ours / 1e9,
        read / 1e9,
        100.0 * ours / read,
        copied / times[1] / 1e9,
        ours / (copied / times[1]),
        p.traffic() as f64 / fresh[0] / 1e9,
        copied / fresh[1] / 1e9,
    );
}

fn bench(c: &mut Criterion) {
    let all = Cpu::from_env().expect("MOE_KERNELS_ISA");
    let buffer = read_buffer(if quick() { 1 << 16 } else { 1 << 26 });
    let same = DType::ALL.map(|d| (d, d));
    let mut cases: Vec<_> = same.iter().map(|&(s, p)| (s, p, false)).collect();
    cases.extend(same.iter().map(|&(s, p)| (s, p, true)));
    cases.push((DType::F32, DType::BF16, false));
    println!(
        "isa {}; medians; GB/s read and written\n{:18} {:>7} {:>8} {:>8} {:>7} {:>8} {:>6} {:>8} {:>8}",
        all.isa(),
        "source",
        "threads",
        "over",
        "read",
        "share",
        "copy",
        "ratio",
        "new",
        "to_vec"
    );
    for (source, packed, columns) in cases {
        let p = Problem::new(source, packed, columns);
        line(&p, &all.single_threaded(), &buffer);
        line(&p, &all, &buffer);
        let mut over = p.pack(&all);
        let mut group = c.benchmark_group("packing");
        group.throughput(Throughput::Bytes(p.traffic() as u64));
        group.bench_function(BenchmarkId::from_parameter(p.name()), |b| {
            b.iter(|| p.repack(&all, black_box(&mut over)));
        });
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_millis(300));
    targets = bench
}
criterion_main!(benches);
