//! Every way of packing writes what [`pack_any`] writes, in one piece or in halves.

use super::*;
use crate::cpu::isa::Isa;
use crate::element::Element;
use crate::matrix::MatRef;
use proptest::prelude::*;

/// Any bits but those of signalling NaNs, which converting makes quiet and moving does not.
fn elements<T: Element>(seed: u64, len: usize, from_bits: impl Fn(u32) -> T) -> Vec<T> {
    let mut state = seed;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let x = from_bits((state >> 32) as u32);
        if x.to_f32().is_nan() { T::default() } else { x }
    };
    (0..len).map(|_| next()).collect()
}

/// Numbers for matrices, in every format.
struct Data {
    f32: Vec<f32>,
    f16: Vec<f16>,
    bf16: Vec<bf16>,
}

impl Data {
    fn new(seed: u64, len: usize) -> Self {
        // Every fourth has a small exponent, so that subnormals come up in all formats.
        let small = |bits: u32, mask: u32| {
            if bits.is_multiple_of(4) {
                bits & mask
            } else {
                bits
            }
        };
        Self {
            f32: elements(seed, len, |b| f32::from_bits(small(b, 0x81ff_ffff))),
            f16: elements(seed, len, |b| f16::from_bits(small(b, 0x87ff) as u16)),
            bf16: elements(seed, len, |b| bf16::from_bits(small(b, 0x81ff) as u16)),
        }
    }

    fn matrix(
        &self,
        dtype: DType,
        rows: usize,
        cols: usize,
        strides: (usize, usize),
    ) -> AnyMatRef<'_> {
        let (i, j) = strides;
        match dtype {
            DType::F32 => MatRef::with_strides(&self.f32, rows, cols, i, j)
                .unwrap()
                .into(),
            DType::F16 => MatRef::with_strides(&self.f16[1..], rows, cols, i, j)
                .unwrap()
                .into(),
            DType::BF16 => MatRef::with_strides(&self.bf16[1..], rows, cols, i, j)
                .unwrap()
                .into(),
        }
    }
}

/// Row and column strides.
fn strides(kind: usize, n: usize, k: usize) -> (usize, usize) {
    match kind {
        0 => (k, 1),
        1 => (k + 3, 1),
        // Every second row of an interleaved pair.
        2 => (2 * k, 1),
        3 => (1, n),
        4 => (1, n + 5),
        5 => (2, 2 * n),
        _ => (2 * k + 1, 2),
    }
}

/// The definition, in memory of another's shape.
fn expected(layout: &PanelLayout, columns: &Columns<'_>) -> Vec<u8> {
    let in_one_piece = PanelLayout {
        halved: false,
        ..*layout
    };
    let bytes = layout.panels() * layout.panel_bytes();
    let mut out = vec![MaybeUninit::new(0xa5); bytes];
    for (p, part) in out.chunks_exact_mut(layout.panel_bytes()).enumerate() {
        let mut filler = Filler::new(&in_one_piece, part, false);
        pack_any(&in_one_piece, columns, p, &mut filler);
        assert!(filler.is_full());
    }
    // SAFETY: made of initialised bytes.
    let out: Vec<u8> = out
        .iter()
        .map(|byte| unsafe { byte.assume_init() })
        .collect();
    match layout.halved {
        true => out
            .chunks_exact(layout.panel_bytes())
            .flat_map(|panel| halves(panel, LINE / layout.step() * layout.step_bytes()))
            .collect(),
        false => out,
    }
}

/// The first halves of a panel's lines, the second halves, the rest.
fn halves(panel: &[u8], line: usize) -> Vec<u8> {
    let lines = panel.chunks_exact(line);
    let half = |which: usize| {
        let parts = lines
            .clone()
            .map(move |l| l.chunks_exact(line / 2).nth(which));
        parts.flatten().flatten()
    };
    half(0)
        .chain(half(1))
        .chain(lines.remainder())
        .copied()
        .collect()
}

