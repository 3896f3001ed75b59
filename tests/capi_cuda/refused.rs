//! Wrong calls. Every check comes before anything is queued; those of the host come before the driver, so that they are seen without a GPU, too.

use crate::operands::*;
use crate::world::*;
use crate::{E, H, I, K, T, last_error, must};
use bytemuck::Zeroable;
use moe_kernels::ffi::*;
use std::ptr::null;

/// Where a call is bent.
enum Bend {
    /// Its matrices.
    Operand(fn(&mut Operands)),
    /// The structs of weights, after they were linked.
    Experts(fn(&mut Operands)),
    /// The call.
    Args(fn(&mut moe_cuda_forward)),
}
use Bend::{Args, Experts, Operand};

/// What is wrong, the status, and what the text begins with.
type Wrong = (Bend, moe_status, &'static str);

/// What the host finds in the full case.
const WRONG: &[Wrong] = &[
    (Operand(|o| o.x.data = 0), MOE_ERROR_NULL, "x"),
    (Operand(|o| o.x.data += 2), MOE_ERROR_MISALIGNED, "x"),
    (
        Operand(|o| o.x.data = u64::MAX - 3),
        MOE_ERROR_OVERFLOW,
        "x",
    ),
    (
        Operand(|o| o.x.row_stride = -(H as isize)),
        MOE_ERROR_VALUE,
        "x",
    ),
    (Operand(|o| o.x.row_stride -= 1), MOE_ERROR_VALUE, "x"),
    (
        Operand(|o| o.x.row_stride = isize::MAX),
        MOE_ERROR_OVERFLOW,
        "x",
    ),
    (Operand(|o| o.x.rows = usize::MAX), MOE_ERROR_OVERFLOW, "x"),
    (Operand(|o| o.x.bytes -= 1), MOE_ERROR_BUFFER_TOO_SMALL, "x"),
    (Operand(|o| o.x.cols -= 1), MOE_ERROR_SHAPE, "x"),
    (Operand(|o| o.x.dtype = 0), MOE_ERROR_VALUE, "x"),
    (Operand(|o| o.x.dtype = 4), MOE_ERROR_VALUE, "x"),
    (Operand(|o| o.x.reserved = 1), MOE_ERROR_VALUE, "x"),
    (Operand(|o| o.y.data = 0), MOE_ERROR_NULL, "y"),
    (Operand(|o| o.y.bytes -= 1), MOE_ERROR_BUFFER_TOO_SMALL, "y"),
    (Operand(|o| o.y.rows -= 1), MOE_ERROR_SHAPE, "y"),
    (
        Operand(|o| o.y.data = o.x.data + (T * H * 4 - 4) as u64),
        MOE_ERROR_OVERLAP,
        "x",
    ),
    (Operand(|o| o.y.data = o.up.data), MOE_ERROR_OVERLAP, "y"),
    (Operand(|o| o.gate.rows -= 1), MOE_ERROR_SHAPE, "gate"),
    (
        Operand(|o| o.gate_bias.len -= 1),
        MOE_ERROR_SHAPE,
        "gate_bias",
    ),
    (
        Operand(|o| o.gate_bias.data = 0),
        MOE_ERROR_NULL,
        "gate_bias",
    ),
    (
        Operand(|o| o.gate_bias.data += 1),
        MOE_ERROR_MISALIGNED,
        "gate_bias",
    ),
    (
        Operand(|o| o.up.experts -= 1),
        MOE_ERROR_SHAPE,
        "experts.gate_up",
    ),
    (
        Operand(|o| o.up.rows = I),
        MOE_ERROR_SHAPE,
        "experts.gate_up",
    ),
    (
        Operand(|o| o.up.data = 0),
        MOE_ERROR_NULL,
        "experts.gate_up",
    ),
    (
        Operand(|o| o.up.data += 2),
        MOE_ERROR_MISALIGNED,
        "experts.gate_up",
    ),
    (
        Operand(|o| o.up.bytes -= 1),
        MOE_ERROR_BUFFER_TOO_SMALL,
        "experts.gate_up",
    ),
    (
        Operand(|o| o.up.expert_stride = -1),
        MOE_ERROR_VALUE,
        "experts.gate_up",
    ),
    (
        Operand(|o| o.up.expert_stride = isize::MAX),
        MOE_ERROR_OVERFLOW,
        "experts.gate_up",
    ),
    (
        Operand(|o| o.up.row_stride -= 1),
        MOE_ERROR_VALUE,
        "experts.gate_up",
    ),
    (
        Operand(|o| o.up.dtype = 9),
        MOE_ERROR_VALUE,
        "experts.gate_up",
    ),
    (
        Operand(|o| o.up.reserved = 1),
        MOE_ERROR_VALUE,
        "experts.gate_up",
    ),
    (
        Operand(|o| o.down.cols -= 1),
        MOE_ERROR_SHAPE,
        "experts.down",
    ),
    (
        Operand(|o| o.down_bias.cols -= 1),
        MOE_ERROR_SHAPE,
        "experts.down_bias",
    ),
    (
        Operand(|o| o.gate_up_bias.rows -= 1),
        MOE_ERROR_SHAPE,
        "experts.gate_up_bias",
    ),
    (
        Operand(|o| o.shared_up.rows -= 1),
        MOE_ERROR_SHAPE,
        "shared.gate_up",
    ),
    (
        Operand(|o| o.shared_gate.cols -= 1),
        MOE_ERROR_SHAPE,
        "shared_gate",
    ),
    (
        Operand(|o| o.correction.len -= 1),
        MOE_ERROR_SHAPE,
        "correction_bias",
    ),
    (
        Operand(|o| o.scale.len += 1),
        MOE_ERROR_SHAPE,
        "per_expert_scale",
    ),
    (Operand(|o| o.norm.len -= 1), MOE_ERROR_SHAPE, "out_norm"),
    (
        Operand(|o| o.norm.struct_size = 0),
        MOE_ERROR_STRUCT_SIZE,
        "out_norm",
    ),
    (
        Operand(|o| o.out_bias.len -= 1),
        MOE_ERROR_SHAPE,
        "out_bias",
    ),
    (
        Operand(|o| o.residual.rows -= 1),
        MOE_ERROR_SHAPE,
        "residual",
    ),
    (
        Operand(|o| o.residual.data = o.y.data + 4),
        MOE_ERROR_OVERLAP,
        "y",
    ),
    (
        Operand(|o| (o.residual.data, o.residual.dtype) = (o.y.data, MOE_DTYPE_BF16)),
        MOE_ERROR_OVERLAP,
        "y",
    ),
    (
        Experts(|o| o.experts.down = null()),
        MOE_ERROR_NULL,
        "experts.down",
    ),
    (
        Experts(|o| o.experts.gate_up = null()),
        MOE_ERROR_NULL,
        "experts.gate_up",
    ),
    (
        Experts(|o| o.experts.up = &o.up),
        MOE_ERROR_VALUE,
        "experts.up",
    ),
    (
        Experts(|o| o.experts.up_bias = &o.down_bias),
        MOE_ERROR_VALUE,
        "experts.up_bias",
    ),
    (
        Experts(|o| o.experts.layout = 3),
        MOE_ERROR_VALUE,
        "experts.layout",
    ),
    (
        Experts(|o| o.experts.reserved = 1),
        MOE_ERROR_VALUE,
        "experts",
    ),
    (
        Experts(|o| o.experts.struct_size -= 8),
        MOE_ERROR_STRUCT_SIZE,
        "experts",
    ),
    (
        Experts(|o| o.shared.down = null()),
        MOE_ERROR_NULL,
        "shared.down",
    ),
    (Args(|a| a.struct_size -= 8), MOE_ERROR_STRUCT_SIZE, "args"),
    (Args(|a| a.x = null()), MOE_ERROR_NULL, "x"),
    (Args(|a| a.y = null()), MOE_ERROR_NULL, "y"),
    (
        Args(|a| a.x = a.x.cast::<u8>().wrapping_add(1).cast()),
        MOE_ERROR_MISALIGNED,
        "x",
    ),
    (Args(|a| a.experts = null()), MOE_ERROR_NULL, "experts"),
    (Args(|a| a.shared = null()), MOE_ERROR_NULL, "shared"),
    (Args(|a| a.gate = null()), MOE_ERROR_VALUE, "gate_bias"),
    (
        Args(|a| (a.gate, a.gate_bias, a.gate_bias_len) = (null(), 0, 0)),
        MOE_ERROR_VALUE,
        "routing",
    ),
    (Args(|a| a.logits = a.x), MOE_ERROR_VALUE, "routing"),
    (
        Args(|a| (a.ids, a.ids_len) = (a.correction_bias, T * K)),
        MOE_ERROR_VALUE,
        "routing",
    ),
    (
        Args(|a| (a.correction_bias, a.correction_bias_len) = (0, 0)),
        MOE_ERROR_VALUE,
        "correction_bias",
    ),
    (
        Args(|a| (a.per_expert_scale, a.per_expert_scale_len) = (0, 0)),
        MOE_ERROR_VALUE,
        "per_expert_scale",
    ),
    (
        Args(|a| (a.given_ids, a.given_ids_len) = (a.correction_bias, 3)),
        MOE_ERROR_SHAPE,
        "given_ids",
    ),
    (Args(|a| a.workspace = 0), MOE_ERROR_NULL, "workspace"),
    (
        Args(|a| a.workspace_bytes = usize::MAX),
        MOE_ERROR_OVERFLOW,
        "workspace",
    ),
];

/// What only the device's plan finds.
const WRONG_FOR_THE_DEVICE: &[Wrong] = &[
    (
        Operand(|o| (o.x.dtype, o.x.bytes) = (MOE_DTYPE_BF16, T * H * 2)),
        MOE_ERROR_VALUE,
        "x",
    ),
    (Operand(|o| o.norm.eps = -1.0), MOE_ERROR_VALUE, "eps"),
    (Operand(|o| o.gate_proj.dtype = MOE_DTYPE_F32), MOE_OK, ""), // not used by this layout
    (
        Args(|a| a.workspace_bytes = 0),
        MOE_ERROR_BUFFER_TOO_SMALL,
        "workspace",
    ),
    (
        Args(|a| a.workspace_bytes -= 1),
        MOE_ERROR_BUFFER_TOO_SMALL,
        "workspace",
    ),
    (
        Args(|a| a.shared_gate = null()),
        MOE_ERROR_VALUE,
        "shared.gate",
    ),
    (
        Args(|a| (a.given_ids, a.given_ids_len) = (a.workspace + 1024, 0)),
        MOE_ERROR_SHAPE,
        "given_ids",
    ),
];

fn run(device: &mut Device, list: &[Wrong]) {
    let (case, router) = (Case::FULL, Case::FULL.router());
    let stream = device.stream();
    for (n, (bend, expected, text)) in list.iter().enumerate() {
        let mut on = Operands::new(device, &case, &router);
        if let Operand(bend) = bend {
            bend(&mut on);
        }
        on.link();
        if let Experts(bend) = bend {
            bend(&mut on);
        }
        let mut args = on.args();
        if let Args(bend) = bend {
            bend(&mut args);
        }
        // SAFETY: a living handle, structs that live here; what is wrong is refused before it is followed.
        let status = unsafe { moe_cuda_layer_forward(on.layer, stream, &args) };
        assert_eq!(status, *expected, "{n}: {}", last_error());
        if status != MOE_OK {
            // The argument's whole name: what follows is no part of one.
            let rest = last_error()
                .strip_prefix(text)
                .map(|rest| rest.starts_with([':', ' ', '.']));
            assert_eq!(rest, Some(true), "{n}: {}", last_error());
        }
        if device.gpu.is_some() && status != MOE_OK {
            assert!(device.is_poisoned(on.y_place), "{n}: y was written");
        }
    }
}

#[test]
fn what_is_wrong_with_a_layer_is_refused() {
    run(&mut Device::open_or_not(), WRONG);
}

#[test]
fn what_the_device_does_not_take_is_refused() {
    let Some(mut device) = Device::open() else {
        return;
    };
    run(&mut device, WRONG_FOR_THE_DEVICE);
}

#[test]
fn layers_of_a_plain_kind_have_no_shared_expert() {
    let mut device = Device::open_or_not();
    let (case, router) = (Case::PLAIN, Case::PLAIN.router());
    let mut on = Operands::new(&mut device, &case, &router);
    on.link();
    let (mut shared, mut gate, mut stray) = (on.args(), on.args(), on.args());
    shared.shared = &on.shared;
    gate.shared_gate = &on.shared_gate;
    (stray.gate, stray.gate_bias, stray.gate_bias_len) = (null(), 0, 0);
    (stray.ids, stray.ids_len) = (on.correction.data, T * K);
    (stray.weights, stray.weights_len) = (on.correction.data, T * K);
    (stray.given_ids, stray.given_ids_len) = (on.correction.data, T * K);
    for (args, text) in [
        (shared, "shared:"),
        (gate, "shared_gate:"),
        (stray, "given_ids:"),
    ] {
        // SAFETY: a living handle, structs that live here.
        let status = unsafe { moe_cuda_layer_forward(on.layer, device.stream(), &args) };
        assert_eq!(status, MOE_ERROR_VALUE);
        assert!(last_error().starts_with(text), "{}", last_error());
    }
}

#[test]
fn wrong_handles_are_refused() {
    let router = Case::PLAIN.router();
    let layer = create(&config(&Case::PLAIN), &Case::PLAIN.activation(), &router).unwrap();
    let args = moe_cuda_forward {
        struct_size: size_of::<moe_cuda_forward>(),
        ..Zeroable::zeroed()
    };
    let mut size = 0;
    // SAFETY: NULL or living handles (of a wrong kind), structs that live here.
    unsafe {
        let forward = |layer| moe_cuda_layer_forward(layer, std::ptr::null_mut(), &args);
        assert_eq!(forward(null()), MOE_ERROR_NULL);
        assert_eq!(forward(router.0.cast()), MOE_ERROR_HANDLE);
        assert_eq!(
            moe_cuda_layer_forward(layer, std::ptr::null_mut(), null()),
            MOE_ERROR_NULL
        );
        assert_eq!(moe_cuda_layer_prepare(layer, null()), MOE_ERROR_NULL);
        assert_eq!(
            moe_cuda_layer_workspace_size(null(), 1, &mut size),
            MOE_ERROR_NULL
        );
        assert_eq!(moe_cuda_layer_destroy(router.0.cast()), MOE_ERROR_HANDLE);
        assert_eq!(
            moe_cuda_route_workspace_size(layer.cast(), 1, &mut size),
            MOE_ERROR_HANDLE
        );
        assert_eq!(
            moe_cuda_route_workspace_size(router.0, 1, std::ptr::null_mut()),
            MOE_ERROR_NULL
        );
        assert_eq!(
            moe_cuda_route_workspace_size(router.0, usize::MAX, &mut size),
            MOE_ERROR_OVERFLOW
        );
        assert_eq!(size, 0);
        must(moe_cuda_layer_destroy(layer));
        must(moe_cuda_layer_destroy(std::ptr::null_mut()));
    }
}

#[test]
fn wrong_configs_are_refused() {
    let router = Case::PLAIN.router();
    type Bend = fn(&mut moe_cuda_layer_config);
    let list: [(Bend, moe_status, &str); 17] = [
        (|c| c.struct_size = 8, MOE_ERROR_STRUCT_SIZE, "config"),
        (|c| c.hidden = 0, MOE_ERROR_VALUE, "hidden"),
        (
            |c| c.intermediate = usize::MAX,
            MOE_ERROR_VALUE,
            "intermediate",
        ),
        (|c| c.dtype = 0, MOE_ERROR_VALUE, "dtype"),
        (|c| c.ys_dtype = 4, MOE_ERROR_VALUE, "ys_dtype"),
        (|c| c.numerics = 3, MOE_ERROR_VALUE, "numerics"),
        (|c| c.strict = 2, MOE_ERROR_VALUE, "strict"),
        (
            |c| c.weight_on_input = 2,
            MOE_ERROR_VALUE,
            "weight_on_input",
        ),
        (
            |c| c.routed_scale = f32::NAN,
            MOE_ERROR_VALUE,
            "routed_scale",
        ),
        (|c| c.first_local = 1, MOE_ERROR_VALUE, "first_local"),
        (|c| c.num_local = E + 1, MOE_ERROR_VALUE, "local_experts"),
        (
            |c| (c.first_local, c.num_local) = (1, usize::MAX),
            MOE_ERROR_OVERFLOW,
            "first_local",
        ),
        (
            |c| c.shared_join = MOE_JOIN_AVERAGE,
            MOE_ERROR_VALUE,
            "shared_join",
        ),
        (
            |c| (c.shared_intermediate, c.shared_join) = (8, MOE_JOIN_ROUTER_WEIGHTED),
            MOE_ERROR_VALUE,
            "shared_join",
        ),
        (
            |c| (c.shared_intermediate, c.shared_join) = (8, 4),
            MOE_ERROR_VALUE,
            "shared_join",
        ),
        (
            |c| c.shared_intermediate = usize::MAX,
            MOE_ERROR_VALUE,
            "shared.intermediate",
        ),
        (|c| c.reserved = 1, MOE_ERROR_VALUE, "config"),
    ];
    for (n, (bend, expected, text)) in list.into_iter().enumerate() {
        let mut config = config(&Case::PLAIN);
        bend(&mut config);
        let found = create(&config, &Case::PLAIN.activation(), &router);
        assert_eq!(found, Err(expected), "{n}: {}", last_error());
        assert!(last_error().starts_with(text), "{n}: {}", last_error());
    }
    // What a GPU's router does not do is said by name.
    let shared = RouterHandle::new(c"mixtral", |config| {
        (config.joint_shared, config.score, config.weights) =
            (1, MOE_SCORE_SIGMOID, MOE_WEIGHTS_JOINT_WITH_SHARED);
        config.renorm = MOE_RENORM_NONE;
    });
    let found = create(&config(&Case::PLAIN), &Case::PLAIN.activation(), &shared);
    assert_eq!(found, Err(MOE_ERROR_VALUE));
    assert!(last_error().starts_with("joint_shared"), "{}", last_error());
    let unknown = moe_activation {
        function: 77,
        ..Case::PLAIN.activation()
    };
    assert_eq!(
        create(&config(&Case::PLAIN), &unknown, &router),
        Err(MOE_ERROR_VALUE)
    );
}
