"""Gradients that are sums over an expert's rows: biases, and LayerScale from sums that are there already.

Two steps without atomics: fp32 column sums of each row tile, then their sum in tile order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vlmo_kernels.runtime.route import Route

from .gemm import (
    count_row_tiles,
    flag,
    group_bounds,
    locate_row_tile,
    on_device,
    pointers_of,
    row_major,
    row_tile_bound,
    select,
)

TILE_ROWS = 64  # rows summed by one program of `column_sums_kernel`
TILE_COLUMNS = 64
REDUCE_ROWS = 32  # partial rows read at once: their latencies overlap
REDUCE_COLUMNS = 32


@triton.jit
def column_sums_kernel(
    X, ROW_SCALE, PARTIAL, OFFSETS, stride_x, N: tl.constexpr, GROUPS: tl.constexpr, SEGMENTS: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """PARTIAL `[row tiles, N]` = sum of row_scale * X over the rows of each row tile; X `[T, N]`."""
    row_tile = tl.program_id(0)
    if row_tile < count_row_tiles(OFFSETS, GROUPS, SEGMENTS, BM):
        segment, first, end = locate_row_tile(row_tile, OFFSETS, GROUPS, SEGMENTS, BM)
        rows = first + tl.arange(0, BM)
        cols = tl.program_id(1) * BN + tl.arange(0, BN)
        inside = (rows < end)[:, None] & (cols < N)[None, :]
        x = tl.load(X + rows.to(tl.int64)[:, None] * stride_x + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        if HAS_ROW_SCALE:
            x *= tl.load(ROW_SCALE + rows, mask=rows < end, other=0.0)[:, None]
        tl.store(PARTIAL + row_tile.to(tl.int64) * N + cols, tl.sum(x, 0), mask=cols < N)


@triton.jit
def bias_grad_kernel(
    PARTIAL, OFFSETS, DB, DGAMMA, GAMMA, BIAS, DOT, N: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr,
    IDS: tl.constexpr, SEGMENTS: tl.constexpr, EXPERTS: tl.constexpr, DB_MASK: tl.constexpr,
    DGAMMA_MASK: tl.constexpr, GAMMA_MASK: tl.constexpr, BIAS_MASK: tl.constexpr, BM: tl.constexpr,
    BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One expert, BN columns: s = sum of its tiles; DB = gamma s; DGAMMA = DOT + bias s.

    SLOTS `[SEGMENTS]`: which of the EXPERTS a segment belongs to, -1 if none. IDS `[EXPERTS]`: its row of DOT.
    BM: rows of a tile. GAMMA `[N]` is LayerScale after the layer whose bias this is.
    """
    slot = tl.program_id(1)
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    before = 0
    for i in tl.static_range(SEGMENTS):
        count = tl.cdiv(tl.load(OFFSETS + GROUPS[2 * i + 1]) - tl.load(OFFSETS + GROUPS[2 * i]), BM)
        mine = tl.where(slot == SLOTS[i], count, 0)
        for step in tl.range(0, mine, BR):
            row = step + tl.arange(0, BR)
            at = (before + row).to(tl.int64)[:, None] * N + cols[None, :]
            total += tl.sum(tl.load(PARTIAL + at, mask=(row < mine)[:, None] & (cols < N)[None, :], other=0.0), 0)
        before += count
    db = total
    if GAMMA_MASK:
        here = flag(GAMMA_MASK, slot) & (cols < N)
        db *= tl.load(select(GAMMA, slot, EXPERTS) + cols, mask=here, other=1.0).to(tl.float32)
    if DB_MASK:
        out = select(DB, slot, EXPERTS)
        tl.store(out + cols, db.to(out.dtype.element_ty), mask=flag(DB_MASK, slot) & (cols < N))
    if DGAMMA_MASK:
        identity = 0
        for i in tl.static_range(EXPERTS):
            identity = tl.where(slot == i, IDS[i], identity)
        here = flag(DGAMMA_MASK, slot) & (cols < N)
        dgamma = tl.load(DOT + identity * N + cols, mask=here, other=0.0)
        if BIAS_MASK:
            bias = tl.load(select(BIAS, slot, EXPERTS) + cols, mask=here & flag(BIAS_MASK, slot), other=0.0)
            dgamma += total * bias.to(tl.float32)
        out = select(DGAMMA, slot, EXPERTS)
        tl.store(out + cols, dgamma.to(out.dtype.element_ty), mask=here)


