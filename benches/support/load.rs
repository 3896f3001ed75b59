//! Logits that give the experts a known load.
//!
//! A token's logits are `ln p[e] + g` with independent Gumbel noise g. The K largest of them are K experts drawn one after the other, each with
//! probability proportional to p among those that are left: so p is the load, apart from the fact that nobody is drawn twice.

use super::layer::seeded::{Generator, Stream};
use std::fmt;
use std::str::FromStr;

/// How tokens spread over experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// Every expert is as likely.
    Uniform,
    /// The r-th most popular expert is 1/r as likely as the first. Which one that is, the seed says.
    Zipf,
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Uniform => "uniform",
            Self::Zipf => "zipf",
        })
    }
}

impl FromStr for Load {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        [Self::Uniform, Self::Zipf]
            .into_iter()
            .find(|load| load.to_string() == name)
            .ok_or_else(|| "expected uniform or zipf".into())
    }
}

impl Load {
    /// Logits `[tokens, experts]` of the tokens from the `first`-th on.
    pub fn logits(self, seed: u64, first: usize, tokens: usize, experts: usize) -> Vec<f32> {
        let noise = Generator::new(seed, Stream::Logits);
        let log_p = self.log_probabilities(seed, experts);
        (0..tokens * experts)
            .map(|i| {
                // Uniform in 0..1, both ends excluded.
                let u = f64::from(noise.at(first * experts + i)) / 2.0 + 0.5;
                let u = u.clamp(1e-9, 1.0 - 1e-9);
                (log_p[i % experts] - (-u.ln()).ln()) as f32
            })
            .collect()
    }

    fn log_probabilities(self, seed: u64, experts: usize) -> Vec<f64> {
        let mut by_popularity: Vec<usize> = (0..experts).collect();
        let order = Generator::new(seed, Stream::Popularity);
        by_popularity.sort_by(|&a, &b| order.at(a).total_cmp(&order.at(b)));
        let mut log_p = vec![0.0; experts];
        if self == Self::Zipf {
            for (rank, &expert) in by_popularity.iter().enumerate() {
                log_p[expert] = -((rank + 1) as f64).ln();
            }
        }
        log_p
    }
}
