//! Routing at the shapes of published models: nanoseconds a token on one thread and on all, beside plain Rust with libm.
//!
//! `cargo bench --bench routing` checks every answer against the f64 oracle, prints a table (best of interleaved runs: ours, rival, ours, …), then each
//! score function at several E and T (medians of interleaved runs, beside the time to read the logits at the bandwidth of the same run), and then
//! criterion's own figures. `-- scores` prints only the score functions. `MOE_KERNELS_ISA` chooses the instruction set.

#![allow(missing_docs)] // criterion's macros make public functions

#[path = "support/micro.rs"]
mod micro;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use moe_kernels::cpu::roofline::{read_bandwidth, read_buffer};
use moe_kernels::reference;
use moe_kernels::routing::{
    RankBy, Renorm, RouteInput, Router, RouterConfig, Routing, Score, Selection, WeightSource,
};
use moe_kernels::{Cpu, MatRef};
use std::hint::black_box;
use std::time::{Duration, Instant};

struct Problem {
    name: &'static str,
    router: Router,
    tokens: usize,
    logits: Vec<f32>,
}

fn random(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    // Four uniforms: roughly normal, variance 4/3.
    (0..n)
        .map(|_| uniform() + uniform() + uniform() + uniform())
        .collect()
}

fn problems() -> Vec<Problem> {
    let shapes = [
        ("mixtral 8/2", RouterConfig::mixtral(8, 2)),
        ("gpt-oss 128/4", RouterConfig::gpt_oss(128, 4)),
        ("llama4 128/1", RouterConfig::llama4(128, 1)),
        ("olmoe 64/8", RouterConfig::olmoe(64, 8)),
        ("qwen3 128/8", RouterConfig::qwen3_moe(128, 8)),
        (
            "deepseek-v3 256/8 of 4/8",
            RouterConfig::deepseek_v3(256, 8, 8, 4, 2.5),
        ),
        ("kimi-k2 384/8", RouterConfig::kimi_k2(384, 8, 2.827)),
        (
            "longcat 768/12",
            RouterConfig::longcat_flash(512, 256, 12, 6.0),
        ),
        ("softmax 4096/64", RouterConfig::mixtral(4096, 64)),
    ];
    let mut problems = Vec::new();
    for (name, config) in shapes {
        for tokens in [1, 64, 4096] {
            if tokens * config.num_logits() > 1 << 22 {
                continue;
            }
            let logits = random(1, tokens * config.num_logits());
            let router = Router::new(config.clone()).unwrap();
            problems.push(Problem {
                name,
                router,
                tokens,
                logits,
            });
        }
    }
    problems
}

impl Problem {
    fn route(&self, cpu: &Cpu, routing: &mut Routing) {
        let logits =
            MatRef::new(&self.logits, self.tokens, self.router.config().num_logits()).unwrap();
        self.router
            .route(cpu, &RouteInput::new(logits), routing)
            .unwrap();
    }

    /// The first tokens against the oracle: the same experts, weights within 1e-5. (Seeded, so no near tie comes by chance.)
    fn check(&self, cpu: &Cpu) {
        let config = self.router.config();
        let mut routing = Routing::new();
        self.route(cpu, &mut routing);
        let tokens = self.tokens.min(4);
        let mut spec = reference::RouterSpec::top_k(config.num_experts, config.top_k);
        spec.num_null = config.null_experts.count();
        spec.scale = config.scale.into();
        if config.score == Score::Sigmoid {
            spec.score = reference::Score::Sigmoid;
        }
        if config.weights == WeightSource::SoftmaxSelectedLogits {
            spec.weights = reference::WeightsFrom::SoftmaxSelectedLogits;
        }
        spec.renorm = match config.renorm {
            Renorm::None => reference::Renorm::None,
            _ => reference::Renorm::Sum,
        };
        if let Selection::TopK { rank_by, groups } = config.selection {
            if rank_by == RankBy::Logit {
                spec.select_on = reference::SelectOn::Logit;
            }
            spec.groups = groups.map(|g| reference::Groups {
                n_group: g.n_group,
                topk_group: g.topk_group,
                score: reference::GroupScore::Top2Sum,
                fill: reference::Fill::NegInf,
            });
        }
        let logits: Vec<f64> = self.logits[..tokens * config.num_logits()]
            .iter()
            .map(|&z| z.into())
            .collect();
        let expected = reference::route(&spec, &logits);
        assert_eq!(
            routing.ids()[..expected.ids.len()],
            expected.ids,
            "{}",
            self.name
        );
        for (w, e) in routing.weights().iter().zip(&expected.weights) {
            assert!(
                (f64::from(*w) - e).abs() <= 1e-5 * e,
                "{}: {w} is not {e}",
                self.name
            );
        }
    }
}

