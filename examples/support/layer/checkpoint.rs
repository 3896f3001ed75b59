//! One layer of a checkpoint in Hugging Face naming.

use super::file::{TensorInfo, Tensors};
use super::naming::{Family, Layout, Naming, detect};
use super::options::Options;
use super::settings::Settings;
use super::shapes::{Architecture, Join, SharedShape};
use super::source::{RouterTensors, SharedTensors, Source};
use super::tensor::{Expert, GateUp, Matrix};
use super::{Result, fail};
use moe_kernels::DType;
use moe_kernels::grouped_gemm::{Activation, ActivationFunction, Clamp};
use std::path::Path;

/// A layer whose tensors are all there and of the right shapes.
pub struct Checkpoint {
    pub architecture: Architecture,
    /// The experts' format in the file.
    pub dtype: DType,
    /// What the user should know.
    pub notes: Vec<String>,
    tensors: Tensors,
    naming: Naming,
    correction: Option<String>,
}

impl Checkpoint {
    /// Finds the layer and checks every name, shape and format before anything is read.
    pub fn open(path: &Path, options: &Options) -> Result<Self> {
        let tensors = Tensors::open(path)?;
        let settings = Settings::read(path, options)?;
        let names: Vec<&str> = tensors.names().collect();
        let (naming, mut notes) = detect(&names, options.layer, &settings)?;
        naming.family.check_options(options)?;
        if !settings.from_config {
            notes.push("no config.json beside the weights: what they do not say comes from options or is what the family published".into());
            notes.extend(naming.family.open_settings(&settings).map(str::to_string));
        }
        let mut check = Check {
            tensors: &tensors,
            problems: Vec::new(),
        };
        let Some((experts, hidden)) = check.router(&naming) else {
            return check.into_failure();
        };
        let Some(inner) = check.inner(&naming, hidden) else {
            return check.into_failure();
        };
        check.experts(&naming, experts, hidden, inner);
        let shared = check.shared(&naming, hidden);
        let correction = ["gate.e_score_correction_bias", "e_score_correction_bias"]
            .map(|name| format!("{}{name}", naming.block))
            .into_iter()
            .find(|name| tensors.get(name).is_some());
        if let Some(name) = &correction {
            check.vector(name, experts);
        }
        let biases = naming.layout == Layout::InterleavedInFirst;
        if biases {
            check.vector(&naming.router.replace(".weight", ".bias"), experts);
        }
        check.finish()?;
        let architecture = Architecture {
            name: format!("layer {} ({:?})", options.layer, naming.family),
            hidden,
            intermediate: inner,
            router: naming.family.router(experts, &settings)?,
            activation: activation(naming.family, &settings)?,
            weight_on_input: naming.family == Family::Llama4,
            shared,
            biases,
            correction_bias: correction.is_some(),
        };
        let first_expert = naming.expert_tensors(0)[0].clone();
        let dtype = tensors
            .get(&first_expert)
            .and_then(|info| info.dtype)
            .unwrap_or(DType::F32);
        Ok(Self {
            architecture,
            dtype,
            notes,
            tensors,
            naming,
            correction,
        })
    }

    /// A matrix `[rows, cols]`, or part e of a stack of E of them; `in_first`: it lies as `[cols, rows]`.
    fn matrix(
        &mut self,
        name: &str,
        part: (usize, usize),
        rows: usize,
        cols: usize,
        in_first: bool,
    ) -> Result<Matrix> {
        let values = self.tensors.read_part(name, part.0, part.1)?;
        Ok(Matrix {
            transposed: in_first,
            ..Matrix::new(values, rows, cols)
        })
    }

    fn vector(&mut self, name: &str, part: (usize, usize)) -> Result<Vec<f32>> {
        Ok(self.tensors.read_part(name, part.0, part.1)?.f32s())
    }
}

impl Naming {
    /// The matrices of expert e: gate, up, down, or the two fused ones of all experts.
    fn expert_tensors(&self, e: usize) -> Vec<String> {
        match self.layout {
            Layout::Separate(names) => names
                .iter()
                .map(|name| format!("{}experts.{e}.{name}.weight", self.block))
                .collect(),
            _ => self.fused.to_vec(),
        }
    }

    fn bias_tensors(&self) -> [String; 2] {
        self.fused.clone().map(|name| format!("{name}_bias"))
    }
}

fn activation(family: Family, settings: &Settings) -> Result<Activation> {
    if family == Family::GptOss {
        let limit = settings.swiglu_limit.unwrap_or(7.0);
        return Ok(Activation {
            clamp: Clamp::GptOss {
                limit,
                alpha: 1.702,
            },
            ..Activation::GPT_OSS
        });
    }
    Ok(Activation::gated(match settings.hidden_act.as_deref() {
        None | Some("silu" | "swish") => ActivationFunction::Silu,
        Some("gelu") => ActivationFunction::Gelu,
        Some("gelu_new" | "gelu_pytorch_tanh") => ActivationFunction::GeluTanh,
        Some("relu") => ActivationFunction::Relu,
        Some(other) => return fail(format!("config.json: hidden_act {other:?} is not known")),
    }))
}

