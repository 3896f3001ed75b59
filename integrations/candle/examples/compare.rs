//! Candle's sparse-MoE blocks beside ours, on the same tensors in one process: do they agree, and how long does each take?
//!
//! ```sh
//! cargo run --release --example compare                  # all of it: 7 GB, minutes
//! cargo run --release --example compare -- --tiny        # seconds
//! cargo run --release --example compare -- --model qwen3 --dtype bf16 --tokens 1,64 --seconds 5
//! ```
//!
//! Theirs is the code of candle-transformers itself, in a model of one layer (`support/mod.rs` says how). A model's time minus that of its rest is the block's. Ours is
//! `MoeLayer::forward`, packed by the functions that a user calls. Calls go turn about: theirs, its rest, ours, theirs, …; medians are printed.
//!
//! Candle's mixtral block multiplies by weights in f32 whatever the model's format, which candle refuses for bf16; there the same experts run in candle's qwen3_moe block, which computes
//! the same and converts them.

mod support;

use candle_core::{DType, Result, Tensor, bail};
use moe_kernels_candle::MoeLayer;
use std::time::{Duration, Instant};
use support::check::{Routing, compare, expert_bound, weight_bound};
use support::model::{Around, Theirs, ids, ours};
use support::weights::{Source, block_prefix};
use support::{Family, Sizes};

/// What to run.
struct Options {
    tiny: bool,
    families: Vec<Family>,
    dtypes: Vec<DType>,
    tokens: Vec<usize>,
    /// Budget of one line.
    seconds: f64,
}

impl Options {
    fn from_args() -> Result<Self> {
        let mut options = Self {
            tiny: false,
            families: vec![Family::Qwen3, Family::Mixtral],
            dtypes: vec![DType::F32, DType::BF16],
            tokens: vec![1, 8, 64, 512],
            seconds: 4.0,
        };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            if arg == "--tiny" {
                options.tiny = true;
                options.seconds = 0.05;
                continue;
            }
            let Some(value) = args.next() else {
                bail!("{arg} needs a value");
            };
            match (arg.as_str(), value.as_str()) {
                ("--model", "qwen3") => options.families = vec![Family::Qwen3],
                ("--model", "mixtral") => options.families = vec![Family::Mixtral],
                ("--dtype", "f32") => options.dtypes = vec![DType::F32],
                ("--dtype", "bf16") => options.dtypes = vec![DType::BF16],
                ("--tokens", list) => {
                    let tokens = list
                        .split(',')
                        .map(str::parse)
                        .collect::<std::result::Result<_, _>>();
                    options.tokens = tokens.map_err(candle_core::Error::wrap)?;
                }
                ("--seconds", value) => {
                    options.seconds = value.parse().map_err(candle_core::Error::wrap)?
                }
                _ => bail!("unknown option {arg} {value}"),
            }
        }
        Ok(options)
    }

    fn sizes(&self, family: Family) -> Sizes {
        let vocab = self.tokens.iter().copied().max().unwrap_or(1).max(64);
        let sizes = |experts, top_k, hidden, intermediate| Sizes {
            experts,
            top_k,
            hidden,
            intermediate,
            shared: 0,
            vocab,
        };
        match (family, self.tiny) {
            (Family::Mixtral, false) => sizes(8, 2, 2048, 7168),
            (Family::Mixtral, true) => sizes(8, 2, 128, 192),
            (_, false) => sizes(128, 8, 2048, 768),
            (_, true) => sizes(16, 4, 128, 96),
        }
    }
}

fn title(family: Family) -> &'static str {
    match family {
        Family::Mixtral => "mixtral, a quarter of 8x7B's experts (half as wide both ways)",
        _ => "qwen3_moe, as in Qwen3-30B-A3B",
    }
}

/// One family in one format.
struct Pair {
    family: Family,
    dtype: DType,
    sizes: Sizes,
    theirs: Theirs,
    rest: Theirs,
    ours: MoeLayer,
    around: Around,
    gate: Tensor,
    /// The gate in f32, on inputs that are widened: our routing.
    gate_f32: Tensor,
}

impl Pair {
    fn new(family: Family, sizes: Sizes, dtype: DType) -> Result<Self> {
        let source = Source::new(family, sizes, dtype)?;
        let ours = ours(family, sizes, &source)?;
        let gate = source.tensor(&format!("{}.gate.weight", block_prefix(family)))?;
        let (their_family, their_source) = match (family, dtype) {
            (Family::Mixtral, DType::BF16) => (
                Family::Qwen3,
                source.renamed(Family::Mixtral, Family::Qwen3),
            ),
            _ => (family, source.clone()),
        };
        Ok(Self {
            family: their_family,
            dtype,
            sizes,
            theirs: Theirs::new(their_family, sizes, &their_source)?,
            rest: Theirs::rest(their_family, sizes, &their_source)?,
            ours,
            around: Around::new(sizes, &source)?,
            gate_f32: gate.to_dtype(DType::F32)?,
            gate,
        })
    }

