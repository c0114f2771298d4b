"""`routed_ffn` in Triton: two launches forward, epilogues fused; backward without any saved branch output."""

from __future__ import annotations

from typing import Any

import torch

from vlmo_kernels.runtime.ffn_weights import FFNWeights
from vlmo_kernels.runtime.route import Route
from vlmo_kernels.tuning.tables import Problem

from . import bias_grad, inner_norm
from .activations import GATED
from .gemm import gemm, problem
from .gemm_grad import input_grad, input_problem, weight_grad, weight_problem
from .routed_linear import layer_grads, scaled_weights

Optional = torch.Tensor | None


def problems(call: dict[str, Any], dtype: torch.dtype) -> list[Problem]:
    """The launches of a call of the public op that the tables know, forward and backward."""
    (rows, d), (width, f) = call["x"].shape, call["w2"][0].shape
    gated, fused = call["activation"] in GATED, call["inner_norm"] is None
    summed = any(gamma is not None for gamma in call["gamma"] or ())
    return [
        problem(dtype, rows, f, d, gated),
        problem(dtype, rows, width, f, False),
        input_problem(dtype, rows, f, width, fused, fused and gated),
        input_problem(dtype, rows, d, f, False, False),
        weight_problem(dtype, rows, width, f, summed),
        weight_problem(dtype, rows, f, d, False),
    ]


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
    """`residual + row_scale * gamma * (norm(act(x w1' + b1) [* (x w_up' + b_up)]) w2' + b2)`.

    Args:
        x: `[T, D]`, fp32, bf16 or fp16; rows may be any stride apart.
        weights: see `FFNWeights`; of the dtype of x, gamma and the norm's weights may be fp32.
        residual: `[T, D_out]`, any floating dtype, or None.
        row_scale: fp32 `[T]` (DropPath, Huang et al. 2016) or None.
        eps: of the inner LayerNorm.
        save: also return the pre-activations, `[T, F]` in the dtype of x.

    Returns:
        `y` `[T, D_out]` in the dtype of the residual, else of x; the pre-activation of the (gate) layer; that of the up
        layer (gated activations). Dead rows are unspecified.
    """
    hidden, pre, up = _first(x, weights, route, activation, save)
    if _has_norm(weights):
        hidden = inner_norm.forward(hidden, weights.norm_weight, weights.norm_bias, route, eps)
    y, _, _ = gemm(hidden, weights.w2, weights.b2, route, gamma=weights.gamma, row_scale=row_scale, residual=residual)
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
    """Gradients of `x` and of every wanted weight. `pre` None: the pre-activations are computed again.

    One launch takes `dy` through w2 and the activation; it also writes the hidden values again, scaled by
    row_scale, so that the weight gradient of w2 needs neither a scaled copy of dy nor saved hidden values.
    """
    if pre is None:
        pre, up = _recompute(x, weights, route, activation)
    plain, gated = GATED.get(activation, activation), activation in GATED
    normed = _has_norm(weights)
    g = dy.to(x.dtype)  # under autocast the residual stream is fp32
    need_first = need_dx or any(any(flags) for flags in (need.w1, need.b1, need.w_up, need.b_up))
    need_inner = need_first or any(need.norm_weight) or any(need.norm_bias)
    need_second = any(need.w2) or any(need.gamma)
    none: list[Optional] = [None] * weights.experts
    dw1, db1, dw_up, db_up = none, none, none, none
    dnorm_weight, dnorm_bias = none, none
    dx = dpre = dup = hidden = None

    if need_inner or need_second:
        # LayerScale of the branch is on the contraction of this product, so it goes on the weight.
        w2 = scaled_weights(weights.w2, weights.gamma)
        if normed:
            dnormed = input_grad(g, w2, route, row_scale=row_scale).dx
            inner = inner_norm.backward(
                dnormed, pre, up, weights.norm_weight, weights.norm_bias, route, plain, row_scale, eps,
                need.norm_weight, need.norm_bias,
            )  # fmt: skip
            dpre, dup, hidden = inner.dpre, inner.dup, inner.out
            dnorm_weight, dnorm_bias = inner.dweight, inner.dbias
        else:
            back = input_grad(
                g, w2, route, row_scale=row_scale, activation=plain, pre=pre, up=up, save_hidden=need_second,
                save_db=any(need.b1) or any(need.b_up),
            )  # fmt: skip
            dpre, dup, hidden = back.dx, back.dx_up, back.hidden
            db1 = _bias(back.db, back.tile_rows, dpre, weights.b1, route, need.b1)
            db_up = _bias(back.db_up, back.tile_rows, dpre, weights.b_up, route, need.b_up)

    if normed and any(need.b1):
        db1 = _bias(bias_grad.column_sums(dpre, route), bias_grad.TILE_ROWS, dpre, weights.b1, route, need.b1)
    if normed and gated and any(need.b_up):
        sums = bias_grad.column_sums(dup, route)
        db_up = _bias(sums, bias_grad.TILE_ROWS, dpre, weights.b_up, route, need.b_up)
    dw2, db2, dgamma = layer_grads(
        dy, g, hidden, weights.w2, weights.b2, weights.gamma, route, row_scale, need.w2, need.b2, need.gamma
    )
    hidden = None  # frees T x F values before the last products
    if any(need.w1):
        dw1, _ = weight_grad(dpre, x, weights.w1, route, need.w1)
    if gated and any(need.w_up):
        dw_up, _ = weight_grad(dup, x, weights.w_up, route, need.w_up)
    if need_dx:
        dx = input_grad(
            dpre, weights.w1, route, dy_up=dup, up_weights=weights.w_up if gated else None, zero_tail=True
        ).dx
    return dx, FFNWeights(
        w1=dw1, b1=db1, w2=dw2, b2=db2, w_up=dw_up, b_up=db_up, gamma=dgamma,
        norm_weight=dnorm_weight, norm_bias=dnorm_bias,
    )  # fmt: skip


def _has_norm(weights: FFNWeights) -> bool:
    return any(t is not None for t in weights.norm_weight)


def _first(
    x: torch.Tensor, weights: FFNWeights, route: Route, activation: str, save: bool
) -> tuple[torch.Tensor, Optional, Optional]:
    gated = activation in GATED
    return gemm(
        x, weights.w1, weights.b1, route, activation=GATED.get(activation, activation), save=save,
        up_weights=weights.w_up if gated else None, up_biases=weights.b_up if gated else None,
    )  # fmt: skip


def _recompute(x: torch.Tensor, weights: FFNWeights, route: Route, activation: str) -> tuple[torch.Tensor, Optional]:
    pre = gemm(x, weights.w1, weights.b1, route)[0]
    return pre, gemm(x, weights.w_up, weights.b_up, route)[0] if activation in GATED else None


def _bias(
    sums: Optional, tile_rows: int, rows_of: torch.Tensor, biases: list[Optional], route: Route, need: list[bool]
) -> list[Optional]:
    if sums is None or not any(need):
        return [None] * len(biases)
    return bias_grad.reduce(sums, tile_rows, rows_of.shape[0], biases, route, need)[0]
