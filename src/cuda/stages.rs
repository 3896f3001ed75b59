//! The safe level, stage by stage: checked views of cudarc's slices, queued on a stream. [`moe`](super::moe) has the whole layer.
//!
//! ```no_run
//! use cudarc::driver::CudaContext;
//! use moe_kernels::cuda::{Cuda, DeviceMat, DeviceVec, DeviceVecMut, RouteViews};
//! use moe_kernels::routing::RouterConfig;
//! let cuda = Cuda::new(0)?;
//! let stream = cuda.context().default_stream();
//! # fn fine<T>(r: Result<T, cudarc::driver::DriverError>) -> T { r.unwrap() }
//! let logits = fine(stream.clone_htod(&[2.0f32, 0.0, 3.0, 1.0]));
//! let (mut ids, mut weights) = (fine(stream.alloc_zeros::<i32>(2)), fine(stream.alloc_zeros::<f32>(2)));
//! let input = RouteViews::new(DeviceMat::new(&stream, &logits, 1, 4)?);
//! let (mut ids_out, mut weights_out) = (DeviceVecMut::new(&stream, &mut ids), DeviceVecMut::new(&stream, &mut weights));
//! cuda.route_into(&stream, &RouterConfig::mixtral(4, 2), &input, &mut ids_out, &mut weights_out, None)?;
//! drop((ids_out, weights_out)); // the views end, the slices are free again
//! assert_eq!(fine(stream.clone_dtoh(&ids)), [2, 0]);
//! # Ok::<(), moe_kernels::Error>(())
//! ```
#![allow(unsafe_code)] // launches of plans whose operands were checked here

use super::combine::{CombineOperands, DeviceRows, Identity, Norm, Routed, Shared, plan_combine};
use super::permute::{self, CopyRows, PermutePointers, plan_copy_rows, plan_permute};
use super::routing::{self, RoutePointers, plan_route};
use super::{Cuda, DeviceMat, DeviceMatMut, DevicePtr, DeviceVec, DeviceVecMut};
use crate::error::{Error, Result};
use crate::permute::PermuteOptions;
use crate::routing::RouterConfig;
use crate::shape::pairs;
use cudarc::driver::CudaStream;

/// What [`Cuda::route_into`] reads.
#[derive(Debug)]
pub struct RouteViews<'a> {
    /// `[T, R]` of any format.
    pub logits: DeviceMat<'a>,
    /// `[T, R]` in the format of the logits, when and only when the config has a noise seed.
    pub noise_logits: Option<DeviceMat<'a>>,
    /// `[E + null experts]`, added to what the selection ranks.
    pub correction_bias: Option<DeviceVec<'a, f32>>,
    /// `[E]`, a factor on each expert's weights.
    pub per_expert_scale: Option<DeviceVec<'a, f32>>,
    /// `[T, K]`, when and only when the selection is [`Selection::Given`](crate::routing::Selection::Given).
    pub given_ids: Option<DeviceVec<'a, i32>>,
    /// Position of the first token, by which noise is drawn.
    pub position: u64,
}

impl<'a> RouteViews<'a> {
    /// Logits alone.
    pub fn new(logits: DeviceMat<'a>) -> Self {
        Self {
            logits,
            noise_logits: None,
            correction_bias: None,
            per_expert_scale: None,
            given_ids: None,
            position: 0,
        }
    }
}

/// What [`Cuda::permute_into`] writes; see [`PermutePointers`].
#[derive(Debug)]
pub struct PermuteViews<'a> {
    /// `[E]`
    pub counts: DeviceVecMut<'a, i32>,
    /// `[E + 1]`
    pub offsets: DeviceVecMut<'a, i32>,
    /// `[`[`max_rows`](permute::max_rows)`]`
    pub pair_of_row: DeviceVecMut<'a, u32>,
    /// `[T·K]`
    pub row_of_pair: DeviceVecMut<'a, u32>,
}

