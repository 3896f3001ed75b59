//! What a layer is apart from its weights, and the layers of published models by name.

use moe_kernels::grouped_gemm::Activation;
use moe_kernels::routing::{RouterConfig, Selection};

/// How the shared expert joins.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Join {
    Add,
    /// Behind the sigmoid of x · g (Qwen2-MoE).
    SigmoidGate,
}

/// A shared expert; several of one width are one of their summed width.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SharedShape {
    pub intermediate: usize,
    pub join: Join,
}

/// A layer without its weights.
#[derive(Clone, Debug)]
pub struct Architecture {
    pub name: String,
    /// H
    pub hidden: usize,
    /// I
    pub intermediate: usize,
    /// E, K and all that the router does.
    pub router: RouterConfig,
    pub activation: Activation,
    /// The weight multiplies the expert's input.
    pub weight_on_input: bool,
    pub shared: Option<SharedShape>,
    /// A bias on the logits, and one on every projection of every expert (gpt-oss).
    pub biases: bool,
    /// A correction bias in the selection (DeepSeek-V3).
    pub correction_bias: bool,
}

impl Architecture {
    /// SwiGLU experts behind a router, nothing else.
    pub fn new(name: &str, hidden: usize, intermediate: usize, router: RouterConfig) -> Self {
        Self {
            name: name.into(),
            hidden,
            intermediate,
            router,
            activation: Activation::SWIGLU,
            weight_on_input: false,
            shared: None,
            biases: false,
            correction_bias: false,
        }
    }

    fn shared(self, intermediate: usize, join: Join) -> Self {
        Self {
            shared: Some(SharedShape { intermediate, join }),
            ..self
        }
    }

    fn corrected(self) -> Self {
        Self {
            correction_bias: true,
            ..self
        }
    }

    /// The same layer with its first `experts` experts, or why that cannot be.
    pub fn cut(mut self, experts: usize) -> Result<Self, String> {
        let router = &mut self.router;
        let (all, k) = (router.num_experts, router.top_k);
        if !(k..=all).contains(&experts) {
            return Err(format!("expected {k} (K) to {all} (E), got {experts}"));
        }
        if let Selection::TopK {
            groups: Some(g), ..
        } = router.selection
            && (!experts.is_multiple_of(g.n_group) || experts / g.n_group * g.topk_group < k)
        {
            let most = g.n_group * k.div_ceil(g.topk_group);
            return Err(format!(
                "{} groups of which {} are kept for K = {k} want a multiple of {}, at least {most}; got {experts}",
                g.n_group, g.topk_group, g.n_group
            ));
        }
        router.num_experts = experts;
        if experts < all {
            self.name += &format!(" cut to {experts} of {all} experts");
        }
        Ok(self)
    }

    /// E
    pub fn experts(&self) -> usize {
        self.router.num_experts
    }

    /// Elements of one expert's matrices.
    pub fn expert_elements(&self) -> usize {
        3 * self.hidden * self.intermediate
    }

    /// The router's own parameters in words.
    pub fn describe_router(&self) -> String {
        let r = &self.router;
        let mut words = format!("{:?}", r.score).to_lowercase();
        if let Selection::TopK {
            groups: Some(g), ..
        } = r.selection
            && g.n_group > 1
        {
            words += &format!(", best {} of {} groups", g.topk_group, g.n_group);
        }
        if matches!(r.selection, Selection::SparseMixer { .. }) {
            words += ", sparsemixer";
        }
        words += &format!(", renorm {:?}", r.renorm).to_lowercase();
        if r.scale != 1.0 {
            words += &format!(", × {}", r.scale);
        }
        if self.correction_bias {
            words += ", correction bias";
        }
        words
    }
}

/// The published layers, smallest name first within a family. Sizes are those of the models' `config.json`.
pub fn published() -> Vec<Architecture> {
    use Architecture as A;
    use Join::{Add, SigmoidGate};
    use RouterConfig as R;
    let gpt_oss = |name, experts| A {
        activation: Activation::GPT_OSS,
        biases: true,
        ..A::new(name, 2880, 2880, R::gpt_oss(experts, 4))
    };
    let llama4 = |name, experts| {
        let base = A {
            weight_on_input: true,
            ..A::new(name, 5120, 8192, R::llama4(experts, 1))
        };
        base.shared(8192, Add)
    };
    let dsv2 = R::deepseek_v2_grouped(160, 6, 8, 3, 16.0);
    vec![
        A::new("tiny", 64, 48, R::qwen3_moe(8, 2)).shared(32, SigmoidGate),
        A::new("mixtral-8x7b", 4096, 14336, R::mixtral(8, 2)),
        A::new("mixtral-8x22b", 6144, 16384, R::mixtral(8, 2)),
        A::new("qwen3-30b-a3b", 2048, 768, R::qwen3_moe(128, 8)),
        A::new("qwen3-235b-a22b", 4096, 1536, R::qwen3_moe(128, 8)),
        A::new("qwen3-next-80b-a3b", 2048, 512, R::qwen3_moe(512, 10)).shared(512, SigmoidGate),
        A::new("qwen2-57b-a14b", 3584, 2560, R::qwen2_moe(64, 8)).shared(20480, SigmoidGate),
        A::new("qwen1.5-moe-a2.7b", 2048, 1408, R::qwen2_moe(60, 4)).shared(5632, SigmoidGate),
        A::new("olmoe", 2048, 1024, R::olmoe(64, 8)),
        A::new("deepseek-v2", 5120, 1536, dsv2).shared(3072, Add),
        A::new("deepseek-v2-lite", 2048, 1408, R::deepseek_v2(64, 6, 1.0)).shared(2816, Add),
        A::new("deepseek-v3", 7168, 2048, R::deepseek_v3(256, 8, 8, 4, 2.5))
            .shared(2048, Add)
            .corrected(),
        A::new("kimi-k2", 7168, 2048, R::kimi_k2(384, 8, 2.827))
            .shared(2048, Add)
            .corrected(),
        A::new("glm-4.5-air", 4096, 1408, R::glm4_moe(128, 8, 1.0))
            .shared(1408, Add)
            .corrected(),
        A::new("minimax-m2", 3072, 1536, R::minimax_m2(256, 8)).corrected(),
        gpt_oss("gpt-oss-20b", 32),
        gpt_oss("gpt-oss-120b", 128),
        llama4("llama4-scout", 16),
        llama4("llama4-maverick", 128),
        A::new("dbrx", 6144, 10752, R::dbrx(16, 4, 1.0)),
        A::new("phi3.5-moe", 4096, 6400, R::phimoe(16, 0.01)),
        A::new("jamba", 4096, 14336, R::qwen2_moe(16, 2)),
        A::new("granite-1b-a400m", 1024, 512, R::granite(32, 8)),
        A::new("granite-3b-a800m", 1536, 512, R::granite(40, 8)),
    ]
}

/// A published layer by name.
pub fn named(name: &str) -> Option<Architecture> {
    published().into_iter().find(|shape| shape.name == name)
}
