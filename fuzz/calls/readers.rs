//! The examples' readers on files of any bytes: an answer or a refusal in words, no panic, and no memory for what a header only claims.
//!
//! The first byte chooses the reader; if its high bit is set, the next two are the length of a header that is put before the rest as the format wants it, so that a
//! fuzzer that changes JSON need not keep the length right.

use super::{layer, support};
use clap::Parser;
use std::io::Write;

pub fn run(data: &[u8]) {
    let Some((&mode, data)) = data.split_first() else {
        return;
    };
    let file = match mode & 0x80 {
        0 => data.to_vec(),
        _ => with_header(data),
    };
    match mode & 1 {
        0 => case(&file),
        _ => checkpoint(&file),
    }
}

fn with_header(data: &[u8]) -> Vec<u8> {
    let (length, rest) = data.split_at(data.len().min(2));
    let length = length
        .iter()
        .rev()
        .fold(0u64, |n, &b| n << 8 | u64::from(b));
    let mut file = length.min(rest.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(rest);
    file
}

/// A case file, understood as far as it can be.
fn case(bytes: &[u8]) {
    if let Ok(file) = support::file::CaseFile::parse(bytes) {
        match support::case::Case::from_file(file, "fuzz") {
            Ok(case) => drop(format!("{case:?}")),
            Err(why) => assert!(!why.to_string().is_empty()),
        }
    }
}

/// A checkpoint: every tensor of its header is read, then the layer is looked for.
fn checkpoint(bytes: &[u8]) {
    let path = std::env::temp_dir().join(format!(
        "moe-kernels-fuzz-{}.safetensors",
        std::process::id()
    ));
    let mut file = std::fs::File::create(&path).expect("a temporary file");
    file.write_all(bytes).expect("a temporary file");
    drop(file);
    match layer::file::Tensors::open(&path) {
        Ok(mut tensors) => {
            let names: Vec<String> = tensors.names().map(String::from).collect();
            for name in names {
                if let Err(why) = tensors.read(&name) {
                    assert!(!why.to_string().is_empty());
                }
            }
        }
        Err(why) => assert!(!why.to_string().is_empty()),
    }
    let path = path.to_str().expect("UTF-8");
    let options = ["layer", "--weights", path, "--layer", "1", "--top-k", "2"];
    let options = layer::Options::try_parse_from(options).expect("options");
    let opened = layer::checkpoint::Checkpoint::open(std::path::Path::new(path), &options);
    if let Ok(mut checkpoint) = opened {
        use layer::source::Source;
        let _ = checkpoint.expert(0);
    }
}
