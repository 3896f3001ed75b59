//! The layer's stages, each timed through the public API, and the whole.

use super::options::Options;
use super::seeded::tokens as seeded_tokens;
use super::shapes::Architecture;
use super::source::Built;
use super::tensor::Values;
use super::{Result, fail};
use moe_kernels::combine::{Combine, Routed, Shared, combine_into};
use moe_kernels::cpu::roofline;
use moe_kernels::grouped_gemm::{Gather, Groups, scratch_bytes};
use moe_kernels::routing::{LoadStats, RouteInput, Routing};
use moe_kernels::{Cpu, DType, MatMut, MatRef};
use std::fmt;
use std::time::{Duration, Instant};

/// Bytes that are read to measure the memory: more than any cache holds.
pub const PROBE_BYTES: usize = 256 << 20;
/// It is timed in pieces whose halves (each is read in a way of its own) take as long as a stage of one token, so that both have the same chance of not being interrupted.
const PIECE_BYTES: usize = 64 << 20;

/// The machine's ceilings with an instruction set and a number of threads: the best that was seen of each.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ceilings {
    /// f32 FLOP/s
    pub fma_peak: f64,
    /// FLOP/s of native bf16 dot products, where there are any.
    pub bf16_dot_peak: Option<f64>,
    /// Bytes/s
    pub read_bandwidth: f64,
}

impl Ceilings {
    /// FLOP/s that products with weights of `dtype` cannot exceed.
    pub fn flop_peak(&self, dtype: DType) -> f64 {
        match dtype {
            // Whichever way is the faster one: `vdpbf16ps` is slower than widening on some CPUs.
            DType::BF16 => self.fma_peak.max(self.bf16_dot_peak.unwrap_or(0.0)),
            _ => self.fma_peak,
        }
    }

    fn see_arithmetic(&mut self, cpu: &Cpu, budget: Duration) {
        self.fma_peak = self.fma_peak.max(roofline::fma_peak(cpu, budget));
        let dots = roofline::bf16_dot_peak(cpu, budget);
        // `None` is less than any number.
        if dots > self.bf16_dot_peak {
            self.bf16_dot_peak = dots;
        }
    }
}

impl fmt::Display for Ceilings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.0} GFLOP/s f32 FMA, ", self.fma_peak / 1e9)?;
        if let Some(peak) = self.bf16_dot_peak {
            write!(f, "{:.0} bf16 dot, ", peak / 1e9)?;
        }
        write!(f, "{:.1} GB/s read", self.read_bandwidth / 1e9)
    }
}

/// What measures the ceilings.
pub struct Machine {
    pub ceilings: Ceilings,
    probe: Vec<f32>,
}

impl Machine {
    pub fn measure(cpu: &Cpu) -> Self {
        let mut machine = Self {
            ceilings: Ceilings::default(),
            probe: roofline::read_buffer(PROBE_BYTES / 4),
        };
        let ceilings = &mut machine.ceilings;
        ceilings.see_arithmetic(cpu, Duration::from_millis(300));
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(300) {
            machine.sweep_caches(cpu);
        }
        machine
    }

    /// Forgets the ceilings and begins to look anew. On a shared machine they move within minutes, memory's by half: a share of the roof is worth the ceilings of
    /// the same seconds.
    pub fn begin(&mut self, cpu: &Cpu) {
        self.ceilings = Ceilings::default();
        self.look_again(cpu);
        self.sweep_caches(cpu);
    }

    /// Reads the probe once, so that no cache holds anything else. A model does the same: it visits all other layers before it comes back to this one.
    ///
    /// This is one more look at the memory's ceiling.
    pub fn sweep_caches(&mut self, cpu: &Cpu) {
        for piece in self.probe.chunks(PIECE_BYTES / 4) {
            let seen = roofline::read_bandwidth(cpu, piece, Duration::ZERO);
            let best = &mut self.ceilings.read_bandwidth;
            *best = best.max(seen);
        }
    }

