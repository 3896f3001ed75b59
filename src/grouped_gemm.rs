//! Matrix products over ragged groups of rows: the experts.
//!
//! For each expert e, with its rows r in `offsets[e] .. offsets[e] + counts[e]`:
//!
//! ```text
//! out[r] = act( A[r] · W[e]ᵀ + b[e] )          A[r] = x[pair_of_row[r] / slots], or x[r]
//! ```
//!
//! Weights are out-features first (`[N, K]`), as strided views of any layout, packed once by [`PackedMatrices::push`]; a gated pair of projections is packed
//! side by side and gives `act(gate) · up`.
//!
//! # Numerics
//! Every output element is one chain of fused multiply-adds in f32 from +0, in ascending k (bf16 weights: pairs of k, odd element first). Then the bias is
//! added, then the activation applied, then the result rounded once to the output's format. Subnormal bf16 numbers are read as zeros of their
//! sign, weights and, where the weights are bf16, activations alike, since that is what x86's native bf16 instruction does. So the
//! bits depend on neither the instruction set, the number of threads, nor the other rows. Two exceptions: the payload of a NaN, and a partial sum that is
//! itself subnormal, once x86's native bf16 instruction is in use.

use crate::cpu::Cpu;
use crate::cpu::grouped_gemm::{
    self as kernel, Columns, PanelLayout, RowSource, Storage, pack, pack_bias, pack_into,
};
use crate::cpu::isa::Isa;
use crate::element::DType;
use crate::error::{Error, Result};
use crate::matrix::{AnyMatMut, AnyMatRef};
use core::ops::Range;

/// The scalar function of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ActivationFunction {
    /// `z`
    Identity,
    /// `z · σ(z)`
    Silu,
    /// `z/2 · (1 + erf(z/√2))`
    Gelu,
    /// `z/2 · (1 + tanh(√(2/π)·(z + 0.044715·z³)))`
    GeluTanh,
    /// `max(z, 0)`
    Relu,
    /// `max(z, 0)²` (Nemotron-H)
    Relu2,
}

/// Limits around the activation. NaN passes through each of them.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Clamp {
    /// None.
    None,
    /// `act(min(g, limit)) · clamp(u, ±limit)`
    Pre {
        /// The limit.
        limit: f32,
    },
    /// `min(act(g), limit) · clamp(u, ±limit)`
    Post {
        /// The limit.
        limit: f32,
    },
    /// gpt-oss: `g ← min(g, limit)`, `u ← clamp(u, ±limit)`, `(u + 1) · g · σ(alpha·g)`, whatever the activation function.
    GptOss {
        /// The limit (7 in gpt-oss).
        limit: f32,
        /// The slope (1.702 in gpt-oss).
        alpha: f32,
    },
    /// `cap(g) · σ(g) · cap(u)` with `cap(z) = c·tanh(z/c)`, whatever the activation function: SiLU whose sigmoid sees the uncapped g (Inkling 2).
    /// A cap of 0 leaves its side alone.
    Softcap {
        /// Cap of the gate projection.
        gate: f32,
        /// Cap of the up projection.
        up: f32,
    },
}

/// What happens between an expert's two matrix products.
///
/// Gated: `h = act(g) · u` with g from the gate projection and u from the up projection. Not gated: `h = act(u)`, clamps
/// acting on u as they would on g.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Activation {
    /// The scalar function.
    pub function: ActivationFunction,
    /// Whether there are two projections.
    pub gated: bool,
    /// Limits.
    pub clamp: Clamp,
}

impl Activation {
    /// SwiGLU: `silu(g) · u` (Shazeer 2020), the activation of most families.
    pub const SWIGLU: Self = Self::gated(ActivationFunction::Silu);

    /// gpt-oss's clamped form, `(u + 1) · g · σ(1.702·g)` with a limit of 7.
    pub const GPT_OSS: Self = Self {
        function: ActivationFunction::Silu,
        gated: true,
        clamp: Clamp::GptOss {
            limit: 7.0,
            alpha: 1.702,
        },
    };