/// Where the routed sum of [`Cuda::combine_into`] comes from.
#[derive(Debug)]
#[non_exhaustive]
#[allow(clippy::large_enum_variant)] // made once for a call, on the stack; a box would allocate
pub enum RoutedViews<'a> {
    /// The experts' rows and where each pair's row is.
    Pairs {
        /// `[rows, H]`
        ys: DeviceMat<'a>,
        /// `[T, slots]`; `None` counts as ones.
        weights: Option<DeviceVec<'a, f32>>,
        /// `[T, slots]`; what is not a row of ys is passed over.
        row_of_pair: DeviceVec<'a, u32>,
        /// Pairs of a token.
        slots: usize,
        /// Identity experts: ids `[T, slots]`, E, and the layer's input `[T, H]`. Needs weights.
        identity: Option<(DeviceVec<'a, i32>, usize, DeviceMat<'a>)>,
    },
    /// The sum itself, `[T, H]`.
    Sum(DeviceMat<'a>),
}

/// The shared experts' output `[T, H]` and how it joins.
#[derive(Debug)]
#[non_exhaustive]
pub enum JoinViews<'a> {
    /// `a + s`
    Add(DeviceMat<'a>),
    /// `a + σ(g) · s` with g `[T]`
    SigmoidGate(DeviceMat<'a>, DeviceVec<'a, f32>),
    /// `(a + s) / 2`
    Average(DeviceMat<'a>),
}

/// What [`Cuda::combine_into`] reads, in the order of the steps of [`crate::combine`].
#[derive(Debug)]
pub struct CombineViews<'a> {
    /// Step 1.
    pub routed: RoutedViews<'a>,
    /// Step 2.
    pub routed_scale: f32,
    /// Step 3.
    pub shared: Option<JoinViews<'a>>,
    /// Step 4.
    pub norm: Option<super::moe::NormView<'a>>,
    /// Step 5, `[H]`.
    pub bias: Option<DeviceVec<'a, f32>>,
    /// Step 6, `[T, H]`.
    pub residual: Option<DeviceMat<'a>>,
}

impl<'a> CombineViews<'a> {
    /// The routed sum alone.
    pub fn new(routed: RoutedViews<'a>) -> Self {
        Self {
            routed,
            routed_scale: 1.0,
            shared: None,
            norm: None,
            bias: None,
            residual: None,
        }
    }
}

/// A call's stream and device, for the checks.
pub(super) struct Door<'a> {
    pub(super) cuda: &'a Cuda,
    pub(super) stream: &'a CudaStream,
}

impl Door<'_> {
    pub(super) fn mat(
        &self,
        argument: &'static str,
        view: &DeviceMat<'_>,
        rows: usize,
        cols: usize,
    ) -> Result<DeviceRows> {
        view.expect(self.cuda, argument, self.stream, rows, cols)?;
        Ok(view.as_rows())
    }

    pub(super) fn vec<T>(
        &self,
        argument: &'static str,
        view: &DeviceVec<'_, T>,
        needed: usize,
    ) -> Result<DevicePtr> {
        view.expect(self.cuda, argument, self.stream, needed)
    }

    /// The address of an optional slice.
    pub(super) fn optional<T>(
        &self,
        argument: &'static str,
        view: &Option<DeviceVec<'_, T>>,
        needed: usize,
    ) -> Result<DevicePtr> {
        match view {
            Some(view) => self.vec(argument, view, needed),
            None => Ok(DevicePtr::NULL),
        }
    }

    pub(super) fn out<T>(
        &self,
        argument: &'static str,
        view: &DeviceVecMut<'_, T>,
        needed: usize,
    ) -> Result<DevicePtr> {
        view.expect(self.cuda, argument, self.stream, needed)
    }

    pub(super) fn workspace(
        &self,
        view: Option<&mut DeviceVecMut<'_, u8>>,
        needed: usize,
    ) -> Result<DevicePtr> {
        match view {
            Some(view) => self.out("workspace", view, needed),
            None if needed == 0 => Ok(DevicePtr::NULL),
            None => Err(Error::BufferTooSmall {
                argument: "workspace",
                needed,
                found: 0,
            }),
        }
    }

    pub(super) fn norm(
        &self,
        argument: &'static str,
        norm: &Option<super::moe::NormView<'_>>,
        hidden: usize,
    ) -> Result<Option<Norm>> {
        let Some(norm) = norm else { return Ok(None) };
        Ok(Some(Norm {
            weight: self.vec(argument, &norm.weight, hidden)?,
            eps: norm.eps,
            multiplier: norm.multiplier,
        }))
    }

    fn routed(&self, views: &RoutedViews<'_>, tokens: usize, hidden: usize) -> Result<Routed> {
        Ok(match views {
            RoutedViews::Sum(sum) => Routed::Sum(self.mat("routed sum", sum, tokens, hidden)?),
            RoutedViews::Pairs {
                ys,
                weights,
                row_of_pair,
                slots,
                identity,
            } => {
                let pairs = pairs(tokens, *slots)?;
                Routed::Pairs {
                    ys: self.mat("ys", ys, ys.rows(), hidden)?,
                    rows: ys.rows(),
                    slots: *slots,
                    weights: self.optional("weights", weights, pairs)?,
                    row_of_pair: self.vec("row_of_pair", row_of_pair, pairs)?,
                    identity: match identity {
                        None => None,
                        Some((ids, num_experts, x)) => Some(Identity {
                            ids: self.vec("ids", ids, pairs)?,
                            num_experts: *num_experts,
                            x: self.mat("x", x, tokens, hidden)?,
                        }),
                    },
                }
            }
        })
    }

    fn join(
        &self,
        views: &Option<JoinViews<'_>>,
        tokens: usize,
        hidden: usize,
    ) -> Result<Option<Shared>> {
        let Some(views) = views else { return Ok(None) };
        let mat = |view| self.mat("shared", view, tokens, hidden);
        Ok(Some(match views {
            JoinViews::Add(s) => Shared::Add(mat(s)?),
            JoinViews::Average(s) => Shared::Average(mat(s)?),
            JoinViews::SigmoidGate(s, gate) => {
                Shared::SigmoidGate(mat(s)?, self.vec("shared gate", gate, tokens)?)
            }
        }))
    }
}

