"""The inner LayerNorm of a feed-forward network (sub-LN, Wang et al. 2022), forward and backward.

Row kernels between the two GEMMs: one program per row, columns in blocks, so that any hidden width fits. Backward
takes in the activation's derivative, computing the hidden values again from the pre-activation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vlmo_kernels.runtime.route import Route

from . import bias_grad
from .activations import activate, activate_with_derivative
from .gemm import (
    count_row_tiles,
    flag,
    group_bounds,
    load_vector,
    locate_row_tile,
    on_device,
    pointers_of,
    row_tile_bound,
)

BLOCK = 1024  # columns a step


@triton.jit
def _segment_of(row, OFFSETS, GROUPS: tl.constexpr, SEGMENTS: tl.constexpr):
    segment = 0
    for i in tl.static_range(SEGMENTS):
        segment = tl.where(row >= tl.load(OFFSETS + GROUPS[2 * i]), i, segment)
    return segment


@triton.jit
def inner_norm_kernel(
    H, WEIGHT, BIAS, OUT, OFFSETS, eps, N: tl.constexpr, GROUPS: tl.constexpr, SEGMENTS: tl.constexpr,
    GROUPS_TOTAL: tl.constexpr, WEIGHT_MASK: tl.constexpr, BIAS_MASK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """OUT[row] = LayerNorm(H[row]) with the weight and bias of the row's expert; `[T, N]` contiguous.

    Experts without a norm weight keep H.
    """
    row = tl.program_id(0)
    if row < tl.load(OFFSETS + GROUPS_TOTAL):
        segment = _segment_of(row, OFFSETS, GROUPS, SEGMENTS)
        h = H + row.to(tl.int64) * N
        out = OUT + row.to(tl.int64) * N
        total = tl.zeros((BN,), tl.float32)
        for column in tl.range(0, N, BN):
            cols = column + tl.arange(0, BN)
            total += tl.load(h + cols, mask=cols < N, other=0.0).to(tl.float32)
        mean = tl.sum(total, 0) / N
        total = tl.zeros((BN,), tl.float32)
        for column in tl.range(0, N, BN):
            cols = column + tl.arange(0, BN)
            centred = tl.load(h + cols, mask=cols < N, other=0.0).to(tl.float32) - mean
            total += tl.where(cols < N, centred * centred, 0.0)
        rstd = tl.math.rsqrt(tl.sum(total, 0) / N + eps)
        normed = flag(WEIGHT_MASK, segment)
        mean = tl.where(normed, mean, 0.0)
        rstd = tl.where(normed, rstd, 1.0)
        for column in tl.range(0, N, BN):
            cols = column + tl.arange(0, BN)
            value = (tl.load(h + cols, mask=cols < N, other=0.0).to(tl.float32) - mean) * rstd
            value *= load_vector(WEIGHT, segment, cols, N, SEGMENTS, WEIGHT_MASK, 1.0)
            if BIAS_MASK:
                value += load_vector(BIAS, segment, cols, N, SEGMENTS, BIAS_MASK, 0.0)
            tl.store(out + cols, value.to(OUT.dtype.element_ty), mask=cols < N)


@triton.jit
def _hidden(pre, up, cols, N: tl.constexpr, ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr, EXACT: tl.constexpr):
    value = activate(tl.load(pre + cols, mask=cols < N, other=0.0).to(tl.float32), ACTIVATION, EXACT)
    if IS_GATED:
        value *= tl.load(up + cols, mask=cols < N, other=0.0).to(tl.float32)
    return tl.where(cols < N, value, 0.0)


@triton.jit
def inner_norm_grad_kernel(
    DOUT, PRE, UP, WEIGHT, BIAS, ROW_SCALE, DPRE, DUP, OUT, MEAN, RSTD, OFFSETS, eps, N: tl.constexpr,
    GROUPS: tl.constexpr, SEGMENTS: tl.constexpr, GROUPS_TOTAL: tl.constexpr, WEIGHT_MASK: tl.constexpr,
    BIAS_MASK: tl.constexpr, ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr, HAS_ROW_SCALE: tl.constexpr,
    EXACT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """From DOUT, the gradient of n = LayerNorm(h), h = act(PRE) [* UP]: DPRE, DUP, and OUT = row_scale * n.

    Everything `[T, N]` contiguous; MEAN, RSTD fp32 `[T]` are written for the gradients of the norm's weights.
    """
    row = tl.program_id(0)
    if row < tl.load(OFFSETS + GROUPS_TOTAL):
        segment = _segment_of(row, OFFSETS, GROUPS, SEGMENTS)
        base = row.to(tl.int64) * N
        pre = PRE + base
        up = pre
        if IS_GATED:
            up = UP + base
        total = tl.zeros((BN,), tl.float32)
        for column in tl.range(0, N, BN):
            total += _hidden(pre, up, column + tl.arange(0, BN), N, ACTIVATION, IS_GATED, EXACT)
        mean = tl.sum(total, 0) / N
        total = tl.zeros((BN,), tl.float32)
        for column in tl.range(0, N, BN):
            cols = column + tl.arange(0, BN)
            centred = tl.where(cols < N, _hidden(pre, up, cols, N, ACTIVATION, IS_GATED, EXACT) - mean, 0.0)
            total += centred * centred
        rstd = tl.math.rsqrt(tl.sum(total, 0) / N + eps)
        normed = flag(WEIGHT_MASK, segment)
        mean = tl.where(normed, mean, 0.0)
        rstd = tl.where(normed, rstd, 1.0)
        tl.store(MEAN + row, mean)
        tl.store(RSTD + row, rstd)

        sum_g = tl.zeros((BN,), tl.float32)
        sum_gn = tl.zeros((BN,), tl.float32)
        for column in tl.range(0, N, BN):
            cols = column + tl.arange(0, BN)
            n = (_hidden(pre, up, cols, N, ACTIVATION, IS_GATED, EXACT) - mean) * rstd
            g = tl.load(DOUT + base + cols, mask=cols < N, other=0.0).to(tl.float32)
            g *= load_vector(WEIGHT, segment, cols, N, SEGMENTS, WEIGHT_MASK, 1.0)
            sum_g += g
            sum_gn += g * n
        mean_g = tl.where(normed, tl.sum(sum_g, 0) / N, 0.0)
        mean_gn = tl.where(normed, tl.sum(sum_gn, 0) / N, 0.0)

        scale = 1.0
        if HAS_ROW_SCALE:
            scale = tl.load(ROW_SCALE + row)
        for column in tl.range(0, N, BN):
            cols = column + tl.arange(0, BN)
            inside = cols < N
            z = tl.load(pre + cols, mask=inside, other=0.0).to(tl.float32)
            value, slope = activate_with_derivative(z, ACTIVATION, EXACT)
            h = value
            if IS_GATED:
                u = tl.load(up + cols, mask=inside, other=0.0).to(tl.float32)
                h *= u
            n = (h - mean) * rstd
            weight = load_vector(WEIGHT, segment, cols, N, SEGMENTS, WEIGHT_MASK, 1.0)
            g = tl.load(DOUT + base + cols, mask=inside, other=0.0).to(tl.float32) * weight
            dh = rstd * (g - mean_g - n * mean_gn)
            if IS_GATED:
                tl.store(DUP + base + cols, (dh * value).to(DUP.dtype.element_ty), mask=inside)
                dh *= u
            tl.store(DPRE + base + cols, (dh * slope).to(DPRE.dtype.element_ty), mask=inside)
            n *= weight
            if BIAS_MASK:
                n += load_vector(BIAS, segment, cols, N, SEGMENTS, BIAS_MASK, 0.0)
            tl.store(OUT + base + cols, (n * scale).to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def inner_norm_sums_kernel(
    DOUT, PRE, UP, MEAN, RSTD, DWEIGHT, DBIAS, OFFSETS, N: tl.constexpr, GROUPS: tl.constexpr,
    SEGMENTS: tl.constexpr, ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr, EXACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Column sums of DOUT * n (DWEIGHT) and of DOUT (DBIAS) for each row tile: fp32 `[row tiles, N]`."""
    row_tile = tl.program_id(0)
    if row_tile < count_row_tiles(OFFSETS, GROUPS, SEGMENTS, BM):
        segment, first, end = locate_row_tile(row_tile, OFFSETS, GROUPS, SEGMENTS, BM)
        rows = first + tl.arange(0, BM)
        cols = tl.program_id(1) * BN + tl.arange(0, BN)
        inside = (rows < end)[:, None] & (cols < N)[None, :]
        at = rows.to(tl.int64)[:, None] * N + cols[None, :]
        h = activate(tl.load(PRE + at, mask=inside, other=0.0).to(tl.float32), ACTIVATION, EXACT)
        if IS_GATED:
            h *= tl.load(UP + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(MEAN + rows, mask=rows < end, other=0.0)[:, None]
        rstd = tl.load(RSTD + rows, mask=rows < end, other=0.0)[:, None]
        g = tl.load(DOUT + at, mask=inside, other=0.0).to(tl.float32)
        out = row_tile.to(tl.int64) * N + cols
        tl.store(DWEIGHT + out, tl.sum(g * (h - mean) * rstd, 0), mask=cols < N)
        tl.store(DBIAS + out, tl.sum(g, 0), mask=cols < N)


class InnerNormGrad(NamedTuple):
    """`dpre`, `dup` (gated), `out` = row_scale * norm(h): `[T, F]`; gradients of the norm's weight and bias."""

    dpre: torch.Tensor
    dup: torch.Tensor | None
    out: torch.Tensor
    dweight: list[torch.Tensor | None]
    dbias: list[torch.Tensor | None]


def forward(h: torch.Tensor, weights: list, biases: list, route: Route, eps: float) -> torch.Tensor:
    """LayerNorm of `h` `[T, F]` by the row's expert; rows of experts without a weight pass unchanged."""
    rows, n = h.shape
    out = h.new_empty(rows, n)
    if rows and n:
        experts = [e for _, _, e in route.segments]
        w, weight_mask = pointers_of(weights, experts)
        b, bias_mask = pointers_of(biases, experts)
        if w is None:
            return h
        with on_device(h):
            inner_norm_kernel[(rows,)](
                h, w, b, out, route.offsets, eps, N=n, GROUPS=group_bounds(route.segments), SEGMENTS=len(experts),
                GROUPS_TOTAL=route.offsets.shape[0] - 1, WEIGHT_MASK=weight_mask, BIAS_MASK=bias_mask,
                BN=min(BLOCK, triton.next_power_of_2(n)), num_warps=4,
            )  # fmt: skip
    return out


def backward(
    dout: torch.Tensor,
    pre: torch.Tensor,
    up: torch.Tensor | None,
    weights: list[torch.Tensor | None],
    biases: list[torch.Tensor | None],
    route: Route,
    activation: str,
    row_scale: torch.Tensor | None,
    eps: float,
    need_dweight: list[bool],
    need_dbias: list[bool],
) -> InnerNormGrad:
    """Through the norm and the activation. `dout`, `pre`, `up`: `[T, F]` contiguous; activation: the plain one."""
    rows, f = dout.shape
    dpre, out = dout.new_empty(rows, f), dout.new_empty(rows, f)
    dup = None if up is None else dout.new_empty(rows, f)
    experts = [e for _, _, e in route.segments]
    tiles = row_tile_bound(rows, len(experts), bias_grad.TILE_ROWS)
    dweight = dout.new_empty(tiles, f, dtype=torch.float32)
    dbias = dout.new_empty(tiles, f, dtype=torch.float32)
    w, weight_mask = pointers_of(weights, experts)
    b, bias_mask = pointers_of(biases, experts)
    need_dweight = [want and t is not None for want, t in zip(need_dweight, weights, strict=True)]
    need_dbias = [want and t is not None for want, t in zip(need_dbias, biases, strict=True)]
    if rows and f:
        mean, rstd = dout.new_empty(2, rows, dtype=torch.float32)
        shared = dict(
            N=f, GROUPS=group_bounds(route.segments), SEGMENTS=len(experts), ACTIVATION=activation,
            IS_GATED=up is not None, EXACT=dout.dtype == torch.float32, num_warps=4,
        )  # fmt: skip
        with on_device(dout):
            inner_norm_grad_kernel[(rows,)](
                dout, pre, up, w, b, None if row_scale is None else row_scale.contiguous(), dpre, dup, out, mean, rstd,
                route.offsets, eps, GROUPS_TOTAL=route.offsets.shape[0] - 1, WEIGHT_MASK=weight_mask,
                BIAS_MASK=bias_mask, HAS_ROW_SCALE=row_scale is not None,
                BN=min(BLOCK, triton.next_power_of_2(f)), **shared,
            )  # fmt: skip
            if any(need_dweight) or any(need_dbias):
                inner_norm_sums_kernel[(tiles, triton.cdiv(f, bias_grad.TILE_COLUMNS))](
                    dout, pre, up, mean, rstd, dweight, dbias, route.offsets,
                    BM=bias_grad.TILE_ROWS, BN=bias_grad.TILE_COLUMNS, **shared,
                )  # fmt: skip
    sums = (bias_grad.TILE_ROWS, rows)
    return InnerNormGrad(
        dpre, dup, out,
        bias_grad.reduce(dweight, *sums, weights, route, need_dweight)[0],
        bias_grad.reduce(dbias, *sums, biases, route, need_dbias)[0],
    )  # fmt: skip