/// Runs [`Packer`] with or without streams, whatever the size.
struct Pack<'a> {
    packer: Packer<'a>,
    out: &'a mut [MaybeUninit<u8>],
}

impl Op for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let layout = self.packer.layout;
        let group = self.packer.group();
        let parts = self.out.chunks_mut(group * layout.panel_bytes());
        for (first, part) in (0..layout.panels()).step_by(group).zip(parts) {
            let last = layout.panels().min(first + group);
            self.packer.pack_group(s, first..last, part);
        }
        s.fence_streams();
    }
}

fn check(isa: Isa, layout: &PanelLayout, columns: &Columns<'_>) {
    let expected = expected(layout, columns);
    for stream in [false, true] {
        let mut lines = vec![CacheLine::zeroed(); expected.len().div_ceil(64)];
        let bytes = &mut bytemuck::cast_slice_mut::<CacheLine, u8>(&mut lines)[..expected.len()];
        // SAFETY: the same memory; nothing uninitialised is written.
        let out =
            unsafe { core::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), bytes.len()) };
        let packer = Packer::new(layout, columns, stream);
        dispatch(isa, Pack { packer, out });
        assert!(*bytes == expected[..], "{isa} {layout:?} streams: {stream}");
    }
    for cpu in [
        Cpu::with_isa(isa).unwrap(),
        Cpu::with_isa(isa).unwrap().single_threaded(),
    ] {
        let mut packed = Storage::new(expected.len());
        pack(&cpu, layout, columns, &mut packed);
        let is_right = |packed: &[CacheLine]| {
            bytemuck::cast_slice::<CacheLine, u8>(packed)[..expected.len()] == expected[..]
        };
        assert!(is_right(packed.get(0)));
        packed.get_mut(0).fill(CacheLine([0x5a; 64]));
        pack_into(&cpu, layout, columns, packed.get_mut(0));
        assert!(is_right(packed.get(0)));
    }
}

fn check_all(dtypes: [DType; 2], n: usize, k: usize, kinds: [usize; 2], gated: bool, seed: u64) {
    let [source, packed] = dtypes;
    let data = Data::new(seed, 2 * (n + 5) * (k + 5) + 8);
    let other = Data::new(!seed, 2 * (n + 5) * (k + 5) + 8);
    let columns = Columns {
        gate: gated.then(|| other.matrix(source, n, k, strides(kinds[0], n, k))),
        up: data.matrix(source, n, k, strides(kinds[1], n, k)),
    };
    for isa in Isa::available() {
        for halved in [false, true] {
            let layout = PanelLayout {
                lanes: crate::cpu::grouped_gemm::lanes(isa),
                dtype: packed,
                n,
                k,
                gated,
                halved,
            };
            check(isa, &layout, &columns);
        }
    }
}

/// Whole panels and blocks, and one more or less of either, by every way.
#[test]
fn every_way_writes_the_same_bytes() {
    let narrowed = [DType::F32, DType::BF16];
    for dtypes in DType::ALL.map(|d| [d; 2]).into_iter().chain([narrowed]) {
        for kind in 0..=6 {
            for (n, k) in [
                (1, 1),
                (31, 33),
                (32, 32),
                (33, 31),
                (64, 15),
                (65, 97),
                (272, 64),
            ] {
                for gated in [false, true] {
                    check_all(dtypes, n, k, [kind; 2], gated, (n + k) as u64);
                }
            }
        }
    }
}

proptest! {
    #[test]
    fn any_shape_and_strides_give_the_same_bytes(
        source in 0usize..3,
        packed in 0usize..3,
        same in any::<bool>(),
        n in 1usize..80,
        k in 1usize..140,
        gate in 0usize..7,
        up in 0usize..7,
        gated in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let packed = if same { source } else { packed };
        check_all([source, packed].map(|d| DType::ALL[d]), n, k, [gate, up], gated, seed);
    }
}
