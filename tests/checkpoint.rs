//! Checkpoints in every published naming run and agree with the f64 reference; bad ones are refused in words.

#[cfg(feature = "cuda")]
#[path = "common/gpu.rs"]
mod gpu;
#[path = "../examples/support/layer/mod.rs"]
mod layer;

use clap::Parser;
use half::{bf16, f16};
use layer::shapes::Join;
use layer::{Options, Report};
use moe_kernels::routing::{Renorm, RouterConfig, Score, Selection, WeightSource};
use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize_to_file};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const H: usize = 20;
const I: usize = 12;
const E: usize = 6;

/// A directory that goes when the test ends.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!(
            "moe-kernels-checkpoint-{name}-{}",
            std::process::id()
        ));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).expect("a temporary directory");
        Self(path)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A checkpoint in the making.
#[derive(Clone)]
struct Model {
    dtype: Dtype,
    tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
}

impl Model {
    fn new(dtype: Dtype) -> Self {
        let model = Self {
            dtype,
            tensors: BTreeMap::new(),
        };
        // Other layers and tensors are there and are none of the layer's business.
        model
            .with("model.embed_tokens.weight", &[4, H])
            .with("model.layers.0.mlp.gate_proj.weight", &[I, H])
            .with("model.layers.11.mlp.experts.0.up_proj.weight", &[I, H])
    }

    /// A tensor of numbers in −0.5..0.5 that depend on its name.
    fn with(mut self, name: &str, shape: &[usize]) -> Self {
        let mut state = name
            .bytes()
            .fold(7u64, |s, b| s.wrapping_mul(1_000_003) ^ u64::from(b));
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5
        };
        let n: usize = shape.iter().product();
        let bytes = match self.dtype {
            Dtype::F16 => (0..n)
                .flat_map(|_| f16::from_f32(next()).to_le_bytes())
                .collect(),
            Dtype::BF16 => (0..n)
                .flat_map(|_| bf16::from_f32(next()).to_le_bytes())
                .collect(),
            _ => (0..n).flat_map(|_| next().to_le_bytes()).collect(),
        };
        self.tensors
            .insert(name.into(), (self.dtype, shape.to_vec(), bytes));
        self
    }

    fn with_separate(mut self, prefix: &str, names: [&str; 3]) -> Self {
        for e in 0..E {
            for (name, shape) in names.iter().zip([[I, H], [I, H], [H, I]]) {
                self = self.with(&format!("{prefix}.{e}.{name}.weight"), &shape);
            }
        }
        self
    }

    fn without(mut self, name: &str) -> Self {
        self.tensors
            .remove(name)
            .unwrap_or_else(|| panic!("{name} is not there"));
        self
    }

    fn write(&self, path: &Path) {
        let views = self.tensors.iter().map(|(name, (dtype, shape, bytes))| {
            (
                name,
                TensorView::new(*dtype, shape.clone(), bytes).expect("a tensor"),
            )
        });
        serialize_to_file(views, None, path).expect("a file");
    }
}

fn options(path: &Path, more: &str) -> Options {
    let path = path.to_str().expect("a UTF-8 path");
    let fixed = [
        "layer",
        "--weights",
        path,
        "--layer",
        "1",
        "--tokens",
        "1,9",
        "--repeats",
        "1",
        "--check",
        "9",
        "--no-peaks",
    ];
    Options::try_parse_from(fixed.into_iter().chain(more.split_whitespace())).expect("options")
}

/// Runs the checkpoint; the check of all tokens must pass.
fn run(path: &Path, more: &str) -> Result<Report, String> {
    let (mut out, mut progress) = (Vec::new(), Vec::new());
    let report =
        layer::run(&options(path, more), &mut out, &mut progress).map_err(|why| why.to_string())?;
    let text = String::from_utf8(out).expect("UTF-8");
    assert!(report.passed(), "{text}");
    assert!(
        report.runs[1].1.tokens.len() == 9 && report.runs[1].1.wrong_ids == 0,
        "{text}"
    );
    Ok(report)
}

