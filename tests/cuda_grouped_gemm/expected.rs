//! The CPU's answer, and how far from f64 a GPU's may be.

use super::*;

/// The CPU's answer, `[rows, n]`; rows of padding are NaN.
pub fn on_cpu(case: &Case, data: &Data, out: DType) -> Vec<f32> {
    let cpu = Cpu::new();
    let (n, k, e, rows) = (case.n, case.k, case.counts.len(), case.rows());
    let (gate, up) = (data.gate.to_f32(), data.up.to_f32());
    let mut packed = match case.activation.gated {
        true => PackedMatrices::new_gated(&cpu, n, k, case.w).unwrap(),
        false => PackedMatrices::new(&cpu, n, k, case.w).unwrap(),
    };
    for i in 0..e {
        let matrix = |v: &[f32]| Stored::new(case.w, &v[i * n * k..][..n * k]);
        let (g, u) = (matrix(&gate), matrix(&up));
        let gate_bias = case.bias.then(|| &data.gate_bias[i * n..][..n]);
        let up_bias = case.bias.then(|| &data.up_bias[i * n..][..n]);
        if case.activation.gated {
            packed
                .push_gated(&cpu, g.view(n, k), u.view(n, k), gate_bias, up_bias)
                .unwrap();
        } else {
            packed.push(&cpu, u.view(n, k), up_bias).unwrap();
        }
    }
    let offsets = case.offsets();
    let mut result = Stored::new(out, &vec![f32::NAN; rows * n]);
    let gather = (case.slots > 0).then(|| Gather {
        pair_of_row: &data.pair_of_row,
        slots: case.slots,
        input_scale: case
            .scale
            .then_some(&data.scale[..data.a_rows * case.slots]),
    });
    grouped_gemm_into(
        &cpu,
        data.x.view(data.a_rows, k),
        gather,
        &packed,
        Groups::Ragged {
            offsets: &offsets,
            counts: &case.counts,
        },
        Some(case.activation),
        result.view_mut(rows, n),
        &mut vec![0; scratch_bytes(&cpu)],
    )
    .unwrap();
    result.to_f32()
}

/// Compares with f64: sums within (K + 4)·2⁻²³·Σ|a||w| (a tensor core may truncate), TF32 inputs within 2⁻¹¹ each; then through an activation of slope ≤ 1.13.
pub fn check_against_f64(case: &Case, data: &Data, found: &[f32]) {
    let (n, k) = (case.n, case.k);
    let (x, gate, up) = (data.x.to_f32(), data.gate.to_f32(), data.up.to_f32());
    let input = if case.numerics == Numerics::Tf32 {
        2f64.powi(-10)
    } else {
        0.0
    };
    let relative = (k as f64 + 4.0) * 2f64.powi(-23) + input;
    let rounding = match case.out {
        DType::BF16 => 2f64.powi(-8),
        DType::F16 => 2f64.powi(-11),
        _ => 2f64.powi(-21),
    };
    let offsets = case.offsets();
    for e in 0..case.counts.len() {
        for r in offsets[e]..offsets[e] + case.counts[e] {
            let pair = data.pair_of_row[r] as usize;
            let source = pair.checked_div(case.slots).unwrap_or(r);
            let scale = if case.scale && case.slots > 0 {
                f64::from(data.scale[pair])
            } else {
                1.0
            };
            for c in 0..n {
                let sum = |w: &[f32], bias: &[f32]| {
                    let (mut s, mut m) = (0.0, 0.0);
                    for i in 0..k {
                        let p = f64::from(x[source * k + i])
                            * f64::from(w[(e * n + c) * k + i])
                            * scale;
                        s += p;
                        m += p.abs();
                    }
                    let b = if case.bias {
                        f64::from(bias[e * n + c])
                    } else {
                        0.0
                    };
                    (s + b, (m + b.abs()) * relative + 1e-30)
                };
                let (u, du) = sum(&up, &data.up_bias);
                let (expected, tolerance) = if case.activation.gated {
                    let (g, dg) = sum(&gate, &data.gate_bias);
                    let silu = g / (1.0 + (-g).exp());
                    (silu * u, silu.abs() * du + 1.13 * dg * (u.abs() + du))
                } else {
                    (u, du)
                };
                let tolerance = tolerance + expected.abs() * rounding + 6e-8;
                let v = f64::from(found[r * n + c]);
                assert!(
                    (v - expected).abs() <= tolerance,
                    "{case:?}: row {r}, column {c}: {v}, expected {expected} within {tolerance:e}"
                );
            }
        }
    }
}
