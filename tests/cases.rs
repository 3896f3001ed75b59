//! Real layers: every file of `tests/data/cases` on every ISA, bit for bit and against what the families' own code gives; then files that lie.

mod common;
#[path = "../examples/support/mod.rs"]
mod support;

use common::{hash_bits, isas, with_threads};
use half::bf16;
use moe_kernels::{DType, Isa};
use safetensors::{Dtype, View};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use support::backend::{Stop, tolerance};
use support::case::Case;
use support::check::check;
use support::conformance::{Args, Backend, Counts, conformance};
use support::file::{CaseFile, Refusal};
use support::out::{Elements, Output};
use support::run::{Machine, run};
use support::{oracle, out};

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

/// Every committed case, in name order.
fn cases() -> Vec<Case> {
    let entries = std::fs::read_dir(data().join("cases")).unwrap();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let read = |path: &PathBuf| Case::read(path).unwrap_or_else(|why| panic!("{path:?}: {why}"));
    let cases: Vec<Case> = files.iter().map(read).collect();
    assert!(cases.len() > 100, "only {} cases", cases.len());
    cases
}

#[test]
fn committed_cases_are_of_every_kind_and_leave_nothing_unread() {
    let cases = cases();
    for case in &cases {
        assert_eq!(case.notes, Vec::<String>::new(), "{}", case.id);
    }
    for kind in ["forward", "train", "tie", "adversarial", "loss"] {
        assert!(cases.iter().any(|c| c.kind == kind), "no {kind} case");
    }
}

/// The reader and the oracle against the families' own code: f64 against f64, so far closer than `rtol`.
#[test]
fn oracle_agrees() {
    for case in cases() {
        let outputs = oracle::outputs(&case);
        let verdict = check(&case, &outputs, 3e-7).unwrap();
        assert!(verdict.passed(), "{}:{verdict}", case.id);
    }
}

#[test]
fn every_isa_agrees() {
    let cases = cases();
    for isa in isas() {
        let machine = Machine::new(Some(isa), None).unwrap();
        for case in &cases {
            let outputs = with_threads(1, || run(&machine, case)).unwrap();
            let verdict = check(case, &outputs, case.rtol).unwrap();
            assert!(verdict.passed(), "{} on {isa}:{verdict}", case.id);
            assert!(
                !verdict.errors.is_empty(),
                "{}: nothing was compared",
                case.id
            );
            let again = with_threads(2, || run(&machine, case)).unwrap();
            assert_eq!(
                hashes(&outputs),
                hashes(&again),
                "{} on {isa}, two threads",
                case.id
            );
        }
    }
}

/// The bits of `bits.txt`, whatever the ISA and the architecture. `MOE_KERNELS_BLESS=1` writes the file.
#[test]
fn bits_are_those_of_record() {
    let path = data().join("bits.txt");
    let bless = std::env::var_os("MOE_KERNELS_BLESS").is_some();
    let cases = cases();
    for isa in isas() {
        let machine = Machine::new(Some(isa), None).unwrap();
        let mut text = String::from(
            "# case, FNV-1a of ids and weights, of y; of a loss: of its gradient, of its value\n",
        );
        for case in &cases {
            let (routing, y) = hashes(&run(&machine, case).unwrap());
            writeln!(text, "{} {routing:016x} {y:016x}", case.id).unwrap();
        }
        if bless && isa == Isa::Scalar {
            std::fs::write(&path, &text).unwrap();
        }
        let recorded = std::fs::read_to_string(&path).unwrap_or_default();
        let recorded: BTreeMap<&str, &str> = recorded
            .lines()
            .filter_map(|line| line.split_once(' '))
            .collect();
        let different: Vec<&str> = text
            .lines()
            .filter_map(|line| line.split_once(' '))
            .filter(|(id, bits)| recorded.get(id) != Some(bits))
            .map(|(id, _)| id)
            .collect();
        assert!(
            different.is_empty(),
            "{isa} has other bits in {different:?}"
        );
    }
}

