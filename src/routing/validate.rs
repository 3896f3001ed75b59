//! What a [`RouterConfig`] may say: one check for each field, in the order of the fields.

use super::config::*;
use crate::error::{Error, Result};

impl RouterConfig {
    /// Checks that every field means something, alone and with the others. [`Router::new`](super::Router::new) calls it.
    ///
    /// # Errors
    /// [`Error::Value`] that names the field: a zero or non-finite number where it has no meaning, K above the number of experts that
    /// can be selected, groups that do not divide the experts, a number of experts that is no square under product keys, and
    /// combinations that no model defines.
    pub fn validate(&self) -> Result<()> {
        self.check_sizes()?;
        self.check_logits()?;
        self.check_selection()?;
        self.check_weights()?;
        self.check_capacity()
    }

    fn check_sizes(&self) -> Result<()> {
        at_least_one("num_experts", self.num_experts)?;
        // Ids are i32, and i32::MAX itself stays free.
        let most = i32::MAX as usize - 1;
        for (field, total) in [
            ("num_experts", self.num_experts),
            ("null_experts", self.selectable()),
            (
                "joint_shared",
                self.selectable().saturating_add(self.joint_shared),
            ),
        ] {
            if total > most {
                return Err(Error::value(
                    field,
                    format!("at most {most} columns of logits"),
                    total,
                ));
            }
        }
        match self.selection {
            Selection::Dense | Selection::ExpertChoice { .. } => Ok(()), // top_k is ignored
            _ => {
                at_least_one("top_k", self.top_k)?;
                at_most(
                    "top_k",
                    self.top_k,
                    self.selectable(),
                    "E and the null experts",
                )
            }
        }
    }

    fn check_logits(&self) -> Result<()> {
        finite("logit_multiplier", self.logit_multiplier)?;
        not_negative("logit_softcap", self.logit_softcap)
    }

    fn check_selection(&self) -> Result<()> {
        let forbid = |field, present: bool, what: &str| {
            if present {
                let expected = format!("none together with {}", self.selection.name());
                Err(Error::value(field, expected, what))
            } else {
                Ok(())
            }
        };
        let nulls = self.null_experts.count() > 0;
        let joint = self.joint_shared > 0;
        match self.selection {
            Selection::TopK { groups, .. } => groups.map_or(Ok(()), |g| self.check_groups(g)),
            Selection::Given => Ok(()),
            Selection::SparseMixer { jitter_eps } => {
                not_negative("jitter_eps", jitter_eps)?;
                if self.top_k != 2 {
                    return Err(Error::value("top_k", "2, with SparseMixer", self.top_k));
                }
                forbid("joint_shared", joint, "joint shared experts")
            }
            Selection::ProductKeys { .. } => {
                if self.num_experts.isqrt().pow(2) != self.num_experts {
                    let expected = "a square, with ProductKeys";
                    return Err(Error::value("num_experts", expected, self.num_experts));
                }
                forbid("null_experts", nulls, "null experts")?;
                forbid("joint_shared", joint, "joint shared experts")
            }
            Selection::ExpertChoice { per_expert } => {
                at_least_one("per_expert", per_expert)?;
                forbid("null_experts", nulls, "null experts")?;
                forbid("joint_shared", joint, "joint shared experts")?;
                forbid("capacity", self.capacity.is_some(), "a capacity")
            }
            Selection::Dense => {
                forbid("null_experts", nulls, "null experts")?;
                forbid("capacity", self.capacity.is_some(), "a capacity")
            }
        }
    }

    fn check_groups(&self, groups: GroupLimit) -> Result<()> {
        let selectable = self.selectable();
        at_least_one("n_group", groups.n_group)?;
        if !selectable.is_multiple_of(groups.n_group) {
            let expected = format!("a divisor of the {selectable} experts that can be selected");
            return Err(Error::value("n_group", expected, groups.n_group));
        }
        at_least_one("topk_group", groups.topk_group)?;
        at_most("topk_group", groups.topk_group, groups.n_group, "n_group")?;
        let kept = selectable / groups.n_group * groups.topk_group;
        match groups.fill {
            MaskedFill::NegInf => at_most(
                "top_k",
                self.top_k,
                kept,
                "the experts of topk_group groups",
            ),
            MaskedFill::Zero => Ok(()),
        }
    }

    fn check_weights(&self) -> Result<()> {
        let joint = self.weights == WeightSource::JointWithShared;
        if joint != (self.joint_shared > 0) {
            let expected = "at least 1 with WeightSource::JointWithShared, and 0 without";
            return Err(Error::value("joint_shared", expected, self.joint_shared));
        }
        if joint && self.score != Score::Sigmoid {
            return Err(Error::value(
                "score",
                "Sigmoid, with JointWithShared",
                format!("{:?}", self.score),
            ));
        }
        if joint && self.renorm != Renorm::None {
            let found = format!("{:?}", self.renorm);
            return Err(Error::value(
                "renorm",
                "None, with JointWithShared, which normalises",
                found,
            ));
        }
        let scored_only = matches!(
            self.selection,
            Selection::SparseMixer { .. } | Selection::ExpertChoice { .. }
        );
        if scored_only && self.weights != WeightSource::Score {
            let expected = format!("Score, with {}", self.selection.name());
            return Err(Error::value(
                "weights",
                expected,
                format!("{:?}", self.weights),
            ));
        }
        match self.renorm {
            Renorm::None | Renorm::Sum => {}
            Renorm::SumPlusEps(eps) | Renorm::SumClampMin(eps) => not_negative("renorm", eps)?,
            Renorm::PNorm(p) if p > 0.0 && p.is_finite() => {}
            Renorm::PNorm(p) => return Err(Error::value("renorm", "a finite p above 0", p)),
        }
        finite("scale", self.scale)
    }

    fn check_capacity(&self) -> Result<()> {
        match self.capacity.and_then(|c| c.scope_tokens) {
            Some(tokens) => at_least_one("scope_tokens", tokens),
            None => Ok(()),
        }
    }
}

impl Selection {
    fn name(&self) -> &'static str {
        match self {
            Self::TopK { .. } => "TopK",
            Self::Given => "Given",
            Self::SparseMixer { .. } => "SparseMixer",
            Self::ProductKeys { .. } => "ProductKeys",
            Self::ExpertChoice { .. } => "ExpertChoice",
            Self::Dense => "Dense",
        }
    }
}

fn at_least_one(field: &'static str, n: usize) -> Result<()> {
    if n == 0 {
        Err(Error::value(field, "at least 1", n))
    } else {
        Ok(())
    }
}

fn at_most(field: &'static str, n: usize, most: usize, what: &str) -> Result<()> {
    if n > most {
        Err(Error::value(field, format!("at most {most} ({what})"), n))
    } else {
        Ok(())
    }
}

fn finite(field: &'static str, x: f32) -> Result<()> {
    if x.is_finite() {
        Ok(())
    } else {
        Err(Error::value(field, "a finite number", x))
    }
}

fn not_negative(field: &'static str, x: f32) -> Result<()> {
    if x.is_finite() && x >= 0.0 {
        Ok(())
    } else {
        Err(Error::value(field, "a finite number, 0 or more", x))
    }
}
