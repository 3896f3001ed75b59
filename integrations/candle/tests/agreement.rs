//! Our layers against candle-transformers' own blocks, on shapes that run in a moment.

#[path = "../examples/support/mod.rs"]
mod support;

use candle_core::{DType, Result, Tensor};
use support::check::{Routing, compare, expert_bound, weight_bound};
use support::model::{Around, Theirs, ids, ours};
use support::weights::{Source, block_prefix};
use support::{Family, Sizes};

const TOKENS: usize = 37;

/// No width is a multiple of a vector; expert counts and K differ.
fn sizes(family: Family) -> Sizes {
    let (experts, top_k) = match family {
        Family::Mixtral => (8, 2),
        Family::Qwen3 => (16, 4),
        Family::Qwen2 => (12, 3),
        Family::DeepSeek2 => (10, 6),
    };
    Sizes {
        experts,
        top_k,
        hidden: 130,
        intermediate: 46,
        shared: match family {
            Family::Qwen2 => 58,
            Family::DeepSeek2 => 92,
            _ => 0,
        },
        vocab: 140,
    }
}

/// Candle's answer and ours for the tokens whose experts are the same.
fn both(family: Family, dtype: DType, source: &Source, for_ours: &Source) -> Result<()> {
    let sizes = sizes(family);
    let around = Around::new(sizes, source)?;
    let mut model = Theirs::new(family, sizes, source)?;
    model.prepare();
    let theirs = around.features(&model.forward(&ids(TOKENS)?)?)?;

    let x = around.input(TOKENS)?;
    let gate = source.tensor(&format!("{}.gate.weight", block_prefix(family)))?;
    // DeepSeek-V2's gate is in f32 in candle too.
    let routing_dtype = if family == Family::DeepSeek2 {
        DType::F32
    } else {
        dtype
    };
    let routing = Routing::of(
        &x.to_dtype(routing_dtype)?,
        &gate.to_dtype(routing_dtype)?,
        sizes.top_k,
        true,
    )?;
    let exact = x
        .to_dtype(DType::F32)?
        .reshape((TOKENS, ()))?
        .matmul(&gate.to_dtype(DType::F32)?.t()?)?;
    let agreed = routing.agrees(&exact, routing_dtype, sizes.hidden)?;
    assert!(
        agreed.iter().filter(|same| **same).count() > TOKENS / 2,
        "too few tokens to compare"
    );

    let layer = ours(family, sizes, for_ours)?;
    let y = around.output(&layer.forward(&x)?)?;
    let weights = weight_bound(dtype, sizes.hidden, routing.largest_logit()?);
    compare(&theirs, &y, expert_bound(dtype, sizes) + weights, |t| {
        agreed[t]
    })?;
    Ok(())
}

fn agree(family: Family, dtype: DType) {
    let source = Source::new(family, sizes(family), dtype).unwrap();
    both(family, dtype, &source, &source).unwrap();
}

#[test]
fn qwen3_moe_agrees() {
    agree(Family::Qwen3, DType::F32);
    agree(Family::Qwen3, DType::BF16);
    agree(Family::Qwen3, DType::F16);
}

#[test]
fn mixtral_agrees() {
    // Candle's block multiplies by f32 weights, which only an f32 model can.
    agree(Family::Mixtral, DType::F32);
}

#[test]
fn qwen2_moe_agrees() {
    agree(Family::Qwen2, DType::F32);
    agree(Family::Qwen2, DType::BF16);
}

#[test]
fn deepseek2_agrees() {
    agree(Family::DeepSeek2, DType::F32);
    agree(Family::DeepSeek2, DType::BF16);
}

/// The comparison would notice: one expert's weights, the gate, or a shared expert's gate being others.
#[test]
fn another_tensor_is_noticed() {
    for (family, name) in [
        (Family::Qwen3, "model.layers.0.mlp.experts.3.up_proj.weight"),
        (Family::Qwen3, "model.layers.0.mlp.gate.weight"),
        (
            Family::Mixtral,
            "model.layers.0.block_sparse_moe.experts.1.w2.weight",
        ),
        (
            Family::Qwen2,
            "model.layers.0.mlp.shared_expert_gate.weight",
        ),
        (
            Family::DeepSeek2,
            "model.layers.0.mlp.shared_experts.down_proj.weight",
        ),
    ] {
        for dtype in [DType::F32, DType::BF16] {
            if (family, dtype) == (Family::Mixtral, DType::BF16) {
                continue; // see above
            }
            let source = Source::new(family, sizes(family), dtype).unwrap();
            let other = (source.tensor(name).unwrap() * 1.25).unwrap();
            let changed = source.with(name, other);
            assert!(
                both(family, dtype, &source, &changed).is_err(),
                "{name} {dtype:?}"
            );
        }
    }
}

/// Candle's routing given to our experts: then every token agrees, in bf16 too.
#[test]
fn experts_agree_on_a_given_routing() {
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let (family, sizes) = (Family::Qwen3, sizes(Family::Qwen3));
        let source = Source::new(family, sizes, dtype).unwrap();
        let around = Around::new(sizes, &source).unwrap();
        let mut model = Theirs::new(family, sizes, &source).unwrap();
        model.prepare();
        let theirs = around
            .features(&model.forward(&ids(TOKENS).unwrap()).unwrap())
            .unwrap();
        let x = around.input(TOKENS).unwrap();
        let gate = source.tensor("model.layers.0.mlp.gate.weight").unwrap();
        let routing = Routing::of(&x, &gate, sizes.top_k, true).unwrap();
        let shape = (TOKENS, 1, sizes.top_k);
        let (given, weights) = (
            routing.ids.reshape(shape).unwrap(),
            routing.weights.reshape(shape).unwrap(),
        );
        let y: Tensor = ours(family, sizes, &source)
            .unwrap()
            .forward_routed(&x, &given, &weights)
            .unwrap();
        compare(
            &theirs,
            &around.output(&y).unwrap(),
            expert_bound(dtype, sizes),
            |_| true,
        )
        .unwrap();
    }
}
