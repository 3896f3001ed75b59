//! Weights where candle has them.

use super::operands::Operands;
use crate::view::{format, is_at};
use candle_core::bail;
use candle_core::{
    CudaStorage, DType, DeviceLocation, Layout, Result, Storage, StorageRef, Tensor,
};
use moe_kernels::cuda::DevicePtr;
use moe_kernels::cuda::combine::DeviceRows;
use moe_kernels::cuda::moe::{ExpertPointers, GatePointers, SharedPointers};

/// The first projection of experts.
#[derive(Clone, Debug)]
enum Up {
    Plain(Tensor),
    Fused(Tensor),
    Interleaved(Tensor),
    Separate { gate: Tensor, up: Tensor },
}

/// The weights of experts on a GPU: tensors of candle's, all in one format and out-features first, which are used where they are.
///
/// A handle: clones share the tensors. In-features must be neighbours in memory; rows and experts may be apart, as in slices of larger tensors. Models that have a tensor for each
/// expert stack them once at load (`Tensor::stack`), as `candle_transformers::fused_moe::FusedMoe::new` does. One expert, such as a shared one, may come without the dimension E.
#[derive(Clone, Debug)]
pub struct Experts {
    up: Up,
    down: Tensor,
}

/// `[E, N, K]`, E being 1 for a matrix.
fn stacked(argument: &str, tensor: &Tensor) -> Result<Tensor> {
    match tensor.rank() {
        2 => tensor.unsqueeze(0),
        3 => Ok(tensor.clone()),
        _ => bail!(
            "{argument}: expected [E, N, K] or [N, K], got {:?}",
            tensor.dims()
        ),
    }
}

impl Experts {
    /// `gate_up [E, 2I, H]`, gate rows first, and `down [E, H, I]`: `FusedMoe`'s `gate_up_w` and `down_w`.
    ///
    /// # Errors
    /// Tensors of other shapes, of different formats, not on one GPU, or whose in-features are not neighbours; the argument is named.
    pub fn fused(gate_up: &Tensor, down: &Tensor) -> Result<Self> {
        Self::new("gate_up", Up::Fused(stacked("gate_up", gate_up)?), down)
    }

    /// `gate_up [E, 2I, H]`, gate and up rows alternating, gate first, and `down [E, H, I]`.
    ///
    /// # Errors
    /// As [`fused`](Self::fused).
    pub fn interleaved(gate_up: &Tensor, down: &Tensor) -> Result<Self> {
        Self::new(
            "gate_up",
            Up::Interleaved(stacked("gate_up", gate_up)?),
            down,
        )
    }

    /// `gate [E, I, H]`, `up [E, I, H]` and `down [E, H, I]`.
    ///
    /// # Errors
    /// As [`fused`](Self::fused).
    pub fn separate(gate: &Tensor, up: &Tensor, down: &Tensor) -> Result<Self> {
        let (gate, up) = (stacked("gate", gate)?, stacked("up", up)?);
        if gate.dims() != up.dims() {
            bail!(
                "gate: expected shape {:?}, that of up, got {:?}",
                up.dims(),
                gate.dims()
            );
        }
        Self::new("up", Up::Separate { gate, up }, down)
    }

    /// Experts without a gate: `up [E, I, H]` and `down [E, H, I]`.
    ///
    /// # Errors
    /// As [`fused`](Self::fused).
    pub fn plain(up: &Tensor, down: &Tensor) -> Result<Self> {
        Self::new("up", Up::Plain(stacked("up", up)?), down)
    }

    fn new(argument: &str, up: Up, down: &Tensor) -> Result<Self> {
        let experts = Self {
            up,
            down: stacked("down", down)?,
        };
        let ([e, n, h], i) = (experts.first(), experts.intermediate());
        let rows = match experts.up {
            Up::Plain(_) | Up::Separate { .. } => i,
            Up::Fused(_) | Up::Interleaved(_) => 2 * i,
        };
        let found = experts.down.dims();
        if found != [e, h, i] || n != rows {
            bail!(
                "down: expected [E, H, I] for {argument} [E, {}I, H] = {:?}, got {found:?}",
                if rows == i { "" } else { "2·" },
                [e, n, h]
            );
        }
        experts.check()?;
        Ok(experts)
    }

