"""The routed GEMM: `y[t] = epilogue(x[t] @ w[e].T)` with `e` the expert of packed row `t`, in one launch.

Rows are grouped by expert, so a *segment* (neighbouring groups of one expert) is one dense GEMM on a row range
that starts at any row. One persistent launch walks the tiles of all segments. Row ranges are read on the device;
the grid comes from the capacity `T`, so nothing waits for the device and nothing recompiles from batch to batch.

Weights are separate Parameters. The kernel takes them as a tuple of pointers, one per segment, and selects with a
`where` chain: unlike a device table of addresses this keeps the 16-byte alignment that the compiler needs for
cp.async, and needs no copy to the device (which a captured graph could not make).
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vlmo_kernels.runtime.route import Route
from vlmo_kernels.tuning import tables

from .activations import activate
from .gemm_tma import MOST_SEGMENTS, accumulate_boxes, accumulate_gated_boxes, describe, pick


class Config(NamedTuple):
    """One launch configuration.

    Attributes:
        bm, bn, bk: rows and columns of a tile, and steps of the contraction.
        parts: the epilogue takes 1/parts of the columns at a time.
        maxnreg: register cap, or None.
        tma: operands come through tensor descriptors where they can; see gemm_tma.py.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    parts: int = 1
    maxnreg: int | None = None
    tma: bool = False


def config_for(dtype: torch.dtype, rows: int, gated: bool, capability: tuple[int, int] | None) -> Config:
    """Tiles of the forward GEMM. `rows` is a capacity; `capability` None: interpreter.

    16 bits: 128x128x64 with 8 warps. On sm_90, where two blocks of 96 KB fit an SM, registers are capped at 128, so
    that one tile's epilogue overlaps another's main loop; the epilogue in halves fits without a spill (a whole tile
    spills 928 bytes). On sm_100 the cap would spill up to 88 bytes. Gated layers hold two accumulators: one block an
    SM, the epilogue in quarters, and half the columns before sm_90, where 128 spill 288 bytes, and where shared
    memory ends at 99 KB (sm_120). Few rows: half the tile height, to fill the SMs.
    """
    if capability is None:
        return Config(32, 32, 32, 4, 2, parts=4 if gated else 2)  # several tiles along every side of a small test
    if dtype == torch.float32:
        return Config(64, 32 if gated else 64, 32, 4, 3, parts=2)
    roomy = capability[0] in (9, 10)
    bn = 64 if gated and not roomy else 128
    parts = 4 if gated else 2
    if rows <= 1024:
        return Config(64, bn, 64, 4, 3, parts)
    return Config(128, bn, 64, 8, 3, parts, maxnreg=128 if capability[0] == 9 and not gated else None)


# ---------------------------------------------------------------- device functions shared with gemm_grad.py


@triton.jit
def select(pointers, index, COUNT: tl.constexpr):
    """`pointers[index]` of a tuple of COUNT pointers, for a runtime `index`."""
    chosen = pointers[0]
    for i in tl.static_range(1, COUNT):
        chosen = tl.where(index == i, pointers[i], chosen)
    return chosen


@triton.jit
def flag(mask, index):
    """Whether bit `index` of `mask` is set."""
    return ((mask >> index) & 1) == 1


@triton.jit
def count_row_tiles(OFFSETS, GROUPS: tl.constexpr, SEGMENTS: tl.constexpr, BM: tl.constexpr):
    """Number of row tiles of all segments; GROUPS is (first group, end group) of each segment, flat."""
    count = 0
    for i in tl.static_range(SEGMENTS):
        rows = tl.load(OFFSETS + GROUPS[2 * i + 1]) - tl.load(OFFSETS + GROUPS[2 * i])
        count += tl.cdiv(rows, BM)
    return count


@triton.jit
def locate_row_tile(tile, OFFSETS, GROUPS: tl.constexpr, SEGMENTS: tl.constexpr, BM: tl.constexpr):
    """Segment of row tile `tile`, the tile's first row, and the segment's end row."""
    before = 0
    segment = 0
    first = 0
    end = 0
    for i in tl.static_range(SEGMENTS):
        segment_start = tl.load(OFFSETS + GROUPS[2 * i])
        segment_end = tl.load(OFFSETS + GROUPS[2 * i + 1])
        tiles = tl.cdiv(segment_end - segment_start, BM)
        hit = (tile >= before) & (tile < before + tiles)
        segment = tl.where(hit, i, segment)
        first = tl.where(hit, segment_start + (tile - before) * BM, first)
        end = tl.where(hit, segment_end, end)
        before += tiles
    return segment, first, end