    /// One more look at the arithmetic's ceilings.
    pub fn look_again(&mut self, cpu: &Cpu) {
        self.ceilings.see_arithmetic(cpu, Duration::from_millis(60));
    }
}

/// One line of the table.
#[derive(Clone, Debug)]
pub struct Stage {
    pub name: &'static str,
    /// Median of the repeats.
    pub seconds: f64,
    /// Operations of its matrix products.
    pub flops: f64,
    /// Format of their weights, which decides what could be reached.
    pub weights: DType,
    /// Bytes that must move at least: each operand once.
    pub bytes: f64,
}

/// One call's input and output, for the check.
#[derive(Clone, Debug)]
pub struct Sample {
    pub tokens: usize,
    /// `[T, H]`, exact in the layer's format.
    pub x: Vec<f32>,
    /// `[T, R]`
    pub logits: Vec<f32>,
    /// `[T, K]`
    pub ids: Vec<i32>,
    pub weights: Vec<f32>,
    /// `[T, H]`
    pub y: Vec<f32>,
    pub load: LoadStats,
}

/// What a number of tokens gave.
#[derive(Clone, Debug)]
pub struct Measured {
    pub tokens: usize,
    pub repeats: usize,
    pub stages: Vec<Stage>,
    pub sample: Sample,
}

/// A layer with the buffers of a call, whole and in stages.
pub struct Call<'a> {
    cpu: &'a Cpu,
    built: &'a Built,
    architecture: &'a Architecture,
    dtype: DType,
    tokens: usize,
    x: Values,
    y: Values,
    h: Values,
    ys: Vec<f32>,
    logits: Vec<f32>,
    shared_h: Values,
    shared_y: Vec<f32>,
    shared_gate: Vec<f32>,
    routing: Routing,
    workspace: Vec<u8>,
    scratch: Vec<u8>,
}

/// Times the layer on `tokens` tokens. Every repeat has other tokens and, with a measured machine, begins with cold caches.
pub fn measure(
    cpu: &Cpu,
    built: &Built,
    architecture: &Architecture,
    dtype: DType,
    tokens: usize,
    mut machine: Option<&mut Machine>,
    options: &Options,
) -> Result<Measured> {
    if options.repeats == Some(0) {
        return fail("--repeats: expected at least 1, got 0");
    }
    let mut call = Call::new(cpu, built, architecture, dtype, tokens)?;
    // This call's tokens are those of the check; it also touches all buffers for the first time.
    let sample = call.sample(options.seed)?;
    let mut sweep = || {
        if let Some(machine) = machine.as_deref_mut() {
            machine.sweep_caches(cpu);
        }
    };
    let mut whole = Vec::new();
    let mut parts: Vec<Vec<Stage>> = Vec::new();
    let start = Instant::now();
    loop {
        let repeat = whole.len();
        call.load(options.seed, 2 * repeat + 1);
        sweep();
        whole.push(time(|| call.forward())?);
        call.load(options.seed, 2 * repeat + 2);
        sweep();
        parts.push(call.stages()?);
        let enough = match options.repeats {
            Some(repeats) => whole.len() >= repeats,
            None => {
                whole.len() >= 50
                    || (whole.len() >= 5 && start.elapsed() > Duration::from_millis(1500))
            }
        };
        if enough {
            break;
        }
    }
    if let Some(machine) = machine {
        machine.look_again(cpu);
    }
    let mut stages: Vec<Stage> = (0..parts[0].len())
        .map(|i| Stage {
            seconds: median(parts.iter().map(|p| p[i].seconds)),
            bytes: median(parts.iter().map(|p| p[i].bytes)),
            ..parts[0][i].clone()
        })
        .collect();
    stages.push(Stage {
        name: "layer, one call",
        seconds: median(whole.iter().copied()),
        flops: stages.iter().map(|s| s.flops).sum(),
        weights: call.dtype,
        bytes: stages.iter().map(|s| s.bytes).sum(),
    });
    Ok(Measured {
        tokens,
        repeats: whole.len(),
        stages,
        sample,
    })
}