    /// A gated activation without clamps.
    pub const fn gated(function: ActivationFunction) -> Self {
        Self {
            function,
            gated: true,
            clamp: Clamp::None,
        }
    }

    /// An activation of a single projection, without clamps.
    pub const fn plain(function: ActivationFunction) -> Self {
        Self {
            function,
            gated: false,
            clamp: Clamp::None,
        }
    }

    pub(crate) fn validate(&self) -> Result<()> {
        let bad = |argument, value: f32, low: f32| {
            if value.is_finite() && value >= low {
                Ok(())
            } else {
                Err(Error::value(
                    argument,
                    format!("a finite number of at least {low}"),
                    value,
                ))
            }
        };
        match self.clamp {
            Clamp::None => Ok(()),
            Clamp::Pre { limit } | Clamp::Post { limit } => bad("clamp.limit", limit, 0.0),
            Clamp::GptOss { limit, alpha } => {
                bad("clamp.limit", limit, 0.0)?;
                bad("clamp.alpha", alpha, f32::MIN)?;
                if self.gated {
                    Ok(())
                } else {
                    Err(Error::value(
                        "clamp",
                        "a gated activation with Clamp::GptOss",
                        "a plain one",
                    ))
                }
            }
            Clamp::Softcap { gate, up } => {
                bad("clamp.gate", gate, 0.0)?;
                bad("clamp.up", up, 0.0)
            }
        }
    }
}

/// A set of equally shaped matrices `[N, K]`, one for each expert, packed for one instruction set.
///
/// Matrices are added one at a time, so that a checkpoint can be packed expert by expert without a second full copy in memory; those that are
/// there stay where they are.
#[derive(Clone)]
pub struct PackedMatrices {
    isa: Isa,
    layout: PanelLayout,
    panels: Storage,
    /// One for each matrix.
    biases: Vec<Option<Box<[f32]>>>,
}

impl core::fmt::Debug for PackedMatrices {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("PackedMatrices")
            .field("isa", &self.isa)
            .field("layout", &self.layout)
            .field("len", &self.len())
            .finish()
    }
}

impl PackedMatrices {
    /// An empty set of plain `[n, k]` matrices in format `dtype` for `cpu`'s instruction set.
    ///
    /// # Errors
    /// [`Error::Value`] when a size is zero, [`Error::Overflow`] when the packed matrix would not fit the address space.
    pub fn new(cpu: &Cpu, n: usize, k: usize, dtype: DType) -> Result<Self> {
        Self::with_layout(cpu, n, k, dtype, false)
    }

    /// An empty set of gated pairs: two `[n, k]` matrices each, whose products go through one activation to n columns.
    ///
    /// # Errors
    /// As [`PackedMatrices::new`].
    pub fn new_gated(cpu: &Cpu, n: usize, k: usize, dtype: DType) -> Result<Self> {
        Self::with_layout(cpu, n, k, dtype, true)
    }

    fn with_layout(cpu: &Cpu, n: usize, k: usize, dtype: DType, gated: bool) -> Result<Self> {
        for (argument, size) in [("n", n), ("k", k)] {
            if size == 0 {
                return Err(Error::value(argument, "at least 1", size));
            }
        }
        let layout = PanelLayout {
            lanes: kernel::lanes(cpu.isa()),
            dtype,
            n,
            k,
            gated,
        };
        let bytes = layout.matrix_bytes().ok_or(Error::Overflow {
            what: "packed matrix bytes",
        })?;
        Ok(Self {
            isa: cpu.isa(),
            layout,
            panels: Storage::new(bytes),
            biases: Vec::new(),
        })
    }

