//! The experts' weights in row-major order: one copy, which candle owns and the others borrow.

use crate::engine::{candle, tensor};
use crate::support::layer::seeded::Seeded;
use crate::support::layer::source::{RouterTensors, SharedTensors, Source};
use crate::support::layer::tensor::{Expert, GateUp};
use crate::support::layer::{Result, fail};
use candle_core::{Storage, Tensor, WithDType};
use candle_nn::Linear;

/// One expert.
pub struct RowMajor {
    /// `[I, H]`
    pub gate: Linear,
    /// `[I, H]`
    pub up: Linear,
    /// `[H, I]`
    pub down: Linear,
}

/// A source of weights that keeps what it gives.
pub struct Keeping<'a> {
    pub seeded: &'a mut Seeded,
    pub kept: Vec<RowMajor>,
}

impl Keeping<'_> {
    fn keep(&mut self, expert: Expert) -> Result<()> {
        let GateUp::Separate(gate, up) = expert.gate_up else {
            return fail("seeded experts have separate gate and up projections");
        };
        let [gate, up, down] = [gate, up, expert.down]
            .map(|m| tensor(m.values, m.rows, m.cols).map(|w| Linear::new(w, None)));
        self.kept.push(RowMajor {
            gate: gate?,
            up: up?,
            down: down?,
        });
        Ok(())
    }
}

impl Source for Keeping<'_> {
    fn router(&mut self) -> Result<RouterTensors> {
        self.seeded.router()
    }

    fn expert(&mut self, e: usize) -> Result<Expert> {
        let expert = self.seeded.expert(e)?;
        self.keep(expert.clone())?;
        Ok(expert)
    }

    fn shared(&mut self) -> Result<Option<SharedTensors>> {
        self.seeded.shared()
    }
}

/// Lends a tensor's numbers.
pub fn with_numbers<T: WithDType, R>(
    tensor: &Tensor,
    work: impl FnOnce(&[T]) -> Result<R>,
) -> Result<R> {
    match &*tensor.storage_and_layout().0 {
        Storage::Cpu(numbers) => work(numbers.as_slice().map_err(candle)?),
        _ => fail("a tensor that is not in the CPU's memory"),
    }
}
