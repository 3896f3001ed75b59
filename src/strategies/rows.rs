//! Rows of logits. A file of its own, for the tests of the GPU include it: they run without the feature `proptest`.

use proptest::collection::vec;
use proptest::prelude::*;

/// What kernels stumble over.
pub const SPECIAL: [f32; 13] = [
    f32::NAN,
    -f32::NAN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::MAX,
    f32::MIN,
    f32::MIN_POSITIVE,
    f32::from_bits(1),            // the smallest subnormal
    -f32::from_bits(0x007f_ffff), // the largest, below zero
    -0.0,
    0.0,
    88.8,   // e^88.8 overflows f32
    -104.0, // e^−104 underflows to zero
];

/// One token's logits: ordinary numbers; few different ones, so that most are tied; ordinary ones with −0, infinities, NaN and the extremes of f32 among them;
/// one number everywhere.
pub fn logit_row(experts: usize) -> impl Strategy<Value = Vec<f32>> {
    let some = |element: BoxedStrategy<f32>| vec(element, experts);
    prop_oneof![
        4 => some(ordinary()),
        3 => some(tied()),
        2 => some(prop_oneof![3 => ordinary(), 1 => special()].boxed()),
        1 => prop_oneof![tied(), special()].prop_map(move |z| vec![z; experts]),
    ]
}

fn ordinary() -> BoxedStrategy<f32> {
    (-20.0f32..20.0).boxed()
}

/// Quarters between −1 and 1; a minus zero too, which equals zero.
fn tied() -> BoxedStrategy<f32> {
    prop_oneof![8 => (-4i8..=4).prop_map(|n| f32::from(n) / 4.0), 1 => Just(-0.0f32)].boxed()
}

fn special() -> BoxedStrategy<f32> {
    proptest::sample::select(SPECIAL.to_vec()).boxed()
}
