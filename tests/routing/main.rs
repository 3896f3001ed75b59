//! Routing: against the f64 oracle for every family, contracts under bad logits, bits, every error.

#[path = "../common/mod.rs"]
mod common;

mod bits;
mod contracts;
mod errors;
mod load;
mod oracle;
mod setups;

use common::assert_same_bits;
use moe_kernels::routing::Routing;

fn assert_equal(found: &Routing, expected: &Routing, what: &str) {
    assert_eq!(found.ids(), expected.ids(), "{what}");
    assert_same_bits(found.weights(), expected.weights(), what);
    assert_same_bits(found.shared_weights(), expected.shared_weights(), what);
    let (found, expected) = (found.permutation(), expected.permutation());
    assert_eq!(found.row_of_pair(), expected.row_of_pair(), "{what}");
    assert_eq!(found.pair_of_row(), expected.pair_of_row(), "{what}");
}
