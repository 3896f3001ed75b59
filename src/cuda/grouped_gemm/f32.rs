//! Exact f32 products: the plans of kernels/grouped_gemm_f32.cu.
