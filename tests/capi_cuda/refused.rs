//! Wrong calls. Every check comes before anything is queued; those of the host come before the driver, so that they are seen without a GPU, too.

use crate::common::cases;
use crate::operands::*;
use crate::world::*;
use crate::{E, H, I, K, T, last_error, must};
use bytemuck::Zeroable;
use moe_kernels::ffi::*;
use proptest::prelude::*;
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
            let y = device.read::<u32>(on.y_place);
            assert!(y.iter().all(|&v| v == u32::MAX), "{n}: y was written");
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

/// The stages' structs, good but for what a test bends, with addresses that are never followed.
struct Stages {
    matrix: moe_device_matrix,
    out: moe_device_matrix,
    up: moe_device_weights,
    route: moe_cuda_route_args,
    permute: moe_cuda_permute_args,
    copy: moe_cuda_copy_args,
    gemm: moe_cuda_gemm_args,
    combine: moe_cuda_combine_args,
}

impl Stages {
    fn new() -> Box<Self> {
        let at = |n: u64| n << 20;
        let mut s = Box::new(Self {
            matrix: device_matrix(at(1), T, E, MOE_DTYPE_F32),
            out: device_matrix(at(2), T, E, MOE_DTYPE_F32),
            up: moe_device_weights {
                data: at(3),
                bytes: E * E * 4,
                experts: 1,
                rows: E,
                cols: E,
                row_stride: E as isize,
                dtype: MOE_DTYPE_F32,
                ..Zeroable::zeroed()
            },
            route: Zeroable::zeroed(),
            permute: Zeroable::zeroed(),
            copy: Zeroable::zeroed(),
            gemm: Zeroable::zeroed(),
            combine: Zeroable::zeroed(),
        });
        let (matrix, out, up) = (&raw const s.matrix, &raw const s.out, &raw const s.up);
        s.route = moe_cuda_route_args {
            struct_size: size_of::<moe_cuda_route_args>(),
            logits: matrix,
            ids: at(4),
            ids_len: T * K,
            weights: at(5),
            weights_len: T * K,
            ..Zeroable::zeroed()
        };
        s.permute = moe_cuda_permute_args {
            struct_size: size_of::<moe_cuda_permute_args>(),
            num_experts: E,
            ids: at(4),
            ids_len: T * K,
            counts: at(6),
            counts_len: E,
            offsets: at(7),
            offsets_len: E + 1,
            pair_of_row: at(8),
            pair_of_row_len: T * K,
            row_of_pair: at(9),
            row_of_pair_len: T * K,
            ..Zeroable::zeroed()
        };
        s.copy = moe_cuda_copy_args {
            struct_size: size_of::<moe_cuda_copy_args>(),
            src: matrix,
            out,
            index: at(9),
            index_len: T,
            divisor: 1,
            ..Zeroable::zeroed()
        };
        s.gemm = moe_cuda_gemm_args {
            struct_size: size_of::<moe_cuda_gemm_args>(),
            a: matrix,
            up,
            out,
            ..Zeroable::zeroed()
        };
        s.combine = moe_cuda_combine_args {
            struct_size: size_of::<moe_cuda_combine_args>(),
            ys: matrix,
            row_of_pair: at(9),
            row_of_pair_len: T,
            slots: 1,
            out,
            routed_scale: 1.0,
            ..Zeroable::zeroed()
        };
        s
    }

    /// Makes the call of a stage: 0 to 4.
    fn call(&self, stage: usize, router: &RouterHandle) -> moe_status {
        let stream = std::ptr::null_mut();
        // SAFETY: a living handle, structs that live here; these calls end before anything is queued.
        unsafe {
            match stage {
                0 => moe_cuda_route(router.0, stream, &self.route),
                1 => moe_cuda_permute(stream, &self.permute),
                2 => moe_cuda_copy_rows(stream, &self.copy),
                3 => moe_cuda_grouped_gemm(stream, &self.gemm),
                _ => moe_cuda_combine(stream, &self.combine),
            }
        }
    }
}

