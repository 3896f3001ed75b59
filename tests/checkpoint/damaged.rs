//! Files that lie and damaged ones.

use super::*;

/// Bytes of a file with this header and `data` zeros.
fn lying(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

#[test]
fn lying_headers() {
    let dir = Dir::new("lying");
    let path = dir.file("model.safetensors");
    let says = |bytes: &[u8], words: &str| {
        std::fs::write(&path, bytes).expect("a file");
        refuses(&path, "--top-k 2", words);
    };
    says(b"", "too few");
    says(b"1234567", "too few");
    says(&[0xff; 64], "more than the format allows");
    says(&lying("{}", 0), "layer 1 has no experts");
    says(&50u64.to_le_bytes(), "truncated");
    says(&lying("[]", 0), "no safetensors JSON");
    says(&lying("{\"a\": ", 0), "no safetensors JSON");
    says(&lying(r#"{"a": 3}"#, 0), "tensor a: bad header entry");
    let entry = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"a": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}}}"#)
    };
    says(&lying(&entry("F32", "[2]", "[8, 0]"), 8), "run backwards");
    says(&lying(&entry("F32", "[2]", "[0, 8]"), 4), "truncated");
    says(
        &lying(&entry("F32", "[3]", "[0, 8]"), 8),
        "has 12 bytes, its offsets say 8",
    );
    says(
        &lying(&entry("F32", "[-1]", "[0, 8]"), 8),
        "bad header entry",
    );
    let huge = "[4294967296, 4294967296, 4]";
    says(
        &lying(&entry("F32", huge, "[0, 8]"), 8),
        "more than any memory",
    );
    says(
        &lying(&entry("BF16", "[9223372036854775807]", "[0, 8]"), 8),
        "more than any memory",
    );
    says(
        &lying(
            &entry("F32", "[2]", "[18446744073709551608, 18446744073709551615]"),
            8,
        ),
        "truncated",
    );
}

/// A file cut anywhere is refused; with any byte of its header changed it runs or is refused, and nothing panics.
#[test]
fn damaged_files() {
    let dir = Dir::new("damaged");
    let path = dir.file("model.safetensors");
    qwen3(Dtype::BF16).write(&path);
    let whole = std::fs::read(&path).expect("the file");
    let header = 8 + usize::from(u16::from_le_bytes([whole[0], whole[1]]));
    for cut in (0..whole.len()).step_by(whole.len() / 37) {
        std::fs::write(&path, &whole[..cut]).expect("a file");
        assert!(run(&path, "--top-k 2").is_err(), "cut at {cut}");
    }
    for at in (0..header).step_by(7) {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 7);
        std::fs::write(&path, &bytes).expect("a file");
        let _ = run(&path, "--top-k 2");
    }
}
