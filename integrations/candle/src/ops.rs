//! The custom ops: what candle calls with storages and layouts.
//!
//! Each makes views of the tensors, takes a workspace and calls the layer once. Those for a GPU, whose weights are elsewhere, are in `cuda::ops`.

use crate::layer::Shared;
use crate::view::{copy_ids, floats, format, matrix, matrix_mut, refused};
use crate::workspaces::Workspace;
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, InplaceOp2, Layout, Result, Shape, bail,
};
use half::vec::HalfBitsVecExt;
use moe_kernels::moe::{Forward, RouteFrom};
use moe_kernels::routing::GivenRouting;
use moe_kernels::{AnyMatMut, AnyMatRef, DType};
use std::sync::Arc;

/// `MoeLayer::forward`
pub(crate) struct Call(pub Arc<Shared>);
/// `MoeLayer::forward_into`
pub(crate) struct CallInto<'a>(pub &'a Shared);
/// `MoeLayer::forward_logits`
pub(crate) struct CallLogits<'a>(pub &'a Shared);
/// `MoeLayer::forward_routed`
pub(crate) struct CallRouted<'a>(pub &'a Shared);

/// What errors of candle call these ops.
pub(crate) const NAME: &str = "moe-kernels";

/// A storage of zeros. The allocator hands out large ones as pages that nobody has touched, also for the half formats, whose zero is that of their bits.
fn zeros(dtype: DType, elements: usize) -> Result<CpuStorage> {
    Ok(match dtype {
        DType::F32 => CpuStorage::F32(vec![0.0; elements]),
        DType::F16 => CpuStorage::F16(vec![0u16; elements].reinterpret_into()),
        DType::BF16 => CpuStorage::BF16(vec![0u16; elements].reinterpret_into()),
        other => bail!("x: candle has no format {other}"),
    })
}

/// The output tensor of x's shape, filled by `run`, which checks before it writes.
fn output(
    x: &CpuStorage,
    layout: &Layout,
    run: impl FnOnce(AnyMatRef<'_>, AnyMatMut<'_>) -> Result<()>,
) -> Result<(CpuStorage, Shape)> {
    let shape = layout.shape().clone();
    let dtype = format("x", x.dtype())?;
    let x = matrix("x", x, layout)?;
    let mut y = zeros(dtype, shape.elem_count())?;
    run(x, matrix_mut("y", &mut y, &Layout::contiguous(&shape))?)?;
    Ok((y, shape))
}

impl Shared {
    /// One call of the layer with a workspace.
    fn run(&self, x: AnyMatRef<'_>, route: RouteFrom<'_>, y: AnyMatMut<'_>) -> Result<()> {
        self.workspaces
            .with(|workspace| self.run_with(workspace, x, route, y))
    }

    fn run_with(
        &self,
        workspace: &mut Workspace,
        x: AnyMatRef<'_>,
        route: RouteFrom<'_>,
        y: AnyMatMut<'_>,
    ) -> Result<()> {
        let bytes = self
            .layer
            .workspace_size(&self.cpu, x.rows())
            .map_err(refused)?;
        workspace.bytes(bytes);
        let forward = Forward {
            route,
            ..Forward::default()
        };
        let result = self.layer.forward_with(
            &self.cpu,
            x,
            &forward,
            y,
            &mut workspace.routing,
            &mut workspace.bytes,
        );
        result.map_err(refused)
    }

    /// The same from ids and weights.
    fn run_routed(
        &self,
        x: AnyMatRef<'_>,
        (ids, ids_layout): (&CpuStorage, &Layout),
        weights: &[f32],
        y: AnyMatMut<'_>,
    ) -> Result<()> {
        let config = self.layer.router().config();
        let slots = config.slots();
        if ids_layout.dims().last() != Some(&slots) {
            bail!("ids: expected [.., {slots}], got {:?}", ids_layout.dims());
        }
        self.workspaces.with(|workspace| {
            copy_ids("ids", ids, ids_layout, &mut workspace.ids)?;
            if workspace.ids.len() != x.rows() * slots {
                bail!(
                    "ids: expected {} rows, one for each row of x, got {:?}",
                    x.rows(),
                    ids_layout.dims()
                );
            }
            let given = GivenRouting::new(config.num_experts, slots, &workspace.ids, weights)
                .null_experts(config.null_experts);
            workspace
                .routing
                .set_given(&self.cpu, &given)
                .map_err(refused)?;
            self.run_with(workspace, x, RouteFrom::Routing, y)
        })
    }
}

impl CustomOp1 for Call {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        output(x, layout, |x, y| self.0.run(x, RouteFrom::Gate, y))
    }
}

impl InplaceOp2 for CallInto<'_> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        y: &mut CpuStorage,
        y_layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
    ) -> Result<()> {
        if y_layout.dims() != x_layout.dims() {
            bail!(
                "y: expected shape {:?}, that of x, got {:?}",
                x_layout.dims(),
                y_layout.dims()
            );
        }
        let x = matrix("x", x, x_layout)?;
        self.0
            .run(x, RouteFrom::Gate, matrix_mut("y", y, y_layout)?)
    }
}

impl CustomOp2 for CallLogits<'_> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        logits: &CpuStorage,
        logits_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let logits = matrix("logits", logits, logits_layout)?;
        output(x, x_layout, |x, y| {
            self.0.run(x, RouteFrom::Logits(logits), y)
        })
    }
}

impl CustomOp3 for CallRouted<'_> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        ids: &CpuStorage,
        ids_layout: &Layout,
        weights: &CpuStorage,
        weights_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if ids_layout.dims() != weights_layout.dims() {
            bail!(
                "weights: expected shape {:?}, that of ids, got {:?}",
                ids_layout.dims(),
                weights_layout.dims()
            );
        }
        let weights = floats("weights", weights, weights_layout)?;
        output(x, x_layout, |x, y| {
            self.0.run_routed(x, (ids, ids_layout), weights, y)
        })
    }
}
