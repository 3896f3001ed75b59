//! What is wrong with a call is refused.

use super::*;

/// One thing that is wrong with a call of the layer, and what it is refused as.
#[derive(Clone, Copy, Debug)]
enum Wrong {
    NullX,
    NullData,
    NullY,
    Misaligned,
    NegativeStride,
    HugeStride,
    HugeRows,
    ShortX,
    ShortY,
    TooFewColumns,
    Dtype,
    Reserved,
    OverlapXy,
    OverlapWorkspace,
    RowsOverlap,
    ShortWorkspace,
    StructSize,
    NewerStruct,
    NullRouting,
    OtherHandle,
    StrayLogits,
    GivenIds,
}

const WRONG: [(Wrong, moe_status); 22] = [
    (Wrong::NullX, MOE_ERROR_NULL),
    (Wrong::NullData, MOE_ERROR_NULL),
    (Wrong::NullY, MOE_ERROR_NULL),
    (Wrong::Misaligned, MOE_ERROR_MISALIGNED),
    (Wrong::NegativeStride, MOE_ERROR_VALUE),
    (Wrong::HugeStride, MOE_ERROR_OVERFLOW),
    (Wrong::HugeRows, MOE_ERROR_OVERFLOW),
    (Wrong::ShortX, MOE_ERROR_BUFFER_TOO_SMALL),
    (Wrong::ShortY, MOE_ERROR_BUFFER_TOO_SMALL),
    (Wrong::TooFewColumns, MOE_ERROR_SHAPE),
    (Wrong::Dtype, MOE_ERROR_VALUE),
    (Wrong::Reserved, MOE_ERROR_VALUE),
    (Wrong::OverlapXy, MOE_ERROR_OVERLAP),
    (Wrong::OverlapWorkspace, MOE_ERROR_OVERLAP),
    (Wrong::RowsOverlap, MOE_ERROR_VALUE),
    (Wrong::ShortWorkspace, MOE_ERROR_BUFFER_TOO_SMALL),
    (Wrong::StructSize, MOE_ERROR_STRUCT_SIZE),
    (Wrong::NewerStruct, MOE_ERROR_STRUCT_SIZE),
    (Wrong::NullRouting, MOE_ERROR_NULL),
    (Wrong::OtherHandle, MOE_ERROR_HANDLE),
    (Wrong::StrayLogits, MOE_ERROR_SHAPE),
    (Wrong::GivenIds, MOE_ERROR_VALUE),
];

/// A caller whose header has one field more.
#[repr(C)]
struct Newer {
    call: moe_forward,
    more: u64,
}

#[test]
fn what_is_wrong_is_refused_and_nothing_is_written() {
    let mut pair = Pair::new(1, DType::F32);
    let x = Rng(5).normals(T * H + 1);
    let ids = [0i32; T * K];
    for (wrong, expected) in WRONG {
        let mut out = vec![-7.0f32; T * H];
        let mut x_view = matrix(&x, T, H);
        let mut y_view = matrix_mut(&mut out, T, H);
        let logits = matrix(&x, T, E + 1);
        let mut call = pair.call(null(), null());
        let (mut routing, mut x_null, mut y_null) = (pair.routing, false, false);
        match wrong {
            Wrong::NullX => x_null = true,
            Wrong::NullData => x_view.data = null(),
            Wrong::NullY => y_null = true,
            Wrong::Misaligned => {
                x_view.data = x_view.data.cast::<u8>().wrapping_add(1).cast();
                x_view.bytes -= 1;
            }
            Wrong::NegativeStride => x_view.row_stride = -(H as isize),
            Wrong::HugeStride => x_view.row_stride = isize::MAX,
            Wrong::HugeRows => x_view.rows = usize::MAX,
            Wrong::ShortX => x_view.bytes = T * H * 4 - 1,
            Wrong::ShortY => y_view.bytes = T * H * 4 - 1,
            Wrong::TooFewColumns => x_view.cols -= 1,
            Wrong::Dtype => y_view.dtype = 4,
            Wrong::Reserved => x_view.reserved = 1,
            Wrong::OverlapXy => {
                // y begins at x's last element.
                y_view.data = x_view
                    .data
                    .cast::<f32>()
                    .wrapping_add(T * H - 1)
                    .cast_mut()
                    .cast::<c_void>();
            }
            Wrong::OverlapWorkspace => {
                call.workspace = out.as_mut_ptr().cast::<u8>().wrapping_add(T * H * 4 - 1)
            }
            Wrong::RowsOverlap => y_view.row_stride = H as isize - 1,
            Wrong::ShortWorkspace => call.workspace_bytes -= 1,
            Wrong::StructSize => call.struct_size -= 8,
            Wrong::NewerStruct => call.struct_size = size_of::<Newer>(),
            Wrong::NullRouting => routing = null_mut(),
            Wrong::OtherHandle => routing = pair.router.cast(),
            Wrong::StrayLogits => call.logits = &logits,
            Wrong::GivenIds => (call.given_ids, call.given_ids_len) = (ids.as_ptr(), ids.len()),
        }
        call.x = if x_null { null() } else { &x_view };
        call.y = if y_null { null() } else { &y_view };
        let newer = Newer { call, more: 1 };
        // SAFETY: memory is as long as it is told, or the call is refused before it is touched.
        let status = unsafe { moe_layer_forward(pair.cpu, pair.layer, routing, &newer.call) };
        assert_eq!(status, expected, "{wrong:?}: {}", last_error());
        assert!(!last_error().is_empty());
        assert!(out.iter().all(|&v| v == -7.0), "{wrong:?}");
        let _ = newer.more;
    }
    // And the very same call with nothing wrong works, the newer struct with nothing new in it too.
    let mut out = vec![-7.0f32; T * H];
    let x_view = matrix(&x, T, H);
    let y_view = matrix_mut(&mut out, T, H);
    let mut call = pair.call(&x_view, &y_view);
    call.struct_size = size_of::<Newer>();
    let newer = Newer { call, more: 0 };
    // SAFETY: as above.
    must(unsafe {
        moe_layer_forward(
            pair.cpu,
            pair.layer,
            pair.routing,
            (&raw const newer).cast(),
        )
    });
    assert_same_bits(&out, &pair.rust_forward(&x[..T * H]), "y");
}
