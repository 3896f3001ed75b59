//! Seeded data of the host.

pub use crate::micro::{distinct_ids, normals};

/// `a · b` in f64, and the sum of the magnitudes.
pub fn dot(a: &[f32], b: &[f32]) -> (f64, f64) {
    a.iter().zip(b).fold((0.0, 0.0), |(sum, all), (x, y)| {
        let p = f64::from(*x) * f64::from(*y);
        (sum + p, all + p.abs())
    })
}

/// `count` numbers below `n`, evenly spread, the first and the last among them.
pub fn spread(n: usize, count: usize) -> impl Iterator<Item = usize> {
    let count = count.min(n);
    (0..count).map(move |i| {
        if count < 2 {
            0
        } else {
            i * (n - 1) / (count - 1)
        }
    })
}
