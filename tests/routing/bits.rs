//! The determinism contract: the same bits on every ISA, for every thread count, in every batch, and on every architecture.

use crate::assert_equal;
use crate::common::{assert_same_bits, cpus, hash_bits, with_threads};
use crate::setups::{self, Setup};
use moe_kernels::routing::Routing;
use moe_kernels::{Cpu, Isa};

/// 300 tokens of 260 logits are work for more than 7 threads.
fn large() -> Vec<Setup> {
    setups::all(11, 260, 9, 300, 1.0)
}

#[test]
fn isa_and_threads_change_no_bit() {
    for setup in large() {
        let expected = setup.route(&Cpu::with_isa(Isa::Scalar).unwrap().single_threaded());
        for cpu in cpus() {
            for threads in [1, 2, 7] {
                let routing = with_threads(threads, || setup.route(&cpu));
                assert_equal(
                    &routing,
                    &expected,
                    &format!("{} on {} x {threads}", setup.name, cpu.isa()),
                );
            }
        }
    }
}

#[test]
fn a_token_alone_has_the_bits_that_it_has_in_any_batch() {
    let cpu = Cpu::new();
    for setup in large().iter().filter(|s| !s.looks_across()) {
        let batch = setup.route(&cpu);
        let (k, shared) = (setup.config.slots(), setup.config.joint_shared);
        let router = setup.router();
        let mut alone = Routing::new();
        for t in 0..setup.tokens {
            router.route(&cpu, &setup.input(t, 1), &mut alone).unwrap();
            assert_eq!(
                alone.ids(),
                &batch.ids()[t * k..][..k],
                "{} token {t}",
                setup.name
            );
            assert_same_bits(alone.weights(), &batch.weights()[t * k..][..k], setup.name);
            assert_same_bits(
                alone.shared_weights(),
                &batch.shared_weights()[t * shared..][..shared],
                setup.name,
            );
        }
    }
}

/// One number for the bits of every kind of router, committed, so that architectures can be compared: this test runs on x86 and, under qemu, on
/// AArch64.
#[test]
fn the_bits_are_those_of_every_architecture() {
    for cpu in cpus() {
        let mut hash = 0u64;
        for setup in setups::all(11, 67, 9, 40, 1.0) {
            let routing = setup.route(&cpu);
            let ids: Vec<f32> = routing.ids().iter().map(|&id| id as f32).collect();
            for part in [&ids, routing.weights(), routing.shared_weights()] {
                hash = hash.rotate_left(5) ^ hash_bits(part);
            }
        }
        assert_eq!(hash, EXPECTED, "0x{hash:016x} on {}", cpu.isa());
    }
}

const EXPECTED: u64 = 0x7046_7fcf_204c_9a67;