impl Cuda {
    /// Queues the routing of `[T, R]` logits into ids and weights `[T, slots]`: the bits of the CPU's router. [`routing::workspace_size`] says how many bytes of
    /// workspace it needs, mostly none. Routers with joint shared experts have more outputs than this and are at the raw level
    /// ([`raw::route_raw`](super::raw::route_raw)).
    ///
    /// # Errors
    /// An [`Error`] that names the operand, as [`plan_route`]; nothing is queued then.
    pub fn route_into(
        &self,
        stream: &CudaStream,
        config: &RouterConfig,
        input: &RouteViews<'_>,
        ids: &mut DeviceVecMut<'_, i32>,
        weights: &mut DeviceVecMut<'_, f32>,
        workspace: Option<&mut DeviceVecMut<'_, u8>>,
    ) -> Result<()> {
        let door = Door { cuda: self, stream };
        let tokens = input.logits.rows();
        let needed = routing::workspace_size(config, tokens)?;
        let logits = door.mat("logits", &input.logits, tokens, config.num_logits())?;
        let pairs = pairs(tokens, config.slots())?;
        let noise = match &input.noise_logits {
            Some(noise) => Some(door.mat("noise_logits", noise, tokens, config.num_logits())?),
            None => None,
        };
        if let Some(noise) = noise.filter(|n| n.dtype != logits.dtype) {
            let expected = format!("{}, as the logits are", logits.dtype);
            return Err(Error::value("noise_logits", expected, noise.dtype));
        }
        let pointers = RoutePointers {
            logits: logits.ptr,
            logits_stride: logits.stride as u64,
            noise_logits: noise.map_or(DevicePtr::NULL, |n| n.ptr),
            noise_stride: noise.map_or(0, |n| n.stride as u64),
            correction_bias: door.optional(
                "correction_bias",
                &input.correction_bias,
                config.selectable(),
            )?,
            per_expert_scale: door.optional(
                "per_expert_scale",
                &input.per_expert_scale,
                config.num_experts,
            )?,
            given_ids: door.optional("given_ids", &input.given_ids, pairs)?,
            ids: door.out("ids", ids, pairs)?,
            weights: door.out("weights", weights, pairs)?,
            shared_weights: DevicePtr::NULL,
            workspace: door.workspace(workspace, needed)?,
        };
        let plan = plan_route(
            config,
            tokens,
            logits.dtype,
            input.position,
            &pointers,
            self.device_info(),
        )?;
        // SAFETY: every operand was checked to be a live view of this context for this stream, of the extent that `RoutePointers` states; what is written is borrowed mutably.
        unsafe { self.launch_all(stream, plan.iter()) }
    }

