//! The call that is checked, and the timed ones.

use super::super::device::{Routed, Vector, driver, encode};
use super::super::measure::{Measured, Sample, Stage, median};
use super::super::options::Options;
use super::super::{Result, fail};
use super::clock::Clock;
use super::rotation::{Rotation, Turn, adjust};
use super::weights::Weights;
use super::{OnGpu, failure, report};
use cudarc::driver::{CudaGraph, sys};
use moe_kernels::Cpu;
use moe_kernels::cuda::moe::{MoeOperands, RouteSource};
use moe_kernels::routing::{GivenRouting, LoadStats, Routing};
use std::collections::HashSet;
use std::io::Write;
use std::time::{Duration, Instant};

/// The first input of a number of tokens, and the workspace that all inputs share.
pub struct Call {
    tokens: usize,
    first: Turn,
    workspace: Vector<u8>,
}

/// The first batch of a seed through the layer. The call also loads the kernels.
pub fn sample(
    on: &OnGpu<'_>,
    weights: &Weights,
    tokens: usize,
    seed: u64,
) -> Result<(Call, Sample)> {
    let size = on.layer.workspace_size(tokens, on.gpu.cuda.device_info())?;
    let mut call = Call {
        tokens,
        first: Turn::new(on, seed, 0, tokens, 0)?,
        workspace: Vector::zeros(on.gpu, size)?,
    };
    poison(on, &mut call.first)?;
    forward(on, weights, &mut call.first, &mut call.workspace)?;
    let routed = Routed::read(on.gpu, &on.layer, tokens, &mut call.workspace)?;
    let config = &on.architecture.router;
    let mut routing = Routing::new();
    let given = GivenRouting::new(
        config.num_experts,
        config.slots(),
        &routed.ids,
        &routed.weights,
    );
    routing.set_given(&Cpu::new(), &given.null_experts(config.null_experts))?;
    let sample = Sample {
        tokens,
        x: call.first.x.read(on.gpu)?,
        logits: routed.logits,
        ids: routed.ids,
        weights: routed.weights,
        y: call.first.y.read(on.gpu)?,
        load: LoadStats::of(&routing),
    };
    Ok((call, sample))
}

/// No element of y may keep what it held before.
fn poison(on: &OnGpu<'_>, turn: &mut Turn) -> Result<()> {
    let len = turn.y.size() as usize / on.dtype.size();
    let nan = encode(on.dtype, &vec![f32::NAN; len]);
    Ok(turn.y.write_rows(on.gpu, 0, &nan)?)
}

/// Queues the layer.
fn forward(
    on: &OnGpu<'_>,
    weights: &Weights,
    turn: &mut Turn,
    workspace: &mut Vector<u8>,
) -> Result<()> {
    let (gpu, stream) = (on.gpu, &on.gpu.stream);
    let mut operands = MoeOperands::new(
        turn.x.view(stream)?,
        RouteSource::Gate(weights.gate_views(gpu)?),
        weights.expert_views(gpu)?,
    );
    operands.correction_bias = weights.correction().map(|v| v.view(stream));
    operands.shared = weights.shared_views(gpu)?;
    let mut y = turn.y.view_mut(stream)?;
    let mut space = workspace.view_mut(stream);
    on.layer
        .forward_into(&gpu.cuda, stream, &operands, &mut y, &mut space)
        .map_err(failure)
}

/// The least that a call must do, each operand moved once.
#[derive(Clone, Copy, Debug, Default)]
struct Work {
    /// Operations of the matrix products.
    flops: f64,
    bytes: f64,
    /// Bytes of weights.
    weights: f64,
}

impl Work {
    fn new(on: &OnGpu<'_>, weights: &Weights, tokens: usize, ids: &[i32]) -> Self {
        let (a, size) = (on.architecture, on.dtype.size() as f64);
        let [t, h, i] = [tokens, a.hidden, a.intermediate].map(|n| n as f64);
        let served = || {
            let own = |&&id: &&i32| usize::try_from(id).is_ok_and(|id| id < a.experts());
            ids.iter().filter(own)
        };
        let rows = served().count() as f64;
        let touched = served().collect::<HashSet<_>>().len() as f64;
        let inner = a.shared.map_or(0.0, |s| s.intermediate as f64);
        let columns = a.router.num_logits() as f64;
        let read = (touched * 3.0 * i * h + 3.0 * inner * h) * size + weights.gate_size() as f64;
        // h once out and once in; ys and the shared expert's output are f32; x is read by the gate, the experts and the shared expert.
        let between = 2.0 * (rows * i + t * inner) * size + 8.0 * h * rows;
        let shared = if inner > 0.0 { 8.0 * t * h } else { 0.0 };
        let routing = 8.0 * t * columns + 16.0 * ids.len() as f64;
        Self {
            flops: 2.0 * t * columns * h + 6.0 * rows * i * h + 6.0 * t * inner * h,
            bytes: read + between + shared + routing + 3.0 * t * h * size,
            weights: read,
        }
    }

    fn mean(all: &[Self]) -> Self {
        let mean = |of: fn(&Self) -> f64| all.iter().map(of).sum::<f64>() / all.len().max(1) as f64;
        Self {
            flops: mean(|w| w.flops),
            bytes: mean(|w| w.bytes),
            weights: mean(|w| w.weights),
        }
    }
}

