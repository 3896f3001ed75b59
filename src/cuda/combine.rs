//! The weighted sum on the GPU: plans, raw and safe entry of kernels/combine.cu.
