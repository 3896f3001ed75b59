//! Checkpoints in every published naming run and agree with the f64 reference; bad ones are refused in words.

#[cfg(feature = "cuda")]
#[path = "../common/gpu.rs"]
mod gpu;
#[path = "../../examples/support/layer/mod.rs"]
mod layer;

mod damaged;
mod model;
mod naming;
mod refused;

use clap::Parser;
use half::{bf16, f16};
use layer::shapes::Join;
use layer::{Options, Report};
use model::*;
use moe_kernels::routing::{Renorm, RouterConfig, Score, Selection, WeightSource};
use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize_to_file};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

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
