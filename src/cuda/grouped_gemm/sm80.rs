//! Tensor-core products for Ampere and later: the plans of kernels/grouped_gemm_sm80.cu.
