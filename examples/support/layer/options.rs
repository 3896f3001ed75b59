//! The command line.

use super::device::Backend;
use super::shapes::{Architecture, named, published};
use super::{Result, fail};
use clap::Parser;
use moe_kernels::{DType, Isa};
use std::path::PathBuf;

/// Runs one mixture-of-experts layer: packs it, times each stage, shows the experts' load, and checks sampled tokens against an f64 reference. On a GPU the
/// layer is timed whole, called and replayed as a CUDA graph.
#[derive(Clone, Debug, Parser)]
#[command(name = "layer")]
pub struct Options {
    /// What runs the layer. cuda needs the feature of that name.
    #[arg(long, value_enum, default_value_t = Backend::Cpu)]
    pub backend: Backend,

    /// A published layer by name; a wrong name lists them.
    #[arg(long, default_value = "qwen3-30b-a3b", conflicts_with = "weights")]
    pub shape: String,

    /// Keep only so many experts of the shape, when memory is short.
    #[arg(long, conflicts_with = "weights")]
    pub experts: Option<usize>,

    /// Tokens of a call; a list runs one after the other.
    #[arg(long, value_delimiter = ',', default_value = "1,512")]
    pub tokens: Vec<usize>,

    /// Format of weights and activations: f32, f16 or bf16. Default: bf16, or that of the checkpoint.
    #[arg(long, value_parser = dtype)]
    pub dtype: Option<DType>,

    /// Instruction set: scalar, avx2, avx512 or neon. Default: MOE_KERNELS_ISA, or the best one.
    #[arg(long)]
    pub isa: Option<Isa>,

    /// Threads. Default: one for each core.
    #[arg(long)]
    pub threads: Option<usize>,

    /// Seed of weights and tokens.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// Timed calls (on a GPU: rounds of calls), of which the median is shown. Default: as many as fit in about a second, 5 to 50.
    #[arg(long)]
    pub repeats: Option<usize>,

    /// Tokens to check against the reference.
    #[arg(long, default_value_t = 4)]
    pub check: usize,

    /// Do not measure the machine's peaks first; the table has no percentages then.
    #[arg(long)]
    pub no_peaks: bool,

    /// A checkpoint in Hugging Face naming: a .safetensors file, or the .safetensors.index.json of several.
    #[arg(long)]
    pub weights: Option<PathBuf>,

    /// Layer of the checkpoint.
    #[arg(long, default_value_t = 0, requires = "weights")]
    pub layer: usize,

    /// K, if there is no config.json beside the checkpoint.
    #[arg(long, requires = "weights")]
    pub top_k: Option<usize>,

    /// Whether the K weights are divided by their sum.
    #[arg(long, requires = "weights")]
    pub norm_topk: Option<bool>,

    /// Groups of experts.
    #[arg(long, requires = "weights")]
    pub n_group: Option<usize>,

    /// Groups that are kept.
    #[arg(long, requires = "weights")]
    pub topk_group: Option<usize>,

    /// Factor on the weights.
    #[arg(long, requires = "weights")]
    pub scale: Option<f32>,
}

fn dtype(name: &str) -> std::result::Result<DType, String> {
    let found = DType::ALL.into_iter().find(|dtype| dtype.name() == name);
    found.ok_or_else(|| "expected f32, f16 or bf16".into())
}

impl Options {
    /// Refuses a backend that was not compiled in, and options that mean nothing on it.
    ///
    /// # Errors
    /// One line that names the option.
    pub fn check(&self) -> Result<()> {
        let only_on_cpu = [
            ("--isa", self.isa.is_some()),
            ("--threads", self.threads.is_some()),
            ("--no-peaks", self.no_peaks),
        ];
        self.backend.check(&only_on_cpu).or_else(fail)
    }

    /// The published layer, cut to `--experts`.
    pub fn shape(&self) -> Result<Architecture> {
        let Some(architecture) = named(&self.shape) else {
            let names: Vec<String> = published().into_iter().map(|shape| shape.name).collect();
            return fail(format!(
                "--shape: unknown name {:?}; known are {}",
                self.shape,
                names.join(", ")
            ));
        };
        match self.experts {
            Some(experts) => architecture
                .cut(experts)
                .or_else(|why| fail(format!("--experts: {why}"))),
            None => Ok(architecture),
        }
    }
}
