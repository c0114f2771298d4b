"""Forward kernel of `routed_norm`; how the rows are shared out is told there."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_forward(
    x,  # [T, D]
    residual,  # [T, D] or None
    weights,  # tuple, per segment: [D] or None
    biases,  # tuple, per segment: [D] or None
    offsets,  # int32 [G + 1]
    y,  # [T, D], contiguous
    z,  # [T, D], contiguous, or None
    mean,  # fp32 [T] or None
    rstd,  # fp32 [T]
    x_stride,
    residual_stride,
    eps,
    BOUNDS: tl.constexpr,  # first group of every segment, then G
    KIND: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of rows: residual add, statistics, then the affine part of every segment that crosses it."""
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    row64 = row.to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)
    in_row = column < D
    live = row < tl.load(offsets + BOUNDS[len(BOUNDS) - 1])
    mask = live[:, None] & in_row[None, :]
    at = row64 * D + column[None, :]

    value = tl.load(x + row64 * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + row64 * residual_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        # the statistics are those of what is stored, so that backward, which sees only that, agrees
        stored = value.to(z.dtype.element_ty)
        tl.store(z + at, stored, mask=mask)
        value = stored.to(tl.float32)
    if KIND == "layer":
        average = tl.sum(value, 1) / D
        value = tl.where(in_row[None, :], value - average[:, None], 0.0)
        tl.store(mean + row, average, mask=live)
    scale = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
    tl.store(rstd + row, scale, mask=live)
    normal = value * scale[:, None]

    for s in tl.static_range(len(BOUNDS) - 1):
        start = tl.load(offsets + BOUNDS[s])
        end = tl.load(offsets + BOUNDS[s + 1])
        if (start < first + ROWS) & (end > first):
            out = normal
            if weights[s] is not None:
                weight = tl.load(weights[s] + column, mask=in_row, other=0.0).to(tl.float32)
                if KIND == "rms1p":
                    weight += 1.0
                out = out * weight[None, :]
            if biases[s] is not None:
                out += tl.load(biases[s] + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
            own = (row >= start) & (row < end)
            tl.store(y + at, out.to(y.dtype.element_ty), mask=own[:, None] & in_row[None, :])
