//! Every naming runs.

use super::*;

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
    let a = runs("minimax", &corrected, "--top-k 3", None).architecture;
    assert!(a.correction_bias && a.router.score == Score::Sigmoid);
}

#[test]
fn qwen_and_olmoe_naming() {
    let config = r#"{"model_type": "qwen3_moe", "num_experts_per_tok": 3, "norm_topk_prob": true, "hidden_act": "silu"}"#;
    let report = runs("qwen3", &qwen3(Dtype::BF16), "", Some(config));
    let router = &report.architecture.router;
    assert_eq!((router.top_k, router.renorm), (3, Renorm::Sum));

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
    let router = &report.architecture.router;
    assert_eq!((router.score, router.scale), (Score::Softmax, 16.0));
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
    let report = runs("jamba", &jamba, "--top-k 2", None);
    assert_eq!(report.architecture.router.renorm, Renorm::None);
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
