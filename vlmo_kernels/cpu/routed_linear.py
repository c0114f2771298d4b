"""CPU `routed_linear`: one GEMM with its epilogue per expert range."""

from __future__ import annotations

import torch

from vlmo_kernels.runtime.route import Route

from .gemm import add, backend, finish, how, scaled, why_not

__all__ = ["backward", "forward", "how", "why_not"]
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
    y = x.new_empty(x.shape[0], weights[0].shape[0], dtype=x.dtype if residual is None else residual.dtype)
    for start, end, e in route.ranges():
        rows = slice(start, end)
        backend().forward_into(
            y[rows], x[rows], backend().prepare(weights[e], end - start), biases[e], gamma=gammas[e],
            residual=None if residual is None else residual[rows],
            row_scale=None if row_scale is None else row_scale[rows],
        )  # fmt: skip
    return y


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
        g = scaled(dy[rows], None if row_scale is None else row_scale[rows], x.dtype)
        grads = weight_grads(
            g, x[rows], weights[e], biases[e], gammas[e], need_dw[e], need_db[e], need_dgamma[e]
        )
        for totals, part in zip((dw, db, dgamma), grads, strict=True):
            add(totals, e, part)
        if dx is not None:
            backend().input_grad_into(dx[rows], g, weights[e], gammas[e])
    return (
        dx,
        finish(dw, weights, need_dw),
        finish(db, biases, need_db),
        finish(dgamma, gammas, need_dgamma),
    )


def weight_grads(
    g: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional,
    gamma: Optional,
    need_dw: bool,
    need_db: bool,
    need_dgamma: bool,
    sums: Optional = None,
) -> tuple[Optional, Optional, Optional]:
    """Gradients of `gamma * (x @ weight.T + bias)`; that of gamma comes from the unscaled weight gradient.

    `sums`: the fp32 column sums of `g`, where they are known.
    """
    dw, dgamma = backend().weight_grads(g, x, weight, gamma, need_dw, need_dgamma)
    if sums is None and (need_db or need_dgamma):
        sums = backend().column_sums(g)
    db = None
    if need_db:
        db = sums if gamma is None else sums * gamma.float()
    if need_dgamma and bias is not None:
        dgamma += bias.float() * sums
    return dw, db, dgamma