/// Times the layer, called and as graphs. Before anything is timed, each replay must give the bits of the eager call.
pub fn measure(
    on: &OnGpu<'_>,
    weights: &mut Vec<Weights>,
    call: Call,
    sample: Sample,
    options: &Options,
    out: &mut dyn Write,
) -> Result<Measured> {
    if options.repeats == Some(0) {
        return fail("--repeats: expected at least 1, got 0");
    }
    let (tokens, gpu) = (call.tokens, on.gpu);
    let work = Work::new(on, &weights[0], tokens, &sample.ids);
    let room = gpu.free_memory()? / 10 * 9 / on.weight_bytes().max(1);
    let room = room + weights.len() as u64 - 1;
    let rotation = Rotation::new(work.weights as u64, gpu.cuda.device_info().l2_bytes, room);
    adjust(on, weights, rotation.copies)?;
    let mut rig = Rig::new(on, weights, call, rotation, options.seed)?;
    let (graphs, work) = rig.capture()?;

    let clock = Clock::new(gpu)?;
    let (mut eager, mut replayed) = (Vec::new(), Vec::new());
    let start = Instant::now();
    loop {
        eager.push(rig.time_eager(&clock)?);
        replayed.push(rig.time_graphs(&clock, &graphs)?);
        let enough = match options.repeats {
            Some(repeats) => eager.len() >= repeats,
            None => {
                let spent = start.elapsed() > Duration::from_millis(1500);
                eager.len() >= 50 || (eager.len() >= 5 && spent)
            }
        };
        if enough {
            break;
        }
    }
    let stage = |name, seconds: Vec<f64>| Stage {
        name,
        seconds: median(seconds.into_iter()),
        flops: work.flops,
        weights: on.dtype,
        bytes: work.bytes,
    };
    let measured = Measured {
        tokens,
        repeats: eager.len(),
        stages: vec![
            stage("layer, one call", eager),
            stage("layer, as a graph", replayed),
        ],
        sample,
    };
    report::times(out, gpu, &clock, &rotation, &measured)?;
    Ok(measured)
}

/// All that takes part in the timed calls.
struct Rig<'a> {
    on: &'a OnGpu<'a>,
    weights: &'a [Weights],
    tokens: usize,
    turns: Vec<Turn>,
    workspace: Vector<u8>,
}

impl<'a> Rig<'a> {
    fn new(
        on: &'a OnGpu<'a>,
        weights: &'a [Weights],
        call: Call,
        rotation: Rotation,
        seed: u64,
    ) -> Result<Self> {
        let (tokens, workspace) = (call.tokens, call.workspace);
        let mut turns = vec![call.first];
        for n in 1..rotation.inputs {
            turns.push(Turn::new(on, seed, n, tokens, n % rotation.copies)?);
        }
        Ok(Self {
            on,
            weights,
            tokens,
            turns,
            workspace,
        })
    }

    fn forward(&mut self, n: usize) -> Result<()> {
        let turn = &mut self.turns[n];
        forward(self.on, &self.weights[turn.copy], turn, &mut self.workspace)
    }

    /// A graph for each input, replayed once and compared with the call; and what the inputs ask for on average.
    fn capture(&mut self) -> Result<(Vec<CudaGraph>, Work)> {
        let gpu = self.on.gpu;
        let (mut graphs, mut work) = (Vec::new(), Vec::new());
        for n in 0..self.turns.len() {
            poison(self.on, &mut self.turns[n])?;
            self.forward(n)?;
            let called = self.turns[n].y.read_bytes(gpu)?;
            let routed = Routed::read(gpu, &self.on.layer, self.tokens, &mut self.workspace)?;
            let weights = &self.weights[self.turns[n].copy];
            work.push(Work::new(self.on, weights, self.tokens, &routed.ids));
            poison(self.on, &mut self.turns[n])?;
            let graph = self.capture_one(n)?;
            graph.launch().map_err(driver("cuGraphLaunch"))?;
            if self.turns[n].y.read_bytes(gpu)? != called {
                return fail(format!(
                    "T = {}: the replayed graph of input {n} gives other bits than the call",
                    self.tokens
                ));
            }
            graphs.push(graph);
        }
        Ok((graphs, Work::mean(&work)))
    }

    fn capture_one(&mut self, n: usize) -> Result<CudaGraph> {
        let stream = self.on.gpu.stream.clone();
        self.on.gpu.synchronize()?;
        stream
            .begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .map_err(driver("cuStreamBeginCapture"))?;
        let queued = self.forward(n);
        // Ended whatever happened, or the stream could do nothing else.
        let graph = stream
            .end_capture(
                sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH,
            )
            .map_err(driver("cuStreamEndCapture"));
        queued?;
        match graph? {
            Some(graph) => Ok(graph),
            None => fail("cuda: the capture gave no graph"),
        }
    }

    /// Seconds of one call, the mean of one through each input.
    fn time_eager(&mut self, clock: &Clock) -> Result<f64> {
        let (gpu, inputs) = (self.on.gpu, self.turns.len());
        let rig = std::cell::RefCell::new(self);
        let seconds = clock.time(
            gpu,
            || rig.borrow_mut().forward(inputs - 1),
            || (0..inputs).try_for_each(|n| rig.borrow_mut().forward(n)),
        )?;
        Ok(seconds / inputs as f64)
    }

    /// The same, replayed.
    fn time_graphs(&self, clock: &Clock, graphs: &[CudaGraph]) -> Result<f64> {
        let launch = |graph: &CudaGraph| Ok(graph.launch().map_err(driver("cuGraphLaunch"))?);
        let seconds = clock.time(
            self.on.gpu,
            || graphs.last().map_or(Ok(()), launch),
            || graphs.iter().try_for_each(launch),
        )?;
        Ok(seconds / graphs.len() as f64)
    }
}