impl<'a> Call<'a> {
    /// Buffers for `tokens` tokens.
    pub fn new(
        cpu: &'a Cpu,
        built: &'a Built,
        architecture: &'a Architecture,
        dtype: DType,
        tokens: usize,
    ) -> Result<Self> {
        let (hidden, inner) = (architecture.hidden, architecture.intermediate);
        let rows = tokens * architecture.router.slots();
        let workspace = built.layer.workspace_size(cpu, tokens)?;
        let shared = architecture.shared.map_or(0, |s| s.intermediate);
        Ok(Self {
            cpu,
            built,
            architecture,
            dtype,
            tokens,
            x: Values::zeros(dtype, 0),
            y: Values::zeros(dtype, tokens * hidden),
            h: Values::zeros(dtype, rows * inner),
            ys: vec![0.0; rows * hidden],
            logits: vec![0.0; tokens * architecture.router.num_logits()],
            shared_h: Values::zeros(dtype, tokens * shared),
            shared_y: vec![0.0; if shared > 0 { tokens * hidden } else { 0 }],
            shared_gate: vec![0.0; tokens],
            routing: Routing::with_capacity(tokens, built.layer.router())?,
            workspace: vec![0; workspace],
            scratch: vec![0; scratch_bytes(cpu)],
        })
    }

    /// Takes tokens `[T, H]`.
    pub fn set_input(&mut self, x: &[f32]) {
        self.x = Values::from_f32s(self.dtype, x);
    }

    /// Takes the `n`-th batch of tokens of a seed.
    fn load(&mut self, seed: u64, n: usize) -> Vec<f32> {
        let (tokens, hidden) = (self.tokens, self.architecture.hidden);
        let x = seeded_tokens(seed, n * tokens, tokens, hidden, self.dtype);
        self.set_input(&x);
        x
    }

    /// The layer in one call.
    pub fn forward(&mut self) -> Result<()> {
        let (t, h) = (self.tokens, self.architecture.hidden);
        let x = self.x.matrix(t, h)?;
        let y = self.y.matrix_mut(t, h)?;
        Ok(self
            .built
            .layer
            .forward(self.cpu, x, y, &mut self.routing, &mut self.workspace)?)
    }

    /// The first batch of a seed through the layer.
    pub fn sample(&mut self, seed: u64) -> Result<Sample> {
        let x = self.load(seed, 0);
        self.forward()?;
        self.logits()?;
        Ok(Sample {
            tokens: self.tokens,
            x,
            logits: self.logits.clone(),
            ids: self.routing.ids().to_vec(),
            weights: self.routing.weights().to_vec(),
            y: self.y.f32s(),
            load: LoadStats::of(&self.routing),
        })
    }

    fn logits(&mut self) -> Result<()> {
        let x = self.x.matrix(self.tokens, self.architecture.hidden)?;
        let out = MatMut::new(
            &mut self.logits,
            self.tokens,
            self.architecture.router.num_logits(),
        )?;
        Ok(self
            .built
            .layer
            .logits_into(self.cpu, x, out, &mut self.workspace)?)
    }

