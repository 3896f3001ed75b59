//! Arbitrary numbers in the fields of every struct.

use crate::common::cases;
use crate::last_error;
use crate::operands::*;
use crate::refused_stages::Stages;
use crate::world::*;
use moe_kernels::ffi::*;
use proptest::prelude::*;

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