fn runs(name: &str, model: &Model, more: &str, config: Option<&str>) -> Report {
    let dir = Dir::new(name);
    if let Some(config) = config {
        std::fs::write(dir.file("config.json"), config).expect("a config");
    }
    let path = dir.file("model.safetensors");
    model.write(&path);
    match run(&path, more) {
        Ok(report) => {
            #[cfg(feature = "cuda")]
            runs_on_gpu(name, &path, more);
            report
        }
        Err(why) => panic!("{name}: {why}"),
    }
}

/// The same checkpoint from the same file on a GPU, where one is: whatever the layout and the biases, each token must pass the check.
#[cfg(feature = "cuda")]
fn runs_on_gpu(name: &str, path: &Path, more: &str) {
    if gpu::open().is_none() {
        return;
    }
    let options = Options {
        backend: layer::device::Backend::Cuda,
        isa: None,
        threads: None,
        no_peaks: false,
        ..options(path, more)
    };
    let (mut out, mut progress) = (Vec::new(), Vec::new());
    let report = layer::run(&options, &mut out, &mut progress)
        .unwrap_or_else(|why| panic!("{name} on the GPU: {why}"));
    let text = String::from_utf8(out).expect("UTF-8");
    assert!(report.passed(), "{name} on the GPU: {text}");
    assert_eq!(report.runs[1].1.tokens.len(), 9, "{text}");
}

fn mixtral(dtype: Dtype) -> Model {
    Model::new(dtype)
        .with("model.layers.1.block_sparse_moe.gate.weight", &[E, H])
        .with_separate(
            "model.layers.1.block_sparse_moe.experts",
            ["w1", "w3", "w2"],
        )
}

fn qwen3(dtype: Dtype) -> Model {
    Model::new(dtype)
        .with("model.layers.1.mlp.gate.weight", &[E, H])
        .with_separate(
            "model.layers.1.mlp.experts",
            ["gate_proj", "up_proj", "down_proj"],
        )
}

fn with_shared(model: Model, prefix: &str, inner: usize) -> Model {
    model
        .with(&format!("{prefix}.gate_proj.weight"), &[inner, H])
        .with(&format!("{prefix}.up_proj.weight"), &[inner, H])
        .with(&format!("{prefix}.down_proj.weight"), &[H, inner])
}

fn gpt_oss(dtype: Dtype) -> Model {
    Model::new(dtype)
        .with("model.layers.1.mlp.router.weight", &[E, H])
        .with("model.layers.1.mlp.router.bias", &[E])
        .with("model.layers.1.mlp.experts.gate_up_proj", &[E, H, 2 * I])
        .with("model.layers.1.mlp.experts.gate_up_proj_bias", &[E, 2 * I])
        .with("model.layers.1.mlp.experts.down_proj", &[E, I, H])
        .with("model.layers.1.mlp.experts.down_proj_bias", &[E, H])
}

#[test]
fn mixtral_naming() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        let report = runs("mixtral", &mixtral(dtype), "--top-k 2", None);
        let a = &report.architecture;
        assert_eq!((a.hidden, a.intermediate, a.experts()), (H, I, E));
        assert_eq!((a.router.top_k, a.router.renorm), (2, Renorm::Sum));
        assert_eq!(format!("{dtype:?}").to_lowercase(), report.dtype.name());
    }
    // Packed in another format than that of the file.
    let report = runs(
        "mixtral-bf16",
        &mixtral(Dtype::F32),
        "--top-k 2 --dtype bf16 --threads 2",
        None,
    );
    assert_eq!(report.dtype, moe_kernels::DType::BF16);
    // The same names, another router.
    let config =
        r#"{"model_type": "phimoe", "router_jitter_noise": 0.02, "num_experts_per_tok": 2}"#;
    let report = runs("phimoe", &mixtral(Dtype::F32), "", Some(config));
    let mixer = Selection::SparseMixer { jitter_eps: 0.02 };
    assert_eq!(report.architecture.router.selection, mixer);
    let corrected = mixtral(Dtype::F32).with(
        "model.layers.1.block_sparse_moe.e_score_correction_bias",
        &[E],
    );
    let report = runs("minimax", &corrected, "--top-k 3", None);
    assert!(
        report.architecture.correction_bias && report.architecture.router.score == Score::Sigmoid
    );
}

