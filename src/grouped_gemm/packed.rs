//! Weights, packed once for an instruction set.

use crate::cpu::Cpu;
use crate::cpu::grouped_gemm::{
    self as kernel, Columns, PanelLayout, Storage, pack, pack_bias, pack_into,
};
use crate::cpu::isa::Isa;
use crate::element::DType;
use crate::error::{Error, Result};
use crate::matrix::AnyMatRef;

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
            halved: kernel::halves_panels(cpu.isa(), dtype),
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

    /// For tests of what another kind of CPU would choose; while nothing is packed.
    #[cfg(test)]
    pub(crate) fn set_halved(&mut self, halved: bool) {
        assert!(self.is_empty());
        self.layout.halved = halved;
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