/// Narrower packed weights stay within the tolerance that rounding allows.
#[test]
fn narrow_weights_stay_close() {
    for dtype in [DType::BF16, DType::F16] {
        let machine = Machine::new(None, Some(dtype)).unwrap();
        for case in cases().iter().filter(|case| case.kind == "forward") {
            let outputs = run(&machine, case).unwrap();
            let verdict = check(case, &outputs, tolerance(Some(dtype), case, 0)).unwrap();
            assert!(verdict.passed(), "{} in {dtype}:{verdict}", case.id);
        }
    }
}

/// Hash of ids and weights, and of y; for a loss of its gradient and its value.
fn hashes(outputs: &[Output]) -> (u64, u64) {
    let hash = |names: &[&str]| {
        let chosen = outputs.iter().filter(|o| names.contains(&o.name));
        let numbers = chosen.flat_map(|o| match &o.elements {
            Elements::F32(v) => v.clone(),
            Elements::I32(v) => v.iter().map(|&id| id as f32).collect(), // exact: ids are small
            Elements::F64(_) => Vec::new(),
        });
        hash_bits(&numbers.collect::<Vec<f32>>())
    };
    (
        hash(&["topk_ids", "topk_weights", "grad_logits"]),
        hash(&["y", "value"]),
    )
}

// What follows makes files that lie.

/// A tensor of any dtype, for files that this format does not have.
#[derive(Clone)]
struct Raw(Dtype, Vec<usize>, Vec<u8>);

impl View for &Raw {
    fn dtype(&self) -> Dtype {
        self.0
    }
    fn shape(&self) -> &[usize] {
        &self.1
    }
    fn data(&self) -> Cow<'_, [u8]> {
        self.2.as_slice().into()
    }
    fn data_len(&self) -> usize {
        self.2.len()
    }
}

fn floats(shape: &[usize]) -> Raw {
    let n: usize = shape.iter().product();
    let bytes = (0..n).flat_map(|i| ((i % 7) as f32 * 0.25 - 0.5).to_le_bytes());
    Raw(Dtype::F32, shape.to_vec(), bytes.collect())
}

/// A small sound case: T 3, H 4, E 4, I 2, K 2.
fn sound() -> (Value, BTreeMap<&'static str, Raw>) {
    let meta = json!({
        "format": "moe-case-1", "id": "small", "kind": "forward", "T": 3, "H": 4, "E": 4, "I": 2, "k": 2,
        "router": {"source": "linear"}, "score": "softmax", "selection": {"method": "topk", "top_k": 2},
        "weights": {"from": "score", "renorm": "sum"}, "experts": {"gated": true, "act": "silu"},
        "shared": {"n": 0}, "capacity": null,
    });
    let tensors = BTreeMap::from([
        ("x", floats(&[3, 4])),
        ("router_w", floats(&[4, 4])),
        ("w_gate", floats(&[4, 2, 4])),
        ("w_up", floats(&[4, 2, 4])),
        ("w_down", floats(&[4, 4, 2])),
    ]);
    (meta, tensors)
}

fn file(meta: &Value, tensors: &BTreeMap<&'static str, Raw>) -> Vec<u8> {
    let info = [("case".to_string(), meta.to_string())].into();
    safetensors::serialize(tensors.iter().map(|(k, v)| (*k, v)), Some(info)).unwrap()
}

fn read(bytes: &[u8]) -> Result<Case, Refusal> {
    Case::from_file(CaseFile::parse(bytes)?, "stem")
}