#[test]
fn qwen_and_olmoe_naming() {
    let config = r#"{"model_type": "qwen3_moe", "num_experts_per_tok": 3, "norm_topk_prob": true, "hidden_act": "silu"}"#;
    let report = runs("qwen3", &qwen3(Dtype::BF16), "", Some(config));
    assert_eq!(
        (
            report.architecture.router.top_k,
            report.architecture.router.renorm
        ),
        (3, Renorm::Sum)
    );

    let config = r#"{"model_type": "olmoe", "num_experts_per_tok": 4, "norm_topk_prob": false}"#;
    let report = runs("olmoe", &qwen3(Dtype::F32), "--top-k 2", Some(config));
    let router = &report.architecture.router;
    assert_eq!(
        (router.top_k, router.renorm),
        (2, Renorm::None),
        "options come before the config"
    );
    let report = runs(
        "olmoe-by-option",
        &qwen3(Dtype::F32),
        "--top-k 2 --norm-topk false",
        None,
    );
    assert_eq!(report.architecture.router.renorm, Renorm::None);

    let qwen2 = with_shared(qwen3(Dtype::BF16), "model.layers.1.mlp.shared_expert", 28)
        .with("model.layers.1.mlp.shared_expert_gate.weight", &[1, H]);
    let report = runs("qwen2", &qwen2, "--top-k 2", None);
    let shared = report.architecture.shared.expect("a shared expert");
    assert_eq!((shared.intermediate, shared.join), (28, Join::SigmoidGate));
    assert_eq!(report.architecture.router.renorm, Renorm::None);
}

#[test]
fn deepseek_naming() {
    let v3 = with_shared(qwen3(Dtype::BF16), "model.layers.1.mlp.shared_experts", 16)
        .with("model.layers.1.mlp.gate.e_score_correction_bias", &[E]);
    let report = runs(
        "deepseek-v3",
        &v3,
        "--top-k 2 --n-group 3 --topk-group 2 --scale 2.5",
        None,
    );
    let a = &report.architecture;
    assert_eq!(
        (a.router.score, a.router.scale, a.correction_bias),
        (Score::Sigmoid, 2.5, true)
    );
    assert_eq!(a.shared.expect("a shared expert").join, Join::Add);
    let config = r#"{"model_type": "deepseek_v3", "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "routed_scaling_factor": 1.5, "norm_topk_prob": true}"#;
    let report = runs("deepseek-v3-config", &v3, "", Some(config));
    assert_eq!(report.architecture.router.scale, 1.5);

    let v2 = with_shared(qwen3(Dtype::F16), "model.layers.1.mlp.shared_experts", 16);
    let config = r#"{"model_type": "deepseek_v2", "num_experts_per_tok": 2, "n_group": 3, "topk_group": 2,
        "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0}"#;
    let report = runs("deepseek-v2", &v2, "", Some(config));
    assert_eq!(
        (
            report.architecture.router.score,
            report.architecture.router.scale
        ),
        (Score::Softmax, 16.0)
    );
    // Groups that are given are used, config or not.
    let report = runs(
        "deepseek-v2-options",
        &v2,
        "--top-k 2 --n-group 3 --topk-group 2 --scale 16",
        None,
    );
    let grouped = RouterConfig::deepseek_v2_grouped(E, 2, 3, 2, 16.0);
    assert_eq!(report.architecture.router, grouped);
}

/// An option that would be ignored is refused.
#[test]
fn options_that_mean_nothing() {
    for (name, option) in [
        ("--n-group", "--n-group 2"),
        ("--topk-group", "--topk-group 2"),
        ("--scale", "--scale 2"),
        ("--norm-topk", "--norm-topk true"),
    ] {
        let words = format!("{name}: the router of Mixtral has no such setting");
        let more = format!("--top-k 2 {option}");
        model_refused("ignored", &mixtral(Dtype::F32), &more, &words);
        let alone = ["layer"].into_iter().chain(option.split(' '));
        let why = Options::try_parse_from(alone)
            .expect_err(option)
            .to_string();
        assert!(why.contains("--weights"), "{why}");
    }
    assert!(Options::try_parse_from(["layer", "--layer", "3"]).is_err());
    assert!(Options::try_parse_from(["layer", "--layer", "3", "--weights", "x"]).is_ok());
}