    /// Queues the stable sort of `ids [T·K]` by expert. [`permute::max_rows`] is the length of `pair_of_row`, [`permute::workspace_size`] says how many bytes of
    /// workspace it needs: none up to [`permute::ONE_LAUNCH_PAIRS`] pairs.
    ///
    /// # Errors
    /// An [`Error`] that names the operand, as [`plan_permute`]; nothing is queued then.
    pub fn permute_into(
        &self,
        stream: &CudaStream,
        num_experts: usize,
        options: &PermuteOptions,
        ids: &DeviceVec<'_, i32>,
        out: &mut PermuteViews<'_>,
        workspace: Option<&mut DeviceVecMut<'_, u8>>,
    ) -> Result<()> {
        let door = Door { cuda: self, stream };
        let pairs = ids.len();
        let rows = permute::max_rows(pairs, num_experts, options)?;
        let needed = permute::workspace_size(pairs, num_experts, options, self.device_info())?;
        let pointers = PermutePointers {
            ids: door.vec("ids", ids, pairs)?,
            counts: door.out("counts", &out.counts, num_experts)?,
            offsets: door.out("offsets", &out.offsets, num_experts + 1)?,
            pair_of_row: door.out("pair_of_row", &out.pair_of_row, rows)?,
            row_of_pair: door.out("row_of_pair", &out.row_of_pair, pairs)?,
            workspace: door.workspace(workspace, needed)?,
        };
        let plan = plan_permute(pairs, num_experts, options, &pointers, self.device_info())?;
        // SAFETY: as in `route_into`, with the extents of `PermutePointers`.
        unsafe { self.launch_all(stream, plan.iter()) }
    }

    /// Queues a copy of rows: `out[i] = src[index[i] / divisor]`, zeros where the index leads nowhere; see [`CopyRows`].
    ///
    /// # Errors
    /// An [`Error`] that names the operand, as [`plan_copy_rows`]; nothing is queued then.
    pub fn copy_rows_into(
        &self,
        stream: &CudaStream,
        src: &DeviceMat<'_>,
        index: &DeviceVec<'_, u32>,
        divisor: usize,
        out: &mut DeviceMatMut<'_>,
    ) -> Result<()> {
        let door = Door { cuda: self, stream };
        let from = door.mat("src", src, src.rows(), src.cols())?;
        out.expect(self, "out", stream, out.rows(), src.cols())?;
        if out.dtype() != src.dtype() {
            return Err(Error::value("out", src.dtype(), out.dtype()));
        }
        let copy = CopyRows {
            src: from.ptr,
            src_rows: src.rows(),
            src_stride: from.stride,
            out: out.ptr(),
            out_stride: out.stride(),
            index: door.vec("index", index, out.rows())?,
            rows: out.rows(),
            used: DevicePtr::NULL,
            divisor,
            width: src.cols(),
            dtype: src.dtype(),
        };
        let launch = plan_copy_rows(&copy, self.device_info())?;
        // SAFETY: as in `route_into`; indices beyond `src` give zeros.
        unsafe { self.launch(stream, &launch) }
    }

    /// Queues the weighted sum into `out [T, H]`.
    ///
    /// # Errors
    /// An [`Error`] that names the operand, as [`plan_combine`]; nothing is queued then.
    pub fn combine_into(
        &self,
        stream: &CudaStream,
        views: &CombineViews<'_>,
        out: &mut DeviceMatMut<'_>,
    ) -> Result<()> {
        let door = Door { cuda: self, stream };
        let (tokens, hidden) = (out.rows(), out.cols());
        out.expect(self, "out", stream, tokens, hidden)?;
        let operands = CombineOperands {
            routed_scale: views.routed_scale,
            shared: door.join(&views.shared, tokens, hidden)?,
            norm: door.norm("norm", &views.norm, hidden)?,
            bias: door.optional("bias", &views.bias, hidden)?,
            residual: match &views.residual {
                Some(residual) => Some(door.mat("residual", residual, tokens, hidden)?),
                None => None,
            },
            ..CombineOperands::new(
                tokens,
                hidden,
                door.routed(&views.routed, tokens, hidden)?,
                out.as_rows(),
            )
        };
        let launch = plan_combine(&operands, self.device_info())?;
        // SAFETY: as in `route_into`; rows that are none of `ys` are passed over.
        unsafe { self.launch(stream, &launch) }
    }
}