/// Collects what is wrong, so that the user sees all of it at once.
struct Check<'a> {
    tensors: &'a Tensors,
    problems: Vec<String>,
}

impl<'a> Check<'a> {
    /// A tensor that can be computed with.
    fn tensor(&mut self, name: &str) -> Option<&'a TensorInfo> {
        match self.tensors.get(name) {
            Some(info) if info.dtype.is_some() => return Some(info),
            Some(info) => {
                self.problems.push(format!(
                    "tensor {name}: expected F32, F16 or BF16, got {}",
                    info.dtype_name
                ));
            }
            None => self.problems.push(format!("missing tensor {name}")),
        }
        None
    }

    fn shape(&mut self, name: &str, expected: &[usize]) {
        if let Some(info) = self.tensor(name)
            && info.shape != expected
        {
            let found = &info.shape;
            self.problems.push(format!(
                "tensor {name}: expected shape {expected:?}, got {found:?}"
            ));
        }
    }

    fn vector(&mut self, name: &str, len: usize) {
        self.shape(name, &[len]);
    }

    /// E and H.
    fn router(&mut self, naming: &Naming) -> Option<(usize, usize)> {
        match *self.tensor(&naming.router)?.shape.as_slice() {
            [experts, hidden] if experts > 0 && hidden > 0 => Some((experts, hidden)),
            _ => self.bad_rank(&naming.router, "[E, H]"),
        }
    }

    fn bad_rank<T>(&mut self, name: &str, expected: &str) -> Option<T> {
        let found = self
            .tensors
            .get(name)
            .map(|info| info.shape.clone())
            .unwrap_or_default();
        self.problems.push(format!(
            "tensor {name}: expected shape {expected}, got {found:?}"
        ));
        None
    }

    /// I, from the first expert's down projection.
    fn inner(&mut self, naming: &Naming, hidden: usize) -> Option<usize> {
        let names = naming.expert_tensors(0);
        let down = names.last()?;
        let (expected, found) = match (naming.layout, self.tensor(down)?.shape.as_slice()) {
            (Layout::Separate(_), &[h, i]) => ("[H, I]", Some((h, i))),
            (Layout::Separate(_), _) => ("[H, I]", None),
            (Layout::FusedOutFirst, &[_, h, i]) => ("[E, H, I]", Some((h, i))),
            (Layout::FusedOutFirst, _) => ("[E, H, I]", None),
            (_, &[_, i, h]) => ("[E, I, H]", Some((h, i))),
            (_, _) => ("[E, I, H]", None),
        };
        match found {
            Some((h, i)) if h == hidden && i > 0 => Some(i),
            _ => self.bad_rank(down, &format!("{expected} with H = {hidden}")),
        }
    }

    fn experts(&mut self, naming: &Naming, experts: usize, hidden: usize, inner: usize) {
        let two = inner.saturating_mul(2);
        match naming.layout {
            Layout::Separate(_) => {
                // As many experts as the router has rows. A lie about rows costs a list of names, so stop at the first few.
                for e in 0..experts {
                    if self.problems.len() > 16 {
                        return;
                    }
                    let names = naming.expert_tensors(e);
                    self.shape(&names[0], &[inner, hidden]);
                    self.shape(&names[1], &[inner, hidden]);
                    self.shape(&names[2], &[hidden, inner]);
                }
                let more = &naming.expert_tensors(experts)[0];
                if self.tensors.get(more).is_some() {
                    self.problems.push(format!(
                        "tensor {more}: the router has rows for {experts} experts only"
                    ));
                }
            }
            Layout::FusedOutFirst => {
                self.shape(&naming.fused[0], &[experts, two, hidden]);
                self.shape(&naming.fused[1], &[experts, hidden, inner]);
            }
            Layout::FusedInFirst | Layout::InterleavedInFirst => {
                self.shape(&naming.fused[0], &[experts, hidden, two]);
                self.shape(&naming.fused[1], &[experts, inner, hidden]);
            }
        }
        if naming.layout == Layout::InterleavedInFirst {
            let [gate_up, down] = naming.bias_tensors();
            self.shape(&gate_up, &[experts, two]);
            self.shape(&down, &[experts, hidden]);
        }
    }

    fn shared(&mut self, naming: &Naming, hidden: usize) -> Option<SharedShape> {
        let prefix = naming.shared.as_ref()?;
        let names = shared_names(prefix);
        let inner = match *self.tensor(&names[2])?.shape.as_slice() {
            [h, inner] if h == hidden && inner > 0 => inner,
            _ => return self.bad_rank(&names[2], &format!("[H, Is] with H = {hidden}")),
        };
        self.shape(&names[0], &[inner, hidden]);
        self.shape(&names[1], &[inner, hidden]);
        let gate = shared_gate(naming);
        let join = if self.tensors.get(&gate).is_some() {
            self.shape(&gate, &[1, hidden]);
            Join::SigmoidGate
        } else if naming.family == Family::Qwen2Moe {
            self.problems.push(format!("missing tensor {gate}"));
            Join::SigmoidGate
        } else {
            Join::Add
        };
        Some(SharedShape {
            intermediate: inner,
            join,
        })
    }

    fn finish(self) -> Result<()> {
        if self.problems.is_empty() {
            Ok(())
        } else {
            self.into_failure()
        }
    }

    fn into_failure<T>(self) -> Result<T> {
        const SHOWN: usize = 6;
        let more = self.problems.len().saturating_sub(SHOWN);
        let mut words = self
            .problems
            .iter()
            .take(SHOWN)
            .cloned()
            .collect::<Vec<_>>()
            .join("; ");
        if more > 0 {
            words += &format!("; and {more} more of the kind");
        }
        fail(words)
    }
}

