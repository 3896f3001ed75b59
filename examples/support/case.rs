//! The neutral case format: one layer or one loss of a published model family, with what it must give.
//!
//! `tests/data/README.md` describes the format. Values are read into the crate's own types. A field with a value that this reader does
//! not know is refused by name, a field or tensor that it does not know at all is noted, and nothing is ignored in silence.

use super::fields::Fields;
use super::file::{CaseFile, Result, Tensor, malformed};
use super::mlp::{Mlp, Shared, read_experts, read_shared};
use super::router::{Gate, read_gate};
use super::tensors::{Tensors, common_dtype};
use moe_kernels::DType;
use std::collections::BTreeMap;
use std::path::Path;

/// A file of the format, read and checked.
#[derive(Clone, Debug)]
pub struct Case {
    /// A name that is safe as a file name.
    pub id: String,
    /// forward, train, tie, adversarial or loss.
    pub kind: String,
    /// The largest allowed max|d| / max|expected|.
    pub rtol: f64,
    /// Rows that may hold anything.
    pub open_rows: Vec<usize>,
    /// What it computes.
    pub task: Task,
    /// What it must give: `router_logits`, `topk_ids`, `y`, …
    pub expected: BTreeMap<String, Tensor>,
    /// Fields and tensors that nobody has read, and guesses that had to be made.
    pub notes: Vec<String>,
}

/// What a case computes.
#[derive(Clone, Debug)]
pub enum Task {
    Layer(Box<Layer>),
    Loss(Loss),
}

/// A layer and its input. Tensors as in the format, row-major.
#[derive(Clone, Debug)]
pub struct Layer {
    /// T
    pub tokens: usize,
    /// H
    pub hidden: usize,
    /// `[T, H]`
    pub x: Vec<f32>,
    pub gate: Gate,
    pub experts: Mlp,
    /// The weight multiplies the input of the expert instead of its output.
    pub weight_on_input: bool,
    pub latent: Option<Latent>,
    /// On each expert's output, before its weight.
    pub post_norm: Option<PostNorm>,
    pub routed_out_scale: f32,
    pub shared: Option<Shared>,
    pub out_norm: Option<Norm>,
    /// `[H]`
    pub out_bias: Option<Vec<f32>>,
}

/// An RMS norm `w · x / √(mean(x²) + eps)`.
#[derive(Clone, Debug)]
pub struct Norm {
    pub eps: f32,
    pub w: Vec<f32>,
}

/// The narrower space of the routed experts.
#[derive(Clone, Debug)]
pub struct Latent {
    /// L
    pub width: usize,
    /// `[L, H]`
    pub in_w: Tensor,
    /// On what enters it.
    pub in_norm: Option<Norm>,
    /// `[H, L]`
    pub out_w: Tensor,
}

impl Latent {
    /// The format that holds both matrices.
    pub fn dtype(&self) -> DType {
        common_dtype([&self.in_w, &self.out_w])
    }
}

/// A norm on an expert's output that scales first, `q / √(mean(q²) + eps)` with `q = w · x`: that of the one family that has any.
#[derive(Clone, Debug)]
pub struct PostNorm(pub Norm);

/// A loss and its input.
#[derive(Clone, Debug)]
pub struct Loss {
    pub kind: LossKind,
    /// L of them, or groups.
    pub layers: usize,
    /// T of one layer.
    pub tokens: usize,
    /// E
    pub experts: usize,
    /// As in the file: `[L, T, E]`, or `[T, E]` of a single layer.
    pub shape: Vec<usize>,
    pub logits: Vec<f32>,
    /// `[T]`: 1 for tokens that count, 0 for the others.
    pub mask: Option<Vec<f32>>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LossKind {
    /// Transformers' form over all layers, with K choices a token.
    LoadBalancing {
        top_k: usize,
    },
    /// Switch's form, a group at a time.
    SwitchLoadBalancing,
    RouterZ,
}

impl Case {
    /// Reads a file from disk. A case without an id gets the file's name.
    pub fn read(path: &Path) -> Result<Self> {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        Self::from_file(CaseFile::read(path)?, &stem)
    }

