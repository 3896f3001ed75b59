//! RMS norms of rows on the GPU (or the emulator): the CPU's bits for every format, layout and width, in place, and only for the rows in use.
#![cfg(feature = "cuda")]

mod common;
#[path = "common/gpu.rs"]
mod gpu;

use common::product::{bytes, numbers, rounded};
use common::{Rng, assert_same_bits};
use gpu::{Buffer, Gpu};
use moe_kernels::combine::{Combine, Routed, combine_into};
use moe_kernels::cuda::DevicePtr;
use moe_kernels::cuda::combine::{DeviceRows, Norm};
use moe_kernels::cuda::norm::{NormRows, plan_norm_rows};
use moe_kernels::norm::RmsNorm;
use moe_kernels::{AnyMatMut, Cpu, DType, Error, MatMut, MatRef};

const EPS: f32 = 1e-5;

/// Rows on the device, `shift` elements into their buffer, `gap` elements apart.
struct Rows {
    buffer: Buffer<u8>,
    device: DeviceRows,
    shift: usize,
    width: usize,
}

impl Rows {
    fn new(gpu: &Gpu, dtype: DType, v: &[f32], width: usize, shift: usize, gap: usize) -> Self {
        let stride = width + gap;
        let mut spread = vec![f32::NAN; shift + v.len() / width * stride];
        for (r, row) in v.chunks(width).enumerate() {
            spread[shift + r * stride..][..width].copy_from_slice(row);
        }
        let buffer = gpu.upload(&bytes(dtype, &spread));
        let device = DeviceRows {
            ptr: buffer.ptr().add((shift * dtype.size()) as u64),
            stride,
            dtype,
        };
        Self {
            buffer,
            device,
            shift,
            width,
        }
    }

    fn read(&self, gpu: &Gpu) -> Vec<f32> {
        let all = numbers(self.device.dtype, &gpu.download(&self.buffer));
        let stride = self.device.stride;
        let (mut rows, mut between) = (Vec::new(), all[..self.shift].to_vec());
        for row in all[self.shift..].chunks(stride) {
            rows.extend_from_slice(&row[..self.width]);
            between.extend_from_slice(&row[self.width..]);
        }
        assert!(between.iter().all(|v| v.is_nan()), "written between rows");
        rows
    }
}

/// What the CPU makes of f32 rows: the norm of [`combine_into`], which is in the order of all norms.
fn expected(x: &[f32], weight: &[f32], mul: f32, scale_first: bool, out: DType) -> Vec<f32> {
    let width = weight.len();
    let (x, weight) = match scale_first {
        true => {
            let scaled = x.iter().zip(weight.iter().cycle()).map(|(x, w)| x * w);
            (scaled.collect(), vec![1.0; width])
        }
        false => (x.to_vec(), weight.to_vec()),
    };
    let rows = x.len() / width;
    let norm = RmsNorm::new(&weight, EPS).unwrap();
    let norm = norm.with_multiplier(mul).unwrap();
    let mut combine = Combine::new(Routed::Sum(MatRef::new(&x, rows, width).unwrap()));
    combine.norm = Some(&norm);
    let mut y = vec![0.0f32; x.len()];
    let into: AnyMatMut<'_> = MatMut::new(&mut y, rows, width).unwrap().into();
    combine_into(&Cpu::new(), &combine, into).unwrap();
    rounded(out, &y)
}

#[test]
fn norms_have_the_cpus_bits() {
    let Some(gpu) = gpu::open() else { return };
    let mut rng = Rng(3);
    let mut kernels = std::collections::BTreeSet::new();
    // Widths below a warp, beyond a block's vectors, and beyond what shared memory holds.
    for width in [
        1,
        5,
        31,
        64,
        200,
        1032,
        4100,
        11 * 1024,
        11 * 1024 + 8,
        12_291,
    ] {
        for (shift, gap) in [(0, 0), (0, 8), (1, 3)] {
            for from in DType::ALL {
                for to in DType::ALL {
                    let n = 3 * width;
                    let (mul, scale_first) = ([1.0, 0.3][rng.below(2)], rng.below(2) == 1);
                    let x = rounded(from, &rng.normals(n));
                    let weight = rng.normals(width);
                    let input = Rows::new(&gpu, from, &x, width, shift, gap);
                    let out = Rows::new(&gpu, to, &vec![0.0; n], width, shift, gap);
                    let device_weight = gpu.upload(&[vec![0.0; shift], weight.clone()].concat());
                    let norm = Norm {
                        weight: device_weight.ptr().add(4 * shift as u64),
                        eps: EPS,
                        multiplier: mul,
                    };
                    let launch = plan_norm_rows(&NormRows {
                        scale_first,
                        ..NormRows::new(3, width, input.device, norm, out.device)
                    })
                    .unwrap();
                    kernels.insert(launch.kernel);
                    gpu.launch(&launch);
                    let what = format!(
                        "{width} {from} to {to} at {shift}, {gap} apart, × {mul}, {scale_first}"
                    );
                    let expected = expected(&x, &weight, mul, scale_first, to);
                    assert_same_bits(&out.read(&gpu), &expected, &what);
                }
            }
        }
    }
    assert_eq!(
        kernels.into_iter().collect::<Vec<_>>(),
        [
            "moe_norm_any",
            "moe_norm_bf16",
            "moe_norm_f16",
            "moe_norm_f32"
        ]
    );
}

