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

/// Calls `work(first_row, rows)` on parts of `data` (rows of `width`), concurrently where the pool has idle threads. Safe, since parts are split off.
pub(crate) fn for_each_part(
    threads: usize,
    data: &mut [f32],
    width: usize,
    work: &(dyn Fn(usize, &mut [f32]) + Sync),
) {
    fn split(
        parts: usize,
        first: usize,
        data: &mut [f32],
        width: usize,
        work: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) {
        let rows = data.len() / width;
        if parts <= 1 || rows <= 1 {
            return work(first, data);
        }
        let half = rows / 2;
        let (left, right) = data.split_at_mut(half * width);
        let (left_parts, right_parts) = (parts / 2, parts - parts / 2);
        join(
            || split(left_parts, first, left, width, work),
            || split(right_parts, first + half, right, width, work),
        );
    }
    if width > 0 && !data.is_empty() {
        split(threads, 0, data, width, work);
    }
}

/// Runs both, concurrently where the pool has an idle thread. Allocates nothing.
pub(crate) fn join(a: impl FnOnce() + Send, b: impl FnOnce() + Send) {
    #[cfg(feature = "parallel")]
    {
        rayon::join(a, b);
    }
    #[cfg(not(feature = "parallel"))]
    {
        a();
        b();
    }
}
