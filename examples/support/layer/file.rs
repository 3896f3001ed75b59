//! Safetensors files: the header is read and checked whole, tensors one slice at a time. A checkpoint of hundreds of gigabytes costs no more
//! memory than the expert in hand.

use super::tensor::Values;
use super::{Result, fail};
use moe_kernels::DType;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// The format's own limit on a header.
const MAX_HEADER: u64 = 100_000_000;

/// A tensor as the header describes it; its bytes are known to be in the file and to be as many as its shape and dtype say.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    pub shape: Vec<usize>,
    /// The name in the file; [`TensorInfo::dtype`] is `None` for those that are no weights here.
    pub dtype_name: String,
    pub dtype: Option<DType>,
    file: usize,
    /// First byte in the file.
    start: u64,
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The tensors of one file, or of all files of an index.
#[derive(Debug)]
pub struct Tensors {
    files: Vec<(PathBuf, File)>,
    tensors: BTreeMap<String, TensorInfo>,
}

impl Tensors {
    /// Opens a `.safetensors` file, or the `.json` index of several that lie beside it.
    pub fn open(path: &Path) -> Result<Self> {
        let mut all = Self {
            files: Vec::new(),
            tensors: BTreeMap::new(),
        };
        if path.extension().is_none_or(|e| e != "json") {
            all.add(path)?;
            return Ok(all);
        }
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(why) => return fail(format!("{}: cannot be read: {why}", path.display())),
        };
        let index: Index = match serde_json::from_slice(&text) {
            Ok(index) => index,
            Err(why) => return fail(format!("{}: no safetensors index: {why}", path.display())),
        };
        let mut names: Vec<&String> = index.weight_map.values().collect();
        names.sort();
        names.dedup();
        for name in names {
            // A shard lies beside its index; anything else in a downloaded file is not to be followed.
            if Path::new(name).components().count() != 1 || name.contains("..") {
                return fail(format!("{}: {name:?} is no file beside it", path.display()));
            }
            all.add(&path.with_file_name(name))?;
        }
        Ok(all)
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let place = path.display();
        let mut file = match File::open(path) {
            Ok(file) => file,
            Err(why) => return fail(format!("{place}: cannot be opened: {why}")),
        };
        let header = match read_header(&mut file) {
            Ok(header) => header,
            Err(why) => return fail(format!("{place}: {why}")),
        };
        for (name, mut tensor) in header {
            tensor.file = self.files.len();
            if self.tensors.insert(name.clone(), tensor).is_some() {
                return fail(format!("{place}: tensor {name} is in another file too"));
            }
        }
        self.files.push((path.to_path_buf(), file));
        Ok(())
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// The whole tensor.
    pub fn read(&mut self, name: &str) -> Result<Values> {
        self.read_part(name, 0, 1)
    }

    /// Part `part` of `parts` equal ones along the first dimension.
    pub fn read_part(&mut self, name: &str, part: usize, parts: usize) -> Result<Values> {
        let Some(info) = self.tensors.get(name) else {
            return fail(format!("missing tensor {name}"));
        };
        let Some(dtype) = info.dtype else {
            return fail(format!(
                "tensor {name}: expected F32, F16 or BF16, got {}",
                info.dtype_name
            ));
        };
        // No overflow: the header's check has multiplied the same numbers.
        let elements = info.shape.iter().product::<usize>() / parts.max(1);
        let bytes = elements * dtype.size();
        let start = info.start + (part * bytes) as u64;
        let (path, file) = &mut self.files[info.file];
        let mut buffer = vec![0u8; bytes];
        let read = file
            .seek(SeekFrom::Start(start))
            .and_then(|_| file.read_exact(&mut buffer));
        match read {
            Ok(()) => Ok(Values::from_bytes(dtype, &buffer)),
            Err(why) => fail(format!(
                "{}: tensor {name} cannot be read: {why}",
                path.display()
            )),
        }
    }
}

/// Reads the header and proves each of its claims that memory safety or an answer depends on.
fn read_header(file: &mut File) -> std::result::Result<BTreeMap<String, TensorInfo>, String> {
    let size = file
        .metadata()
        .map_err(|why| format!("cannot be read: {why}"))?
        .len();
    let mut length = [0u8; 8];
    if size < 8 {
        return Err(format!("{size} bytes are too few for a safetensors file"));
    }
    file.read_exact(&mut length)
        .map_err(|why| format!("cannot be read: {why}"))?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER {
        return Err(format!(
            "the header claims {length} bytes, more than the format allows: not a safetensors file?"
        ));
    }
    if length > size - 8 {
        return Err(format!(
            "the header claims {length} bytes, but the file has {size}: truncated?"
        ));
    }
    let mut text = vec![0u8; length as usize];
    file.read_exact(&mut text)
        .map_err(|why| format!("cannot be read: {why}"))?;
    let header: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&text)
        .map_err(|why| format!("the header is no safetensors JSON: {why}"))?;
    let data = 8 + length;
    let mut tensors = BTreeMap::new();
    for (name, value) in header {
        if name == "__metadata__" {
            continue;
        }
        let entry: Entry = serde_json::from_value(value)
            .map_err(|why| format!("tensor {name}: bad header entry: {why}"))?;
        let info =
            check_entry(entry, data, size - data).map_err(|why| format!("tensor {name}: {why}"))?;
        tensors.insert(name, info);
    }
    Ok(tensors)
}

fn check_entry(entry: Entry, data: u64, data_len: u64) -> std::result::Result<TensorInfo, String> {
    let [begin, end] = entry.data_offsets;
    if begin > end {
        return Err(format!("its offsets {begin}..{end} run backwards"));
    }
    if end > data_len {
        return Err(format!(
            "its bytes end at {end}, but the file holds {data_len}: truncated?"
        ));
    }
    let (dtype, bits) = match entry.dtype.as_str() {
        "F32" => (Some(DType::F32), 32),
        "F16" => (Some(DType::F16), 16),
        "BF16" => (Some(DType::BF16), 16),
        "F64" | "I64" | "U64" => (None, 64),
        "I32" | "U32" => (None, 32),
        "I16" | "U16" => (None, 16),
        "I8" | "U8" | "BOOL" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" => (None, 8),
        _ => (None, 0), // a format made later: nothing is known of its size, and it is not read
    };
    let too_large = || {
        format!(
            "the sizes of its shape {:?} multiply to more than any memory",
            entry.shape
        )
    };
    let elements = entry
        .shape
        .iter()
        .try_fold(1u64, |n, &d| n.checked_mul(d))
        .ok_or_else(too_large)?;
    let bytes = elements.checked_mul(bits).ok_or_else(too_large)? / 8;
    if bits > 0 && bytes != end - begin {
        return Err(format!(
            "{} of shape {:?} has {bytes} bytes, its offsets say {}",
            entry.dtype,
            entry.shape,
            end - begin
        ));
    }
    let shape: std::result::Result<Vec<usize>, _> =
        entry.shape.iter().map(|&d| usize::try_from(d)).collect();
    Ok(TensorInfo {
        shape: shape.map_err(|_| too_large())?,
        dtype_name: entry.dtype,
        dtype,
        file: 0,
        start: data + begin,
    })
}
