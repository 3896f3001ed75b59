//! Memory of the GPU for C calls, and both sides' handles.

use crate::common::Rng;
use crate::gpu::{self, Buffer, Gpu};
use crate::must;
use bytemuck::Zeroable;
use half::{bf16, f16};
use moe_kernels::ffi::*;
use std::ffi::c_void;
use std::ptr::{null, null_mut};

/// Numbers in one of the formats, as bytes that are aligned for all of them.
pub struct Stored {
    words: Vec<u64>,
    len: usize,
    pub dtype: moe_dtype,
}

impl Stored {
    pub fn new(dtype: moe_dtype, values: &[f32]) -> Self {
        let bytes: Vec<u8> = match dtype {
            MOE_DTYPE_BF16 => values
                .iter()
                .flat_map(|&v| bf16::from_f32(v).to_ne_bytes())
                .collect(),
            MOE_DTYPE_F16 => values
                .iter()
                .flat_map(|&v| f16::from_f32(v).to_ne_bytes())
                .collect(),
            _ => values.iter().flat_map(|v| v.to_ne_bytes()).collect(),
        };
        let mut words = vec![0u64; bytes.len().div_ceil(8)];
        bytemuck::cast_slice_mut::<_, u8>(&mut words)[..bytes.len()].copy_from_slice(&bytes);
        Self {
            words,
            len: bytes.len(),
            dtype,
        }
    }

    pub fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.len]
    }

    /// A part as the CPU's calls take it.
    pub fn host(&self, first: usize, rows: usize, cols: usize) -> moe_matrix {
        let size = size_of_dtype(self.dtype);
        let bytes = &self.bytes()[first * size..][..rows * cols * size];
        moe_matrix {
            data: bytes.as_ptr().cast(),
            bytes: bytes.len(),
            rows,
            cols,
            row_stride: cols as isize,
            col_stride: 1,
            dtype: self.dtype,
            reserved: 0,
        }
    }
}

pub fn size_of_dtype(dtype: moe_dtype) -> usize {
    if dtype == MOE_DTYPE_F32 { 4 } else { 2 }
}

pub fn host_out(out: &mut [f32], rows: usize, cols: usize) -> moe_matrix_mut {
    assert_eq!(out.len(), rows * cols);
    moe_matrix_mut {
        data: out.as_mut_ptr().cast(),
        bytes: size_of_val(out),
        rows,
        cols,
        row_stride: cols as isize,
        dtype: MOE_DTYPE_F32,
        reserved: 0,
    }
}

/// The GPU and what lies on it; without one the addresses are made up, and calls end at the driver at the latest.
pub struct Device {
    pub gpu: Option<Gpu>,
    buffers: Vec<Buffer<u8>>,
    next: u64,
}

/// An array on the GPU.
#[derive(Clone, Copy)]
pub struct Place {
    pub data: moe_device_ptr,
    /// Elements.
    pub len: usize,
    index: usize,
}

impl Device {
    /// `None`, with a word about it, where nothing can run.
    pub fn open() -> Option<Self> {
        gpu::open().map(|gpu| Self::with(Some(gpu)))
    }

    /// With made-up addresses where nothing can run.
    pub fn open_or_not() -> Self {
        Self::with(gpu::open())
    }

    /// Addresses that are never followed, even where there is a GPU.
    pub fn made_up() -> Self {
        Self::with(None)
    }

    fn with(gpu: Option<Gpu>) -> Self {
        Self {
            gpu,
            buffers: Vec::new(),
            next: 1 << 20,
        }
    }

    pub fn gpu(&self) -> &Gpu {
        self.gpu.as_ref().expect("a GPU")
    }

    pub fn stream(&self) -> *mut c_void {
        match &self.gpu {
            Some(gpu) => gpu.stream.cu_stream().cast(),
            None => null_mut(),
        }
    }

