//! The examples `conformance` and `layer` on a GPU (or the emulator): every case of `tests/data/cases` with the CPU's bits, in 16 bits within what rounding allows, and a
//! layer that is checked, called and replayed.
#![cfg(feature = "cuda")]
#![allow(clippy::duplicate_mod)] // of two programs, each with its own `device`

#[path = "common/gpu.rs"]
mod gpu;
#[path = "../examples/support/layer/mod.rs"]
mod layer;
#[path = "../examples/support/mod.rs"]
mod support;

use clap::Parser;
use layer::gpu::rotation::Rotation;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;
use support::backend::{Runner, Unrun};
use support::case::Case;
use support::check::check;
use support::conformance::{Args, conformance};
use support::out::{Elements, Output};

fn cases() -> Vec<Case> {
    // From where the test runs: the repository, or a bundle of what it needs on a GPU machine.
    let entries = std::fs::read_dir("tests/data/cases").unwrap();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|f| Case::read(f).unwrap()).collect()
}

/// A folder for what the tests write.
fn folder(name: &str) -> PathBuf {
    let name = format!("moe-kernels-examples-{name}-{}", std::process::id());
    std::env::temp_dir().join(name)
}

fn args(words: &str) -> Args {
    let out = folder("out").display().to_string();
    let fixed = ["conformance", "--cases", "tests/data/cases", "--out", &out];
    let words = fixed.into_iter().chain(words.split_whitespace());
    Args::try_parse_from(words).unwrap()
}

fn runner(words: &str) -> Runner {
    Runner::new(&args(words)).unwrap()
}

fn bits(output: &Output) -> Vec<u32> {
    match &output.elements {
        Elements::F32(v) => v.iter().map(|v| v.to_bits()).collect(),
        Elements::I32(v) => v.iter().map(|&v| v as u32).collect(),
        Elements::F64(_) => panic!("{} is f64", output.name),
    }
}

/// f32 x makes every product exact, whatever the format of the weights: the CPU's bits from the logits to y. What does not run is named here, so that nothing drops out in silence.
#[test]
fn cases_have_the_cpus_bits() {
    if gpu::open().is_none() {
        return;
    }
    let (on_gpu, on_cpu) = (runner("--backend cuda"), runner(""));
    let mut missing = BTreeSet::new();
    for case in cases() {
        let outputs = match on_gpu.run(&case) {
            Ok(outputs) => outputs,
            Err(Unrun::NotOnBackend(why)) => {
                missing.insert(why.split(':').next().unwrap_or_default().to_string());
                continue;
            }
            Err(why) => panic!("{}: {why:?}", case.id),
        };
        let expected = on_cpu.run(&case).unwrap();
        assert_eq!(outputs.len(), expected.len(), "{}", case.id);
        for (found, expected) in outputs.iter().zip(&expected) {
            assert_eq!(found.name, expected.name, "{}", case.id);
            assert_eq!(bits(found), bits(expected), "{}: {}", case.id, found.name);
        }
        let verdict = check(&case, &outputs, on_gpu.tolerance(&case)).unwrap();
        assert!(verdict.passed(), "{}:{verdict}", case.id);
    }
    assert_eq!(missing.into_iter().collect::<Vec<_>>(), ["loss"]);
}

/// x, h and weights in 16 bits, on tensor cores: ids and weights are still those of the file.
#[test]
fn cases_in_16_bits_are_within_what_rounding_allows() {
    if gpu::open().is_none() {
        return;
    }
    for dtype in ["bf16", "f16"] {
        let runner = runner(&format!("--backend cuda --dtype {dtype}"));
        let mut compared = 0;
        for case in cases().iter().filter(|case| case.kind != "loss") {
            let outputs = match runner.run(case) {
                Ok(outputs) => outputs,
                Err(Unrun::NotOnBackend(_)) => continue,
                Err(why) => panic!("{} in {dtype}: {why:?}", case.id),
            };
            let (y, routed): (Vec<_>, Vec<_>) = outputs.into_iter().partition(|o| o.name == "y");
            for (outputs, rtol) in [(y, runner.tolerance(case)), (routed, case.rtol)] {
                let verdict = check(case, &outputs, rtol).unwrap();
                assert!(verdict.passed(), "{} in {dtype}:{verdict}", case.id);
            }
            compared += 1;
        }
        assert!(compared > 100, "only {compared} cases ran");
    }
}

