//! The first ceiling: the driver's own copy from device memory to device memory. Bytes are those read and those written.

use super::{Result, Subject, Work, same};
use crate::data::spread;
use crate::gpu::{Buffer, Gpu};
use crate::tape::{Filled, Tape};
use half::bf16;
use moe_kernels::cuda::{DeviceInfo, Launch};

pub struct Copy {
    from: Filled,
    to: Buffer,
}

impl Copy {
    pub fn new(gpu: &Gpu, bytes: usize) -> Result<Self> {
        Ok(Self {
            from: gpu.filled(Tape::Input, 0, bytes / 2)?,
            to: gpu.alloc(bytes)?,
        })
    }
}

impl Subject for Copy {
    fn sets(&self) -> usize {
        1
    }

    fn work(&self) -> Work {
        Work {
            flops: 0.0,
            bytes: 2.0 * self.to.bytes as f64,
        }
    }

    fn plan(&self, _: &DeviceInfo, _: usize) -> Result<Vec<Launch>> {
        Ok(Vec::new())
    }

    fn queue(&self, gpu: &Gpu, _: &DeviceInfo, _: usize) -> Result<()> {
        gpu.copy(&self.from.buffer, &self.to)
    }

    fn poison(&self, gpu: &Gpu, _: usize) -> Result<()> {
        gpu.poison(&self.to)
    }

    fn check(&self, gpu: &Gpu, _: usize) -> Result<()> {
        const PIECE: usize = 256;
        gpu.all_written::<u16>(&self.to)?;
        for first in spread(self.to.bytes / 2 - PIECE, 64) {
            let found: Vec<bf16> = gpu.download(&self.to, first, PIECE)?;
            let found: Vec<f32> = found.iter().map(|v| v.to_f32()).collect();
            let expected = self.from.numbers(first, PIECE);
            same(&format!("copy from {first} on"), &found, &expected)?;
        }
        Ok(())
    }
}
