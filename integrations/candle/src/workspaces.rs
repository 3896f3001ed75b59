//! What calls need beside their tensors.

use moe_kernels::routing::Routing;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// One call's memory.
#[derive(Default)]
pub(crate) struct Workspace {
    pub routing: Routing,
    pub bytes: Vec<u8>,
    /// Ids of [`MoeLayer::forward_routed`](crate::MoeLayer::forward_routed) in the kernels' format.
    pub ids: Vec<i32>,
}

impl Workspace {
    /// At least `bytes`, of any content.
    pub fn bytes(&mut self, bytes: usize) -> &mut [u8] {
        if self.bytes.len() < bytes {
            // Not `resize`: the old content need not be copied.
            self.bytes = vec![0; bytes];
        }
        &mut self.bytes[..bytes]
    }
}

/// Workspaces, made as they are needed and kept for the next call. A handle: clones share them.
///
/// A call takes one and gives it back, so that there are as many as calls have run at the same time, each as large as the largest batch that it
/// has served. Layers share those of the process unless they are given others: a model's layers run one after the other, and one workspace serves
/// them all. Thread-safe; the lock is held only to take and to give back, never during a call.
#[derive(Clone, Default)]
pub struct Workspaces(Arc<Mutex<Vec<Workspace>>>);

impl Workspaces {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Those of the process.
    pub fn shared() -> Self {
        static SHARED: OnceLock<Workspaces> = OnceLock::new();
        SHARED.get_or_init(Self::new).clone()
    }

    /// Frees what no call is using.
    pub fn clear(&self) {
        self.lock().clear();
    }

    /// Bytes of what no call is using, the routings' own few aside.
    pub fn idle_bytes(&self) -> usize {
        self.lock().iter().map(|w| w.bytes.len()).sum()
    }

    /// A list of whole workspaces is never seen half changed, so that a panic elsewhere while it was locked means nothing.
    fn lock(&self) -> MutexGuard<'_, Vec<Workspace>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `f` with a workspace of its own.
    pub(crate) fn with<R>(&self, f: impl FnOnce(&mut Workspace) -> R) -> R {
        // The guard is dropped at the end of this line, before `f`.
        let mut workspace = self.lock().pop().unwrap_or_default();
        let result = f(&mut workspace);
        self.lock().push(workspace);
        result
    }
}

impl fmt::Debug for Workspaces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let idle = self.lock().len();
        write!(f, "Workspaces({idle} idle, {} bytes)", self.idle_bytes())
    }
}
