"""Reference of `routed_linear`: one dense layer per expert, with LayerScale, row scale and residual."""

from __future__ import annotations

import torch

from .common import working, zeros_where

Optional = torch.Tensor | None


def forward(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[Optional],
    gammas: list[Optional],
    route,
    residual: Optional,
    row_scale: Optional,
) -> torch.Tensor:
    """`y[t] = residual[t] + row_scale[t] * gamma[e] * (x[t] @ w[e].T + b[e])`, `e` the expert of row `t`.

    Args:
        x: `[T, K]`.
        weights: one `[N, K]` per expert.
        biases, gammas: one `[N]` or None per expert; gamma is LayerScale (Touvron et al. 2021).
        route: `vlmo_kernels.runtime.route.Route`.
        residual: `[T, N]`, any floating dtype, or None.
        row_scale: fp32 `[T]` (DropPath, Huang et al. 2016) or None.

    Returns:
        `[T, N]`, dtype of the residual, else of `x`; rows past the live ones are zero.
    """
    wide = working(x.dtype)
    y = x.new_zeros(x.shape[0], weights[0].shape[0], dtype=x.dtype if residual is None else residual.dtype)
    for start, end, e in route.ranges():
        part = x[start:end].to(wide) @ weights[e].to(wide).T
        if biases[e] is not None:
            part = part + biases[e].to(wide)
        if gammas[e] is not None:
            part = part * gammas[e].to(wide)
        if row_scale is not None:
            part = part * row_scale[start:end, None].to(wide)
        if residual is not None:
            part = part + residual[start:end].to(torch.promote_types(wide, y.dtype))
        y[start:end] = part.to(y.dtype)
    return y


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[Optional],
    gammas: list[Optional],
    route,
    row_scale: Optional,
    need_dx: bool,
    need_dw: list[bool],
    need_db: list[bool],
    need_dgamma: list[bool],
) -> tuple[Optional, list[Optional], list[Optional], list[Optional]]:
    """Gradients of `x` and of every wanted weight; that of the residual is `dy` itself.

    With `s` the row scale, `g = s * dy` and `U = g.T @ x`: `dw = gamma * U`, `db = gamma * sum(g)` and
    `dgamma = rowsum(w * U) + b * sum(g)`, so the output before LayerScale is not needed.
    """
    wide = working(x.dtype)
    dx = x.new_zeros(x.shape) if need_dx else None
    # Sums run in the working precision and are rounded once: an expert may own several ranges.
    dw, db, dgamma = (
        [d if d is None else d.to(wide) for d in zeros_where(need, like)]
        for need, like in ((need_dw, weights), (need_db, biases), (need_dgamma, gammas))
    )
    for start, end, e in route.ranges():
        g = dy[start:end].to(wide)
        if row_scale is not None:
            g = g * row_scale[start:end, None].to(wide)
        scale = 1.0 if gammas[e] is None else gammas[e].to(wide)
        add_weight_grads(dw[e], db[e], dgamma[e], g, x[start:end].to(wide), weights[e], biases[e], gammas[e])
        if dx is not None:
            dx[start:end] = ((g * scale) @ weights[e].to(wide)).to(x.dtype)
    return dx, cast_like(dw, weights), cast_like(db, biases), cast_like(dgamma, gammas)


def add_weight_grads(
    dw: Optional,
    db: Optional,
    dgamma: Optional,
    g: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional,
    gamma: Optional,
) -> None:
    """Add one range's share to the gradients of `gamma * (x @ weight.T + bias)`; `g` is its gradient."""
    scale = 1.0 if gamma is None else gamma.to(g.dtype)
    total = g.sum(0)
    if db is not None:
        db += scale * total
    if dw is None and dgamma is None:
        return
    unscaled = g.T @ x
    if dw is not None:
        dw += unscaled if gamma is None else scale[:, None] * unscaled
    if dgamma is not None:
        dgamma += (weight.to(g.dtype) * unscaled).sum(1)
        if bias is not None:
            dgamma += bias.to(g.dtype) * total


def cast_like(grads: list[Optional], like: list[Optional]) -> list[Optional]:
    """Every gradient in the dtype of what it is the gradient of."""
    return [None if g is None else g.to(t.dtype) for g, t in zip(grads, like, strict=True)]
