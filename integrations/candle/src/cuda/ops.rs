//! The custom ops: what candle calls with storages and layouts. Each finds its operands' addresses, checks their shapes, plans and queues.
#![allow(unsafe_code)] // one block: the plan of a call whose operands were checked here

use super::launch::output;
use super::layer::{Route, Shared};
use super::operands::Operands;
use crate::ops::NAME;
use crate::view::{format, refused};
use candle_core::backend::BackendStorage;
use candle_core::cuda::cudarc::driver::CudaStream;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, InplaceOp2, Layout, Result, Shape,
    bail,
};
use moe_kernels::cuda::combine::DeviceRows;
use moe_kernels::cuda::moe::RoutingPointers;
use std::sync::Arc;

/// `CudaMoeLayer::forward`
pub(super) struct Call(pub Arc<Shared>);
/// `CudaMoeLayer::forward_into`
pub(super) struct CallInto<'a>(pub &'a Shared);
/// `CudaMoeLayer::forward_logits`
pub(super) struct CallLogits<'a>(pub &'a Shared);
/// `CudaMoeLayer::forward_routed`
pub(super) struct CallRouted<'a>(pub &'a Shared);

/// A tensor and how it lies in it.
type At<'a> = (&'a CudaStorage, &'a Layout);

/// The layer refuses tensors on the CPU before candle asks an op.
fn not_here<T>() -> Result<T> {
    bail!(
        "x: expected a tensor on a CUDA device, where the layer's weights are, got one on the CPU"
    )
}

impl Shared {
    /// `[.., width]` of as many rows as x has.
    fn rows<'a>(
        &self,
        operands: &mut Operands<'a>,
        argument: &str,
        (storage, layout): At<'a>,
        width: usize,
        tokens: Option<usize>,
    ) -> Result<(usize, DeviceRows)> {
        if layout.dims().last().is_some_and(|&found| found != width) {
            bail!(
                "{argument}: expected shape [.., {width}], got {:?}",
                layout.dims()
            );
        }
        let (rows, at) = operands.rows(argument, storage, layout)?;
        if let Some(tokens) = tokens.filter(|&n| n != rows) {
            bail!("{argument}: expected {tokens} rows, one for each row of x, got {rows}");
        }
        Ok((rows, at))
    }

    /// A call with a new output of x's shape and format; `route` checks what else there is, given the number of tokens.
    fn forward<'a>(
        &'a self,
        x @ (storage, layout): At<'a>,
        route: impl FnOnce(&mut Operands<'a>, usize) -> Result<Route>,
        stream: &'a Arc<CudaStream>,
    ) -> Result<(CudaStorage, Shape)> {
        let device = storage.device();
        let shape = layout.shape().clone();
        let mut y = output(device, format("x", storage.dtype())?, shape.elem_count())?;
        let layout = Layout::contiguous(&shape);
        self.forward_to(x, route, (&mut y, &layout), stream)?;
        Ok((y, shape))
    }

    /// A call with an output of x's shape.
    fn forward_to<'a>(
        &'a self,
        x: At<'a>,
        route: impl FnOnce(&mut Operands<'a>, usize) -> Result<Route>,
        (y, y_layout): (&mut CudaStorage, &Layout),
        stream: &'a Arc<CudaStream>,
    ) -> Result<()> {
        if y_layout.dims() != x.1.dims() {
            bail!(
                "y: expected shape {:?}, that of x, got {:?}",
                x.1.dims(),
                y_layout.dims()
            );
        }
        // Locked before anything refers to them, so that they are let go last.
        let locked = self.weights.lock();
        let mut written = Operands::new(stream);
        let mut operands = Operands::new(stream);
        let (tokens, x) = self.rows(&mut operands, "x", x, self.layer.hidden(), None)?;
        let route = route(&mut operands, tokens)?;
        let (_, y) = written.rows_mut("y", y, y_layout)?;
        let mut weights_used = Operands::new(stream);
        let weights = locked.pointers(&self.weights, &mut weights_used)?;
        let bytes = self
            .layer
            .workspace_size(tokens, self.info())
            .map_err(refused)?;
        self.workspaces.with(stream, bytes, |workspace| {
            let pointers = self.pointers(&weights, x, route, y, workspace)?;
            let plan = self
                .layer
                .plan(tokens, &pointers, self.info())
                .map_err(refused)?;
            // SAFETY: every operand was found in a storage of this GPU, which is locked or borrowed and holds its extent: x and y `tokens` rows of H, the rest what `rows`, the callers and the layer's constructor compared
            // with the layer's shape. The workspace is as long as the plan wants, and belongs to this stream. Memory that is freed later is freed in the order of this stream, or after the events that the operands leave.
            // y shares its storage with nothing that is read: candle borrows it mutably. Ids are made or followed by kernels that accept any.
            unsafe { self.kernels.queue(stream, &plan) }
        })
    }
}

impl CustomOp1 for Call {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        not_here()
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let stream = x.device().cuda_stream();
        self.0.forward((x, layout), |_, _| Ok(Route::Gate), &stream)
    }
}

impl InplaceOp2 for CallInto<'_> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<()> {
        not_here()
    }

    fn cuda_fwd(
        &self,
        y: &mut CudaStorage,
        y_layout: &Layout,
        x: &CudaStorage,
        x_layout: &Layout,
    ) -> Result<()> {
        let stream = x.device().cuda_stream();
        let (x, y) = ((x, x_layout), (y, y_layout));
        self.0.forward_to(x, |_, _| Ok(Route::Gate), y, &stream)
    }
}

impl CustomOp2 for CallLogits<'_> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        not_here()
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        logits: &CudaStorage,
        logits_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let stream = x.device().cuda_stream();
        let width = self.0.layer.router().num_logits();
        let logits = (logits, logits_layout);
        self.0.forward(
            (x, x_layout),
            |operands, tokens| {
                let rows = self.0.rows(operands, "logits", logits, width, Some(tokens));
                Ok(Route::Given(RoutingPointers::Logits(rows?.1)))
            },
            &stream,
        )
    }
}

impl CustomOp3 for CallRouted<'_> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        not_here()
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        ids: &CudaStorage,
        ids_layout: &Layout,
        weights: &CudaStorage,
        weights_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let stream = x.device().cuda_stream();
        let slots = self.0.layer.router().slots();
        let dims = ids_layout.dims();
        if dims.last() != Some(&slots) {
            bail!("ids: expected [.., {slots}], got {dims:?}");
        }
        if weights_layout.dims() != dims {
            bail!(
                "weights: expected shape {dims:?}, that of ids, got {:?}",
                weights_layout.dims()
            );
        }
        self.0.forward(
            (x, x_layout),
            |operands, tokens| {
                if tokens.checked_mul(slots) != Some(ids_layout.shape().elem_count()) {
                    bail!("ids: expected {tokens} rows, one for each row of x, got {dims:?}");
                }
                Ok(Route::Given(RoutingPointers::Given {
                    ids: operands.ids("ids", ids, ids_layout)?,
                    weights: operands.floats("weights", weights, weights_layout)?,
                }))
            },
            &stream,
        )
    }
}
