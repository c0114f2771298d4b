"""Backward kernels of `routed_norm`; how the rows and partial sums are shared out is told there."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _factor(weight, column, in_row, KIND: tl.constexpr):
    """What the normalised row is multiplied by, fp32."""
    factor = tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)
    if KIND == "rms1p":
        factor += 1.0
    return factor


@triton.jit(do_not_specialize=["rows", "block"])
def norm_backward(
    dy,  # [T, D]
    dz,  # [T, D] or None
    z,  # [T, D]
    weights,  # tuple, per segment: [D] or None
    offsets,  # int32 [G + 1]
    mean,  # fp32 [T] or None
    rstd,  # fp32 [T]
    dx,  # [T, D], contiguous
    dw_partial,  # fp32 [programs + segments - 1, D] or None
    db_partial,  # the same
    dy_stride,
    dz_stride,
    z_stride,
    rows,  # T
    block,  # rows of one program, a multiple of ROWS
    BOUNDS: tl.constexpr,
    NEED_DW: tl.constexpr,  # tuple, per segment: whether this kernel sums it
    NEED_DB: tl.constexpr,
    KEEP_WEIGHT: tl.constexpr,  # in registers from row to row, else it is read again from the cache
    KIND: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dx of a block of rows, and the block's partial sums of dw and db, one slot a segment."""
    program = tl.program_id(0)
    first = program * block
    last = tl.minimum(first + block, rows)
    column = tl.arange(0, COLUMNS)
    in_row = column < D

    for s in tl.static_range(len(BOUNDS) - 1):
        start = tl.maximum(tl.load(offsets + BOUNDS[s]), first)
        end = tl.minimum(tl.load(offsets + BOUNDS[s + 1]), last)
        if start < end:
            if weights[s] is not None and KEEP_WEIGHT:
                weight = _factor(weights[s], column, in_row, KIND)
            dw = tl.zeros((ROWS, COLUMNS), tl.float32)
            db = tl.zeros((ROWS, COLUMNS), tl.float32)
            for tile in range(start, end, ROWS):
                row = tile + tl.arange(0, ROWS)
                own = row < end
                mask = own[:, None] & in_row[None, :]
                row64 = row.to(tl.int64)[:, None]
                value = tl.load(z + row64 * z_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
                grad = tl.load(dy + row64 * dy_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
                scale = tl.load(rstd + row, mask=own, other=0.0)
                if KIND == "layer":
                    value -= tl.load(mean + row, mask=own, other=0.0)[:, None]
                normal = value * scale[:, None]  # columns past D meet a zero gradient below
                if NEED_DW[s]:
                    dw += grad * normal
                if NEED_DB[s]:
                    db += grad
                if weights[s] is not None:
                    if not KEEP_WEIGHT:
                        weight = _factor(weights[s], column, in_row, KIND)
                    grad = grad * weight[None, :]
                inner = grad - normal * (tl.sum(grad * normal, 1) / D)[:, None]
                if KIND == "layer":
                    inner -= (tl.sum(grad, 1) / D)[:, None]
                out = inner * scale[:, None]
                if dz is not None:
                    out += tl.load(dz + row64 * dz_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
                tl.store(dx + row64 * D + column[None, :], out.to(dx.dtype.element_ty), mask=mask)
            slot = (program + s).to(tl.int64) * D + column
            if NEED_DW[s]:
                tl.store(dw_partial + slot, tl.sum(dw, 0), mask=in_row)
            if NEED_DB[s]:
                tl.store(db_partial + slot, tl.sum(db, 0), mask=in_row)

    dead = tl.maximum(tl.load(offsets + BOUNDS[len(BOUNDS) - 1]), first)
    for tile in range(dead, last, ROWS):
        row = tile + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * D + column[None, :]
        zero = tl.zeros((ROWS, COLUMNS), dx.dtype.element_ty)
        tl.store(dx + at, zero, mask=(row < last)[:, None] & in_row[None, :])


@triton.jit(do_not_specialize=["rows", "block"])
def norm_weight_grad(
    dy,  # [T, D]
    z,  # [T, D]
    offsets,  # int32 [G + 1]
    mean,  # fp32 [T] or None
    rstd,  # fp32 [T]
    dw_partial,  # fp32 [programs + segments - 1, D] or None
    db_partial,  # the same
    dy_stride,
    z_stride,
    rows,  # T
    block,  # rows of one program
    BOUNDS: tl.constexpr,
    NEED_DW: tl.constexpr,  # tuple, per segment
    NEED_DB: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The partial sums of `norm_backward` where a row is too wide for registers: by blocks of columns."""
    program = tl.program_id(0)
    first = program * block
    last = tl.minimum(first + block, rows)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_row = column < D

    for s in tl.static_range(len(BOUNDS) - 1):
        start = tl.maximum(tl.load(offsets + BOUNDS[s]), first)
        end = tl.minimum(tl.load(offsets + BOUNDS[s + 1]), last)
        if (start < end) & (NEED_DW[s] or NEED_DB[s]):
            dw = tl.zeros((ROWS, COLUMNS), tl.float32)
            db = tl.zeros((ROWS, COLUMNS), tl.float32)
            for tile in range(start, end, ROWS):
                row = tile + tl.arange(0, ROWS)
                own = row < end
                mask = own[:, None] & in_row[None, :]
                row64 = row.to(tl.int64)[:, None]
                grad = tl.load(dy + row64 * dy_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
                if NEED_DB[s]:
                    db += grad
                if NEED_DW[s]:
                    value = tl.load(z + row64 * z_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
                    if mean is not None:
                        value -= tl.load(mean + row, mask=own, other=0.0)[:, None]
                    dw += grad * (value * tl.load(rstd + row, mask=own, other=0.0)[:, None])
            slot = (program + s).to(tl.int64) * D + column
            if NEED_DW[s]:
                tl.store(dw_partial + slot, tl.sum(dw, 0), mask=in_row)
            if NEED_DB[s]:
                tl.store(db_partial + slot, tl.sum(db, 0), mask=in_row)


@triton.jit
def _segment_sum(partial, first_slot, end_slot, column, D: tl.constexpr, SLOTS: tl.constexpr):
    """Sum of the slots from `first_slot` to `end_slot` of `partial` `[slots, D]`, for the given columns."""
    total = tl.zeros((SLOTS, column.shape[0]), tl.float32)
    for tile in range(first_slot, end_slot, SLOTS):
        slot = tile + tl.arange(0, SLOTS)
        mask = (slot < end_slot)[:, None] & (column < D)[None, :]
        total += tl.load(partial + slot.to(tl.int64)[:, None] * D + column[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["block"])
def norm_reduce(
    dw_partial,  # fp32 [slots, D] or None
    db_partial,  # the same
    dws,  # tuple, per expert: [D] or None where it is not wanted
    dbs,  # tuple, per expert
    offsets,  # int32 [G + 1]
    block,  # rows of one program of the backward kernel
    BOUNDS: tl.constexpr,
    EXPERTS: tl.constexpr,  # expert of every segment
    D: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dw and db of one expert and one block of columns: the sum of its segments' slots, in order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    for e in tl.static_range(len(dws)):
        if tl.program_id(1) == e:
            dw = tl.zeros((COLUMNS,), tl.float32)
            db = tl.zeros((COLUMNS,), tl.float32)
            for s in tl.static_range(len(EXPERTS)):
                if EXPERTS[s] == e:
                    start = tl.load(offsets + BOUNDS[s])
                    end = tl.load(offsets + BOUNDS[s + 1])
                    first_slot = start // block + s
                    # an empty segment has no slot
                    end_slot = tl.where(start < end, (end - 1) // block + s + 1, first_slot)
                    if dws[e] is not None:
                        dw += _segment_sum(dw_partial, first_slot, end_slot, column, D, SLOTS)
                    if dbs[e] is not None:
                        db += _segment_sum(db_partial, first_slot, end_slot, column, D, SLOTS)
            if dws[e] is not None:
                tl.store(dws[e] + column, dw.to(dws[e].dtype.element_ty), mask=column < D)
            if dbs[e] is not None:
                tl.store(dbs[e] + column, db.to(dbs[e].dtype.element_ty), mask=column < D)
