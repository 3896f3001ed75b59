//! The ceilings of the machine, measured: fused multiply-adds and native bf16 dot products in registers, and reading memory.
//!
//! Machines are shared and clocks move, so a result is worth its ratio to the ceiling measured in the same run.

use super::Cpu;
use super::isa::Isa;
use super::parallel::for_each_worker;
use super::simd::bf16_dot::run_rounds;
use super::simd::{Op, Simd, dispatch};
use std::hint::black_box;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Chains in the FMA loop: 12 cover a latency of 4 or 5 cycles × 2 a cycle and fit the 16 registers of AVX2.
const CHAINS: usize = 12;

struct FmaLoop {
    rounds: usize,
}

impl Op for FmaLoop {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        // Values stay near 1 for ever: x ← x·a + b with a + b = 1.
        let (a, b) = (s.splat(black_box(0.999_9)), s.splat(black_box(0.000_1)));
        let mut chains = [s.splat(black_box(1.000_1)); CHAINS];
        for _ in 0..self.rounds {
            for chain in &mut chains {
                *chain = s.fma(*chain, a, b);
            }
        }
        let mut lanes = [0.0; super::simd::MAX_LANES];
        let mut sum = 0.0;
        for chain in chains {
            s.store_slice(&mut lanes, chain);
            sum += lanes[0];
        }
        sum
    }
}

/// How far ahead of its loads a loop that asks for memory does so, in floats: 1 KiB.
const READ_AHEAD: usize = 256;

/// Reads several streams side by side and, if it asks, asks for all of them ahead of time. GB/s in the median, on one core: Zen 5 one stream 33, two 38, one asked for 40, two asked for 40 (and the
/// highest best of all, also on two cores; 512 to 2048 bytes ahead are alike, 4096 loses); Zen 3 one stream 23, two asked for 23, four asked for 27, four 30, eight 30.
struct ReadLoop<'a, const STREAMS: usize, const ASKS: bool> {
    data: &'a [f32],
}

impl<const STREAMS: usize, const ASKS: bool> Op for ReadLoop<'_, STREAMS, ASKS> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sums = [s.splat(0.0); 8];
        let step = 8 * S::LANES;
        // What is left over of the division stays unread: less than a thousand floats of millions.
        let part = self.data.len() / (STREAMS * step) * step;
        let streams: [&[f32]; STREAMS] =
            core::array::from_fn(|i| &self.data[i * part..(i + 1) * part]);
        for at in (0..part).step_by(step) {
            for stream in streams {
                let chunk = &stream[at..at + step];
                for (i, sum) in sums.iter_mut().enumerate() {
                    let v = &chunk[i * S::LANES..];
                    // Once a cache line.
                    if ASKS && (i * S::LANES).is_multiple_of(16) {
                        s.prefetch(v.as_ptr().wrapping_add(READ_AHEAD).cast());
                    }
                    *sum = s.add(*sum, s.load_slice(v));
                }
            }
        }
        let mut lanes = [0.0; super::simd::MAX_LANES];
        let mut total = 0.0;
        for sum in sums {
            s.store_slice(&mut lanes, sum);
            total += lanes[0];
        }
        total
    }
}

fn lanes(cpu: &Cpu) -> usize {
    super::grouped_gemm::lanes(cpu.isa())
}

/// FLOP/s of dependent-free fused multiply-adds on `cpu`'s threads and instruction set: the best of several runs within `budget`.
pub fn fma_peak(cpu: &Cpu, budget: Duration) -> f64 {
    let flops_per_round = (2 * CHAINS * lanes(cpu)) as f64;
    best_rate(cpu, budget, flops_per_round, &|rounds| {
        black_box(dispatch(cpu.isa(), FmaLoop { rounds }));
    })
}

/// FLOP/s of dependent-free native bf16 dot products (`vdpbf16ps`, or `bfmlalt` and `bfmlalb`: two multiply-adds a lane), measured like [`fma_peak`]. `None` where `cpu`'s
/// instruction set has none.
pub fn bf16_dot_peak(cpu: &Cpu, budget: Duration) -> Option<f64> {
    let flops_per_round = run_rounds(cpu.isa(), 1)?;
    Some(best_rate(cpu, budget, flops_per_round, &|rounds| {
        run_rounds(cpu.isa(), rounds);
    }))
}

