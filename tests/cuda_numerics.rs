//! The functions of `kernels/include/numerics.cuh` on the GPU against the CPU's, bit by bit, through a kernel that does not ship.
//!
//! The CPU's functions are private to the crate, so both sides are compared with the same file of hashes, which a unit test of theirs pins.
#![cfg(feature = "cuda")]
#![allow(unsafe_code)] // loads and launches by hand

mod common;
#[path = "common/gpu.rs"]
mod gpu;

use common::hash_bits;
use cudarc::driver::{result, sys};
use gpu::Gpu;
use half::{bf16, f16};
use std::ffi::{CString, c_void};

const PTX: &str = include_str!("../kernels/probes/numerics_probe.ptx");
/// Function, FNV-1a of its values for `sample`.
const BITS: &str = include_str!("../src/cpu/simd/math/bits.txt");

// Places in the kernel's switch. The first 13 are in the order of the file.
const F32_TO_BF16: u32 = 13;
const F32_TO_F16: u32 = 14;
const BF16_TO_F32: u32 = 15;
const F16_TO_F32: u32 = 16;
const EXP_NORMAL: u32 = 17;

/// `ProbeParams` of the kernel.
#[repr(C)]
struct Params {
    x: u64,
    y: u64,
    n: u32,
    function: u32,
}

struct Probe {
    gpu: Gpu,
    function: sys::CUfunction,
}

impl Probe {
    fn open() -> Option<Self> {
        let gpu = gpu::open()?;
        gpu.cuda.context().bind_to_thread().unwrap();
        let text = CString::new(PTX).unwrap();
        let name = CString::new("moe_numerics_probe").unwrap();
        // SAFETY: the text ends with a NUL; the module stays loaded until the process ends.
        let function = unsafe {
            let module = result::module::load_data(text.as_ptr().cast()).unwrap();
            result::module::get_function(module, name).unwrap()
        };
        Some(Self { gpu, function })
    }

    fn apply(&self, function: u32, x: &[f32]) -> Vec<f32> {
        let (input, output) = (self.gpu.upload(x), self.gpu.filled::<f32>(x.len(), 0xff));
        let mut params = Params {
            x: input.ptr().0,
            y: output.ptr().0,
            n: x.len() as u32,
            function,
        };
        let mut arguments = [(&raw mut params).cast::<c_void>()];
        let stream = self.gpu.stream.cu_stream();
        // SAFETY: the kernel takes this struct; both buffers outlive the download, which waits for the stream.
        unsafe {
            result::launch_kernel(
                self.function,
                (64, 1, 1),
                (64, 1, 1),
                0,
                stream,
                &mut arguments,
            )
        }
        .unwrap();
        self.gpu.download(&output)
    }
}

/// The sample of src/cpu/simd/math/tests.rs: any bit pattern, numbers up to ±120, numbers in 0..1.
fn sample() -> Vec<f32> {
    let mut rng = common::Rng(20);
    (0..3 << 16)
        .map(|i| {
            let bits = (rng.next_u64() >> 32) as u32;
            match i % 3 {
                0 => f32::from_bits(bits),
                1 => ((bits >> 8) as f32 / 16_777_216.0 - 0.5) * 240.0,
                _ => (bits >> 8) as f32 / 16_777_216.0,
            }
        })
        .collect()
}

#[test]
fn every_function_has_the_bits_of_the_cpu() {
    let Some(probe) = Probe::open() else { return };
    let sample = sample();
    let positive: Vec<f32> = sample.iter().map(|x| x.abs()).collect();
    let mut tested = 0;
    for (place, line) in BITS.lines().filter(|l| !l.starts_with('#')).enumerate() {
        let (name, pinned) = line.split_once(' ').unwrap();
        let x = if name == "Log1p" { &positive } else { &sample };
        let found = probe.apply(place as u32, x);
        assert_eq!(format!("{:016x}", hash_bits(&found)), pinned, "{name}");
        tested += 1;
    }
    assert_eq!(tested, 13);
    let (short, long) = (probe.apply(EXP_NORMAL, &sample), probe.apply(0, &sample));
    common::assert_same_bits(&short, &long, "exp_normal");
}

#[test]
fn every_16_bit_number_is_converted_as_by_half() {
    let Some(probe) = Probe::open() else { return };
    let all: Vec<f32> = (0..=u32::from(u16::MAX)).map(f32::from_bits).collect();
    let wide = |of: &dyn Fn(u16) -> f32| (0..=u16::MAX).map(of).collect::<Vec<_>>();
    let expected = wide(&|b| bf16::from_bits(b).to_f32());
    common::assert_same_bits(&probe.apply(BF16_TO_F32, &all), &expected, "bf16");
    let expected = wide(&|b| f16::from_bits(b).to_f32());
    common::assert_same_bits(&probe.apply(F16_TO_F32, &all), &expected, "f16");
    // Narrowing: each number of the format, its neighbours, the ties between two, and the sample; NaN too has the CPU's bits.
    for (function, shift) in [(F32_TO_BF16, 16), (F32_TO_F16, 13)] {
        let mut x = sample();
        for b in 0..=u16::MAX {
            let exact = match function {
                F32_TO_BF16 => bf16::from_bits(b).to_f32().to_bits(),
                _ => f16::from_bits(b).to_f32().to_bits(),
            };
            let tie = exact.wrapping_add(1 << (shift - 1));
            x.extend(
                [
                    exact,
                    exact.wrapping_sub(1),
                    tie - 1,
                    tie,
                    tie.wrapping_add(1),
                ]
                .map(f32::from_bits),
            );
        }
        let found: Vec<u32> = probe
            .apply(function, &x)
            .iter()
            .map(|y| y.to_bits())
            .collect();
        for (x, found) in x.iter().zip(found) {
            let expected = match function {
                F32_TO_BF16 => bf16::from_f32(*x).to_bits(),
                _ => f16::from_f32(*x).to_bits(),
            };
            assert_eq!(
                found,
                u32::from(expected),
                "{function}: {:08x}",
                x.to_bits()
            );
        }
    }
}
