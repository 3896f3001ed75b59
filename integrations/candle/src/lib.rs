//! [`moe_kernels`] behind candle's tensors: one call in place of a model's sparse-MoE block.
//!
//! ```
//! use candle_core::{DType, Device, Module, Tensor};
//! use moe_kernels_candle::{Activation, Cpu, MoeLayer, RouterConfig, experts};
//!
//! let (e, k, h, i, device) = (4, 2, 16, 8, Device::Cpu);
//! let gate_up = Tensor::randn(0f32, 0.1, (e, 2 * i, h), &device)?.to_dtype(DType::BF16)?;
//! let down = Tensor::randn(0f32, 0.1, (e, h, i), &device)?.to_dtype(DType::BF16)?;
//! let gate = Tensor::randn(0f32, 0.1, (e, h), &device)?.to_dtype(DType::BF16)?;
//!
//! let cpu = Cpu::new();
//! let packed = experts::fused(&cpu, &gate_up, &down, Activation::SWIGLU)?;
//! let layer = MoeLayer::new(cpu, RouterConfig::mixtral(e, k), &gate, packed)?;
//! drop((gate_up, down, gate)); // the weights are packed; candle's copy is not needed any more
//!
//! let x = Tensor::randn(0f32, 1.0, (2, 3, h), &device)?.to_dtype(DType::BF16)?;
//! let y = layer.forward(&x)?;
//! assert_eq!((y.dims(), y.dtype()), ([2, 3, h].as_slice(), DType::BF16));
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! * [`MoeLayer`]: the layer and its calls. They are candle custom ops: each reads the tensors where they lie, through their strides, and writes
//!   the output tensor once. Beyond the output tensor a call allocates nothing once its [`Workspaces`] are as large as the largest batch.
//! * [`experts`]: packed experts from tensors in candle's layouts.
//! * [`models`]: whole layers from a `VarBuilder`, for the models of candle-transformers that have experts.
//! * [`config`]: routers and activations from candle's configurations.
//!
//! * `cuda` (feature of this name): the layer on candle's CUDA devices.
//!
//! Tensors are f32, f16 or bf16, here on the CPU. The bits of a result follow [`moe_kernels`]' contracts: they depend on neither threads, nor instruction set,
//! nor the batch that a token came in. Work runs on the caller's current rayon pool, which is the one that candle uses.
//!
//! Errors are `candle_core::Error`; what [`moe_kernels`] refused is inside and names the argument. Nothing panics, and nothing has been written.
//! Gradients: a backward pass through the layer is an error, not a zero.

pub mod config;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod experts;
mod layer;
pub mod models;
mod ops;
mod view;
mod workspaces;

pub use layer::MoeLayer;
pub use moe_kernels;
pub use moe_kernels::Cpu;
pub use moe_kernels::grouped_gemm::Activation;
pub use moe_kernels::routing::RouterConfig;
pub use workspaces::Workspaces;
