//! The permutation at the shapes of published models: microseconds, and the share of the least time that the layer's products need.
//!
//! `cargo bench --bench permute` checks every answer against the oracle and prints a table: medians of interleaved runs on one thread and on all, and beside them
//! what the three products of the layer need at the FMA peak measured in the same run. No layer is faster, so the share of a real one is smaller.

#![allow(missing_docs)]

#[path = "support/micro.rs"]
mod micro;

use micro::{distinct_ids, medians, quick};
use moe_kernels::cpu::roofline::fma_peak;
use moe_kernels::permute::{Permutation, PermuteOptions};
use moe_kernels::{Cpu, reference};
use std::time::Duration;

struct Shape {
    name: &'static str,
    experts: usize,
    slots: usize,
    hidden: usize,
    intermediate: usize,
}

const SHAPES: [Shape; 4] = [
    Shape {
        name: "mixtral",
        experts: 8,
        slots: 2,
        hidden: 4096,
        intermediate: 14336,
    },
    Shape {
        name: "olmoe",
        experts: 64,
        slots: 8,
        hidden: 2048,
        intermediate: 1024,
    },
    Shape {
        name: "qwen3",
        experts: 128,
        slots: 8,
        hidden: 2048,
        intermediate: 768,
    },
    Shape {
        name: "deepseek-v3",
        experts: 256,
        slots: 8,
        hidden: 7168,
        intermediate: 2048,
    },
];

/// On a worker of the pool, as a layer's calls are: from outside each call would wait for a worker to wake up.
fn main() {
    rayon::scope(|_| table());
}

fn table() {
    let all = Cpu::from_env().expect("MOE_KERNELS_ISA");
    let one = all.single_threaded();
    let budget = Duration::from_millis(if quick() { 1 } else { 300 });
    println!("isa {}; medians", all.isa());
    println!(
        "{:12} {:>4} {:>2} {:>6} {:>7} {:>10} {:>14} {:>9}",
        "shape", "E", "K", "T", "threads", "µs", "products, µs", "share"
    );
    for shape in SHAPES {
        for tokens in [1, 64, 4096, 16384, 65536] {
            let ids = distinct_ids(7, tokens, shape.experts, shape.slots);
            let options = PermuteOptions::default();
            let expected = reference::permute(&ids, 0..shape.experts, 1);
            let mut permutations = [Permutation::default(), Permutation::default()];
            let sort = |cpu: &Cpu, p: &mut Permutation| {
                p.sort(cpu, &ids, shape.experts, &options).unwrap()
            };
            for (cpu, p) in [one, all].iter().zip(&mut permutations) {
                sort(cpu, p);
                assert_eq!(p.offsets(), expected.offsets, "{}", shape.name);
            }
            let [first, second] = &mut permutations;
            let times = medians(
                tokens,
                &mut [
                    &mut || first.sort(&one, &ids, shape.experts, &options).unwrap(),
                    &mut || second.sort(&all, &ids, shape.experts, &options).unwrap(),
                ],
            );
            for (cpu, time) in [one, all].iter().zip(times) {
                // gate, up and down: a multiply-add each for every pair, column and row.
                let flops =
                    6.0 * (tokens * shape.slots * shape.hidden) as f64 * shape.intermediate as f64;
                let products = flops / fma_peak(cpu, budget);
                println!(
                    "{:12} {:>4} {:>2} {:>6} {:>7} {:>10.2} {:>14.0} {:>8.4}%",
                    shape.name,
                    shape.experts,
                    shape.slots,
                    tokens,
                    cpu.threads(),
                    time * 1e6,
                    products * 1e6,
                    100.0 * time / products
                );
            }
        }
    }
}