    /// One call, stage by stage, with what each costs.
    fn stages(&mut self) -> Result<Vec<Stage>> {
        let (t, h, i) = (
            self.tokens,
            self.architecture.hidden,
            self.architecture.intermediate,
        );
        let (size, width) = (self.dtype.size(), self.architecture.router.num_logits());
        let mut stages = Vec::new();
        let dtype = self.dtype;
        let mut push = |name, seconds, flops: usize, bytes: usize| {
            // The gate is f32; only the experts have the layer's format.
            let of_experts = !["router GEMM", "routing", "combine"].contains(&name);
            stages.push(Stage {
                name,
                seconds,
                flops: flops as f64,
                weights: if of_experts { dtype } else { DType::F32 },
                bytes: bytes as f64,
            });
        };

        let seconds = time(|| self.logits())?;
        push(
            "router GEMM",
            seconds,
            2 * t * width * h,
            4 * width * h + t * h * size + 4 * t * width,
        );

        let layer = &self.built.layer;
        let (cpu, routing) = (self.cpu, &mut self.routing);
        let input = RouteInput::new(MatRef::new(&self.logits, t, width)?);
        let seconds = time(|| Ok(layer.router().route(cpu, &input, routing)?))?;
        let slots = self.routing.slots();
        push("routing", seconds, 0, 4 * t * width + 16 * t * slots);

        let permutation = self.routing.permutation();
        let groups = Groups::Ragged {
            offsets: permutation.offsets(),
            counts: permutation.counts(),
        };
        let rows = permutation.num_rows();
        let active = permutation.counts().iter().filter(|&&c| c > 0).count();
        let on_input = self.architecture.weight_on_input;
        let gather = Gather {
            pair_of_row: permutation.pair_of_row(),
            slots,
            input_scale: on_input.then(|| self.routing.weights()),
        };
        let experts = layer.experts();
        let x = self.x.matrix(t, h)?;
        let out = self.h.matrix_mut(rows, i)?;
        let scratch = &mut self.scratch;
        let seconds = time(|| Ok(experts.up_into(cpu, x, Some(gather), groups, out, scratch)?))?;
        push(
            "gate_up",
            seconds,
            4 * rows * i * h,
            2 * active * i * h * size + t * h * size + rows * i * size,
        );

        let inner = self.h.matrix(rows, i)?;
        let out = MatMut::new(&mut self.ys, rows, h)?.into();
        let scratch = &mut self.scratch;
        let seconds = time(|| Ok(experts.down_into(cpu, inner, groups, out, scratch)?))?;
        push(
            "down",
            seconds,
            2 * rows * i * h,
            active * i * h * size + rows * i * size + 4 * rows * h,
        );

        if let (Some(shared), Some(shape)) = (&self.built.shared, self.architecture.shared) {
            let groups = Groups::Single { rows: t, expert: 0 };
            let (shared_h, shared_y) = (&mut self.shared_h, &mut self.shared_y);
            let scratch = &mut self.scratch;
            let is = shape.intermediate;
            let seconds = time(|| {
                shared.up_into(cpu, x, None, groups, shared_h.matrix_mut(t, is)?, scratch)?;
                let out = MatMut::new(shared_y, t, h)?.into();
                Ok(shared.down_into(cpu, shared_h.matrix(t, is)?, groups, out, scratch)?)
            })?;
            push(
                "shared expert",
                seconds,
                6 * t * is * h,
                3 * is * h * size + t * h * size + 4 * t * h,
            );
        }

        let mut combine = Combine::new(Routed::Pairs {
            ys: MatRef::new(&self.ys, rows, h)?,
            weights: (!on_input).then(|| self.routing.weights()),
            row_of_pair: permutation.row_of_pair(),
            slots,
            identity: None,
        });
        if !self.shared_y.is_empty() {
            let shared = MatRef::new(&self.shared_y, t, h)?;
            let gated = self
                .architecture
                .shared
                .is_some_and(|s| s.join != super::shapes::Join::Add);
            combine.shared = Some(match gated {
                true => Shared::SigmoidGate(shared, &self.shared_gate),
                false => Shared::Add(shared),
            });
        }
        let out = self.y.matrix_mut(t, h)?;
        let seconds = time(|| Ok(combine_into(cpu, &combine, out)?))?;
        let shared_bytes = 4 * self.shared_y.len();
        push(
            "combine",
            seconds,
            2 * rows * h,
            4 * rows * h + shared_bytes + t * h * size,
        );
        Ok(stages)
    }
}

fn time(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_secs_f64())
}

/// The middle of the sorted values, the upper one of two.
pub fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
