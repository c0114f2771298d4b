"""The other route of a routed GEMM: torch's own product on each expert's rows, then one fused pointwise kernel.

Needs the lengths on the host, so it cannot serve a plan that was made on the device, nor a captured graph. It writes
and reads the product once more than the fused kernel, which a faster product may repay: measured tables decide
(tuning/tables.py), and without one it is never taken. Biases ride in the product (cuBLASLt adds them); the rest of
the epilogue is the very device code of the fused kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vlmo_kernels.runtime.audit_case import AuditCase
from vlmo_kernels.runtime.route import Route

from . import gemm as fused
from . import gemm_grad as fused_grad
from .gemm import count_row_tiles, group_bounds, locate_row_tile, on_device, pointers_of, row_tile_bound

TILE_ROWS, WARPS = 32, 4
# 32 values a thread, or 16: a gated layer keeps two of each (8 bytes spill on sm_120), its derivative six.
TILE_COLUMNS, NARROW_COLUMNS = 128, 64

Optional = torch.Tensor | None


@triton.jit
def _elements(first, end, column, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Offsets of a tile of a contiguous `[T, N]`, and which of them lie in the segment."""
    row, cols = tl.arange(0, BM), column + tl.arange(0, BN)
    inside = (row < end - first)[:, None] & (cols < N)[None, :]
    return first.to(tl.int64) * N + row[:, None] * N + cols[None, :], inside


