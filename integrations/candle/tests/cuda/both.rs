//! The GPU, and one layer on it and on the CPU.

use candle_core::{DType, Device, Result, Tensor};
use moe_kernels::routing::{RouterConfig, Routing};
use moe_kernels::{MatMut, MatRef};
use moe_kernels_candle::cuda::{CudaMoeLayer, Experts};
use moe_kernels_candle::{Activation, Cpu, MoeLayer, experts, moe_kernels};

/// A layer's sizes: E, K, H, I.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub e: usize,
    pub k: usize,
    pub h: usize,
    pub i: usize,
}

/// Multiples of nothing: no load is a vector's.
pub const ODD: Sizes = Sizes {
    e: 6,
    k: 2,
    h: 34,
    i: 19,
};
/// What the tiles of tensor cores and Hopper's tensor maps take.
pub const EVEN: Sizes = Sizes {
    e: 4,
    k: 2,
    h: 64,
    i: 32,
};

/// The GPU, or `None` after saying so where there is none. With `cuda` in `MOE_KERNELS_REQUIRE` a missing GPU fails the test instead; one that is there but does not
/// work always does.
pub fn open() -> Option<Device> {
    match moe_kernels::cuda::Cuda::new(0) {
        Ok(_) => Some(Device::new_cuda(0).unwrap()),
        Err(why @ moe_kernels::Error::CudaUnavailable { .. }) => {
            let required = std::env::var("MOE_KERNELS_REQUIRE").unwrap_or_default();
            assert!(
                !required.split(',').any(|word| word.trim() == "cuda"),
                "cuda is required: {why}"
            );
            eprintln!("NOT RUN: no CUDA device ({why})");
            None
        }
        Err(why) => panic!("{why}"),
    }
}

/// Numbers that no symmetry can hide behind, on the CPU.
pub fn numbers<S: Into<candle_core::Shape>>(shape: S, dtype: DType, seed: u32) -> Tensor {
    let shape = shape.into();
    let data: Vec<f32> = (0..shape.elem_count() as u32)
        .map(|i| ((i + seed).wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0)
        .collect();
    let data = Tensor::from_vec(data, shape, &Device::Cpu).unwrap();
    data.to_dtype(dtype).unwrap()
}

pub fn values(t: &Tensor) -> Vec<f32> {
    let t = t.to_device(&Device::Cpu).unwrap();
    let t = t.flatten_all().unwrap().to_dtype(DType::F32).unwrap();
    t.to_vec1().unwrap()
}

pub fn bits(t: &Tensor) -> Vec<u32> {
    values(t).iter().map(|v| v.to_bits()).collect()
}

/// The error's text, without a backtrace.
pub fn refusal<T: std::fmt::Debug>(result: Result<T>) -> String {
    result.unwrap_err().to_string()
}

/// One layer twice.
pub struct Both {
    pub sizes: Sizes,
    /// `gate [E, H]`, `gate_up [E, 2I, H]`, `down [E, H, I]` on the CPU.
    pub weights: [Tensor; 3],
    pub cpu: MoeLayer,
    pub gpu: CudaMoeLayer,
}

impl Both {
    pub fn new(device: &Device, sizes: Sizes, dtype: DType) -> Self {
        let Sizes { e, k, h, i } = sizes;
        let gate = numbers((e, h), DType::F32, 1);
        let gate_up = numbers((e, 2 * i, h), dtype, 2);
        let down = numbers((e, h, i), dtype, 3);
        let (cpu, router) = (Cpu::new(), RouterConfig::mixtral(e, k));
        let packed = experts::fused(&cpu, &gate_up, &down, Activation::SWIGLU).unwrap();
        let on = |t: &Tensor| t.to_device(device).unwrap();
        let experts = Experts::fused(&on(&gate_up), &on(&down)).unwrap();
        Self {
            sizes,
            cpu: MoeLayer::new(cpu, router.clone(), &gate, packed).unwrap(),
            gpu: CudaMoeLayer::new(router, &on(&gate), experts, Activation::SWIGLU).unwrap(),
            weights: [gate, gate_up, down],
        }
    }

    /// The CPU's ids and weights `[T, K]` for x.
    pub fn routing(&self, x: &Tensor) -> (Tensor, Tensor) {
        let (tokens, h) = x.dims2().unwrap();
        let (x, mut y) = (values(x), vec![0.0; tokens * h]);
        let (cpu, layer) = (self.cpu.cpu(), self.cpu.layer());
        let mut routing = Routing::new();
        let mut workspace = vec![0; layer.workspace_size(&cpu, tokens).unwrap()];
        let out = MatMut::new(&mut y, tokens, h).unwrap().into();
        let x = MatRef::new(&x, tokens, h).unwrap().into();
        layer
            .forward(&cpu, x, out, &mut routing, &mut workspace)
            .unwrap();
        let shape = (tokens, self.sizes.k);
        let ids: Vec<u32> = routing.ids().iter().map(|&id| id as u32).collect();
        (
            Tensor::from_vec(ids, shape, &Device::Cpu).unwrap(),
            Tensor::from_slice(routing.weights(), shape, &Device::Cpu).unwrap(),
        )
    }

    /// How far y may be from the CPU's in a 16-bit format: an `ulp` of each h and of y, since sums in another order may round the other way.
    pub fn bound(&self, x: &Tensor, y: &[f32], ulp: f32) -> Vec<f32> {
        let Sizes { k, h, i, .. } = self.sizes;
        let [_, gate_up, down] = self.weights.each_ref().map(values);
        let (ids, weights) = self.routing(x);
        let (ids, weights) = (ids.flatten_all().unwrap(), values(&weights));
        let (ids, x) = (ids.to_vec1::<u32>().unwrap(), values(x));
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let mut bound: Vec<f32> = y.iter().map(|y| ulp * y.abs() + 1e-6).collect();
        for (pair, (&id, weight)) in ids.iter().zip(weights).enumerate() {
            let (token, id) = (pair / k, id as usize);
            let x = &x[token * h..][..h];
            let row = |r: usize| dot(&gate_up[(id * 2 * i + r) * h..][..h], x);
            let hidden: Vec<f32> = (0..i)
                .map(|r| (row(r) / (1.0 + (-row(r)).exp()) * row(i + r)).abs())
                .collect();
            for c in 0..h {
                let down = down[(id * h + c) * i..][..i].iter();
                let size: f32 = down.zip(&hidden).map(|(d, h)| d.abs() * h).sum();
                bound[token * h + c] += ulp * weight * size;
            }
        }
        bound
    }
}
