//! Runs a case through the crate's GPU layer.

use super::backend::Unrun;
use super::case::{Case, Layer, Norm, Task};
use super::device::{Gpu, Matrix, Vector, encode};
use super::file::Tensor;
use super::mlp::{Combine, Mlp, Shared};
use super::out::Output;
use super::router::{Gate, Logits};
use super::run;
use super::tensors::dtype;
use moe_kernels::cuda::moe::{
    CudaMoeLayer, ExpertViews, GateViews, MoeOperands, NormView, RouteSource, SharedExpert,
    SharedJoin, SharedViews, UpViews,
};
use moe_kernels::cuda::{RouteViews, routing};
use moe_kernels::routing::{GivenRouting, RouteInput, Router, Routing};
use moe_kernels::{Cpu, DType, MatMut, MatRef};

/// A GPU that runs cases.
pub struct Machine {
    pub gpu: Gpu,
    /// Format of the experts' weights. In 16 bits it is that of x and h too, so that tensor cores compute; otherwise these are f32, as in the file.
    pub dtype: Option<DType>,
}

type Ran<T> = Result<T, Unrun>;

/// What the GPU's layer does not do: the error names the field.
fn not_here(why: moe_kernels::Error) -> Unrun {
    Unrun::NotOnBackend(why.to_string())
}

impl Machine {
    /// The format of x and h.
    fn activations(&self) -> DType {
        self.dtype.unwrap_or(DType::F32)
    }

    /// Whether products run on tensor cores, so that the bits are not the CPU's.
    pub fn rounds(&self) -> bool {
        self.activations() != DType::F32
    }
}

/// `router_logits`, `topk_ids`, `topk_weights` and `y` of a layer.
///
/// With experts in f32 y comes from one call of the layer, gate included. In 16 bits the gate sees x as it is in the file and not rounded: ids are those of
/// the file then, and only y has a wider tolerance.
pub fn run(machine: &Machine, case: &Case) -> Ran<Vec<Output>> {
    let Task::Layer(case) = &case.task else {
        let why = "loss: auxiliary losses run on the CPU only";
        return Err(Unrun::NotOnBackend(why.into()));
    };
    // What the CPU refuses as well is no layer: that fails, whatever a GPU can do.
    let on_cpu = run::Machine {
        cpu: Cpu::new(),
        dtype: machine.dtype,
    };
    let on_cpu = run::build(&on_cpu, case)?;
    Run {
        machine,
        case,
        layer: describe(machine, case)?,
        router: on_cpu.router(),
        operands: Operands::upload(machine, case)?,
    }
    .run()
}

/// The layer that a case describes. What it cannot have is refused, naming the field.
fn describe(machine: &Machine, case: &Layer) -> Ran<CudaMoeLayer> {
    let (config, mlp) = (case.gate.config.clone(), &case.experts);
    let dtype = machine.activations();
    let lacking = [
        ("latent", case.latent.is_some()),
        ("post_norm", case.post_norm.is_some()),
        (
            "gate.input_norm",
            matches!(
                case.gate.logits,
                Logits::Linear {
                    input_norm: Some(_),
                    ..
                }
            ),
        ),
    ];
    if let Some((field, _)) = lacking.iter().find(|(_, has)| *has) {
        return Err(Unrun::NotOnBackend(format!(
            "{field}: runs on the CPU only"
        )));
    }
    let mut layer = CudaMoeLayer::new(config, case.hidden, mlp.inner, mlp.activation, dtype)
        .map_err(not_here)?;
    if case.weight_on_input {
        layer = layer.with_weight_on_input().map_err(not_here)?;
    }
    layer = layer.with_routed_scale(case.routed_out_scale)?;
    if let Some(shared) = &case.shared {
        layer = layer
            .with_shared(describe_shared(shared)?)
            .map_err(not_here)?;
    }
    Ok(layer)
}

fn describe_shared(shared: &Shared) -> Ran<SharedExpert> {
    Ok(SharedExpert {
        intermediate: shared.mlp.inner,
        activation: shared.mlp.activation,
        join: match shared.combine {
            Combine::Add => SharedJoin::Add,
            Combine::SigmoidGate => SharedJoin::SigmoidGate,
            Combine::Average => SharedJoin::Average,
            Combine::RouterWeighted => {
                let why = "shared.combine: router_weighted runs on the CPU only";
                return Err(Unrun::NotOnBackend(why.into()));
            }
        },
    })
}

