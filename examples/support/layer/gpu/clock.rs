//! How long the GPU takes for what is queued.

use super::super::Result;
use super::super::device::{Gpu, driver};
use cudarc::driver::{CudaEvent, sys};
use std::time::Instant;

/// The oldest driver whose events are read: cudarc, built for the newest CUDA, asks for `cuEventElapsedTime_v2`, which came with CUDA 12.8, and panics
/// where it is missing.
const EVENTS_SINCE: (u32, u32) = (12, 8);

/// What measures.
pub enum Clock {
    /// Two events on the stream, before and after.
    Events(CudaEvent, CudaEvent),
    /// This CPU's clock, from an idle GPU to an idle GPU; it includes the first launch and the last wait.
    Host,
}

impl Clock {
    /// Events where the driver has what they need.
    pub fn new(gpu: &Gpu) -> Result<Self> {
        if gpu.cuda.driver_version()? < EVENTS_SINCE {
            return Ok(Self::Host);
        }
        let event = || {
            let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
            gpu.cuda
                .context()
                .new_event(flags)
                .map_err(driver("cuEventCreate"))
        };
        Ok(Self::Events(event()?, event()?))
    }

    /// In words.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Events(..) => "CUDA events",
            Self::Host => "the host's clock, since the driver is older than 12.8",
        }
    }

    /// Seconds for what `work` queues. `before` is queued first and not timed: while the GPU has that in hand, `work` can be queued, so that with events the time
    /// of launching counts only where the GPU would wait for it.
    pub fn time(
        &self,
        gpu: &Gpu,
        before: impl FnOnce() -> Result<()>,
        work: impl FnOnce() -> Result<()>,
    ) -> Result<f64> {
        before()?;
        let Self::Events(start, end) = self else {
            gpu.synchronize()?;
            let start = Instant::now();
            work()?;
            gpu.synchronize()?;
            return Ok(start.elapsed().as_secs_f64());
        };
        let record = driver("cuEventRecord");
        start.record(&gpu.stream).map_err(&record)?;
        work()?;
        end.record(&gpu.stream).map_err(&record)?;
        let milliseconds = start
            .elapsed_ms(end)
            .map_err(driver("cuEventElapsedTime"))?;
        Ok(f64::from(milliseconds) * 1e-3)
    }
}
