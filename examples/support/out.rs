//! Writes results as safetensors files, whole or not at all.

use safetensors::{Dtype, View};
use std::borrow::Cow;
use std::collections::HashMap;
use std::io;
use std::path::Path;

/// The elements of an output tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Elements {
    F32(Vec<f32>),
    F64(Vec<f64>),
    I32(Vec<i32>),
}

/// A named output tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    pub name: &'static str,
    pub shape: Vec<usize>,
    pub elements: Elements,
}

impl Output {
    pub fn f32(name: &'static str, shape: &[usize], v: Vec<f32>) -> Self {
        let elements = Elements::F32(v);
        Self {
            name,
            shape: shape.to_vec(),
            elements,
        }
    }

    pub fn f64(name: &'static str, shape: &[usize], v: Vec<f64>) -> Self {
        let elements = Elements::F64(v);
        Self {
            name,
            shape: shape.to_vec(),
            elements,
        }
    }

    pub fn i32(name: &'static str, shape: &[usize], v: Vec<i32>) -> Self {
        let elements = Elements::I32(v);
        Self {
            name,
            shape: shape.to_vec(),
            elements,
        }
    }

    /// The elements as the file has them.
    fn bytes(&self) -> Vec<u8> {
        match &self.elements {
            Elements::F32(v) => v.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Elements::F64(v) => v.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Elements::I32(v) => v.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }
}

impl View for &Output {
    fn dtype(&self) -> Dtype {
        match self.elements {
            Elements::F32(_) => Dtype::F32,
            Elements::F64(_) => Dtype::F64,
            Elements::I32(_) => Dtype::I32,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.bytes().into()
    }

    fn data_len(&self) -> usize {
        match &self.elements {
            Elements::F32(v) => v.len() * 4,
            Elements::F64(v) => v.len() * 8,
            Elements::I32(v) => v.len() * 4,
        }
    }
}

/// Writes `folder/<id>.safetensors`, by way of a temporary name so that no half of a file is ever seen under the right one. The same
/// outputs give the same bytes, so that runs can be compared file by file.
pub fn write(folder: &Path, id: &str, outputs: &[Output]) -> io::Result<()> {
    let info = HashMap::from([("id".to_string(), id.to_string())]);
    let tensors = outputs.iter().map(|o| (o.name, o));
    let bytes = safetensors::serialize(tensors, Some(info)).map_err(io::Error::other)?;
    let partial = folder.join(format!(".{id}.partial"));
    std::fs::write(&partial, bytes)?;
    std::fs::rename(&partial, folder.join(format!("{id}.safetensors")))
}
