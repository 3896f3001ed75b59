//! Wrong calls of the stages, refused by the host before the driver is asked for anything.

use crate::operands::Case;
use crate::world::*;
use crate::{E, K, T, last_error};
use bytemuck::Zeroable;
use moe_kernels::ffi::*;
use std::ptr::null;

/// The stages' structs, good but for what a test bends, with addresses that are never followed.
pub struct Stages {
    pub matrix: moe_device_matrix,
    pub out: moe_device_matrix,
    pub up: moe_device_weights,
    route: moe_cuda_route_args,
    permute: moe_cuda_permute_args,
    copy: moe_cuda_copy_args,
    gemm: moe_cuda_gemm_args,
    combine: moe_cuda_combine_args,
}

impl Stages {
    pub fn new() -> Box<Self> {
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
    pub fn call(&self, stage: usize, router: &RouterHandle) -> moe_status {
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
