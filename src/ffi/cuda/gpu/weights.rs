//! Experts' weights by their layout.

use super::memory::{DeviceRegions, Matrix, Weights};
use crate::cuda::moe::ExpertPointers;
use crate::ffi::cuda::{moe_cuda_expert_weights, moe_device_matrix, moe_device_weights};
use crate::ffi::experts::{MOE_LAYOUT_FUSED, MOE_LAYOUT_INTERLEAVED, MOE_LAYOUT_SEPARATE};
use crate::ffi::memory::{null, read_struct};
use crate::ffi::status::*;

/// What the fields are called in errors.
pub(super) struct Names {
    whole: &'static str,
    layout: &'static str,
    matrices: [&'static str; 4],
    biases: [&'static str; 4],
}

pub(super) const EXPERTS: Names = Names {
    whole: "experts",
    layout: "experts.layout",
    matrices: [
        "experts.gate",
        "experts.up",
        "experts.gate_up",
        "experts.down",
    ],
    biases: [
        "experts.gate_bias",
        "experts.up_bias",
        "experts.gate_up_bias",
        "experts.down_bias",
    ],
};

pub(super) const SHARED: Names = Names {
    whole: "shared",
    layout: "shared.layout",
    matrices: ["shared.gate", "shared.up", "shared.gate_up", "shared.down"],
    biases: [
        "shared.gate_bias",
        "shared.up_bias",
        "shared.gate_up_bias",
        "shared.down_bias",
    ],
};

/// `[E, I, H]` and `[E, H, I]`.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) experts: usize,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) gated: bool,
}

/// Every matrix of the struct: gate, up, gate_up, down; and biases in the same order.
struct Fields {
    matrices: [Option<Weights>; 4],
    biases: [Option<Matrix>; 4],
}

impl Fields {
    /// # Safety
    /// The pointers of `w` are null or valid.
    unsafe fn read(
        regions: &mut DeviceRegions,
        names: &Names,
        w: &moe_cuda_expert_weights,
    ) -> Checked<Self> {
        let matrices: [*const moe_device_weights; 4] = [w.gate, w.up, w.gate_up, w.down];
        let biases: [*const moe_device_matrix; 4] =
            [w.gate_bias, w.up_bias, w.gate_up_bias, w.down_bias];
        let mut fields = Self {
            matrices: [None; 4],
            biases: [None; 4],
        };
        for i in 0..4 {
            // SAFETY: this function's contract.
            unsafe {
                fields.matrices[i] = regions.optional_weights(names.matrices[i], matrices[i])?;
                fields.biases[i] = regions.optional_matrix(names.biases[i], biases[i])?;
            }
        }
        Ok(fields)
    }

    /// Refuses what the layout (or the activation) has no place for, and what it lacks.
    fn check(&self, names: &Names, separate: bool, gated: bool) -> Checked {
        let wanted = [separate && gated, separate, !separate, true];
        for (i, wanted) in wanted.into_iter().enumerate() {
            let unused = |argument| {
                let expected = "NULL with this layout and activation";
                Err(Fault::value(argument, expected, "a matrix"))
            };
            match (wanted, &self.matrices[i]) {
                (true, None) => return Err(null(names.matrices[i])),
                (false, Some(_)) => return unused(names.matrices[i]),
                _ => {}
            }
            if !wanted && self.biases[i].is_some() {
                return unused(names.biases[i]);
            }
        }
        Ok(())
    }
}

/// Reads and checks the weights of experts.
///
/// # Safety
/// `p` is null or valid.
pub(super) unsafe fn experts(
    regions: &mut DeviceRegions,
    names: &Names,
    p: *const moe_cuda_expert_weights,
    sizes: Sizes,
) -> Checked<ExpertPointers> {
    // SAFETY: this function's contract.
    let w = unsafe { read_struct(names.whole, p) }?;
    if w.reserved != 0 {
        return Err(Fault::value(names.whole, "reserved = 0", w.reserved));
    }
    let separate = match w.layout {
        MOE_LAYOUT_SEPARATE => true,
        MOE_LAYOUT_FUSED | MOE_LAYOUT_INTERLEAVED if sizes.gated => false,
        MOE_LAYOUT_FUSED | MOE_LAYOUT_INTERLEAVED => {
            let expected = "MOE_LAYOUT_SEPARATE, since the activation has no gate";
            return Err(Fault::value(names.layout, expected, w.layout));
        }
        other => return Err(Fault::value(names.layout, "MOE_LAYOUT_*", other)),
    };
    // SAFETY: this function's contract.
    let fields = unsafe { Fields::read(regions, names, &w) }?;
    fields.check(names, separate, sizes.gated)?;
    let Sizes {
        experts: e,
        hidden: h,
        intermediate: i,
        ..
    } = sizes;
    // Neither I nor H is beyond i32, so that 2I fits.
    let rows = [i, i, 2 * i, h];
    let cols = [h, h, h, i];
    let mut matrices = [None; 4];
    let mut biases = [None; 4];
    for n in 0..4 {
        matrices[n] = fields.matrices[n]
            .map(|m| m.expect(e, rows[n], cols[n]))
            .transpose()?;
        biases[n] = fields.biases[n].map(|b| b.biases(e, rows[n])).transpose()?;
    }
    let [gate, up, gate_up, down] = matrices;
    let [gate_bias, up_bias, gate_up_bias, down_bias] = biases;
    // `check` has seen that these are there.
    let down = down.ok_or_else(|| null(names.matrices[3]))?;
    if separate {
        let up = up.ok_or_else(|| null(names.matrices[1]))?;
        let experts = match gate {
            Some(gate) => ExpertPointers::gated(gate, up, down),
            None => ExpertPointers::plain(up, down),
        };
        return Ok(experts.with_biases(gate_bias, up_bias, down_bias));
    }
    let both = gate_up.ok_or_else(|| null(names.matrices[2]))?;
    Ok(match (w.layout, gate_up_bias) {
        (MOE_LAYOUT_FUSED, Some(bias)) => {
            ExpertPointers::fused(both, i, down).with_fused_biases(bias, i, down_bias)
        }
        (MOE_LAYOUT_FUSED, None) => {
            ExpertPointers::fused(both, i, down).with_biases(None, None, down_bias)
        }
        (_, Some(bias)) => {
            ExpertPointers::interleaved(both, down).with_interleaved_biases(bias, down_bias)
        }
        (_, None) => ExpertPointers::interleaved(both, down).with_biases(None, None, down_bias),
    })
}