    /// Packs one plain matrix `w [N, K]` with an optional bias `[N]` as the next expert; returns its index.
    ///
    /// The source may have another format than the packed set: it is rounded to nearest, ties to even.
    ///
    /// # Errors
    /// [`Error::Shape`] that names `w` or `bias`; [`Error::Value`] when the set holds gated pairs.
    pub fn push(&mut self, cpu: &Cpu, w: AnyMatRef<'_>, bias: Option<&[f32]>) -> Result<usize> {
        let columns = self.plain_columns(cpu, w, bias)?;
        Ok(self.append(cpu, &columns, None, bias))
    }

    /// Packs one plain matrix over that of expert `index`, in the same memory: new weights after a step of training, or another checkpoint's.
    ///
    /// # Errors
    /// As [`PackedMatrices::push`]; [`Error::Value`] when there is no such expert.
    pub fn replace(
        &mut self,
        cpu: &Cpu,
        index: usize,
        w: AnyMatRef<'_>,
        bias: Option<&[f32]>,
    ) -> Result<()> {
        let columns = self.plain_columns(cpu, w, bias)?;
        self.overwrite(cpu, index, &columns, None, bias)
    }

    fn plain_columns<'a>(
        &self,
        cpu: &Cpu,
        w: AnyMatRef<'a>,
        bias: Option<&[f32]>,
    ) -> Result<Columns<'a>> {
        if self.layout.gated {
            return Err(Error::value(
                "w",
                "a gate and an up matrix (push_gated)",
                "one matrix",
            ));
        }
        w.expect("w", self.layout.n, self.layout.k)?;
        self.check_bias("bias", bias)?;
        self.check_isa("cpu", cpu)?;
        Ok(Columns { gate: None, up: w })
    }

    /// Packs one gated pair `gate`, `up [N, K]` with optional biases `[N]` as the next expert; returns its index.
    ///
    /// # Errors
    /// [`Error::Shape`] that names the argument; [`Error::Value`] when the set holds plain matrices.
    pub fn push_gated(
        &mut self,
        cpu: &Cpu,
        gate: AnyMatRef<'_>,
        up: AnyMatRef<'_>,
        gate_bias: Option<&[f32]>,
        up_bias: Option<&[f32]>,
    ) -> Result<usize> {
        let columns = self.gated_columns(cpu, gate, up, gate_bias, up_bias)?;
        Ok(self.append(cpu, &columns, gate_bias, up_bias))
    }

    /// Packs one gated pair over that of expert `index`, in the same memory.
    ///
    /// # Errors
    /// As [`PackedMatrices::push_gated`]; [`Error::Value`] when there is no such expert.
    pub fn replace_gated(
        &mut self,
        cpu: &Cpu,
        index: usize,
        gate: AnyMatRef<'_>,
        up: AnyMatRef<'_>,
        gate_bias: Option<&[f32]>,
        up_bias: Option<&[f32]>,
    ) -> Result<()> {
        let columns = self.gated_columns(cpu, gate, up, gate_bias, up_bias)?;
        self.overwrite(cpu, index, &columns, gate_bias, up_bias)
    }

    fn gated_columns<'a>(
        &self,
        cpu: &Cpu,
        gate: AnyMatRef<'a>,
        up: AnyMatRef<'a>,
        gate_bias: Option<&[f32]>,
        up_bias: Option<&[f32]>,
    ) -> Result<Columns<'a>> {
        if !self.layout.gated {
            return Err(Error::value(
                "gate",
                "one matrix (push)",
                "a gate and an up matrix",
            ));
        }
        gate.expect("gate", self.layout.n, self.layout.k)?;
        up.expect("up", self.layout.n, self.layout.k)?;
        self.check_bias("gate_bias", gate_bias)?;
        self.check_bias("up_bias", up_bias)?;
        self.check_isa("cpu", cpu)?;
        Ok(Columns {
            gate: Some(gate),
            up,
        })
    }

    pub(crate) fn check_bias(&self, argument: &'static str, bias: Option<&[f32]>) -> Result<()> {
        match bias {
            Some(b) if b.len() != self.layout.n => {
                Err(Error::shape(argument, [self.layout.n], [b.len()]))
            }
            _ => Ok(()),
        }
    }

    fn append(
        &mut self,
        cpu: &Cpu,
        columns: &Columns<'_>,
        gate_bias: Option<&[f32]>,
        up_bias: Option<&[f32]>,
    ) -> usize {
        pack(cpu, &self.layout, columns, &mut self.panels);
        let bias = pack_bias(&self.layout, gate_bias, up_bias);
        self.biases.push(bias);
        self.biases.len() - 1
    }

    fn overwrite(
        &mut self,
        cpu: &Cpu,
        index: usize,
        columns: &Columns<'_>,
        gate_bias: Option<&[f32]>,
        up_bias: Option<&[f32]>,
    ) -> Result<()> {
        if index >= self.len() {
            let expected = format!("an expert below {}", self.len());
            return Err(Error::value("index", expected, index));
        }
        pack_into(cpu, &self.layout, columns, self.panels.get_mut(index));
        self.biases[index] = pack_bias(&self.layout, gate_bias, up_bias);
        Ok(())
    }

    /// Number of matrices (or gated pairs) in the set.
    pub fn len(&self) -> usize {
        self.panels.len()
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// N: output columns.
    pub fn n(&self) -> usize {
        self.layout.n
    }

    /// K: input columns.
    pub fn k(&self) -> usize {
        self.layout.k
    }

    /// Whether the set holds gated pairs.
    pub fn is_gated(&self) -> bool {
        self.layout.gated
    }

    /// Format of the packed weights.
    pub fn dtype(&self) -> DType {
        self.layout.dtype
    }

    /// The instruction set that it is packed for.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Bytes of all packed panels.
    pub fn bytes(&self) -> usize {
        self.panels.len() * self.panels.matrix_bytes()
    }

    pub(crate) fn layout(&self) -> &PanelLayout {
        &self.layout
    }

    pub(crate) fn panels(&self, expert: usize) -> &[u8] {
        bytemuck::cast_slice(self.panels.get(expert))
    }

    pub(crate) fn bias(&self, expert: usize) -> Option<&[f32]> {
        self.biases[expert].as_deref()
    }

    /// [`Error::PackedFor`] unless these weights were packed for `cpu`'s instruction set.
    pub(crate) fn check_isa(&self, argument: &'static str, cpu: &Cpu) -> Result<()> {
        if self.isa == cpu.isa() {
            Ok(())
        } else {
            Err(Error::PackedFor {
                argument,
                expected: cpu.isa(),
                found: self.isa,
            })
        }
    }
}

