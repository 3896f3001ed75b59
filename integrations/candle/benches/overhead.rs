//! What the call through candle costs beside the Rust call: the same layer, the same tokens, turn about on one thread.
//!
//! ```sh
//! cargo bench --bench overhead            # fails when a call costs over 2 µs more
//! ```
//!
//! `forward` makes its output tensor, `forward_into` writes into one that exists. Of a large output the first touch of new pages is counted too; at T = 1 there is next to none.
//! The median of differences between neighbouring calls is printed: what disturbs the machine for longer than a call disturbs both.

use candle_core::{DType, Device, Result, Tensor};
use moe_kernels::moe::MoeLayer as Layer;
use moe_kernels::routing::{RouterConfig, Routing};
use moe_kernels::{MatMut, MatRef};
use moe_kernels_candle::{Activation, Cpu, MoeLayer, experts};
use std::hint::black_box;
use std::time::Instant;

/// The most that a call may cost more, in microseconds.
const LIMIT: f64 = 2.0;
/// The most pairs of calls that are timed.
const PAIRS: usize = 4000;

/// The Rust call on tensors of its own.
struct Plain {
    x: Vec<f32>,
    y: Vec<f32>,
    routing: Routing,
    workspace: Vec<u8>,
}

impl Plain {
    fn new(cpu: &Cpu, layer: &Layer, x: Vec<f32>, tokens: usize) -> moe_kernels::Result<Self> {
        Ok(Self {
            y: vec![0.0; x.len()],
            x,
            routing: Routing::with_capacity(tokens, layer.router())?,
            workspace: vec![0; layer.workspace_size(cpu, tokens)?],
        })
    }

    fn call(&mut self, cpu: &Cpu, layer: &Layer, tokens: usize) -> moe_kernels::Result<()> {
        let x = MatRef::new(&self.x, tokens, layer.hidden())?.into();
        let y = MatMut::new(&mut self.y, tokens, layer.hidden())?.into();
        layer.forward(cpu, x, y, &mut self.routing, &mut self.workspace)
    }
}

fn microseconds(f: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    f()?;
    Ok(start.elapsed().as_secs_f64() * 1e6)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Medians: the Rust call, and what `forward` and `forward_into` cost more.
fn measure(h: usize, i: usize, e: usize, k: usize, tokens: usize) -> Result<[f64; 3]> {
    let device = Device::Cpu;
    let random = |shape: (usize, usize, usize)| Tensor::randn(0f32, 0.1, shape, &device);
    let cpu = Cpu::new().single_threaded();
    let packed = experts::fused(
        &cpu,
        &random((e, 2 * i, h))?,
        &random((e, h, i))?,
        Activation::SWIGLU,
    )?;
    let gate = Tensor::randn(0f32, 1.0, (e, h), &device)?;
    let layer = MoeLayer::new(cpu, RouterConfig::mixtral(e, k), &gate, packed)?;
    let x = Tensor::randn(0f32, 1.0, (tokens, h), &device)?;
    let y = Tensor::zeros((tokens, h), DType::F32, &device)?;
    let plain = Plain::new(&cpu, layer.layer(), x.flatten_all()?.to_vec1()?, tokens);
    let mut plain = plain.map_err(candle_core::Error::wrap)?;

    let mut times: [Vec<f64>; 3] = Default::default();
    let began = Instant::now();
    for round in 0.. {
        let rust = microseconds(|| {
            plain
                .call(&cpu, layer.layer(), tokens)
                .map_err(candle_core::Error::wrap)
        })?;
        let new = microseconds(|| black_box(layer.forward(&x)).map(drop))?;
        let into = microseconds(|| layer.forward_into(&x, &y))?;
        if round >= 20 {
            times[0].push(rust);
            times[1].push(new - rust);
            times[2].push(into - rust);
        }
        if times[0].len() >= PAIRS || began.elapsed().as_secs() >= 5 {
            break;
        }
    }
    // Timing means nothing if they computed different things.
    assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, plain.y);
    Ok(times.map(median))
}

fn main() -> Result<()> {
    println!(
        "{:>22} {:>5} {:>12} {:>12} {:>14}   µs, medians",
        "H x I, E, K", "T", "Rust call", "forward", "forward_into"
    );
    let mut within = true;
    for (h, i, e, k, tokens) in [
        (64, 32, 8, 2, 1),
        (64, 32, 8, 2, 16),
        (512, 256, 16, 4, 1),
        (2048, 768, 16, 8, 1),
    ] {
        let [rust, new, into] = measure(h, i, e, k, tokens)?;
        println!(
            "{:>22} {tokens:>5} {rust:>12.2} {new:>+12.2} {into:>+14.2}",
            format!("{h} x {i}, {e}, {k}")
        );
        // A call of hundreds of microseconds differs from the next by more than the limit.
        within &= rust > 100.0 || (new <= LIMIT && into <= LIMIT);
    }
    if !within {
        candle_core::bail!("a call through candle costs over {LIMIT} µs more");
    }
    Ok(())
}