#[test]
fn what_is_wrong_with_a_stage_is_refused() {
    let router = Case::PLAIN.router();
    type Bend = fn(&mut Stages);
    let list: &[(usize, Bend, moe_status, &str)] = &[
        (
            0,
            |s| s.route.struct_size = 1,
            MOE_ERROR_STRUCT_SIZE,
            "args",
        ),
        (0, |s| s.route.logits = null(), MOE_ERROR_NULL, "logits"),
        (0, |s| s.matrix.cols = E - 1, MOE_ERROR_SHAPE, "logits"),
        (
            0,
            |s| s.route.ids_len -= 1,
            MOE_ERROR_BUFFER_TOO_SMALL,
            "ids",
        ),
        (0, |s| s.route.ids += 1, MOE_ERROR_MISALIGNED, "ids"),
        (0, |s| s.route.weights = 0, MOE_ERROR_NULL, "weights"),
        (
            0,
            |s| s.route.weights = s.route.ids,
            MOE_ERROR_OVERLAP,
            "ids",
        ),
        (
            0,
            |s| s.route.ids = s.matrix.data,
            MOE_ERROR_OVERLAP,
            "logits",
        ),
        (
            0,
            |s| s.route.correction_bias_len = 1,
            MOE_ERROR_SHAPE,
            "correction_bias",
        ),
        (0, |s| s.route.given_ids = 4, MOE_ERROR_SHAPE, "given_ids"),
        (
            0,
            |s| s.route.shared_weights = 4,
            MOE_ERROR_VALUE,
            "shared_weights",
        ),
        (
            0,
            |s| s.route.noise_logits = &s.up as *const _ as *const _,
            MOE_ERROR_VALUE,
            "noise_logits",
        ),
        (
            0,
            |s| (s.route.workspace, s.route.workspace_bytes) = (4, 8),
            MOE_ERROR_MISALIGNED,
            "workspace",
        ),
        (
            1,
            |s| s.permute.struct_size = 1,
            MOE_ERROR_STRUCT_SIZE,
            "args",
        ),
        (
            1,
            |s| s.permute.num_experts = 0,
            MOE_ERROR_VALUE,
            "num_experts",
        ),
        (
            1,
            |s| s.permute.num_experts = usize::MAX,
            MOE_ERROR_VALUE,
            "num_experts",
        ),
        (
            1,
            |s| s.permute.ids_len = usize::MAX,
            MOE_ERROR_OVERFLOW,
            "",
        ),
        (1, |s| s.permute.ids = 0, MOE_ERROR_NULL, "ids"),
        (
            1,
            |s| s.permute.counts_len -= 1,
            MOE_ERROR_BUFFER_TOO_SMALL,
            "counts",
        ),
        (
            1,
            |s| s.permute.offsets_len -= 1,
            MOE_ERROR_BUFFER_TOO_SMALL,
            "offsets",
        ),
        (
            1,
            |s| s.permute.pair_of_row_len -= 1,
            MOE_ERROR_BUFFER_TOO_SMALL,
            "pair_of_row",
        ),
        (
            1,
            |s| s.permute.row_of_pair_len -= 1,
            MOE_ERROR_BUFFER_TOO_SMALL,
            "row_of_pair",
        ),
        (
            1,
            |s| s.permute.counts = s.permute.offsets,
            MOE_ERROR_OVERLAP,
            "counts",
        ),
        (
            1,
            |s| s.permute.row_of_pair = s.permute.ids,
            MOE_ERROR_OVERLAP,
            "ids",
        ),
        (2, |s| s.copy.out = null(), MOE_ERROR_NULL, "out"),
        (2, |s| s.out.cols -= 1, MOE_ERROR_SHAPE, "src"),
        (2, |s| s.out.dtype = MOE_DTYPE_F16, MOE_ERROR_VALUE, "out"),
        (
            2,
            |s| s.copy.index_len -= 1,
            MOE_ERROR_BUFFER_TOO_SMALL,
            "index",
        ),
        (2, |s| s.copy.used = 2, MOE_ERROR_MISALIGNED, "used"),
        (2, |s| s.out.data = s.matrix.data, MOE_ERROR_OVERLAP, "src"),
        (3, |s| s.gemm.up = null(), MOE_ERROR_NULL, "up"),
        (3, |s| s.matrix.cols -= 1, MOE_ERROR_SHAPE, "a"),
        (3, |s| s.out.cols -= 1, MOE_ERROR_SHAPE, "out"),
        (
            3,
            |s| s.gemm.gate_bias = &s.matrix,
            MOE_ERROR_VALUE,
            "gate_bias",
        ),
        (
            3,
            |s| s.gemm.up_bias = &s.matrix,
            MOE_ERROR_SHAPE,
            "up_bias",
        ),
        (3, |s| s.gemm.slots = 2, MOE_ERROR_VALUE, "slots"),
        (
            3,
            |s| s.gemm.input_scale_len = 2,
            MOE_ERROR_VALUE,
            "input_scale",
        ),
        (
            3,
            |s| (s.gemm.pair_of_row, s.gemm.pair_of_row_len) = (4, 1),
            MOE_ERROR_BUFFER_TOO_SMALL,
            "pair_of_row",
        ),
        (
            3,
            |s| (s.gemm.counts, s.gemm.counts_len) = (4, 1),
            MOE_ERROR_BUFFER_TOO_SMALL,
            "offsets",
        ),
        (3, |s| s.up.experts = 0, MOE_ERROR_VALUE, "offsets"),
        (3, |s| s.gemm.numerics = 9, MOE_ERROR_VALUE, "numerics"),
        (3, |s| s.gemm.strict = 9, MOE_ERROR_VALUE, "strict"),
        (4, |s| s.combine.ys = null(), MOE_ERROR_NULL, "ys"),
        (4, |s| s.matrix.cols -= 1, MOE_ERROR_SHAPE, "ys"),
        (
            4,
            |s| s.combine.row_of_pair_len -= 1,
            MOE_ERROR_SHAPE,
            "row_of_pair",
        ),
        (4, |s| s.combine.weights = 4, MOE_ERROR_SHAPE, "weights"),
        (4, |s| s.combine.slots = usize::MAX, MOE_ERROR_OVERFLOW, ""),
        (4, |s| s.combine.ids_len = 3, MOE_ERROR_VALUE, "ids, x"),
        (
            4,
            |s| s.combine.shared_kind = 1,
            MOE_ERROR_VALUE,
            "shared_kind",
        ),
        (
            4,
            |s| s.combine.shared_gate = 4,
            MOE_ERROR_VALUE,
            "shared_kind",
        ),
        (4, |s| s.combine.bias_len = 3, MOE_ERROR_SHAPE, "bias"),
        (
            4,
            |s| s.combine.residual = &s.up as *const _ as *const _,
            MOE_ERROR_VALUE,
            "residual",
        ),
        (4, |s| s.out.data = s.matrix.data, MOE_ERROR_OVERLAP, "out"),
    ];
    for (n, (stage, bend, expected, text)) in list.iter().enumerate() {
        let mut stages = Stages::new();
        bend(&mut stages);
        let status = stages.call(*stage, &router);
        assert_eq!(status, *expected, "{n}: {}", last_error());
        assert!(last_error().starts_with(text), "{n}: {}", last_error());
    }
    if moe_cuda_is_available() == 0 {
        for stage in 0..5 {
            assert_eq!(
                Stages::new().call(stage, &router),
                MOE_ERROR_UNSUPPORTED,
                "{}",
                last_error()
            );
        }
    }
}