/// Which rows belong to which expert.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Groups<'a> {
    /// Rows `offsets[e] .. offsets[e] + counts[e]` for expert e; the rows between are padding, neither read nor written.
    Ragged {
        /// Where each expert's rows begin, `[E + 1]`, ascending.
        offsets: &'a [usize],
        /// How many there are, `[E]`.
        counts: &'a [usize],
    },
    /// All rows belong to one expert: an ordinary matrix product.
    Single {
        /// Number of rows.
        rows: usize,
        /// The matrix to use.
        expert: usize,
    },
}

impl Groups<'_> {
    pub(crate) fn experts(&self) -> usize {
        match self {
            Self::Ragged { counts, .. } => counts.len(),
            Self::Single { expert, .. } => expert + 1,
        }
    }

    pub(crate) fn rows_of(&self, expert: usize) -> Range<usize> {
        match self {
            Self::Ragged { offsets, counts } => offsets[expert]..offsets[expert] + counts[expert],
            Self::Single { rows, expert: only } if expert == *only => 0..*rows,
            Self::Single { .. } => 0..0,
        }
    }

    /// Rows of A and of the output, padding included.
    pub(crate) fn total_rows(&self) -> usize {
        match self {
            Self::Ragged { offsets, .. } => offsets.last().copied().unwrap_or(0),
            Self::Single { rows, .. } => *rows,
        }
    }

    fn validate(&self, experts: usize) -> Result<()> {
        let (offsets, counts) = match self {
            Self::Ragged { offsets, counts } => (offsets, counts),
            Self::Single { expert, .. } if *expert < experts => return Ok(()),
            Self::Single { expert, .. } => {
                return Err(Error::value(
                    "groups",
                    format!("an expert below {experts}"),
                    expert,
                ));
            }
        };
        if counts.len() != experts || offsets.len() != experts + 1 {
            return Err(Error::shape(
                "groups",
                format!("offsets [{}], counts [{experts}]", experts + 1),
                format!("offsets [{}], counts [{}]", offsets.len(), counts.len()),
            ));
        }
        for e in 0..experts {
            let fits = offsets[e]
                .checked_add(counts[e])
                .is_some_and(|end| end <= offsets[e + 1]);
            if !fits {
                return Err(Error::value(
                    "groups",
                    "offsets[e] + counts[e] ≤ offsets[e + 1]",
                    format!(
                        "{} + {} and {} at e = {e}",
                        offsets[e],
                        counts[e],
                        offsets[e + 1]
                    ),
                ));
            }
        }
        Ok(())
    }
}

