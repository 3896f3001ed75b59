//! The picture: for each layer and number of threads, time and share of the roof against T.

use super::svg::{Anchor, Font, Stroke, Svg};
use super::sweep::{Point, Series, Sweep};
use super::table::{ceilings, plural};
use crate::support::host::Host;
use crate::support::roof::Bound;
use moe_kernels::DType;

const WIDTH: f64 = 1180.0;
const HEADER: f64 = 126.0;
const ROW: f64 = 344.0;
/// Of a panel's plotting area.
const PANEL: (f64, f64) = (480.0, 232.0);
/// Its upper left corner in the row, for both panels.
const LEFT: [f64; 2] = [74.0, 640.0];
const TOP: f64 = 62.0;

const INK: &str = "#1f2933";
const FAINT: &str = "#6b7783";
const GRID: Stroke = Stroke {
    color: "#e4e8ec",
    width: 1.0,
    dash: "",
};
const TITLE: Font = Font {
    size: 21.0,
    color: INK,
    bold: true,
    anchor: Anchor::Start,
};
const NOTE: Font = Font {
    size: 12.5,
    color: FAINT,
    bold: false,
    anchor: Anchor::Start,
};
const HEADING: Font = Font {
    size: 15.0,
    ..TITLE
};
const TICK: Font = Font {
    size: 11.5,
    anchor: Anchor::Middle,
    ..NOTE
};

/// Colours that stay apart for most kinds of colour blindness.
fn color(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "#0072b2",
        DType::BF16 => "#d55e00",
        _ => "#009e73",
    }
}

/// Draws everything.
pub fn draw(sweep: &Sweep, host: &Host) -> String {
    let height = top(sweep) + ROW * sweep.series.len() as f64;
    let mut svg = Svg::new(WIDTH, height);
    header(&mut svg, sweep, host);
    for (i, series) in sweep.series.iter().enumerate() {
        row(&mut svg, sweep, series, top(sweep) + ROW * i as f64);
    }
    svg.finish()
}

fn header(svg: &mut Svg, sweep: &Sweep, host: &Host) {
    let x = 28.0;
    svg.text((x, 38.0), TITLE, "moe-kernels under the machine's roof");
    let machine = format!(
        "{} ({}), {} cores, {}; {}; {} load of the experts; {}",
        host.model, host.family, host.cores, host.caches, sweep.isa, sweep.load, host.date
    );
    svg.text((x, 62.0), NOTE, &machine);
    for (i, line) in ceilings(sweep).iter().enumerate() {
        svg.text((x, 82.0 + 18.0 * i as f64), NOTE, line);
    }
    legend(svg, sweep, x, top(sweep) - 36.0);
}

/// Where the header ends: it has a line for each number of threads.
fn top(sweep: &Sweep) -> f64 {
    HEADER + 18.0 * ceilings(sweep).len() as f64
}

fn legend(svg: &mut Svg, sweep: &Sweep, mut x: f64, y: f64) {
    let entry = Font { color: INK, ..NOTE };
    for dtype in dtypes(sweep) {
        svg.line(&[(x, y), (x + 26.0, y)], curve(dtype));
        svg.text((x + 33.0, y + 4.5), entry, dtype.name());
        x += 82.0;
    }
    let dashed = Stroke {
        color: FAINT,
        ..roof_line(DType::F32)
    };
    svg.line(&[(x, y), (x + 26.0, y)], dashed);
    svg.text((x + 33.0, y + 4.5), entry, "its roof");
    x += 106.0;
    for (filled, words) in [
        (
            false,
            "the roof is bytes: the touched experts' weights ÷ read bandwidth",
        ),
        (true, "the roof is FLOPs ÷ peak"),
    ] {
        svg.dot((x, y), FAINT, filled);
        svg.text((x + 10.0, y + 4.5), entry, words);
        x += 452.0;
    }
}

/// The formats that were measured, in the order of the options.
fn dtypes(sweep: &Sweep) -> Vec<DType> {
    let mut found = Vec::new();
    for point in sweep.series.iter().flat_map(|s| &s.points) {
        if !found.contains(&point.dtype) {
            found.push(point.dtype);
        }
    }
    found
}

fn curve(dtype: DType) -> Stroke {
    Stroke {
        color: color(dtype),
        width: 2.4,
        dash: "",
    }
}

fn roof_line(dtype: DType) -> Stroke {
    Stroke {
        color: color(dtype),
        width: 1.2,
        dash: "5 4",
    }
}

fn row(svg: &mut Svg, sweep: &Sweep, series: &Series, top: f64) {
    let s = &series.shape;
    let sizes = format!(
        "H {}, I {}, E {}, K {}",
        s.hidden,
        s.intermediate,
        s.experts(),
        s.router.top_k
    );
    let title = format!("{}, {}", s.name, plural(series.threads));
    svg.line(&[(28.0, top), (WIDTH - 28.0, top)], GRID);
    svg.text((28.0, top + 30.0), HEADING, &title);
    let right = Font {
        anchor: Anchor::End,
        ..NOTE
    };
    svg.text((WIDTH - 28.0, top + 30.0), right, &sizes);
    time_panel(svg, sweep, series, top + TOP);
    share_panel(svg, sweep, series, top + TOP);
}

