//! A case file as a container: the JSON of `__metadata__["case"]` and the tensors, every byte of it checked.

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

/// Why a file gives no case.
#[derive(Clone, Debug, PartialEq)]
pub enum Refusal {
    /// The file contradicts itself or the format.
    Malformed(String),
    /// The file is sound but asks for something that this program does not know.
    NotExpressible(String),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(why) => write!(f, "malformed: {why}"),
            Self::NotExpressible(why) => write!(f, "not expressible: {why}"),
        }
    }
}

pub type Result<T> = std::result::Result<T, Refusal>;

/// [`Refusal::Malformed`] as a `Result`, from anything that prints.
pub fn malformed<T>(why: impl fmt::Display) -> Result<T> {
    Err(Refusal::Malformed(why.to_string()))
}

/// The elements of a tensor. Integers of either width are one kind, since ids come in both.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    F64(Vec<f64>),
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
    Integers(Vec<i64>),
}

impl Values {
    fn name(&self) -> &'static str {
        match self {
            Self::F64(_) => "F64",
            Self::F32(_) => "F32",
            Self::F16(_) => "F16",
            Self::BF16(_) => "BF16",
            Self::Integers(_) => "an integer type",
        }
    }
}

/// A tensor, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub values: Values,
}

impl Tensor {
    /// The elements in f64, which holds each of the number formats; integers are refused.
    pub fn f64s(&self, name: &str) -> Result<Vec<f64>> {
        Ok(match &self.values {
            Values::F64(v) => v.clone(),
            Values::F32(v) => v.iter().map(|&v| v.into()).collect(),
            Values::F16(v) => v.iter().map(|&v| v.into()).collect(),
            Values::BF16(v) => v.iter().map(|&v| v.into()).collect(),
            Values::Integers(_) => return self.wrong_type(name, "a floating-point type"),
        })
    }

    /// The elements in f32; f64 is rounded.
    pub fn f32s(&self, name: &str) -> Result<Vec<f32>> {
        Ok(match &self.values {
            Values::F32(v) => v.clone(),
            _ => self.f64s(name)?.into_iter().map(|v| v as f32).collect(),
        })
    }

    /// The elements as expert ids.
    pub fn ids(&self, name: &str) -> Result<Vec<i32>> {
        let Values::Integers(v) = &self.values else {
            return self.wrong_type(name, "I32 or I64");
        };
        v.iter()
            .map(|&id| match i32::try_from(id) {
                Ok(id) => Ok(id),
                Err(_) => malformed(format!("tensor {name}: {id} is no expert id")),
            })
            .collect()
    }

    /// The refusal of a tensor for its dtype.
    pub fn wrong_type<T>(&self, name: &str, expected: &str) -> Result<T> {
        let found = self.values.name();
        malformed(format!("tensor {name}: expected {expected}, got {found}"))
    }
}

/// Everything that a file holds.
#[derive(Clone, Debug)]
pub struct CaseFile {
    /// The case's metadata.
    pub meta: Map<String, Value>,
    /// The tensors, in name order.
    pub tensors: BTreeMap<String, Tensor>,
}

impl CaseFile {
    /// Reads a file from disk.
    pub fn read(path: &Path) -> Result<Self> {
        match std::fs::read(path) {
            Ok(bytes) => Self::parse(&bytes),
            Err(why) => malformed(format!("cannot be read: {why}")),
        }
    }

    /// Reads a file from memory.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let (file, info) = match (
            SafeTensors::deserialize(bytes),
            SafeTensors::read_metadata(bytes),
        ) {
            (Ok(file), Ok((_, info))) => (file, info),
            (Err(why), _) | (_, Err(why)) => return malformed(explain(&why, bytes.len())),
        };
        let Some(text) = info.metadata().as_ref().and_then(|m| m.get("case")) else {
            return malformed("the header has no __metadata__.case");
        };
        let meta = match parse_json(text) {
            Ok(Value::Object(meta)) => meta,
            Ok(_) => return malformed("__metadata__.case is no JSON object"),
            Err(why) => return malformed(format!("__metadata__.case is no JSON: {why}")),
        };
        let mut tensors = BTreeMap::new();
        for (name, view) in file.iter() {
            let values = values(name, view.dtype(), view.data())?;
            let shape = view.shape().to_vec();
            tensors.insert(name.to_string(), Tensor { shape, values });
        }
        Ok(Self { meta, tensors })
    }
}

fn values(name: &str, dtype: Dtype, data: &[u8]) -> Result<Values> {
    fn each<const N: usize, T>(data: &[u8], f: impl Fn([u8; N]) -> T) -> Vec<T> {
        data.as_chunks().0.iter().map(|b| f(*b)).collect()
    }
    Ok(match dtype {
        Dtype::F64 => Values::F64(each(data, f64::from_le_bytes)),
        Dtype::F32 => Values::F32(each(data, f32::from_le_bytes)),
        Dtype::F16 => Values::F16(each(data, f16::from_le_bytes)),
        Dtype::BF16 => Values::BF16(each(data, bf16::from_le_bytes)),
        Dtype::I32 => Values::Integers(each(data, |b| i32::from_le_bytes(b).into())),
        Dtype::I64 => Values::Integers(each(data, i64::from_le_bytes)),
        other => {
            return malformed(format!("tensor {name}: the format has no dtype {other:?}"));
        }
    })
}

/// Which promise of the header does not hold.
fn explain(why: &SafeTensorError, len: usize) -> String {
    match why {
        SafeTensorError::HeaderTooSmall => {
            format!("{len} bytes are too few for a safetensors file")
        }
        SafeTensorError::HeaderTooLarge => "the header claims to be over 100 MB".into(),
        SafeTensorError::InvalidHeaderLength => {
            format!("the header claims to be longer than the file ({len} bytes)")
        }
        SafeTensorError::InvalidHeader(why) => format!("the header is no UTF-8: {why}"),
        SafeTensorError::InvalidHeaderStart => "the header does not begin with '{'".into(),
        SafeTensorError::InvalidHeaderDeserialization(why) => {
            format!("the header is no safetensors JSON: {why}")
        }
        SafeTensorError::InvalidOffset(name) => {
            format!("tensor {name}: its offsets overlap, leave a gap or run backwards")
        }
        SafeTensorError::TensorInvalidInfo => {
            "a tensor's shape and dtype contradict its offsets".into()
        }
        SafeTensorError::MetadataIncompleteBuffer => format!(
            "the tensors of the header do not add up to the file ({len} bytes): truncated, or something follows"
        ),
        SafeTensorError::ValidationOverflow => "a tensor's size does not fit 64 bits".into(),
        other => format!("{other}"),
    }
}

/// JSON as Python writes it: a number that is not finite stands there bare. It becomes a string.
fn parse_json(text: &str) -> serde_json::Result<Value> {
    serde_json::from_str(text).or_else(|why| {
        let mut quoted = String::with_capacity(text.len() + 16);
        let (mut rest, mut inside, mut escaped) = (text, false, false);
        while let Some(c) = rest.chars().next() {
            let word = ["-Infinity", "Infinity", "NaN"]
                .into_iter()
                .find(|w| !inside && rest.starts_with(w));
            if let Some(word) = word {
                quoted.extend(["\"", word, "\""]);
                rest = &rest[word.len()..];
                continue;
            }
            if c == '"' && !escaped {
                inside = !inside;
            }
            escaped = inside && c == '\\' && !escaped;
            quoted.push(c);
            rest = &rest[c.len_utf8()..];
        }
        serde_json::from_str(&quoted).map_err(|_| why)
    })
}