/// Whether native bf16 dot products do as many FLOP/s as f32 fused multiply-adds, which are what widening needs besides. Found once, in some 0.1 ms, by turns and by the
/// best of each. The border is at three quarters: `vdpbf16ps` does twice the FLOPs of an FMA on Zen 4 and 5 and half of them on Emerald Rapids, and Arm's instructions are a
/// multiply-add each, so one would expect 1 there, or 1/2. It decides speed and no bit.
pub(crate) fn bf16_dot_pays(isa: Isa) -> bool {
    // At the most one instruction set of a build has native dot products.
    static FOUND: OnceLock<bool> = OnceLock::new();
    const TURNS: usize = 6;
    const ROUNDS: usize = 500;
    *FOUND.get_or_init(|| {
        let fma_flops = (2 * CHAINS * super::grouped_gemm::lanes(isa) * ROUNDS) as f64;
        let (mut dots, mut fmas) = (0.0f64, 0.0f64);
        for _ in 0..TURNS {
            let start = Instant::now();
            let dot_flops = run_rounds(isa, ROUNDS).unwrap_or(0.0);
            let turn = Instant::now();
            black_box(dispatch(isa, FmaLoop { rounds: ROUNDS }));
            let end = Instant::now();
            // A clock too coarse for this gives a time of 0: an infinite rate, and both then have it.
            dots = dots.max(dot_flops / (turn - start).as_secs_f64());
            fmas = fmas.max(fma_flops / (end - turn).as_secs_f64());
        }
        dots > 0.75 * fmas
    })
}

/// FLOP/s of `run`, which does so many rounds, on all of `cpu`'s threads: the best of several runs within `budget`.
fn best_rate(
    cpu: &Cpu,
    budget: Duration,
    flops_per_round: f64,
    run: &(dyn Fn(usize) + Sync),
) -> f64 {
    let threads = cpu.threads();
    let mut rounds = 10_000;
    let mut best = 0.0f64;
    let end = Instant::now() + budget;
    loop {
        let start = Instant::now();
        for_each_worker(threads, &|_| run(rounds));
        let time = start.elapsed().as_secs_f64();
        best = best.max(flops_per_round * rounds as f64 * threads as f64 / time);
        if time < 0.02 {
            rounds *= 4;
        }
        if Instant::now() >= end {
            return best;
        }
    }
}

/// `len` numbers for [`read_bandwidth`], in huge pages where the system has them, as packed weights are.
pub fn read_buffer(len: usize) -> Vec<f32> {
    let mut buffer = Vec::with_capacity(len);
    super::grouped_gemm::advise_huge_pages(buffer.spare_capacity_mut());
    // Numbers and not zeros: pages that hold nothing may be one page.
    buffer.extend((0..len).map(|i| (i % 251) as f32));
    buffer
}

/// Bytes/s of reading `buffer` (hundreds of megabytes, so that no cache holds it) on `cpu`'s threads: the best of several passes
/// within `budget`. Processors differ in what helps them, so half of the buffer is read as four streams that the hardware finds, half as two that are asked for, and the better half counts.
pub fn read_bandwidth(cpu: &Cpu, buffer: &[f32], budget: Duration) -> f64 {
    let (found, asked) = buffer.split_at(buffer.len() / 2);
    let mut best = 0.0f64;
    let end = Instant::now() + budget;
    loop {
        best = best.max(read_rate(cpu, found, |data| {
            dispatch(cpu.isa(), ReadLoop::<4, false> { data })
        }));
        best = best.max(read_rate(cpu, asked, |data| {
            dispatch(cpu.isa(), ReadLoop::<2, true> { data })
        }));
        if Instant::now() >= end {
            return best;
        }
    }
}

/// Bytes/s of one pass of `read`, which gets each thread's part.
fn read_rate(cpu: &Cpu, buffer: &[f32], read: impl Fn(&[f32]) -> f32 + Sync) -> f64 {
    let part = buffer.len().div_ceil(cpu.threads()).max(1);
    let start = Instant::now();
    for_each_worker(cpu.threads(), &|worker| {
        if let Some(data) = buffer.chunks(part).nth(worker) {
            black_box(read(data));
        }
    });
    size_of_val(buffer) as f64 / start.elapsed().as_secs_f64()
}
