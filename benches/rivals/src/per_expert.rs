//! What one writes without a grouped product: our routing, then for each expert three calls of a dense one on gathered rows.
//!
//! The rest is as good as it gets without kernels: buffers made once, rows gathered once, activation and combine on all threads. So the comparison is with the dense
//! product, not with an allocator.

use crate::engine::{Call, Engine};
use crate::support::dense::{Product, narrow};
use crate::support::layer::shapes::Architecture;
use crate::support::layer::tensor::Values;
use crate::support::layer::{Failure, Result};
use crate::weights::{RowMajor, with_numbers};
use candle_core::{Tensor, WithDType};
use moe_kernels::routing::{RouteInput, Router, Routing};
use moe_kernels::{Cpu, Element, MatRef};
use rayon::prelude::*;
use std::any::Any;

/// A number of ours that candle has, too.
pub trait Number: Element + WithDType {}
impl<T: Element + WithDType> Number for T {}

fn widen<T: Element>(x: T) -> f32 {
    x.to_f32()
}

/// A layer of such products.
pub struct PerExpert<'a, T, P> {
    cpu: &'a Cpu,
    router: &'a Router,
    experts: &'a [RowMajor],
    hidden: usize,
    intermediate: usize,
    routing: Routing,
    /// One expert's gathered rows `[·, H]`, and gate and up `[·, I]`.
    x: Vec<T>,
    gate: Vec<T>,
    up: Vec<T>,
    /// All experts' outputs `[T·K, H]`.
    ys: Vec<T>,
    y: Vec<T>,
    product: std::marker::PhantomData<P>,
}

impl<'a, T: Number, P: Product<T>> PerExpert<'a, T, P> {
    /// For calls of up to `most` tokens.
    pub fn new(
        cpu: &'a Cpu,
        router: &'a Router,
        architecture: &Architecture,
        experts: &'a [RowMajor],
        most: usize,
    ) -> Result<Self> {
        let zeros = |n| vec![narrow::<T>(0.0); n];
        let (hidden, intermediate) = (architecture.hidden, architecture.intermediate);
        Ok(Self {
            cpu,
            router,
            experts,
            hidden,
            intermediate,
            routing: Routing::with_capacity(most, router)?,
            // No token visits an expert twice.
            x: zeros(most * hidden),
            gate: zeros(most * intermediate),
            up: zeros(most * intermediate),
            ys: zeros(most * router.config().slots() * hidden),
            y: zeros(most * hidden),
            product: std::marker::PhantomData,
        })
    }

    /// The rows of expert `e`, through its three products.
    fn expert(&mut self, e: usize, x: &[T]) -> Result<()> {
        let (hidden, inner) = (self.hidden, self.intermediate);
        let permutation = self.routing.permutation();
        let slots = self.routing.slots();
        let rows = permutation.rows_of(e);
        let pairs = &permutation.pair_of_row()[rows.clone()];
        let gathered = &mut self.x[..rows.len() * hidden];
        gathered
            .par_chunks_mut(hidden)
            .zip(pairs)
            .for_each(|(row, &pair)| {
                row.copy_from_slice(&x[pair as usize / slots * hidden..][..hidden]);
            });
        let gate = &mut self.gate[..rows.len() * inner];
        let up = &mut self.up[..rows.len() * inner];
        let out = &mut self.ys[rows.start * hidden..rows.end * hidden];
        let threads = self.cpu.threads();
        let product = |k, x: &[T], w: &Tensor, out: &mut [T]| {
            with_numbers(w, |w| {
                P::multiply(threads, k, x, w, out);
                Ok(())
            })
        };
        let weights = &self.experts[e];
        product(hidden, gathered, weights.gate.weight(), gate)?;
        product(hidden, gathered, weights.up.weight(), up)?;
        let up = up.par_chunks(inner);
        gate.par_chunks_mut(inner).zip(up).for_each(|(gate, up)| {
            for (g, u) in gate.iter_mut().zip(up) {
                let (a, b) = (widen(*g), widen(*u));
                *g = narrow(a / (1.0 + (-a).exp()) * b);
            }
        });
        product(inner, gate, weights.down.weight(), out)
    }

    fn combine(&mut self, tokens: usize) {
        let (hidden, slots) = (self.hidden, self.routing.slots());
        let (ys, weights) = (&self.ys, self.routing.weights());
        let rows = self.routing.permutation().row_of_pair();
        let y = self.y[..tokens * hidden].par_chunks_mut(hidden);
        y.enumerate().for_each(|(t, y)| {
            let mut sum = vec![0.0f32; hidden];
            for pair in t * slots..(t + 1) * slots {
                let row = &ys[rows[pair] as usize * hidden..][..hidden];
                for (s, v) in sum.iter_mut().zip(row) {
                    *s += weights[pair] * widen(*v);
                }
            }
            for (y, s) in y.iter_mut().zip(sum) {
                *y = narrow(s);
            }
        });
    }
}

impl<T: Number, P: Product<T>> Engine for PerExpert<'_, T, P> {
    fn name(&self) -> &'static str {
        P::NAME
    }

    fn forward(&mut self, call: &Call) -> Result<()> {
        let batch = &call.batch;
        let logits = MatRef::new(&batch.logits, batch.tokens, self.experts.len())?;
        self.router
            .route(self.cpu, &RouteInput::new(logits), &mut self.routing)?;
        let x = numbers::<T>(&batch.x)?;
        for e in 0..self.experts.len() {
            if self.routing.permutation().counts()[e] > 0 {
                self.expert(e, x)?;
            }
        }
        self.combine(batch.tokens);
        Ok(())
    }

    fn output(&self, call: &Call) -> Result<Vec<f32>> {
        let y = &self.y[..call.batch.tokens * self.hidden];
        Ok(y.iter().map(|y| widen(*y)).collect())
    }
}

/// The numbers of a tensor whose type is known.
fn numbers<T: 'static>(values: &Values) -> Result<&[T]> {
    let vec: &dyn Any = match values {
        Values::F32(v) => v,
        Values::F16(v) => v,
        Values::BF16(v) => v,
    };
    let found = vec.downcast_ref::<Vec<T>>().map(Vec::as_slice);
    found.ok_or_else(|| Failure("a batch in another format".into()))
}