/// The refusal of the small case after a change.
fn refusal(change: impl Fn(&mut Value, &mut BTreeMap<&'static str, Raw>)) -> String {
    let (mut meta, mut tensors) = sound();
    change(&mut meta, &mut tensors);
    match read(&file(&meta, &tensors)) {
        Ok(case) => panic!("{} was read", case.id),
        Err(why) => why.to_string(),
    }
}

#[test]
fn a_sound_file_is_read() {
    let (mut meta, tensors) = sound();
    assert_eq!(
        read(&file(&meta, &tensors)).unwrap().notes,
        Vec::<String>::new()
    );
    // What the reader does not know is noted, inside objects too.
    meta["weights"]["flavour"] = json!("sweet");
    meta["colour"] = json!(1);
    let mut more = tensors.clone();
    more.insert("w_extra", floats(&[1]));
    let notes = read(&file(&meta, &more)).unwrap().notes.join("; ");
    for part in ["weights.flavour", "colour", "w_extra"] {
        assert!(notes.contains(part), "{notes}");
    }
}

#[test]
fn files_that_end_early_or_lie_are_refused() {
    let (meta, tensors) = sound();
    let bytes = file(&meta, &tensors);
    for len in (0..bytes.len()).step_by(3) {
        let why = read(&bytes[..len]).map(|case| case.id);
        assert!(
            matches!(why, Err(Refusal::Malformed(_))),
            "{len} bytes: {why:?}"
        );
    }
    for length in [0, 1, 7, 1 << 20, u64::MAX, u64::MAX - 7, i64::MAX as u64] {
        let mut lie = bytes.clone();
        lie[..8].copy_from_slice(&length.to_le_bytes());
        assert!(read(&lie).is_err(), "header length {length}");
    }
    // No UTF-8; offsets and shapes that do not fit; bytes that belong to nobody.
    let mut lie = bytes.clone();
    lie[9] = 0xff;
    assert!(read(&lie).unwrap_err().to_string().contains("UTF-8"));
    let text = String::from_utf8_lossy(&bytes).into_owned();
    for (honest, lying) in [
        ("[3,4]", "[3,5]"),
        ("[4,2,4]", "[4,9,4]"),
        ("\"F32\"", "\"F64\""),
    ] {
        let at = text.find(honest).unwrap();
        let mut lie = bytes.clone();
        // Everything before the data is ASCII, so offsets agree.
        lie[at..at + lying.len()].copy_from_slice(lying.as_bytes());
        assert!(read(&lie).is_err(), "{lying}");
    }
    let mut lie = bytes.clone();
    lie.extend([0; 16]);
    assert!(read(&lie).is_err());
}

/// No flipped byte of the header makes the reader panic.
#[test]
fn damaged_headers_do_not_panic() {
    let (meta, tensors) = sound();
    let bytes = file(&meta, &tensors);
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut rng = common::Rng(1);
    for _ in 0..3000 {
        let mut damaged = bytes.clone();
        for _ in 0..1 + rng.below(3) {
            damaged[rng.below(header)] = rng.next_u64() as u8;
        }
        if let Ok(case) = read(&damaged) {
            let _ = run(&Machine::new(None, None).unwrap(), &case);
        }
    }
}

/// Nor does any number in the metadata: each is refused or run.
#[test]
fn extreme_numbers_do_not_panic() {
    let machine = Machine::new(None, None).unwrap();
    let extremes = [0.0, -1.0, 0.5, 3.0, 1e-300, 1e9, 4e18, 1e300].map(|v| json!(v));
    let whole = [
        json!(u64::MAX),
        json!(i64::MIN),
        json!("Infinity"),
        json!("NaN"),
    ];
    let methods = [
        "topk",
        "sparsemixer",
        "product_key",
        "capacity_top2",
        "dense",
        "expert_choice",
    ];
    for (method, value) in methods.iter().flat_map(|m| {
        let values = extremes.iter().chain(&whole);
        values.map(move |v| (m, v))
    }) {
        for field in [
            "/T",
            "/E",
            "/H",
            "/k",
            "/rtol",
            "/routed_out_scale",
            "/selection/top_k",
            "/selection/n_group",
            "/selection/topk_group",
            "/selection/jitter_eps",
            "/weights/scale",
            "/weights/eps",
            "/weights/p",
            "/router/logit_mul",
            "/router/logit_softcap",
            "/experts/limit",
            "/experts/alpha",
            "/shared/n",
            "/null_experts/n",
            "/capacity/per_expert",
            "/capacity/scope_tokens",
            "/capacity/eps",
        ] {
            let (mut meta, tensors) = sound();
            meta["selection"] = json!({"method": method, "top_k": 2, "group_score": "top2_sum", "n_group": 2,
                "topk_group": 1, "jitter_eps": 0.1});
            meta["weights"] = json!({"renorm": "pnorm", "p": 2.0, "scale": 1.0, "eps": 0.0});
            meta["null_experts"] = json!({"kind": "zero", "n": 0});
            meta["capacity"] = json!({"per_expert": 1, "scope_tokens": 2, "eps": 0.0});
            meta["experts"] = json!({"clamp": "oai", "limit": 1.0, "alpha": 1.0});
            for missing in ["routed_out_scale", "rtol"] {
                meta[missing] = json!(1.0);
            }
            if meta.pointer(field).is_none() {
                let (object, name) = field[1..].split_once('/').unwrap();
                meta[object][name] = json!(0);
            }
            *meta.pointer_mut(field).unwrap() = value.clone();
            if let Ok(case) = read(&file(&meta, &tensors)) {
                let _ = run(&machine, &case);
            }
        }
    }
}

#[test]
fn tensors_that_are_missing_or_wrong_are_named() {
    for name in ["x", "router_w", "w_gate", "w_up", "w_down"] {
        let why = refusal(|_, tensors| {
            tensors.remove(name);
        });
        assert_eq!(why, format!("malformed: missing tensor {name}"));
        let why = refusal(|_, tensors| {
            tensors.get_mut(name).unwrap().0 = Dtype::I32;
        });
        assert!(why.contains(&format!("tensor {name}: expected")), "{why}");
        let why = refusal(|_, tensors| {
            tensors.insert(name, floats(&[5, 3]));
        });
        assert!(why.starts_with("malformed"), "{why}");
    }
    let why = refusal(|_, tensors| {
        let bytes = vec![0; 3 * 4];
        tensors.insert("x", Raw(Dtype::U8, vec![3, 4], bytes));
    });
    assert!(
        why.contains("tensor x: the format has no dtype U8"),
        "{why}"
    );
    let why = refusal(|_, tensors| {
        let bytes = [bf16::ONE.to_le_bytes(); 12].concat();
        tensors.insert("x", Raw(Dtype::BF16, vec![3, 4], bytes));
    });
    assert_eq!(why, "malformed: tensor x: expected F32, got BF16");
}

#[test]
fn fields_that_contradict_are_named() {
    type Change = fn(&mut Value);
    let changes: [(&str, Change); 16] = [
        ("field T is 5", |m| m["T"] = json!(5)),
        ("field H is 5", |m| m["H"] = json!(5)),
        ("expected shape [5, 4]", |m| m["E"] = json!(5)),
        ("field E is missing", |m| m["E"] = json!(null)),
        ("field selection.top_k is 3, but field k is 2", |m| {
            m["selection"]["top_k"] = json!(3)
        }),
        ("field rtol: expected a number", |m| m["rtol"] = json!([1])),
        ("field selection: expected an object", |m| {
            m["selection"] = json!(3)
        }),
        ("field open_rows", |m| m["open_rows"] = json!([3])),
        ("field id", |m| m["id"] = json!("../up")),
        ("field id", |m| m["id"] = json!("a/b")),
        ("field id", |m| m["id"] = json!("")),
        ("missing tensor router_b", |m| {
            m["router"]["bias"] = json!(true)
        }),
        ("missing tensor b_gate", |m| {
            m["experts"]["bias"] = json!(true)
        }),
        ("missing tensor shared_w_up", |m| {
            m["shared"]["n"] = json!(1)
        }),
        ("field selection.jitter_eps is missing", |m| {
            m["selection"] = json!({"method": "sparsemixer", "top_k": 2});
        }),
        ("field capacity is missing", |m| {
            m["selection"] = json!({"method": "capacity_top2", "top_k": 2});
        }),
    ];
    for (expected, change) in changes {
        let why = refusal(|meta, _| change(meta));
        assert!(
            why.starts_with("malformed") && why.contains(expected),
            "{why}, not {expected}"
        );
    }
}

#[test]
fn values_that_nobody_knows_are_not_expressible() {
    for (object, field) in [
        ("", "score"),
        ("", "format"),
        ("", "out_norm"),
        ("router", "source"),
        ("router", "input_norm"),
        ("selection", "method"),
        ("selection", "on"),
        ("weights", "from"),
        ("weights", "renorm"),
        ("experts", "act"),
        ("experts", "clamp"),
        ("shared", "combine"),
    ] {
        let why = refusal(|meta, _| match object {
            "" => meta[field] = json!("odd"),
            _ => meta[object][field] = json!("odd"),
        });
        let dot = if object.is_empty() { "" } else { "." };
        let expected = format!("not expressible: field {object}{dot}{field} has value \"odd\"");
        assert_eq!(why, expected);
    }
}

/// Matrices of one MLP in different formats are packed in one that holds all of them.
#[test]
fn mixed_formats_lose_nothing() {
    let (mut meta, mut tensors) = sound();
    meta["experts"]["latent"] = json!(true);
    tensors.insert("latent_in_w", floats(&[4, 4]));
    tensors.insert("latent_out_w", floats(&[4, 4]));
    let y = |tensors: &BTreeMap<_, _>| {
        let case = read(&file(&meta, tensors)).unwrap();
        let outputs = run(&Machine::new(None, None).unwrap(), &case).unwrap();
        outputs.into_iter().find(|o| o.name == "y").unwrap()
    };
    // A third does not fit bf16, the quarters of `floats` do.
    let third = |shape: &[usize]| {
        let n = shape.iter().product();
        Raw(
            Dtype::F32,
            shape.to_vec(),
            (1.0f32 / 3.0).to_le_bytes().repeat(n),
        )
    };
    tensors.insert("w_down", third(&[4, 4, 2]));
    tensors.insert("latent_out_w", third(&[4, 4]));
    let all_f32 = y(&tensors);
    for name in ["w_up", "latent_in_w"] {
        let Raw(_, shape, bytes) = tensors[name].clone();
        let upper = bytes.chunks(4).flat_map(|b| [b[2], b[3]]).collect();
        tensors.insert(name, Raw(Dtype::BF16, shape, upper));
    }
    assert_eq!(y(&tensors), all_f32);
}

/// Python writes NaN and infinities bare.
#[test]
fn python_json_is_read() {
    let (meta, tensors) = sound();
    let text = meta.to_string().replacen(
        "{",
        r#"{"min_selection_margin": Infinity, "note": "a \"NaN\" \\", "loss": [-Infinity, NaN], "#,
        1,
    );
    let info = [("case".to_string(), text)].into();
    let bytes = safetensors::serialize(tensors.iter().map(|(k, v)| (*k, v)), Some(info)).unwrap();
    assert_eq!(read(&bytes).unwrap().notes, Vec::<String>::new());
}

/// The program: a line for each case, counts, and a status that says whether all went well.
#[test]
fn the_program_counts_and_fails_when_it_should() {
    let root = std::env::temp_dir().join(format!("moe-kernels-cases-{}", std::process::id()));
    let (from, to) = (root.join("in"), root.join("out"));
    std::fs::create_dir_all(&from).unwrap();
    let (meta, tensors) = sound();
    let save = |name: &str, id: &str, change: &dyn Fn(&mut Value)| {
        let mut meta = meta.clone();
        meta["id"] = json!(id);
        change(&mut meta);
        std::fs::write(from.join(name), file(&meta, &tensors)).unwrap();
    };
    let args = |only: Option<&str>| Args {
        cases: from.clone(),
        out: to.clone(),
        backend: Backend::Cpu,
        isa: None,
        dtype: None,
        only: only.map(str::to_string),
        check: true,
    };
    let program = |only: Option<&str>| {
        let (mut lines, mut notes) = (Vec::new(), Vec::new());
        let counts = conformance(&args(only), &mut lines, &mut notes)?;
        Ok::<_, Stop>((counts, String::from_utf8(lines).unwrap()))
    };
    let stop = program(None).unwrap_err();
    assert!(stop.why.contains("no *.safetensors file"), "{stop:?}");
    assert_eq!(stop.status, 2);

    save("a.safetensors", "first", &|_| {});
    save("b.safetensors", "second", &|meta| {
        meta["score"] = json!("odd")
    });
    let (counts, lines) = program(None).unwrap();
    let expected = Counts {
        done: 1,
        not_expressible: 1,
        ..Counts::default()
    };
    assert_eq!((counts, counts.status()), (expected, 0));
    assert!(
        lines.contains("not expressible: field score has value \"odd\""),
        "{lines}"
    );
    let result = CaseFile::parse(&std::fs::read(to.join("first.safetensors")).unwrap());
    assert!(matches!(result, Err(Refusal::Malformed(_)))); // results are no cases, but safetensors all the same
    assert!(!to.join("second.safetensors").exists());

    save("c.safetensors", "first", &|_| {}); // the same id again
    std::fs::write(from.join("d.safetensors"), b"no such thing").unwrap();
    let (counts, lines) = program(None).unwrap();
    assert_eq!((counts.failed, counts.status()), (2, 1), "{lines}");
    assert!(
        lines.contains("has the same id") && lines.contains("malformed"),
        "{lines}"
    );
    assert_eq!(program(Some("a.")).unwrap().0.status(), 0);
    // By id too: that of b.safetensors.
    assert_eq!(program(Some("second")).unwrap().0.not_expressible, 1);

    // A wrong answer is seen.
    let mut more = tensors.clone();
    more.insert("y", floats(&[3, 4]));
    std::fs::write(from.join("e.safetensors"), file(&meta, &more)).unwrap();
    let (counts, lines) = program(Some("e.safe")).unwrap();
    assert_eq!((counts.wrong, counts.status()), (1, 1), "{lines}");
    std::fs::remove_dir_all(&root).unwrap();
}

/// A backend that is not there, and options of another, are refused in one line before anything is read.
#[test]
fn arguments_that_make_no_sense_are_refused() {
    use clap::Parser;
    let refused = |words: &str| {
        let fixed = ["conformance", "--cases", "none", "--out", "none"];
        let args = Args::try_parse_from(fixed.into_iter().chain(words.split(' '))).unwrap();
        let stop = conformance(&args, &mut Vec::new(), &mut Vec::new()).unwrap_err();
        assert_eq!((stop.status, stop.why.lines().count()), (2, 1), "{stop:?}");
        stop.why
    };
    let why = refused("--backend cuda --isa scalar");
    if cfg!(feature = "cuda") {
        assert_eq!(why, "--isa means nothing with --backend cuda");
    } else {
        assert!(why.contains("build with --features cuda"), "{why}");
        assert_eq!(why, refused("--backend cuda"));
    }
    assert!(!Path::new("none").exists());
}

/// What is written can be read back, and ids never leave the folder.
#[test]
fn results_are_written_whole() {
    let folder = std::env::temp_dir().join(format!("moe-kernels-out-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let outputs = [
        Output::f32("y", &[1, 2], vec![1.0, f32::NAN]),
        Output::i32("topk_ids", &[1, 1], vec![-1]),
        Output::f64("value_f64", &[1], vec![0.5]),
        Output::f32("none", &[0, 2], vec![]),
    ];
    out::write(&folder, "id", &outputs).unwrap();
    let bytes = std::fs::read(folder.join("id.safetensors")).unwrap();
    let back = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(
        back.tensor("topk_ids").unwrap().data(),
        (-1i32).to_le_bytes()
    );
    assert_eq!(
        back.tensor("value_f64").unwrap().data(),
        0.5f64.to_le_bytes()
    );
    assert_eq!(back.tensor("none").unwrap().shape(), [0, 2]);
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
    std::fs::remove_dir_all(&folder).unwrap();
}
