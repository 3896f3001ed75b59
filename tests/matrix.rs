//! Views of the caller's memory: which elements they show, and which memory they refuse.

use moe_kernels::grouped_gemm::{Groups, PackedMatrices, grouped_gemm_into, scratch_bytes};
use moe_kernels::{AnyMatRef, Cpu, DType, Error, MatMut, MatRef};

/// All elements of a view, row by row.
fn elements(m: MatRef<'_, f32>) -> Vec<Vec<f32>> {
    let row = |i| (0..m.cols()).map(|j| m.get(i, j).unwrap()).collect();
    (0..m.rows()).map(row).collect()
}

#[test]
fn strides_pick_elements() {
    let data: Vec<f32> = (0..24u8).map(f32::from).collect();
    let m = MatRef::new(&data[..6], 2, 3).unwrap();
    assert_eq!(elements(m), [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]);
    assert_eq!(
        elements(m.transposed()),
        [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    );
    assert_eq!(
        (m.get(2, 0), m.get(0, 3), m.get(usize::MAX, 0)),
        (None, None, None)
    );
    let gaps = MatRef::with_strides(&data, 3, 2, 8, 3).unwrap();
    assert_eq!(elements(gaps), [[0.0, 3.0], [8.0, 11.0], [16.0, 19.0]]);
    assert_eq!(
        elements(gaps.rows_from(1, 1, 2).unwrap()),
        [[8.0, 11.0], [16.0, 19.0]]
    );
    assert_eq!(
        elements(gaps.rows_from(0, 2, 2).unwrap()),
        [[0.0, 3.0], [16.0, 19.0]]
    );
    // The same row three times is a fine thing to read.
    let repeated = MatRef::with_strides(&data, 3, 2, 0, 1).unwrap();
    assert_eq!(elements(repeated), [[0.0, 1.0]; 3]);
}

/// The last element decides: exactly so much memory is enough, one less is not.
#[test]
fn too_little_memory_is_refused() {
    let data = [0.0f32; 64];
    for (rows, cols, row_stride, col_stride) in [
        (3, 4, 4, 1),
        (3, 4, 9, 2),
        (4, 3, 1, 4),
        (1, 5, 0, 3),
        (5, 1, 7, 0),
    ] {
        let needed = (rows - 1) * row_stride + (cols - 1) * col_stride + 1;
        let read = |n| MatRef::with_strides(&data[..n], rows, cols, row_stride, col_stride);
        assert!(read(needed).is_ok());
        let error = read(needed - 1).unwrap_err();
        let expected = Error::BufferTooSmall {
            argument: "matrix data",
            needed,
            found: needed - 1,
        };
        assert_eq!(error, expected);
    }
    let mut out = [0.0f32; 64];
    assert!(MatMut::with_row_stride(&mut out[..22], 3, 4, 9).is_ok());
    let error = MatMut::with_row_stride(&mut out[..21], 3, 4, 9).unwrap_err();
    assert!(
        matches!(error, Error::BufferTooSmall { needed: 22, .. }),
        "{error}"
    );
}

#[test]
fn rows_that_overlap_cannot_be_written() {
    let mut out = [0.0f32; 64];
    let error = MatMut::with_row_stride(&mut out, 3, 4, 3).unwrap_err();
    assert!(error.to_string().starts_with("row_stride:"), "{error}");
    assert!(MatMut::with_row_stride(&mut out, 3, 4, 4).is_ok());
    assert!(
        MatMut::with_row_stride(&mut out, 1, 4, 0).is_ok(),
        "one row overlaps with nothing"
    );
}

#[test]
fn sizes_beyond_the_address_space_are_refused() {
    let mut data = [0.0f32; 4];
    for (rows, cols, row_stride, col_stride) in [
        (usize::MAX, 2, 2, 1),
        (2, usize::MAX, 1, 1),
        (2, 2, usize::MAX, 1),
        (2, 2, 1, usize::MAX),
        (1 << 40, 1 << 40, 1 << 40, 1),
        (2, 2, usize::MAX / 2, usize::MAX / 2),
    ] {
        let error = MatRef::with_strides(&data, rows, cols, row_stride, col_stride).unwrap_err();
        assert!(matches!(error, Error::Overflow { .. }), "{error}");
    }
    for (rows, cols) in [(usize::MAX, 2), (1 << 40, 1 << 40)] {
        let error = MatMut::new(&mut data, rows, cols).unwrap_err();
        assert!(matches!(error, Error::Overflow { .. }), "{error}");
    }
}

#[test]
fn rows_outside_are_refused() {
    let data = [0.0f32; 12];
    let m = MatRef::new(&data, 4, 3).unwrap();
    for (start, step, count) in [
        (4, 1, 1),
        (0, 1, 5),
        (2, 2, 2),
        (0, 0, 1),
        (1, usize::MAX, 2),
        (usize::MAX, 1, 2),
    ] {
        let error = m.rows_from(start, step, count).unwrap_err();
        assert!(error.to_string().starts_with("rows:"), "{error}");
    }
    // None, and one row with a step that leads nowhere.
    for (start, step, count) in [(4, 1, 0), (usize::MAX, 1, 0), (3, usize::MAX, 1)] {
        assert_eq!(m.rows_from(start, step, count).unwrap().rows(), count);
    }
}

/// Strides of matrices without elements point nowhere, and nobody follows them.
#[test]
fn no_elements_with_any_stride() {
    let wild = usize::MAX / 2 + 1;
    for (rows, cols) in [(0, 5), (5, 0), (0, 0)] {
        let m = MatRef::<f32>::with_strides(&[], rows, cols, wild, wild).unwrap();
        assert_eq!((m.rows(), m.cols(), m.get(0, 0)), (rows, cols, None));
        assert_eq!((m.transposed().rows(), m.transposed().cols()), (cols, rows));
        assert_eq!(m.rows_from(rows / 2, 2, rows / 2).unwrap().rows(), rows / 2);
        assert_eq!(AnyMatRef::from(m).rows(), rows);
        let mut out = MatMut::<f32>::with_row_stride(&mut [], rows, cols, wild).unwrap();
        for i in 0..rows {
            assert!(out.row_mut(i).is_empty());
        }
    }
}

/// The stride of a single row or column may be anything: it is never walked. (Found by the fuzz target `capi`.)
#[test]
fn a_single_row_or_column_with_any_stride() {
    let cpu = Cpu::new();
    let product = |w: MatRef<'_, f32>, out_stride: usize| {
        let x = [1.5f32, -2.0, 0.25];
        let x = MatRef::with_strides(&x[..w.cols()], 1, w.cols(), usize::MAX, 1).unwrap();
        let mut packed = PackedMatrices::new(&cpu, w.rows(), w.cols(), DType::F32).unwrap();
        packed.push(&cpu, w.into(), None).unwrap();
        let mut y = vec![f32::NAN; w.rows()];
        let out = MatMut::with_row_stride(&mut y, 1, w.rows(), out_stride).unwrap();
        let groups = Groups::Single { rows: 1, expert: 0 };
        let mut scratch = vec![0; scratch_bytes(&cpu)];
        grouped_gemm_into(
            &cpu,
            x.into(),
            None,
            &packed,
            groups,
            None,
            out.into(),
            &mut scratch,
        )
        .unwrap();
        y
    };
    let data = [2.0f32, 3.0, 4.0];
    for any in [0, 1, 7, isize::MAX as usize, usize::MAX] {
        let row = MatRef::with_strides(&data, 1, 3, any, 1).unwrap();
        assert_eq!(product(row, any), [3.0 - 6.0 + 1.0]);
        let column = MatRef::with_strides(&data, 3, 1, 1, any).unwrap();
        assert_eq!(product(column, any), [3.0, 4.5, 6.0]);
    }
}
