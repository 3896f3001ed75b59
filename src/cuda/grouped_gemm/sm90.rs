//! Tensor-core products for Hopper: the plans of kernels/grouped_gemm_sm90.cu.
