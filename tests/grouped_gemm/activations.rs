//! Every activation against the f64 oracle.

use super::*;

/// `act(z)` for one row of pre-activations, fed through K = 1 products with weights z and input 1.
fn activate(cpu: &Cpu, activation: Activation, gate: &[f32], up: &[f32]) -> Vec<f32> {
    let n = up.len();
    let view = |w| AnyMatRef::from(MatRef::new(w, n, 1).unwrap());
    let mut packed;
    if activation.gated {
        packed = PackedMatrices::new_gated(cpu, n, 1, DType::F32).unwrap();
        let pushed = packed.push_gated(cpu, view(gate), view(up), None, None);
        pushed.unwrap();
    } else {
        packed = PackedMatrices::new(cpu, n, 1, DType::F32).unwrap();
        packed.push(cpu, view(up), None).unwrap();
    }
    let mut out = vec![f32::NAN; n];
    let one = MatRef::new(&[1.0f32], 1, 1).unwrap().into();
    let groups = Groups::Single { rows: 1, expert: 0 };
    let view = MatMut::new(&mut out, 1, n).unwrap().into();
    multiply(cpu, one, None, &packed, groups, Some(activation), view).unwrap();
    out
}

#[test]
fn activations_match_the_oracle_and_each_other() {
    let mut rng = Rng(5);
    let special = [
        0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 90.0, -90.0, 1e4, -1e4,
    ];
    let gate: Vec<f32> = special
        .into_iter()
        .chain((0..501).map(|_| rng.normal() * 3.0))
        .collect();
    let up: Vec<f32> = rng.normals(gate.len());
    for activation in activations() {
        let spec = reference::MlpSpec::from(activation);
        let inputs = if activation.gated { &up } else { &gate };
        let mut first: Option<Vec<f32>> = None;
        for cpu in cpus() {
            let found = activate(&cpu, activation, &gate, inputs);
            for (i, &f) in found.iter().enumerate() {
                let (g, u) = (f64::from(gate[i]), f64::from(inputs[i]));
                let exact = spec.activate(g, u);
                // A few roundings, each relative to an intermediate no larger than this (ReLU² squares, the rest are at most linear).
                let size = g.abs().max(1.0) * (u.abs() + 1.0).max(g.abs());
                let bound = 16.0 * f64::from(f32::EPSILON) * size;
                assert!(
                    (f64::from(f) - exact).abs() <= bound,
                    "{} {activation:?} of ({g}, {u}): {f} is not {exact}",
                    cpu.isa()
                );
            }
            let first = first.get_or_insert_with(|| found.clone());
            assert_same_bits(&found, first, &format!("{} {activation:?}", cpu.isa()));
        }
    }
}

#[test]
fn nan_passes_through_every_activation() {
    for cpu in cpus() {
        for activation in activations() {
            let n = 40;
            for (g, u) in [(f32::NAN, 1.0), (1.0, f32::NAN)] {
                let u = if activation.gated { u } else { f32::NAN };
                let out = activate(&cpu, activation, &vec![g; n], &vec![u; n]);
                assert!(
                    out.iter().all(|v| v.is_nan()),
                    "{} {activation:?}",
                    cpu.isa()
                );
            }
        }
    }
}
