//! The layer on candle's CUDA devices (feature `cuda`).
//!
//! **It has not run on a GPU yet**: its tests run on an emulated driver, see the README.
//!
//! [`CudaMoeLayer`] has the calls of [`MoeLayer`](crate::MoeLayer) on tensors of a GPU. Weights are not packed: they are used where candle has them ([`Experts`] names
//! the layouts), and the tensors are kept alive. A call allocates its output tensor and queues some ten launches on the stream of x's device; it waits for nothing and copies
//! nothing back. Scratch memory is kept between calls ([`CudaWorkspaces`]).
//!
//! ```no_run
//! use candle_core::{DType, Device, Tensor};
//! use moe_kernels_candle::cuda::{CudaMoeLayer, Experts};
//! use moe_kernels_candle::{Activation, RouterConfig};
//!
//! let (e, k, h, i, device) = (128, 8, 2048, 768, Device::new_cuda(0)?);
//! let zeros = |shape: (usize, usize, usize)| Tensor::zeros(shape, DType::BF16, &device);
//! let (gate_up, down) = (zeros((e, 2 * i, h))?, zeros((e, h, i))?);
//! let gate = Tensor::zeros((e, h), DType::BF16, &device)?;
//! let experts = Experts::fused(&gate_up, &down)?;
//! let layer = CudaMoeLayer::new(RouterConfig::mixtral(e, k), &gate, experts, Activation::SWIGLU)?;
//! let y = layer.forward(&Tensor::zeros((2, 3, h), DType::BF16, &device)?)?;
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! # How kernels are run
//! The launches come from [`moe_kernels::cuda::moe::CudaMoeLayer::plan`] as plain data. Kernels are loaded as candle loads custom ones (`CudaDevice::get_or_load_custom_func`) and
//! launched through cudarc's builder on candle's stream. That builder has neither clusters nor tensor maps: the launches that want them, which are Hopper's, go through
//! [`moe_kernels::cuda::Cuda::launch`] on the same stream.
//!
//! # Streams and threads
//! Work is queued on the stream of x's device, as candle's own operations do. The stream of `Device::new_cuda` is the calling thread's: a tensor made by one thread is not ordered
//! with another thread's work, by candle as little as here. `Device::new_cuda_with_stream` has a stream that all threads share.
//!
//! # Graph capture
//! Make one call of the largest batch first (it loads the kernels and makes the workspace), give the layer [`CudaWorkspaces`] of its own, do not clear them or call with a larger batch as long
//! as the graph lives, and write into an existing tensor ([`forward_into`](CudaMoeLayer::forward_into)).

mod launch;
mod layer;
mod operands;
mod ops;
mod weights;
mod workspaces;

pub use layer::CudaMoeLayer;
pub use weights::{Experts, SharedWeights, Weights};
pub use workspaces::CudaWorkspaces;
