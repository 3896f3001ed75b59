//! Mixture-of-experts kernels.
pub mod cpu;
pub mod element;
pub mod error;
pub mod experts;
pub mod grouped_gemm;
pub mod matrix;
pub mod reference;
pub mod routing;
pub mod shape;

pub use cpu::Cpu;
pub use cpu::isa::Isa;
pub use element::{DType, Element};
pub use error::{Error, Result};
pub use matrix::{AnyMatMut, AnyMatRef, MatMut, MatRef};
pub use shape::MoeShape;