    /// `[E, I or 2I, H]`
    fn first(&self) -> [usize; 3] {
        let (Up::Plain(t) | Up::Fused(t) | Up::Interleaved(t) | Up::Separate { up: t, .. }) =
            &self.up;
        let dims = t.dims();
        [dims[0], dims[1], dims[2]]
    }

    /// E
    pub fn num_experts(&self) -> usize {
        self.first()[0]
    }

    /// H
    pub fn hidden(&self) -> usize {
        self.first()[2]
    }

    /// I
    pub fn intermediate(&self) -> usize {
        let n = self.first()[1];
        match self.up {
            Up::Plain(_) | Up::Separate { .. } => n,
            Up::Fused(_) | Up::Interleaved(_) => n / 2,
        }
    }

    /// The format of the weights.
    pub fn dtype(&self) -> DType {
        self.down.dtype()
    }

    pub(super) fn location(&self) -> DeviceLocation {
        self.down.device().location()
    }

    pub(super) fn device(&self) -> &candle_core::Device {
        self.down.device()
    }

    /// The tensors by name.
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let mut all = match &self.up {
            Up::Plain(up) => vec![("up", up)],
            Up::Fused(both) | Up::Interleaved(both) => vec![("gate_up", both)],
            Up::Separate { gate, up } => vec![("gate", gate), ("up", up)],
        };
        all.push(("down", &self.down));
        all
    }

    /// One format, one GPU, strides that kernels follow.
    fn check(&self) -> Result<()> {
        let DeviceLocation::Cuda { .. } = self.location() else {
            bail!(
                "down: expected a tensor on a CUDA device, got one on {:?}",
                self.location()
            );
        };
        for (argument, tensor) in self.tensors() {
            format(argument, tensor.dtype())?;
            is_at(argument, tensor, self.location())?;
            if tensor.dtype() != self.dtype() {
                bail!(
                    "{argument}: expected {:?}, the format of down, got {:?}",
                    self.dtype(),
                    tensor.dtype()
                );
            }
        }
        let stream = self.device().as_cuda_device()?.cuda_stream();
        let locked = self.lock();
        locked.pointers(self, &mut Operands::new(&stream)).map(drop)
    }

    fn lock(&self) -> LockedExperts<'_> {
        let (first, second) = match &self.up {
            Up::Plain(t) | Up::Fused(t) | Up::Interleaved(t) => (t, None),
            Up::Separate { gate, up } => (gate, Some(up)),
        };
        LockedExperts {
            first: first.storage_and_layout(),
            second: second.map(Tensor::storage_and_layout),
            down: self.down.storage_and_layout(),
        }
    }
}

/// The weights of the expert that every token visits.
#[derive(Clone, Debug)]
pub struct SharedWeights {
    /// One expert.
    pub experts: Experts,
    /// `[1, H]`, when and only when the layer's [`SharedJoin`](moe_kernels::cuda::moe::SharedJoin) is a sigmoid gate.
    pub gate: Option<Tensor>,
}

/// What a layer reads beside its calls' tensors.
#[derive(Clone, Debug)]
pub struct Weights {
    /// `[R, H]`, R logits; without it only calls that bring logits or a routing work.
    pub gate: Option<Tensor>,
    /// The local experts.
    pub experts: Experts,
    /// When and only when the layer has a shared expert.
    pub shared: Option<SharedWeights>,
    /// f32 `[E]`, contiguous: added to what the router's selection ranks.
    pub correction_bias: Option<Tensor>,
}

impl Weights {
    /// Experts alone.
    pub fn new(experts: Experts) -> Self {
        Self {
            gate: None,
            experts,
            shared: None,
            correction_bias: None,
        }
    }

