//! Medians: calls queued one by one, and replays of a graph that holds several.

use super::gpu::Gpu;
use super::subjects::Subject;
use super::{Result, Settings};
use cudarc::driver::CudaGraph;
use moe_kernels::cuda::DeviceInfo;
use std::time::{Duration, Instant};

/// Seconds of one call.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Spread {
    pub median: f64,
    /// A tenth of the samples is below,
    pub low: f64,
    /// a tenth above.
    pub high: f64,
    pub samples: usize,
}

impl Spread {
    pub fn of(mut times: Vec<f64>) -> Self {
        times.sort_by(f64::total_cmp);
        let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
        Self {
            median: at(0.5),
            low: at(0.1),
            high: at(0.9),
            samples: times.len(),
        }
    }
}

/// One subject, ready to be timed: checked, loaded, warm, its graph captured.
pub struct Runner<'a> {
    gpu: &'a Gpu,
    device: DeviceInfo,
    subject: &'a dyn Subject,
    /// Calls of one sample.
    calls: usize,
    graph: CudaGraph,
}

impl<'a> Runner<'a> {
    /// Checks answers, warms up, and captures as many calls as last long enough for the clock, whole rounds of the subject's sets.
    pub fn new(
        gpu: &'a Gpu,
        device: DeviceInfo,
        subject: &'a dyn Subject,
        settings: &Settings,
    ) -> Result<Self> {
        check(gpu, &device, subject)?;
        let sets = subject.sets();
        let round = || (0..sets).try_for_each(|set| subject.queue(gpu, &device, set));
        gpu.seconds(round)?;
        let once = gpu.seconds(round)? / sets as f64;
        let wanted = (settings.sample / once.max(1e-7)).ceil() as usize;
        let calls = wanted.clamp(1, settings.most_calls).next_multiple_of(sets);
        let queue = || (0..calls).try_for_each(|n| subject.queue(gpu, &device, n % sets));
        let graph = gpu.capture(queue)?;
        graph.launch()?;
        gpu.stream.synchronize()?;
        Ok(Self {
            gpu,
            device,
            subject,
            calls,
            graph,
        })
    }

    /// Seconds of a call, planned and queued by the host each time.
    pub fn eager(&self) -> Result<f64> {
        let sets = self.subject.sets();
        let queue = |n| self.subject.queue(self.gpu, &self.device, n % sets);
        let total = self.gpu.seconds(|| (0..self.calls).try_for_each(queue))?;
        Ok(total / self.calls as f64)
    }

    /// Seconds of a call in a replayed graph.
    pub fn replay(&self) -> Result<f64> {
        let total = self.gpu.seconds(|| Ok(self.graph.launch()?))?;
        Ok(total / self.calls as f64)
    }
}

/// Eager and replayed samples of all, by turns; answers are checked again in the end.
pub fn measure(runners: &[Runner<'_>], settings: &Settings) -> Result<Vec<(Spread, Spread)>> {
    let end = Instant::now() + Duration::from_secs_f64(settings.budget * runners.len() as f64);
    let mut times = vec![(Vec::new(), Vec::new()); runners.len()];
    for sample in 0..settings.samples.1 {
        if sample >= settings.samples.0 && Instant::now() > end {
            break;
        }
        for turn in 0..runners.len() {
            // Each round begins with another.
            let who = (sample + turn) % runners.len();
            times[who].0.push(runners[who].eager()?);
            times[who].1.push(runners[who].replay()?);
        }
    }
    for runner in runners {
        check(runner.gpu, &runner.device, runner.subject)?;
    }
    let spreads = times.into_iter();
    Ok(spreads
        .map(|(eager, replay)| (Spread::of(eager), Spread::of(replay)))
        .collect())
}

/// Runs the first and the last set over poisoned outputs and compares.
fn check(gpu: &Gpu, device: &DeviceInfo, subject: &dyn Subject) -> Result<()> {
    let last = subject.sets() - 1;
    for set in if last > 0 { vec![0, last] } else { vec![0] } {
        subject.poison(gpu, set)?;
        subject.queue(gpu, device, set)?;
        gpu.stream.synchronize()?;
        subject
            .check(gpu, set)
            .map_err(|why| format!("a wrong answer, nothing timed: {why}"))?;
    }
    Ok(())
}
