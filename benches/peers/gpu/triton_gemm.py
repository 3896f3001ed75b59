"""A plain grouped product in Triton, as anybody would write it first: one program for each tile, the expert found from the offsets on the device."""

import torch
import triton
import triton.language as tl

CONFIGS = [
    triton.Config({"BM": bm, "BN": bn, "BK": 64}, num_warps=warps, num_stages=stages)
    for bm, bn, warps, stages in [(16, 128, 4, 4), (64, 128, 4, 4), (128, 128, 8, 3), (128, 256, 8, 3)]
]


@triton.autotune(configs=CONFIGS, key=["rows", "N", "K", "E"])
@triton.jit
def grouped_kernel(
    a, w, out, offsets, source, rows, N, K,
    E: tl.constexpr, BE: tl.constexpr, GATHER: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(N, BN)
    tile, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    e = tl.arange(0, BE)
    starts = tl.load(offsets + e, mask=e < E, other=0)
    ends = tl.load(offsets + e + 1, mask=e < E, other=0)
    tiles = (ends - starts + BM - 1) // BM
    upto = tl.cumsum(tiles, 0)
    expert = tl.sum((upto <= tile).to(tl.int32), 0)
    if expert >= E:
        return
    here = e == expert
    start, end = tl.sum(tl.where(here, starts, 0), 0), tl.sum(tl.where(here, ends, 0), 0)
    row = start + (tile - tl.sum(tl.where(here, upto - tiles, 0), 0)) * BM + tl.arange(0, BM)
    n, k = column * BN + tl.arange(0, BN), tl.arange(0, BK)
    if GATHER:
        from_row = tl.load(source + row, mask=row < end, other=0).to(tl.int64)
    else:
        from_row = row.to(tl.int64)
    a_at = a + from_row[:, None] * K + k[None, :]
    w_at = w + expert.to(tl.int64) * N * K + n[None, :].to(tl.int64) * K + k[:, None]
    sums = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(0, K, BK):
        x = tl.load(a_at, mask=(row < end)[:, None] & (first + k < K)[None, :], other=0.0)
        y = tl.load(w_at, mask=(n < N)[None, :] & (first + k < K)[:, None], other=0.0)
        sums += tl.dot(x, y)
        a_at += BK
        w_at += BK
    place = out + row.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=(row < end)[:, None] & (n < N)[None, :])


def grouped(a, w, offsets, source=None, rows=None):
    """`out[r] = a[source[r]] · w[e]ᵀ` for the rows `offsets[e]..offsets[e + 1]` of each expert. `offsets` [E + 1] stays on the device."""
    experts, n, k = w.shape
    rows = rows or a.shape[0]
    out = torch.empty(rows, n, dtype=a.dtype, device=a.device)

    def grid(meta):
        # The host does not know the counts: as many row tiles as there can be.
        return ((rows // meta["BM"] + min(experts, rows)) * triton.cdiv(n, meta["BN"]),)

    grouped_kernel[grid](
        a, w, out, offsets, offsets if source is None else source, rows, n, k,
        E=experts, BE=triton.next_power_of_2(experts), GATHER=source is not None,
    )  # fmt: skip
    return out