/// Numbers that are near something.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0u64..20,
        2 => (0u32..64).prop_map(|n| 1 << n),
        1 => (0u32..64).prop_map(|n| (1 << n) - 1),
        1 => any::<u64>(),
    ]
}

proptest! {
    #![proptest_config(cases(500))]

    /// Arbitrary sizes, strides, addresses and constants in every field of a layer's call, which is planned but not queued: refused or planned, never a bug that is
    /// caught. Without a GPU the stages see them, too.
    #[test]
    fn arbitrary_numbers_are_refused_or_planned(
        bends in prop::collection::vec((0usize..10, 0usize..8, number()), 1..6),
    ) {
        thread_local!(static GPU: Option<crate::gpu::Gpu> = crate::gpu::open());
        let has_gpu = GPU.with(Option::is_some);
        let (case, router) = (Case::FULL, Case::FULL.router());
        let mut on = Operands::new(&mut Device::made_up(), &case, &router);
        let mut stages = Stages::new();
        for (which, field, value) in bends {
            let m = match which {
                0 => &mut on.x,
                1 => &mut on.y,
                2 => &mut on.gate,
                3 => &mut on.residual,
                4 => &mut on.gate_up_bias,
                5 => &mut stages.matrix,
                6 => &mut stages.out,
                _ => {
                    let w = match which {
                        7 => &mut on.up,
                        8 => &mut on.down,
                        _ => &mut stages.up,
                    };
                    match field {
                        0 => w.data = value,
                        1 => w.bytes = value as usize,
                        2 => w.experts = value as usize,
                        3 => w.rows = value as usize,
                        4 => w.cols = value as usize,
                        5 => w.expert_stride = value as isize,
                        6 => w.row_stride = value as isize,
                        _ => w.dtype = value as u32,
                    }
                    continue;
                }
            };
            match field {
                0 => m.data = value,
                1 => m.bytes = value as usize,
                2 => m.rows = value as usize,
                3 => m.cols = value as usize,
                4 | 5 => m.row_stride = value as isize,
                _ => m.dtype = value as u32,
            }
        }
        on.link();
        // SAFETY: a living handle, structs that live here; nothing is queued, so no address is followed.
        let status = unsafe { moe_cuda_layer_prepare(on.layer, &on.args()) };
        prop_assert!(status != MOE_ERROR_INTERNAL, "{}", last_error());
        if !has_gpu {
            prop_assert!(status != MOE_OK);
            for stage in 0..5 {
                let status = stages.call(stage, &router);
                prop_assert!(status != MOE_ERROR_INTERNAL && status != MOE_OK, "{}", last_error());
            }
        }
    }
}
