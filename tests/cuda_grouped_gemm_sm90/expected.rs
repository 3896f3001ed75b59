//! The answer in f64, and how far from it a kernel's may be.

use super::*;

/// Σ a·w and Σ |a·w| of one output in f64.
pub fn dot(a: &[f32], w: &[f32]) -> (f64, f64) {
    a.iter().zip(w).fold((0.0, 0.0), |(sum, abs), (a, w)| {
        let p = f64::from(*a) * f64::from(*w);
        (sum + p, abs + p.abs())
    })
}

/// Fails unless every value is within the rounding errors of f32 sums, the activation's and the output's.
pub fn check(case: &Case, data: &Data, found: &[f32]) {
    visit_expected(case, data, |at, expected, bound| {
        let v = f64::from(found[at]);
        assert!(
            (v - expected).abs() <= bound,
            "row {} column {}: {v:e}, expected {expected:e} ± {bound:e}",
            at / case.n,
            at % case.n
        );
    });
}

/// Every element that is written: its place, its value in f64, and how far from it a kernel's may be.
pub fn visit_expected(case: &Case, data: &Data, mut visit: impl FnMut(usize, f64, f64)) {
    let (n, k) = (case.n, case.k);
    let spec = case.activation.map(MlpSpec::from);
    // One rounding for each product of 16 and each addition in it at most, and the tensor cores may cut instead of rounding: twice the unit.
    let unit = reference::gamma(k + 2, 2f64.powi(-23));
    let ulp = match case.out {
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
        _ => 2f64.powi(-23),
    };
    let offsets = case.offsets();
    for (e, &count) in case.counts.iter().enumerate() {
        for r in offsets[e] as usize..offsets[e] as usize + count {
            let pair = data.pair_of_row[r] as usize;
            let (source, scaled) = match case.slots {
                0 => (r, r),
                slots => (pair / slots, pair),
            };
            let a = &data.a[source * k..][..k];
            for c in 0..n {
                let column = e * n + c;
                let side = |w: &[f32], bias: &[f32]| {
                    let (mut sum, mut abs) = dot(a, &w[column * k..][..k]);
                    if case.scale {
                        let s = f64::from(data.scale[scaled]);
                        (sum, abs) = (sum * s, abs * s.abs());
                    }
                    if case.bias {
                        let b = f64::from(bias[column]);
                        (sum, abs) = (sum + b, abs + b.abs());
                    }
                    (sum, abs * unit)
                };
                let (u, du) = side(&data.up, &data.up_bias);
                let (expected, error) = match &spec {
                    None => (u, du),
                    Some(spec) => {
                        let (g, dg) = if case.is_gated() {
                            side(&data.gate, &data.gate_bias)
                        } else {
                            (u, du)
                        };
                        let h = spec.activate(g, u);
                        // No function here is steeper than 1.2 + 2|z|; the activation itself is good to a few ulp of f32.
                        let steep = |z: f64| 1.2 + 2.0 * z.abs();
                        let gate =
                            steep(g) * dg + 8.0 * 2f64.powi(-23) * g.abs().max(1e-3) * steep(g);
                        match case.is_gated() {
                            true => (
                                h,
                                gate * (u.abs() + 1.0 + du)
                                    + steep(g) * (g.abs() + 1e-3) * du * 1.2,
                            ),
                            false => (h, gate),
                        }
                    }
                };
                let bound = error + ulp * expected.abs() + 2f64.powi(-25);
                visit(r * n + c, expected, bound);
            }
        }
    }
}