/// A backend that was not compiled in, and options of another.
#[test]
fn options_of_another_backend() {
    let refused = |words: &str| {
        let words = ["layer", "--backend", "cuda"]
            .into_iter()
            .chain(words.split_whitespace());
        let options = Options::try_parse_from(words).expect("options");
        let why = options.check().expect_err("a refusal").to_string();
        assert_eq!(why.lines().count(), 1, "{why}");
        why
    };
    for (option, words) in [
        ("--isa", "--isa scalar"),
        ("--threads", "--threads 1"),
        ("--no-peaks", "--no-peaks"),
    ] {
        let why = refused(words);
        if cfg!(feature = "cuda") {
            assert_eq!(why, format!("{option} means nothing with --backend cuda"));
        } else {
            assert!(why.contains("build with --features cuda"), "{why}");
            assert_eq!(why, refused(""));
        }
    }
    assert!(Options::try_parse_from(["layer", "--backend", "metal"]).is_err());
}

#[test]
fn gpt_oss_naming() {
    for dtype in [Dtype::F32, Dtype::BF16] {
        let report = runs("gpt-oss", &gpt_oss(dtype), "--top-k 2", None);
        assert!(report.architecture.biases);
        assert_eq!(
            report.architecture.router.weights,
            WeightSource::SoftmaxSelectedLogits
        );
    }
}

#[test]
fn fused_naming() {
    let fused = |gate_up: [usize; 3], down: [usize; 3], block: &str, router: &str| {
        Model::new(Dtype::BF16)
            .with(&format!("model.layers.1.{block}.{router}.weight"), &[E, H])
            .with(
                &format!("model.layers.1.{block}.experts.gate_up_proj"),
                &gate_up,
            )
            .with(&format!("model.layers.1.{block}.experts.down_proj"), &down)
    };
    // Transformers 5.
    let report = runs(
        "fused",
        &fused([E, 2 * I, H], [E, H, I], "mlp", "gate"),
        "--top-k 2",
        None,
    );
    assert_eq!(report.architecture.router.renorm, Renorm::Sum);
    let llama4 = fused([E, H, 2 * I], [E, I, H], "feed_forward", "router");
    let llama4 = with_shared(llama4, "model.layers.1.feed_forward.shared_expert", 16);
    let report = runs("llama4", &llama4, "--top-k 1", None);
    assert!(report.architecture.weight_on_input);
    let granite = Model::new(Dtype::F32)
        .with(
            "model.layers.1.block_sparse_moe.router.layer.weight",
            &[E, H],
        )
        .with(
            "model.layers.1.block_sparse_moe.input_linear.weight",
            &[E, 2 * I, H],
        )
        .with(
            "model.layers.1.block_sparse_moe.output_linear.weight",
            &[E, H, I],
        );
    let report = runs("granite", &granite, "--top-k 2", None);
    assert_eq!(
        report.architecture.router.weights,
        WeightSource::SoftmaxSelectedLogits
    );
    // What a fused tensor holds is what the separate ones hold: the halves in order.
    let jamba = Model::new(Dtype::F32)
        .with("model.layers.1.feed_forward.router.weight", &[E, H])
        .with_separate(
            "model.layers.1.feed_forward.experts",
            ["gate_proj", "up_proj", "down_proj"],
        );
    assert_eq!(
        runs("jamba", &jamba, "--top-k 2", None)
            .architecture
            .router
            .renorm,
        Renorm::None
    );
}