/// The rows of A: gathered from x, or x itself.
#[derive(Clone, Copy, Debug)]
pub struct Gather<'a> {
    /// For each row its pair t·slots + slot, `[rows]`; entries of padding rows are not read.
    pub pair_of_row: &'a [u32],
    /// Pairs of a token.
    pub slots: usize,
    /// Factor on each pair's input `[T·slots]`, for experts whose weight acts on their input (Llama 4). The product is rounded to
    /// x's format.
    pub input_scale: Option<&'a [f32]>,
}

/// Bytes of scratch memory that [`grouped_gemm_into`] needs on `cpu` (it depends on the number of threads only).
pub fn scratch_bytes(cpu: &Cpu) -> usize {
    kernel::scratch_bytes(cpu)
}

/// The grouped product: `out[r] = act(A[r] · W[e]ᵀ + b[e])` for each row r of each expert e. See the [module](self) for the numerics.
///
/// `x` is `[rows, K]`, or `[T, K]` with a [`Gather`]; `out` is `[rows, N]` in any format; rows of padding are left as they are. `activation` must be gated exactly when the
/// weights are; `None` leaves a plain product as it is. `scratch` holds [`scratch_bytes`] bytes.
///
/// # Errors
/// An [`Error`] that names the argument; nothing is written then.
pub fn grouped_gemm_into(
    cpu: &Cpu,
    x: AnyMatRef<'_>,
    gather: Option<Gather<'_>>,
    weights: &PackedMatrices,
    groups: Groups<'_>,
    activation: Option<Activation>,
    out: AnyMatMut<'_>,
    scratch: &mut [u8],
) -> Result<()> {
    check_product(cpu, &x, gather.as_ref(), weights, &groups, activation)?;
    out.expect("out", groups.total_rows(), weights.n())?;
    check_scratch(cpu, scratch)?;
    kernel::run(
        cpu,
        rows_of(x, gather),
        weights,
        groups,
        activation,
        out,
        scratch,
    );
    Ok(())
}

