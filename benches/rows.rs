//! One grouped product by the number of rows that each expert gets, with its weights in the L2 cache and in memory: what the register tiles do by themselves, and what is left of
//! it when B has to be brought. It is the bench to tune by on a new kind of machine.
//!
//! `cargo bench --bench rows` prints a line for each format and number of rows, on one thread: medians of interleaved calls, shares of the ceilings measured in the same seconds. `-- bf16 f32`
//! selects formats, `-- 4 12` numbers of rows; `MOE_KERNELS_ISA` chooses the instruction set. Answers are compared with f64 sums before anything is timed.
//!
//! Weights in memory are qwen3-30b-a3b's gate and up of 24 experts, `[1536, 2048]` each, begun with swept caches. Those in L2 are 128 KiB, K 512, found there by call after call.

mod support;

use moe_kernels::grouped_gemm::{Groups, PackedMatrices, grouped_gemm_into, scratch_bytes};
use moe_kernels::{Cpu, DType, MatMut};
use std::time::Instant;
use support::layer::measure::{Machine, median};
use support::layer::seeded::{Generator, Stream};
use support::layer::tensor::Values;
use support::only_testing;
use support::roof::Work;

const ROWS: [usize; 19] = [
    1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 20, 24, 32, 48, 96,
];
const MOST_ROWS: usize = 96;
/// Of the weights that stay in L2.
const NEAR_BYTES: usize = 128 << 10;

/// Experts `[N, K]` and rows for each, all in one format.
struct Problem {
    cpu: Cpu,
    packed: PackedMatrices,
    n: usize,
    k: usize,
    experts: usize,
    /// The first expert's weights, as they were before they were packed.
    w: Values,
    x: Values,
    out: Vec<f32>,
    scratch: Vec<u8>,
}

impl Problem {
    fn new(cpu: &Cpu, dtype: DType, [n, k, experts]: [usize; 3]) -> Self {
        let mut packed = PackedMatrices::new(cpu, n, k, dtype).unwrap();
        let expert = |e: usize| {
            let w = Generator::new(e as u64, Stream::Expert(0, 0));
            w.values(dtype, n * k, (k as f32).sqrt().recip())
        };
        for e in 0..experts {
            let w = expert(e);
            packed.push(cpu, w.matrix(n, k).unwrap(), None).unwrap();
        }
        let x = Generator::new(0, Stream::Tokens);
        Self {
            cpu: *cpu,
            packed,
            n,
            k,
            experts,
            w: expert(0),
            x: x.values(dtype, MOST_ROWS * experts * k, 1.0),
            out: vec![f32::NAN; MOST_ROWS * experts * n],
            scratch: vec![0; scratch_bytes(cpu)],
        }
    }

    /// Seconds of one call.
    fn run(&mut self, rows: usize) -> f64 {
        let offsets: Vec<usize> = (0..=self.experts).map(|e| e * rows).collect();
        let counts = vec![rows; self.experts];
        let total = rows * self.experts;
        let groups = Groups::Ragged {
            offsets: &offsets,
            counts: &counts,
        };
        let x = self.x.matrix(total, self.k).unwrap();
        let out = MatMut::new(&mut self.out[..total * self.n], total, self.n).unwrap();
        let scratch = &mut self.scratch;
        let start = Instant::now();
        grouped_gemm_into(
            &self.cpu,
            x,
            None,
            &self.packed,
            groups,
            None,
            out.into(),
            scratch,
        )
        .unwrap();
        start.elapsed().as_secs_f64()
    }

    fn work(&self, rows: usize) -> Work {
        let elements = (self.experts * self.n * self.k) as f64;
        Work {
            flops: 2.0 * rows as f64 * elements,
            bytes: elements * self.packed.dtype().size() as f64,
        }
    }