/// What a framework's author would write first: softmax with libm, quickselect, sort, divide.
fn plain_softmax_top_k(
    logits: &[f32],
    experts: usize,
    k: usize,
    p: &mut [f32],
    order: &mut [u32],
    ids: &mut [i32],
    weights: &mut [f32],
) {
    for ((z, ids), weights) in logits
        .chunks_exact(experts)
        .zip(ids.chunks_exact_mut(k))
        .zip(weights.chunks_exact_mut(k))
    {
        let max = z.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        for (p, z) in p.iter_mut().zip(z) {
            *p = (z - max).exp();
        }
        let sum: f32 = p.iter().sum();
        p.iter_mut().for_each(|p| *p /= sum);
        order.iter_mut().zip(0..).for_each(|(o, e)| *o = e);
        let falling = |a: &u32, b: &u32| p[*b as usize].total_cmp(&p[*a as usize]);
        if k < experts {
            order.select_nth_unstable_by(k - 1, falling);
        }
        order[..k].sort_unstable_by(falling);
        let kept: f32 = order[..k].iter().map(|&e| p[e as usize]).sum();
        for ((id, w), &e) in ids.iter_mut().zip(weights).zip(order.iter()) {
            *id = e as i32;
            *w = p[e as usize] / kept;
        }
    }
}

/// Nanoseconds a token of the fastest of several interleaved runs of each.
fn race(tokens: usize, runs: &mut [&mut dyn FnMut()]) -> Vec<f64> {
    let mut best = vec![Duration::MAX; runs.len()];
    let repeat = (4096 / tokens).max(1);
    for _ in 0..15 {
        for (best, run) in best.iter_mut().zip(runs.iter_mut()) {
            let start = Instant::now();
            (0..repeat).for_each(|_| run());
            *best = (*best).min(start.elapsed());
        }
    }
    best.iter()
        .map(|b| b.as_nanos() as f64 / (repeat * tokens) as f64)
        .collect()
}

fn table() {
    let (one, all) = (isa().single_threaded(), isa());
    println!("isa {}, {} threads, ns a token", all.isa(), all.threads());
    println!(
        "{:26} {:>6} {:>12} {:>12} {:>14}",
        "router", "T", "one thread", "all threads", "plain softmax"
    );
    for problem in problems() {
        problem.check(&all);
        let config = problem.router.config();
        let (e, k) = (config.num_logits(), config.slots());
        let mut routings = [Routing::new(), Routing::new()];
        let (mut p, mut order) = (vec![0.0; e], vec![0; e]);
        let (mut ids, mut weights) = (vec![0; problem.tokens * k], vec![0.0; problem.tokens * k]);
        let [first, second] = &mut routings;
        let times = race(
            problem.tokens,
            &mut [
                &mut || problem.route(&one, black_box(first)),
                &mut || problem.route(&all, black_box(second)),
                &mut || {
                    plain_softmax_top_k(
                        black_box(&problem.logits),
                        e,
                        k,
                        &mut p,
                        &mut order,
                        &mut ids,
                        &mut weights,
                    )
                },
            ],
        );
        println!(
            "{:26} {:>6} {:>12.1} {:>12.1} {:>14.1}",
            problem.name, problem.tokens, times[0], times[1], times[2]
        );
    }
}

fn isa() -> Cpu {
    Cpu::from_env().expect("MOE_KERNELS_ISA")
}

