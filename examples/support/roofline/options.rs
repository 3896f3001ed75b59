//! The command line.

use crate::support::layer::shapes::Architecture;
use crate::support::layer::{Result, fail};
use crate::support::load::Load;
use crate::support::shapes;
use clap::Parser;
use moe_kernels::{Cpu, DType, Isa};
use std::path::PathBuf;

/// Measures mixture-of-experts layers from one token to thousands and draws them under the machine's roof.
#[derive(Clone, Debug, Parser)]
#[command(name = "roofline")]
pub struct Options {
    /// Layers by name; a wrong name lists them.
    #[arg(long, value_delimiter = ',', default_value = "qwen3-30b-a3b,olmoe")]
    pub shapes: Vec<String>,

    /// Formats of weights and activations.
    #[arg(long, value_delimiter = ',', value_parser = dtype, default_value = "f32,bf16,f16")]
    pub dtypes: Vec<DType>,

    /// Tokens of a call.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1,2,4,8,16,32,64,128,256,512,1024,2048"
    )]
    pub tokens: Vec<usize>,

    /// Numbers of threads. Default: one, and one for each core.
    #[arg(long, value_delimiter = ',')]
    pub threads: Vec<usize>,

    /// How tokens spread over experts: uniform or zipf.
    #[arg(long, default_value = "uniform")]
    pub load: Load,

    /// Instruction set: scalar, avx2, avx512 or neon. Default: MOE_KERNELS_ISA, or the best one.
    #[arg(long)]
    pub isa: Option<Isa>,

    /// Seconds of timed calls. They are shared out evenly; packing and checks come on top. When they are used up, the calls that are left are made once.
    #[arg(long, default_value_t = 110.0)]
    pub budget: f64,

    /// Tokens of a call that are compared with the f64 reference.
    #[arg(long, default_value_t = 2)]
    pub check: usize,

    /// Seed of weights, tokens and logits.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// The folder's name in benches/record. Default: the CPU's model and cores.
    #[arg(long)]
    pub machine: Option<String>,

    /// Where to write, without extension: `.svg` and `.md` are added.
    #[arg(long)]
    pub out: Option<PathBuf>,
}

/// A number format by name.
pub fn dtype(name: &str) -> std::result::Result<DType, String> {
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

    /// The layers.
    ///
    /// # Errors
    /// An unknown name.
    pub fn architectures(&self) -> Result<Vec<Architecture>> {
        self.shapes.iter().map(|name| shapes::named(name)).collect()
    }

    /// The numbers of tokens, ascending.
    ///
    /// # Errors
    /// None, or zero.
    pub fn token_counts(&self) -> Result<Vec<usize>> {
        let mut tokens = self.tokens.clone();
        tokens.sort_unstable();
        tokens.dedup();
        match tokens.first() {
            None | Some(0) => fail("--tokens: expected numbers of at least 1, as in 1,512"),
            _ => Ok(tokens),
        }
    }

    /// The numbers of threads.
    ///
    /// # Errors
    /// Zero, or thousands.
    pub fn thread_counts(&self) -> Result<Vec<usize>> {
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
}
