//! How the load is spread over the experts: what users of MoE watch, because imbalance and collapse are how training goes wrong.
//!
//! Statistics, not a forward path: f64 and the standard library's ln.

use super::output::Routing;
use crate::error::{Error, Result, checked_mul};

/// How evenly a call was spread over the experts.
///
/// Counts cover all E experts, wherever they live, and leave out null experts and dropped pairs, which are counted apart.
///
/// ```
/// use moe_kernels::Cpu;
/// use moe_kernels::routing::{GivenRouting, LoadStats, Routing};
/// let mut routing = Routing::new();
/// routing.set_given(&Cpu::new(), &GivenRouting::new(4, 2, &[2, 0, 2, 3, -1, 2], &[0.5; 6]))?;
/// let load = LoadStats::of(&routing);
/// assert_eq!((load.counts(), load.dropped()), (&[1, 0, 3, 1][..], 1));
/// assert_eq!((load.fraction(2), load.max_over_mean()), (0.6, 2.4));
/// assert!(load.unused().eq([1]));
/// # Ok::<(), moe_kernels::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadStats {
    counts: Vec<u64>,
    tokens: u64,
    null: u64,
    dropped: u64,
}

impl LoadStats {
    /// The load of one call.
    pub fn of(routing: &Routing) -> Self {
        let mut stats = Self::default();
        stats.replace(routing);
        stats
    }

    /// Forgets what it held and counts this call. Allocates nothing once it has held as many experts.
    pub fn replace(&mut self, routing: &Routing) {
        self.counts.clear();
        self.counts.resize(routing.num_experts(), 0);
        (self.tokens, self.null, self.dropped) = (0, 0, 0);
        self.count(routing);
    }

    /// Counts this call too: micro-batches of a step, or layers of the same kind.
    ///
    /// # Errors
    /// [`Error::Value`] when its number of experts is another one; nothing is then counted.
    pub fn add(&mut self, routing: &Routing) -> Result<()> {
        same_experts(self.counts.len(), routing)?;
        self.count(routing);
        Ok(())
    }

    fn count(&mut self, routing: &Routing) {
        self.tokens += routing.tokens() as u64;
        for &id in routing.ids() {
            match usize::try_from(id) {
                Err(_) => self.dropped += 1,
                Ok(id) => *self.counts.get_mut(id).unwrap_or(&mut self.null) += 1,
            }
        }
    }

    /// `[E]`: pairs of each expert.
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// Tokens counted.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Pairs that experts with weights serve: the sum of the counts.
    pub fn served(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Pairs of null experts.
    pub fn null(&self) -> u64 {
        self.null
    }

    /// Pairs without an expert: dropped for lack of room, or slots that [`ExpertChoice`](super::Selection::ExpertChoice) left free.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// An expert's part of the served pairs; 0 where nothing is served, and for an expert that does not exist.
    pub fn fraction(&self, expert: usize) -> f64 {
        match self.counts.get(expert) {
            Some(&count) if count > 0 => count as f64 / self.served() as f64,
            _ => 0.0,
        }
    }

    /// `−Σ f·ln f` over the fractions f, in nats: ln E when balanced, 0 when one expert takes all.
    pub fn entropy(&self) -> f64 {
        let served = self.served() as f64;
        let terms = self.counts.iter().filter(|c| **c > 0).map(|&c| {
            let fraction = c as f64 / served;
            -fraction * fraction.ln()
        });
        terms.fold(0.0, |sum, term| sum + term)
    }

    /// Standard deviation of the counts over their mean: 0 when balanced, √(E − 1) when one expert takes all.
    pub fn coefficient_of_variation(&self) -> f64 {
        let mean = self.mean();
        if mean == 0.0 {
            return 0.0;
        }
        let squares: f64 = self.counts.iter().map(|&c| (c as f64 - mean).powi(2)).sum();
        (squares / self.counts.len() as f64).sqrt() / mean
    }

    /// Pairs of the busiest expert over the mean: 1 when balanced, E when one expert takes all, 0 when nothing is served. With one expert a
    /// device, what the slowest device takes longer.
    pub fn max_over_mean(&self) -> f64 {
        match self.counts.iter().max() {
            Some(&max) if max > 0 => max as f64 / self.mean(),
            _ => 0.0,
        }
    }

    /// Experts without a pair, ascending.
    pub fn unused(&self) -> impl Iterator<Item = usize> {
        (self.counts.iter().enumerate()).filter_map(|(e, &count)| (count == 0).then_some(e))
    }

    fn mean(&self) -> f64 {
        self.served() as f64 / self.counts.len().max(1) as f64
    }
}

/// Watches a window of calls for collapse: experts that get nothing any more, and so learn nothing any more.
///
/// ```
/// use moe_kernels::Cpu;
/// use moe_kernels::routing::{GivenRouting, LoadMonitor, Routing};
/// let mut routing = Routing::new();
/// let mut monitor = LoadMonitor::new(3, 2)?;
/// for ids in [[0, 1], [0, 0], [1, 0]] {
///     routing.set_given(&Cpu::new(), &GivenRouting::new(3, 1, &ids, &[1.0; 2]))?;
///     monitor.observe(&routing)?;
/// }
/// assert_eq!(monitor.counts(), [3, 1, 0]); // of the last two calls
/// assert!(monitor.collapsed().eq([2]));
/// # Ok::<(), moe_kernels::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadMonitor {
    /// `[window, E]`, used as a ring.
    calls: Vec<u64>,
    /// `[E]`: their sum.
    counts: Vec<u64>,
    window: usize,
    observed: u64,
}