    pub fn put<V: bytemuck::Pod>(&mut self, values: &[V]) -> Place {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let data = match &self.gpu {
            Some(gpu) => {
                self.buffers.push(gpu.upload(bytes));
                gpu.synchronize();
                self.buffers[self.buffers.len() - 1].ptr().0
            }
            None => self.next,
        };
        self.next += bytes.len().next_multiple_of(256) as u64 + 256;
        Place {
            data,
            len: values.len(),
            index: self.buffers.len().wrapping_sub(1),
        }
    }

    /// Four-byte elements that hold nothing good: NaN or −1.
    pub fn poisoned(&mut self, len: usize) -> Place {
        self.put(&vec![u32::MAX; len])
    }

    /// Whether nothing has been written to what `poisoned` gave.
    pub fn is_poisoned(&self, place: Place) -> bool {
        self.read::<u32>(place).iter().all(|&v| v == u32::MAX)
    }

    pub fn read<V: bytemuck::Pod>(&self, place: Place) -> Vec<V> {
        let bytes = self.gpu().download(&self.buffers[place.index]);
        bytemuck::pod_collect_to_vec(&bytes)
    }

    pub fn store(&mut self, stored: &Stored, rows: usize, cols: usize) -> moe_device_matrix {
        let place = self.put(stored.bytes());
        device_matrix(place.data, rows, cols, stored.dtype)
    }

    pub fn store_weights(&mut self, stored: &Stored, shape: [usize; 3]) -> moe_device_weights {
        let place = self.put(stored.bytes());
        let [experts, rows, cols] = shape;
        moe_device_weights {
            data: place.data,
            bytes: stored.len,
            experts,
            rows,
            cols,
            expert_stride: (rows * cols) as isize,
            row_stride: cols as isize,
            dtype: stored.dtype,
            reserved: 0,
        }
    }
}

pub fn device_matrix(
    data: moe_device_ptr,
    rows: usize,
    cols: usize,
    dtype: moe_dtype,
) -> moe_device_matrix {
    moe_device_matrix {
        data,
        bytes: rows * cols * size_of_dtype(dtype),
        rows,
        cols,
        row_stride: cols as isize,
        dtype,
        reserved: 0,
    }
}

/// One thread of this CPU.
pub struct CpuHandle(pub *mut moe_cpu);

impl CpuHandle {
    pub fn new() -> Self {
        let mut cpu = null_mut();
        // SAFETY: a place for the handle.
        must(unsafe { moe_cpu_create(null(), &mut cpu) });
        Self(cpu)
    }
}

impl Drop for CpuHandle {
    fn drop(&mut self) {
        // SAFETY: a living handle, used no more.
        must(unsafe { moe_cpu_destroy(self.0) });
    }
}

/// A router that both sides use.
pub struct RouterHandle(pub *mut moe_router);

impl RouterHandle {
    pub fn new(family: &std::ffi::CStr, change: impl FnOnce(&mut moe_router_config)) -> Self {
        let mut config = moe_router_config::zeroed();
        config.struct_size = size_of::<moe_router_config>();
        let mut router = null_mut();
        // SAFETY: a struct as long as it says, and a place.
        unsafe {
            must(moe_router_config_family(
                &mut config,
                family.as_ptr(),
                crate::E,
                crate::K,
            ));
            change(&mut config);
            must(moe_router_create(&config, &mut router));
        }
        Self(router)
    }

    pub fn set(&self, correction_bias: &[f32], per_expert_scale: &[f32]) {
        // SAFETY: a living handle and arrays as long as they say.
        unsafe {
            must(moe_router_set_correction_bias(
                self.0,
                correction_bias.as_ptr(),
                correction_bias.len(),
            ));
            must(moe_router_set_per_expert_scale(
                self.0,
                per_expert_scale.as_ptr(),
                per_expert_scale.len(),
            ));
        }
    }
}

impl Drop for RouterHandle {
    fn drop(&mut self) {
        // SAFETY: a living handle, used no more.
        must(unsafe { moe_router_destroy(self.0) });
    }
}

pub fn scaled(rng: &mut Rng, n: usize, fan_in: usize) -> Vec<f32> {
    let scale = 1.0 / (fan_in as f32).sqrt();
    rng.normals(n).into_iter().map(|v| v * scale).collect()
}