@triton.jit
def pointwise_kernel(
    Z, U, GAMMA, ROW_SCALE, RESIDUAL, Y, OFFSETS, stride_residual,
    N: tl.constexpr, GROUPS: tl.constexpr, SEGMENTS: tl.constexpr, GAMMA_MASK: tl.constexpr,
    ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Y = residual + row_scale * gamma * act(Z) [* U]; Z, U and Y `[T, N]` contiguous."""
    row_tile = tl.program_id(0)
    if row_tile < count_row_tiles(OFFSETS, GROUPS, SEGMENTS, BM):
        segment, first, end = locate_row_tile(row_tile, OFFSETS, GROUPS, SEGMENTS, BM)
        column = tl.program_id(1) * BN
        at, inside = _elements(first, end, column, N, BM, BN)
        z = tl.load(Z + at, mask=inside, other=0.0).to(tl.float32)
        u = z
        if IS_GATED:
            u = tl.load(U + at, mask=inside, other=0.0).to(tl.float32)
        fused._store(
            z, u, first, end, segment, column, None, None, GAMMA, ROW_SCALE, RESIDUAL, Y, None, None,
            stride_residual, N, SEGMENTS, 0, 0, GAMMA_MASK, ACTIVATION, IS_GATED, False, HAS_ROW_SCALE,
            HAS_RESIDUAL, EXACT, BM, BN,
        )  # fmt: skip


@triton.jit
def pointwise_grad_kernel(
    ROW_SCALE, PRE, UP, DX, DX_UP, H, DB, DB_UP, OFFSETS,
    N: tl.constexpr, GROUPS: tl.constexpr, SEGMENTS: tl.constexpr, ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, SAVE_H: tl.constexpr, SAVE_DB: tl.constexpr,
    EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`input_grad_kernel` after its product, which DX `[T, N]` holds and which is replaced."""
    row_tile = tl.program_id(0)
    if row_tile < count_row_tiles(OFFSETS, GROUPS, SEGMENTS, BM):
        segment, first, end = locate_row_tile(row_tile, OFFSETS, GROUPS, SEGMENTS, BM)
        column = tl.program_id(1) * BN
        at, inside = _elements(first, end, column, N, BM, BN)
        acc = tl.load(DX + at, mask=inside, other=0.0).to(tl.float32)
        fused_grad._store(
            acc, row_tile, first, end, column, ROW_SCALE, PRE, UP, DX, DX_UP, H, DB, DB_UP, N, ACTIVATION,
            IS_GATED, HAS_ROW_SCALE, SAVE_H, SAVE_DB, EXACT, BM, BN,
        )  # fmt: skip


# ---------------------------------------------------------------- host


def usable(route: Route, device: torch.device) -> bool:
    """Whether the lengths are at hand: known on the host, and not about to change under a captured graph."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return route.host_offsets is not None and not capturing


def gemm(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[Optional],
    route: Route,
    activation: str,
    up_weights: list[torch.Tensor] | None,
    up_biases: list[Optional] | None,
    gamma: list[Optional] | None,
    row_scale: Optional,
    residual: Optional,
    save: bool,
) -> tuple[torch.Tensor, Optional, Optional]:
    """See `gemm.gemm`."""
    rows, n = x.shape[0], weights[0].shape[0]
    gated = up_weights is not None
    pre = _products(x, weights, biases, route)
    up = _products(x, up_weights, up_biases or [None] * len(weights), route) if gated else None
    experts = [e for _, _, e in route.segments]
    g, gamma_mask = pointers_of(gamma, experts)
    if activation == "none" and not gated and not gamma_mask and row_scale is None and residual is None:
        return pre, pre if save else None, None
    y = x.new_empty(rows, n, dtype=x.dtype if residual is None else residual.dtype)
    columns = NARROW_COLUMNS if gated else TILE_COLUMNS
    with on_device(x):
        pointwise_kernel[(row_tile_bound(rows, len(experts), TILE_ROWS), triton.cdiv(n, columns))](
            pre, up, g, None if row_scale is None else row_scale.contiguous(), residual, y, route.offsets,
            0 if residual is None else residual.stride(0),
            N=n, GROUPS=group_bounds(route.segments), SEGMENTS=len(experts), GAMMA_MASK=gamma_mask,
            ACTIVATION=activation, IS_GATED=gated, HAS_ROW_SCALE=row_scale is not None,
            HAS_RESIDUAL=residual is not None, EXACT=x.dtype == torch.float32, BM=TILE_ROWS, BN=columns,
            num_warps=WARPS,
        )  # fmt: skip
    return y, pre if save else None, up if save else None


def input_grad(
    dy: torch.Tensor,
    weights: list[torch.Tensor],
    route: Route,
    dy_up: Optional,
    up_weights: list[torch.Tensor] | None,
    row_scale: Optional,
    activation: str,
    pre: Optional,
    up: Optional,
    save_hidden: bool,
    save_db: bool,
    zero_tail: bool,
) -> fused_grad.InputGrad:
    """See `gemm_grad.input_grad`. The product is rounded before the derivative, as eager torch rounds it."""
    rows, n = dy.shape[0], weights[0].shape[1]
    dx = dy.new_empty(rows, n)
    for start, end, e in route.ranges():
        out = dx[start:end]
        torch.mm(dy[start:end], weights[e], out=out)
        if dy_up is not None:
            out.addmm_(dy_up[start:end], up_weights[e])
    if zero_tail:
        dx[route.live_rows() :].zero_()
    experts = len(route.segments)
    tiles = row_tile_bound(rows, experts, TILE_ROWS)
    dx_up = torch.empty_like(dx) if up is not None else None
    hidden = torch.empty_like(dx) if save_hidden else None
    db = dy.new_empty(tiles, n, dtype=torch.float32) if save_db else None
    db_up = dy.new_empty(tiles, n, dtype=torch.float32) if save_db and up is not None else None
    if pre is not None or row_scale is not None or save_db:
        with on_device(dy):
            pointwise_grad_kernel[(tiles, triton.cdiv(n, NARROW_COLUMNS))](
                None if row_scale is None else row_scale.contiguous(), pre, up, dx, dx_up, hidden, db, db_up,
                route.offsets,
                N=n, GROUPS=group_bounds(route.segments), SEGMENTS=experts, ACTIVATION=activation,
                IS_GATED=up is not None, HAS_ROW_SCALE=row_scale is not None, SAVE_H=save_hidden, SAVE_DB=save_db,
                EXACT=dy.dtype == torch.float32, BM=TILE_ROWS, BN=NARROW_COLUMNS, num_warps=WARPS,
            )  # fmt: skip
    return fused_grad.InputGrad(dx, dx_up, hidden, db, db_up, TILE_ROWS)


def weight_grad(dy: torch.Tensor, x: torch.Tensor, route: Route, outs: list[Optional]) -> None:
    """`outs[e] = dy[rows].T @ x[rows]` where it is wanted, an expert's row ranges in order."""
    begun: set[int] = set()
    for start, end, e in route.ranges():
        out = outs[e]
        if out is not None:
            left, right = dy[start:end].T, x[start:end]
            out.addmm_(left, right) if e in begun else torch.mm(left, right, out=out)
            begun.add(e)
    for e, out in enumerate(outs):
        if out is not None and e not in begun:
            out.zero_()


def _products(
    x: torch.Tensor, weights: list[torch.Tensor], biases: list[Optional], route: Route
) -> torch.Tensor:
    out = x.new_empty(x.shape[0], weights[0].shape[0])
    for start, end, e in route.ranges():
        if biases[e] is None:
            torch.mm(x[start:end], weights[e].T, out=out[start:end])
        else:
            torch.addmm(biases[e], x[start:end], weights[e].T, out=out[start:end])
    return out


def audit_cases() -> list[AuditCase]:
    """The widest epilogues, forward and backward, three experts."""
    cases = []
    for dtype in ("bf16", "fp32"):
        t, exact = f"*{dtype}", dtype == "fp32"
        route = dict(N=3072, GROUPS=(0, 2, 2, 3, 3, 4), SEGMENTS=3)
        for name, activation, gated in (("gelu", "gelu", False), ("swiglu", "silu", True)):
            kinds = dict(ACTIVATION=activation, IS_GATED=gated, HAS_ROW_SCALE=True, EXACT=exact)
            up = t if gated else None
            cases += [
                AuditCase(
                    pointwise_kernel, f"pointwise {name} {dtype}",
                    dict(Z=t, U=up, GAMMA=("*fp32",) * 3, ROW_SCALE="*fp32", RESIDUAL="*fp32", Y="*fp32",
                         OFFSETS="*i32", stride_residual="i32"),
                    route | kinds | dict(GAMMA_MASK=7, HAS_RESIDUAL=True, BM=TILE_ROWS,
                                         BN=NARROW_COLUMNS if gated else TILE_COLUMNS),
                    WARPS, 3, divisible=("stride_residual",),
                ),
                AuditCase(
                    pointwise_grad_kernel, f"pointwise grad {name} {dtype}",
                    dict(ROW_SCALE="*fp32", PRE=t, UP=up, DX=t, DX_UP=up, H=t, DB="*fp32",
                         DB_UP="*fp32" if gated else None, OFFSETS="*i32"),
                    route | kinds | dict(SAVE_H=True, SAVE_DB=True, BM=TILE_ROWS, BN=NARROW_COLUMNS),
                    WARPS, 3,
                ),
            ]  # fmt: skip
    return cases
