//! What is refused, and in which words.

use super::*;

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
fn missing_and_misshaped_tensors() {
    let qwen = || qwen3(Dtype::F32);
    let up = "model.layers.1.mlp.experts.3.up_proj.weight";
    let gate = "model.layers.1.mlp.gate.weight";
    let bias = "model.layers.1.mlp.experts.gate_up_proj_bias";
    let shared = with_shared(qwen(), "model.layers.1.mlp.shared_expert", 8);
    let shared_gate = "model.layers.1.mlp.shared_expert_gate.weight";
    let deepseek = qwen().with("model.layers.1.mlp.gate.e_score_correction_bias", &[E]);
    for (model, words) in [
        (qwen().without(up), &*format!("missing tensor {up}")),
        (qwen().without(gate), &format!("missing tensor {gate}")),
        (
            qwen().with(up, &[H, I]),
            &format!("tensor {up}: expected shape [12, 20], got [20, 12]"),
        ),
        (qwen().with(gate, &[E - 1, H]), "rows for 5 experts only"),
        // A router that claims a thousand experts more than there are: the first missing ones say it.
        (qwen().with(gate, &[E + 1000, H]), "and "),
        (
            qwen().with(gate, &[E, H, 1]),
            "expected shape [E, H], got [6, 20, 1]",
        ),
        (
            gpt_oss(Dtype::F32).without(bias),
            &format!("missing tensor {bias}"),
        ),
        (shared, &format!("missing tensor {shared_gate}")),
    ] {
        model_refused("missing", &model, "--top-k 2", words);
    }
    let groups = "--top-k 2 --n-group 4 --topk-group 2";
    for (model, more, words) in [
        (&qwen(), "", "--top-k"),
        (&qwen(), "--top-k 7", "top_k"),
        (&qwen(), "--top-k 0", "top_k"),
        (&deepseek, groups, "n_group"),
    ] {
        model_refused("counts", model, more, words);
    }
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