/// The tensors of a case in device memory.
struct Operands {
    x: Matrix,
    /// x as the gate sees it.
    gate_x: Matrix,
    gate: Option<Matrix>,
    gate_bias: Option<Vector<f32>>,
    given_logits: Option<Matrix>,
    correction_bias: Option<Vector<f32>>,
    per_expert_scale: Option<Vector<f32>>,
    given_ids: Option<Vector<i32>>,
    experts: Experts,
    shared: Option<(Experts, Option<Matrix>)>,
    out_norm: Option<(Vector<f32>, f32)>,
    out_bias: Option<Vector<f32>>,
}

impl Operands {
    fn upload(machine: &Machine, case: &Layer) -> Ran<Self> {
        let (gpu, gate) = (&machine.gpu, &case.gate);
        let (tokens, hidden, columns) = (case.tokens, case.hidden, gate.config.num_logits());
        let floats = |v: &Option<Vec<f32>>| v.as_ref().map(|v| Vector::new(gpu, v)).transpose();
        let x = |dtype| Matrix::new(gpu, dtype, &case.x, tokens, hidden);
        let (w, bias, given) = match &gate.logits {
            Logits::Linear { w, .. } => (Some(w), floats(&gate.bias)?, None),
            Logits::Given(z) => (None, None, Some(run::biased(z, gate.bias.as_deref()))),
            Logits::None => (None, None, None),
        };
        Ok(Self {
            x: x(machine.activations())?,
            gate_x: x(DType::F32)?,
            gate: w
                .map(|w| tensor(gpu, w, weights_dtype(w), columns, hidden))
                .transpose()?,
            gate_bias: bias,
            given_logits: given
                .map(|z| Matrix::new(gpu, DType::F32, &z, tokens, columns))
                .transpose()?,
            correction_bias: floats(&gate.correction_bias)?,
            per_expert_scale: floats(&gate.per_expert_scale)?,
            given_ids: gate
                .given_ids
                .as_ref()
                .map(|ids| Vector::new(gpu, ids))
                .transpose()?,
            experts: Experts::upload(machine, &case.experts)?,
            shared: match &case.shared {
                Some(shared) => Some((
                    Experts::upload(machine, &shared.mlp)?,
                    shared
                        .gate_w
                        .as_ref()
                        .map(|w| Matrix::new(gpu, DType::F32, w, 1, hidden))
                        .transpose()?,
                )),
                None => None,
            },
            out_norm: match &case.out_norm {
                Some(Norm { eps, w }) => Some((Vector::new(gpu, w)?, *eps)),
                None => None,
            },
            out_bias: floats(&case.out_bias)?,
        })
    }
}

/// The format that a weight tensor has in the file.
fn weights_dtype(tensor: &Tensor) -> DType {
    dtype(tensor).unwrap_or(DType::F32)
}

fn tensor(gpu: &Gpu, tensor: &Tensor, dtype: DType, rows: usize, cols: usize) -> Ran<Matrix> {
    let values = tensor.f32s("weights").map_err(|why| why.to_string())?;
    Ok(Matrix::new(gpu, dtype, &values, rows, cols)?)
}

/// The weights of `count` MLPs, laid out as in the file: gate and up are tensors of their own.
struct Experts {
    gate: Option<Matrix>,
    up: Matrix,
    down: Matrix,
    /// `[E, 2I]`: the gate's bias, then the up projection's; `[E, I]` without a gate.
    up_bias: Option<Matrix>,
    down_bias: Option<Matrix>,
}

impl Experts {
    fn upload(machine: &Machine, mlp: &Mlp) -> Ran<Self> {
        let gpu = &machine.gpu;
        let (count, inner, outer) = (mlp.count, mlp.inner, mlp.outer);
        let dtype = machine.dtype.unwrap_or(mlp.dtype());
        let up = |w| tensor(gpu, w, dtype, count * inner, outer);
        let bias = |b: Vec<f32>, width| Matrix::new(gpu, DType::F32, &b, count, width);
        let up_bias = match (&mlp.gate_bias, &mlp.up_bias) {
            (Some(gate), Some(up)) => {
                let experts = gate.chunks(inner.max(1)).zip(up.chunks(inner.max(1)));
                let both = experts.flat_map(|(g, u)| [g, u].concat()).collect();
                Some(bias(both, 2 * inner)?)
            }
            (None, Some(up)) => Some(bias(up.clone(), inner)?),
            _ => None,
        };
        Ok(Self {
            gate: mlp.gate.as_ref().map(up).transpose()?,
            up: up(&mlp.up)?,
            down: tensor(gpu, &mlp.down, dtype, count * outer, inner)?,
            up_bias,
            down_bias: mlp
                .down_bias
                .as_ref()
                .map(|b| bias(b.clone(), outer))
                .transpose()?,
        })
    }