fn shared_names(prefix: &str) -> [String; 3] {
    ["gate_proj", "up_proj", "down_proj"].map(|name| format!("{prefix}{name}.weight"))
}

fn shared_gate(naming: &Naming) -> String {
    format!("{}shared_expert_gate.weight", naming.block)
}

impl Source for Checkpoint {
    fn router(&mut self) -> Result<RouterTensors> {
        let name = self.naming.router.clone();
        let (experts, hidden) = (self.architecture.experts(), self.architecture.hidden);
        let weight = self.matrix(&name, (0, 1), experts, hidden, false)?;
        let bias = match self.architecture.biases {
            true => Some(self.vector(&name.replace(".weight", ".bias"), (0, 1))?),
            false => None,
        };
        let correction = match self.correction.clone() {
            Some(name) => Some(self.vector(&name, (0, 1))?),
            None => None,
        };
        Ok(RouterTensors {
            weight,
            bias,
            correction,
        })
    }

    fn expert(&mut self, e: usize) -> Result<Expert> {
        let (h, i) = (self.architecture.hidden, self.architecture.intermediate);
        let names = self.naming.expert_tensors(e);
        let part = (e, self.architecture.experts());
        let in_first = matches!(
            self.naming.layout,
            Layout::FusedInFirst | Layout::InterleavedInFirst
        );
        let (gate_up, down) = match self.naming.layout {
            Layout::Separate(_) => (
                GateUp::Separate(
                    self.matrix(&names[0], (0, 1), i, h, false)?,
                    self.matrix(&names[1], (0, 1), i, h, false)?,
                ),
                self.matrix(&names[2], (0, 1), h, i, false)?,
            ),
            layout => {
                let both = self.matrix(&names[0], part, 2 * i, h, in_first)?;
                let down = self.matrix(&names[1], part, h, i, in_first)?;
                match layout {
                    Layout::InterleavedInFirst => (GateUp::Interleaved(both), down),
                    _ => (GateUp::Fused(both), down),
                }
            }
        };
        let mut expert = Expert {
            gate_up,
            down,
            gate_bias: None,
            up_bias: None,
            down_bias: None,
        };
        if self.architecture.biases {
            let [gate_up, down] = self.naming.bias_tensors();
            let both = self.vector(&gate_up, part)?;
            expert.gate_bias = Some(both.iter().copied().step_by(2).collect());
            expert.up_bias = Some(both.iter().copied().skip(1).step_by(2).collect());
            expert.down_bias = Some(self.vector(&down, part)?);
        }
        Ok(expert)
    }

    fn shared(&mut self) -> Result<Option<SharedTensors>> {
        let (Some(shape), Some(prefix)) = (self.architecture.shared, self.naming.shared.clone())
        else {
            return Ok(None);
        };
        let (h, i) = (self.architecture.hidden, shape.intermediate);
        let [gate, up, down] = shared_names(&prefix);
        let expert = Expert {
            gate_up: GateUp::Separate(
                self.matrix(&gate, (0, 1), i, h, false)?,
                self.matrix(&up, (0, 1), i, h, false)?,
            ),
            down: self.matrix(&down, (0, 1), h, i, false)?,
            gate_bias: None,
            up_bias: None,
            down_bias: None,
        };
        let gate = match shape.join {
            Join::SigmoidGate => {
                Some(self.matrix(&shared_gate(&self.naming), (0, 1), 1, h, false)?)
            }
            Join::Add => None,
        };
        Ok(Some(SharedTensors { expert, gate }))
    }
}
