//! The example is right: strided, permuted and pooled tensors of other frameworks give the same bits, and those that the reference allows.
#![allow(missing_docs)]

#[path = "../examples/host_tensors.rs"]
mod example;

#[test]
fn the_example_runs() {
    example::main().unwrap();
}
