//! Scratch memory on the device.

use super::launch::scratch;
use candle_core::Result;
use candle_core::cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtrMut};
use moe_kernels::cuda::DevicePtr;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::ThreadId;

/// The handle of the stream that every thread has of its own (`CU_STREAM_PER_THREAD`).
const PER_THREAD: usize = 2;

/// The queue that a workspace belongs to: what is put there runs in order, so that a workspace can be used again before the last call has run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Queue {
    context: usize,
    stream: usize,
    /// Whose stream it is, where one handle stands for many.
    thread: Option<ThreadId>,
}

impl Queue {
    fn of(stream: &CudaStream) -> Self {
        let handle = stream.cu_stream() as usize;
        Self {
            context: stream.context().cu_ctx() as usize,
            stream: handle,
            thread: (handle == PER_THREAD).then(|| std::thread::current().id()),
        }
    }
}

struct Workspace {
    queue: Queue,
    /// Keeps its stream alive, whose handle therefore stays its own.
    bytes: CudaSlice<u8>,
}

/// Device memory for calls, made as it is needed and kept for the next call on the same stream: what [`Workspaces`](crate::Workspaces) is on the CPU. A handle: clones share it.
///
/// There are as many for a stream as calls have been queued on it by several threads at the same time, which is one as a rule, each as large as the largest batch.
/// Layers share those of the process unless they are given others. On the per-thread stream each thread has its own, which stays when the thread ends, until [`clear`](Self::clear).
#[derive(Clone, Default)]
pub struct CudaWorkspaces(Arc<Mutex<Vec<Workspace>>>);

impl CudaWorkspaces {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Those of the process.
    pub fn shared() -> Self {
        static SHARED: OnceLock<CudaWorkspaces> = OnceLock::new();
        SHARED.get_or_init(Self::new).clone()
    }

    /// Frees what no call is being queued with. Memory of this thread's streams is freed once the work there has run. For memory of other threads' per-thread streams, see to it that those threads' work
    /// has run.
    pub fn clear(&self) {
        let all = std::mem::take(&mut *self.lock());
        drop(all); // not under the lock: it calls the driver
    }

    /// Bytes of device memory that no call is being queued with.
    pub fn idle_bytes(&self) -> usize {
        self.lock().iter().map(|w| w.bytes.len()).sum()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Workspace>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `f`, which queues work on `stream`, with the address of at least `bytes` bytes of any content.
    pub(super) fn with<R>(
        &self,
        stream: &Arc<CudaStream>,
        bytes: usize,
        f: impl FnOnce(DevicePtr) -> Result<R>,
    ) -> Result<R> {
        let queue = Queue::of(stream);
        let mut workspace = match self.take(queue) {
            Some(workspace) if workspace.bytes.len() >= bytes => workspace,
            small => {
                drop(small); // before the larger one is made; the driver waits for the work that uses it
                let bytes = scratch(stream, bytes)?;
                Workspace { queue, bytes }
            }
        };
        let (address, used) = workspace.bytes.device_ptr_mut(stream);
        let result = f(DevicePtr(address));
        drop(used); // other streams that cudarc knows of wait from here on
        self.lock().push(workspace);
        result
    }

    fn take(&self, queue: Queue) -> Option<Workspace> {
        let mut all = self.lock();
        let place = all.iter().position(|w| w.queue == queue)?;
        Some(all.swap_remove(place))
    }
}

impl fmt::Debug for CudaWorkspaces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let idle = self.lock().len();
        write!(
            f,
            "CudaWorkspaces({idle} idle, {} bytes)",
            self.idle_bytes()
        )
    }
}