    /// Understands what a file holds.
    pub fn from_file(file: CaseFile, default_id: &str) -> Result<Self> {
        let fields = Fields::new(&file.meta);
        fields.choice("format", "moe-case-1", &[("moe-case-1", ())])?;
        let id = fields
            .get("id")
            .map_or(Some(default_id), |id| id.as_str())
            .filter(|id| is_file_name(id));
        let Some(id) = id.map(str::to_string) else {
            return malformed("field id: expected a word that can be a file name");
        };
        let rtol = fields.number("rtol")?.unwrap_or(2e-5);
        if !(rtol.is_finite() && rtol >= 0.0) {
            return malformed(format!("field rtol: {rtol} is no tolerance"));
        }
        let kind = fields.word("kind", "forward")?.to_string();

        let mut tensors = Tensors::new(file.tensors);
        let expected = tensors.take_expected();
        let task = if kind == "loss" {
            Task::Loss(read_loss(&fields, &mut tensors)?)
        } else {
            Task::Layer(Box::new(read_layer(&fields, &mut tensors)?))
        };
        let rows = match &task {
            Task::Layer(layer) => layer.tokens,
            Task::Loss(loss) => loss.layers * loss.tokens,
        };
        let open_rows = read_open_rows(&fields, rows)?;
        for name in INFORMATION {
            fields.get(name);
        }
        let mut notes = tensors.into_notes();
        fields.report_unread(&mut notes);
        Ok(Self {
            id,
            kind,
            rtol,
            open_rows,
            task,
            expected,
            notes,
        })
    }
}

/// Fields that say where a case comes from, or repeat what tensors say.
const INFORMATION: [&str; 21] = [
    "bf16_weights",
    "clamped_fraction",
    "dropped",
    "family",
    "fd_max_rel_err",
    "hf_class",
    "hf_float32_grad_x_rel_err",
    "hf_source",
    "loss",
    "masked",
    "min_selection_margin",
    "note",
    "num_layers",
    "rule",
    "tied_rows",
    "tokens_per_expert_max",
    "tokens_per_expert_min",
    "tokens_tied_at_boundary",
    "torch_cpu_f32_same_selection",
    "torch_cpu_f64_same_selection",
    "torch_observed",
];

fn is_file_name(id: &str) -> bool {
    let safe = |c: char| !c.is_control() && !r#"/\:*?"<>|"#.contains(c);
    !id.is_empty() && !id.starts_with('.') && id.len() <= 200 && id.chars().all(safe)
}

fn read_open_rows(fields: &Fields, rows: usize) -> Result<Vec<usize>> {
    let Some(value) = fields.get("open_rows") else {
        return Ok(Vec::new());
    };
    let row = |v: &serde_json::Value| v.as_u64().map(|v| v as usize).filter(|&r| r < rows);
    let found = value.as_array().and_then(|a| a.iter().map(row).collect());
    match found {
        Some(found) => Ok(found),
        None => malformed(format!(
            "field open_rows: expected rows below {rows}, got {value}"
        )),
    }
}

fn read_layer(fields: &Fields, tensors: &mut Tensors) -> Result<Layer> {
    let x = tensors.take("x")?;
    let &[tokens, hidden] = x.shape.as_slice() else {
        return malformed(format!(
            "tensor x: expected shape [T, H], got {:?}",
            x.shape
        ));
    };
    tensors.expect_computed("x", &x)?;
    agrees(fields, "T", tokens)?;
    agrees(fields, "H", hidden)?;

    let latent_width = match tensors.get("latent_in_w") {
        Some(Tensor { shape, .. }) if shape.len() == 2 => shape[0],
        _ => hidden,
    };
    let experts_meta = fields.object("experts")?;
    let shared_meta = fields.object("shared")?;
    let latent = read_latent(&experts_meta, tensors, latent_width, hidden)?;
    let outer = latent.as_ref().map_or(hidden, |l| l.width);
    let post_norm = read_post_norm(&experts_meta, tensors, outer)?;
    let shared = read_shared(&shared_meta, tensors, hidden)?;
    let joint = shared.as_ref().map_or(0, |s| s.count);
    let gate = read_gate(fields, tensors, (tokens, hidden), joint)?;
    let experts = read_experts(&experts_meta, tensors, gate.config.num_experts, outer)?;
    // Some families' files give the width of another MLP here; what the tensors agree on is what runs.
    if fields.size("I")?.is_some_and(|i| i != experts.inner) {
        tensors.note(format!(
            "field I is not the experts' width, {}",
            experts.inner
        ));
    }
    let weight_on_input = experts_meta.choice(
        "apply_weight_on",
        "output",
        &[("output", false), ("input", true)],
    )?;
    let out_norm = match fields.word("out_norm", "none")? {
        "none" => None,
        "rms" => Some(Norm {
            eps: fields.f32_or("out_norm_eps", 0.0)?,
            w: tensors.vector("out_norm_w", hidden)?,
        }),
        other if other.contains("rms") => Some(Norm {
            eps: fields.f32_or("out_norm_eps", 0.0)?,
            w: tensors.norm_factor("out_norm_w", other, hidden)?,
        }),
        other => return Err(fields.unknown_value("out_norm", other)),
    };
    fields.get("out_norm_eps");
    let out_bias = if fields.flag("out_bias") {
        Some(tensors.vector("out_bias", hidden)?)
    } else {
        None
    };
    for meta in [experts_meta, shared_meta] {
        meta.report_unread(&mut tensors.notes);
    }
    Ok(Layer {
        tokens,
        hidden,
        x: x.f32s("x")?,
        gate,
        experts,
        weight_on_input,
        latent,
        post_norm,
        routed_out_scale: fields.f32_or("routed_out_scale", 1.0)?,
        shared,
        out_norm,
        out_bias,
    })
}

fn read_latent(
    meta: &Fields,
    tensors: &mut Tensors,
    width: usize,
    hidden: usize,
) -> Result<Option<Latent>> {
    let norm = meta.word("latent_in_norm", "none")?;
    let eps = meta.f32_or("latent_in_norm_eps", 0.0)?;
    if !meta.flag("latent") {
        return match norm {
            "none" => Ok(None),
            other => malformed(format!(
                "field experts.latent_in_norm is {other:?} without latent"
            )),
        };
    }
    let in_norm = match norm {
        "none" => None,
        kind => Some(Norm {
            eps,
            w: tensors.norm_factor("latent_in_norm_w", kind, width)?,
        }),
    };
    Ok(Some(Latent {
        width,
        in_w: tensors.weight("latent_in_w", &[width, hidden])?,
        in_norm,
        out_w: tensors.weight("latent_out_w", &[hidden, width])?,
    }))
}

fn read_post_norm(meta: &Fields, tensors: &mut Tensors, width: usize) -> Result<Option<PostNorm>> {
    let eps = meta.f32_or("post_norm_eps", 0.0)?;
    let kind = meta.word("post_norm", "none")?;
    if kind == "none" {
        return Ok(None);
    }
    let w = tensors.norm_factor("expert_post_norm_w", kind, width)?;
    Ok(Some(PostNorm(Norm { eps, w })))
}

fn read_loss(fields: &Fields, tensors: &mut Tensors) -> Result<Loss> {
    let top_k = fields.size("top_k")?.or(fields.size("k")?);
    fields.get("value");
    let kind = match fields.word("loss_kind", "missing")? {
        "load_balancing" => match top_k {
            Some(top_k) => LossKind::LoadBalancing { top_k },
            None => return malformed("field top_k is missing"),
        },
        "switch_load_balancing" => LossKind::SwitchLoadBalancing,
        "router_z" => LossKind::RouterZ,
        other => return Err(fields.unknown_value("loss_kind", other)),
    };
    let logits = tensors.take("logits")?;
    tensors.expect_computed("logits", &logits)?;
    let (layers, tokens, experts) = match *logits.shape.as_slice() {
        [layers, tokens, experts] => (layers, tokens, experts),
        [tokens, experts] => (1, tokens, experts),
        _ => {
            let found = &logits.shape;
            return malformed(format!(
                "tensor logits: expected shape [L, T, E], got {found:?}"
            ));
        }
    };
    agrees(fields, "E", experts)?;
    agrees(fields, "num_layers", layers)?;
    let masked = fields.get("masked").is_none() || fields.flag("masked");
    let name = ["attention_mask", "mask"]
        .into_iter()
        .find(|name| tensors.get(name).is_some());
    let mask = match name {
        Some(name) if masked => Some(tensors.mask(name, tokens)?),
        None if fields.flag("masked") => return malformed("missing tensor attention_mask"),
        _ => None,
    };
    Ok(Loss {
        kind,
        layers,
        tokens,
        experts,
        logits: logits.f32s("logits")?,
        shape: logits.shape,
        mask,
    })
}

/// Refuses a size of the metadata that a tensor contradicts.
pub fn agrees(fields: &Fields, name: &str, found: usize) -> Result<()> {
    match fields.size(name)? {
        Some(said) if said != found => malformed(format!(
            "field {name} is {said}, but the tensors say {found}"
        )),
        _ => Ok(()),
    }
}