/// Different layouts of the same numbers give the same output bits.
#[test]
fn layouts_agree() {
    let separate = qwen3(Dtype::F32);
    let bytes = |name: &str| separate.tensors[name].2.clone();
    let (mut out_first, mut down) = (Vec::new(), Vec::new());
    for e in 0..E {
        for name in ["gate_proj", "up_proj"] {
            out_first.extend(bytes(&format!(
                "model.layers.1.mlp.experts.{e}.{name}.weight"
            )));
        }
        down.extend(bytes(&format!(
            "model.layers.1.mlp.experts.{e}.down_proj.weight"
        )));
    }
    let mut fused = Model::new(Dtype::F32).with("model.layers.1.mlp.gate.weight", &[E, H]);
    let mut put = |name: &str, shape: [usize; 3], bytes| {
        fused.tensors.insert(
            format!("model.layers.1.mlp.experts.{name}"),
            (Dtype::F32, shape.to_vec(), bytes),
        );
    };
    put("gate_up_proj", [E, 2 * I, H], out_first);
    put("down_proj", [E, H, I], down);
    let a = runs("agree-separate", &separate, "--top-k 2", None);
    let b = runs("agree-fused", &fused, "--top-k 2", None);
    for (a, b) in a.runs.iter().zip(&b.runs) {
        assert_eq!(a.0.sample.y, b.0.sample.y);
    }
}