/// Values to pixels of a panel: logarithms of T across, and up either logarithms or not.
struct Axes {
    left: f64,
    top: f64,
    tokens: (f64, f64),
    values: (f64, f64),
    logarithmic: bool,
}

impl Axes {
    fn new(panel: usize, top: f64, series: &Series, values: (f64, f64), logarithmic: bool) -> Self {
        let tokens = series.points.iter().map(|p| p.tokens as f64);
        let first = tokens.clone().fold(f64::INFINITY, f64::min);
        // A single T still needs an axis.
        let last = tokens.fold(2.0 * first, f64::max);
        Self {
            left: LEFT[panel],
            top,
            tokens: (first, last),
            values,
            logarithmic,
        }
    }

    fn x(&self, tokens: usize) -> f64 {
        let (first, last) = self.tokens;
        self.left + PANEL.0 * (tokens as f64 / first).ln() / (last / first).ln()
    }

    fn y(&self, value: f64) -> f64 {
        let (low, high) = self.values;
        let part = match self.logarithmic {
            true => (value / low).ln() / (high / low).ln(),
            false => (value - low) / (high - low),
        };
        self.top + PANEL.1 * (1.0 - part.clamp(0.0, 1.0))
    }

    fn at(&self, tokens: usize, value: f64) -> (f64, f64) {
        (self.x(tokens), self.y(value))
    }

    /// A line across at `value`, with its label.
    fn across(&self, svg: &mut Svg, value: f64, label: &str) {
        let y = self.y(value);
        svg.line(&[(self.left, y), (self.left + PANEL.0, y)], GRID);
        let font = Font {
            anchor: Anchor::End,
            ..TICK
        };
        svg.text((self.left - 8.0, y + 4.0), font, label);
    }

    /// What stands below and beside: T, and the panel's subject.
    fn labels(&self, svg: &mut Svg, series: &Series, subject: &str) {
        let mut tokens: Vec<usize> = series.points.iter().map(|p| p.tokens).collect();
        tokens.sort_unstable();
        tokens.dedup();
        let bottom = self.top + PANEL.1;
        for t in tokens {
            let x = self.x(t);
            svg.line(&[(x, bottom), (x, bottom + 4.0)], GRID);
            svg.text((x, bottom + 18.0), TICK, &t.to_string());
        }
        let middle = self.left + PANEL.0 / 2.0;
        svg.text((middle, bottom + 36.0), TICK, "T, tokens of a call");
        svg.text((self.left, self.top - 8.0), NOTE, subject);
    }
}

fn of(series: &Series, dtype: DType) -> impl Iterator<Item = &Point> + Clone {
    series.points.iter().filter(move |p| p.dtype == dtype)
}

fn time_panel(svg: &mut Svg, sweep: &Sweep, series: &Series, top: f64) {
    let times = series
        .points
        .iter()
        .flat_map(|p| [p.seconds, p.roof().seconds])
        .map(|seconds| 1e3 * seconds);
    let low = times.clone().fold(f64::INFINITY, f64::min);
    let high = times.fold(0.0, f64::max);
    let axes = Axes::new(0, top, series, (low / 1.3, high * 1.3), true);
    for decade in -6..7 {
        let value = 10f64.powi(decade);
        if (axes.values.0..axes.values.1).contains(&value) {
            axes.across(svg, value, &format!("{value}"));
        }
    }
    axes.labels(svg, series, "milliseconds a layer");
    for dtype in dtypes(sweep) {
        let points = of(series, dtype);
        let roof = points
            .clone()
            .map(|p| axes.at(p.tokens, 1e3 * p.roof().seconds));
        svg.line(&roof.collect::<Vec<_>>(), roof_line(dtype));
        plot(svg, series, dtype, &axes, |p| 1e3 * p.seconds);
    }
}

fn share_panel(svg: &mut Svg, sweep: &Sweep, series: &Series, top: f64) {
    let axes = Axes::new(1, top, series, (0.0, 105.0), false);
    for share in [0, 20, 40, 60, 80, 100] {
        axes.across(svg, f64::from(share), &format!("{share}%"));
    }
    let roof = [axes.left, axes.left + PANEL.0].map(|x| (x, axes.y(100.0)));
    let stroke = Stroke {
        color: FAINT,
        ..roof_line(DType::F32)
    };
    svg.line(&roof, stroke);
    axes.labels(svg, series, "share of the roof");
    for dtype in dtypes(sweep) {
        plot(svg, series, dtype, &axes, |p| 100.0 * p.share());
    }
}

/// One format's curve with its dots.
fn plot(svg: &mut Svg, series: &Series, dtype: DType, axes: &Axes, value: impl Fn(&Point) -> f64) {
    let dots: Vec<_> = of(series, dtype)
        .map(|p| (axes.at(p.tokens, value(p)), p.roof().bound))
        .collect();
    let line: Vec<_> = dots.iter().map(|(at, _)| *at).collect();
    svg.line(&line, curve(dtype));
    for (at, bound) in dots {
        svg.dot(at, color(dtype), bound == Bound::Flops);
    }
}
