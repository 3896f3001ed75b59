//! A case on the machine that was asked for.

use super::case::{Case, Task};
use super::conformance::Args;
#[cfg(feature = "cuda")]
use super::cuda;
use super::device::Backend;
use super::out::Output;
use super::run::{self, Machine};
use moe_kernels::DType;

/// Why the program stops before the first case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stop {
    /// One line.
    pub why: String,
    /// The program's exit status: 2 for arguments that make no sense, 1 for a machine that is not there.
    pub status: u8,
}

impl Stop {
    /// Arguments that make no sense.
    pub fn usage(why: impl ToString) -> Self {
        let (why, status) = (why.to_string(), 2);
        Self { why, status }
    }
}

/// Why a case gave nothing.
#[derive(Clone, Debug, PartialEq)]
pub enum Unrun {
    /// The backend does not do this; begins with the field.
    NotOnBackend(String),
    Failed(String),
}

impl From<String> for Unrun {
    fn from(why: String) -> Self {
        Self::Failed(why)
    }
}

impl From<&str> for Unrun {
    fn from(why: &str) -> Self {
        Self::Failed(why.into())
    }
}

impl From<moe_kernels::Error> for Unrun {
    fn from(why: moe_kernels::Error) -> Self {
        Self::Failed(why.to_string())
    }
}

/// What runs the cases.
pub enum Runner {
    Cpu(Machine),
    #[cfg(feature = "cuda")]
    Cuda(cuda::Machine),
}

impl Runner {
    /// The machine that the arguments name.
    ///
    /// # Errors
    /// A [`Stop`]: not compiled in, an option of another backend, an unknown ISA; no driver or GPU.
    pub fn new(args: &Args) -> Result<Self, Stop> {
        let only_on_cpu = [("--isa", args.isa.is_some())];
        args.backend.check(&only_on_cpu).map_err(Stop::usage)?;
        match args.backend {
            Backend::Cpu => Machine::new(args.isa, args.dtype)
                .map(Self::Cpu)
                .map_err(Stop::usage),
            Backend::Cuda => Self::cuda(args.dtype),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda(dtype: Option<DType>) -> Result<Self, Stop> {
        let gpu = super::device::Gpu::open().map_err(|why| Stop {
            why: why.to_string(),
            status: 1,
        })?;
        Ok(Self::Cuda(cuda::Machine { gpu, dtype }))
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda(_: Option<DType>) -> Result<Self, Stop> {
        Err(Stop::usage("--backend cuda: not compiled in"))
    }

    /// What it calls itself in the last line.
    pub fn name(&self) -> String {
        match self {
            Self::Cpu(machine) => machine.cpu.isa().to_string(),
            #[cfg(feature = "cuda")]
            Self::Cuda(machine) => machine.gpu.name.clone(),
        }
    }

    /// Whether there are cases that the CPU runs and this does not.
    pub fn is_partial(&self) -> bool {
        !matches!(self, Self::Cpu(_))
    }

    pub fn run(&self, case: &Case) -> Result<Vec<Output>, Unrun> {
        match self {
            Self::Cpu(machine) => Ok(run::run(machine, case)?),
            #[cfg(feature = "cuda")]
            Self::Cuda(machine) => cuda::run(machine, case),
        }
    }

    pub fn tolerance(&self, case: &Case) -> f64 {
        match self {
            Self::Cpu(machine) => tolerance(machine.dtype, case, 0),
            #[cfg(feature = "cuda")]
            Self::Cuda(machine) => {
                // x and h are rounded, too; a latent space has two more matrices, and what goes into them.
                let latent = matches!(&case.task, Task::Layer(layer) if layer.latent.is_some());
                let activations = match (machine.rounds(), latent) {
                    (false, _) => 0,
                    (true, false) => 2,
                    (true, true) => 6,
                };
                tolerance(machine.dtype, case, activations)
            }
        }
    }
}

/// The file's, or what rounding to a narrower format allows: half a unit in the last place in each of the three matrices that a token passes, if any of them
/// is rounded, and in `activations` of what passes between them, four times over for sums that cancel.
pub fn tolerance(dtype: Option<DType>, case: &Case, activations: usize) -> f64 {
    let (Task::Layer(layer), Some(dtype)) = (&case.task, dtype) else {
        return case.rtol;
    };
    let experts = [Some(layer.experts.dtype())];
    let shared = layer.shared.as_ref().map(|s| s.mlp.dtype());
    let latent = layer.latent.as_ref().map(|l| l.dtype());
    let rounded = experts
        .into_iter()
        .chain([shared, latent])
        .flatten()
        .any(|d| d != dtype);
    let roundings = activations + if rounded { 3 } else { 0 };
    let unit = match dtype {
        DType::BF16 => 2f64.powi(-9),
        DType::F16 => 2f64.powi(-12),
        _ => 0.0,
    };
    case.rtol.max(4.0 * roundings as f64 * unit)
}
