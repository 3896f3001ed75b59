//! The whole layer in one call, and each of its stages.
//!
//! ```text
//! x[T,H] ──gate──▶ logits[T,R] ──route──▶ ids, weights[T,K], offsets, pair_of_row, row_of_pair
//!   │
//!   ├─(latent in)─▶ gather rows ─▶ W_gate_up ─▶ activation ─▶ h[TK,I] ─▶ W_down ─▶ ys[TK,H] ─(post norm)─▶ Σ weight·ys
//!   │                                                                                  · scale, (latent out) ─▶ y[T,H]
//!   └──▶ shared experts ──────────────────────────────────────────────────────────────────────────────▶ + ──▶ norm, bias ─▶ y
//! ```
//!
//! A layer owns its packed weights. The caller owns inputs, outputs, the [`Routing`](crate::routing::Routing) and the workspace, so a call allocates nothing.
//!
//! The intermediate h has the format of x, as it does in the published models; latent inputs, ys and all sums are f32.

mod forward;
mod gate;
mod latent;
mod layer;
mod pieces;
mod shared;

pub use forward::{Forward, RouteFrom};
pub use gate::Gate;
pub use latent::Latent;
pub use layer::{MoeLayer, PostNorm};
pub use shared::{SharedCombine, SharedExperts};

use crate::cpu::Cpu;
use crate::error::Result;
use crate::grouped_gemm::{Groups, PackedMatrices, grouped_gemm_into};
use crate::matrix::{AnyMatMut, AnyMatRef};

/// An ordinary product with one matrix of a set.
fn product(
    cpu: &Cpu,
    x: AnyMatRef<'_>,
    weights: &PackedMatrices,
    expert: usize,
    out: AnyMatMut<'_>,
    scratch: &mut [u8],
) -> Result<()> {
    let groups = Groups::Single {
        rows: x.rows(),
        expert,
    };
    grouped_gemm_into(cpu, x, None, weights, groups, None, out, scratch)
}
