//! Runs a case through the crate's GPU layer.

use super::backend::Unrun;
use super::case::{Case, Latent, Layer, Task};
use super::device::{Gpu, Matrix, Routed, Vector};
use super::mlp::{Combine, Shared};
use super::operands::Operands;
use super::out::Output;
use super::router::{Gate, InputNorm, Logits};
use super::run;
use moe_kernels::cuda::moe::{
    self, CudaMoeLayer, GateViews, LatentViews, MoeOperands, RouteSource, SharedExpert, SharedJoin,
    SharedViews,
};
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
    pub fn activations(&self) -> DType {
        self.dtype.unwrap_or(DType::F32)
    }

    /// Whether products run on tensor cores, so that the bits are not the CPU's.
    pub fn rounds(&self) -> bool {
        self.activations() != DType::F32
    }
}

/// `router_logits`, `topk_ids`, `topk_weights` and `y` of a layer.
///
/// All of them come from one call of the layer, gate included, when that is in f32. One in 16 bits is given the logits of the same layer in f32, which sees x as it is in the file
/// and not rounded: ids are those of the file then, and only y has a wider tolerance.
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
    let run = Run {
        gpu: &machine.gpu,
        case,
        operands: Operands::upload(machine, case)?,
    };
    let layer = describe(case, machine.activations())?;
    let exact = machine.rounds().then(|| describe(case, DType::F32));
    run.run(&layer, exact.transpose()?.as_ref(), on_cpu.router())
}

/// The layer that a case describes. What it cannot have is refused, naming the field.
fn describe(case: &Layer, dtype: DType) -> Ran<CudaMoeLayer> {
    let (config, mlp) = (case.gate.config.clone(), &case.experts);
    let mut layer = CudaMoeLayer::new(config, case.hidden, mlp.inner, mlp.activation, dtype)
        .map_err(not_here)?;
    if case.weight_on_input {
        layer = layer.with_weight_on_input();
    }
    if input_norm(&case.gate).is_some() {
        layer = layer.with_gate_norm();
    }
    if let Some(Latent { width, in_norm, .. }) = &case.latent {
        let (width, norm) = (*width, in_norm.is_some());
        let latent = moe::Latent { width, norm };
        layer = layer.with_latent(latent).map_err(not_here)?;
    }
    if case.post_norm.is_some() {
        layer = layer.with_post_norm(moe::PostNorm::ScaleFirst);
    }
    layer = layer.with_routed_scale(case.routed_out_scale)?;
    if let Some(shared) = &case.shared {
        layer = layer
            .with_shared(describe_shared(shared))
            .map_err(not_here)?;
    }
    Ok(layer)
}

fn describe_shared(shared: &Shared) -> SharedExpert {
    let parts = parts(shared);
    SharedExpert {
        count: parts,
        intermediate: shared.mlp.inner / parts,
        activation: shared.mlp.activation,
        join: match shared.combine {
            Combine::Add => SharedJoin::Add,
            Combine::SigmoidGate => SharedJoin::SigmoidGate,
            Combine::Average => SharedJoin::Average,
            Combine::RouterWeighted => SharedJoin::RouterWeighted,
        },
    }
}

/// The file has shared experts side by side as one; those with weights of their own are taken apart.
pub fn parts(shared: &Shared) -> usize {
    match shared.combine {
        Combine::RouterWeighted => shared.count.max(1),
        _ => 1,
    }
}

pub fn input_norm(gate: &Gate) -> Option<&InputNorm> {
    match &gate.logits {
        Logits::Linear { input_norm, .. } => input_norm.as_ref(),
        _ => None,
    }
}

/// A case on its way.
struct Run<'a> {
    gpu: &'a Gpu,
    case: &'a Layer,
    operands: Operands,
}

/// Where a call of the layer gets its routing from.
enum Source<'a> {
    Gate,
    Logits(&'a Matrix),
    Given(&'a Vector<i32>, &'a Vector<f32>),
}

