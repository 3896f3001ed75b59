//! `moe_routing`: where each token goes; and the calls that fill it.

use super::cpu::{CpuAndPool, moe_cpu};
use super::handle::{destroy, exclusive, give, handle, shared};
use super::memory::{Regions, Versioned, moe_matrix, probe, read_struct, write_struct};
use super::permute::{
    copy_into, local_range, moe_permutation_buffers, moe_permutation_view, place, read_permutation,
    sort_bytes, view_of,
};
use super::router::{MOE_NULL_IDENTITY, MOE_NULL_NONE, MOE_NULL_ZERO, moe_router};
use super::status::*;
use crate::routing::{GivenRouting, NullExperts, RouteInput, RouterConfig, Routing};
use bytemuck::Zeroable;

/// Ids, weights and permutation of a call, with its scratch. One call at a time may use it; reuse it, so that calls allocate nothing.
pub struct moe_routing {
    _opaque: (),
}

handle!(moe_routing, Routing, b"moerting");

/// What moe_route routes. Zeros (with struct_size) are the defaults of all but logits.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_route_input {
    /// sizeof(moe_route_input)
    pub struct_size: usize,
    /// [T, R], any dtype; computed in f32.
    pub logits: *const moe_matrix,
    /// [T, R] for a router with a noise seed, else NULL.
    pub noise_logits: *const moe_matrix,
    /// [T, K] for MOE_SELECT_GIVEN, else NULL: below E + num_null, or -1.
    pub given_ids: *const i32,
    /// Elements of given_ids.
    pub given_ids_len: usize,
    /// Position of the first token, for noise.
    pub position: u64,
    /// Only pairs of experts first_local .. first_local + num_local get rows; num_local = 0 stands for all.
    pub first_local: usize,
    /// See first_local.
    pub num_local: usize,
    /// Each expert's rows begin at a multiple of this; 0 counts as 1.
    pub row_alignment: usize,
}

// SAFETY: repr(C), begins with its size, integers and pointers.
unsafe impl Versioned for moe_route_input {}

/// A routing that another router made.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_given_routing {
    /// sizeof(moe_given_routing)
    pub struct_size: usize,
    /// E
    pub num_experts: usize,
    /// Pairs of a token.
    pub slots: usize,
    /// Ids from E on.
    pub num_null: usize,
    /// [T, slots]
    pub ids: *const i32,
    /// [T, slots]
    pub weights: *const f32,
    /// T * slots: elements of ids and of weights.
    pub num_pairs: usize,
    /// MOE_NULL_*
    pub null_kind: u32,
    /// 0
    pub reserved: u32,
}

// SAFETY: repr(C), begins with its size, integers and pointers.
unsafe impl Versioned for moe_given_routing {}

/// A routing in its handle's memory: valid until the handle is used again or destroyed. Set struct_size.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_routing_view {
    /// sizeof(moe_routing_view)
    pub struct_size: usize,
    /// T
    pub tokens: usize,
    /// Columns of ids and weights.
    pub slots: usize,
    /// Columns of shared_weights.
    pub joint_shared: usize,
    /// [T, slots]: an expert below E, a null expert from E on, -1 for none.
    pub ids: *const i32,
    /// [T, slots]: exactly what multiplies the expert.
    pub weights: *const f32,
    /// [T, joint_shared]
    pub shared_weights: *const f32,
}

// SAFETY: repr(C), begins with its size, integers and pointers.
unsafe impl Versioned for moe_routing_view {}

/// The caller's arrays for ids and weights; NULL for those not wanted. Lengths in elements.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
pub struct moe_routing_buffers {
    /// sizeof(moe_routing_buffers)
    pub struct_size: usize,
    /// [T, slots] or more
    pub ids: *mut i32,
    /// Elements of ids.
    pub ids_len: usize,
    /// [T, slots] or more
    pub weights: *mut f32,
    /// Elements of weights.
    pub weights_len: usize,
    /// [T, joint_shared] or more
    pub shared_weights: *mut f32,
    /// Elements of shared_weights.
    pub shared_weights_len: usize,
}

// SAFETY: repr(C), begins with its size, integers and pointers.
unsafe impl Versioned for moe_routing_buffers {}

