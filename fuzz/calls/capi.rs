//! Calls of the C interface with arguments of every kind of wrong: null, misaligned, overlapping, short, negative and huge strides, unknown constants, handles
//! of any state. A call has to refuse or do its work; it must not write what is not its own.
//!
//! Memory is as long as the call is told, always: a lie about that cannot be found by any library.
#![allow(unsafe_code)]

mod layer;
mod make;
mod products;
mod routing;

use super::bytes::Bytes;
use super::memory::Memories;
use bytemuck::Zeroable;
use moe_kernels::ffi::*;
use std::ptr::{null, null_mut};
use std::sync::OnceLock;

/// One run: a few handles, then calls until the bytes are used up.
pub fn run(data: &[u8]) {
    let mut d = Bytes(data);
    let mut world = World::new(&mut d);
    for _ in 0..24 {
        if d.is_empty() {
            break;
        }
        world.call(&mut d);
    }
}

struct Cpus([usize; 3]);

/// One thread, two threads, the scalar code; made once. Addresses, since pointers are not `Sync`. A library without the feature `parallel` has one thread only; whoever
/// includes this file cannot ask for the library's features, so the library is asked.
fn cpus() -> [*const moe_cpu; 3] {
    static CPUS: OnceLock<Cpus> = OnceLock::new();
    let made = CPUS.get_or_init(|| {
        Cpus(
            [(1, null()), (2, null()), (0, c"scalar".as_ptr())].map(|(threads, isa)| {
                let mut options = moe_cpu_options {
                    struct_size: size_of::<moe_cpu_options>(),
                    threads,
                    isa,
                };
                let mut cpu = null_mut();
                // SAFETY: valid options and a place for the handle.
                let mut status = unsafe { moe_cpu_create(&options, &mut cpu) };
                if threads > 1 && status == MOE_ERROR_UNSUPPORTED {
                    options.threads = 1;
                    // SAFETY: as above; no handle was made.
                    status = unsafe { moe_cpu_create(&options, &mut cpu) };
                }
                assert_eq!(status, MOE_OK);
                cpu as usize
            }),
        )
    });
    made.0.map(|address| address as *const moe_cpu)
}

struct World {
    tokens: usize,
    hidden: usize,
    intermediate: usize,
    experts: usize,
    slots: usize,
    logits: usize,
    cpu: *const moe_cpu,
    router: *mut moe_router,
    routing: *mut moe_routing,
    permutation: *mut moe_permutation,
    matrices: *mut moe_matrices,
    packed: *mut moe_experts,
    layer: *mut moe_layer,
}

/// A struct's size: right but for once in a while.
fn struct_size<T>(d: &mut Bytes<'_>) -> usize {
    match d.rarely(96) {
        true => d.pick(&[0, 1, size_of::<T>() - 1, usize::MAX, 5000]),
        false => size_of::<T>(),
    }
}

fn activation(d: &mut Bytes<'_>, gated: u32) -> moe_activation {
    moe_activation {
        struct_size: struct_size::<moe_activation>(d),
        function: d.constant(7),
        gated,
        clamp: d.constant(6),
        limit: d.f32(),
        alpha: d.f32(),
    }
}

impl World {
    fn new(d: &mut Bytes<'_>) -> Self {
        let mut world = Self {
            tokens: d.below(20),
            hidden: 1 + d.below(40),
            intermediate: 1 + d.below(24),
            experts: 1 + d.below(10),
            slots: 1,
            logits: 1,
            cpu: d.pick(&cpus()),
            router: null_mut(),
            routing: null_mut(),
            permutation: null_mut(),
            matrices: null_mut(),
            packed: null_mut(),
            layer: null_mut(),
        };
        // SAFETY: places for handles.
        unsafe {
            assert_eq!(moe_routing_create(&mut world.routing), MOE_OK);
            assert_eq!(moe_permutation_create(&mut world.permutation), MOE_OK);
        }
        world.make(d);
        world
    }

    fn call(&mut self, d: &mut Bytes<'_>) {
        match d.below(16) {
            0..=2 => self.forward(d),
            3 => self.route(d),
            4 => self.given(d),
            5 => self.sort(d),
            6 => self.rows(d),
            7 => self.gemm(d),
            8 => self.experts_forward(d),
            9 | 10 => self.combine(d),
            11 => self.losses(d),
            12 => self.settings(d),
            13 => self.read(d),
            14 => self.shared(d),
            _ => {
                self.cpu = d.pick(&cpus());
                self.make(d);
            }
        }
    }

    fn norm(&self, d: &mut Bytes<'_>, m: &mut Memories) -> moe_rms_norm {
        let (weight, len) = m.slice::<f32>(d, self.hidden, false);
        moe_rms_norm {
            struct_size: struct_size::<moe_rms_norm>(d),
            weight,
            len,
            eps: d.f32(),
            multiplier: d.f32(),
        }
    }

    fn losses(&mut self, d: &mut Bytes<'_>) {
        let mut m = Memories::default();
        let (t, e) = (self.tokens, self.experts);
        let logits = m.matrix(d, t, e, 0);
        let (mask, mask_len) = m.maybe::<f32>(d, 2, t);
        let (grad, grad_len) = m.slice::<f32>(d, t * e, true);
        let (value, n) = m.slice::<f64>(d, 1, true);
        let value = if n == 0 { null_mut() } else { value };
        let k = d.size(1);
        let which = d.below(4);
        let (bias, len) = m.slice::<f32>(d, e, true);
        let (load, load_len) = m.slice::<usize>(d, e, false);
        // SAFETY: as above.
        let status = unsafe {
            match which {
                0 => moe_load_balancing_loss(
                    self.cpu, logits, k, mask, mask_len, grad, grad_len, value,
                ),
                1 => moe_switch_load_balancing_loss(self.cpu, logits, k, grad, grad_len, value),
                2 => moe_router_z_loss(self.cpu, logits, grad, grad_len, value),
                _ => moe_update_bias(bias, load, len.min(load_len), d.f32()),
            }
        };
        m.check(status, "losses");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // SAFETY: each handle is null or living, and used no more.
        unsafe {
            for status in [
                moe_layer_destroy(self.layer),
                moe_experts_destroy(self.packed),
                moe_matrices_destroy(self.matrices),
                moe_permutation_destroy(self.permutation),
                moe_routing_destroy(self.routing),
                moe_router_destroy(self.router),
            ] {
                assert_eq!(status, MOE_OK);
            }
        }
    }
}