    fn views<'a>(&'a self, gpu: &'a Gpu) -> Ran<ExpertViews<'a>> {
        let view = |m: &'a Matrix| m.view(&gpu.stream);
        let up = match &self.gate {
            Some(gate) => UpViews::Separate(view(gate)?, view(&self.up)?),
            None => UpViews::Plain(view(&self.up)?),
        };
        Ok(ExpertViews {
            up_bias: self.up_bias.as_ref().map(view).transpose()?,
            down_bias: self.down_bias.as_ref().map(view).transpose()?,
            ..ExpertViews::new(up, view(&self.down)?)
        })
    }
}

/// A case on its way.
struct Run<'a> {
    machine: &'a Machine,
    case: &'a Layer,
    layer: CudaMoeLayer,
    router: &'a Router,
    operands: Operands,
}

impl Run<'_> {
    fn run(&self) -> Ran<Vec<Output>> {
        let (tokens, hidden) = (self.case.tokens, self.case.hidden);
        let gate = &self.case.gate;
        let mut outputs = Vec::new();
        let (ids, weights, logits) = match &gate.given_weights {
            Some(weights) => {
                let (ids, weights) = given(gate, weights)?;
                let gpu = &self.machine.gpu;
                (Vector::new(gpu, &ids)?, Vector::new(gpu, &weights)?, None)
            }
            None => {
                let logits = self.logits()?;
                outputs.push(self.effective(&logits.read(&self.machine.gpu)?)?);
                let (ids, weights) = self.route(&logits)?;
                (ids, weights, Some(logits))
            }
        };
        let y = self.forward(logits.as_ref(), &ids, &weights)?;
        let gpu = &self.machine.gpu;
        let shape = [tokens, gate.config.slots()];
        outputs.push(Output::i32("topk_ids", &shape, ids.read(gpu)?));
        outputs.push(Output::f32("topk_weights", &shape, weights.read(gpu)?));
        outputs.push(Output::f32("y", &[tokens, hidden], y.read(gpu)?));
        Ok(outputs)
    }

    /// The gate's logits, or those of the file with the router's bias.
    fn logits(&self) -> Ran<Matrix> {
        let (gpu, o) = (&self.machine.gpu, &self.operands);
        let (tokens, columns) = (self.case.tokens, self.case.gate.config.num_logits());
        if let Some(given) = &o.given_logits {
            return Ok(given.duplicate(gpu)?);
        }
        let gate = self.gate()?.ok_or("neither a gate nor logits")?;
        let mut logits = Matrix::zeros(gpu, DType::F32, tokens, columns)?;
        let x = o.gate_x.view(&gpu.stream)?;
        let mut out = logits.view_mut(&gpu.stream)?;
        self.layer
            .logits_into(&gpu.cuda, &gpu.stream, &x, &gate, &mut out)?;
        drop(out);
        Ok(logits)
    }

    fn gate(&self) -> Ran<Option<GateViews<'_>>> {
        let (stream, o) = (&self.machine.gpu.stream, &self.operands);
        let Some(weights) = &o.gate else {
            return Ok(None);
        };
        Ok(Some(GateViews {
            weights: weights.view(stream)?,
            bias: o.gate_bias.as_ref().map(|b| b.view(stream)),
        }))
    }

    /// The logits as they enter the score function. The GPU has them in registers only; these are the host's from the GPU's logits. Ids that name no expert are refused here.
    fn effective(&self, logits: &[f32]) -> Ran<Output> {
        let shape = [self.case.tokens, self.case.gate.config.num_logits()];
        let mut input = RouteInput::new(MatRef::new(logits, shape[0], shape[1])?);
        if let Some(ids) = &self.case.gate.given_ids {
            input = input.given_ids(ids);
        }
        let mut effective = vec![f32::NAN; logits.len()];
        let out = MatMut::new(&mut effective, shape[0], shape[1])?;
        self.router
            .effective_logits_into(&Cpu::new(), &input, out)?;
        Ok(Output::f32("router_logits", &shape, effective))
    }

    /// The router's stage alone, which shows what the layer keeps in its workspace.
    fn route(&self, logits: &Matrix) -> Ran<(Vector<i32>, Vector<f32>)> {
        let (gpu, o, config) = (&self.machine.gpu, &self.operands, &self.case.gate.config);
        let (stream, tokens) = (&gpu.stream, self.case.tokens);
        let pairs = tokens * config.slots();
        let (mut ids, mut weights) = (Vector::zeros(gpu, pairs)?, Vector::zeros(gpu, pairs)?);
        let mut workspace = Vector::zeros(gpu, routing::workspace_size(config, tokens)?)?;
        let mut input = RouteViews::new(logits.view(stream)?);
        input.correction_bias = o.correction_bias.as_ref().map(|v| v.view(stream));
        input.per_expert_scale = o.per_expert_scale.as_ref().map(|v| v.view(stream));
        input.given_ids = o.given_ids.as_ref().map(|v| v.view(stream));
        gpu.cuda.route_into(
            stream,
            config,
            &input,
            &mut ids.view_mut(stream),
            &mut weights.view_mut(stream),
            Some(&mut workspace.view_mut(stream)),
        )?;
        Ok((ids, weights))
    }

    /// Where the one call gets its routing from.
    fn source<'a>(
        &'a self,
        logits: Option<&'a Matrix>,
        ids: &'a Vector<i32>,
        weights: &'a Vector<f32>,
    ) -> Ran<RouteSource<'a>> {
        let stream = &self.machine.gpu.stream;
        let Some(logits) = logits else {
            let (ids, weights) = (ids.view(stream), weights.view(stream));
            return Ok(RouteSource::Given { ids, weights });
        };
        Ok(match self.gate()? {
            Some(gate) if !self.machine.rounds() => RouteSource::Gate(gate),
            _ => RouteSource::Logits(logits.view(stream)?),
        })
    }

    /// The layer in one call.
    fn forward(
        &self,
        logits: Option<&Matrix>,
        ids: &Vector<i32>,
        weights: &Vector<f32>,
    ) -> Ran<Matrix> {
        let (gpu, o) = (&self.machine.gpu, &self.operands);
        let (stream, tokens) = (&gpu.stream, self.case.tokens);
        let mut y = Matrix::zeros(gpu, DType::F32, tokens, self.case.hidden)?;
        // No element may keep what it held before.
        let poison = encode(DType::F32, &vec![f32::NAN; tokens * self.case.hidden]);
        y.write_rows(gpu, 0, &poison)?;
        let size = self.layer.workspace_size(tokens, gpu.cuda.device_info())?;
        let mut workspace = Vector::new(gpu, &vec![0xffu8; size])?;
        let route = self.source(logits, ids, weights)?;
        let mut operands = MoeOperands::new(o.x.view(stream)?, route, o.experts.views(gpu)?);
        if logits.is_some() {
            operands.correction_bias = o.correction_bias.as_ref().map(|v| v.view(stream));
            operands.per_expert_scale = o.per_expert_scale.as_ref().map(|v| v.view(stream));
            operands.given_ids = o.given_ids.as_ref().map(|v| v.view(stream));
        }
        if let Some((experts, gate)) = &o.shared {
            operands.shared = Some(SharedViews {
                expert: experts.views(gpu)?,
                gate: gate.as_ref().map(|w| w.view(stream)).transpose()?,
            });
        }
        operands.out_norm = o.out_norm.as_ref().map(|(weight, eps)| NormView {
            weight: weight.view(stream),
            eps: *eps,
            multiplier: 1.0,
        });
        operands.out_bias = o.out_bias.as_ref().map(|v| v.view(stream));
        let mut out = y.view_mut(stream)?;
        let mut space = workspace.view_mut(stream);
        self.layer
            .forward_into(&gpu.cuda, stream, &operands, &mut out, &mut space)?;
        drop((out, space, operands));
        Ok(y)
    }
}

/// Ids and weights that the file gives, checked as the CPU checks them.
fn given(gate: &Gate, weights: &[f32]) -> Ran<(Vec<i32>, Vec<f32>)> {
    let (config, ids) = (&gate.config, gate.given_ids.as_deref().unwrap_or_default());
    let given = GivenRouting::new(config.num_experts, config.top_k, ids, weights);
    let mut routing = Routing::new();
    routing.set_given(&Cpu::new(), &given.null_experts(config.null_experts))?;
    Ok((routing.ids().to_vec(), routing.weights().to_vec()))
}
