//! The command line.

use crate::support::layer::{Result, fail};
use crate::support::load::Load;
use clap::Parser;
use moe_kernels::{Cpu, DType, Isa};
use std::path::PathBuf;

/// Runs mixture-of-experts layers by several crates turn about and prints a Markdown table.
#[derive(Clone, Debug, Parser)]
pub struct Options {
    /// Layers by name; a wrong name lists them.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "qwen3-30b-a3b,olmoe,mixtral,deepseek-v3"
    )]
    pub shapes: Vec<String>,

    /// Formats of weights and activations.
    #[arg(long, value_delimiter = ',', value_parser = dtype, default_value = "f32,bf16,f16")]
    pub dtypes: Vec<DType>,

    /// Tokens of a call.
    #[arg(long, value_delimiter = ',', default_value = "1,8,64,512")]
    pub tokens: Vec<usize>,

    /// Numbers of threads. Default: one, and one for each core.
    #[arg(long, value_delimiter = ',')]
    pub threads: Vec<usize>,

    /// How tokens spread over experts.
    #[arg(long, value_delimiter = ',', default_value = "uniform,zipf")]
    pub loads: Vec<Load>,

    /// Who runs beside us: gemm, matrixmultiply, candle.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "gemm,matrixmultiply,candle"
    )]
    pub rivals: Vec<String>,

    /// Our instruction set: scalar, avx2, avx512 or neon. Default: MOE_KERNELS_ISA, or the best one.
    #[arg(long)]
    pub isa: Option<Isa>,

    /// Seconds for each line of the table; every engine is called at least three times, unless this is 0: then once.
    #[arg(long, default_value_t = 4.0)]
    pub budget: f64,

    /// Tokens of a call that are compared with the f64 reference.
    #[arg(long, default_value_t = 1)]
    pub check: usize,

    /// Seed of weights, tokens and logits.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// Write the table to this file, too.
    #[arg(long)]
    pub record: Option<PathBuf>,

    /// Whether everything works, on a tiny layer: a second.
    #[arg(long)]
    pub smoke: bool,

    /// Answer commands on standard input with our layer alone: one shape, dtype and number of threads. See benches/peers.
    #[arg(long)]
    pub serve: bool,

    /// One number of threads, in this process. The rivals read it from the environment once, so each gets a process.
    #[arg(long, hide = true)]
    pub in_process: bool,
}

fn dtype(name: &str) -> std::result::Result<DType, String> {
    let found = DType::ALL.into_iter().find(|dtype| dtype.name() == name);
    found.ok_or_else(|| "expected f32, f16 or bf16".into())
}

impl Options {
    /// The instruction set that was asked for.
    ///
    /// # Errors
    /// One that is not available.
    pub fn cpu(&self) -> Result<Cpu> {
        Ok(match self.isa {
            Some(isa) => Cpu::with_isa(isa)?,
            None => Cpu::from_env()?,
        })
    }

    /// The numbers of threads.
    ///
    /// # Errors
    /// Zero, or thousands.
    pub fn threads(&self) -> Result<Vec<usize>> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut threads = match self.threads.is_empty() {
            true => vec![1, cores],
            false => self.threads.clone(),
        };
        threads.dedup();
        match threads.iter().all(|n| (1..=4096).contains(n)) {
            true => Ok(threads),
            false => fail("--threads: expected numbers from 1 to 4096, as in 1,2"),
        }
    }

    /// As asked for, or the smoke test's few cells.
    pub fn or_smoke(self) -> Self {
        if !self.smoke {
            return self;
        }
        Self {
            shapes: vec!["tiny".into()],
            tokens: vec![1, 5],
            check: 5,
            budget: 0.0,
            ..self
        }
    }
}
