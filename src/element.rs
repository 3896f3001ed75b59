//! The number formats of weights and activations.

use core::fmt;
use half::{bf16, f16};
use num_traits::AsPrimitive;

/// A number format, as a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16: the upper half of a binary32. Its subnormals read as zero in a GEMM (see [`crate::grouped_gemm`]).
    BF16,
}

impl DType {
    /// Every format.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::BF16];

    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// The name used on command lines and in reports: `f32`, `f16`, `bf16`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// A Rust type that holds one number of a [`DType`].
///
/// Widening to f32 is exact; narrowing rounds to nearest, ties to even.
pub trait Element:
    sealed::Sealed + bytemuck::Pod + AsPrimitive<f32> + PartialEq + fmt::Debug + Default + Send + Sync
{
    /// The format as a value.
    const DTYPE: DType;

    /// Rounds to nearest, ties to even; beyond the largest finite number, to infinity.
    fn from_f32_nearest(x: f32) -> Self;

    /// Exact.
    #[inline]
    fn to_f32(self) -> f32 {
        self.as_()
    }
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;

    #[inline]
    fn from_f32_nearest(x: f32) -> Self {
        x
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;

    #[inline]
    fn from_f32_nearest(x: f32) -> Self {
        f16::from_f32(x)
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::BF16;

    #[inline]
    fn from_f32_nearest(x: f32) -> Self {
        bf16::from_f32(x)
    }
}

/// A subnormal bf16 becomes a zero of the same sign: what the native dot products of x86 and Arm do with their inputs.
#[inline]
pub(crate) fn flush_bf16(x: bf16) -> bf16 {
    let bits = x.to_bits();
    if bits & 0x7f80 == 0 {
        bf16::from_bits(bits & 0x8000)
    } else {
        x
    }
}
