//! Tables and bars.

use super::Result;
use super::measure::{Machine, Measured};
use super::options::Options;
use super::oracle::{Checked, Worst};
use super::shapes::{Architecture, Join};
use super::source::Built;
use moe_kernels::{Cpu, DType};
use std::io::Write;

/// What runs.
pub fn header(
    out: &mut dyn Write,
    a: &Architecture,
    options: &Options,
    dtype: DType,
) -> Result<()> {
    writeln!(
        out,
        "{}: H {}, I {}, E {}, K {}, {dtype}, {}",
        a.name,
        a.hidden,
        a.intermediate,
        a.experts(),
        a.router.top_k,
        match &options.weights {
            Some(path) => format!("weights from {}", path.display()),
            None => format!("weights from seed {}", options.seed),
        }
    )?;
    writeln!(out, "router: {}", a.describe_router())?;
    if let Some(shared) = a.shared {
        let join = if shared.join == Join::SigmoidGate {
            ", behind a sigmoid gate"
        } else {
            ""
        };
        writeln!(out, "shared expert: I {}{join}", shared.intermediate)?;
    }
    Ok(())
}

/// Where it runs.
pub fn machine(out: &mut dyn Write, cpu: &Cpu, machine: Option<&Machine>) -> Result<()> {
    write!(out, "cpu: {}, {} thread(s)", cpu.isa(), cpu.threads())?;
    if let Some(machine) = machine {
        write!(out, "; measured at the start: {}", machine.ceilings)?;
    }
    Ok(writeln!(out)?)
}

/// What was packed.
pub fn packed(out: &mut dyn Write, built: &Built) -> Result<()> {
    let gib = built.packed_bytes as f64 / f64::from(1 << 30);
    writeln!(
        out,
        "packed {gib:.2} GiB in {:.1} s",
        built.packing.as_secs_f64()
    )?;
    Ok(())
}

/// The table of stages. Shares are of the best ceilings seen so far, at the start or between the calls.
pub fn stages(out: &mut dyn Write, machine: Option<&Machine>, measured: &Measured) -> Result<()> {
    writeln!(
        out,
        "\nT = {} (median of {} calls{})",
        measured.tokens,
        measured.repeats,
        if machine.is_some() {
            ", each with other tokens and cold caches"
        } else {
            ""
        }
    )?;
    if let Some(m) = machine {
        writeln!(
            out,
            "  shares are of the best seen so far: {}; bf16 experts are held against bf16 dot where there is one",
            m.ceilings
        )?;
    }
    writeln!(
        out,
        "  stage                 time   GFLOP/s      of peak     GB/s  of read bandwidth"
    )?;
    for stage in &measured.stages {
        let (flops, bytes) = (stage.flops / stage.seconds, stage.bytes / stage.seconds);
        let share = |rate: f64, peak: Option<f64>| match peak {
            Some(peak) => format!("{:.1}%", 100.0 * rate / peak),
            None => "-".into(),
        };
        let (mut work, mut of_peak) = (String::new(), String::new());
        if stage.flops > 0.0 {
            work = format!("{:.1}", flops / 1e9);
            of_peak = share(flops, machine.map(|m| m.ceilings.flop_peak(stage.weights)));
        }
        let of_bandwidth = share(bytes, machine.map(|m| m.ceilings.read_bandwidth));
        writeln!(
            out,
            "  {:15} {:>10} {work:>9} {of_peak:>12} {:>8.1} {of_bandwidth:>18}",
            stage.name,
            duration(stage.seconds),
            bytes / 1e9,
        )?;
    }
    if let Some(layer) = measured.stages.last() {
        writeln!(
            out,
            "  {:.0} tokens/s through this layer",
            measured.tokens as f64 / layer.seconds
        )?;
    }
    Ok(())
}

/// Four digits and a unit.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 => format!("{s:.3} s"),
        s if s >= 1e-3 => format!("{:.3} ms", s * 1e3),
        s => format!("{:.2} µs", s * 1e6),
    }
}

/// The experts' load in the checked call.
pub fn load(out: &mut dyn Write, measured: &Measured) -> Result<()> {
    let load = &measured.sample.load;
    let experts = load.counts().len();
    let even = (experts as f64).ln();
    let of_even = if even > 0.0 {
        100.0 * load.entropy() / even
    } else {
        100.0
    };
    writeln!(
        out,
        "  load: {} pairs, the busiest expert has {:.2} times the mean, {} of {experts} experts idle, {} pairs dropped",
        load.served(),
        load.max_over_mean(),
        load.unused().count(),
        load.dropped()
    )?;
    writeln!(
        out,
        "  entropy {:.3} nats ({of_even:.1}% of even), coefficient of variation {:.3}",
        load.entropy(),
        load.coefficient_of_variation()
    )?;
    bars(out, load.counts())
}

/// Experts in a line of bars.
const LINE: usize = 64;
/// Lines of text of a line of bars.
const HEIGHT: usize = 4;

/// A bar for each expert; those of many experts stand in several lines of one scale.
pub fn bars(out: &mut dyn Write, counts: &[u64]) -> Result<()> {
    const EIGHTHS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let most = counts.iter().copied().max().unwrap_or(0);
    if most == 0 {
        return Ok(());
    }
    // Few experts, wide bars.
    let wide = if counts.len() <= 16 { 4 } else { 1 };
    for (line, counts) in counts.chunks(LINE).enumerate() {
        for level in (0..HEIGHT).rev() {
            let label = if level + 1 == HEIGHT {
                most.to_string()
            } else {
                String::new()
            };
            let mut text = format!("  {label:>6} │");
            for &count in counts {
                // Rounded up, so that one pair is seen.
                let eighths = (count * (HEIGHT as u64) * 8).div_ceil(most) as usize;
                let c = EIGHTHS[eighths.saturating_sub(level * 8).min(8)];
                text.extend(std::iter::repeat_n(c, wide));
                text.extend((wide > 1).then_some(' '));
            }
            writeln!(out, "{}", text.trim_end())?;
        }
        let first = line * LINE;
        let width = counts.len() * if wide > 1 { wide + 1 } else { 1 };
        writeln!(out, "  {:>6} └{}", "", "─".repeat(width))?;
        writeln!(
            out,
            "  {:>6}  expert {first} to {}",
            "",
            first + counts.len() - 1
        )?;
    }
    Ok(())
}

/// How far sampled tokens are from the reference.
pub fn checked(out: &mut dyn Write, checked: &Checked) -> Result<()> {
    if checked.tokens.is_empty() {
        writeln!(out, "  not checked against the reference (--check 0)")?;
        return Ok(());
    }
    let verdict = if checked.passed() {
        "within rounding"
    } else {
        "NOT within rounding"
    };
    let ids = match (checked.wrong_ids, checked.near_ties) {
        (0, 0) => "ids equal".into(),
        (0, ties) => format!("ids equal but for {ties} tie(s) within rounding"),
        (wrong, _) => format!("{wrong} WRONG ids"),
    };
    writeln!(
        out,
        "  f64 reference, token(s) {:?}: {verdict}; {ids}",
        checked.tokens
    )?;
    for (name, worst) in [
        ("logits", checked.logits),
        ("weights", checked.weights),
        ("y", checked.y),
    ] {
        let Worst {
            ratio,
            max_error,
            tolerance,
            scale,
        } = worst;
        writeln!(
            out,
            "    {name:8} max error {max_error:.2e} (tolerance there {tolerance:.2e}, values up to {scale:.2e}); at most {:.1}% of the tolerance",
            100.0 * ratio
        )?;
    }
    Ok(())
}
