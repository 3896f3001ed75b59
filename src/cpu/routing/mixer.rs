//! PhiMoE's sparsemixer at inference (Liu, Gao, Chen 2023, "Sparse backpropagation for MoE training"): two masked softmaxes.

use super::logits::{Block, softmax};
use crate::cpu::simd::Simd;
use crate::cpu::simd::math::REDUCTION_LANES;

/// The weight of each choice: with m its logit, its softmax over the logits that are left, that is not chosen before, and near, that is not
/// `(m − z) / max(|z|, m) > 2·jitter_eps`.
///
/// `room` holds twice as many blocks as `z`.
#[inline(always)]
pub(super) fn weights<S: Simd>(
    s: S,
    jitter_eps: f32,
    z: &[Block],
    room: &mut [Block],
    ids: &[i32],
    weights: &mut [f32],
) {
    let (left, soft) = room.split_at_mut(z.len());
    let reach = s.splat(2.0 * jitter_eps);
    let nothing = s.splat(f32::NEG_INFINITY);
    for (slot, &id) in ids.iter().enumerate() {
        let m = s.splat(z.as_flattened()[id as usize]);
        for (z, left) in z.iter().zip(left.iter_mut()) {
            for i in (0..REDUCTION_LANES).step_by(S::LANES) {
                let z = s.load_slice(&z[i..]);
                let distance = s.div(s.sub(m, z), s.max(s.abs(z), m));
                // False for NaN, as 0/0: such a logit stays.
                let far = s.lt(reach, distance);
                s.store_slice(&mut left[i..], s.select(far, nothing, z));
            }
        }
        for &before in &ids[..slot] {
            left.as_flattened_mut()[before as usize] = f32::NEG_INFINITY;
        }
        softmax(s, left, soft);
        weights[slot] = soft.as_flattened()[id as usize];
    }
}
