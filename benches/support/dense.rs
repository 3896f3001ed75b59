//! Dense products of other crates, for one expert at a time.
#![allow(unsafe_code)] // both crates take raw pointers

use moe_kernels::Element;

/// `out [m, n] = x [m, k] · w [n, k]ᵀ`, all row-major.
pub trait Product<T> {
    const NAME: &'static str;
    fn multiply(threads: usize, k: usize, x: &[T], w: &[T], out: &mut [T]);
}

/// The `gemm` crate, which has f32 and f16.
pub struct GemmCrate;

impl<T: Element> Product<T> for GemmCrate {
    const NAME: &'static str = "gemm crate";

    fn multiply(threads: usize, k: usize, x: &[T], w: &[T], out: &mut [T]) {
        let (m, n) = (x.len() / k, w.len() / k);
        assert_eq!((x.len(), w.len(), out.len()), (m * k, n * k, m * n));
        let parallelism = match threads {
            1 => gemm::Parallelism::None,
            _ => gemm::Parallelism::Rayon(threads),
        };
        let (zero, one) = (narrow::<T>(0.0), narrow::<T>(1.0));
        let (k_stride, n_stride) = (k as isize, n as isize);
        let (out, x, w) = (out.as_mut_ptr(), x.as_ptr(), w.as_ptr());
        // SAFETY: the slices hold m × n, m × k and n × k numbers, by the assertion; T is one of the crate's types.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                out,
                1,
                n_stride,
                false,
                x,
                1,
                k_stride,
                w,
                k_stride,
                1,
                zero,
                one,
                false,
                false,
                false,
                parallelism,
            );
        }
    }
}

/// `matrixmultiply`, which has f32. Its threads come from the environment.
pub struct Matrixmultiply;

impl Product<f32> for Matrixmultiply {
    const NAME: &'static str = "matrixmultiply";

    fn multiply(_: usize, k: usize, x: &[f32], w: &[f32], out: &mut [f32]) {
        let (m, n) = (x.len() / k, w.len() / k);
        assert_eq!((x.len(), w.len(), out.len()), (m * k, n * k, m * n));
        let (k_stride, n_stride) = (k as isize, n as isize);
        let (out, x, w) = (out.as_mut_ptr(), x.as_ptr(), w.as_ptr());
        // SAFETY: the slices hold m × n, m × k and n × k numbers, by the assertion.
        unsafe {
            matrixmultiply::sgemm(
                m, k, n, 1.0, x, k_stride, 1, w, 1, k_stride, 0.0, out, n_stride, 1,
            );
        }
    }
}

/// Rounded to nearest.
pub fn narrow<T: Element>(x: f32) -> T {
    T::from_f32_nearest(x)
}