    /// The first expert's rows, at sampled columns, within rounding of f64 sums.
    fn check(&mut self, rows: usize) {
        self.out.fill(f32::NAN);
        self.run(rows);
        let (w, x) = (self.w.f32s(), self.x.f32s());
        for r in 0..rows {
            for j in (r % 7..self.n).step_by(61) {
                let (x, w) = (&x[r * self.k..][..self.k], &w[j * self.k..][..self.k]);
                let terms = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
                let exact: f64 = terms.clone().sum();
                let size: f64 = terms.map(f64::abs).sum();
                let found = f64::from(self.out[r * self.n + j]);
                let bound = size * self.k as f64 * f64::from(f32::EPSILON);
                assert!(
                    (found - exact).abs() <= bound,
                    "{rows} rows: {found} at [{r}, {j}] is not {exact}"
                );
            }
        }
    }
}

/// Median seconds of both, by turns: in L2 many calls a turn, of which the first only brings the weights there.
fn measure(near: &mut Problem, far: &mut Problem, rows: usize, machine: &mut Machine) -> [f64; 2] {
    let (turns, calls) = if only_testing() { (1, 1) } else { (9, 50) };
    let (mut in_cache, mut in_memory) = (Vec::new(), Vec::new());
    for _ in 0..turns {
        near.run(rows);
        in_cache.extend((0..calls).map(|_| near.run(rows)));
        machine.sweep_caches(&far.cpu);
        in_memory.push(far.run(rows));
    }
    [in_cache, in_memory].map(|times| median(times.into_iter()))
}

fn line(near: &mut Problem, far: &mut Problem, rows: usize, machine: &mut Machine) {
    near.check(rows);
    far.check(rows);
    machine.begin(&far.cpu);
    let [in_cache, in_memory] = measure(near, far, rows, machine);
    machine.look_again(&far.cpu);
    let dtype = far.packed.dtype();
    let (work, ceilings) = (far.work(rows), &machine.ceilings);
    let peak = ceilings.flop_peak(dtype);
    let near_rate = near.work(rows).flops / in_cache;
    let rate = work.flops / in_memory;
    let roof = work.roof(ceilings, dtype);
    println!(
        "{:5} {rows:4} {:8.1} {:5.1}% {:8.1} {:5.1}% {:6.1} of {:4.1} {:6.1}% by {}",
        dtype.to_string(),
        near_rate / 1e9,
        100.0 * near_rate / peak,
        rate / 1e9,
        100.0 * rate / peak,
        work.bytes / in_memory / 1e9,
        ceilings.read_bandwidth / 1e9,
        100.0 * roof.seconds / in_memory,
        roof.bound.name(),
    );
}

fn main() {
    let cpu = Cpu::from_env().expect("MOE_KERNELS_ISA").single_threaded();
    let args: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with('-'))
        .collect();
    // Words choose among words, numbers among numbers.
    let asked = |name: String| {
        let digit = |s: &str| s.starts_with(|c: char| c.is_ascii_digit());
        let mut alike = args.iter().filter(|a| digit(a) == digit(&name)).peekable();
        alike.peek().is_none() || alike.any(|a| *a == name)
    };
    let mut machine = Machine::measure(&cpu);
    println!(
        "{}, one thread; GFLOP/s and share of the peak, GB/s of B, share of the roof\n{:5} {:>4} {:>15} {:>15} {:>14}",
        cpu.isa(),
        "",
        "rows",
        "B in L2",
        "B in memory",
        "GB/s"
    );
    let (far_experts, rows): (usize, &[usize]) = match only_testing() {
        true => (1, &[3]),
        false => (24, &ROWS),
    };
    for dtype in DType::ALL.into_iter().filter(|d| asked(d.to_string())) {
        let columns = NEAR_BYTES / (512 * dtype.size());
        let mut near = Problem::new(&cpu, dtype, [columns, 512, 1]);
        let mut far = Problem::new(&cpu, dtype, [1536, 2048, far_experts]);
        for &rows in rows.iter().filter(|rows| asked(rows.to_string())) {
            line(&mut near, &mut far, rows, &mut machine);
        }
    }
}
