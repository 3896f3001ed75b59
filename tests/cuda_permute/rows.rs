//! Copies of rows, there and back.

use super::*;

/// Rows of `width` numbers with poison between them, copied there and back as the CPU does it.
fn copies<T: Element + bytemuck::Pod>(
    gpu: &Gpu,
    dtype: DType,
    width: usize,
    gap: usize,
    shift: usize,
) where
    for<'a> AnyMatMut<'a>: From<MatMut<'a, T>>,
    for<'a> AnyMatRef<'a>: From<MatRef<'a, T>>,
{
    let (tokens, slots, experts) = (9, 3, 4);
    let info = gpu.cuda.device_info();
    let options = PermuteOptions {
        block: 4,
        local: Some(1..4),
        num_null: 0,
    };
    let ids = ids(tokens * slots, experts, 0, width as u64);
    let expected = on_cpu(&ids, experts, &options);
    let sorted = sort(gpu, PermutePath::OneLaunch, &ids, experts, &options, 0);
    let stride = width + gap;
    let x: Vec<T> = (0..shift + tokens * stride)
        .map(|i| {
            bytemuck::pod_read_unaligned(&(i as u32 ^ 0x1234_5678).to_le_bytes()[..size_of::<T>()])
        })
        .collect();
    let x_buffer = gpu.upload(&x);
    let rows = max_rows(ids.len(), experts, &options).unwrap();
    let size = size_of::<T>();
    let out = gpu.filled::<u8>((shift + rows * stride) * size, 0xab);
    let back = gpu.filled::<u8>((shift + ids.len() * stride) * size, 0xab);
    let there = CopyRows {
        src: x_buffer.ptr().add((shift * size) as u64),
        src_rows: tokens,
        src_stride: stride,
        out: out.ptr().add((shift * size) as u64),
        out_stride: stride,
        index: sorted.pair_of_row.ptr(),
        rows,
        used: sorted.offsets.ptr().add(4 * experts as u64),
        divisor: slots,
        width,
        dtype,
    };
    let back_again = CopyRows {
        src: there.out,
        src_rows: rows,
        out: back.ptr().add((shift * size) as u64),
        index: sorted.row_of_pair.ptr(),
        rows: ids.len(),
        used: DevicePtr::NULL,
        divisor: 1,
        ..there
    };
    let aligned = (shift * size).is_multiple_of(16)
        && (width * size).is_multiple_of(16)
        && (gap * size).is_multiple_of(16);
    for copy in [&there, &back_again] {
        let launch = plan_copy_rows(copy, info).unwrap();
        let bytes = if aligned { 16 } else { size };
        assert_eq!(launch.kernel, format!("moe_permute_rows_{bytes}"));
        gpu.launch(&launch);
    }
    let poison: T = bytemuck::pod_read_unaligned(&vec![0xab; size]);
    let mut cpu_out = vec![poison; shift + rows * stride];
    let mut cpu_back = vec![poison; shift + ids.len() * stride];
    let view = |data: &mut [T], rows: usize, f: &dyn Fn(AnyMatMut<'_>)| {
        f(
            MatMut::with_row_stride(&mut data[shift..], rows, width, stride)
                .unwrap()
                .into(),
        );
    };
    let x_view = MatRef::with_strides(&x[shift..], tokens, width, stride, 1).unwrap();
    view(&mut cpu_out, expected.num_rows(), &|out| {
        permute_rows_into(&Cpu::new(), x_view.into(), &expected, slots, out).unwrap();
    });
    let out_view =
        MatRef::with_strides(&cpu_out[shift..], expected.num_rows(), width, stride, 1).unwrap();
    view(&mut cpu_back, ids.len(), &|back| {
        unpermute_rows_into(&Cpu::new(), out_view.into(), &expected, back).unwrap();
    });
    // Whole buffers: what lies between and beyond the rows is untouched.
    assert!(
        gpu.download(&out) == bytemuck::cast_slice::<T, u8>(&cpu_out),
        "rows of {width} {dtype}"
    );
    assert!(
        gpu.download(&back) == bytemuck::cast_slice::<T, u8>(&cpu_back),
        "pairs of {width} {dtype}"
    );
}

#[test]
fn rows_are_copied_there_and_back() {
    let Some(gpu) = gpu::open() else { return };
    for (width, gap, shift) in [
        (8, 0, 0),
        (8, 8, 8),
        (7, 1, 0),
        (1, 0, 1),
        (1024, 0, 0),
        (1032, 0, 0),
        (515, 3, 1),
        (16, 0, 1),
    ] {
        copies::<f32>(&gpu, DType::F32, width, gap, shift);
        copies::<f16>(&gpu, DType::F16, width, gap, shift);
        copies::<bf16>(&gpu, DType::BF16, width, gap, shift);
    }
}