/// A router for each score function, and for each way to rank and weigh that changes the work.
fn score_functions(experts: usize, k: usize) -> Vec<(&'static str, Router)> {
    let bias: Vec<f32> = micro::normals(3, experts)
        .iter()
        .map(|b| b / 16.0)
        .collect();
    let scored = |score| RouterConfig {
        score,
        renorm: Renorm::Sum,
        ..RouterConfig::new(experts, k)
    };
    let by_logit = |score| RouterConfig {
        selection: Selection::TopK {
            rank_by: RankBy::Logit,
            groups: None,
        },
        ..scored(score)
    };
    let selected = RouterConfig {
        weights: WeightSource::SoftmaxSelectedLogits,
        renorm: Renorm::None,
        ..by_logit(Score::Softmax)
    };
    let router = |config| Router::new(config).unwrap();
    let biased = |config| router(config).with_correction_bias(&bias).unwrap();
    vec![
        ("softmax", router(scored(Score::Softmax))),
        ("softmax of selected", router(selected)),
        ("softmax + bias", biased(scored(Score::Softmax))),
        ("sigmoid", router(scored(Score::Sigmoid))),
        ("sigmoid by logit", router(by_logit(Score::Sigmoid))),
        ("sigmoid + bias", biased(scored(Score::Sigmoid))),
        ("√softplus", router(scored(Score::SqrtSoftplus))),
        ("√softplus + bias", biased(scored(Score::SqrtSoftplus))),
        ("identity", router(scored(Score::Identity))),
    ]
}

/// Nanoseconds a token on one thread, and the ratio to softmax.
fn score_table() {
    let cpu = isa().single_threaded();
    let buffer = read_buffer(if micro::quick() { 1 << 16 } else { 1 << 26 });
    let read = read_bandwidth(&cpu, &buffer, Duration::from_millis(300));
    println!(
        "isa {}, one thread, K 8, ns a token (× softmax); read {:.1} GB/s",
        cpu.isa(),
        read / 1e9
    );
    for experts in [64, 128, 256, 512] {
        let routers = score_functions(experts, 8);
        println!(
            "E {experts}; reading the logits {:.1} ns",
            4e9 * experts as f64 / read
        );
        let all: Vec<Vec<f64>> = [1, 64, 4096]
            .map(|tokens| {
                let logits = random(1, tokens * experts);
                let input = RouteInput::new(MatRef::new(&logits, tokens, experts).unwrap());
                let mut routing = Routing::new();
                let cell = std::cell::RefCell::new(&mut routing);
                let mut calls: Vec<Box<dyn FnMut() + '_>> = routers
                    .iter()
                    .map(|(_, router)| {
                        let (cell, input) = (&cell, &input);
                        Box::new(move || router.route(&cpu, input, &mut cell.borrow_mut()).unwrap())
                            as _
                    })
                    .collect();
                let mut calls: Vec<&mut dyn FnMut()> =
                    calls.iter_mut().map(|c| &mut **c as _).collect();
                let times = micro::medians(tokens, &mut calls);
                times.iter().map(|t| t * 1e9 / tokens as f64).collect()
            })
            .into();
        for (i, (name, _)) in routers.iter().enumerate() {
            print!("{name:22}");
            for (times, tokens) in all.iter().zip([1, 64, 4096]) {
                print!(
                    "  T {tokens:>4} {:>7.1} ({:4.2})",
                    times[i],
                    times[i] / times[0]
                );
            }
            println!();
        }
    }
}

fn bench(c: &mut Criterion) {
    if std::env::args().any(|arg| arg == "scores") {
        return score_table();
    }
    table();
    score_table();
    let mut group = c.benchmark_group("routing");
    let cpu = isa();
    for problem in problems() {
        let mut routing = Routing::new();
        group.throughput(Throughput::Elements(problem.tokens as u64));
        group.bench_function(BenchmarkId::new(problem.name, problem.tokens), |b| {
            b.iter(|| problem.route(&cpu, black_box(&mut routing)));
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_millis(800));
    targets = bench
}
criterion_main!(benches);
