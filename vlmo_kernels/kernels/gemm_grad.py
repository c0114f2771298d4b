"""Gradients of the routed GEMM: of its input (with the activation's derivative in the epilogue) and its weights.

Nothing here uses atomics. Sums over rows that several programs share go through fp32 partials, which a second
kernel adds in a fixed order, so that results are bitwise repeatable.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vlmo_kernels.runtime.route import Route
from vlmo_kernels.tuning import tables

from .activations import activate_with_derivative
from .gemm import (
    Config,
    accumulate,
    capability,
    columns_in_parts,
    config_for,
    count_row_tiles,
    flag,
    group_bounds,
    locate_row_tile,
    on_device,
    persistent_grid,
    pointers_of,
    precision_of,
    processors,
    row_major,
    row_tile_bound,
    select,
    swizzle,
)
from .gemm_tma import MOST_SEGMENTS, accumulate_boxes, describe, pick

REDUCE_COLUMNS = 1024  # columns a step of `reduce_weight_grad_kernel`


# ---------------------------------------------------------------- gradient of the input


@triton.jit
def _store(
    acc, row_tile, first, end, column, ROW_SCALE, PRE, UP, DX, DX_UP, H, DB, DB_UP, N: tl.constexpr,
    ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, SAVE_H: tl.constexpr,
    SAVE_DB: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The epilogue of `input_grad_kernel` for rows `first` to `end` and BN columns from `column`."""
    row = tl.arange(0, BM)
    cols = column + tl.arange(0, BN)
    inside = (row < end - first)[:, None] & (cols < N)[None, :]
    base = first.to(tl.int64) * N
    at = row[:, None] * N + cols[None, :]
    sums = row_tile.to(tl.int64) * N + cols
    if HAS_ROW_SCALE:
        scale = tl.load(ROW_SCALE + first + row, mask=row < end - first, other=0.0)[:, None]
        acc *= scale
    if ACTIVATION != "none":
        pre = tl.load(PRE + base + at, mask=inside, other=0.0).to(tl.float32)
        value, slope = activate_with_derivative(pre, ACTIVATION, EXACT)
        hidden = value
        if IS_GATED:
            up = tl.load(UP + base + at, mask=inside, other=0.0).to(tl.float32)
            hidden *= up
            d_up = acc * value
            acc *= up
            tl.store(DX_UP + base + at, d_up.to(DX_UP.dtype.element_ty), mask=inside)
            if SAVE_DB:
                tl.store(DB_UP + sums, tl.sum(tl.where(inside, d_up, 0.0), 0), mask=cols < N)
        acc *= slope
        if SAVE_H:
            if HAS_ROW_SCALE:
                hidden *= scale
            tl.store(H + base + at, hidden.to(H.dtype.element_ty), mask=inside)
    tl.store(DX + base + at, acc.to(DX.dtype.element_ty), mask=inside)
    if SAVE_DB:
        tl.store(DB + sums, tl.sum(tl.where(inside, acc, 0.0), 0), mask=cols < N)