#[test]
fn the_program_counts_what_the_backend_does_not_do() {
    if gpu::open().is_none() {
        return;
    }
    let (mut lines, mut notes) = (Vec::new(), Vec::new());
    let args = args("--backend cuda --check --only loss_z");
    let counts = conformance(&args, &mut lines, &mut notes).unwrap();
    std::fs::remove_dir_all(&args.out).unwrap();
    let lines = String::from_utf8(lines).unwrap();
    assert_eq!((counts.not_on_backend, counts.done), (3, 0), "{lines}");
    assert_eq!(counts.status(), 0);
    assert!(lines.contains("not on this backend: loss: "), "{lines}");
    let last = lines.lines().last().unwrap();
    assert!(
        last.ends_with(", 0 failed, 3 not on this backend"),
        "{last}"
    );
}

/// One line and status 1, and no panic, where no driver is.
#[test]
fn without_a_driver_the_programs_say_so() {
    let folder = folder("no-driver");
    std::fs::create_dir_all(&folder).unwrap();
    for name in ["libcuda.so.1", "libcuda.so", "nvcuda.dll", "cuda.dll"] {
        std::fs::write(folder.join(name), b"").unwrap();
    }
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "no_driver", "--nocapture"])
        .env("LD_LIBRARY_PATH", &folder)
        .output()
        .unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    let text = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success(), "{text}");
    assert_eq!(text.matches("cuda: no NVIDIA driver").count(), 2, "{text}");
}

#[test]
#[ignore = "runs in a process of its own"]
fn no_driver() {
    let Err(stop) = Runner::new(&args("--backend cuda")) else {
        panic!("a driver was found");
    };
    println!("{}", stop.why);
    assert_eq!((stop.status, stop.why.lines().count()), (1, 1));
    let why = layer::run(&options(""), &mut Vec::new(), &mut Vec::new());
    println!("{}", why.map(drop).unwrap_err());
}

fn options(words: &str) -> layer::Options {
    let fixed = ["layer", "--backend", "cuda", "--shape", "tiny"];
    layer::Options::try_parse_from(fixed.into_iter().chain(words.split_whitespace())).unwrap()
}

#[test]
fn a_layer_is_checked_called_and_replayed() {
    let Some(gpu) = gpu::open() else { return };
    for (dtype, tokens) in [("bf16", "1,9"), ("f16", "3"), ("f32", "5")] {
        let (mut out, mut progress) = (Vec::new(), Vec::new());
        let words = format!("--dtype {dtype} --tokens {tokens} --repeats 1 --check 9");
        let report = layer::run(&options(&words), &mut out, &mut progress).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(report.passed(), "{text}");
        for (measured, checked) in &report.runs {
            assert_eq!(checked.tokens.len(), measured.tokens, "{text}");
            let seconds: Vec<f64> = measured.stages.iter().map(|s| s.seconds).collect();
            assert!(
                seconds.len() == 2 && seconds.iter().all(|&s| s > 0.0),
                "{text}"
            );
        }
        assert!(text.contains(&gpu.cuda.name().unwrap()), "{text}");
        assert_eq!(text.contains("NO GPU"), gpu.is_emulated(), "{text}");
    }
}

#[test]
fn copies_of_the_weights_take_turns_until_the_l2_has_forgotten_them() {
    let mib = 1 << 20;
    // touched, L2, room for more copies → copies, cold
    for (touched, l2, room, copies, cold) in [
        (75 * mib, 50 * mib, 99, 3, true),
        (150 * mib, 50 * mib, 99, 2, true),
        (201 * mib, 50 * mib, 99, 1, true),
        (75 * mib, 50 * mib, 1, 2, false),
        (75 * mib, 50 * mib, 0, 1, false),
        (mib, 50 * mib, 99, 16, false),
        (0, 50 * mib, 99, 16, false),
    ] {
        let found = Rotation::new(touched, l2, room);
        let what = format!("{touched} bytes: {found:?}");
        assert_eq!((found.copies, found.is_cold()), (copies, cold), "{what}");
        assert!(
            found.inputs >= 4 && found.inputs.is_multiple_of(found.copies),
            "{what}"
        );
    }
}
