//! Which machine runs an example, and a GPU with its memory as the examples need it.

use clap::ValueEnum;

/// What runs the layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// This CPU.
    #[default]
    Cpu,
    /// The first NVIDIA GPU that the driver shows.
    Cuda,
}

impl Backend {
    /// Refuses what was not compiled in, and options that mean nothing on a GPU: each with whether it was given.
    ///
    /// # Errors
    /// One line for the user.
    pub fn check(self, only_on_cpu: &[(&str, bool)]) -> Result<(), String> {
        if self == Self::Cpu {
            return Ok(());
        }
        if !cfg!(feature = "cuda") {
            return Err(
                "--backend cuda: this executable was built without it; build with --features cuda"
                    .into(),
            );
        }
        match only_on_cpu.iter().find(|(_, given)| *given) {
            Some((option, _)) => Err(format!("{option} means nothing with --backend cuda")),
            None => Ok(()),
        }
    }
}

#[cfg(feature = "cuda")]
#[allow(unused_imports)] // each example uses its own part
pub use gpu::{Gpu, Matrix, Routed, Vector, driver, encode, line};

#[cfg(feature = "cuda")]
mod gpu {
    use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr, DriverError, ValidAsZeroBits};
    use half::{bf16, f16};
    use moe_kernels::cuda::moe::CudaMoeLayer;
    use moe_kernels::cuda::{Cuda, DeviceMat, DeviceMatMut, DeviceVec, DeviceVecMut};
    use moe_kernels::{DType, Error};
    use std::ops::Range;
    use std::sync::Arc;

    /// `Result` with a line for the user.
    pub type Result<T> = std::result::Result<T, String>;

    /// A device and the stream that all work goes to: the calling thread's own. It is the only one, so that cudarc tracks no events and calls can be captured.
    pub struct Gpu {
        pub cuda: Cuda,
        pub stream: Arc<CudaStream>,
        pub name: String,
    }

    /// What the driver said of a call.
    pub fn driver(call: &str) -> impl Fn(DriverError) -> String + '_ {
        move |why| format!("cuda: {call}: {why}")
    }

    /// An error of the crate as a line.
    pub fn line(why: Error) -> String {
        why.to_string()
    }

    impl Gpu {
        /// The first device.
        ///
        /// # Errors
        /// Those of [`Cuda::new`], which say what to do.
        pub fn open() -> std::result::Result<Self, Error> {
            let cuda = Cuda::new(0)?;
            let stream = cuda.context().per_thread_stream();
            let name = cuda.name()?;
            Ok(Self { cuda, stream, name })
        }

        /// Whether the crate's emulator answers instead of a GPU.
        pub fn is_emulated(&self) -> bool {
            self.name.contains("emulator")
        }

        /// Bytes of device memory that are free.
        pub fn free_memory(&self) -> Result<u64> {
            let (free, _) = self
                .cuda
                .context()
                .mem_get_info()
                .map_err(driver("cuMemGetInfo"))?;
            Ok(free as u64)
        }

        pub fn synchronize(&self) -> Result<()> {
            self.stream
                .synchronize()
                .map_err(driver("waiting for the GPU"))
        }

        /// Memory for `len` values. The driver refuses an empty allocation, so there is at least one.
        fn allocate<T: DeviceRepr + ValidAsZeroBits>(&self, len: usize) -> Result<CudaSlice<T>> {
            let bytes = len.saturating_mul(size_of::<T>());
            self.stream
                .alloc_zeros(len.max(1))
                .map_err(|why| format!("cuda: {bytes} bytes of device memory: {why}"))
        }

        fn copy_in<T: DeviceRepr>(
            &self,
            values: &[T],
            slice: &mut CudaSlice<T>,
            at: usize,
        ) -> Result<()> {
            if values.is_empty() {
                return Ok(());
            }
            let end = at.checked_add(values.len());
            let Some(mut place) = end.and_then(|end| slice.try_slice_mut(at..end)) else {
                return Err(format!(
                    "internal error: {} values do not fit",
                    values.len()
                ));
            };
            self.stream
                .memcpy_htod(values, &mut place)
                .map_err(driver("copying to the GPU"))
        }

        fn copy_out<T: DeviceRepr + Copy + Default>(
            &self,
            slice: &CudaSlice<T>,
            len: usize,
        ) -> Result<Vec<T>> {
            let mut values = vec![T::default(); slice.len()];
            self.stream
                .memcpy_dtoh(slice, &mut values)
                .map_err(driver("copying from the GPU"))?;
            self.synchronize()?;
            values.truncate(len);
            Ok(values)
        }
    }

    /// A vector in device memory.
    pub struct Vector<T> {
        slice: CudaSlice<T>,
        len: usize,
    }

    impl<T: DeviceRepr + ValidAsZeroBits + Copy + Default> Vector<T> {
        pub fn zeros(gpu: &Gpu, len: usize) -> Result<Self> {
            let slice = gpu.allocate(len)?;
            Ok(Self { slice, len })
        }

        pub fn new(gpu: &Gpu, values: &[T]) -> Result<Self> {
            let mut vector = Self::zeros(gpu, values.len())?;
            gpu.copy_in(values, &mut vector.slice, 0)?;
            Ok(vector)
        }

        pub fn view<'a>(&'a self, stream: &'a CudaStream) -> DeviceVec<'a, T> {
            DeviceVec::new(stream, &self.slice)
        }

        pub fn view_mut<'a>(&'a mut self, stream: &'a CudaStream) -> DeviceVecMut<'a, T> {
            DeviceVecMut::new(stream, &mut self.slice)
        }

        /// Waits for the GPU and copies back.
        pub fn read(&self, gpu: &Gpu) -> Result<Vec<T>> {
            gpu.copy_out(&self.slice, self.len)
        }
    }

    impl Vector<u8> {
        /// Waits for the GPU and copies some of the bytes back.
        pub fn read_part(&self, gpu: &Gpu, part: Range<usize>) -> Result<Vec<u8>> {
            let mut bytes = vec![0; part.len()];
            if bytes.is_empty() {
                return Ok(bytes);
            }
            let Some(view) = self.slice.try_slice(part) else {
                return Err("internal error: beyond the end of a buffer".into());
            };
            gpu.stream
                .memcpy_dtoh(&view, &mut bytes)
                .map_err(driver("copying from the GPU"))?;
            gpu.synchronize()?;
            Ok(bytes)
        }
    }

    /// What a call of a layer routed by.
    pub struct Routed {
        /// `[T, R]`, of a call through the gate.
        pub logits: Vec<f32>,
        /// `[T, slots]`
        pub ids: Vec<i32>,
        /// `[T, slots]`
        pub weights: Vec<f32>,
    }

    impl Routed {
        /// Reads the workspace of the last call.
        pub fn read(
            gpu: &Gpu,
            layer: &CudaMoeLayer,
            tokens: usize,
            workspace: &mut Vector<u8>,
        ) -> Result<Self> {
            let address = workspace.view_mut(&gpu.stream).ptr();
            let parts = layer
                .workspace_routing(tokens, address, gpu.cuda.device_info())
                .map_err(line)?;
            let bytes = |part| workspace.read_part(gpu, part);
            let ids = bytes(parts.ids)?;
            Ok(Self {
                logits: decode(DType::F32, &bytes(parts.logits)?),
                ids: ids
                    .as_chunks()
                    .0
                    .iter()
                    .map(|b| i32::from_le_bytes(*b))
                    .collect(),
                weights: decode(DType::F32, &bytes(parts.weights)?),
            })
        }
    }

    /// A row-major matrix in device memory, without gaps.
    pub struct Matrix {
        bytes: CudaSlice<u8>,
        dtype: DType,
        rows: usize,
        cols: usize,
    }

    impl Matrix {
        pub fn zeros(gpu: &Gpu, dtype: DType, rows: usize, cols: usize) -> Result<Self> {
            let len = rows
                .checked_mul(cols)
                .and_then(|n| n.checked_mul(dtype.size()));
            let len = len.ok_or("a matrix does not fit the address space")?;
            Ok(Self {
                bytes: gpu.allocate(len)?,
                dtype,
                rows,
                cols,
            })
        }

        /// `rows · cols` numbers, rounded to `dtype`.
        pub fn new(
            gpu: &Gpu,
            dtype: DType,
            values: &[f32],
            rows: usize,
            cols: usize,
        ) -> Result<Self> {
            let mut matrix = Self::zeros(gpu, dtype, rows, cols)?;
            matrix.write_rows(gpu, 0, &encode(dtype, values))?;
            Ok(matrix)
        }

        /// Replaces rows from `first` on by those of `bytes`, in the matrix's format.
        pub fn write_rows(&mut self, gpu: &Gpu, first: usize, bytes: &[u8]) -> Result<()> {
            let at = first * self.cols * self.dtype.size();
            gpu.copy_in(bytes, &mut self.bytes, at)
        }

        /// The same numbers in memory of their own.
        pub fn duplicate(&self, gpu: &Gpu) -> Result<Self> {
            let mut copy = Self::zeros(gpu, self.dtype, self.rows, self.cols)?;
            gpu.stream
                .memcpy_dtod(&self.bytes, &mut copy.bytes)
                .map_err(driver("copying on the GPU"))?;
            Ok(copy)
        }

        pub fn size(&self) -> u64 {
            self.bytes.num_bytes() as u64
        }

        pub fn view<'a>(&'a self, stream: &'a CudaStream) -> Result<DeviceMat<'a>> {
            DeviceMat::from_bytes(stream, &self.bytes, self.dtype, self.rows, self.cols)
                .map_err(line)
        }

        pub fn view_mut<'a>(&'a mut self, stream: &'a CudaStream) -> Result<DeviceMatMut<'a>> {
            let (dtype, rows, cols) = (self.dtype, self.rows, self.cols);
            DeviceMatMut::from_bytes(stream, &mut self.bytes, dtype, rows, cols).map_err(line)
        }

        /// Waits for the GPU and copies back, as bytes of the matrix's format.
        pub fn read_bytes(&self, gpu: &Gpu) -> Result<Vec<u8>> {
            gpu.copy_out(&self.bytes, self.rows * self.cols * self.dtype.size())
        }

        /// The same, widened.
        pub fn read(&self, gpu: &Gpu) -> Result<Vec<f32>> {
            Ok(decode(self.dtype, &self.read_bytes(gpu)?))
        }
    }

    /// Numbers as bytes of a format, rounded to nearest.
    pub fn encode(dtype: DType, values: &[f32]) -> Vec<u8> {
        match dtype {
            DType::F16 => each(values, |v| f16::from_f32(v).to_le_bytes()),
            DType::BF16 => each(values, |v| bf16::from_f32(v).to_le_bytes()),
            _ => each(values, f32::to_le_bytes),
        }
    }

    fn each<const N: usize>(values: &[f32], of: impl Fn(f32) -> [u8; N]) -> Vec<u8> {
        values.iter().flat_map(|&v| of(v)).collect()
    }

    fn decode(dtype: DType, bytes: &[u8]) -> Vec<f32> {
        fn each<const N: usize>(bytes: &[u8], of: impl Fn([u8; N]) -> f32) -> Vec<f32> {
            bytes.as_chunks().0.iter().map(|b| of(*b)).collect()
        }
        match dtype {
            DType::F16 => each(bytes, |b| f16::from_le_bytes(b).to_f32()),
            DType::BF16 => each(bytes, |b| bf16::from_le_bytes(b).to_f32()),
            _ => each(bytes, f32::from_le_bytes),
        }
    }
}