/// Refuses routings whose memory cannot be had: ids, weights, the sorting, and a few rows of logits for each thread. An upper bound.
pub(super) fn probe_routing(
    cpu: &CpuAndPool,
    config: &RouterConfig,
    tokens: usize,
    block: usize,
) -> Checked {
    let pairs = crate::shape::pairs(tokens, config.slots())?;
    let width = config.num_logits().max(config.num_experts);
    // Of a worker: some ten rows, a batch of bounded size, and an order of tokens.
    let rows = width.checked_mul(16 * size_of::<f32>());
    let worker = rows.and_then(|n| n.checked_add(tokens.checked_mul(16)?)?.checked_add(1 << 18));
    let bytes = (|| {
        let workers = worker?.checked_mul(cpu.threads())?;
        let tables = pairs
            .checked_mul(8)?
            .checked_add(tokens.checked_mul(config.joint_shared)?.checked_mul(4)?)?;
        workers
            .checked_add(tables)?
            .checked_add(sort_bytes(pairs, config.num_experts, block)?)
    })();
    probe("routing", bytes)
}

/// Makes an empty routing, which grows when it is used.
///
/// # Safety
/// out: writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_routing_create(out: *mut *mut moe_routing) -> moe_status {
    // SAFETY: the caller's contract.
    guard(|| unsafe { give(out, Routing::new()) })
}

/// Makes room, so that moe_route and moe_layer_forward of up to max_tokens tokens by this router allocate nothing. What the routing held is gone.
///
/// # Safety
/// Handles: NULL or living.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_routing_reserve(
    cpu: *const moe_cpu,
    routing: *mut moe_routing,
    router: *const moe_router,
    max_tokens: usize,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let (cpu, mut routing) = (unsafe { shared(cpu) }?, unsafe { exclusive(routing) }?);
        // SAFETY: the caller's contract.
        let router = unsafe { shared(router) }?;
        probe_routing(&cpu, router.config(), max_tokens, 1)?;
        let router = &*router;
        *routing = cpu.run(|cpu| Routing::with_capacity_on(cpu, max_tokens, router))?;
        Ok(())
    })
}

/// Ends a handle. NULL is allowed. MOE_ERROR_BUSY while a call uses it.
///
/// # Safety
/// routing: NULL or living, not used afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_routing_destroy(routing: *mut moe_routing) -> moe_status {
    // SAFETY: the caller's contract.
    guard(|| unsafe { destroy(routing) })
}

/// Routes T tokens: ids, weights and the permutation into routing. Ids are distinct and in range however bad the logits are.
///
/// Errors: MOE_ERROR_SHAPE, MOE_ERROR_VALUE, MOE_ERROR_OVERFLOW, and those of pointers; the routing is then unchanged.
///
/// # Safety
/// Handles: NULL or living. input: NULL or valid, with memory as long as it says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_route(
    cpu: *const moe_cpu,
    router: *const moe_router,
    input: *const moe_route_input,
    routing: *mut moe_routing,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let (cpu, router) = (unsafe { shared(cpu) }?, unsafe { shared(router) }?);
        // SAFETY: the caller's contract.
        let mut routing = unsafe { exclusive(routing) }?;
        // SAFETY: the caller's contract.
        let args = unsafe { read_struct("input", input) }?;
        let mut regions = Regions::new();
        // SAFETY: the caller's contract.
        let (logits, noise, ids) = unsafe {
            (
                regions.matrix("logits", args.logits)?,
                regions.optional_matrix("noise_logits", args.noise_logits)?,
                regions.optional_slice("given_ids", args.given_ids, args.given_ids_len)?,
            )
        };
        let apart = regions.apart()?;
        let block = args.row_alignment.max(1);
        let mut input = RouteInput::new(logits.view(&apart)?)
            .position(args.position)
            .row_alignment(block);
        if let Some(noise) = noise {
            input = input.noise_logits(noise.view(&apart)?);
        }
        if let Some(ids) = ids {
            input = input.given_ids(ids.get(&apart));
        }
        if let Some(local) = local_range(args.first_local, args.num_local)? {
            input = input.local_experts(local);
        }
        // Sizes are checked before memory is asked for.
        if logits.cols() == router.config().num_logits() {
            probe_routing(&cpu, router.config(), logits.rows(), block)?;
        }
        let (router, routing) = (&*router, &mut *routing);
        Ok(cpu.run(|cpu| router.route(cpu, &input, routing))?)
    })
}