#[test]
fn shards_with_an_index() {
    let dir = Dir::new("shards");
    let all = mixtral(Dtype::BF16);
    let (mut map, mut shards) = (
        BTreeMap::new(),
        [
            Model {
                tensors: BTreeMap::new(),
                ..all.clone()
            },
            all.clone(),
        ],
    );
    for (n, (name, tensor)) in all.tensors.iter().enumerate() {
        map.insert(name.clone(), format!("shard-{}.safetensors", n % 2));
        if n % 2 == 0 {
            shards[0].tensors.insert(name.clone(), tensor.clone());
            shards[1].tensors.remove(name);
        }
    }
    for (n, shard) in shards.iter().enumerate() {
        shard.write(&dir.file(&format!("shard-{n}.safetensors")));
    }
    let index = dir.file("model.safetensors.index.json");
    std::fs::write(&index, serde_json::json!({ "weight_map": map }).to_string()).expect("an index");
    run(&index, "--top-k 2").expect("two shards");

    std::fs::write(&index, r#"{"weight_map": {"a": "../shard-0.safetensors"}}"#).expect("an index");
    refuses(&index, "", "no file beside it");
    std::fs::write(&index, r#"{"weight_map": {"a": "shard-7.safetensors"}}"#).expect("an index");
    refuses(&index, "", "cannot be opened");
    std::fs::write(&index, "{").expect("an index");
    refuses(&index, "", "no safetensors index");
}

fn refuses(path: &Path, more: &str, words: &str) {
    match run(path, more) {
        Ok(_) => panic!("ran, instead of saying {words:?}"),
        Err(why) => assert!(why.contains(words), "{why:?} does not say {words:?}"),
    }
}

/// Writes the model and expects a refusal in these words.
fn model_refused(name: &str, model: &Model, more: &str, words: &str) {
    let dir = Dir::new(name);
    let path = dir.file("model.safetensors");
    model.write(&path);
    refuses(&path, more, words);
}

#[test]
fn missing_and_misshaped_tensors() {
    let k = "--top-k 2";
    let name = "model.layers.1.mlp.experts.3.up_proj.weight";
    model_refused(
        "missing",
        &qwen3(Dtype::F32).without(name),
        k,
        &format!("missing tensor {name}"),
    );
    let gate = "model.layers.1.mlp.gate.weight";
    model_refused(
        "no-router",
        &qwen3(Dtype::F32).without(gate),
        k,
        &format!("missing tensor {gate}"),
    );
    let words = format!("tensor {name}: expected shape [12, 20], got [20, 12]");
    model_refused("shape", &qwen3(Dtype::F32).with(name, &[H, I]), k, &words);
    model_refused(
        "more",
        &qwen3(Dtype::F32).with(gate, &[E - 1, H]),
        k,
        "rows for 5 experts only",
    );
    // A router that claims a thousand experts more than there are: the first missing ones say it.
    model_refused(
        "fewer",
        &qwen3(Dtype::F32).with(gate, &[E + 1000, H]),
        k,
        "and ",
    );
    model_refused(
        "rank",
        &qwen3(Dtype::F32).with(gate, &[E, H, 1]),
        k,
        "expected shape [E, H], got [6, 20, 1]",
    );
    model_refused("no-k", &qwen3(Dtype::F32), "", "--top-k");
    model_refused("k", &qwen3(Dtype::F32), "--top-k 7", "top_k");
    model_refused("no-k", &qwen3(Dtype::F32), "--top-k 0", "top_k");
    let bias = "model.layers.1.mlp.experts.gate_up_proj_bias";
    model_refused(
        "bias",
        &gpt_oss(Dtype::F32).without(bias),
        k,
        &format!("missing tensor {bias}"),
    );
    let shared = with_shared(qwen3(Dtype::F32), "model.layers.1.mlp.shared_expert", 8);
    model_refused(
        "gate",
        &shared,
        k,
        "missing tensor model.layers.1.mlp.shared_expert_gate.weight",
    );
    let deepseek = qwen3(Dtype::F32).with("model.layers.1.mlp.gate.e_score_correction_bias", &[E]);
    model_refused(
        "groups",
        &deepseek,
        "--top-k 2 --n-group 4 --topk-group 2",
        "n_group",
    );
}

#[test]
fn wrong_layers() {
    let dir = Dir::new("layers");
    let path = dir.file("model.safetensors");
    qwen3(Dtype::F32).write(&path);
    let with_layer = |n: &str| {
        let path = path.to_str().expect("a path");
        let options =
            Options::try_parse_from(["layer", "--weights", path, "--layer", n, "--top-k", "2"])
                .expect("options");
        layer::run(&options, &mut Vec::new(), &mut Vec::new())
            .err()
            .expect("a refusal")
            .to_string()
    };
    assert!(with_layer("0").contains("has no experts: it has model.layers.0.mlp.gate_proj.weight"));
    assert!(
        with_layer("5").contains("layers with experts: 1, 11"),
        "{}",
        with_layer("5")
    );
    assert!(with_layer("11").contains("missing tensor model.layers.11.mlp.gate.weight"));
}

#[test]
fn wrong_types() {
    let name = "model.layers.1.mlp.experts.3.up_proj.weight";
    let mut model = qwen3(Dtype::F32);
    model
        .tensors
        .insert(name.into(), (Dtype::F8_E4M3, vec![I, H], vec![0; I * H]));
    model_refused(
        "f8",
        &model,
        "--top-k 2",
        "expected F32, F16 or BF16, got F8_E4M3",
    );
    let scaled = qwen3(Dtype::F32).with(
        "model.layers.1.mlp.experts.0.up_proj.weight_scale_inv",
        &[1, 1],
    );
    model_refused("scaled", &scaled, "--top-k 2", "quantised");
    let mxfp4 =
        Model::new(Dtype::F32).with("model.layers.1.mlp.experts.gate_up_proj_blocks", &[E, 4]);
    model_refused("mxfp4", &mxfp4, "--top-k 2", "MXFP4");
}

/// Bytes of a file with this header and `data` zeros.
fn lying(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

#[test]
fn lying_headers() {
    let dir = Dir::new("lying");
    let path = dir.file("model.safetensors");
    let says = |bytes: &[u8], words: &str| {
        std::fs::write(&path, bytes).expect("a file");
        refuses(&path, "--top-k 2", words);
    };
    says(b"", "too few");
    says(b"1234567", "too few");
    says(&[0xff; 64], "more than the format allows");
    says(&lying("{}", 0), "layer 1 has no experts");
    says(&50u64.to_le_bytes(), "truncated");
    says(&lying("[]", 0), "no safetensors JSON");
    says(&lying("{\"a\": ", 0), "no safetensors JSON");
    says(&lying(r#"{"a": 3}"#, 0), "tensor a: bad header entry");
    let entry = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"a": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}}}"#)
    };
    says(&lying(&entry("F32", "[2]", "[8, 0]"), 8), "run backwards");
    says(&lying(&entry("F32", "[2]", "[0, 8]"), 4), "truncated");
    says(
        &lying(&entry("F32", "[3]", "[0, 8]"), 8),
        "has 12 bytes, its offsets say 8",
    );
    says(
        &lying(&entry("F32", "[-1]", "[0, 8]"), 8),
        "bad header entry",
    );
    let huge = "[4294967296, 4294967296, 4]";
    says(
        &lying(&entry("F32", huge, "[0, 8]"), 8),
        "more than any memory",
    );
    says(
        &lying(&entry("BF16", "[9223372036854775807]", "[0, 8]"), 8),
        "more than any memory",
    );
    says(
        &lying(
            &entry("F32", "[2]", "[18446744073709551608, 18446744073709551615]"),
            8,
        ),
        "truncated",
    );
}

/// A file cut anywhere is refused; with any byte of its header changed it runs or is refused, and nothing panics.
#[test]
fn damaged_files() {
    let dir = Dir::new("damaged");
    let path = dir.file("model.safetensors");
    qwen3(Dtype::BF16).write(&path);
    let whole = std::fs::read(&path).expect("the file");
    let header = 8 + usize::from(u16::from_le_bytes([whole[0], whole[1]]));
    for cut in (0..whole.len()).step_by(whole.len() / 37) {
        std::fs::write(&path, &whole[..cut]).expect("a file");
        assert!(run(&path, "--top-k 2").is_err(), "cut at {cut}");
    }
    for at in (0..header).step_by(7) {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 7);
        std::fs::write(&path, &bytes).expect("a file");
        let _ = run(&path, "--top-k 2");
    }
}

