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
        let workers = cpu.threads();
        // SAFETY: x and `out` live until the product has run.
        let product = unsafe { Product::new(workers, source, packed, groups, None, out_rows) };
        run_all(cpu, workers, blocking, &[product], &mut scratch);
        out.iter().map(|v| v.to_bits()).collect()
    }

    fn packed(&self, cpu: &Cpu, halved: bool) -> PackedMatrices {
        let mut packed = PackedMatrices::new(cpu, self.n, self.k, T::DTYPE).unwrap();
        packed.set_halved(halved);
        let w = MatRef::new(&self.w, self.n, self.k).unwrap();
        packed.push(cpu, w.into(), None).unwrap();
        packed
    }

    fn check(&self, cpu: &Cpu) {
        let in_one_piece = self.packed(cpu, false);
        let expected = self.run(cpu, &in_one_piece, Blocking::new(cpu.isa()));
        self.check_choices(cpu, &in_one_piece, &expected);
        if cpu.isa() == Isa::Avx2 {
            self.check_choices(cpu, &self.packed(cpu, true), &expected);
        }
    }

    fn check_choices(&self, cpu: &Cpu, packed: &PackedMatrices, expected: &[u32]) {
        let usual = Blocking::new(cpu.isa());
        // Slices of a line, and of everything while A comes in parts.
        let slices = Blocking {
            b_bytes: 1 << 10,
            ..usual
        };
        let parts = Blocking {
            b_bytes: 1 << 20,
            a_words: 1 << 11,
            ..usual
        };
        for streaming in [
            Streaming::IntoL1,
            Streaming::Near,
            Streaming::IntoL2,
            Streaming::ByHardwareUpTo(8),
        ] {
            for blocking in [usual, slices, parts] {
                let blocking = Blocking {
                    streaming,
                    ..blocking
                };
                let what = format!(
                    "{} {:?}, {} rows: {blocking:?}",
                    cpu.isa(),
                    packed.layout(),
                    self.rows,
                );
                assert_eq!(self.run(cpu, packed, blocking), expected, "{what}");
            }
        }
    }
}

#[test]
fn no_choice_changes_a_bit() {
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(isa).unwrap().single_threaded();
        // Rows of one tile and of several, for each instruction set; panels side by side and one left over.
        for rows in [1, 2, 3, 4, 5, 6, 7, 9, 13, 14, 15, 20] {
            for k in [1, 15, 150] {
                Problem::<f32>::new(rows, 70, k).check(&cpu);
                Problem::<f16>::new(rows, 70, k).check(&cpu);
                Problem::<bf16>::new(rows, 70, k).check(&cpu);
            }
        }
    }
}
