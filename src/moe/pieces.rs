//! The caller's workspace, cut into what the stages hand to each other.

use super::{MoeLayer, SharedCombine};
use crate::cpu::Cpu;
use crate::element::DType;
use crate::error::Result;
use crate::grouped_gemm::scratch_bytes;
use crate::workspace::{Arena, Sizes};
use bytemuck::cast_slice_mut;

impl MoeLayer {
    /// Bytes that [`forward`](Self::forward) needs for up to `max_tokens` tokens on `cpu`, whatever their format.
    ///
    /// # Errors
    /// [`Error::Overflow`](crate::Error::Overflow) when they do not fit the address space, or the pairs `u32`.
    pub fn workspace_size(&self, cpu: &Cpu, max_tokens: usize) -> Result<usize> {
        let pairs = crate::shape::pairs(max_tokens, self.router.config().slots())?;
        self.workspace_bytes(cpu, max_tokens, pairs, size_of::<f32>())
    }

    /// Bytes for so many tokens and rows, with elements of x of `size` bytes.
    pub(super) fn workspace_bytes(
        &self,
        cpu: &Cpu,
        tokens: usize,
        rows: usize,
        size: usize,
    ) -> Result<usize> {
        let mut sizes = Sizes::new();
        for piece in self.pieces(tokens, rows, size) {
            sizes.add(&piece);
        }
        sizes.add(&[scratch_bytes(cpu)]);
        sizes.total()
    }

    /// The pieces of a workspace: rows × columns × bytes, zeros for those that this layer does without. [`Pieces::take`] takes them in this order.
    fn pieces(&self, tokens: usize, rows: usize, size: usize) -> [[usize; 3]; 11] {
        let when = |wanted: bool, piece: [usize; 3]| if wanted { piece } else { [0; 3] };
        let (h, l) = (self.hidden(), self.experts.hidden());
        let logits = [tokens, self.router.config().num_logits(), 4];
        let gate = self.gate.as_ref();
        let latent = self.latent.is_some();
        let shared = self.shared.as_ref();
        let shared_width = shared.map_or(0, |s| s.experts.intermediate());
        // One shared expert at a time, and their sum where there are several.
        let shared_outputs = shared.map_or(0, |s| s.experts.len().min(2));
        let gated = shared.is_some_and(|s| matches!(s.combine, SharedCombine::SigmoidGate(_)));
        [
            when(gate.is_some_and(|g| g.input_norm.is_some()), [tokens, h, 4]),
            when(gate.is_some(), logits),
            when(gate.is_some_and(|g| g.noise.is_some()), logits),
            when(latent, [tokens, l, 4]),
            [rows, self.experts.intermediate(), size],
            [rows, l, 4],
            when(latent, [tokens, l, 4]),
            when(self.sum_goes_by_buffer(), [tokens, h, 4]),
            [tokens, shared_width, size],
            when(shared.is_some(), [tokens, h * shared_outputs, 4]),
            when(gated, [tokens, 1, 4]),
        ]
    }
}

/// A workspace, cut up. The names follow [`MoeLayer::pieces`].
pub(super) struct Pieces<'w> {
    pub(super) gate_x: &'w mut [f32],
    pub(super) logits: &'w mut [f32],
    pub(super) noise: &'w mut [f32],
    pub(super) latent_x: &'w mut [f32],
    pub(super) h: &'w mut [u8],
    pub(super) ys: &'w mut [f32],
    pub(super) latent_y: &'w mut [f32],
    pub(super) routed: &'w mut [f32],
    pub(super) shared_h: &'w mut [u8],
    pub(super) shared_y: &'w mut [f32],
    pub(super) shared_gate: &'w mut [f32],
    pub(super) scratch: &'w mut [u8],
}

impl<'w> Pieces<'w> {
    pub(super) fn take(
        layer: &MoeLayer,
        tokens: usize,
        rows: usize,
        dtype: DType,
        workspace: &'w mut [u8],
        needed: usize,
    ) -> Result<Self> {
        let mut arena = Arena::new(workspace, needed)?;
        let pieces = layer.pieces(tokens, rows, dtype.size());
        let [a, b, c, d, e, f, g, h, i, j, k] = pieces.map(|piece| arena.take(&piece));
        Ok(Self {
            gate_x: cast_slice_mut(a),
            logits: cast_slice_mut(b),
            noise: cast_slice_mut(c),
            latent_x: cast_slice_mut(d),
            h: e,
            ys: cast_slice_mut(f),
            latent_y: cast_slice_mut(g),
            routed: cast_slice_mut(h),
            shared_h: i,
            shared_y: cast_slice_mut(j),
            shared_gate: cast_slice_mut(k),
            scratch: arena.rest(),
        })
    }
}
