//! Kernels for mixture-of-experts layers: gating, token permutation, grouped matrix products over ragged experts, and the weighted combine.
//!
//! A mixture-of-experts layer sends each token through a few of many small networks. This crate computes such a layer, or any of its stages, on the
//! caller's memory, with **the same bits on every CPU**: scalar, AVX2, AVX-512 or NEON, for any number of threads, and for a token alone or in any batch.
//!
//! # The data flow
//!
//! ```text
//!  x[T,H] ──▶ gate ──▶ logits[T,R] ──▶ routing ──▶ ids[T,K], weights[T,K]
//!    │                                                │
//!    │                                             permute ──▶ offsets[E+1], pair_of_row, row_of_pair
//!    ▼                                                ▼
//!  grouped_gemm: rows gathered by expert · W_gate_up[E,2I,H]ᵀ, activation ──▶ h[TK,I]
//!    ▼
//!  grouped_gemm: h · W_down[E,H,I]ᵀ ──▶ ys[TK,H]
//!    ▼
//!  combine: y[t] = Σ_slot weights[t,slot] · ys[row_of_pair[t·K + slot]] (+ shared experts, norm, bias, residual)
//! ```
//!
//! # Vocabulary
//!
//! | | |
//! |---|---|
//! | T, H, I, E, K | tokens, hidden width, intermediate width, experts, experts of a token |
//! | R | columns of the logits: E, plus experts without weights and jointly scored shared experts |
//! | pair | t·K + slot: one token's visit to one expert |
//! | row | a pair's place after sorting by expert |
//! | `offsets[E+1]` | where each expert's rows begin |
//! | `pair_of_row`, `row_of_pair` | the sorting permutation and its inverse |
//!
//! # A worked example
//!
//! Three tokens choose two of four experts each:
//!
//! ```
//! use moe_kernels::routing::{RouteInput, Router, RouterConfig, Routing};
//! use moe_kernels::{Cpu, MatRef};
//!
//! let logits = [
//!     2.0f32, 0.0, 3.0, 1.0, // token 0: experts 2 and 0
//!     0.0, -1.0, 3.0, 2.0, // token 1: experts 2 and 3
//!     3.0, 0.0, 2.0, 1.0, // token 2: experts 0 and 2
//! ];
//! let cpu = Cpu::new();
//! let router = Router::new(RouterConfig::mixtral(4, 2))?;
//! let mut routing = Routing::with_capacity(3, &router)?;
//! router.route(&cpu, &RouteInput::new(MatRef::new(&logits, 3, 4)?), &mut routing)?;
//!
//! assert_eq!(routing.ids(), [2, 0, 2, 3, 0, 2]);
//! let p = routing.permutation();
//! assert_eq!(p.offsets(), [0, 2, 2, 5, 6]); // expert 1 got nothing
//! assert_eq!(p.pair_of_row(), [1, 4, 0, 2, 5, 3]);
//! assert_eq!(p.row_of_pair(), [2, 0, 3, 5, 1, 4]);
//! let pair_sum = routing.weights()[0] + routing.weights()[1];
//! assert!((pair_sum - 1.0).abs() < 1e-6); // Mixtral's weights add up to 1
//! # Ok::<(), moe_kernels::Error>(())
//! ```
//!
//! [`moe::MoeLayer`] shows the whole layer in one call.
//!
//! # The rooms
//!
//! Five stems name the work, the same in `src`, `src/cpu`, `tests` and `benches`:
//!
//! * [`routing`]: [`routing::RouterConfig`] says what a family's router does, [`routing::Router`] does it, [`routing::Routing`] holds the answer and proves
//!   it sound; load statistics come with it.
//! * [`permute`]: the stable sort of pairs by expert, and row copies for those who want them.
//! * [`grouped_gemm`]: packed weights, the ragged product, activations. [`experts`] puts two of them together.
//! * [`combine`]: the weighted sum and what follows it. [`norm`] is the RMS norm that some layers have.
//! * [`moe`]: the layer.
//!
//! Beside them: [`losses`] (load balancing, z-loss, bias update), [`mod@reference`] (the same in f64 and plain loops: the specification and oracle), [`cpu`]
//! (which instruction set, how many threads, and the machine's ceilings), views of the caller's memory ([`MatRef`], [`MatMut`]) and one [`Error`].
//!
//! # Contracts
//!
//! * **D1** The same bits from run to run and for any number of threads.
//! * **D2** A token's output has the same bits alone, in any batch, at any position. (Routers that look at several tokens by definition are the exception: capacity,
//!   expert choice, Doge's stacked product keys.)
//! * **D3** The same bits on every instruction set, for f32, f16 and bf16 weights.
//! * Selection is by value, equal values go to the lower index, NaN ranks below −∞; ids are in range and distinct however bad the logits; a row of NaN
//!   harms no other row.
//! * Bad input is an [`Error`] that names the argument, and nothing has been written. Nothing panics.
//! * A forward call allocates nothing. Work runs on the caller's current rayon pool, or on the calling thread.
//!
//! NaN payloads are outside the contract. How it is kept: every output element is one chain of fused multiply-adds in a fixed order (see
//! [`grouped_gemm`]), every reduction has one shape, exp, log, tanh and erf are the crate's own polynomials, and nothing is decided by an atomic.
//!
//! # Features
//!
//! * `parallel` (default): threads by rayon. Without it every call runs on the calling thread; so it does on wasm32.
//! * `cuda`: the same on NVIDIA GPUs, in the module `cuda`. Needs a driver to run and nothing to build. Its kernels have not run on a GPU yet; they are tested
//!   on an emulator.
//! * `proptest`: strategies to fuzz other kernels against [`mod@reference`].
//! * `capi`: the C functions of `include/moe_kernels.h`.

pub mod combine;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod element;
pub mod error;
pub mod experts;
#[cfg(feature = "capi")]
pub mod ffi;
pub mod grouped_gemm;
pub mod losses;
pub mod matrix;
pub mod moe;
pub mod norm;
pub mod permute;
pub mod reference;
pub mod routing;
mod shape;
mod spec;
#[cfg(feature = "proptest")]
pub mod strategies;
mod workspace;

pub use cpu::Cpu;
pub use cpu::isa::Isa;
pub use element::{DType, Element};
pub use error::{Error, Result};
pub use matrix::{AnyMatMut, AnyMatRef, MatMut, MatRef};
