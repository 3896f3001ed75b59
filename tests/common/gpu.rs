//! A GPU for tests: a real one, or the emulator where its `libcuda.so.1` comes first on `LD_LIBRARY_PATH`.
#![allow(dead_code, unsafe_code)] // each test file uses its own part; launches take raw pointers

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaGraph, CudaSlice, CudaStream, CudaView, DevicePtrMut as _};
use moe_kernels::cuda::{Cuda, DevicePtr, Launch};
use std::marker::PhantomData;
use std::sync::Arc;

/// A device and a stream of its own. Event tracking is off: all work of a test goes to this one stream, which so can be captured.
pub struct Gpu {
    pub cuda: Cuda,
    pub stream: Arc<CudaStream>,
}

/// Device memory of `len` values.
pub struct Buffer<T> {
    pub bytes: CudaSlice<u8>,
    len: usize,
    ptr: DevicePtr,
    kind: PhantomData<T>,
}

impl<T> Buffer<T> {
    pub fn ptr(&self) -> DevicePtr {
        self.ptr
    }

    pub fn len(&self) -> usize {
        self.len
    }
}

impl<T> Buffer<T> {
    /// The same memory for the safe API.
    pub fn view(&self) -> CudaView<'_, T> {
        // SAFETY: the buffer was made for so many values of T, and every T here is plain data.
        unsafe { self.bytes.transmute(self.len) }.expect("as long as it was made")
    }

    pub fn view_mut(&mut self) -> cudarc::driver::CudaViewMut<'_, T> {
        // SAFETY: as above.
        unsafe { self.bytes.transmute_mut(self.len) }.expect("as long as it was made")
    }
}

/// The GPU, or `None` after saying so where there is none. With `cuda` in `MOE_KERNELS_REQUIRE` a missing GPU fails the test instead; a driver that is there but
/// does not work always does.
pub fn open() -> Option<Gpu> {
    let cuda = match Cuda::new(0) {
        Ok(cuda) => cuda,
        Err(why @ moe_kernels::Error::CudaUnavailable { .. }) => {
            let required = std::env::var("MOE_KERNELS_REQUIRE").unwrap_or_default();
            assert!(
                !required.split(',').any(|word| word.trim() == "cuda"),
                "cuda is required: {why}"
            );
            eprintln!("NOT RUN: no CUDA device ({why})");
            return None;
        }
        Err(why) => panic!("{why}"),
    };
    // SAFETY: nothing of this context is in use on several streams.
    unsafe { cuda.context().disable_event_tracking() };
    let stream = cuda.context().new_stream().unwrap();
    Some(Gpu { cuda, stream })
}

impl Gpu {
    /// Whether the emulator answers instead of a GPU.
    pub fn is_emulated(&self) -> bool {
        self.cuda.name().unwrap().contains("emulator")
    }

    /// Device memory that holds `values`.
    pub fn upload<T: bytemuck::Pod>(&self, values: &[T]) -> Buffer<T> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        // One byte at least: the driver refuses an empty allocation.
        // SAFETY: what is not written below is beyond the buffer's length and never read.
        let mut slice = unsafe { self.stream.alloc::<u8>(bytes.len().max(1)) }.unwrap();
        if !bytes.is_empty() {
            self.stream
                .memcpy_htod(bytes, &mut slice.slice_mut(..bytes.len()))
                .unwrap();
        }
        self.buffer(slice, values.len())
    }

    /// Device memory full of zero bits.
    pub fn zeros<T: bytemuck::Pod>(&self, len: usize) -> Buffer<T> {
        self.filled(len, 0)
    }

    /// Device memory with every byte the same: 0xff is NaN in every float format and −1 in every integer.
    pub fn filled<T: bytemuck::Pod>(&self, len: usize, byte: u8) -> Buffer<T> {
        self.upload_bytes(&vec![byte; len * size_of::<T>()], len)
    }

    fn upload_bytes<T>(&self, bytes: &[u8], len: usize) -> Buffer<T> {
        let raw = self.upload(bytes);
        self.buffer(raw.bytes, len)
    }

    fn buffer<T>(&self, mut slice: CudaSlice<u8>, len: usize) -> Buffer<T> {
        let ptr = DevicePtr(slice.device_ptr_mut(&self.stream).0);
        Buffer {
            bytes: slice,
            len,
            ptr,
            kind: PhantomData,
        }
    }

    /// Replaces the contents.
    pub fn write<T: bytemuck::Pod>(&self, buffer: &mut Buffer<T>, values: &[T]) {
        assert_eq!(values.len(), buffer.len);
        let bytes: &[u8] = bytemuck::cast_slice(values);
        if !bytes.is_empty() {
            self.stream
                .memcpy_htod(bytes, &mut buffer.bytes.slice_mut(..bytes.len()))
                .unwrap();
        }
        self.stream.synchronize().unwrap();
    }

    /// Waits for the stream and copies back.
    pub fn download<T: bytemuck::Pod>(&self, buffer: &Buffer<T>) -> Vec<T> {
        let mut values = vec![T::zeroed(); buffer.len];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
        if !bytes.is_empty() {
            self.stream
                .memcpy_dtoh(&buffer.bytes.slice(..bytes.len()), bytes)
                .unwrap();
        }
        self.stream.synchronize().unwrap();
        values
    }

    /// Queues a launch. The test answers for its pointers, as a caller of the raw level does.
    pub fn launch(&self, launch: &Launch) {
        // SAFETY: the buffers of a test outlive its last download, which waits for the stream.
        unsafe { self.cuda.launch(&self.stream, launch) }.unwrap();
    }

    /// What `queue` queues on the stream, as a graph. Nothing of it runs, and its kernels must have been loaded.
    pub fn capture(&self, queue: impl FnOnce()) -> CudaGraph {
        self.synchronize();
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).unwrap();
        queue();
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        self.stream.end_capture(flags).unwrap().expect("a graph")
    }

    /// Waits for everything queued.
    pub fn synchronize(&self) {
        self.stream.synchronize().unwrap();
    }
}
