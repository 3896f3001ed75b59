//! Every kind of router at a given size, with seeded tensors and logits.

use crate::common::Rng;
use moe_kernels::routing::*;
use moe_kernels::{Cpu, MatRef};

/// A router to test, and what it routes.
#[derive(Debug)]
pub struct Setup {
    pub name: &'static str,
    pub config: RouterConfig,
    pub bias: Vec<f32>,
    pub per_expert_scale: Vec<f32>,
    pub tokens: usize,
    /// `[T, R]`
    pub logits: Vec<f32>,
    /// `[T, R]`, or empty.
    pub noise_logits: Vec<f32>,
    /// `[T, K]`, or empty.
    pub given_ids: Vec<i32>,
}

impl Setup {
    pub fn router(&self) -> Router {
        let mut router = Router::new(self.config.clone()).expect(self.name);
        if !self.bias.is_empty() {
            router = router.with_correction_bias(&self.bias).expect(self.name);
        }
        if !self.per_expert_scale.is_empty() {
            router = router
                .with_per_expert_scale(&self.per_expert_scale)
                .expect(self.name);
        }
        router
    }

    /// Tokens `first..first + tokens` of it.
    pub fn input(&self, first: usize, tokens: usize) -> RouteInput<'_> {
        let r = self.config.num_logits();
        let part = first * r..(first + tokens) * r;
        let logits = MatRef::new(&self.logits[part.clone()], tokens, r).unwrap();
        let mut input = RouteInput::new(logits).position(1000 + first as u64);
        if self.config.noise_seed.is_some() {
            input = input.noise_logits(MatRef::new(&self.noise_logits[part], tokens, r).unwrap());
        }
        if matches!(self.config.selection, Selection::Given) {
            let k = self.config.top_k;
            input = input.given_ids(&self.given_ids[first * k..(first + tokens) * k]);
        }
        input
    }

    pub fn route(&self, cpu: &Cpu) -> Routing {
        let mut routing = Routing::new();
        self.router()
            .route(cpu, &self.input(0, self.tokens), &mut routing)
            .expect(self.name);
        routing
    }

    /// Whether a token's result depends on other tokens, by definition.
    pub fn looks_across(&self) -> bool {
        self.config.capacity.is_some()
            || matches!(
                self.config.selection,
                Selection::ExpertChoice { .. } | Selection::ProductKeys { stacked: true }
            )
    }
}

/// Every kind of router for about `e` experts, K about `k`, `tokens` tokens; logits with standard deviation `spread`.
pub fn all(seed: u64, e: usize, k: usize, tokens: usize, spread: f32) -> Vec<Setup> {
    let mut rng = Rng(seed);
    configs(&mut rng, e, k, tokens)
        .into_iter()
        .map(|(name, config)| setup(name, config, &mut rng, tokens, spread))
        .collect()
}

fn setup(
    name: &'static str,
    config: RouterConfig,
    rng: &mut Rng,
    tokens: usize,
    spread: f32,
) -> Setup {
    let r = config.num_logits();
    let ranks = matches!(
        config.selection,
        Selection::TopK { .. } | Selection::ProductKeys { .. }
    );
    let bias = ranks && rng.below(3) != 0;
    let scale = rng.below(3) == 0;
    let noise = if config.noise_seed.is_some() {
        tokens * r
    } else {
        0
    };
    let given = matches!(config.selection, Selection::Given);
    let mut scaled =
        |n: usize, by: f32| -> Vec<f32> { (0..n).map(|_| by * rng.normal()).collect() };
    let logits = scaled(tokens * r, spread);
    let noise_logits = scaled(noise, 1.0);
    let bias = scaled(if bias { config.selectable() } else { 0 }, 0.1);
    let per_expert_scale = scaled(if scale { config.num_experts } else { 0 }, 2.0);
    let given_ids = if given {
        given_ids(rng, &config, tokens)
    } else {
        Vec::new()
    };
    Setup {
        name,
        config,
        bias,
        per_expert_scale,
        tokens,
        logits,
        noise_logits,
        given_ids,
    }
}

/// Distinct ids for each token, now and then a dropped one.
pub fn given_ids(rng: &mut Rng, config: &RouterConfig, tokens: usize) -> Vec<i32> {
    let n = config.selectable();
    let mut ids = Vec::new();
    for _ in 0..tokens {
        let mut experts: Vec<i32> = (0..n as i32).collect();
        for slot in 0..config.top_k {
            experts.swap(slot, slot + rng.below(n - slot));
            ids.push(if rng.below(8) == 0 {
                DROPPED
            } else {
                experts[slot]
            });
        }
    }
    ids
}

