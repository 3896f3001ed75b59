//! Ids and weights from logits on the GPU: plans, raw and safe entry of kernels/routing.cu.
