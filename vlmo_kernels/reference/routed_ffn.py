"""Reference of `routed_ffn`: the feed-forward network of the row's expert, with its whole epilogue."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vlmo_kernels.runtime.ffn_weights import FFNWeights

from .activations import GATED, activate, derivative
from .common import working, zeros_where
from .routed_linear import add_weight_grads, cast_like

Optional = torch.Tensor | None


def forward(
    x: torch.Tensor,
    weights: FFNWeights,
    route,
    activation: str,
    residual: Optional,
    row_scale: Optional,
    eps: float,
    save: bool,
) -> tuple[torch.Tensor, Optional, Optional]:
    """`residual + row_scale * gamma * (norm(act(x w1' + b1) [* (x w_up' + b_up)]) w2' + b2)`.

    Args:
        x: `[T, D]`.
        weights: see `FFNWeights`.
        residual: `[T, D_out]`, any floating dtype, or None.
        row_scale: fp32 `[T]` (DropPath, Huang et al. 2016) or None.
        eps: of the inner LayerNorm.
        save: also return the pre-activations, `[T, F]` in the dtype of `x`.

    Returns:
        `y` `[T, D_out]` in the dtype of the residual, else of `x`; the pre-activation of the (gate) layer;
        that of the up layer (gated activations). Rows past the live ones are zero.
    """
    wide = working(x.dtype)
    out_dtype = x.dtype if residual is None else residual.dtype
    y = x.new_zeros(x.shape[0], weights.w2[0].shape[0], dtype=out_dtype)
    hidden = weights.w1[0].shape[0]
    pre = x.new_zeros(x.shape[0], hidden) if save else None
    up = x.new_zeros(x.shape[0], hidden) if save and activation in GATED else None
    for start, end, e in route.ranges():
        rows, w = slice(start, end), weights.expert(e)
        z = _dense(x[rows].to(wide), w.w1, w.b1)
        u = _dense(x[rows].to(wide), w.w_up, w.b_up) if activation in GATED else None
        h, _ = _inner_norm(_hidden(activation, z, u), w, eps)
        branch = _dense(h, w.w2, w.b2)
        if w.gamma is not None:
            branch = branch * w.gamma.to(wide)
        if row_scale is not None:
            branch = branch * row_scale[rows, None].to(wide)
        if residual is not None:
            branch = branch.to(working(out_dtype)) + residual[rows].to(working(out_dtype))
        y[rows] = branch.to(out_dtype)
        if pre is not None:
            pre[rows] = z.to(x.dtype)
        if up is not None:
            up[rows] = u.to(x.dtype)
    return y, pre, up


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weights: FFNWeights,
    pre: Optional,
    up: Optional,
    route,
    activation: str,
    row_scale: Optional,
    eps: float,
    need_dx: bool,
    need: FFNWeights,
) -> tuple[Optional, FFNWeights]:
    """Gradients of `x` and of every wanted weight. `pre` None: the pre-activations are computed again.

    With `s` the row scale, `g = s * dy` and `U = g.T @ h`: `dw2 = gamma * U`, `db2 = gamma * sum(g)` and
    `dgamma = rowsum(w2 * U) + b2 * sum(g)`, so the branch's output is not needed.
    """
    wide = working(x.dtype)
    dx = x.new_zeros(x.shape) if need_dx else None
    grads = FFNWeights(
        *(
            [None if d is None else d.to(wide) for d in zeros_where(wanted, values)]
            for wanted, values in zip(need, weights, strict=True)
        )
    )
    for start, end, e in route.ranges():
        rows, w, d = slice(start, end), weights.expert(e), grads.expert(e)
        xs = x[rows].to(wide)
        z = _dense(xs, w.w1, w.b1) if pre is None else pre[rows].to(wide)
        u = None
        if activation in GATED:
            u = _dense(xs, w.w_up, w.b_up) if up is None else up[rows].to(wide)
        h, norm_back = _inner_norm(_hidden(activation, z, u), w, eps)

        g = dy[rows].to(wide)
        if row_scale is not None:
            g = g * row_scale[rows, None].to(wide)
        add_weight_grads(d.w2, d.b2, d.gamma, g, h, w.w2, w.b2, w.gamma)
        if w.gamma is not None:
            g = g * w.gamma.to(wide)
        dh = norm_back(g @ w.w2.to(wide), d)

        plain = GATED.get(activation, activation)
        if u is None:
            dz, du = dh * derivative(plain, z), None
        else:
            dz, du = dh * u * derivative(plain, z), dh * activate(plain, z)
        _accumulate_first(d.w1, d.b1, dz, xs)
        dxs = dz @ w.w1.to(wide)
        if du is not None:
            _accumulate_first(d.w_up, d.b_up, du, xs)
            dxs = dxs + du @ w.w_up.to(wide)
        if dx is not None:
            dx[rows] = dxs.to(x.dtype)
    return dx, FFNWeights(*(cast_like(g, t) for g, t in zip(grads, weights, strict=True)))


def _dense(x: torch.Tensor, weight: torch.Tensor, bias: Optional) -> torch.Tensor:
    y = x @ weight.to(x.dtype).T
    return y if bias is None else y + bias.to(x.dtype)


def _hidden(activation: str, z: torch.Tensor, u: Optional) -> torch.Tensor:
    h = activate(GATED.get(activation, activation), z)
    return h if u is None else h * u


def _inner_norm(h: torch.Tensor, w: FFNWeights, eps: float) -> tuple[torch.Tensor, Callable]:
    """LayerNorm on the hidden activations (sub-LN, Wang et al. 2022), and the function of its backward."""
    if w.norm_weight is None:
        return h, lambda dh, d: dh
    centred = h - h.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    n = centred * rstd
    scale = w.norm_weight.to(h.dtype)
    out = n * scale if w.norm_bias is None else n * scale + w.norm_bias.to(h.dtype)

    def backward(dh: torch.Tensor, d: FFNWeights) -> torch.Tensor:
        if d.norm_weight is not None:
            d.norm_weight.add_((dh * n).sum(0))
        if d.norm_bias is not None:
            d.norm_bias.add_(dh.sum(0))
        g = dh * scale
        return rstd * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))

    return out, backward


def _accumulate_first(dw: Optional, db: Optional, dz: torch.Tensor, x: torch.Tensor) -> None:
    if dw is not None:
        dw += dz.T @ x
    if db is not None:
        db += dz.sum(0)
