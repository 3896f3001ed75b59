//! Ids to offsets and both permutations on the GPU, and row copies: plans, raw and safe entry of kernels/permute.cu.
