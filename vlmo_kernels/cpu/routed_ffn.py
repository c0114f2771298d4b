"""CPU `routed_ffn`: two oneDNN GEMMs per expert range, the activation inside the first."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vlmo_kernels.runtime.ffn_weights import FFNWeights
from vlmo_kernels.runtime.route import Route

from .gemm import dense, why_not
from .routed_linear import finish, project_into, scaled, weight_grads

__all__ = ["backward", "forward", "why_not"]
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
        rows, w = slice(start, end), weights.expert(e)
        if save or activation in GATED:
            z, u = _pre_activations(x[rows], w, activation)
            h = _hidden(activation, z, u)
            if pre is not None:
                pre[rows] = z
            if up is not None:
                up[rows] = u
        else:
            h = dense(x[rows], w.w1, w.b1, activation)
        if w.norm_weight is not None:
            h = F.layer_norm(h, h.shape[-1:], w.norm_weight, w.norm_bias, eps)
        project_into(
            y[rows],
            h,
            w.w2,
            w.b2,
            w.gamma,
            None if residual is None else residual[rows],
            None if row_scale is None else row_scale[rows],
        )
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
        dxs, part = _expert_backward(
            scaled(dy[rows], row_scale, rows).to(x.dtype), x[rows], z, u, w, n, activation, eps, need_dx
        )
        for total, value in zip(grads, part, strict=True):
            total[e] = value if total[e] is None or value is None else total[e] + value
        if dx is not None:
            dx[rows] = dxs
    return dx, FFNWeights(*(finish(g, t, n) for g, t, n in zip(grads, weights, need, strict=True)))


def _expert_backward(g, x, z, u, w, need, activation, eps, need_dx):
    """Gradients of one expert on its rows: `dx`, and an `FFNWeights` of tensors."""
    h = normed = _hidden(activation, z, u)
    if w.norm_weight is not None:
        normed, mean, rstd = torch.native_layer_norm(h, h.shape[-1:], w.norm_weight, w.norm_bias, eps)
    dw2, db2, dgamma = weight_grads(g, normed, w.w2, w.b2, w.gamma, need.w2, need.b2, need.gamma)
    dh = torch.mm(g if w.gamma is None else (g * w.gamma).to(x.dtype), w.w2)
    dnorm_weight = dnorm_bias = None
    if w.norm_weight is not None:
        dh, dnorm_weight, dnorm_bias = torch.ops.aten.native_layer_norm_backward(
            dh, h, h.shape[-1:], mean, rstd, w.norm_weight, w.norm_bias,
            [True, need.norm_weight, need.norm_bias],
        )  # fmt: skip
    plain = GATED.get(activation, activation)
    du = None
    if u is not None:
        du = dh * _activate(plain, z)
        dh = dh * u
    dz = _activation_backward(plain, dh, z)
    dw1, db1, _ = weight_grads(dz, x, w.w1, w.b1, None, need.w1, need.b1, False)
    dxs = torch.mm(dz, w.w1) if need_dx else None
    dw_up = db_up = None
    if du is not None:
        dw_up, db_up, _ = weight_grads(du, x, w.w_up, w.b_up, None, need.w_up, need.b_up, False)
        if need_dx:
            dxs = torch.addmm(dxs, du, w.w_up)
    return dxs, FFNWeights(dw1, db1, dw2, db2, dw_up, db_up, dgamma, dnorm_weight, dnorm_bias)


def _pre_activations(x: torch.Tensor, w: FFNWeights, activation: str) -> tuple[torch.Tensor, Optional]:
    return dense(x, w.w1, w.b1), dense(x, w.w_up, w.b_up) if activation in GATED else None


def _hidden(activation: str, z: torch.Tensor, u: Optional) -> torch.Tensor:
    h = _activate(GATED.get(activation, activation), z)
    return h if u is None else h * u


def _activate(kind: str, z: torch.Tensor) -> torch.Tensor:
    if kind.startswith("gelu"):
        return F.gelu(z, approximate="tanh" if kind == "gelu_tanh" else "none")
    return F.relu(z) if kind == "relu" else F.silu(z)


def _activation_backward(kind: str, dh: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    if kind.startswith("gelu"):
        return torch.ops.aten.gelu_backward(dh, z, approximate="tanh" if kind == "gelu_tanh" else "none")
    if kind == "relu":
        return torch.ops.aten.threshold_backward(dh, z, 0)
    return torch.ops.aten.silu_backward(dh, z)
