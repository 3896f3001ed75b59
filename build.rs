//! Records what built the crate, so that a benchmark report can say it. No toolkit, no download; with feature `build-ptx`, which is off by default, the
//! PTX of the GPU kernels is compiled from their sources instead of taken from `kernels/ptx`.

use std::path::Path;
use std::process::{Command, exit};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    let version = Command::new(rustc)
        .arg("--version")
        .output()
        .ok()
        .and_then(|out| String::from_utf8(out.stdout).ok())
        .unwrap_or_else(|| "unknown rustc".into());
    println!("cargo:rustc-env=MOE_KERNELS_RUSTC={}", version.trim());
    for (variable, key) in [
        ("MOE_KERNELS_TARGET", "TARGET"),
        ("MOE_KERNELS_OPT_LEVEL", "OPT_LEVEL"),
    ] {
        let value = std::env::var(key).unwrap_or_default();
        println!("cargo:rustc-env={variable}={value}");
    }
    // docs.rs has neither compiler nor network: it shows the committed text.
    if std::env::var_os("CARGO_FEATURE_BUILD_PTX").is_some() {
        build_ptx(std::env::var_os("DOCS_RS").is_some());
    }
}

/// Fills `OUT_DIR/ptx`: texts whose sources have changed are compiled by the pinned compiler, the others and with `copy` all are the committed ones.
fn build_ptx(copy: bool) {
    for changed in ["kernels", "scripts/build_ptx.py"] {
        println!("cargo:rerun-if-changed={changed}");
    }
    println!("cargo:rerun-if-env-changed=MOE_CUDA_TOOLCHAIN");
    let out = Path::new(&std::env::var_os("OUT_DIR").unwrap_or_default()).join("ptx");
    if copy {
        if let Err(why) = copy_texts(&out) {
            fail(&format!("the committed PTX cannot be copied: {why}"));
        }
        return;
    }
    let script = ["scripts/build_ptx.py", "build", "--out"];
    match Command::new("python3").args(script).arg(&out).output() {
        Ok(done) if done.status.success() => {}
        Ok(done) => fail(&String::from_utf8_lossy(&done.stderr)),
        Err(why) => fail(&format!("python3 does not start: {why}")),
    }
}

fn copy_texts(out: &Path) -> std::io::Result<()> {
    for target in ["sm_80", "sm_90a"] {
        std::fs::create_dir_all(out.join(target))?;
        for entry in std::fs::read_dir(Path::new("kernels/ptx").join(target))? {
            let entry = entry?;
            std::fs::copy(entry.path(), out.join(target).join(entry.file_name()))?;
        }
    }
    Ok(())
}

fn fail(why: &str) -> ! {
    for line in why.lines() {
        println!("cargo:warning={line}");
    }
    eprintln!(
        "feature build-ptx: {why}\nWithout the feature the committed PTX is used and nothing has to be installed."
    );
    exit(1)
}
