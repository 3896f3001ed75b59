//! The workspace of a layer: what its stages hand to each other.

use super::{CudaMoeLayer, SharedJoin};
use crate::cuda::workspace::{Layout, Piece};
use crate::cuda::{DeviceInfo, DevicePtr};
use crate::cuda::{permute, routing};
use crate::error::Result;
use crate::permute::PermuteOptions;
use crate::shape::pairs;
use core::ops::Range;

/// Where a call leaves what it routed by: ranges of bytes of its workspace, numbers without gaps. For load statistics, losses or a look at what happened; valid until
/// the next call with that workspace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkspaceRouting {
    /// f32 `[T, R]`: the gate's logits, before multiplier, softcap and noise. Written by a call through the gate.
    pub logits: Range<usize>,
    /// i32 `[T, slots]`. Written by a call whose routing is not given, as the weights are.
    pub ids: Range<usize>,
    /// f32 `[T, slots]`
    pub weights: Range<usize>,
}

/// Where each piece lies.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pieces {
    pub(super) gate_x: Piece,
    pub(super) logits: Piece,
    pub(super) noise: Piece,
    pub(super) ids: Piece,
    pub(super) weights: Piece,
    pub(super) shared_weights: Piece,
    pub(super) route: Piece,
    pub(super) counts: Piece,
    pub(super) offsets: Piece,
    pub(super) pair_of_row: Piece,
    pub(super) row_of_pair: Piece,
    pub(super) permute: Piece,
    /// The latent input, later the latent sum.
    pub(super) latent: Piece,
    pub(super) latent_norm: Piece,
    pub(super) h: Piece,
    pub(super) ys: Piece,
    pub(super) routed: Piece,
    pub(super) shared_h: Piece,
    pub(super) shared_y: Piece,
    pub(super) shared_gate: Piece,
    /// Rows of h and ys.
    pub(super) rows: usize,
    /// Bytes of the whole workspace.
    pub(super) total: usize,
}

impl CudaMoeLayer {
    /// Bytes of device memory that a call needs for up to `max_tokens` tokens, wherever its routing comes from.
    ///
    /// # Errors
    /// [`Error::Overflow`](crate::Error::Overflow) when they do not fit the address space, or the pairs `i32`.
    pub fn workspace_size(&self, max_tokens: usize, device: &DeviceInfo) -> Result<usize> {
        self.pieces(max_tokens, device).map(|p| p.total)
    }

    /// Where a call for `tokens` tokens, not less, leaves logits, ids and weights in the workspace at address `workspace`.
    ///
    /// # Errors
    /// Those of [`workspace_size`](Self::workspace_size).
    pub fn workspace_routing(
        &self,
        tokens: usize,
        workspace: DevicePtr,
        device: &DeviceInfo,
    ) -> Result<WorkspaceRouting> {
        let pieces = self.pieces(tokens, device)?;
        // Neither product overflows: the pieces were measured by them.
        let range = |piece: Piece, numbers: usize| {
            let start = piece.at(workspace).0.wrapping_sub(workspace.0) as usize;
            start..start + 4 * numbers
        };
        let pairs = tokens * self.router.slots();
        Ok(WorkspaceRouting {
            logits: range(pieces.logits, tokens * self.router.num_logits()),
            ids: range(pieces.ids, pairs),
            weights: range(pieces.weights, pairs),
        })
    }

    /// How the pairs are sorted: rows of neighbours, since the products mask what a tile has too much.
    pub(super) fn permute_options(&self) -> PermuteOptions {
        PermuteOptions {
            block: 1,
            local: Some(self.local_experts.clone()),
            num_null: self.router.null_experts.count(),
        }
    }

    pub(super) fn pieces(&self, tokens: usize, device: &DeviceInfo) -> Result<Pieces> {
        let (experts, hidden) = (self.router.num_experts, self.hidden);
        let pairs = pairs(tokens, self.router.slots())?;
        let options = self.permute_options();
        let rows = permute::max_rows(pairs, experts, &options)?;
        let shared = self.shared;
        let gated = shared.is_some_and(|s| s.join == SharedJoin::SigmoidGate);
        let shared_width = shared.map_or(0, |s| s.intermediate);
        let shared_outputs = shared.map_or(0, |s| s.count);
        let latent = self.latent.map_or(0, |l| l.width);
        let when = |wanted: bool, size: usize| if wanted { size } else { 0 };
        let logits = self.router.num_logits();
        let mut layout = Layout::default();
        let mut add = |factors: &[usize]| layout.add(factors);
        let mut pieces = Pieces {
            gate_x: add(&[when(self.gate_norm, tokens), hidden, 4])?,
            logits: add(&[tokens, logits, 4])?,
            noise: add(&[when(self.router.noise_seed.is_some(), tokens), logits, 4])?,
            ids: add(&[pairs, 4])?,
            weights: add(&[pairs, 4])?,
            shared_weights: add(&[tokens, self.router.joint_shared, 4])?,
            route: add(&[routing::workspace_size(&self.router, tokens)?])?,
            counts: add(&[experts, 4])?,
            offsets: add(&[experts + 1, 4])?,
            pair_of_row: add(&[rows, 4])?,
            row_of_pair: add(&[pairs, 4])?,
            permute: add(&[permute::workspace_size(pairs, experts, &options, device)?])?,
            latent: add(&[tokens, latent, 4])?,
            latent_norm: add(&[when(self.latent.is_some_and(|l| l.norm), tokens), latent, 4])?,
            h: add(&[rows, self.intermediate, self.dtype.size()])?,
            ys: add(&[rows, self.expert_hidden(), self.ys_dtype.size()])?,
            routed: add(&[when(latent > 0, tokens), hidden, 4])?,
            shared_h: add(&[tokens, shared_width, self.dtype.size()])?,
            shared_y: add(&[tokens, hidden, shared_outputs, 4])?,
            shared_gate: add(&[when(gated, tokens), 4])?,
            rows,
            total: 0,
        };
        pieces.total = layout.total();
        Ok(pieces)
    }
}