#[test]
fn rows_are_normalised_in_place_up_to_those_in_use() {
    let Some(gpu) = gpu::open() else { return };
    let mut rng = Rng(8);
    for width in [24, 37, 11 * 1024 + 33] {
        for used in [0, 2, 5, 9] {
            for dtype in DType::ALL {
                let x = rounded(dtype, &rng.normals(5 * width));
                let weight = rng.normals(width);
                let (rows, device_weight) =
                    (Rows::new(&gpu, dtype, &x, width, 0, 0), gpu.upload(&weight));
                let device_used = gpu.upload(&[used as i32]);
                let norm = Norm {
                    weight: device_weight.ptr(),
                    eps: EPS,
                    multiplier: 1.0,
                };
                let plan = NormRows {
                    used: device_used.ptr(),
                    ..NormRows::new(5, width, rows.device, norm, rows.device)
                };
                gpu.launch(&plan_norm_rows(&plan).unwrap());
                let mut all = expected(&x, &weight, 1.0, false, dtype);
                let untouched = used.min(5) * width;
                all[untouched..].copy_from_slice(&x[untouched..]);
                assert_same_bits(&rows.read(&gpu), &all, &format!("{width} {dtype} {used}"));
            }
        }
    }
}

#[test]
fn numbers_that_are_none_stay_in_their_row() {
    let Some(gpu) = gpu::open() else { return };
    let mut x = Rng(4).normals(4 * 40);
    (x[3], x[50], x[90]) = (f32::NAN, f32::INFINITY, 1e30);
    x[120..].fill(0.0);
    let weight = gpu.upload(&[1.0f32; 40]);
    let (input, out) = (
        Rows::new(&gpu, DType::F32, &x, 40, 0, 0),
        Rows::new(&gpu, DType::F32, &[0.0; 160], 40, 0, 0),
    );
    let norm = |eps| Norm {
        weight: weight.ptr(),
        eps,
        multiplier: 1.0,
    };
    let plan = NormRows::new(4, 40, input.device, norm(EPS), out.device);
    gpu.launch(&plan_norm_rows(&plan).unwrap());
    let y = out.read(&gpu);
    assert!(y[..40].iter().all(|v| v.is_nan()), "NaN fills its row");
    assert!(y[50].is_nan() && y[40] == 0.0, "∞/∞, and the rest by ∞");
    assert!(y[80..120].iter().all(|&v| v == 0.0), "the mean overflows");
    assert!(y[120..].iter().all(|&v| v == 0.0), "eps carries a zero row");
    gpu.launch(
        &plan_norm_rows(&NormRows {
            norm: norm(0.0),
            ..plan
        })
        .unwrap(),
    );
    assert!(out.read(&gpu)[120..].iter().all(|v| v.is_nan()), "0/0");
}

#[test]
fn bad_operands_are_named() {
    let rows = |ptr, stride| DeviceRows {
        ptr: DevicePtr(ptr),
        stride,
        dtype: DType::F32,
    };
    let norm = Norm {
        weight: DevicePtr(0x1000),
        eps: 0.0,
        multiplier: 1.0,
    };
    let fine = NormRows::new(3, 8, rows(0x2000, 8), norm, rows(0x3000, 8));
    let launch = plan_norm_rows(&fine).unwrap();
    assert_eq!((launch.grid, launch.shared_bytes), ([3, 1, 1], 32));
    assert!(
        plan_norm_rows(&NormRows { rows: 0, ..fine })
            .unwrap()
            .is_empty()
    );
    assert!(
        plan_norm_rows(&NormRows { width: 0, ..fine })
            .unwrap()
            .is_empty()
    );
    let argument = |n: NormRows| match plan_norm_rows(&n).unwrap_err() {
        Error::Value { argument, .. } => argument,
        Error::Overflow { .. } => "overflow",
        other => panic!("{other}"),
    };
    let bad_norm = |norm| argument(NormRows { norm, ..fine });
    assert_eq!(
        argument(NormRows {
            x: rows(0x2000, 7),
            ..fine
        }),
        "x"
    );
    assert_eq!(
        argument(NormRows {
            x: rows(0, 8),
            ..fine
        }),
        "x"
    );
    assert_eq!(
        argument(NormRows {
            x: rows(0x2001, 8),
            ..fine
        }),
        "x"
    );
    assert_eq!(
        argument(NormRows {
            out: rows(0x2000, 7),
            ..fine
        }),
        "out"
    );
    assert_eq!(
        argument(NormRows {
            out: rows(0, 8),
            ..fine
        }),
        "out"
    );
    assert_eq!(
        argument(NormRows {
            used: DevicePtr(2),
            ..fine
        }),
        "used"
    );
    assert_eq!(
        bad_norm(Norm {
            weight: DevicePtr::NULL,
            ..norm
        }),
        "norm"
    );
    assert_eq!(bad_norm(Norm { eps: -1.0, ..norm }), "eps");
    assert_eq!(
        bad_norm(Norm {
            eps: f32::NAN,
            ..norm
        }),
        "eps"
    );
    assert_eq!(
        bad_norm(Norm {
            multiplier: f32::INFINITY,
            ..norm
        }),
        "multiplier"
    );
    assert_eq!(
        argument(NormRows {
            rows: 1 << 31,
            ..fine
        }),
        "overflow"
    );
    assert_eq!(
        argument(NormRows {
            width: 1 << 31,
            ..fine
        }),
        "overflow"
    );
    assert_eq!(
        argument(NormRows {
            x: rows(0x2000, usize::MAX / 2),
            ..fine
        }),
        "overflow"
    );
}
