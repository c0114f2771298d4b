"""CPU `routed_ffn`: two GEMMs per expert range, the activation and its derivative inside them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vlmo_kernels.runtime.ffn_weights import FFNWeights
from vlmo_kernels.runtime.route import Route

from .gemm import add, backend, finish, how, scaled, why_not
from .onednn import activate, activation_backward
from .routed_linear import weight_grads

__all__ = ["backward", "forward", "how", "why_not"]
Optional = torch.Tensor | None
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}


def forward(
    x: torch.Tensor,
    weights: FFNWeights,
    route: Route,
    activation: str,
    residual: Optional,
    row_scale: Optional,
    eps: float,
    save: bool,
) -> tuple[torch.Tensor, Optional, Optional]:
    """See `vlmo_kernels.reference.routed_ffn.forward`."""
    dtype = x.dtype if residual is None else residual.dtype
    y = x.new_empty(x.shape[0], weights.w2[0].shape[0], dtype=dtype)
    hidden = weights.w1[0].shape[0]
    pre = x.new_empty(x.shape[0], hidden) if save else None
    up = x.new_empty(x.shape[0], hidden) if save and activation in GATED else None
    for start, end, e in route.ranges():
        w = weights.expert(e)
        w1, w2, w_up = (None if t is None else backend().prepare(t, end - start) for t in (w.w1, w.w2, w.w_up))
        step = _rows_at_once(end - start, hidden * x.element_size())
        for first in range(start, end, step):
            rows = slice(first, min(end, first + step))
            h = x.new_empty(rows.stop - first, hidden)
            if activation in GATED:
                z, u = (h.new_empty(h.shape) if t is None else t[rows] for t in (pre, up))
                backend().forward_into(z, x[rows], w1, w.b1)
                backend().forward_into(u, x[rows], w_up, w.b_up)
                torch.mul(activate(GATED[activation], z), u, out=h)
            else:
                backend().forward_into(h, x[rows], w1, w.b1, activation, None if pre is None else pre[rows])
            if w.norm_weight is not None:
                h = F.layer_norm(h, h.shape[-1:], w.norm_weight, w.norm_bias, eps)
            backend().forward_into(
                y[rows], h, w2, w.b2, gamma=w.gamma,
                residual=None if residual is None else residual[rows],
                row_scale=None if row_scale is None else row_scale[rows],
            )  # fmt: skip
    return y, pre, up


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weights: FFNWeights,
    pre: Optional,
    up: Optional,
    route: Route,
    activation: str,
    row_scale: Optional,
    eps: float,
    need_dx: bool,
    need: FFNWeights,
) -> tuple[Optional, FFNWeights]:
    """See `vlmo_kernels.reference.routed_ffn.backward`."""
    dx = x.new_zeros(x.shape) if need_dx else None
    grads = FFNWeights(*([None] * weights.experts for _ in weights))
    for start, end, e in route.ranges():
        rows, w, n = slice(start, end), weights.expert(e), need.expert(e)
        z, u = (None if t is None else t[rows] for t in (pre, up))
        if z is None:
            z, u = _pre_activations(x[rows], w, activation)
        g = scaled(dy[rows], None if row_scale is None else row_scale[rows], x.dtype)
        plain = w.norm_weight is None and u is None
        part = (_plain_backward if plain else _expert_backward)(
            g, x[rows], z, u, w, n, activation, eps, None if dx is None else dx[rows]
        )
        for totals, value in zip(grads, part, strict=True):
            add(totals, e, value)
    return dx, FFNWeights(*(finish(g, t, n) for g, t, n in zip(grads, weights, need, strict=True)))


def _rows_at_once(rows: int, row_bytes: int) -> int:
    """Pieces of `rows`, about equal, whose hidden values stay in the cache until the second layer: 8 MiB a thread."""
    tile = 192  # rows of a compiled kernel's
    most = max(2**23 * torch.get_num_threads() // (tile * max(row_bytes, 1)), 1)  # tiles
    tiles = max(-(-rows // tile), 1)
    return -(-tiles // -(-tiles // most)) * tile


def _plain_backward(g, x, z, u, w: FFNWeights, need: FFNWeights, activation: str, eps: float, dx) -> FFNWeights:
    """`_expert_backward` of an expert without gate and inner norm: all that is pointwise happens inside the GEMMs."""
    dz, h, db1 = backend().activation_grad(g, w.w2, w.gamma, activation, z)
    dw2, db2, dgamma = weight_grads(g, h, w.w2, w.b2, w.gamma, need.w2, need.b2, need.gamma)
    dw1, db1, _ = weight_grads(dz, x, w.w1, w.b1, None, need.w1, need.b1, False, db1)
    if dx is not None:
        backend().input_grad_into(dx, dz, w.w1)
    return FFNWeights(dw1, db1, dw2, db2, None, None, dgamma, None, None)


def _expert_backward(g, x, z, u, w: FFNWeights, need: FFNWeights, activation: str, eps: float, dx) -> FFNWeights:
    """Gradients of one expert's weights on its rows; that of the rows goes into `dx` unless it is None."""
    plain = GATED.get(activation, activation)
    h = activate(plain, z)
    h = normed = h if u is None else h * u
    if w.norm_weight is not None:
        normed, mean, rstd = torch.native_layer_norm(h, h.shape[-1:], w.norm_weight, w.norm_bias, eps)
    dw2, db2, dgamma = weight_grads(g, normed, w.w2, w.b2, w.gamma, need.w2, need.b2, need.gamma)
    dh = h.new_empty(h.shape)
    backend().input_grad_into(dh, g, w.w2, w.gamma)
    dnorm_weight = dnorm_bias = None
    if w.norm_weight is not None:
        dh, dnorm_weight, dnorm_bias = torch.ops.aten.native_layer_norm_backward(
            dh, h, h.shape[-1:], mean, rstd, w.norm_weight, w.norm_bias,
            [True, need.norm_weight, need.norm_bias],
        )  # fmt: skip
    du = None
    if u is not None:
        du = dh * activate(plain, z)
        dh = dh * u
    dz = activation_backward(plain, dh, z)
    dw1, db1, _ = weight_grads(dz, x, w.w1, w.b1, None, need.w1, need.b1, False)
    if dx is not None:
        backend().input_grad_into(dx, dz, w.w1)
    dw_up = db_up = None
    if du is not None:
        dw_up, db_up, _ = weight_grads(du, x, w.w_up, w.b_up, None, need.w_up, need.b_up, False)
        if dx is not None:
            through_up = dx.new_empty(dx.shape)
            backend().input_grad_into(through_up, du, w.w_up)
            dx += through_up
    return FFNWeights(dw1, db1, dw2, db2, dw_up, db_up, dgamma, dnorm_weight, dnorm_bias)


def _pre_activations(x: torch.Tensor, w: FFNWeights, activation: str) -> tuple[torch.Tensor, Optional]:
    z = x.new_empty(x.shape[0], w.w1.shape[0])
    u = z.new_empty(z.shape) if activation in GATED else None
    for out, weight, bias in ((z, w.w1, w.b1), (u, w.w_up, w.b_up)):
        if out is not None:
            backend().forward_into(out, x, backend().prepare(weight, len(x)), bias)
    return z, u
