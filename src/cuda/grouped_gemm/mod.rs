//! The ragged grouped product on the GPU.

pub mod decode;
pub mod f32;
pub mod params;
pub mod sm80;
pub mod sm90;
