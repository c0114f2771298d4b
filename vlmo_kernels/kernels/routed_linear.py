"""`routed_linear` in Triton: one dense layer per expert with LayerScale, row scale and residual, in one launch."""

from __future__ import annotations

from typing import Any

import torch

from vlmo_kernels.runtime.route import Route
from vlmo_kernels.tuning.tables import Problem

from . import bias_grad
from .gemm import gemm, problem
from .gemm_grad import input_grad, input_problem, weight_grad, weight_problem

Optional = torch.Tensor | None


def problems(call: dict[str, Any], dtype: torch.dtype) -> list[Problem]:
    """The launches of a call of the public op that the tables know, forward and backward."""
    rows, (n, k) = call["x"].shape[0], call["weights"][0].shape
    summed = any(gamma is not None for gamma in call["gamma"] or ())
    return [
        problem(dtype, rows, n, k, False),
        input_problem(dtype, rows, k, n, False, False),
        weight_problem(dtype, rows, n, k, summed),
    ]


def forward(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[Optional],
    gammas: list[Optional],
    route: Route,
    residual: Optional,
    row_scale: Optional,
) -> torch.Tensor:
    """`y[t] = residual[t] + row_scale[t] * gamma[e] * (x[t] @ w[e].T + b[e])`, `e` the expert of row `t`.

    Args:
        x: `[T, K]`, fp32, bf16 or fp16; rows may be any stride apart.
        weights: one `[N, K]` per expert, of the dtype of x.
        biases, gammas: one `[N]` or None per expert; gamma is LayerScale (Touvron et al. 2021).
        residual: `[T, N]`, any floating dtype, or None.
        row_scale: fp32 `[T]` (DropPath, Huang et al. 2016) or None.

    Returns:
        `[T, N]` in the dtype of the residual, else of x; dead rows are unspecified.
    """
    return gemm(x, weights, biases, route, gamma=gammas, row_scale=row_scale, residual=residual)[0]


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
    """Gradients of `forward`; dead rows of dx and the gradients of experts without rows are zero."""
    # The sum over rows in dw needs the scale on one of its operands; rounded there, as eager torch rounds it.
    g = dy.to(x.dtype) if row_scale is None else scaled(dy, row_scale, x.dtype)
    dx = input_grad(g, scaled_weights(weights, gammas), route, zero_tail=True).dx if need_dx else None
    dw, db, dgamma = layer_grads(dy, g, x, weights, biases, gammas, route, row_scale, need_dw, need_db, need_dgamma)
    return dx, dw, db, dgamma


def layer_grads(
    dy: torch.Tensor,
    g: torch.Tensor,
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[Optional],
    gammas: list[Optional],
    route: Route,
    row_scale: Optional,
    need_dw: list[bool],
    need_db: list[bool],
    need_dgamma: list[bool],
) -> tuple[list[Optional], list[Optional], list[Optional]]:
    """Gradients of the weights of `row_scale * gamma * (x @ w.T + b)`, given `U = g.T @ x`.

    Either operand of U, `g` or `x`, already carries the row scale; `dy` does not.
    `dw = gamma * U`, `db = gamma * sum(row_scale * dy)` and `dgamma = rowsum(w * U) + b * sum(row_scale * dy)`: the
    output before LayerScale is not needed.
    """
    need_dgamma = [want and t is not None for want, t in zip(need_dgamma, gammas, strict=True)]
    need_db = [want and t is not None for want, t in zip(need_db, biases, strict=True)]
    dw, dot = weight_grad(g, x, weights, route, need_dw, gamma=gammas, need_dot=need_dgamma)
    if not any(need_db) and not any(need_dgamma):
        return dw, [None] * len(biases), [None] * len(gammas)
    sums = bias_grad.column_sums(dy, route, row_scale)
    db, dgamma = bias_grad.reduce(
        sums, bias_grad.TILE_ROWS, dy.shape[0], biases, route, need_db,
        gamma=gammas, need_dgamma=need_dgamma, dot=dot,
    )  # fmt: skip
    return dw, db, dgamma


def scaled(t: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`rows[:, None] * t` in `dtype`, computed in the wider dtype, in one pass."""
    return torch.mul(t, rows[:, None], out=t.new_empty(t.shape, dtype=dtype))


def scaled_weights(weights: list[torch.Tensor], gammas: list[Optional]) -> list[torch.Tensor]:
    """`gamma[:, None] * w`. In an input gradient gamma scales the contraction, where no epilogue reaches it.

    The weight has far fewer rows than the batch, so it is scaled rather than the gradient.
    """
    return [w if gamma is None else scaled(w, gamma, w.dtype) for w, gamma in zip(weights, gammas, strict=True)]
