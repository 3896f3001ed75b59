//! A JSON object read field by field, so that what nobody read can be reported.

use super::file::{Refusal, Result, malformed};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::BTreeSet;

/// An object of the metadata and the fields that have been read from it. A field that is missing or null has its default.
pub struct Fields<'a> {
    path: String,
    object: Option<&'a Map<String, Value>>,
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Fields<'a> {
    /// The outermost object.
    pub fn new(object: &'a Map<String, Value>) -> Self {
        Self {
            path: String::new(),
            object: Some(object),
            read: RefCell::default(),
        }
    }

    /// The object in a field; one without fields if it is missing or null.
    pub fn object(&self, name: &str) -> Result<Fields<'a>> {
        let object = match self.get(name) {
            None => None,
            Some(Value::Object(object)) => Some(object),
            Some(other) => return self.wrong(name, "an object", other),
        };
        Ok(Fields {
            path: format!("{}{name}.", self.path),
            object,
            read: RefCell::default(),
        })
    }

    /// Whether the object itself was missing or null.
    pub fn is_absent(&self) -> bool {
        self.object.is_none()
    }

    /// The value of a field, unless it is missing or null.
    pub fn get(&self, name: &str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(name.to_string());
        self.object?.get(name).filter(|v| !v.is_null())
    }

    /// A number; `"NaN"` and `"Infinity"` count.
    pub fn number(&self, name: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let number = match value {
            Value::String(text) => text.parse().ok(),
            other => other.as_f64(),
        };
        match number {
            Some(number) => Ok(Some(number)),
            None => self.wrong(name, "a number", value),
        }
    }

    /// A number in f32, or `default`.
    pub fn f32_or(&self, name: &str, default: f32) -> Result<f32> {
        Ok(self.number(name)?.map_or(default, |v| v as f32))
    }

    /// A number that must be there, in f32.
    pub fn f32(&self, name: &str) -> Result<f32> {
        match self.number(name)? {
            Some(number) => Ok(number as f32),
            None => malformed(format!("field {}{name} is missing", self.path)),
        }
    }

    /// A whole number of at least 0.
    pub fn size(&self, name: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let whole = value.as_u64().or_else(|| {
            let v = value.as_f64()?;
            (v >= 0.0 && v < 2f64.powi(53) && v.fract() == 0.0).then_some(v as u64)
        });
        match whole.and_then(|v| usize::try_from(v).ok()) {
            Some(size) => Ok(Some(size)),
            None => self.wrong(name, "a whole number of at least 0", value),
        }
    }

    /// A flag: false if missing. Other kinds of values count as Python counts them.
    pub fn flag(&self, name: &str) -> bool {
        match self.get(name) {
            None => false,
            Some(Value::Bool(v)) => *v,
            Some(Value::Number(v)) => v.as_f64() != Some(0.0),
            Some(Value::String(v)) => !v.is_empty() && v != "none",
            Some(_) => true,
        }
    }

    /// A word, or `default`.
    pub fn word(&self, name: &str, default: &'static str) -> Result<&'a str> {
        match self.get(name) {
            None => Ok(default),
            Some(Value::String(v)) => Ok(v),
            Some(other) => self.wrong(name, "a word", other),
        }
    }

    /// What a field's word stands for.
    pub fn choice<T: Copy>(
        &self,
        name: &str,
        default: &'static str,
        meanings: &[(&str, T)],
    ) -> Result<T> {
        let word = self.word(name, default)?;
        match meanings.iter().find(|(known, _)| *known == word) {
            Some((_, meaning)) => Ok(*meaning),
            None => Err(self.unknown_value(name, word)),
        }
    }

    /// The refusal of a value that this program does not know.
    pub fn unknown_value(&self, name: &str, value: &str) -> Refusal {
        Refusal::NotExpressible(format!("field {}{name} has value {value:?}", self.path))
    }

    /// Adds to `notes` each field that nobody has read.
    pub fn report_unread(&self, notes: &mut Vec<String>) {
        let read = self.read.borrow();
        let unread = self
            .object
            .into_iter()
            .flatten()
            .filter(|(name, _)| !read.contains(*name));
        notes.extend(unread.map(|(name, value)| {
            let text: String = value.to_string().chars().take(80).collect();
            format!("unknown field {}{name} = {text}", self.path)
        }));
    }

    fn wrong<T>(&self, name: &str, expected: &str, found: &Value) -> Result<T> {
        let path = &self.path;
        malformed(format!(
            "field {path}{name}: expected {expected}, got {found}"
        ))
    }
}
