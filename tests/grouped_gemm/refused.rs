//! What is refused, and in which words.

use super::*;

/// Refused, beginning with the argument.
#[track_caller]
fn refused<T>(argument: &str, result: Result<T, Error>) {
    let error = result.err().expect(argument);
    assert!(
        error.to_string().starts_with(argument),
        "{argument}: {error}"
    );
}

/// One wrong argument at a time: an error that names it, and an output that nobody touched.
#[test]
fn bad_input_is_named_and_nothing_is_written() {
    let cpu = Cpu::new();
    let p = Problem::new(1, 6, 5, 4, 2, DType::F32);
    let packed = p.pack(&cpu);
    let good = p.groups();
    let x = |rows, cols| AnyMatRef::from(MatRef::new(&p.x, rows, cols).unwrap());
    let check = |argument: &str, x, gather, groups, activation, (rows, cols), scratch| {
        let mut out = [7.5f32; 64];
        let result = grouped_gemm_into(
            &cpu,
            x,
            gather,
            &packed,
            groups,
            activation,
            MatMut::new(&mut out, rows, cols).unwrap().into(),
            &mut vec![0; scratch],
        );
        refused(argument, result);
        assert_eq!(out, [7.5; 64], "{argument}");
    };
    let enough = scratch_bytes(&cpu);
    check("x", x(6, 3), None, good, None, (6, 5), enough);
    check("x", x(5, 4), None, good, None, (6, 5), enough);
    check("out", x(6, 4), None, good, None, (6, 4), enough);
    check("out", x(6, 4), None, good, None, (5, 5), enough);
    check("scratch", x(6, 4), None, good, None, (6, 5), enough - 1);
    let activated = |argument: &str, activation| {
        let activation = Some(activation);
        check(argument, x(6, 4), None, good, activation, (6, 5), enough);
    };
    activated("activation", Activation::SWIGLU);
    let bad_clamp = Activation {
        clamp: Clamp::Pre { limit: f32::NAN },
        ..Activation::plain(ActivationFunction::Relu)
    };
    activated("clamp.limit", bad_clamp);
    let grouped = |groups| check("groups", x(6, 4), None, groups, None, (6, 5), enough);
    grouped(Groups::Ragged {
        offsets: &p.offsets[..2],
        counts: &p.counts[..1],
    });
    let offsets = &[0, 2, 6];
    for counts in [&[3, 4], &[usize::MAX, 4]] {
        grouped(Groups::Ragged { offsets, counts });
    }
    grouped(Groups::Single { rows: 6, expert: 2 });
    let gathered = |argument: &str, pair_of_row, slots, input_scale| {
        let gather = Some(Gather {
            pair_of_row,
            slots,
            input_scale,
        });
        check(argument, x(6, 4), gather, good, None, (6, 5), enough);
    };
    gathered("pair_of_row", &[0; 5], 1, None);
    gathered("pair_of_row", &[0, 1, 2, 3, 4, 6], 1, None);
    gathered("slots", &[0; 6], 0, None);
    gathered("input_scale", &[0; 6], 1, Some(&[1.0; 5]));
}

#[test]
fn packed_sets_refuse_what_does_not_fit() {
    let cpu = Cpu::new();
    let w = vec![0.0f32; 64];
    let view = |rows, cols| AnyMatRef::from(MatRef::new(&w, rows, cols).unwrap());
    refused("n", PackedMatrices::new(&cpu, 0, 4, DType::F32));
    refused("k", PackedMatrices::new(&cpu, 4, 0, DType::F32));
    refused(
        "packed matrix",
        PackedMatrices::new(&cpu, usize::MAX / 2, 8, DType::F32),
    );
    let mut plain = PackedMatrices::new(&cpu, 4, 8, DType::F32).unwrap();
    refused("w", plain.push(&cpu, view(8, 4), None));
    refused("bias", plain.push(&cpu, view(4, 8), Some(&[0.0; 3])));
    refused(
        "gate",
        plain.push_gated(&cpu, view(4, 8), view(4, 8), None, None),
    );
    let mut gated = PackedMatrices::new_gated(&cpu, 4, 8, DType::F32).unwrap();
    refused("w", gated.push(&cpu, view(4, 8), None));
    assert!(plain.is_empty() && gated.is_empty());

    let mut experts = PackedExperts::new(&cpu, 8, 4, Activation::SWIGLU, DType::F32).unwrap();
    let good = ExpertWeights::gated(view(4, 8), view(4, 8), view(8, 4));
    let bias = &[0.0f32; 3][..];
    let (down, up) = (view(4, 8), view(8, 4));
    for (argument, wrong) in [
        ("down", ExpertWeights { down, ..good }),
        ("up", ExpertWeights { up, ..good }),
        ("gate", ExpertWeights { gate: None, ..good }),
        ("down_bias", good.with_biases(None, None, Some(bias))),
        ("gate_bias", good.with_biases(Some(bias), None, None)),
    ] {
        refused(argument, experts.push(&cpu, &wrong));
    }
    assert_eq!(experts.len(), 0);
    assert_eq!(experts.push(&cpu, &good), Ok(0));
    refused("gate_up", ExpertWeights::fused(view(3, 8), view(8, 4)));
}

#[test]
fn weights_packed_for_another_isa_are_refused() {
    let scalar = Cpu::with_isa(Isa::Scalar).unwrap();
    let best = Cpu::new();
    if best.isa() == Isa::Scalar {
        return; // one ISA: there is no other to pack for
    }
    let p = Problem::new(1, 6, 5, 4, 2, DType::F32);
    let packed = p.pack(&scalar);
    let mut out = [7.5f32; 30];
    let x = MatRef::new(&p.x, 6, 4).unwrap().into();
    let view = MatMut::new(&mut out, 6, 5).unwrap().into();
    let error = multiply(&best, x, None, &packed, p.groups(), None, view).unwrap_err();
    assert!(
        matches!(
            error,
            Error::PackedFor {
                argument: "weights",
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(out, [7.5; 30]);
}
