//! The grouped product at the shapes of published models, against dense products called for each expert.
//!
//! `cargo bench --bench grouped_gemm` runs all; `-- olmoe` selects by name. Ids are `grouped_gemm/<shape>/<product>/<load>/<T>/<dtype>`. For f32 there is first a line for one thread
//! and one for all: medians of interleaved runs (ours, rival, ours, rival, …) and the share of the roof, with ceilings measured in the same process; then criterion's figures for
//! every format, whose "elements" are FLOPs. Answers are checked against f64 sums before anything is timed. `matrixmultiply` runs on one thread here; `benches/rivals` has it, and
//! candle, on all.

#![allow(missing_docs)] // criterion's macros make public functions

mod support;

use criterion::{
    BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use moe_kernels::grouped_gemm::{Groups, PackedMatrices, grouped_gemm_into, scratch_bytes};
use moe_kernels::routing::{RouteInput, Router, Routing};
use moe_kernels::{Cpu, DType, MatMut, MatRef};
use std::cell::OnceCell;
use std::time::{Duration, Instant};
use support::dense::{GemmCrate, Matrixmultiply, Product};
use support::layer::measure::{Machine, median};
use support::layer::seeded::{Generator, Stream};
use support::layer::shapes::Architecture;
use support::load::Load;
use support::roof::Work;
use support::{check_memory, only_testing, shapes, wanted};

/// Rounds of the comparison.
const ROUNDS: usize = 5;
const CELLS: [(Load, usize); 4] = [
    (Load::Uniform, 8),
    (Load::Uniform, 64),
    (Load::Zipf, 64),
    (Load::Uniform, 512),
];

/// The experts' matrices `[E, N, K]` of one of the two products, f32.
struct Weights {
    name: String,
    n: usize,
    k: usize,
    w: Vec<f32>,
}

/// Rows `[·, K]`, sorted by expert.
struct Problem<'a> {
    id: String,
    weights: &'a Weights,
    offsets: Vec<usize>,
    counts: Vec<usize>,
    x: Vec<f32>,
}

impl Weights {
    fn new(architecture: &Architecture, shape: &str, product: &str) -> Self {
        let (n, k) = match product {
            "gate_up" => (2 * architecture.intermediate, architecture.hidden),
            _ => (architecture.hidden, architecture.intermediate),
        };
        let elements = architecture.experts() * n * k;
        check_memory(shape, 2 * 4 * elements).expect("memory");
        let scale = (k as f32).sqrt().recip();
        Self {
            name: format!("{shape}/{product}"),
            n,
            k,
            w: Generator::new(0, Stream::Expert(0, 0)).floats(elements, scale),
        }
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
}

impl<'a> Problem<'a> {
    fn new(architecture: &Architecture, weights: &'a Weights, load: Load, tokens: usize) -> Self {
        let experts = architecture.experts();
        let logits = load.logits(0, 0, tokens, experts);
        let router = Router::new(architecture.router.clone()).unwrap();
        let mut routing = Routing::with_capacity(tokens, &router).unwrap();
        let input = RouteInput::new(MatRef::new(&logits, tokens, experts).unwrap());
        router.route(&Cpu::new(), &input, &mut routing).unwrap();
        let permutation = routing.permutation();
        let x = Generator::new(0, Stream::Tokens);
        Self {
            id: format!("grouped_gemm/{}/{load}/{tokens}", weights.name),
            weights,
            offsets: permutation.offsets().to_vec(),
            counts: permutation.counts().to_vec(),
            x: x.floats(permutation.num_rows() * weights.k, 1.0),
        }
    }

    fn rows(&self) -> usize {
        self.x.len() / self.weights.k
    }

    fn zeros(&self) -> Vec<f32> {
        vec![0.0; self.rows() * self.weights.n]
    }

    fn work(&self, dtype: DType) -> Work {
        let elements = (self.weights.n * self.weights.k) as f64;
        let touched = self.counts.iter().filter(|&&c| c > 0).count();
        Work {
            flops: 2.0 * self.rows() as f64 * elements,
            bytes: touched as f64 * elements * dtype.size() as f64,
        }
    }

    fn ours(&self, cpu: &Cpu, packed: &PackedMatrices, out: &mut [f32], scratch: &mut [u8]) {
        let groups = Groups::Ragged {
            offsets: &self.offsets,
            counts: &self.counts,
        };
        let x = MatRef::new(&self.x, self.rows(), self.weights.k).unwrap();
        let out = MatMut::new(out, self.rows(), self.weights.n).unwrap();
        grouped_gemm_into(
            cpu,
            x.into(),
            None,
            packed,
            groups,
            None,
            out.into(),
            scratch,
        )
        .unwrap();
    }

    /// A rival: one call an expert.
    fn rival<P: Product<f32>>(&self, threads: usize, out: &mut [f32]) {
        let Weights { n, k, ref w, .. } = *self.weights;
        for (e, w) in w.chunks(n * k).enumerate() {
            let rows = self.offsets[e]..self.offsets[e] + self.counts[e];
            if !rows.is_empty() {
                let x = &self.x[rows.start * k..rows.end * k];
                P::multiply(threads, k, x, w, &mut out[rows.start * n..rows.end * n]);
            }
        }
    }

