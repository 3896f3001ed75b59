//! The parameters of `kernels/combine.cu`, from checked operands.

use super::{CombineOperands, DeviceRows, Identity, Routed, Shared, format};
use crate::cuda::DevicePtr;
use crate::cuda::permute::check_pointer;
use crate::error::{Error, Result, checked_mul};
use bytemuck::{Pod, Zeroable};

/// `CombineParams` of `kernels/combine.cu`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct CombineParams {
    ys: DevicePtr,
    weights: DevicePtr,
    row_of_pair: DevicePtr,
    ids: DevicePtr,
    x: DevicePtr,
    shared: DevicePtr,
    gate: DevicePtr,
    gamma: DevicePtr,
    apart: DevicePtr,
    norm: DevicePtr,
    bias: DevicePtr,
    residual: DevicePtr,
    out: DevicePtr,
    ys_stride: u64,
    x_stride: u64,
    shared_stride: u64,
    residual_stride: u64,
    out_stride: u64,
    shared_step: u64,
    pub(super) tokens: u64,
    pub(super) hidden: u64,
    rows: u32,
    slots: u32,
    experts: u32,
    pub(super) threads: u32,
    pub(super) tiles: u32,
    sum: u32,
    ys_format: u32,
    x_format: u32,
    shared_format: u32,
    residual_format: u32,
    out_format: u32,
    shared_mode: u32,
    shared_count: u32,
    scale: f32,
    apart_scale: f32,
    eps: f32,
    mul: f32,
    unused: u32,
}
const _: () = assert!(size_of::<CombineParams>() == 240);

/// Collects the parameters, and whether everything lies at multiples of 16 bytes.
pub(super) struct Builder {
    pub(super) params: CombineParams,
    pub(super) tokens: usize,
    pub(super) hidden: usize,
    pub(super) aligned: bool,
}

impl Builder {
    /// Address, row stride in bytes and format of a matrix of `rows` rows.
    fn matrix(
        &mut self,
        name: &'static str,
        m: DeviceRows,
        rows: usize,
    ) -> Result<(DevicePtr, u64, u32)> {
        if rows > 1 && m.stride < self.hidden {
            return Err(Error::value(
                name,
                format_args!("a row stride of at least {}", self.hidden),
                m.stride,
            ));
        }
        let size = m.dtype.size();
        let stride = checked_mul(m.stride, size, "row stride in bytes")? as u64;
        checked_mul(stride as usize, rows, "matrix in bytes")?;
        check_pointer(name, m.ptr, size as u64, rows.min(self.hidden))?;
        self.aligned &= (m.ptr.0 | stride).is_multiple_of(16);
        Ok((m.ptr, stride, format(m.dtype)))
    }

    /// A row of H numbers.
    fn row(&mut self, name: &'static str, ptr: DevicePtr) -> Result<DevicePtr> {
        check_pointer(name, ptr, 4, self.hidden)?;
        self.aligned &= ptr.is_aligned(16);
        Ok(ptr)
    }

    pub(super) fn routed(&mut self, routed: &Routed) -> Result<()> {
        let tokens = self.tokens;
        let (ys, rows, slots, weights, row_of_pair, identity) = match *routed {
            Routed::Sum(sum) => {
                let p = self.matrix("routed sum", sum, tokens)?;
                (self.params.ys, self.params.ys_stride, self.params.ys_format) = p;
                self.params.sum = 1;
                return Ok(());
            }
            Routed::Pairs {
                ys,
                rows,
                slots,
                weights,
                row_of_pair,
                identity,
            } => (ys, rows, slots, weights, row_of_pair, identity),
        };
        let pairs = crate::shape::pairs(tokens, slots)?;
        if rows > i32::MAX as usize {
            return Err(Error::Overflow {
                what: "rows as i32",
            });
        }
        let p = self.matrix("ys", ys, rows)?;
        (self.params.ys, self.params.ys_stride, self.params.ys_format) = p;
        check_pointer("weights", weights, 4, 0)?;
        check_pointer("row_of_pair", row_of_pair, 4, pairs)?;
        self.params.weights = weights;
        self.params.row_of_pair = row_of_pair;
        self.params.rows = rows as u32;
        // Without tokens the number of slots may be anything, and is not used.
        self.params.slots = slots.min(u32::MAX as usize) as u32;
        let Some(identity) = identity else {
            return Ok(());
        };
        if weights.is_null() {
            return Err(Error::value(
                "weights",
                "some, with identity experts",
                "none",
            ));
        }
        self.identity(identity, pairs)
    }