#[test]
fn bad_configs() {
    let dir = Dir::new("configs");
    let path = dir.file("model.safetensors");
    qwen3(Dtype::F32).write(&path);
    for (config, words) in [
        ("{", "no JSON"),
        (
            r#"{"num_experts_per_tok": -1}"#,
            "num_experts_per_tok: expected a whole number",
        ),
        (
            r#"{"num_experts_per_tok": 2, "routed_scaling_factor": "x"}"#,
            "routed_scaling_factor: expected a number",
        ),
        (
            r#"{"num_experts_per_tok": 2, "hidden_act": "mystery"}"#,
            "hidden_act \"mystery\"",
        ),
        (r#"{"model_type": "qwen3_moe"}"#, "--top-k"),
        (
            r#"{"model_type": "phimoe", "num_experts_per_tok": 3}"#,
            "selects 2 experts, not 3",
        ),
    ] {
        std::fs::write(dir.file("config.json"), config).expect("a config");
        refuses(&path, "", words);
    }
}

/// Every published shape has a valid router; the small ones run in every format.
#[test]
fn shapes() {
    for shape in layer::shapes::published() {
        assert!(shape.router.validate().is_ok(), "{}", shape.name);
    }
    let run = |line: &str| {
        let options = Options::try_parse_from(line.split_whitespace()).expect("options");
        let mut out = Vec::new();
        layer::run(&options, &mut out, &mut Vec::new()).map(|report| {
            assert!(report.passed(), "{}", String::from_utf8_lossy(&out));
            String::from_utf8(out).expect("UTF-8")
        })
    };
    for dtype in ["f32", "f16", "bf16"] {
        let text = run(&format!(
            "layer --shape tiny --tokens 1,40 --repeats 2 --dtype {dtype}"
        ))
        .expect("tiny");
        for words in [
            "router GEMM",
            "gate_up",
            "shared expert",
            "combine",
            "entropy",
            "within rounding",
            "█",
        ] {
            assert!(text.contains(words), "no {words:?} in {text}");
        }
    }
    let words = |line: &str| run(line).expect_err("a refusal").to_string();
    assert!(words("layer --shape nonsense").contains("mixtral-8x7b"));
    assert!(words("layer --shape tiny --experts 1").contains("expected 2 (K) to 8 (E), got 1"));
    assert!(words("layer --shape deepseek-v3 --experts 12").contains("multiple of 8"));
    assert!(words("layer --shape tiny --tokens 0").contains("--tokens"));
    assert!(words("layer --shape tiny --repeats 0").contains("--repeats"));
    assert!(words("layer --shape tiny --threads 0").contains("--threads"));
    assert!(words("layer --shape tiny --tokens 18446744073709551615").contains("address space"));
    assert!(
        run("layer --shape tiny --experts 4 --tokens 3 --repeats 1 --isa scalar --threads 1 --no-peaks")
            .is_ok()
    );
}
