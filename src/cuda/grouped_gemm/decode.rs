//! Products of few rows: the plans of kernels/grouped_gemm_decode.cu.