impl LoadMonitor {
    /// Watches the last `window` calls of `num_experts` experts.
    ///
    /// Choose the window so that chance is no explanation: [`expected_idle`](Self::expected_idle) far below 1.
    ///
    /// # Errors
    /// [`Error::Value`] when one is 0, [`Error::Overflow`] when their product does not fit.
    pub fn new(num_experts: usize, window: usize) -> Result<Self> {
        for (argument, n) in [("num_experts", num_experts), ("window", window)] {
            if n == 0 {
                return Err(Error::value(argument, "at least 1", n));
            }
        }
        let cells = checked_mul(num_experts, window, "window·E")?;
        if cells > isize::MAX as usize / size_of::<u64>() {
            return Err(Error::Overflow { what: "window·E" });
        }
        Ok(Self {
            calls: vec![0; cells],
            counts: vec![0; num_experts],
            window,
            observed: 0,
        })
    }

    /// Counts a call and forgets the oldest of a full window. Allocates nothing.
    ///
    /// # Errors
    /// [`Error::Value`] when its number of experts is another one; nothing is then counted.
    pub fn observe(&mut self, routing: &Routing) -> Result<()> {
        let experts = self.counts.len();
        same_experts(experts, routing)?;
        let place = (self.observed % self.window as u64) as usize;
        let call = &mut self.calls[place * experts..][..experts];
        for (sum, old) in self.counts.iter_mut().zip(call.iter_mut()) {
            *sum -= core::mem::take(old);
        }
        for &id in routing.ids() {
            if let Some(count) = usize::try_from(id).ok().and_then(|e| call.get_mut(e)) {
                *count += 1;
            }
        }
        for (sum, new) in self.counts.iter_mut().zip(call.iter()) {
            *sum += new;
        }
        self.observed += 1;
        Ok(())
    }

    /// `[E]`: pairs of each expert in the window.
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// Whether the window has been filled.
    pub fn is_full(&self) -> bool {
        self.observed >= self.window as u64
    }

    /// The warning sign of collapse: experts that got nothing in a whole window, ascending; none before the window is full.
    pub fn collapsed(&self) -> impl Iterator<Item = usize> {
        let full = self.is_full();
        (self.counts.iter().enumerate())
            .filter_map(move |(e, &count)| (full && count == 0).then_some(e))
    }

    /// Experts that as many pairs, spread at random and evenly, would leave idle: `E·(1 − 1/E)^pairs`.
    pub fn expected_idle(&self) -> f64 {
        let experts = self.counts.len() as f64;
        experts * (1.0 - 1.0 / experts).powf(self.counts.iter().sum::<u64>() as f64)
    }
}

fn same_experts(expected: usize, routing: &Routing) -> Result<()> {
    if routing.num_experts() == expected {
        Ok(())
    } else {
        Err(Error::value(
            "routing",
            format!("{expected} experts"),
            routing.num_experts(),
        ))
    }
}
