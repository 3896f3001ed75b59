//! The Markdown.

use super::sweep::{Series, Sweep};
use crate::support::host::Host;
use std::fmt::{Result, Write};

/// The whole record; `picture` is the name of the SVG beside it.
pub fn markdown(sweep: &Sweep, host: &Host, picture: &str) -> String {
    let mut out = String::new();
    header(&mut out, sweep, host, picture)
        .and_then(|()| {
            sweep
                .series
                .iter()
                .try_for_each(|s| table(&mut out, sweep, s))
        })
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
        "* Ceilings, the best seen in this run: {}.\n",
        ceilings(sweep)
    )?;
    writeln!(
        out,
        "The roof of a call is the longer of two times: reading the weights of the experts that it touches once, and its FLOPs.\n"
    )?;
    writeln!(out, "![time and share of the roof against T]({picture})")
}

/// As in `1 thread: 120 GFLOP/s f32 FMA, 240 bf16 dot, 30.0 GB/s read; 2 threads: …`.
pub fn ceilings(sweep: &Sweep) -> String {
    let each = sweep.machines.iter();
    let each = each.map(|(threads, machine)| format!("{}: {machine}", plural(*threads)));
    each.collect::<Vec<_>>().join("; ")
}

/// `1 thread`, `2 threads`.
pub fn plural(threads: usize) -> String {
    format!("{threads} thread{}", if threads == 1 { "" } else { "s" })
}

fn table(out: &mut String, sweep: &Sweep, series: &Series) -> Result {
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
        "| weights | T | ms | roof, ms | bound by | % of roof | GFLOP/s | GB/s | experts touched | calls |"
    )?;
    writeln!(out, "|---|---|---|---|---|---|---|---|---|---|")?;
    for point in &series.points {
        let roof = sweep.roof(series, point);
        writeln!(
            out,
            "| {} | {} | {:.3} | {:.3} | {} | {:.1} | {:.1} | {:.1} | {:.1} | {} |",
            point.dtype,
            point.tokens,
            point.seconds * 1e3,
            roof.seconds * 1e3,
            roof.bound.name(),
            100.0 * sweep.share(series, point),
            point.work.flops / point.seconds / 1e9,
            point.work.bytes / point.seconds / 1e9,
            point.touched,
            point.repeats
        )?;
    }
    Ok(())
}
