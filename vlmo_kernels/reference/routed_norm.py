"""Reference of `routed_norm`: LayerNorm or RMSNorm with the affine part of the row's expert."""

from __future__ import annotations

import torch

from .common import working, zeros_where
from .routed_linear import cast_like

Optional = torch.Tensor | None
KINDS = ("layer", "rms", "rms1p")


def forward(
    x: torch.Tensor,
    residual: Optional,
    weights: list[Optional],
    biases: list[Optional],
    route,
    kind: str,
    eps: float,
) -> tuple[torch.Tensor, Optional, Optional, torch.Tensor]:
    """`y = norm(x + residual) * weights[e] + biases[e]`.

    Args:
        x: `[T, D]`.
        residual: `[T, D]` or None.
        weights: one `[D]` or None per expert; with `kind="rms1p"` the factor is `1 + w` (Gemma).
        biases: one `[D]` or None per expert.
        kind: "layer" (Ba et al. 2016), "rms" or "rms1p" (Zhang and Sennrich 2019).

    Returns:
        `y` `[T, D]` in the dtype of `x`; `z = x + residual` in the dtype of the residual, or None;
        mean `[T]` (None for RMSNorm) and reciprocal standard deviation `[T]`, fp32 (fp64 for fp64).
    """
    wide = working(x.dtype if residual is None else residual.dtype)
    z = x if residual is None else (x.to(wide) + residual.to(wide)).to(residual.dtype)
    mean, rstd = _statistics(z.to(wide), kind, eps)
    normal = _normal(z.to(wide), mean, rstd)
    y = x.new_zeros(x.shape)
    for start, end, e in route.ranges():
        y[start:end] = _affine(normal[start:end], weights[e], biases[e], kind).to(y.dtype)
    return y, (None if residual is None else z), mean, rstd


def backward(
    dy: torch.Tensor,
    dz: Optional,
    z: torch.Tensor,
    weights: list[Optional],
    biases: list[Optional],
    mean: Optional,
    rstd: torch.Tensor,
    route,
    kind: str,
    need_dw: list[bool],
    need_db: list[bool],
) -> tuple[torch.Tensor, list[Optional], list[Optional]]:
    """Gradient of `z` (which is that of `x` and of the residual alike), of the weights and biases.

    `dx = rstd * (g - mean(g) - n * mean(g * n))` with `g = dy * weight` and `n` the normalised row; the
    `mean(g)` term is LayerNorm's alone.
    """
    wide = working(z.dtype)
    dx = z.new_zeros(z.shape)
    dw = [d if d is None else d.to(wide) for d in zeros_where(need_dw, weights)]
    db = [d if d is None else d.to(wide) for d in zeros_where(need_db, biases)]
    for start, end, e in route.ranges():
        rows = slice(start, end)
        n = _normal(z[rows].to(wide), None if mean is None else mean[rows], rstd[rows])
        g = dy[rows].to(wide)
        if dw[e] is not None:
            dw[e] += (g * n).sum(0)
        if db[e] is not None:
            db[e] += g.sum(0)
        g = g * _factor(weights[e], kind, wide)
        inner = g - n * (g * n).mean(-1, keepdim=True)
        if kind == "layer":
            inner = inner - g.mean(-1, keepdim=True)
        part = rstd[rows, None].to(wide) * inner
        if dz is not None:
            part = part + dz[rows].to(wide)
        dx[rows] = part.to(z.dtype)
    return dx, cast_like(dw, weights), cast_like(db, biases)


def _statistics(z: torch.Tensor, kind: str, eps: float) -> tuple[Optional, torch.Tensor]:
    if kind == "layer":
        mean = z.mean(-1)
        return mean, torch.rsqrt((z - mean[:, None]).square().mean(-1) + eps)
    return None, torch.rsqrt(z.square().mean(-1) + eps)


def _normal(z: torch.Tensor, mean: Optional, rstd: torch.Tensor) -> torch.Tensor:
    centred = z if mean is None else z - mean[:, None].to(z.dtype)
    return centred * rstd[:, None].to(z.dtype)


def _factor(weight: Optional, kind: str, wide: torch.dtype):
    if weight is None:
        return 1.0
    return weight.to(wide) + 1.0 if kind == "rms1p" else weight.to(wide)


def _affine(normal: torch.Tensor, weight: Optional, bias: Optional, kind: str) -> torch.Tensor:
    y = normal * _factor(weight, kind, normal.dtype)
    return y if bias is None else y + bias.to(normal.dtype)
