//! What is measured, by name, with the figure that each is meant to reach on an H200.

use super::Result;
use super::gpu::Gpu;
use super::subjects::*;

/// What a row is held against.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    /// Nothing: a ceiling, or a row that explains others.
    None,
    /// At most so many microseconds, replayed.
    Micros(f64),
    /// At least so many TFLOP/s.
    Tflops(f64),
    /// At least so many TB/s.
    Tbps(f64),
    /// At least this share of the dense product of the same run.
    OfDense(f64),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Spec {
    Copy {
        bytes: usize,
    },
    Product(ProductShape),
    Layer(LayerShape),
    Route {
        tokens: usize,
        experts: usize,
        top_k: usize,
    },
    Sort {
        tokens: usize,
        experts: usize,
        top_k: usize,
    },
    Rows {
        tokens: usize,
        hidden: usize,
        top_k: usize,
    },
    Combine {
        tokens: usize,
        hidden: usize,
        top_k: usize,
    },
}

#[derive(Clone, Debug)]
pub struct Entry {
    /// The target's number in the list of goals, or nothing.
    pub id: &'static str,
    pub name: String,
    pub spec: Spec,
    pub target: Target,
}

impl Spec {
    pub fn make(&self, gpu: &Gpu) -> Result<Box<dyn Subject>> {
        Ok(match *self {
            Self::Copy { bytes } => Box::new(Copy::new(gpu, bytes)?),
            Self::Product(shape) => Box::new(Product::new(gpu, shape)?),
            Self::Layer(shape) => Box::new(Layer::new(gpu, shape)?),
            Self::Route {
                tokens,
                experts,
                top_k,
            } => Box::new(Route::new(gpu, tokens, experts, top_k)?),
            Self::Sort {
                tokens,
                experts,
                top_k,
            } => Box::new(Sort::new(gpu, tokens, experts, top_k, None)?),
            Self::Rows {
                tokens,
                hidden,
                top_k,
            } => Box::new(CopyOfRows::new(gpu, tokens, hidden, top_k)?),
            Self::Combine {
                tokens,
                hidden,
                top_k,
            } => Box::new(Combine::new(gpu, tokens, hidden, top_k)?),
        })
    }

    /// The same with every side small enough for an emulator. Sides keep what they are multiples of, up to 8.
    pub fn smoke(self) -> Self {
        let (few, side) = (|n: usize| n.min(5), |n: usize| n.min(40));
        match self {
            Self::Copy { .. } => Self::Copy { bytes: 1 << 16 },
            Self::Product(shape) => Self::Product(ProductShape {
                experts: shape.experts.min(3),
                rows: few(shape.rows),
                n: side(shape.n),
                k: side(shape.k),
            }),
            Self::Layer(shape) => Self::Layer(LayerShape {
                // Few tokens take the kernels for few rows, many do not.
                tokens: if shape.tokens > 64 {
                    20
                } else {
                    few(shape.tokens)
                },
                hidden: side(shape.hidden),
                intermediate: shape.intermediate.min(24),
                experts: shape.experts.min(4),
                top_k: shape.top_k.min(2),
                ..shape
            }),
            Self::Route {
                tokens,
                experts,
                top_k,
            } => Self::Route {
                tokens: few(tokens),
                experts,
                top_k,
            },
            Self::Sort {
                tokens,
                experts,
                top_k,
            } => Self::Sort {
                tokens: tokens.min(40),
                experts,
                top_k,
            },
            Self::Rows {
                tokens,
                hidden,
                top_k,
            } => Self::Rows {
                tokens: few(tokens),
                hidden: side(hidden),
                top_k,
            },
            Self::Combine {
                tokens,
                hidden,
                top_k,
            } => Self::Combine {
                tokens: few(tokens),
                hidden: side(hidden),
                top_k,
            },
        }
    }
}

/// The name of the row that says how fast memory is.
pub const COPY: &str = "ceiling/copy";
/// The name of the row that says how fast our own dense product is.
pub const DENSE: &str = "ceiling/dense";

/// The catalog in sizes for an emulator, each once and without goals.
pub fn smoke() -> Vec<Entry> {
    let mut seen = Vec::new();
    let mut all = catalog();
    all.iter_mut().for_each(|e| {
        e.spec = e.spec.smoke();
        e.target = Target::None;
    });
    all.retain(|e| {
        let new = !seen.contains(&e.spec);
        seen.push(e.spec);
        new
    });
    all
}

/// Everything, ceilings first.
pub fn catalog() -> Vec<Entry> {
    let entry = |id, name: String, spec, target| Entry {
        id,
        name,
        spec,
        target,
    };
    let dense = ProductShape {
        experts: 1,
        rows: 8192,
        n: 8192,
        k: 8192,
    };
    let mut all = vec![
        entry("", COPY.into(), Spec::Copy { bytes: 2 << 30 }, Target::None),
        entry("", DENSE.into(), Spec::Product(dense), Target::None),
    ];
    for (experts, rows) in [(4, 8192), (8, 4096)] {
        for (n, k) in [(6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048)] {
            let shape = ProductShape {
                experts,
                rows,
                n,
                k,
            };
            let name = format!("grouped_gemm/{experts}x{rows}/{n}x{k}");
            all.push(entry(
                "G1",
                name,
                Spec::Product(shape),
                Target::OfDense(0.9),
            ));
        }
    }
    let layer = |tokens, hidden, intermediate| LayerShape {
        tokens,
        hidden,
        intermediate,
        experts: 128,
        top_k: 8,
        ys_f32: false,
    };
    let layers = [
        ("G2", layer(32768, 2048, 768), Target::Tflops(560.0)),
        ("G3", layer(32768, 4096, 1024), Target::Tflops(620.0)),
        ("G4", layer(24576, 1536, 256), Target::Micros(1150.0)),
        ("G5", layer(1, 2816, 704), Target::Micros(35.0)),
        ("G5", layer(8, 2816, 704), Target::Micros(165.0)),
        ("G5", layer(32, 2816, 704), Target::Micros(320.0)),
        ("", layer(128, 2816, 704), Target::None),
        ("", layer(512, 2816, 704), Target::None),
        ("", layer(4096, 2816, 704), Target::None),
    ];
    for (id, shape, target) in layers {
        let name = format!(
            "moe/{}/H{}-I{}-E{}-K{}",
            shape.tokens, shape.hidden, shape.intermediate, shape.experts, shape.top_k
        );
        all.push(entry(id, name, Spec::Layer(shape), target));
    }
    let route = |tokens, micros| {
        let spec = Spec::Route {
            tokens,
            experts: 128,
            top_k: 8,
        };
        let target = Target::Micros(micros);
        entry("G6", format!("routing/{tokens}/E128-K8"), spec, target)
    };
    let sort = Spec::Sort {
        tokens: 8192,
        experts: 256,
        top_k: 8,
    };
    let (tokens, hidden, top_k) = (32768, 4096, 8);
    let (rows, combine) = (
        Spec::Rows {
            tokens,
            hidden,
            top_k,
        },
        Spec::Combine {
            tokens,
            hidden,
            top_k,
        },
    );
    let tail = format!("{tokens}/H{hidden}-K{top_k}");
    all.extend([
        route(1, 1.8),
        route(16384, 8.0),
        entry(
            "G7",
            "permute/8192/E256-K8".into(),
            sort,
            Target::Micros(15.0),
        ),
        entry("G8", format!("rows/{tail}"), rows, Target::Tbps(3.9)),
        entry("G8", format!("combine/{tail}"), combine, Target::Tbps(3.9)),
    ]);
    all
}
