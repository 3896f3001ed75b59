//! A forward call allocates nothing once its buffers have been used: counted by the allocator itself. Alone in its file, since the count is global.
#![allow(unsafe_code)] // a global allocator is unsafe to implement

mod common;

use common::layers::recipes;
use common::{Rng, cpus};
use moe_kernels::routing::Routing;
use moe_kernels::{DType, MatMut, MatRef};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(p, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_forward_call_allocates_nothing() {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(3)
        .build()
        .unwrap();
    for recipe in recipes() {
        for cpu in cpus() {
            let layer = recipe.layer(&cpu, DType::F32);
            let (tokens, hidden) = (50, recipe.hidden);
            let x = Rng(1).normals(tokens * hidden);
            let mut y = vec![0.0f32; tokens * hidden];
            pool.install(|| {
                let mut routing = Routing::with_capacity(tokens, layer.router()).unwrap();
                let mut workspace = vec![0u8; layer.workspace_size(&cpu, tokens).unwrap()];
                let mut forward = || {
                    let x = MatRef::new(&x, tokens, hidden).unwrap().into();
                    let y = MatMut::new(&mut y, tokens, hidden).unwrap().into();
                    layer
                        .forward(&cpu, x, y, &mut routing, &mut workspace)
                        .unwrap();
                };
                // rayon's queues grow to their working size first.
                forward();
                forward();
                let before = ALLOCATIONS.load(Ordering::Relaxed);
                forward();
                let count = ALLOCATIONS.load(Ordering::Relaxed) - before;
                assert_eq!(count, 0, "{} on {}", recipe.name, cpu.isa());
            });
        }
    }
}
