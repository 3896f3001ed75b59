//! Records what built the crate, so that a benchmark report can say it. Does nothing else: no toolkit, no download.

use std::process::Command;

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
}