fn configs(rng: &mut Rng, e: usize, k: usize, tokens: usize) -> Vec<(&'static str, RouterConfig)> {
    let k = k.min(e);
    let square = e.isqrt().pow(2);
    let divisors: Vec<usize> = (1..=e).filter(|d| e.is_multiple_of(*d)).collect();
    let n_group = divisors[rng.below(divisors.len())];
    // As many groups as K needs, or more.
    let least = k.div_ceil(e / n_group);
    let topk_group = least + rng.below(n_group - least + 1);
    let room = 1 + rng.below(tokens * k / e + 2);
    let scope = 1 + rng.below(tokens + 2);
    let with = |mut config: RouterConfig, change: &dyn Fn(&mut RouterConfig)| {
        change(&mut config);
        config
    };
    let capacity = |prioritized, before| Capacity {
        per_expert: room,
        scope_tokens: Some(scope),
        batch_prioritized: prioritized,
        normalize_before_drop: before,
    };
    vec![
        ("mixtral", RouterConfig::mixtral(e, k)),
        ("olmoe", RouterConfig::olmoe(e, k)),
        ("deepseek_v2", RouterConfig::deepseek_v2(e, k, 16.0)),
        (
            "deepseek_v2_grouped",
            RouterConfig::deepseek_v2_grouped(e, k, n_group, topk_group, 16.0),
        ),
        ("dbrx", RouterConfig::dbrx(e, k, 1.0)),
        ("dbrx p=2", RouterConfig::dbrx(e, k, 2.0)),
        ("dbrx p=3.5", RouterConfig::dbrx(e, k, 3.5)),
        ("gpt_oss", RouterConfig::gpt_oss(e, k)),
        (
            "deepseek_v3",
            RouterConfig::deepseek_v3(e, k, n_group, topk_group, 2.5),
        ),
        ("minimax_m2", RouterConfig::minimax_m2(e, k)),
        ("lfm2_moe", RouterConfig::lfm2_moe(e, k, 1.5)),
        ("laguna", RouterConfig::laguna(e, k, 5.0)),
        (
            "muse_spark",
            with(RouterConfig::lfm2_moe(e, k, 2.0), &|c| {
                c.logit_multiplier = 0.3
            }),
        ),
        ("cohere2_sigmoid", RouterConfig::cohere2_sigmoid(e, k)),
        ("kolibri1", RouterConfig::kolibri1(e, k)),
        ("llama4", RouterConfig::llama4(e, k)),
        ("ernie4_5", RouterConfig::ernie4_5(e, k)),
        (
            "longcat_flash",
            RouterConfig::longcat_flash(e, e.div_ceil(2), k, 6.0),
        ),
        ("zaya", RouterConfig::zaya(e, k)),
        (
            "mistral4",
            RouterConfig::mistral4(e, k, n_group, topk_group, 1.0),
        ),
        ("deepseek_v4", RouterConfig::deepseek_v4(e, k, 1.5)),
        (
            "deepseek_v4 given",
            with(RouterConfig::deepseek_v4(e, k, 1.5), &|c| {
                c.selection = Selection::Given
            }),
        ),
        (
            "gpt_oss given",
            with(RouterConfig::gpt_oss(e, k), &|c| {
                c.selection = Selection::Given
            }),
        ),
        ("inkling", RouterConfig::inkling(e, k, 2, 1.5)),
        ("phimoe", RouterConfig::phimoe(e.max(2), 0.01)),
        ("phimoe wide", RouterConfig::phimoe(e.max(2), 0.4)),
        ("switch", RouterConfig::switch(e, room, scope)),
        (
            "nllb",
            with(RouterConfig::nllb(e.max(2), room), &|c| {
                c.capacity = Some(capacity(false, false))
            }),
        ),
        (
            "nllb before",
            with(RouterConfig::nllb(e.max(2), room), &|c| {
                c.capacity = Some(capacity(false, true))
            }),
        ),
        (
            "nllb priority",
            with(RouterConfig::nllb(e.max(2), room), &|c| {
                c.capacity = Some(capacity(true, false))
            }),
        ),
        (
            "capacity of many",
            with(RouterConfig::mixtral(e, k), &|c| {
                c.capacity = Some(capacity(true, true))
            }),
        ),
        ("gemma4", RouterConfig::gemma4(e, k)),
        ("doge", RouterConfig::doge(square, k.min(square))),
        (
            "product keys",
            with(RouterConfig::doge(square, k.min(square)), &|c| {
                c.selection = Selection::ProductKeys { stacked: false };
            }),
        ),
        ("noisy_top_k", RouterConfig::noisy_top_k(e, k, 42)),
        ("expert_choice", RouterConfig::expert_choice(e, room)),
        ("dense", RouterConfig::dense(e)),
        (
            "identity",
            with(RouterConfig::new(e, k), &|c| c.score = Score::Identity),
        ),
    ]
}
