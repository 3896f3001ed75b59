//! What the driver chooses by the kind of CPU decides speed and no bit: here every choice runs on this one.

use super::blocking::Streaming;
use super::*;
use crate::element::Element;
use crate::matrix::{AnyMatRef, MatMut, MatRef};
use half::{bf16, f16};

/// One expert's matrix and rows, numbers of the format.
struct Problem<T> {
    w: Vec<T>,
    x: Vec<T>,
    rows: usize,
    n: usize,
    k: usize,
}

impl<T: Element> Problem<T>
where
    for<'a> AnyMatRef<'a>: From<MatRef<'a, T>>,
{
    fn new(rows: usize, n: usize, k: usize) -> Self {
        let number = |i: usize| T::from_f32_nearest((i * 37 % 101) as f32 / 64.0 - 0.75);
        Self {
            w: (0..n * k).map(number).collect(),
            x: (0..rows * k).map(|i| number(i + 13)).collect(),
            rows,
            n,
            k,
        }
    }

    fn run(&self, cpu: &Cpu, packed: &PackedMatrices, blocking: Blocking) -> Vec<u32> {
        let x = MatRef::new(&self.x, self.rows, self.k).unwrap();
        let mut out = vec![f32::NAN; self.rows * self.n];
        let mut view = MatMut::new(&mut out, self.rows, self.n).unwrap().into();
        let mut scratch = vec![0; scratch_bytes(cpu)];
        let groups = Groups::Single {
            rows: self.rows,
            expert: 0,
        };
        let (source, out_rows) = (RowSource::new(x.into()), OutRows::new(&mut view));
        // SAFETY: x and `out` live until the product has run.
        let product = unsafe { Product::new(cpu, source, packed, groups, None, out_rows) };
        run_all(cpu, blocking, &[product], &mut scratch);
        out.iter().map(|v| v.to_bits()).collect()
    }

    fn check(&self, cpu: &Cpu) {
        let mut packed = PackedMatrices::new(cpu, self.n, self.k, T::DTYPE).unwrap();
        let w = MatRef::new(&self.w, self.n, self.k).unwrap();
        packed.push(cpu, w.into(), None).unwrap();
        let usual = Blocking::new(cpu.isa());
        let expected = self.run(cpu, &packed, usual);
        for streaming in [
            Streaming::IntoL1,
            Streaming::Near,
            Streaming::IntoL2,
            Streaming::ByHardwareUpTo(8),
        ] {
            for b_bytes in [1 << 10, usual.b_bytes, 1 << 20] {
                let blocking = Blocking {
                    streaming,
                    b_bytes,
                    ..usual
                };
                let (isa, dtype, rows) = (cpu.isa(), T::DTYPE, self.rows);
                assert!(
                    self.run(cpu, &packed, blocking) == expected,
                    "{isa} {dtype}, {rows} rows, K {}: {streaming:?}, {b_bytes}",
                    self.k
                );
            }
        }
    }
}

#[test]
fn no_choice_changes_a_bit() {
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(isa).unwrap().single_threaded();
        // All tiles of the smallest and the largest instruction set, up to five panels; the long rows come in parts where there are many.
        for rows in (1..=16).chain([40]) {
            for k in [1, 15, 64, 1000] {
                Problem::<f32>::new(rows, 130, k).check(&cpu);
                Problem::<f16>::new(rows, 130, k).check(&cpu);
                Problem::<bf16>::new(rows, 130, k).check(&cpu);
            }
        }
    }
}