    /// The tensors by name.
    pub(super) fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let mut all = self.experts.tensors();
        all.extend(self.gate.as_ref().map(|t| ("gate", t)));
        all.extend(
            self.correction_bias
                .as_ref()
                .map(|t| ("correction_bias", t)),
        );
        if let Some(shared) = &self.shared {
            all.extend(shared.experts.tensors());
            all.extend(shared.gate.as_ref().map(|t| ("shared.gate", t)));
        }
        all
    }

    /// Keeps the tensors' storages from being replaced while a call is queued.
    pub(super) fn lock(&self) -> Locked<'_> {
        Locked {
            gate: self.gate.as_ref().map(Tensor::storage_and_layout),
            experts: self.experts.lock(),
            shared: self.shared.as_ref().map(|s| s.experts.lock()),
            shared_gate: self
                .shared
                .as_ref()
                .and_then(|s| s.gate.as_ref())
                .map(Tensor::storage_and_layout),
            correction_bias: self
                .correction_bias
                .as_ref()
                .map(Tensor::storage_and_layout),
        }
    }
}

type Guard<'w> = (StorageRef<'w>, &'w Layout);

/// The storage of a tensor that was seen to be on a GPU.
fn cuda<'a>(
    argument: &str,
    (storage, layout): &'a Guard<'_>,
) -> Result<(&'a CudaStorage, &'a Layout)> {
    match &**storage {
        Storage::Cuda(storage) => Ok((storage, layout)),
        other => bail!(
            "{argument}: expected a tensor on a CUDA device, got one on {:?}",
            other.device().location()
        ),
    }
}

struct LockedExperts<'w> {
    /// The only first projection, or the gate's.
    first: Guard<'w>,
    second: Option<Guard<'w>>,
    down: Guard<'w>,
}

impl LockedExperts<'_> {
    fn pointers<'a>(
        &'a self,
        experts: &Experts,
        operands: &mut Operands<'a>,
    ) -> Result<ExpertPointers> {
        let mut weights = |argument, guard: &'a Guard<'_>| {
            let (storage, layout) = cuda(argument, guard)?;
            operands.weights(argument, storage, layout)
        };
        let down = weights("down", &self.down)?;
        Ok(match (&experts.up, &self.second) {
            (Up::Plain(_), _) => ExpertPointers::plain(weights("up", &self.first)?, down),
            (Up::Interleaved(_), _) => {
                ExpertPointers::interleaved(weights("gate_up", &self.first)?, down)
            }
            (Up::Separate { .. }, Some(up)) => {
                ExpertPointers::gated(weights("gate", &self.first)?, weights("up", up)?, down)
            }
            _ => ExpertPointers::fused(
                weights("gate_up", &self.first)?,
                experts.intermediate(),
                down,
            ),
        })
    }
}

/// A layer's weights for the time of a call.
pub(super) struct Locked<'w> {
    gate: Option<Guard<'w>>,
    experts: LockedExperts<'w>,
    shared: Option<LockedExperts<'w>>,
    shared_gate: Option<Guard<'w>>,
    correction_bias: Option<Guard<'w>>,
}

/// Where they are.
pub(super) struct Pointers {
    pub gate: Option<GatePointers>,
    pub experts: ExpertPointers,
    pub shared: Option<SharedPointers>,
    pub correction_bias: DevicePtr,
}

impl Locked<'_> {
    pub fn pointers<'a>(
        &'a self,
        weights: &Weights,
        operands: &mut Operands<'a>,
    ) -> Result<Pointers> {
        let rows = |argument,
                    guard: &'a Option<Guard<'_>>,
                    operands: &mut Operands<'a>|
         -> Result<Option<DeviceRows>> {
            let Some(guard) = guard else { return Ok(None) };
            let (storage, layout) = cuda(argument, guard)?;
            operands
                .rows(argument, storage, layout)
                .map(|(_, rows)| Some(rows))
        };
        let gate = rows("gate", &self.gate, operands)?;
        let shared_gate = rows("shared.gate", &self.shared_gate, operands)?;
        let shared = match (&self.shared, &weights.shared) {
            (Some(locked), Some(shared)) => Some(SharedPointers {
                expert: locked.pointers(&shared.experts, operands)?,
                gate: shared_gate,
            }),
            _ => None,
        };
        let correction_bias = match &self.correction_bias {
            Some(guard) => {
                let (storage, layout) = cuda("correction_bias", guard)?;
                operands.floats("correction_bias", storage, layout)?
            }
            None => DevicePtr::NULL,
        };
        Ok(Pointers {
            gate: gate.map(|weights| GatePointers {
                weights,
                bias: None,
            }),
            experts: self.experts.pointers(&weights.experts, operands)?,
            shared,
            correction_bias,
        })
    }
}
