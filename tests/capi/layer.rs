//! The bits of the Rust calls.

use super::*;

#[test]
fn a_layer_has_the_bits_of_the_rust_call() {
    let x = Rng(3).normals(T * H);
    for dtype in DType::ALL {
        for &threads in THREADS {
            let mut pair = Pair::new(threads, dtype);
            // x with gaps and y with gaps.
            let mut wide = vec![f32::NAN; T * (H + 5)];
            for (row, from) in wide.chunks_exact_mut(H + 5).zip(x.chunks_exact(H)) {
                row[..H].copy_from_slice(from);
            }
            let mut x_view = matrix(&wide, T, H);
            x_view.row_stride = (H + 5) as isize;
            let mut out = vec![-7.0f32; T * (H + 3)];
            let mut y_view = matrix_mut(&mut out, T, H);
            y_view.row_stride = (H + 3) as isize;
            let call = pair.call(&x_view, &y_view);
            must(pair.forward(&call));
            let expected = pair.rust_forward(&x);
            for (row, expected) in out.chunks_exact(H + 3).zip(expected.chunks_exact(H)) {
                assert_same_bits(&row[..H], expected, "y");
                assert_eq!(row[H..], [-7.0; 3]);
            }
        }
    }
}

#[test]
fn half_precision_goes_in_and_out() {
    let x = Rng(3).normals(T * H);
    let mut pair = Pair::new(1, DType::BF16);
    let half_x: Vec<bf16> = x.iter().map(|&v| bf16::from_f32(v)).collect();
    let mut half_y = vec![f16::NAN; T * H];
    let x_view = matrix(&half_x, T, H);
    let y_view = matrix_mut(&mut half_y, T, H);
    let call = pair.call(&x_view, &y_view);
    must(pair.forward(&call));
    let y: Vec<f16> = pair.rust_forward(&half_x);
    assert_eq!(
        half_y.iter().map(|v| v.to_bits()).collect::<Vec<_>>(),
        y.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
    );
    assert!(y.iter().all(|v| v.is_finite()));
}
