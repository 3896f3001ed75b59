//! Strokes of a picture, in pixels from the upper left corner.

use std::fmt::Write;

/// A picture that grows.
pub struct Svg {
    width: f64,
    height: f64,
    body: String,
}

/// Where a text's position is.
#[derive(Clone, Copy)]
pub enum Anchor {
    Start,
    Middle,
    End,
}

/// A line's look.
#[derive(Clone, Copy)]
pub struct Stroke {
    pub color: &'static str,
    pub width: f64,
    /// As in `4 3`; empty for a solid line.
    pub dash: &'static str,
}

/// A text's look.
#[derive(Clone, Copy)]
pub struct Font {
    pub size: f64,
    pub color: &'static str,
    pub bold: bool,
    pub anchor: Anchor,
}

impl Svg {
    pub fn new(width: f64, height: f64) -> Self {
        let body = String::new();
        let mut svg = Self {
            width,
            height,
            body,
        };
        svg.rect(0.0, 0.0, width, height, "#ffffff");
        svg
    }

    pub fn rect(&mut self, x: f64, y: f64, width: f64, height: f64, fill: &str) {
        self.push(format_args!(
            r#"<rect x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}" fill="{fill}"/>"#
        ));
    }

    pub fn line(&mut self, points: &[(f64, f64)], stroke: Stroke) {
        let mut list = String::new();
        for (x, y) in points {
            let _ = write!(list, "{x:.1},{y:.1} ");
        }
        let Stroke { color, width, dash } = stroke;
        self.push(format_args!(
            r#"<polyline points="{}" fill="none" stroke="{color}" stroke-width="{width}" stroke-dasharray="{dash}" stroke-linejoin="round" stroke-linecap="round"/>"#,
            list.trim_end()
        ));
    }

    /// A dot of a colour, or a ring of it.
    pub fn dot(&mut self, (x, y): (f64, f64), color: &str, filled: bool) {
        let fill = if filled { color } else { "#ffffff" };
        self.push(format_args!(
            r#"<circle cx="{x:.1}" cy="{y:.1}" r="3.2" fill="{fill}" stroke="{color}" stroke-width="1.6"/>"#
        ));
    }

    pub fn text(&mut self, (x, y): (f64, f64), font: Font, text: &str) {
        let anchor = match font.anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let weight = if font.bold { "600" } else { "400" };
        let (size, color) = (font.size, font.color);
        let text = text
            .replace('&', "&amp;")
            .replace('<', "&lt;")
            .replace('>', "&gt;");
        self.push(format_args!(
            r#"<text x="{x:.1}" y="{y:.1}" font-size="{size}" font-weight="{weight}" fill="{color}" text-anchor="{anchor}">{text}</text>"#
        ));
    }

    fn push(&mut self, element: std::fmt::Arguments<'_>) {
        let _ = writeln!(self.body, "{element}");
    }

    pub fn finish(self) -> String {
        let (w, h) = (self.width, self.height);
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{w}\" height=\"{h}\" viewBox=\"0 0 {w} {h}\" \
             font-family=\"Inter, Helvetica, Arial, 'DejaVu Sans', sans-serif\">\n{}</svg>\n",
            self.body
        )
    }
}