/// Both products of experts, `h = act(A · W_upᵀ + b)` and `ys = h · W_downᵀ + b`: the same bits as two calls of [`grouped_gemm_into`], in one parallel
/// region. `h` is `[rows, I]`, in x's format as a rule; `ys` is `[rows, N]`.
///
/// # Errors
/// An [`Error`] that names the argument; nothing is written then.
pub(crate) fn experts_into(
    cpu: &Cpu,
    x: AnyMatRef<'_>,
    gather: Option<Gather<'_>>,
    (up, down): (&PackedMatrices, &PackedMatrices),
    groups: Groups<'_>,
    activation: Activation,
    h: AnyMatMut<'_>,
    ys: AnyMatMut<'_>,
    scratch: &mut [u8],
) -> Result<()> {
    check_product(cpu, &x, gather.as_ref(), up, &groups, Some(activation))?;
    down.check_isa("weights", cpu)?;
    let rows = groups.total_rows();
    h.expect("h", rows, up.n())?;
    let (expected, found) = ([up.len(), up.n()], [down.len(), down.k()]);
    if expected != found || down.is_gated() {
        return Err(Error::shape("down", expected, found));
    }
    ys.expect("ys", rows, down.n())?;
    check_scratch(cpu, scratch)?;
    let source = rows_of(x, gather);
    kernel::run_experts(cpu, source, (up, down), groups, activation, h, ys, scratch);
    Ok(())
}

fn rows_of<'a>(x: AnyMatRef<'a>, gather: Option<Gather<'a>>) -> RowSource<'a> {
    let mut source = RowSource::new(x);
    source.gather = gather.map(|g| (g.pair_of_row, g.slots));
    source.scale = gather.and_then(|g| g.input_scale);
    source
}

fn check_scratch(cpu: &Cpu, scratch: &[u8]) -> Result<()> {
    let needed = scratch_bytes(cpu);
    if scratch.len() < needed {
        return Err(Error::BufferTooSmall {
            argument: "scratch",
            needed,
            found: scratch.len(),
        });
    }
    Ok(())
}

/// The operands of a product, but for where it goes.
fn check_product(
    cpu: &Cpu,
    x: &AnyMatRef<'_>,
    gather: Option<&Gather<'_>>,
    weights: &PackedMatrices,
    groups: &Groups<'_>,
    activation: Option<Activation>,
) -> Result<()> {
    weights.check_isa("weights", cpu)?;
    let experts = weights.len();
    if experts == 0 {
        return Err(Error::value("weights", "at least one matrix", 0));
    }
    groups.validate(experts)?;
    if x.cols() != weights.k() {
        return Err(Error::shape(
            "x",
            ("rows", weights.k()),
            [x.rows(), x.cols()],
        ));
    }
    match gather {
        Some(gather) => check_gather(gather, groups, x.rows())?,
        None => x.expect("x", groups.total_rows(), weights.k())?,
    }
    match activation {
        Some(activation) => {
            activation.validate()?;
            if activation.gated != weights.is_gated() {
                return Err(Error::value(
                    "activation",
                    format!("gated = {}, as the weights are", weights.is_gated()),
                    activation.gated,
                ));
            }
            Ok(())
        }
        None if weights.is_gated() => Err(Error::value(
            "activation",
            "one, since the weights are gated",
            "none",
        )),
        None => Ok(()),
    }
}

fn check_gather(gather: &Gather<'_>, groups: &Groups<'_>, tokens: usize) -> Result<()> {
    let rows = groups.total_rows();
    if gather.pair_of_row.len() < rows {
        return Err(Error::shape(
            "pair_of_row",
            [rows],
            [gather.pair_of_row.len()],
        ));
    }
    if gather.slots == 0 {
        return Err(Error::value("slots", "at least 1", 0));
    }
    let pairs = crate::shape::pairs(tokens, gather.slots)?;
    if let Some(scale) = gather.input_scale
        && scale.len() != pairs
    {
        return Err(Error::shape("input_scale", [pairs], [scale.len()]));
    }
    for expert in 0..groups.experts() {
        let range = groups.rows_of(expert);
        if let Some(&bad) = gather.pair_of_row[range]
            .iter()
            .find(|&&p| p as usize >= pairs)
        {
            return Err(Error::value(
                "pair_of_row",
                format!("pairs below {pairs}"),
                bad,
            ));
        }
    }
    Ok(())
}