/// Takes ids and weights from the caller: hash routing, or any framework's own router.
///
/// Errors: MOE_ERROR_SHAPE, MOE_ERROR_VALUE for an id out of range, MOE_ERROR_OVERFLOW; the routing is then unchanged.
///
/// # Safety
/// As moe_route.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_routing_set_given(
    cpu: *const moe_cpu,
    routing: *mut moe_routing,
    given: *const moe_given_routing,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let (cpu, mut routing) = (unsafe { shared(cpu) }?, unsafe { exclusive(routing) }?);
        // SAFETY: the caller's contract.
        let args = unsafe { read_struct("given", given) }?;
        let mut regions = Regions::new();
        // SAFETY: the caller's contract.
        let (ids, weights) = unsafe {
            (
                regions.slice("ids", args.ids, args.num_pairs)?,
                regions.slice("weights", args.weights, args.num_pairs)?,
            )
        };
        let apart = regions.apart()?;
        let nulls = match (args.null_kind, args.num_null) {
            (MOE_NULL_NONE, 0) => NullExperts::None,
            (MOE_NULL_IDENTITY, n) => NullExperts::Identity(n),
            (MOE_NULL_ZERO, n) => NullExperts::Zero(n),
            (kind, n) => {
                let found = format_args!("kind {kind} with num_null = {n}");
                return Err(Fault::value(
                    "null_kind",
                    "MOE_NULL_*, none with num_null = 0",
                    found,
                ));
            }
        };
        let bytes = sort_bytes(args.num_pairs, args.num_experts, 1);
        probe(
            "routing",
            bytes.and_then(|n| n.checked_add(args.num_pairs.checked_mul(8)?)),
        )?;
        let (ids, weights) = (ids.get(&apart), weights.get(&apart));
        let given =
            GivenRouting::new(args.num_experts, args.slots, ids, weights).null_experts(nulls);
        let routing = &mut *routing;
        Ok(cpu.run(|cpu| routing.set_given(cpu, &given))?)
    })
}

/// Shows ids and weights in the handle's own memory.
///
/// # Safety
/// routing: NULL or living. view: NULL or writable for its struct_size bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_routing_get(
    routing: *const moe_routing,
    view: *mut moe_routing_view,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let r = unsafe { shared(routing) }?;
        let found = moe_routing_view {
            struct_size: 0, // the caller's stays
            tokens: r.tokens(),
            slots: r.slots(),
            joint_shared: r.joint_shared(),
            ids: r.ids().as_ptr(),
            weights: r.weights().as_ptr(),
            shared_weights: r.shared_weights().as_ptr(),
        };
        // SAFETY: the caller's contract.
        unsafe { write_struct("view", view, &found) }
    })
}

/// Shows the permutation in the handle's own memory.
///
/// # Safety
/// As moe_routing_get.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_routing_get_permutation(
    routing: *const moe_routing,
    view: *mut moe_permutation_view,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let r = unsafe { shared(routing) }?;
        // SAFETY: the caller's contract.
        unsafe { write_struct("view", view, &view_of(r.permutation())) }
    })
}

/// Copies ids and weights into the caller's arrays. Errors: MOE_ERROR_BUFFER_TOO_SMALL naming the array; nothing is written then.
///
/// # Safety
/// routing: NULL or living. buffers: NULL or valid, arrays as long as they say.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_routing_read(
    routing: *const moe_routing,
    buffers: *const moe_routing_buffers,
) -> moe_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let r = unsafe { shared(routing) }?;
        // SAFETY: the caller's contract.
        let b = unsafe { read_struct("buffers", buffers) }?;
        let mut regions = Regions::new();
        let ids = place!(regions, b.ids, ids_len, r.ids().len());
        let weights = place!(regions, b.weights, weights_len, r.weights().len());
        let joint = place!(
            regions,
            b.shared_weights,
            shared_weights_len,
            r.shared_weights().len()
        );
        let apart = regions.apart()?;
        if let Some(to) = ids {
            copy_into(r.ids(), to.get(&apart));
        }
        if let Some(to) = weights {
            copy_into(r.weights(), to.get(&apart));
        }
        if let Some(to) = joint {
            copy_into(r.shared_weights(), to.get(&apart));
        }
        Ok(())
    })
}

/// As moe_permutation_read, of a routing.
///
/// # Safety
/// As moe_routing_read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_routing_read_permutation(
    routing: *const moe_routing,
    buffers: *const moe_permutation_buffers,
) -> moe_status {
    // SAFETY: the caller's contract.
    guard(|| unsafe { read_permutation(shared(routing)?.permutation(), buffers) })
}
