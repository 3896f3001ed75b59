//! Random numbers for gigabytes of device memory: a few megabytes, laid end to end.
//!
//! The host knows each number by its place, so that an answer can be checked without a copy of the operands. The period is odd: rows of a matrix begin
//! at other places of it each.

use super::gpu::Buffer;
use super::{Result, data};
use half::bf16;
use std::sync::Arc;

/// Which numbers.
#[derive(Clone, Copy, Debug)]
pub enum Tape {
    /// Roughly normal, variance 1.
    Input,
    /// A 32nd of that, so that sums over a thousand or so stay near 1.
    Weight,
}

struct Reel {
    host: Arc<Vec<f32>>,
    device: Buffer,
}

/// Both tapes on host and device.
pub struct Tapes([Reel; 2]);

impl Tapes {
    pub fn new(upload: impl Fn(&[u8]) -> Result<Buffer>) -> Result<Self> {
        let reel = |seed, period, scale: f32| -> Result<Reel> {
            let numbers: Vec<bf16> = data::normals(seed, period)
                .into_iter()
                .map(|v| bf16::from_f32(v * scale))
                .collect();
            Ok(Reel {
                host: Arc::new(numbers.iter().map(|v| v.to_f32()).collect()),
                device: upload(bytemuck::cast_slice(&numbers))?,
            })
        };
        Ok(Self([
            reel(1, (1 << 22) - 3, 1.0)?,
            reel(2, (1 << 22) - 17, 1.0 / 32.0)?,
        ]))
    }

    pub fn host(&self, tape: Tape) -> Arc<Vec<f32>> {
        self.0[tape as usize].host.clone()
    }

    pub fn device(&self, tape: Tape) -> &Buffer {
        &self.0[tape as usize].device
    }

    pub fn period(&self, tape: Tape) -> usize {
        self.0[tape as usize].host.len()
    }
}

/// Device memory full of a tape's bf16 numbers.
pub struct Filled {
    pub buffer: Buffer,
    tape: Arc<Vec<f32>>,
    start: usize,
}

impl Filled {
    pub fn new(buffer: Buffer, tape: Arc<Vec<f32>>, start: usize) -> Self {
        Self {
            buffer,
            tape,
            start,
        }
    }

    /// The numbers `first..first + len` as the host knows them.
    pub fn numbers(&self, first: usize, len: usize) -> Vec<f32> {
        let from = (self.start + first) % self.tape.len();
        let numbers = self.tape[from..].iter().chain(self.tape.iter().cycle());
        numbers.take(len).copied().collect()
    }
}
