"""CPU `routed_linear`: one oneDNN GEMM per expert range."""

from __future__ import annotations

import torch

from vlmo_kernels.runtime import compiled
from vlmo_kernels.runtime.route import Route

from .gemm import add_dense, dense, why_not

__all__ = ["backward", "forward", "why_not"]
Optional = torch.Tensor | None


def forward(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[Optional],
    gammas: list[Optional],
    route: Route,
    residual: Optional,
    row_scale: Optional,
) -> torch.Tensor:
    """See `vlmo_kernels.reference.routed_linear.forward`."""
    ranges = route.ranges()
    plain = gammas[0] is None and residual is None and row_scale is None
    if plain and len(weights) == 1 and ranges == [(0, x.shape[0], 0)]:
        return dense(x, weights[0], biases[0])  # one range and no epilogue: nothing to assemble
    dtype = x.dtype if residual is None else residual.dtype
    y = x.new_empty(x.shape[0], weights[0].shape[0], dtype=dtype)
    for start, end, e in ranges:
        rows = slice(start, end)
        project_into(
            y[rows],
            x[rows],
            weights[e],
            biases[e],
            gammas[e],
            None if residual is None else residual[rows],
            None if row_scale is None else row_scale[rows],
        )
    return y


def project_into(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional,
    gamma: Optional,
    residual: Optional,
    row_scale: Optional,
) -> None:
    """`out = residual + row_scale * gamma * (x @ weight.T + bias)` for the rows of one expert."""
    if gamma is None and row_scale is None:
        if residual is not None and residual.dtype == x.dtype:
            out.copy_(add_dense(residual, x, weight, bias))
        elif residual is not None:
            torch.add(residual, dense(x, weight, bias), out=out)
        else:
            out.copy_(dense(x, weight, bias))
        return
    y = dense(x, weight, bias)
    scale = gamma
    if row_scale is not None:
        scale = row_scale[:, None] if gamma is None else row_scale[:, None] * gamma
    if residual is None:
        out.copy_(y * scale)
    elif residual.dtype == y.dtype == scale.dtype:
        torch.addcmul(residual, y, scale, out=out)
    else:
        # Mixed dtypes go through fp32: a factor rounded to 16 bits first would cost accuracy.
        out.copy_(torch.addcmul(residual.float(), y.float(), scale.float()))


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[Optional],
    gammas: list[Optional],
    route: Route,
    row_scale: Optional,
    need_dx: bool,
    need_dw: list[bool],
    need_db: list[bool],
    need_dgamma: list[bool],
) -> tuple[Optional, list[Optional], list[Optional], list[Optional]]:
    """See `vlmo_kernels.reference.routed_linear.backward`."""
    dx = x.new_zeros(x.shape) if need_dx else None
    dw, db, dgamma = ([None] * len(weights) for _ in range(3))
    for start, end, e in route.ranges():
        rows = slice(start, end)
        g = scaled(dy[rows], row_scale, rows).to(x.dtype)
        grads = weight_grads(
            g, x[rows], weights[e], biases[e], gammas[e], need_dw[e], need_db[e], need_dgamma[e]
        )
        for total, part in zip((dw, db, dgamma), grads, strict=True):
            total[e] = part if total[e] is None or part is None else total[e] + part
        if dx is not None:
            torch.mm(g if gammas[e] is None else (g * gammas[e]).to(x.dtype), weights[e], out=dx[rows])
    return (
        dx,
        finish(dw, weights, need_dw),
        finish(db, biases, need_db),
        finish(dgamma, gammas, need_dgamma),
    )


def scaled(dy: torch.Tensor, row_scale: Optional, rows: slice) -> torch.Tensor:
    return dy if row_scale is None else dy * row_scale[rows, None]


def weight_grads(
    g: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional,
    gamma: Optional,
    need_dw: bool,
    need_db: bool,
    need_dgamma: bool,
) -> tuple[Optional, Optional, Optional]:
    """Gradients of `gamma * (x @ weight.T + bias)`; those of gamma come from the unscaled weight gradient."""
    total = column_sums(g) if need_db or need_dgamma else None
    unscaled = g.T @ x if need_dw or need_dgamma else None
    dw = db = dgamma = None
    if need_dw:
        dw = unscaled if gamma is None else (unscaled * gamma[:, None]).to(weight.dtype)
    if need_db:
        db = total if gamma is None else total * gamma.float()
    if need_dgamma:
        dgamma = (weight.float() * unscaled.float()).sum(1)
        if bias is not None:
            dgamma += bias.float() * total
    return dw, db, dgamma


def column_sums(x: torch.Tensor) -> torch.Tensor:
    """fp32 sums over the rows. Torch's sum of 16-bit rows into fp32 makes an fp32 copy of them first."""
    ops = compiled.cpu_ops()
    return x.sum(0, dtype=torch.float32) if ops is None else ops.column_sums(x)


def finish(grads: list[Optional], like: list[Optional], need: list[bool]) -> list[Optional]:
    """Gradients in the dtype of their weights; zeros for an expert without rows."""
    return [
        None if not wanted else torch.zeros_like(t) if g is None else g.to(t.dtype)
        for g, t, wanted in zip(grads, like, need, strict=True)
    ]
