//! What is printed about a GPU.

use super::super::Result;
use super::super::device::Gpu;
use super::super::measure::Measured;
use super::super::report::duration;
use super::clock::Clock;
use super::rotation::Rotation;
use super::weights::Weights;
use std::io::Write;

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Where it runs.
pub fn device(out: &mut dyn Write, gpu: &Gpu) -> Result<()> {
    let info = gpu.cuda.device_info();
    let (major, minor) = info.compute_capability;
    let driver = gpu.cuda.driver_version()?;
    writeln!(
        out,
        "gpu: {}, compute capability {major}.{minor}, {} multiprocessors, L2 {:.0} MiB, driver for CUDA {}.{}",
        gpu.name,
        info.sm_count,
        mib(info.l2_bytes),
        driver.0,
        driver.1
    )?;
    if gpu.is_emulated() {
        writeln!(
            out,
            "NO GPU: this is the emulator, which runs the kernels on the CPU. The answers count, the times are the emulator's and say nothing of any GPU."
        )?;
    }
    Ok(())
}

/// What lies on it.
pub fn uploaded(out: &mut dyn Write, weights: &Weights) -> Result<()> {
    writeln!(
        out,
        "uploaded {:.2} GiB in {:.1} s",
        mib(weights.size()) / 1024.0,
        weights.uploading.as_secs_f64()
    )?;
    Ok(())
}

/// The table of one number of tokens.
pub fn times(
    out: &mut dyn Write,
    gpu: &Gpu,
    clock: &Clock,
    rotation: &Rotation,
    measured: &Measured,
) -> Result<()> {
    let Rotation { copies, inputs, .. } = rotation;
    writeln!(
        out,
        "  timed on {}: median of {} rounds of {inputs} calls, by {}",
        gpu.name,
        measured.repeats,
        clock.name()
    )?;
    writeln!(
        out,
        "  {inputs} inputs and {copies} cop{} of the weights take turns: {:.1} MiB of weights are read before one is read again, the L2 holds {:.0} MiB{}",
        if *copies == 1 { "y" } else { "ies" },
        mib(rotation.read_between),
        mib(rotation.l2),
        if rotation.is_cold() {
            ""
        } else {
            "; weights MAY COME FROM THE L2"
        }
    )?;
    let emulated = if gpu.is_emulated() {
        "  times of an emulator"
    } else {
        ""
    };
    writeln!(
        out,
        "  how                     time   TFLOP/s      GB/s{emulated}"
    )?;
    for stage in &measured.stages {
        writeln!(
            out,
            "  {:17} {:>10} {:>9.3} {:>9.2}",
            stage.name,
            duration(stage.seconds),
            stage.flops / stage.seconds / 1e12,
            stage.bytes / stage.seconds / 1e9
        )?;
    }
    if let Some(fastest) = measured.stages.last() {
        writeln!(
            out,
            "  {:.0} tokens/s through this layer as a graph",
            measured.tokens as f64 / fastest.seconds
        )?;
    }
    Ok(())
}
