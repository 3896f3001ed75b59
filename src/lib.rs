//! Mixture-of-experts kernels.
pub mod combine;
pub mod cpu;
pub mod element;
pub mod error;
pub mod experts;
pub mod grouped_gemm;
pub mod losses;
pub mod matrix;
pub mod moe;
pub mod norm;
pub mod permute;
pub mod reference;
pub mod routing;
pub mod shape;
mod workspace;

pub use cpu::Cpu;
pub use cpu::isa::Isa;
pub use element::{DType, Element};
pub use error::{Error, Result};
pub use matrix::{AnyMatMut, AnyMatRef, MatMut, MatRef};
pub use shape::MoeShape;