@triton.jit
def input_grad_kernel(
    DY, W, DY_UP, W_UP, ROW_SCALE, PRE, UP, DX, DX_UP, H, DB, DB_UP, OFFSETS, T, stride_dy, stride_dy_up,
    W0, W1, W2, W3, U0, U1, U2, U3,
    N: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, SEGMENTS: tl.constexpr, GROUPS_TOTAL: tl.constexpr,
    ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr, HAS_SECOND: tl.constexpr, HAS_ROW_SCALE: tl.constexpr,
    SAVE_H: tl.constexpr, SAVE_DB: tl.constexpr, ZERO_TAIL: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PARTS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """d = row_scale * (DY @ w [+ DY_UP @ w_up]); DY, DY_UP `[T, K]`; w, w_up tuples of `[K, N]`; outputs `[T, N]`.

    ACTIVATION "none": DX = d. Otherwise `d` is the gradient of the hidden values of PRE (and UP):
    DX = d act'(pre) [up], DX_UP = d act(pre), and SAVE_H stores row_scale * act(pre) [up], the operand of the
    next weight gradient.
    SAVE_DB stores column sums of DX (DX_UP) for each row tile, `[row tiles, N]` fp32, before they are rounded.
    ZERO_TAIL clears the dead rows of DX. TMA: as in `gemm_kernel`.
    """
    COLUMN_TILES: tl.constexpr = (N + BN - 1) // BN
    row_tiles = count_row_tiles(OFFSETS, GROUPS, SEGMENTS, BM)
    for tile in tl.range(tl.program_id(0), row_tiles * COLUMN_TILES, tl.num_programs(0)):
        row_tile, column_tile = swizzle(tile, row_tiles, COLUMN_TILES)
        segment, first, end = locate_row_tile(row_tile, OFFSETS, GROUPS, SEGMENTS, BM)
        rows = first + tl.arange(0, BM)
        cols = column_tile * BN + tl.arange(0, BN)
        readable = tl.minimum(rows, end - 1)
        acc = tl.zeros((BM, BN), tl.float32)
        if TMA:
            w = pick(W0, W1, W2, W3, segment, SEGMENTS)
            acc = accumulate_boxes(acc, DY, w, first, column_tile * BN, K, BK, False, PRECISION)
            if HAS_SECOND:
                w_up = pick(U0, U1, U2, U3, segment, SEGMENTS)
                acc = accumulate_boxes(acc, DY_UP, w_up, first, column_tile * BN, K, BK, False, PRECISION)
        else:
            w = select(W, segment, SEGMENTS)
            acc = accumulate(acc, DY, stride_dy, w, readable, cols, N, K, BK, False, PRECISION)
            if HAS_SECOND:
                w_up = select(W_UP, segment, SEGMENTS)
                acc = accumulate(acc, DY_UP, stride_dy_up, w_up, readable, cols, N, K, BK, False, PRECISION)

        if PARTS == 1:
            _store(
                acc, row_tile, first, end, column_tile * BN, ROW_SCALE, PRE, UP, DX, DX_UP, H, DB, DB_UP, N,
                ACTIVATION, IS_GATED, HAS_ROW_SCALE, SAVE_H, SAVE_DB, EXACT, BM, BN,
            )  # fmt: skip
        else:
            parts = columns_in_parts(acc, BM, BN, PARTS)
            for i in tl.static_range(PARTS):
                _store(
                    parts[i], row_tile, first, end, column_tile * BN + i * (BN // PARTS), ROW_SCALE, PRE, UP, DX,
                    DX_UP, H, DB, DB_UP, N, ACTIVATION, IS_GATED, HAS_ROW_SCALE, SAVE_H, SAVE_DB, EXACT, BM,
                    BN // PARTS,
                )  # fmt: skip

    if ZERO_TAIL:
        live = tl.load(OFFSETS + GROUPS_TOTAL)
        zeros = tl.zeros((BM, BN), DX.dtype.element_ty)
        for tile in tl.range(tl.program_id(0), tl.cdiv(T - live, BM) * COLUMN_TILES, tl.num_programs(0)):
            rows = live + (tile // COLUMN_TILES) * BM + tl.arange(0, BM)
            cols = (tile % COLUMN_TILES) * BN + tl.arange(0, BN)
            at = rows.to(tl.int64)[:, None] * N + cols[None, :]
            tl.store(DX + at, zeros, mask=(rows < T)[:, None] & (cols < N)[None, :])


# A token count of 1, or one that 16 divides, must not compile another kernel.
input_grad_kernel.do_not_specialize = ["T"]


# ---------------------------------------------------------------- gradient of the weights


@triton.jit
def weight_grad_kernel(
    DY, X, DW, PARTIAL, OFFSETS, stride_dy, stride_x,
    N: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, SEGMENTS: tl.constexpr, SPLITS: tl.constexpr,
    TO_PARTIAL: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`DY[rows].T @ X[rows]` of each segment, in SPLITS equal parts of its rows: BM of N, BN of K, BK rows a step.

    TO_PARTIAL stores fp32 `[SEGMENTS, SPLITS, N, K]`; otherwise (one part, one segment an expert) the tuple DW of
    `[N, K]` gradients is written at once.
    """
    ROW_TILES: tl.constexpr = (N + BM - 1) // BM
    COLUMN_TILES: tl.constexpr = (K + BN - 1) // BN
    row_tile, column_tile = swizzle(tl.program_id(0), ROW_TILES, COLUMN_TILES)
    segment = tl.program_id(1) // SPLITS
    part = tl.program_id(1) % SPLITS
    start = 0
    end = 0
    for i in tl.static_range(SEGMENTS):
        start = tl.where(segment == i, tl.load(OFFSETS + GROUPS[2 * i]), start)
        end = tl.where(segment == i, tl.load(OFFSETS + GROUPS[2 * i + 1]), end)
    length = tl.cdiv(tl.cdiv(end - start, SPLITS), BK) * BK
    start += part * length
    count = tl.minimum(end - start, length)  # rows of this part; may be zero or negative

    n = row_tile * BM + tl.arange(0, BM)
    m = column_tile * BN + tl.arange(0, BN)
    step = tl.arange(0, BK)
    row = (start + step).to(tl.int64)[:, None]
    dy = DY + row * stride_dy + n[None, :]
    x = X + row * stride_x + m[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    # At least one step, all masked where there are no rows: see `accumulate`.
    for i in tl.range(0, tl.maximum(tl.cdiv(count, BK), 1)):
        here = (step < count - i * BK)[:, None]
        dy_tile = tl.load(dy, mask=here & (n < N)[None, :], other=0.0)
        x_tile = tl.load(x, mask=here & (m < K)[None, :], other=0.0)
        acc = tl.dot(dy_tile.T, x_tile, acc, input_precision=PRECISION)
        dy += BK * stride_dy
        x += BK * stride_x
    inside = (n < N)[:, None] & (m < K)[None, :]
    at = n.to(tl.int64)[:, None] * K + m[None, :]
    if TO_PARTIAL:
        tl.store(PARTIAL + tl.program_id(1).to(tl.int64) * (N * K) + at, acc, mask=inside)
    else:
        out = select(DW, segment, SEGMENTS)
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def reduce_weight_grad_kernel(
    PARTIAL, W, GAMMA, DW, DOT, N: tl.constexpr, K: tl.constexpr, FIRST_PART: tl.constexpr, IDS: tl.constexpr,
    EXPERTS: tl.constexpr, GAMMA_MASK: tl.constexpr, DW_MASK: tl.constexpr, SAVE_DOT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One row `n` of one expert: U = its parts in order, DW = gamma_n U, DOT `[all experts, N]` = sum_k W U.

    FIRST_PART `[EXPERTS + 1]`: parts of PARTIAL `[parts, N, K]` that belong to each expert; IDS `[EXPERTS]`: its row
    of DOT. DW_MASK has the bits of the experts whose DW is wanted.
    """
    row = tl.program_id(0).to(tl.int64)
    expert = tl.program_id(1)
    first = 0
    end = 0
    identity = 0
    for i in tl.static_range(EXPERTS):
        identity = tl.where(expert == i, IDS[i], identity)
        first = tl.where(expert == i, FIRST_PART[i], first)
        end = tl.where(expert == i, FIRST_PART[i + 1], end)
    scale = 1.0
    if GAMMA_MASK:
        has_gamma = flag(GAMMA_MASK, expert)
        scale = tl.load(select(GAMMA, expert, EXPERTS) + row, mask=has_gamma, other=1.0).to(tl.float32)
    w = select(W, expert, EXPERTS) + row * K
    dot = tl.zeros((BK,), tl.float32)
    for column in tl.range(0, K, BK):
        cols = column + tl.arange(0, BK)
        total = tl.zeros((BK,), tl.float32)
        at = PARTIAL + (first.to(tl.int64) * N + row) * K + cols
        for _ in tl.range(first, end):
            total += tl.load(at, mask=cols < K, other=0.0)
            at += N * K
        if SAVE_DOT:
            dot += total * tl.load(w + cols, mask=cols < K, other=0.0).to(tl.float32)
        if DW_MASK:
            dw = select(DW, expert, EXPERTS) + row * K
            tl.store(dw + cols, (total * scale).to(dw.dtype.element_ty), mask=(cols < K) & flag(DW_MASK, expert))
    if SAVE_DOT:
        tl.store(DOT + identity * N + row, tl.sum(dot, 0))


# ---------------------------------------------------------------- host


class InputGrad(NamedTuple):
    """What `input_grad` returns; entries that were not asked for are None.

    `dx`, `dx_up`, `hidden`: `[T, N]`; `db`, `db_up`: column sums, fp32 `[row tiles, N]`, of `tile_rows` rows each.
    """

    dx: torch.Tensor
    dx_up: torch.Tensor | None
    hidden: torch.Tensor | None
    db: torch.Tensor | None
    db_up: torch.Tensor | None
    tile_rows: int


def input_config_for(
    dtype: torch.dtype, rows: int, activated: bool, gated: bool, capability: tuple[int, int] | None
) -> Config:
    """The forward's tiles with one accumulator.

    A gated epilogue keeps six values an element, so it takes quarters and more than 128 registers (a whole tile
    spills 1.7 KB). A plain activation takes quarters in fp32, where halves spill 8 bytes on sm_100, and on sm_90, where
    they spill 72 with Triton 3.9 (quarters 16; with 3.6 nothing does).
    """
    c = config_for(dtype, rows, False, capability)
    if gated:
        return c._replace(parts=4, maxnreg=None)
    quarters = activated and (dtype == torch.float32 or (capability is not None and capability[0] == 9))
    return c._replace(parts=4) if quarters else c


def input_problem(
    dtype: torch.dtype, rows: int, n: int, k: int, activated: bool, gated: bool
) -> tables.Problem:
    """The gradient of the input in the tables: sizes T, N, K of the product, in the order of `Config`."""
    kind = " gated" if gated else " activated" if activated else ""
    return tables.Problem("input grad" + kind, dtype, (rows, n, k))


def weight_problem(dtype: torch.dtype, rows: int, n: int, k: int, summed: bool) -> tables.Problem:
    """The gradient of a weight `[N, K]` in the tables; `summed`: LayerScale needs it before it is rounded."""
    return tables.Problem("weight grad summed" if summed else "weight grad", dtype, (rows, n, k))


def input_grad(
    dy: torch.Tensor,
    weights: list[torch.Tensor],
    route: Route,
    *,
    dy_up: torch.Tensor | None = None,
    up_weights: list[torch.Tensor] | None = None,
    row_scale: torch.Tensor | None = None,
    activation: str = "none",
    pre: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    save_hidden: bool = False,
    save_db: bool = False,
    zero_tail: bool = False,
) -> InputGrad:
    """`row_scale * (dy @ w [+ dy_up @ w_up])`, through the derivative of `activation(pre) [* up]` where there is one.

    Args:
        dy, dy_up: `[T, K]`; weights, up_weights: one `[K, N]` per expert; pre, up: `[T, N]` contiguous.
        save_hidden: also return `row_scale * activation(pre) [* up]`.
        save_db: also return column sums, for `bias_grad.reduce`.
        zero_tail: clear the dead rows of dx; otherwise they are unspecified.
    """
    rows, k = dy.shape
    n = weights[0].shape[1]
    dy = row_major(dy)
    dy_up = None if dy_up is None else row_major(dy_up)
    activated, gated = pre is not None, up is not None
    choice = tables.find(input_problem(dy.dtype, rows, n, k, activated, gated), dy.device) if rows else None
    if choice is not None and choice.config == tables.CUBLAS:
        from . import cublas  # it is made of this module's device code

        if cublas.usable(route, dy.device):
            return cublas.input_grad(
                dy, weights, route, dy_up, up_weights, row_scale, activation, pre, up, save_hidden, save_db, zero_tail
            )
        choice = None
    c = Config(*choice.config) if choice else input_config_for(dy.dtype, rows, activated, gated, capability(dy.device))
    experts = [e for _, _, e in route.segments]
    w, _ = pointers_of(weights, experts)
    wu, _ = pointers_of(up_weights, experts)
    operand, operand_up, boxes = dy, dy_up, [None] * (2 * MOST_SEGMENTS)
    if c.tma:
        found = describe([dy, dy_up], [w, wu], (c.bm, c.bk), (c.bk, c.bn))
        if found is None:
            c = input_config_for(dy.dtype, rows, activated, gated, capability(dy.device))
        else:
            (operand, operand_up), boxes = found
            w = wu = None
    row_tiles = row_tile_bound(rows, len(experts), c.bm)

    def partials(wanted: bool) -> torch.Tensor | None:
        return dy.new_empty(row_tiles, n, dtype=torch.float32) if wanted else None

    out = InputGrad(
        dx=dy.new_empty(rows, n),
        dx_up=dy.new_empty(rows, n) if up is not None else None,
        hidden=dy.new_empty(rows, n) if save_hidden else None,
        db=partials(save_db),
        db_up=partials(save_db and up is not None),
        tile_rows=c.bm,
    )
    if rows == 0 or n == 0:
        return out
    with on_device(dy):
        input_grad_kernel[persistent_grid(row_tiles * triton.cdiv(n, c.bn), dy.device)](
            operand, w, operand_up, wu, None if row_scale is None else row_scale.contiguous(), pre, up,
            out.dx, out.dx_up, out.hidden, out.db, out.db_up,
            route.offsets, rows, dy.stride(0), 0 if dy_up is None else dy_up.stride(0), *boxes,
            N=n, K=k, GROUPS=group_bounds(route.segments), SEGMENTS=len(experts),
            GROUPS_TOTAL=route.offsets.shape[0] - 1, ACTIVATION=activation, IS_GATED=up is not None,
            HAS_SECOND=dy_up is not None, HAS_ROW_SCALE=row_scale is not None,
            SAVE_H=save_hidden, SAVE_DB=save_db, ZERO_TAIL=zero_tail,
            EXACT=dy.dtype == torch.float32, PRECISION=precision_of(dy.dtype),
            BM=c.bm, BN=c.bn, BK=c.bk, PARTS=c.parts, TMA=c.tma,
            num_warps=c.warps, num_stages=c.stages, maxnreg=c.maxnreg,
        )  # fmt: skip
    return out


def weight_config_for(dtype: torch.dtype, aligned: bool, capability: tuple[int, int] | None) -> Config:
    """Tiles of the weight gradient: BM of N, BN of K, BK rows a step. `aligned`: rows start at 16 bytes."""
    if capability is None:
        return Config(32, 32, 32, 4, 2)
    if not aligned:  # tiles travel through registers, and 128x128 spills 116 bytes
        return Config(64, 64, 32, 4, 2)
    if dtype == torch.float32:
        return Config(64, 64, 32, 4, 3)
    return Config(128, 128, 64, 8, 3)


def splits_for(rows: int, tiles: int, step: int, processors: int) -> int:
    """Parts to cut a segment's rows into: enough tiles for two blocks an SM, but at least 8 steps a part.

    Every part costs 8 bytes of traffic per weight (fp32 written and read), so there are at most 8.
    """
    return max(1, min(8, triton.cdiv(2 * processors, tiles), rows // (8 * step)))


def weight_grad(
    dy: torch.Tensor,
    x: torch.Tensor,
    weights: list[torch.Tensor],
    route: Route,
    need: list[bool],
    *,
    gamma: list[torch.Tensor | None] | None = None,
    need_dot: list[bool] | None = None,
) -> tuple[list[torch.Tensor | None], torch.Tensor | None]:
    """`dw[e] = gamma[e] * U` with `U = dy[rows].T @ x[rows]`, and `dot[e] = sum_k weights[e] * U`.

    Args:
        dy: `[T, N]`; x: `[T, K]`, of one dtype; weights: one `[N, K]` per expert; gamma: one `[N]` or None each.
        need: experts whose dw is wanted; need_dot: experts whose `dot` is wanted. The rest are skipped.

    Returns:
        dw: one `[N, K]` or None per expert. dot: fp32 `[experts, N]`, zero for experts without rows, or None.
    """
    n, k = weights[0].shape
    need_dot = need_dot or [False] * len(need)
    any_dot = any(need_dot)
    dw = [w.new_empty(n, k) if want else None for w, want in zip(weights, need, strict=True)]
    dot = dy.new_zeros(len(need), n, dtype=torch.float32) if any_dot else None
    routed = {e for _, _, e in route.segments} if dy.shape[0] else set()
    for e, out in enumerate(dw):
        if out is not None and e not in routed:
            out.zero_()
    experts = sorted(e for e in routed if need[e] or need_dot[e])
    if not experts or n == 0 or k == 0:
        return dw, dot
    # Parts of one expert lie side by side, in row order: the reduction adds them in this order.
    segments = tuple(s for e in experts for s in route.segments if s[2] == e)
    dy, x = row_major(dy), row_major(x)
    aligned = all(t.stride(0) * t.element_size() % 16 == 0 for t in (dy, x))
    has_gamma = gamma is not None and any(gamma[e] is not None for e in experts)
    summed = has_gamma or any_dot
    choice = tables.find(weight_problem(dy.dtype, dy.shape[0], n, k, summed), dy.device) if aligned else None
    if choice is not None and choice.config == tables.CUBLAS:
        from . import cublas  # it is made of this module's device code

        if cublas.usable(route, dy.device) and not summed:
            cublas.weight_grad(dy, x, route, dw)
            return dw, dot
        choice = None
    c = Config(*choice.config) if choice else weight_config_for(dy.dtype, aligned, capability(dy.device))
    tiles = triton.cdiv(n, c.bm) * triton.cdiv(k, c.bn)
    splits = splits_for(dy.shape[0], tiles, c.bk, processors(dy.device))
    to_partial = splits > 1 or summed or len(segments) > len(experts)
    partial = dy.new_empty(len(segments) * splits, n, k, dtype=torch.float32) if to_partial else None
    outs, _ = pointers_of(dw, [e for _, _, e in segments])
    with on_device(dy):
        weight_grad_kernel[(tiles, len(segments) * splits)](
            dy, x, outs, partial, route.offsets, dy.stride(0), x.stride(0),
            N=n, K=k, GROUPS=group_bounds(segments), SEGMENTS=len(segments), SPLITS=splits, TO_PARTIAL=to_partial,
            PRECISION=precision_of(dy.dtype), BM=c.bm, BN=c.bn, BK=c.bk, num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
        if to_partial:
            counts = [sum(s[2] == e for s in segments) * splits for e in experts]
            w, _ = pointers_of(weights, experts)
            g, gamma_mask = pointers_of(gamma, experts)
            outs, dw_mask = pointers_of(dw, experts)
            reduce_weight_grad_kernel[(n, len(experts))](
                partial, w, g, outs, dot, N=n, K=k, IDS=tuple(experts),
                FIRST_PART=tuple(sum(counts[:i]) for i in range(len(experts) + 1)), EXPERTS=len(experts),
                GAMMA_MASK=gamma_mask, DW_MASK=dw_mask, SAVE_DOT=any_dot,
                BK=min(REDUCE_COLUMNS, triton.next_power_of_2(k)), num_warps=4,
            )  # fmt: skip
    return dw, dot