    /// Within rounding of an f64 sum at sampled places.
    fn check(&self, who: &str, out: &[f32]) {
        let Weights { n, k, ref w, .. } = *self.weights;
        for sample in 0..200 {
            let (r, j) = (sample * 37 % self.rows(), sample * 101 % n);
            let e = (0..self.counts.len())
                .find(|&e| (self.offsets[e]..self.offsets[e] + self.counts[e]).contains(&r))
                .unwrap();
            let (a, w) = (&self.x[r * k..][..k], &w[(e * n + j) * k..][..k]);
            let terms = a.iter().zip(w).map(|(a, w)| f64::from(*a) * f64::from(*w));
            let exact: f64 = terms.clone().sum();
            let size: f64 = terms.map(f64::abs).sum();
            let bound = size * k as f64 * f64::from(f32::EPSILON);
            let found = f64::from(out[r * n + j]);
            assert!(
                (found - exact).abs() <= bound,
                "{who} [{r}, {j}]: {found} is not {exact}"
            );
        }
    }
}

/// One line: ours and the rivals, turn about, each with swept caches.
fn compare(p: &Problem<'_>, cpu: &Cpu, packed: &PackedMatrices, machine: &mut Machine) {
    let threads = cpu.threads();
    machine.begin(cpu);
    let mut scratch = vec![0u8; scratch_bytes(cpu)];
    let mut out = p.zeros();
    let mut times: Vec<(&str, Vec<f64>)> = vec![("ours", Vec::new()), ("gemm crate", Vec::new())];
    if threads == 1 {
        times.push(("matrixmultiply", Vec::new()));
    }
    for round in 0..=ROUNDS {
        for (who, times) in &mut times {
            machine.sweep_caches(cpu);
            let start = Instant::now();
            match *who {
                "ours" => p.ours(cpu, packed, &mut out, &mut scratch),
                "gemm crate" => p.rival::<GemmCrate>(threads, &mut out),
                _ => p.rival::<Matrixmultiply>(threads, &mut out),
            }
            let time = start.elapsed().as_secs_f64();
            match round {
                // Nobody finds the last one's answer in its place.
                0 => {
                    p.check(who, &out);
                    out.fill(f32::NAN);
                }
                _ => times.push(time),
            }
        }
    }
    machine.look_again(cpu);
    let roof = p.work(DType::F32).roof(&machine.ceilings, DType::F32);
    let mut medians = times
        .into_iter()
        .map(|(who, t)| (who, median(t.into_iter())));
    let ours = medians.next().map_or(f64::NAN, |(_, t)| t);
    print!(
        "{}/f32, {} thread(s): ours {:.2} ms, {:.1} GFLOP/s, {:.1}% of the roof by {} at {}",
        p.id,
        threads,
        ours * 1e3,
        p.work(DType::F32).flops / ours / 1e9,
        100.0 * roof.seconds / ours,
        roof.bound.name(),
        machine.ceilings
    );
    for (who, theirs) in medians {
        print!("; {who} {:.2} ms, ratio {:.2}", theirs * 1e3, theirs / ours);
    }
    println!();
}

/// Criterion's figures, and the share of the roof.
fn bench(
    c: &mut Criterion,
    p: &Problem<'_>,
    cpu: &Cpu,
    packed: &PackedMatrices,
    machine: &mut Machine,
) {
    let dtype = packed.dtype();
    machine.begin(cpu);
    let mut scratch = vec![0u8; scratch_bytes(cpu)];
    let mut out = p.zeros();
    let mut times = Vec::new();
    let mut group = c.benchmark_group(p.id.as_str());
    group
        .sample_size(10)
        .sampling_mode(SamplingMode::Flat)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1))
        .throughput(Throughput::Elements(p.work(dtype).flops as u64));
    group.bench_function(BenchmarkId::from_parameter(dtype), |b| {
        b.iter_custom(|calls| {
            let mut total = Duration::ZERO;
            for _ in 0..calls {
                machine.sweep_caches(cpu);
                let start = Instant::now();
                p.ours(cpu, packed, &mut out, &mut scratch);
                let time = start.elapsed();
                times.push(time.as_secs_f64());
                total += time;
            }
            total
        });
    });
    group.finish();
    machine.look_again(cpu);
    support::say_share(&machine.ceilings, dtype, p.work(dtype), times);
}

/// One of a layer's two products; nothing is made that the command line does not ask for.
fn product(c: &mut Criterion, shape: &str, name: &str, machines: &mut [Machine; 2]) {
    let cpu = Cpu::from_env().expect("MOE_KERNELS_ISA");
    let single = cpu.single_threaded();
    let architecture = shapes::named(shape).expect("a known shape");
    let weights = OnceCell::new();
    for dtype in DType::ALL {
        let asked = |&&(load, tokens): &&(Load, usize)| {
            wanted(&format!(
                "grouped_gemm/{shape}/{name}/{load}/{tokens}/{dtype}"
            ))
        };
        let cells: Vec<_> = CELLS.iter().filter(asked).collect();
        if cells.is_empty() {
            continue;
        }
        let weights = weights.get_or_init(|| Weights::new(&architecture, shape, name));
        let packed = weights.pack(&cpu, dtype);
        for &&(load, tokens) in &cells {
            let problem = Problem::new(&architecture, weights, load, tokens);
            if dtype == DType::F32 && !only_testing() {
                compare(&problem, &single, &packed, &mut machines[0]);
                compare(&problem, &cpu, &packed, &mut machines[1]);
            }
            bench(c, &problem, &cpu, &packed, &mut machines[1]);
        }
    }
}

fn grouped_gemm(c: &mut Criterion) {
    let names: &[&str] = match only_testing() {
        true => &["tiny"],
        false => &["qwen3-30b-a3b", "olmoe", "mixtral", "deepseek-v3"],
    };
    let cpu = Cpu::from_env().expect("MOE_KERNELS_ISA");
    let mut machines = [cpu.single_threaded(), cpu].map(|cpu| Machine::measure(&cpu));
    for name in names {
        for product_name in ["gate_up", "down"] {
            product(c, name, product_name, &mut machines);
        }
    }
}

criterion_group!(benches, grouped_gemm);
criterion_main!(benches);
