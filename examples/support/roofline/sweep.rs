//! The measurement.

use super::Options;
use crate::support::layer::Result;
use crate::support::layer::measure::{Ceilings, Machine, median};
use crate::support::layer::seeded::Seeded;
use crate::support::layer::shapes::Architecture;
use crate::support::layer::source::{self, Built};
use crate::support::load::Load;
use crate::support::roof::{Roof, Work};
use crate::support::subject::{Batch, Subject};
use crate::support::{check_memory, on_threads, progress, shapes};
use moe_kernels::{Cpu, DType, Isa};
use std::time::{Duration, Instant};

/// Batches that take turns, so that a call does not find the last one's experts in the cache.
const TURNS: usize = 8;
/// Calls of a point, at least while the budget lasts and at most.
const REPEATS: (usize, usize) = (3, 60);

/// A layer in one format on one number of threads with one number of tokens.
pub struct Point {
    pub dtype: DType,
    pub tokens: usize,
    /// Median.
    pub seconds: f64,
    pub repeats: usize,
    /// Mean of the batches that took turns.
    pub work: Work,
    /// Mean number of experts that a call touched.
    pub touched: f64,
    /// Of the same seconds.
    pub ceilings: Ceilings,
}

impl Point {
    /// What bounds it.
    pub fn roof(&self) -> Roof {
        self.work.roof(&self.ceilings, self.dtype)
    }

    /// Its share of the roof: 1 is the limit.
    pub fn share(&self) -> f64 {
        self.roof().seconds / self.seconds
    }
}

/// The curves of a layer on a number of threads: a row of the picture.
pub struct Series {
    pub shape: Architecture,
    pub threads: usize,
    /// For each dtype, ascending tokens.
    pub points: Vec<Point>,
}

/// All of it.
pub struct Sweep {
    pub isa: Isa,
    pub load: Load,
    pub series: Vec<Series>,
}

/// Time and points that are left.
struct Budget {
    seconds: f64,
    points: usize,
}

/// Measures everything that the options name.
pub fn measure(cpu: &Cpu, options: &Options) -> Result<Sweep> {
    let (threads, tokens) = (options.thread_counts()?, options.token_counts()?);
    let architectures = options.architectures()?;
    let mut budget = Budget {
        seconds: options.budget,
        points: architectures.len() * options.dtypes.len() * threads.len() * tokens.len(),
    };
    let mut sweep = Sweep {
        isa: cpu.isa(),
        load: options.load,
        series: Vec::new(),
    };
    let mut machine = Machine::measure(cpu);
    for shape in architectures {
        let first = sweep.series.len();
        sweep.series.extend(threads.iter().map(|&threads| Series {
            shape: shape.clone(),
            threads,
            points: Vec::new(),
        }));
        for &dtype in &options.dtypes {
            let mut weights = Seeded {
                architecture: shape.clone(),
                seed: options.seed,
                dtype,
            };
            check_memory(&shape.name, shapes::weight_bytes(&shape, dtype))?;
            let built = source::build(cpu, &shape, &mut weights, dtype, progress().as_mut())?;
            for (i, &n) in threads.iter().enumerate() {
                let points = on_threads(n, || {
                    let mut curve = Curve {
                        cpu,
                        built: &built,
                        weights: &mut weights,
                        machine: &mut machine,
                        options,
                    };
                    let points = tokens.iter().map(|&t| curve.point(t, &mut budget));
                    points.collect::<Result<Vec<_>>>()
                })?;
                sweep.series[first + i].points.extend(points);
            }
        }
    }
    Ok(sweep)
}

/// One layer in one format on one number of threads.
struct Curve<'a> {
    cpu: &'a Cpu,
    built: &'a Built,
    weights: &'a mut Seeded,
    machine: &'a mut Machine,
    options: &'a Options,
}

impl Curve<'_> {
    fn point(&mut self, tokens: usize, budget: &mut Budget) -> Result<Point> {
        let (shape, dtype) = (self.weights.architecture.clone(), self.weights.dtype);
        let mut subject = Subject::new(self.cpu, self.built, &shape, dtype, tokens)?;
        let turns = TURNS.min(4096usize.div_ceil(tokens));
        let batches: Vec<Batch> = (0..turns)
            .map(|n| {
                Batch::new(
                    &shape,
                    dtype,
                    self.options.load,
                    self.options.seed,
                    n,
                    tokens,
                )
            })
            .collect();
        // The check also touches all buffers for the first time.
        subject.check(&batches[0], self.weights, self.options.check)?;
        self.machine.begin(self.cpu);
        let (mut times, mut works) = (Vec::new(), Vec::new());
        let start = Instant::now();
        let allowed = Duration::from_secs_f64((budget.seconds / budget.points as f64).max(0.0));
        loop {
            let batch = &batches[times.len() % turns];
            self.machine.sweep_caches(self.cpu);
            let call = Instant::now();
            subject.forward(batch)?;
            times.push(call.elapsed().as_secs_f64());
            works.push(subject.work(batch));
            let least = if budget.seconds > 0.0 { REPEATS.0 } else { 1 };
            let spent = start.elapsed() > allowed && times.len() >= least;
            if spent || times.len() >= REPEATS.1 {
                break;
            }
        }
        self.machine.look_again(self.cpu);
        budget.seconds -= start.elapsed().as_secs_f64();
        budget.points -= 1;
        let mean = |of: fn(&Work) -> f64| works.iter().map(of).sum::<f64>() / works.len() as f64;
        let work = Work {
            flops: mean(|w| w.flops),
            bytes: mean(|w| w.bytes),
        };
        let expert_bytes = (shape.expert_elements() * dtype.size()) as f64;
        Ok(Point {
            dtype,
            tokens,
            seconds: median(times.iter().copied()),
            repeats: times.len(),
            work,
            touched: work.bytes / expert_bytes,
            ceilings: self.machine.ceilings,
        })
    }
}