def column_sums(x: torch.Tensor, route: Route, row_scale: torch.Tensor | None = None) -> torch.Tensor:
    """Column sums of `row_scale * x` `[T, N]` over every TILE_ROWS rows of a segment: fp32 `[row tiles, N]`."""
    rows, n = x.shape
    tiles = row_tile_bound(rows, len(route.segments), TILE_ROWS)
    partial = x.new_empty(tiles, n, dtype=torch.float32)
    if rows and n:
        x = row_major(x)
        with on_device(x):
            column_sums_kernel[(tiles, triton.cdiv(n, TILE_COLUMNS))](
                x, None if row_scale is None else row_scale.contiguous(), partial, route.offsets, x.stride(0),
                N=n, GROUPS=group_bounds(route.segments), SEGMENTS=len(route.segments),
                HAS_ROW_SCALE=row_scale is not None, BM=TILE_ROWS, BN=TILE_COLUMNS, num_warps=4,
            )  # fmt: skip
    return partial


def reduce(
    partial: torch.Tensor,
    tile_rows: int,
    rows: int,
    biases: list[torch.Tensor | None],
    route: Route,
    need: list[bool],
    *,
    gamma: list[torch.Tensor | None] | None = None,
    need_dgamma: list[bool] | None = None,
    dot: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """`db[e] = gamma[e] * s` and `dgamma[e] = dot[e] + biases[e] * s`, with `s` the sum of the expert's tiles.

    Args:
        partial: fp32 `[row tiles, N]`, column sums of every `tile_rows` rows of a segment.
        rows: T; without rows `partial` holds nothing.
        biases, gamma: one `[N]` or None per expert. A wanted `need[e]` needs a bias, `need_dgamma[e]` a gamma.
        dot: fp32 `[experts, N]` from `weight_grad`, where a dgamma is wanted.

    Returns:
        db and dgamma, one `[N]` or None per expert, in the dtype of the bias and of gamma.
    """
    gamma = gamma or [None] * len(biases)
    need_dgamma = need_dgamma or [False] * len(biases)
    n = partial.shape[1]
    db = [b.new_empty(n) if want and b is not None else None for b, want in zip(biases, need, strict=True)]
    dgamma = [g.new_empty(n) if want and g is not None else None for g, want in zip(gamma, need_dgamma, strict=True)]
    routed = {e for _, _, e in route.segments} if rows else set()
    experts = []
    for e, outs in enumerate(zip(db, dgamma, strict=True)):
        wanted = [out for out in outs if out is not None]
        if wanted and e in routed:
            experts.append(e)
        else:
            for out in wanted:
                out.zero_()
    if not experts or n == 0:
        return db, dgamma
    slots = tuple(experts.index(e) if e in experts else -1 for _, _, e in route.segments)
    outs, db_mask = pointers_of(db, experts)
    gamma_outs, dgamma_mask = pointers_of(dgamma, experts)
    g, gamma_mask = pointers_of(gamma, experts)
    b, bias_mask = pointers_of(biases, experts)
    with on_device(partial):
        bias_grad_kernel[(triton.cdiv(n, REDUCE_COLUMNS), len(experts))](
            partial, route.offsets, outs, gamma_outs, g, b, dot,
            N=n, GROUPS=group_bounds(route.segments), SLOTS=slots, IDS=tuple(experts),
            SEGMENTS=len(slots), EXPERTS=len(experts), DB_MASK=db_mask, DGAMMA_MASK=dgamma_mask,
            GAMMA_MASK=gamma_mask, BIAS_MASK=bias_mask, BM=tile_rows, BR=REDUCE_ROWS, BN=REDUCE_COLUMNS, num_warps=4,
        )  # fmt: skip
    return db, dgamma
