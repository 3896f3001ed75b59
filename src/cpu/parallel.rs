//! Work sharing: on the caller's current rayon pool, or on none. The crate never builds a pool and never pins a thread.

use core::sync::atomic::{AtomicUsize, Ordering};

/// Threads of the pool that a call from here would use; 1 without the feature `parallel`.
pub(crate) fn pool_threads() -> usize {
    #[cfg(feature = "parallel")]
    {
        rayon::current_num_threads()
    }
    #[cfg(not(feature = "parallel"))]
    {
        1
    }
}

/// Calls `work(worker)` once for each worker in `0..workers`, concurrently where the pool has idle threads.
///
/// `join` keeps its closures on the stack, so nothing is allocated here, unlike `scope` and `broadcast`.
pub(crate) fn for_each_worker(workers: usize, work: &(dyn Fn(usize) + Sync)) {
    #[cfg(feature = "parallel")]
    fn split(first: usize, count: usize, work: &(dyn Fn(usize) + Sync)) {
        if count <= 1 {
            work(first);
        } else {
            let left = count / 2;
            rayon::join(
                || split(first, left, work),
                || split(first + left, count - left, work),
            );
        }
    }
    #[cfg(not(feature = "parallel"))]
    fn split(first: usize, count: usize, work: &(dyn Fn(usize) + Sync)) {
        (first..first + count).for_each(work);
    }
    if workers > 0 {
        split(0, workers, work);
    }
}

/// Task numbers `0..tasks`, each handed out once, to whoever asks first.
///
/// Which worker takes which task changes from run to run; results do not, since tasks write disjoint outputs and no sum
/// crosses a task.
pub(crate) struct TaskCounter {
    next: AtomicUsize,
    tasks: usize,
}

impl TaskCounter {
    pub(crate) fn new(tasks: usize) -> Self {
        Self {
            next: AtomicUsize::new(0),
            tasks,
        }
    }

    pub(crate) fn take(&self) -> Option<usize> {
        // Relaxed: the counter publishes nothing; rayon's join orders the outputs.
        let task = self.next.fetch_add(1, Ordering::Relaxed);
        (task < self.tasks).then_some(task)
    }
}
