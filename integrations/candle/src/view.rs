//! Candle's storages and layouts as the matrices of the kernels. No element moves.

use candle_core::{
    CpuStorage, DType, DeviceLocation, Error, Layout, Result, Storage, Tensor, bail,
};
use moe_kernels::{AnyMatMut, AnyMatRef, DType as Format, MatMut, MatRef};

/// An error of the kernels as one of candle's.
pub(crate) fn refused(error: moe_kernels::Error) -> Error {
    Error::wrap(error)
}

/// The kernels' name of a candle format.
pub(crate) fn format(argument: &str, dtype: DType) -> Result<Format> {
    match dtype {
        DType::F32 => Ok(Format::F32),
        DType::F16 => Ok(Format::F16),
        DType::BF16 => Ok(Format::BF16),
        other => bail!("{argument}: expected f32, f16 or bf16, got {other:?}"),
    }
}

/// The shape of a tensor whose last dimension is a row's, all others being counted through.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    pub rows: usize,
    pub cols: usize,
    pub row_stride: usize,
    pub col_stride: usize,
}

/// Leading dimensions become one when each stride is the next one times its size, as in every contiguous tensor, its slices along the last and
/// the first dimension, and broadcasts of one row. Others have no single row stride.
pub(crate) fn rows_of(argument: &str, layout: &Layout) -> Result<Rows> {
    let (dims, strides) = (layout.dims(), layout.stride());
    let (Some((&cols, lead)), Some((&col_stride, lead_strides))) =
        (dims.split_last(), strides.split_last())
    else {
        bail!("{argument}: expected a tensor [.., H], got a scalar");
    };
    // The innermost first; dimensions of one element have no stride that matters.
    let mut merged: Option<(usize, usize)> = None;
    for (&size, &stride) in lead.iter().zip(lead_strides).rev() {
        merged = match merged {
            _ if size == 1 => merged,
            None => Some((size, stride)),
            Some((rows, inner)) if inner.checked_mul(rows) == Some(stride) => {
                Some((rows.saturating_mul(size), inner))
            }
            Some(_) if layout.shape().elem_count() == 0 => Some((0, 0)),
            Some(_) => bail!(
                "{argument}: rows of shape {dims:?} with strides {strides:?} are not evenly spaced; call contiguous() on it first"
            ),
        };
    }
    let (rows, row_stride) = merged.unwrap_or((1, cols));
    Ok(Rows {
        rows: if layout.shape().elem_count() == 0 && cols > 0 {
            0
        } else {
            rows
        },
        cols,
        row_stride,
        col_stride,
    })
}

/// What a layout sees of a storage; candle keeps offsets inside, and an empty tensor may begin at the end.
fn from_start<'a, T>(argument: &str, data: &'a [T], layout: &Layout) -> Result<&'a [T]> {
    match data.get(layout.start_offset()..) {
        Some(data) => Ok(data),
        None => bail!(
            "{argument}: offset {} is outside its storage",
            layout.start_offset()
        ),
    }
}

/// A tensor `[.., C]` as a matrix of all its rows.
pub(crate) fn matrix<'a>(
    argument: &str,
    storage: &'a CpuStorage,
    layout: &Layout,
) -> Result<AnyMatRef<'a>> {
    let r = rows_of(argument, layout)?;
    macro_rules! view {
        ($data:expr) => {{
            let data = from_start(argument, $data, layout)?;
            MatRef::with_strides(data, r.rows, r.cols, r.row_stride, r.col_stride)
                .map(AnyMatRef::from)
        }};
    }
    let view = match storage {
        CpuStorage::F32(data) => view!(data),
        CpuStorage::F16(data) => view!(data),
        CpuStorage::BF16(data) => view!(data),
        other => bail!(
            "{argument}: expected f32, f16 or bf16, got {:?}",
            kind(other)
        ),
    };
    view.map_err(refused)
}

/// A tensor `[.., C]` whose rows are contiguous, to be written.
pub(crate) fn matrix_mut<'a>(
    argument: &str,
    storage: &'a mut CpuStorage,
    layout: &Layout,
) -> Result<AnyMatMut<'a>> {
    let r = rows_of(argument, layout)?;
    if r.col_stride != 1 && r.cols > 1 {
        bail!(
            "{argument}: expected rows without gaps, got strides {:?}",
            layout.stride()
        );
    }
    let start = layout.start_offset();
    macro_rules! view {
        ($data:expr) => {{
            let Some(data) = $data.get_mut(start..) else {
                bail!("{argument}: offset {start} is outside its storage");
            };
            MatMut::with_row_stride(data, r.rows, r.cols, r.row_stride).map(AnyMatMut::from)
        }};
    }
    let view = match storage {
        CpuStorage::F32(data) => view!(data),
        CpuStorage::F16(data) => view!(data),
        CpuStorage::BF16(data) => view!(data),
        other => bail!(
            "{argument}: expected f32, f16 or bf16, got {:?}",
            kind(other)
        ),
    };
    view.map_err(refused)
}

/// The elements of a contiguous f32 tensor.
pub(crate) fn floats<'a>(
    argument: &str,
    storage: &'a CpuStorage,
    layout: &Layout,
) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(data), Some((from, to))) => Ok(&data[from..to]),
        (CpuStorage::F32(_), None) => bail!("{argument}: expected a contiguous tensor"),
        (other, _) => bail!("{argument}: expected f32, got {:?}", kind(other)),
    }
}

/// Copies expert ids of a contiguous tensor, of any integer format of candle's that its sorts yield.
pub(crate) fn copy_ids(
    argument: &str,
    storage: &CpuStorage,
    layout: &Layout,
    ids: &mut Vec<i32>,
) -> Result<()> {
    let Some((from, to)) = layout.contiguous_offsets() else {
        bail!("{argument}: expected a contiguous tensor");
    };
    ids.clear();
    // What does not fit i32 names no expert, and neither does i32::MIN; the kernels refuse it.
    match storage {
        CpuStorage::U32(data) => {
            let new = data[from..to]
                .iter()
                .map(|&id| i32::try_from(id).unwrap_or(i32::MIN));
            ids.extend(new);
        }
        CpuStorage::I64(data) => {
            let new = data[from..to]
                .iter()
                .map(|&id| i32::try_from(id).unwrap_or(i32::MIN));
            ids.extend(new);
        }
        CpuStorage::I32(data) => ids.extend_from_slice(&data[from..to]),
        other => bail!(
            "{argument}: expected u32, i32 or i64, got {:?}",
            kind(other)
        ),
    }
    Ok(())
}

/// The format of a storage.
fn kind(storage: &CpuStorage) -> DType {
    candle_core::backend::BackendStorage::dtype(storage)
}

/// Refuses a tensor that is elsewhere than `place`.
pub(crate) fn is_at(argument: &str, tensor: &Tensor, place: DeviceLocation) -> Result<()> {
    let found = tensor.device().location();
    if found != place {
        bail!(
            "{argument}: expected a tensor on {place:?}, where the layer's weights are, got one on {found:?}"
        );
    }
    Ok(())
}

/// Runs `f` on a tensor that is on the CPU, as a matrix.
pub(crate) fn with_matrix<R>(
    argument: &str,
    tensor: &Tensor,
    f: impl FnOnce(AnyMatRef<'_>) -> Result<R>,
) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(matrix(argument, storage, layout)?),
        other => bail!(
            "{argument}: expected a tensor on the CPU, got one on {:?}",
            other.device().location()
        ),
    }
}