    /// Both ways of routing: candle's given to ours, where every token must agree; and our own, for the tokens whose experts are the same.
    /// The largest relative differences, and the share of those tokens.
    fn check(&mut self, tokens: usize) -> Result<(f64, f64, f64)> {
        self.theirs.prepare();
        let theirs = self.theirs.forward(&ids(tokens)?)?;
        let theirs = self.around.features(&theirs)?;
        let x = self.around.input(tokens)?;
        let routing = Routing::of(&x, &self.gate, self.sizes.top_k, true)?;
        let bound = expert_bound(self.dtype, self.sizes);

        let k = self.sizes.top_k;
        let ids = routing.ids.reshape((tokens, 1, k))?;
        let weights = routing.weights.reshape((tokens, 1, k))?;
        let routed = self
            .around
            .output(&self.ours.forward_routed(&x, &ids, &weights)?)?;
        let experts = compare(&theirs, &routed, bound, |_| true)?;

        let exact = x
            .reshape((tokens, ()))?
            .to_dtype(DType::F32)?
            .matmul(&self.gate_f32.t()?)?;
        let agreed = routing.agrees(&exact, self.dtype, self.sizes.hidden)?;
        let bound = bound + weight_bound(self.dtype, self.sizes.hidden, routing.largest_logit()?);
        let layer = self.around.output(&self.ours.forward(&x)?)?;
        let layer = compare(&theirs, &layer, bound, |t| agreed[t])?;
        let share = agreed.iter().filter(|same| **same).count() as f64 / tokens as f64;
        Ok((experts, layer, share))
    }

    /// Medians of their model, its rest, and our layer.
    fn time(&mut self, tokens: usize, seconds: f64) -> Result<([Duration; 3], usize)> {
        let (ids, x) = (ids(tokens)?, self.around.input(tokens)?);
        let mut times: [Vec<Duration>; 3] = Default::default();
        let began = Instant::now();
        // The check has run all of them once.
        while times[0].len() < 3
            || (began.elapsed().as_secs_f64() < seconds && times[0].len() < 300)
        {
            self.theirs.prepare();
            self.rest.prepare();
            let mut measure =
                |which: usize, call: &mut dyn FnMut() -> Result<Tensor>| -> Result<()> {
                    let start = Instant::now();
                    let y = call()?;
                    times[which].push(start.elapsed());
                    drop(y);
                    Ok(())
                };
            measure(0, &mut || self.theirs.forward(&ids))?;
            measure(1, &mut || self.rest.forward(&ids))?;
            measure(2, &mut || self.ours.forward(&x))?;
        }
        let rounds = times[0].len();
        let median = times.map(|mut times| {
            times.sort();
            times[times.len() / 2]
        });
        Ok((median, rounds))
    }
}

fn main() -> Result<()> {
    let options = Options::from_args()?;
    println!(
        "{} threads; milliseconds, medians of calls turn about",
        rayon::current_num_threads()
    );
    for &family in &options.families {
        for &dtype in &options.dtypes {
            let sizes = options.sizes(family);
            let mut pair = Pair::new(family, sizes, dtype)?;
            let Sizes {
                experts: e,
                top_k: k,
                hidden: h,
                intermediate: i,
                ..
            } = sizes;
            println!(
                "\n{}: H {h}, I {i}, E {e}, K {k}, {}",
                title(family),
                dtype.as_str()
            );
            if pair.family != family {
                println!(
                    "(candle's mixtral block refuses {}; its qwen3_moe block runs the same experts)",
                    dtype.as_str()
                );
            }
            println!(
                "{:>5} {:>10} {:>9} {:>10} {:>10} {:>8} {:>7}   same routing; own routing on the share of tokens with the same experts",
                "T", "model", "rest", "theirs", "ours", "faster", "rounds"
            );
            for &tokens in &options.tokens {
                let (experts, layer, share) = pair.check(tokens)?;
                let (times, rounds) = pair.time(tokens, options.seconds)?;
                let [model, rest, ours] = times.map(|t| t.as_secs_f64() * 1e3);
                let theirs = model - rest;
                println!(
                    "{tokens:>5} {model:>10.3} {rest:>9.3} {theirs:>10.3} {ours:>10.3} {:>7.1}x {rounds:>7}   {experts:.1e}; {layer:.1e} on {:.1}%",
                    theirs / ours,
                    share * 100.0
                );
            }
        }
    }
    println!("\nAll of it agrees.");
    Ok(())
}
