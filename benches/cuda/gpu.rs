//! The device: its memory, launches, graphs and clock.
#![allow(unsafe_code)] // calls of the driver that cudarc has no safe form of, and launches by address

use super::Result;
use super::tape::{Filled, Tape, Tapes};
use cudarc::driver::{CudaEvent, CudaGraph, CudaSlice, CudaStream, DevicePtrMut as _, result, sys};
use moe_kernels::cuda::{Cuda, DeviceInfo, DevicePtr, Launch};
use std::sync::Arc;

/// The driver's clock under the name that every driver has; cudarc asks for a later one, which drivers before CUDA 12.8 lack.
type Elapsed = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> sys::CUresult;

/// A device, one stream for everything, and the random numbers that fill its memory.
pub struct Gpu {
    pub cuda: Cuda,
    pub stream: Arc<CudaStream>,
    /// Sets of operands that may take turns.
    pub most_sets: usize,
    elapsed: Elapsed,
    start: CudaEvent,
    end: CudaEvent,
    tapes: Tapes,
}

/// Device memory.
pub struct Buffer {
    slice: CudaSlice<u8>,
    pub ptr: DevicePtr,
    pub bytes: usize,
}

impl Gpu {
    /// The first GPU.
    pub fn open(most_sets: usize) -> Result<Self> {
        let cuda = Cuda::new(0)?;
        // SAFETY: everything of this context happens on one stream. (Graphs cannot be captured with tracking on.)
        unsafe { cuda.context().disable_event_tracking() };
        let stream = cuda.context().new_stream()?;
        // SAFETY: `Cuda::new` found and initialised this library; it stays loaded.
        let library = unsafe { libloading::Library::new("libcuda.so.1") }?;
        // SAFETY: the type is that of the driver's documentation.
        let elapsed = *unsafe { library.get::<Elapsed>(b"cuEventElapsedTime\0") }?;
        core::mem::forget(library);
        let timed = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let (start, end) = (
            cuda.context().new_event(timed)?,
            cuda.context().new_event(timed)?,
        );
        let tapes = Tapes::new(|bytes| upload(&stream, bytes))?;
        Ok(Self {
            cuda,
            stream,
            most_sets,
            elapsed,
            start,
            end,
            tapes,
        })
    }

    /// What plans are made for.
    pub fn info(&self) -> &DeviceInfo {
        self.cuda.device_info()
    }

    /// Memory whose contents do not matter.
    pub fn alloc(&self, bytes: usize) -> Result<Buffer> {
        alloc(&self.stream, bytes)
    }

    /// Memory that holds `values`.
    pub fn upload<T: bytemuck::Pod>(&self, values: &[T]) -> Result<Buffer> {
        upload(&self.stream, bytemuck::cast_slice(values))
    }

    /// `elements` bf16 numbers of a tape, from its `start`-th on.
    pub fn filled(&self, tape: Tape, start: usize, elements: usize) -> Result<Filled> {
        let buffer = self.alloc(2 * elements)?;
        let (from, period) = (self.tapes.device(tape).ptr, self.tapes.period(tape));
        let (mut done, mut at) = (0, start % period);
        while done < elements {
            let count = (period - at).min(elements - done);
            let (to, from) = (buffer.ptr.add(2 * done as u64), from.add(2 * at as u64));
            // SAFETY: both ranges lie in live allocations of this context, which do not overlap.
            unsafe {
                result::memcpy_dtod_async(to.0, from.0, 2 * count, self.stream.cu_stream())?;
            }
            (done, at) = (done + count, 0);
        }
        Ok(Filled::new(buffer, self.tapes.host(tape), start))
    }

    /// Every bit set: NaN in floats, −1 in integers.
    pub fn poison(&self, buffer: &Buffer) -> Result<()> {
        let stream = self.stream.cu_stream();
        // SAFETY: the range is a live allocation of this context.
        unsafe { result::memset_d8_async(buffer.ptr.0, 0xff, buffer.bytes, stream)? };
        Ok(())
    }

    /// Copies a whole buffer inside the device.
    pub fn copy(&self, from: &Buffer, to: &Buffer) -> Result<()> {
        let bytes = from.bytes.min(to.bytes);
        // SAFETY: both are live allocations of this context.
        unsafe { result::memcpy_dtod_async(to.ptr.0, from.ptr.0, bytes, self.stream.cu_stream())? };
        Ok(())
    }

    /// `count` values from the `first`-th on, after everything queued.
    pub fn download<T: bytemuck::Pod>(
        &self,
        buffer: &Buffer,
        first: usize,
        count: usize,
    ) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); count];
        let from = first * size_of::<T>();
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
        self.stream
            .memcpy_dtoh(&buffer.slice.slice(from..from + bytes.len()), bytes)?;
        self.stream.synchronize()?;
        Ok(values)
    }

    /// An error if a value of `T` that [`Self::poison`] left is still there.
    pub fn all_written<T: bytemuck::Pod + PartialEq>(&self, buffer: &Buffer) -> Result<()> {
        const PIECE: usize = 1 << 26;
        let size = size_of::<T>();
        let poison: T = bytemuck::pod_read_unaligned(&[0xff; 8][..size]);
        let len = buffer.bytes / size;
        for first in (0..len).step_by(PIECE / size) {
            let values: Vec<T> = self.download(buffer, first, (PIECE / size).min(len - first))?;
            if let Some(i) = values.iter().position(|v| *v == poison) {
                return Err(format!("element {} of {len} was not written", first + i).into());
            }
        }
        Ok(())
    }

    /// Queues launches. Subjects keep the memory that their plans name until they are dropped, and that waits for the stream.
    pub fn launch(&self, launches: &[Launch]) -> Result<()> {
        // SAFETY: plans of this crate over buffers of the sizes that the plans state.
        unsafe { self.cuda.launch_all(&self.stream, launches.iter())? };
        Ok(())
    }

    /// Seconds between two events around what `work` queues.
    pub fn seconds(&self, work: impl FnOnce() -> Result<()>) -> Result<f64> {
        self.start.record(&self.stream)?;
        work()?;
        self.end.record(&self.stream)?;
        self.end.synchronize()?;
        let mut ms = 0f32;
        // SAFETY: both events belong to this context and have been recorded; the pointer is to a live f32.
        unsafe { (self.elapsed)(&mut ms, self.start.cu_event(), self.end.cu_event()) }.result()?;
        Ok(f64::from(ms) * 1e-3)
    }

    /// What `work` queues, as a graph. Kernels must have been loaded by an earlier call.
    pub fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
        use sys::{CUgraphInstantiate_flags as Flags, CUstreamCaptureMode as Mode};
        self.stream
            .begin_capture(Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let queued = work();
        let graph = self
            .stream
            .end_capture(Flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
        queued?;
        let graph = graph?.ok_or("the capture gave no graph")?;
        graph.upload()?;
        Ok(graph)
    }
}

fn alloc(stream: &Arc<CudaStream>, bytes: usize) -> Result<Buffer> {
    // SAFETY: whoever reads it has written it or a kernel has.
    let mut slice = unsafe { stream.alloc::<u8>(bytes.max(1)) }?;
    let ptr = DevicePtr(slice.device_ptr_mut(stream).0);
    Ok(Buffer { slice, ptr, bytes })
}

fn upload(stream: &Arc<CudaStream>, values: &[u8]) -> Result<Buffer> {
    let mut buffer = alloc(stream, values.len())?;
    if !values.is_empty() {
        stream.memcpy_htod(values, &mut buffer.slice.slice_mut(..values.len()))?;
    }
    Ok(buffer)
}
