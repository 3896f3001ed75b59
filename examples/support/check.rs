//! Compares what a case gave with what it must give.

use super::case::{Case, Task};
use super::file::{Result, Tensor, malformed};
use super::out::{Elements, Output};
use std::collections::HashSet;
use std::fmt;

/// How far each output is from what was expected.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    /// Name and max|d| / max|expected|.
    pub errors: Vec<(&'static str, f64)>,
    /// What is wrong, if anything is.
    pub wrong: Vec<String>,
}

impl Verdict {
    pub fn passed(&self) -> bool {
        self.wrong.is_empty()
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, error) in &self.errors {
            write!(f, " {name} {error:.1e}")?;
        }
        for wrong in &self.wrong {
            write!(f, "; WRONG {wrong}")?;
        }
        Ok(())
    }
}

/// Compares ids exactly and numbers within `rtol`, in all rows but the open ones. There ids must be in range and distinct.
pub fn check(case: &Case, outputs: &[Output], rtol: f64) -> Result<Verdict> {
    let mut verdict = Verdict::default();
    let open: HashSet<usize> = case.open_rows.iter().copied().collect();
    for output in outputs {
        // The most precise of what the file has.
        let names: &[&str] = match output.name {
            "y" => &["y_f64", "y"],
            "value" | "value_f64" => &["value_f64"],
            _ => &[output.name],
        };
        let Some((name, expected)) = names
            .iter()
            .find_map(|name| Some((*name, case.expected.get(*name)?)))
        else {
            continue;
        };
        if expected.shape != output.shape {
            let (e, o) = (&expected.shape, &output.shape);
            return malformed(format!("tensor {name}: expected shape {o:?}, got {e:?}"));
        }
        let width = output.shape[1..].iter().product::<usize>().max(1);
        let found: Vec<f64> = match &output.elements {
            Elements::F32(v) => v.iter().map(|&v| v.into()).collect(),
            Elements::F64(v) => v.clone(),
            Elements::I32(ids) => {
                verdict
                    .wrong
                    .extend(compare_ids(case, name, expected, ids, width, &open)?);
                continue;
            }
        };
        let error = relative_error(&found, &expected.f64s(name)?, width, &open);
        verdict.errors.push((output.name, error));
        if error > rtol {
            verdict
                .wrong
                .push(format!("{} beyond {rtol:.1e}", output.name));
        }
    }
    Ok(verdict)
}

/// The first row of ids that is wrong.
fn compare_ids(
    case: &Case,
    name: &str,
    expected: &Tensor,
    found: &[i32],
    width: usize,
    open: &HashSet<usize>,
) -> Result<Option<String>> {
    let selectable = match &case.task {
        Task::Layer(layer) => layer.gate.config.selectable(),
        Task::Loss(_) => 0,
    };
    let expected = expected.ids(name)?;
    let rows = found.chunks(width).zip(expected.chunks(width)).enumerate();
    for (row, (found, expected)) in rows {
        let distinct: HashSet<i32> = found.iter().copied().collect();
        let sound = distinct.len() == width
            && found
                .iter()
                .all(|&id| usize::try_from(id).is_ok_and(|id| id < selectable));
        if open.contains(&row) {
            if !sound {
                return Ok(Some(format!("ids {found:?} of open row {row}")));
            }
        } else if found != expected {
            return Ok(Some(format!(
                "ids {found:?} of row {row}, expected {expected:?}"
            )));
        }
    }
    Ok(None)
}

/// max|d| / max|expected| over rows that are not open; infinite where one side is finite and the other is not, or two infinities differ.
fn relative_error(found: &[f64], expected: &[f64], width: usize, open: &HashSet<usize>) -> f64 {
    let (mut worst, mut size) = (0.0f64, 0.0f64);
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        if open.contains(&(i / width)) {
            continue;
        }
        if !(found.is_finite() && expected.is_finite()) {
            let same = found == expected || (found.is_nan() && expected.is_nan());
            if !same {
                return f64::INFINITY;
            }
            continue;
        }
        worst = worst.max((found - expected).abs());
        size = size.max(expected.abs());
    }
    if worst == 0.0 { 0.0 } else { worst / size }
}
