//! The tensors of a case, taken one by one and checked as they are taken.

use super::file::{Refusal, Result, Tensor, Values, malformed};
use moe_kernels::DType;
use std::collections::BTreeMap;

/// The tensors that are still to be read, and what there is to say about them.
pub struct Tensors {
    left: BTreeMap<String, Tensor>,
    pub notes: Vec<String>,
}

impl Tensors {
    pub fn new(left: BTreeMap<String, Tensor>) -> Self {
        Self {
            left,
            notes: Vec::new(),
        }
    }

    pub fn note(&mut self, note: String) {
        self.notes.push(note);
    }

    /// Takes out what a case must give. Gradients are not compared yet, but known.
    pub fn take_expected(&mut self) -> BTreeMap<String, Tensor> {
        const NAMES: [&str; 8] = [
            "router_logits",
            "topk_ids",
            "topk_weights",
            "y",
            "y_f64",
            "y_routed",
            "value_f64",
            "dy",
        ];
        let all = std::mem::take(&mut self.left).into_iter();
        let (expected, left) =
            all.partition(|(name, _)| NAMES.contains(&name.as_str()) || name.starts_with("grad_"));
        self.left = left;
        expected
    }

    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.left.get(name)
    }

    pub fn take(&mut self, name: &str) -> Result<Tensor> {
        self.left
            .remove(name)
            .ok_or_else(|| Refusal::Malformed(format!("missing tensor {name}")))
    }

    /// A tensor that a computation gave, and not a weight: f32 or f64.
    pub fn expect_computed(&self, name: &str, tensor: &Tensor) -> Result<()> {
        match tensor.values {
            Values::F32(_) | Values::F64(_) => Ok(()),
            _ => tensor.wrong_type(name, "F32"),
        }
    }

    /// A matrix of weights in the format that it has in the file; f64 becomes f32.
    pub fn weight(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let mut tensor = self.take(name)?;
        if tensor.shape != shape {
            let found = &tensor.shape;
            return malformed(format!(
                "tensor {name}: expected shape {shape:?}, got {found:?}"
            ));
        }
        if dtype(&tensor).is_none() {
            tensor.values = Values::F32(tensor.f32s(name)?);
        }
        Ok(tensor)
    }

    /// A vector in f32; lone dimensions of 1 around it are allowed.
    pub fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        let tensor = self.take(name)?;
        if tensor.shape.iter().filter(|&&n| n != 1).count() > 1
            || tensor.shape.iter().product::<usize>() != len
        {
            let found = &tensor.shape;
            return malformed(format!(
                "tensor {name}: expected shape [{len}], got {found:?}"
            ));
        }
        tensor.f32s(name)
    }

    /// The factor of a norm. Some families store it less 1 ("centered"); where the name does not say, the mean does.
    pub fn norm_factor(&mut self, name: &str, kind: &str, len: usize) -> Result<Vec<f32>> {
        let mut w = self.vector(name, len)?;
        let says = |words: &[&str]| words.iter().any(|word| kind.contains(word));
        let mean = w.iter().sum::<f32>() / len.max(1) as f32;
        let centered = says(&["center", "plus", "1p", "offset"]) || mean < 0.5;
        if centered {
            w.iter_mut().for_each(|w| *w += 1.0);
        }
        if !says(&["center", "plus", "1p", "offset"]) {
            let what = if centered { "1 + w" } else { "w" };
            self.note(format!(
                "tensor {name}: norm {kind:?} read with factor {what}"
            ));
        }
        Ok(w)
    }

    /// Which tokens count.
    pub fn mask(&mut self, name: &str, tokens: usize) -> Result<Vec<f32>> {
        let tensor = self.take(name)?;
        let values: Vec<f64> = match &tensor.values {
            Values::Integers(v) => v.iter().map(|&v| v as f64).collect(),
            _ => tensor.f64s(name)?,
        };
        if values.len() != tokens {
            let found = &tensor.shape;
            return malformed(format!(
                "tensor {name}: expected {tokens} elements, got {found:?}"
            ));
        }
        if let Some(bad) = values.iter().find(|v| **v != 0.0 && **v != 1.0) {
            return malformed(format!("tensor {name}: expected 0 or 1, got {bad}"));
        }
        Ok(values.into_iter().map(|v| v as f32).collect())
    }

    pub fn into_notes(mut self) -> Vec<String> {
        let left = self.left.iter();
        self.notes
            .extend(left.map(|(name, t)| format!("unknown tensor {name} {:?}", t.shape)));
        self.notes
    }
}

/// The format of a weight tensor.
pub fn dtype(tensor: &Tensor) -> Option<DType> {
    match tensor.values {
        Values::F32(_) => Some(DType::F32),
        Values::F16(_) => Some(DType::F16),
        Values::BF16(_) => Some(DType::BF16),
        _ => None,
    }
}

/// The format that holds each of these tensors: theirs if they share one, else f32.
pub fn common_dtype<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> DType {
    let mut all = tensors.into_iter().map(|t| dtype(t).unwrap_or(DType::F32));
    let first = all.next().unwrap_or(DType::F32);
    if all.all(|other| other == first) {
        first
    } else {
        DType::F32
    }
}