@triton.jit
def swizzle(tile, row_tiles, COLUMN_TILES: tl.constexpr):
    """Row and column tile of `tile`: bands of 8 row tiles, so that a wave re-uses operand panels from L2."""
    band = tile // (8 * COLUMN_TILES)
    height = tl.minimum(row_tiles - band * 8, 8)
    inside = tile % (8 * COLUMN_TILES)
    return band * 8 + inside % height, inside // height


@triton.jit
def accumulate(
    acc, A, stride_a, W, rows, cols, N: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, W_IS_NK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`acc + A[rows] @ w`, with `w` `[K, N]` stored as W `[N, K]` (W_IS_NK) or `[K, N]`.

    `rows` must be readable rows; columns past N and the tail of K are masked. K is a constexpr: a loop that may run
    zero times makes ptxas serialise every wgmma (C7515).
    """
    k = tl.arange(0, BK)
    a = A + rows.to(tl.int64)[:, None] * stride_a + k[None, :]
    if W_IS_NK:
        w = W + cols.to(tl.int64)[:, None] * K + k[None, :]
    else:
        w = W + k.to(tl.int64)[:, None] * N + cols[None, :]
    for step in tl.range(0, (K + BK - 1) // BK):
        left = K - step * BK
        if K % BK == 0:
            a_tile = tl.load(a)
        else:
            a_tile = tl.load(a, mask=(k < left)[None, :], other=0.0)
        if W_IS_NK:
            if K % BK == 0:
                w_tile = tl.load(w, mask=(cols < N)[:, None], other=0.0)
            else:
                w_tile = tl.load(w, mask=(cols < N)[:, None] & (k < left)[None, :], other=0.0)
            acc = tl.dot(a_tile, w_tile.T, acc, input_precision=PRECISION)
            w += BK
        else:
            if K % BK == 0:
                w_tile = tl.load(w, mask=(cols < N)[None, :], other=0.0)
            else:
                w_tile = tl.load(w, mask=(cols < N)[None, :] & (k < left)[:, None], other=0.0)
            acc = tl.dot(a_tile, w_tile, acc, input_precision=PRECISION)
            w += BK * N
        a += BK
    return acc


@triton.jit
def _accumulate_gated(
    gate, up, A, stride_a, W, W_UP, rows, cols, N: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`accumulate` for two weights `[N, K]` that share every tile of A."""
    k = tl.arange(0, BK)
    a = A + rows.to(tl.int64)[:, None] * stride_a + k[None, :]
    at = cols.to(tl.int64)[:, None] * K + k[None, :]
    w_gate = W + at
    w_up = W_UP + at
    for step in tl.range(0, (K + BK - 1) // BK):
        if K % BK == 0:
            a_tile = tl.load(a)
            inside = (cols < N)[:, None]
        else:
            left = K - step * BK
            a_tile = tl.load(a, mask=(k < left)[None, :], other=0.0)
            inside = (cols < N)[:, None] & (k < left)[None, :]
        gate_tile = tl.load(w_gate, mask=inside, other=0.0)
        up_tile = tl.load(w_up, mask=inside, other=0.0)
        gate = tl.dot(a_tile, gate_tile.T, gate, input_precision=PRECISION)
        up = tl.dot(a_tile, up_tile.T, up, input_precision=PRECISION)
        a += BK
        w_gate += BK
        w_up += BK
    return gate, up


@triton.jit
def load_vector(pointers, segment, cols, N: tl.constexpr, COUNT: tl.constexpr, MASK: tl.constexpr, OTHER: tl.constexpr):
    """fp32 values of the segment's `[N]` vector at `cols`; OTHER where bit `segment` of MASK says it has none."""
    here = flag(MASK, segment) & (cols < N)
    return tl.load(select(pointers, segment, COUNT) + cols, mask=here, other=OTHER).to(tl.float32)


@triton.jit
def columns_in_parts(acc, BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr):
    """Tuple of the 2 or 4 equal runs of columns of `acc` `[BM, BN]`; no data moves."""
    left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
    if PARTS == 2:
        return left, right
    else:
        a, b = tl.split(tl.permute(tl.reshape(left, (BM, 2, BN // 4)), (0, 2, 1)))
        c, d = tl.split(tl.permute(tl.reshape(right, (BM, 2, BN // 4)), (0, 2, 1)))
        return a, b, c, d


# ---------------------------------------------------------------- the kernel


@triton.jit
def _store(
    acc, up, first, end, segment, column, BIAS, BIAS_UP, GAMMA, ROW_SCALE, RESIDUAL, Y, PRE, UP, stride_residual,
    N: tl.constexpr, SEGMENTS: tl.constexpr, BIAS_MASK: tl.constexpr, BIAS_UP_MASK: tl.constexpr,
    GAMMA_MASK: tl.constexpr, ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr, SAVE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """The epilogue of `gemm_kernel` for rows `first` to `end` and BN columns from `column`."""
    row = tl.arange(0, BM)
    cols = column + tl.arange(0, BN)
    inside = (row < end - first)[:, None] & (cols < N)[None, :]
    base = first.to(tl.int64) * N  # 64 bits once a tile; inside one, offsets fit in 32
    at = row[:, None] * N + cols[None, :]
    if BIAS_MASK:
        acc += load_vector(BIAS, segment, cols, N, SEGMENTS, BIAS_MASK, 0.0)[None, :]
    if SAVE:
        tl.store(PRE + base + at, acc.to(PRE.dtype.element_ty), mask=inside)
    acc = activate(acc, ACTIVATION, EXACT)
    if IS_GATED:
        if BIAS_UP_MASK:
            up += load_vector(BIAS_UP, segment, cols, N, SEGMENTS, BIAS_UP_MASK, 0.0)[None, :]
        if SAVE:
            tl.store(UP + base + at, up.to(UP.dtype.element_ty), mask=inside)
        acc *= up
    if GAMMA_MASK:
        acc *= load_vector(GAMMA, segment, cols, N, SEGMENTS, GAMMA_MASK, 1.0)[None, :]
    if HAS_ROW_SCALE:
        acc *= tl.load(ROW_SCALE + first + row, mask=row < end - first, other=0.0)[:, None]
    if HAS_RESIDUAL:
        residual = RESIDUAL + first.to(tl.int64) * stride_residual
        residual += row[:, None] * stride_residual + cols[None, :]
        acc += tl.load(residual, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + base + at, acc.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def gemm_kernel(
    X, W, BIAS, W_UP, BIAS_UP, GAMMA, ROW_SCALE, RESIDUAL, Y, PRE, UP, OFFSETS, stride_x, stride_residual,
    W0, W1, W2, W3, U0, U1, U2, U3,
    N: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, SEGMENTS: tl.constexpr,
    BIAS_MASK: tl.constexpr, BIAS_UP_MASK: tl.constexpr, GAMMA_MASK: tl.constexpr,
    ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr, SAVE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PARTS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """X `[T, K]` rows `stride_x` apart; W, W_UP tuples of `[N, K]`; Y, PRE, UP `[T, N]` contiguous.

    TMA: X is a descriptor, and those of the weights are W0 to W3 and U0 to U3, by segment; W and W_UP are None.
    z = x w' + bias; u = x w_up' + bias_up; y = residual + row_scale * gamma * act(z) [* u]. SAVE stores z and u.
    """
    COLUMN_TILES: tl.constexpr = (N + BN - 1) // BN
    row_tiles = count_row_tiles(OFFSETS, GROUPS, SEGMENTS, BM)
    for tile in tl.range(tl.program_id(0), row_tiles * COLUMN_TILES, tl.num_programs(0)):
        row_tile, column_tile = swizzle(tile, row_tiles, COLUMN_TILES)
        segment, first, end = locate_row_tile(row_tile, OFFSETS, GROUPS, SEGMENTS, BM)
        rows = first + tl.arange(0, BM)
        cols = column_tile * BN + tl.arange(0, BN)
        # Past the segment's end re-read its last row: always readable, never stored, and no mask in the main loop.
        readable = tl.minimum(rows, end - 1)
        acc = tl.zeros((BM, BN), tl.float32)
        up = acc
        if IS_GATED:
            up = tl.zeros((BM, BN), tl.float32)
        if TMA:
            w = pick(W0, W1, W2, W3, segment, SEGMENTS)
            if IS_GATED:
                w_up = pick(U0, U1, U2, U3, segment, SEGMENTS)
                acc, up = accumulate_gated_boxes(acc, up, X, w, w_up, first, column_tile * BN, K, BK, PRECISION)
            else:
                acc = accumulate_boxes(acc, X, w, first, column_tile * BN, K, BK, True, PRECISION)
        else:
            w = select(W, segment, SEGMENTS)
            if IS_GATED:
                w_up = select(W_UP, segment, SEGMENTS)
                acc, up = _accumulate_gated(acc, up, X, stride_x, w, w_up, readable, cols, N, K, BK, PRECISION)
            else:
                acc = accumulate(acc, X, stride_x, w, readable, cols, N, K, BK, True, PRECISION)

        # A part of the columns at a time: the epilogue's operands for a whole tile do not fit in registers.
        if PARTS == 1:
            _store(
                acc, up, first, end, segment, column_tile * BN, BIAS, BIAS_UP, GAMMA, ROW_SCALE, RESIDUAL, Y, PRE,
                UP, stride_residual, N, SEGMENTS, BIAS_MASK, BIAS_UP_MASK, GAMMA_MASK, ACTIVATION, IS_GATED, SAVE,
                HAS_ROW_SCALE, HAS_RESIDUAL, EXACT, BM, BN,
            )  # fmt: skip
        else:
            parts = columns_in_parts(acc, BM, BN, PARTS)
            up_parts = parts
            if IS_GATED:
                up_parts = columns_in_parts(up, BM, BN, PARTS)
            for i in tl.static_range(PARTS):
                _store(
                    parts[i], up_parts[i], first, end, segment, column_tile * BN + i * (BN // PARTS), BIAS, BIAS_UP,
                    GAMMA, ROW_SCALE, RESIDUAL, Y, PRE, UP, stride_residual, N, SEGMENTS, BIAS_MASK, BIAS_UP_MASK,
                    GAMMA_MASK, ACTIVATION, IS_GATED, SAVE, HAS_ROW_SCALE, HAS_RESIDUAL, EXACT, BM, BN // PARTS,
                )  # fmt: skip


# ---------------------------------------------------------------- host


def row_major(t: torch.Tensor) -> torch.Tensor:
    """`t` itself where its last dimension is contiguous (rows may be any stride apart), else a copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def precision_of(dtype: torch.dtype) -> str:
    """fp32 products follow torch's setting; 16-bit products have one way only."""
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "ieee"


@functools.lru_cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(device: torch.device) -> int:
    """Streaming multiprocessors; 4 in the interpreter, so that a program owns several tiles."""
    return 4 if device.type == "cpu" else _processors(device.index)


def capability(device: torch.device) -> tuple[int, int] | None:
    return None if device.type == "cpu" else torch.cuda.get_device_capability(device)


def on_device(t: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return contextlib.nullcontext() if t.device.type == "cpu" else torch.cuda.device(t.device)


def group_bounds(segments: tuple[tuple[int, int, int], ...]) -> tuple[int, ...]:
    return tuple(bound for first, end, _ in segments for bound in (first, end))


def pointers_of(
    values: list[torch.Tensor | None] | None, experts: list[int]
) -> tuple[tuple[torch.Tensor, ...] | None, int]:
    """One tensor for each of `experts`, and the bits of those that exist; absent ones borrow a pointer unread.

    (None, 0) where no expert has one.
    """
    present = [values[e] for e in experts if values[e] is not None] if values else []
    if not present:
        return None, 0
    spare = present[0].contiguous()
    chosen = tuple(spare if values[e] is None else values[e].contiguous() for e in experts)
    return chosen, sum(1 << i for i, e in enumerate(experts) if values[e] is not None)


def row_tile_bound(rows: int, segments: int, bm: int) -> int:
    """At most this many row tiles: every segment may end in a ragged one."""
    return triton.cdiv(rows, bm) + segments


def persistent_grid(tiles: int, device: torch.device) -> tuple[int]:
    """Two blocks an SM; where only one fits, the second half starts as the first half ends."""
    return (min(tiles, 2 * processors(device)),)


def problem(dtype: torch.dtype, rows: int, n: int, k: int, gated: bool) -> tables.Problem:
    """The forward GEMM in the tables: sizes T, N, K, configurations in the order of `Config`."""
    return tables.Problem("gemm gated" if gated else "gemm", dtype, (rows, n, k))


def gemm(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    route: Route,
    *,
    activation: str = "none",
    up_weights: list[torch.Tensor] | None = None,
    up_biases: list[torch.Tensor | None] | None = None,
    gamma: list[torch.Tensor | None] | None = None,
    row_scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    save: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`residual + row_scale * gamma * act(x w' + b) [* (x w_up' + b_up)]`, and with `save` the two inner sums.

    Args:
        x: `[T, K]`; weights, up_weights: one `[N, K]` per expert; biases, gamma: one `[N]` or None per expert.
        row_scale: fp32 `[T]`; residual: `[T, N]`, any floating dtype.
        activation: a plain one, applied to the first product; "none" is the identity.

    Returns:
        y `[T, N]` in the dtype of the residual, else of `x`; pre and up `[T, N]` in the dtype of `x` or None.
        Dead rows are unspecified.
    """
    rows, k = x.shape
    n = weights[0].shape[0]
    gated = up_weights is not None
    out_dtype = x.dtype if residual is None else residual.dtype
    if rows == 0 or n == 0:
        inner = x.new_empty(rows, n) if save else None
        return x.new_empty(rows, n, dtype=out_dtype), inner, inner if gated else None
    x = row_major(x)
    residual = None if residual is None else row_major(residual)
    choice = tables.find(problem(x.dtype, rows, n, k, gated), x.device)
    if choice is not None and choice.config == tables.CUBLAS:
        from . import cublas  # it is made of this module's device code

        if cublas.usable(route, x.device):
            return cublas.gemm(
                x, weights, biases, route, activation, up_weights, up_biases, gamma, row_scale, residual, save
            )
        choice = None
    y = x.new_empty(rows, n, dtype=out_dtype)
    pre = x.new_empty(rows, n) if save else None
    up = x.new_empty(rows, n) if save and gated else None
    experts = [e for _, _, e in route.segments]
    w, _ = pointers_of(weights, experts)
    b, bias_mask = pointers_of(biases, experts)
    wu, _ = pointers_of(up_weights, experts)
    bu, bias_up_mask = pointers_of(up_biases, experts)
    g, gamma_mask = pointers_of(gamma, experts)
    c = Config(*choice.config) if choice else config_for(x.dtype, rows, gated, capability(x.device))
    operand, boxes = x, [None] * (2 * MOST_SEGMENTS)
    if c.tma:
        found = describe([x], [w, wu], (c.bm, c.bk), (c.bn, c.bk))
        if found is None:
            c = config_for(x.dtype, rows, gated, capability(x.device))
        else:
            (operand,), boxes = found
            w = wu = None
    tiles = row_tile_bound(rows, len(experts), c.bm) * triton.cdiv(n, c.bn)
    with on_device(x):
        gemm_kernel[persistent_grid(tiles, x.device)](
            operand, w, b, wu, bu, g, None if row_scale is None else row_scale.contiguous(), residual,
            y, pre, up, route.offsets,
            x.stride(0), 0 if residual is None else residual.stride(0), *boxes,
            N=n, K=k, GROUPS=group_bounds(route.segments), SEGMENTS=len(experts),
            BIAS_MASK=bias_mask, BIAS_UP_MASK=bias_up_mask, GAMMA_MASK=gamma_mask,
            ACTIVATION=activation, IS_GATED=gated, SAVE=save,
            HAS_ROW_SCALE=row_scale is not None, HAS_RESIDUAL=residual is not None,
            EXACT=x.dtype == torch.float32, PRECISION=precision_of(x.dtype),
            BM=c.bm, BN=c.bn, BK=c.bk, PARTS=c.parts, TMA=c.tma,
            num_warps=c.warps, num_stages=c.stages, maxnreg=c.maxnreg,
        )  # fmt: skip
    return y, pre, up