    /// The identity experts' ids and their x.
    fn identity(&mut self, identity: Identity, pairs: usize) -> Result<()> {
        if identity.num_experts > i32::MAX as usize {
            return Err(Error::value(
                "num_experts",
                "up to 2^31 - 1, since ids are i32",
                identity.num_experts,
            ));
        }
        check_pointer("ids", identity.ids, 4, pairs)?;
        self.params.ids = identity.ids;
        self.params.experts = identity.num_experts as u32;
        let p = self.matrix("x", identity.x, self.tokens)?;
        (self.params.x, self.params.x_stride, self.params.x_format) = p;
        Ok(())
    }

    /// Identity experts with a sum of their own.
    pub(super) fn identity_apart(&mut self, operands: &CombineOperands) -> Result<()> {
        let Some(apart) = operands.identity_apart else {
            return Ok(());
        };
        if let Routed::Pairs {
            slots, identity, ..
        } = operands.routed
        {
            if identity.is_some() {
                let expected = "identity experts in the sum over slots, or apart from it";
                return Err(Error::value("identity_apart", expected, "both"));
            }
            if slots != apart.slots {
                return Err(Error::value("identity_apart.slots", slots, apart.slots));
            }
        }
        if !apart.scale.is_finite() {
            let expected = "a finite number";
            return Err(Error::value("identity_apart.scale", expected, apart.scale));
        }
        let pairs = crate::shape::pairs(self.tokens, apart.slots)?;
        // What is not there would count as no identity experts.
        check_pointer("identity_apart.weights", apart.weights, 4, pairs.max(1))?;
        self.params.apart = apart.weights;
        self.params.apart_scale = apart.scale;
        self.params.slots = apart.slots.min(u32::MAX as usize) as u32;
        let identity = Identity {
            ids: apart.ids,
            num_experts: apart.num_experts,
            x: apart.x,
        };
        self.identity(identity, pairs)
    }

    pub(super) fn shared(&mut self, shared: Option<Shared>) -> Result<()> {
        let (mode, matrix) = match shared {
            None => return Ok(()),
            Some(Shared::Add(m)) => (1, m),
            Some(Shared::SigmoidGate(m, gate)) => {
                check_pointer("shared gate", gate, 4, self.tokens)?;
                self.params.gate = gate;
                (2, m)
            }
            Some(Shared::Average(m)) => (3, m),
        };
        let (ptr, stride, format) = self.matrix("shared", matrix, self.tokens)?;
        self.params.shared = ptr;
        self.params.shared_stride = stride;
        self.params.shared_format = format;
        self.params.shared_mode = mode;
        Ok(())
    }

    /// Several shared experts.
    pub(super) fn shared_sum(&mut self, operands: &CombineOperands) -> Result<()> {
        self.params.shared_count = 1;
        let Some(sum) = operands.shared_sum else {
            return Ok(());
        };
        let shared = match operands.shared {
            None => {
                let expected = "none, without a shared expert";
                return Err(Error::value("shared_sum", expected, "some"));
            }
            Some(Shared::Add(m) | Shared::SigmoidGate(m, _) | Shared::Average(m)) => m,
        };
        if sum.experts == 0 || sum.experts > i32::MAX as usize {
            return Err(Error::value(
                "shared_sum.experts",
                "1 to 2^31 - 1",
                sum.experts,
            ));
        }
        let step = checked_mul(sum.expert_stride, shared.dtype.size(), "shared experts")?;
        checked_mul(step, sum.experts, "shared experts in bytes")?;
        let weights = checked_mul(self.tokens, sum.experts, "shared experts' weights")?;
        check_pointer("shared_sum.weights", sum.weights, 4, 0)?;
        checked_mul(weights, 4, "shared experts' weights")?;
        self.aligned &= sum.experts == 1 || step.is_multiple_of(16);
        self.params.gamma = sum.weights;
        self.params.shared_step = step as u64;
        self.params.shared_count = sum.experts as u32;
        Ok(())
    }

    pub(super) fn rest(&mut self, operands: &CombineOperands) -> Result<()> {
        let scale = operands.routed_scale;
        if !scale.is_finite() {
            return Err(Error::value("routed_scale", "a finite number", scale));
        }
        self.params.scale = scale;
        if let Some(norm) = operands.norm {
            norm.check()?;
            self.params.norm = self.row("norm", norm.weight)?;
            self.params.eps = norm.eps;
            self.params.mul = norm.multiplier;
        }
        if !operands.bias.is_null() {
            self.params.bias = self.row("bias", operands.bias)?;
        }
        if let Some(residual) = operands.residual {
            let (ptr, stride, format) = self.matrix("residual", residual, self.tokens)?;
            self.params.residual = ptr;
            self.params.residual_stride = stride;
            self.params.residual_format = format;
        }
        let (ptr, stride, format) = self.matrix("out", operands.out, self.tokens)?;
        self.params.out = ptr;
        self.params.out_stride = stride;
        self.params.out_format = format;
        Ok(())
    }
}
