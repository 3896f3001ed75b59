//! The Markdown.

use super::sweep::{Series, Sweep};
use crate::support::host::Host;
use crate::support::layer::measure::Ceilings;
use std::fmt::{Result, Write};

/// The whole record; `picture` is the name of the SVG beside it.
pub fn markdown(sweep: &Sweep, host: &Host, picture: &str) -> String {
    let mut out = String::new();
    header(&mut out, sweep, host, picture)
        .and_then(|()| sweep.series.iter().try_for_each(|s| table(&mut out, s)))
        .expect("writing to a string cannot fail");
    out
}

fn header(out: &mut String, sweep: &Sweep, host: &Host, picture: &str) -> Result {
    writeln!(out, "# {}, roofline\n", host.date)?;
    out.push_str(&host.markdown());
    writeln!(
        out,
        "* Instruction set {}, {} load of the experts. Each time is the median of calls with other tokens, begun with swept caches, the router's logits given; answers were \
         compared with the f64 reference first.",
        sweep.isa, sweep.load
    )?;
    writeln!(
        out,
        "* Ceilings: {}. They move on a shared machine; each line's shares are of those seen between its own calls.\n",
        ceilings(sweep).join("; ")
    )?;
    writeln!(
        out,
        "The roof of a call is the longer of two times: reading the weights of the experts that it touches once, and its FLOPs.\n"
    )?;
    writeln!(out, "![time and share of the roof against T]({picture})")
}

/// For each number of threads a line, as in `1 thread: 120 GFLOP/s f32 FMA, 240 bf16 dot, 28.0 to 30.0 GB/s read`.
pub fn ceilings(sweep: &Sweep) -> Vec<String> {
    let mut threads: Vec<usize> = sweep.series.iter().map(|s| s.threads).collect();
    threads.sort_unstable();
    threads.dedup();
    let each = threads.into_iter().map(|threads| {
        let range = |digits: usize, of: fn(&Ceilings) -> f64| {
            let points = sweep.series.iter().filter(|s| s.threads == threads);
            let points = points.flat_map(|s| &s.points);
            range(digits, points.map(|p| of(&p.ceilings) / 1e9))
        };
        let mut words = format!(
            "{}: {} GFLOP/s f32 FMA",
            plural(threads),
            range(0, |c| c.fma_peak)
        );
        let dots = range(0, |c| c.bf16_dot_peak.unwrap_or(0.0));
        if dots != "0" {
            words += &format!(", {dots} bf16 dot");
        }
        words + &format!(", {} GB/s read", range(1, |c| c.read_bandwidth))
    });
    each.collect()
}

/// The least and the largest number, or one if they look the same.
fn range(digits: usize, values: impl Iterator<Item = f64> + Clone) -> String {
    let low = values.clone().fold(f64::INFINITY, f64::min);
    let high = values.fold(0.0, f64::max);
    let (low, high) = (format!("{low:.digits$}"), format!("{high:.digits$}"));
    if low == high {
        high
    } else {
        format!("{low} to {high}")
    }
}

/// `1 thread`, `2 threads`.
pub fn plural(threads: usize) -> String {
    format!("{threads} thread{}", if threads == 1 { "" } else { "s" })
}

fn table(out: &mut String, series: &Series) -> Result {
    let shape = &series.shape;
    writeln!(
        out,
        "\n## {}, {} (H {}, I {}, E {}, K {})\n",
        shape.name,
        plural(series.threads),
        shape.hidden,
        shape.intermediate,
        shape.experts(),
        shape.router.top_k
    )?;
    writeln!(
        out,
        "| weights | T | ms | roof, ms | bound by | % of roof | GFLOP/s | of | GB/s | of | experts touched | calls |"
    )?;
    writeln!(out, "|---|---|---|---|---|---|---|---|---|---|---|---|")?;
    for point in &series.points {
        let roof = point.roof();
        writeln!(
            out,
            "| {} | {} | {:.3} | {:.3} | {} | {:.1} | {:.1} | {:.0} | {:.1} | {:.1} | {:.1} | {} |",
            point.dtype,
            point.tokens,
            point.seconds * 1e3,
            roof.seconds * 1e3,
            roof.bound.name(),
            100.0 * point.share(),
            point.work.flops / point.seconds / 1e9,
            point.ceilings.flop_peak(point.dtype) / 1e9,
            point.work.bytes / point.seconds / 1e9,
            point.ceilings.read_bandwidth / 1e9,
            point.touched,
            point.repeats
        )?;
    }
    Ok(())
}