impl Run<'_> {
    /// `exact` is the same layer with x and h in f32, for the logits of one in 16 bits.
    fn run(
        &self,
        layer: &CudaMoeLayer,
        exact: Option<&CudaMoeLayer>,
        router: &Router,
    ) -> Ran<Vec<Output>> {
        let (gpu, o, gate) = (self.gpu, &self.operands, &self.case.gate);
        if let Some(weights) = &gate.given_weights {
            let (ids, weights) = given(gate, weights)?;
            let (d_ids, d_weights) = (Vector::new(gpu, &ids)?, Vector::new(gpu, &weights)?);
            let (y, _) = self.call(layer, &o.x, &Source::Given(&d_ids, &d_weights))?;
            return Ok(self.outputs(Vec::new(), ids, weights, y));
        }
        let first = match &o.given_logits {
            Some(logits) => Source::Logits(logits),
            None => Source::Gate,
        };
        let (mut y, mut routed) = self.call(exact.unwrap_or(layer), &o.exact_x, &first)?;
        let logits = match &o.given_logits {
            Some(logits) => logits.read(gpu)?,
            None => std::mem::take(&mut routed.logits),
        };
        if exact.is_some() {
            let shape = [self.case.tokens, gate.config.num_logits()];
            let logits = Matrix::new(gpu, DType::F32, &logits, shape[0], shape[1])?;
            (y, routed) = self.call(layer, &o.x, &Source::Logits(&logits))?;
        }
        let outputs = vec![self.effective(router, &logits)?];
        Ok(self.outputs(outputs, routed.ids, routed.weights, y))
    }

    fn outputs(
        &self,
        mut outputs: Vec<Output>,
        ids: Vec<i32>,
        weights: Vec<f32>,
        y: Vec<f32>,
    ) -> Vec<Output> {
        let shape = [self.case.tokens, self.case.gate.config.slots()];
        outputs.push(Output::i32("topk_ids", &shape, ids));
        outputs.push(Output::f32("topk_weights", &shape, weights));
        outputs.push(Output::f32("y", &[shape[0], self.case.hidden], y));
        outputs
    }

    /// The logits as they enter the score function. The GPU has them in registers only; these are the host's from the GPU's logits. Ids that name no expert are
    /// refused here.
    fn effective(&self, router: &Router, logits: &[f32]) -> Ran<Output> {
        let shape = [self.case.tokens, self.case.gate.config.num_logits()];
        let mut input = RouteInput::new(MatRef::new(logits, shape[0], shape[1])?);
        if let Some(ids) = &self.case.gate.given_ids {
            input = input.given_ids(ids);
        }
        let mut effective = vec![f32::NAN; logits.len()];
        let out = MatMut::new(&mut effective, shape[0], shape[1])?;
        router.effective_logits_into(&Cpu::new(), &input, out)?;
        Ok(Output::f32("router_logits", &shape, effective))
    }

    /// The layer in one call: y, and what it routed by.
    fn call(
        &self,
        layer: &CudaMoeLayer,
        x: &Matrix,
        source: &Source<'_>,
    ) -> Ran<(Vec<f32>, Routed)> {
        let (gpu, stream, tokens) = (self.gpu, &self.gpu.stream, self.case.tokens);
        // No byte of the output may keep what it held before, and none of the workspace may matter.
        let poison = vec![f32::NAN; tokens * self.case.hidden];
        let mut y = Matrix::new(gpu, DType::F32, &poison, tokens, self.case.hidden)?;
        let size = layer.workspace_size(tokens, gpu.cuda.device_info())?;
        let mut workspace = Vector::new(gpu, &vec![0xffu8; size])?;
        let operands = self.views(x, source)?;
        let mut out = y.view_mut(stream)?;
        let mut space = workspace.view_mut(stream);
        layer.forward_into(&gpu.cuda, stream, &operands, &mut out, &mut space)?;
        drop((out, space, operands));
        let routed = Routed::read(gpu, layer, tokens, &mut workspace)?;
        Ok((y.read(gpu)?, routed))
    }

    fn views<'a>(&'a self, x: &'a Matrix, source: &Source<'a>) -> Ran<MoeOperands<'a>> {
        let (gpu, stream, o) = (self.gpu, &self.gpu.stream, &self.operands);
        let route = match source {
            Source::Gate => RouteSource::Gate(self.gate()?),
            Source::Logits(logits) => RouteSource::Logits(logits.view(stream)?),
            Source::Given(ids, weights) => RouteSource::Given {
                ids: ids.view(stream),
                weights: weights.view(stream),
            },
        };
        let mut operands = MoeOperands::new(x.view(stream)?, route, o.experts.views(gpu)?);
        if !matches!(source, Source::Given(..)) {
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
        if matches!(source, Source::Gate) {
            operands.gate_norm = o.gate_norm.as_ref().map(|norm| norm.view(gpu));
        }
        if let Some((w_in, norm, w_out)) = &o.latent {
            operands.latent = Some(LatentViews {
                w_in: w_in.view(stream)?,
                w_out: w_out.view(stream)?,
                norm: norm.as_ref().map(|norm| norm.view(gpu)),
            });
        }
        operands.post_norm = o.post_norm.as_ref().map(|norm| norm.view(gpu));
        operands.out_norm = o.out_norm.as_ref().map(|norm| norm.view(gpu));
        operands.out_bias = o.out_bias.as_ref().map(|v| v.view(stream));
        Ok(operands)
    }

    fn gate(&self) -> Ran<GateViews<'_>> {
        let (stream, o) = (&self.gpu.stream, &self.operands);
        let weights = o.gate.as_ref().ok_or("neither a gate nor logits")?;
        Ok(GateViews {
            weights: weights.view(stream)?,
            bias: o.gate_bias.as_ref().map(|b| b.view(stream)),
        })
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
