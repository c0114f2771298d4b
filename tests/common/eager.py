"""Every op as people write it in eager torch today: padded buffers, boolean masks, one torch call a step.

In 16 bits it is the yardstick of accuracy; in fp64 it checks the references, with which it shares nothing.
Padding positions of results are zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

Optional = torch.Tensor | None
Tensors = list[Optional]


def _routed(x: torch.Tensor, experts: torch.Tensor, width: int, dtype: torch.dtype, apply) -> torch.Tensor:
    """`apply(rows, expert, mask)` on the rows of every expert, put where they came from."""
    y = x.new_zeros(*x.shape[:2], width, dtype=dtype)
    for e in range(int(experts.max()) + 1 if experts.numel() else 0):
        mask = experts == e
        if mask.any():
            y[mask] = apply(x[mask], e, mask).to(dtype)
    return y


def _epilogue(branch: torch.Tensor, gamma: Optional, mask, residual: Optional, row_scale: Optional):
    if gamma is not None:
        branch = branch * gamma
    if row_scale is not None:
        branch = branch * row_scale[mask][:, None].to(branch.dtype)
    return branch if residual is None else residual[mask] + branch


def routed_linear(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: Tensors,
    biases: Tensors,
    gammas: Tensors,
    residual: Optional = None,
    row_scale: Optional = None,
) -> torch.Tensor:
    """`x` `[B, N, K]`, `experts` `[B, N]` (-1: padding) to `[B, N, width]`."""

    def apply(rows: torch.Tensor, e: int, mask: torch.Tensor) -> torch.Tensor:
        return _epilogue(F.linear(rows, weights[e], biases[e]), gammas[e], mask, residual, row_scale)

    dtype = x.dtype if residual is None else residual.dtype
    return _routed(x, experts, weights[0].shape[0], dtype, apply)


def norm(x: torch.Tensor, weight: Optional, bias: Optional, kind: str, eps: float) -> torch.Tensor:
    """LayerNorm or RMSNorm of the last dimension, statistics in fp32 at least, as models write it."""
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    if weight is not None:
        y = y * (1 + weight) if kind == "rms1p" else y * weight
    return y if bias is None else y + bias


def routed_norm(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: Tensors,
    biases: Tensors,
    kind: str,
    eps: float,
    residual: Optional = None,
) -> tuple[torch.Tensor, ...]:
    """The norm, and the sum it normalises where there is a residual."""
    z = x if residual is None else x + residual
    y = _routed(z, experts, x.shape[2], x.dtype, lambda r, e, m: norm(r, weights[e], biases[e], kind, eps))
    if residual is None:
        return (y,)
    return y, torch.where((experts >= 0)[..., None], z, 0.0)


def activate(kind: str, z: torch.Tensor) -> torch.Tensor:
    if kind in ("gelu", "geglu"):
        return F.gelu(z)
    if kind in ("gelu_tanh", "geglu_tanh"):
        return F.gelu(z, approximate="tanh")
    return F.relu(z) if kind == "relu" else F.silu(z)


def routed_ffn(
    x: torch.Tensor,
    experts: torch.Tensor,
    w1: Tensors,
    b1: Tensors,
    w2: Tensors,
    b2: Tensors,
    activation: str,
    w_up: Tensors | None = None,
    b_up: Tensors | None = None,
    gammas: Tensors | None = None,
    norm_weights: Tensors | None = None,
    norm_biases: Tensors | None = None,
    residual: Optional = None,
    row_scale: Optional = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`x` `[B, N, D]`, `experts` `[B, N]` (-1: padding) to `[B, N, D_out]`."""

    def apply(rows: torch.Tensor, e: int, mask: torch.Tensor) -> torch.Tensor:
        h = activate(activation, F.linear(rows, w1[e], b1[e]))
        if w_up is not None:
            h = h * F.linear(rows, w_up[e], None if b_up is None else b_up[e])
        if norm_weights is not None:
            h = F.layer_norm(h, h.shape[-1:], norm_weights[e], norm_biases[e] if norm_biases else None, eps)
        branch = F.linear(h, w2[e], b2[e])
        return _epilogue(branch, gammas[e] if gammas else None, mask, residual, row_scale)

    dtype = x.dtype if residual is None else residual.dtype
    return _routed(x, experts, w2[0].shape[0], dtype, apply)


def shared_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    valid: torch.Tensor,
    bias: Optional = None,
    causal: bool = False,
    prefix: Optional = None,
    scale: float | None = None,
) -> torch.Tensor:
    """`q` `[B, N, H, Dh]`, `k` and `v` `[B, N, Hk, Dh]`, `valid` `[B, N]`: the whole score matrix, masked."""
    heads, length = q.shape[2], q.shape[1]
    k, v = (t.repeat_interleave(heads // k.shape[2], dim=2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = (q @ k.transpose(-2, -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias[None, :, :length, :length].to(scores.dtype)
    visible = valid[:, None, None, :].expand(-1, -1, length, -1)
    if causal:
        at = torch.arange(length)
        seen = (at[None, :] <= at[:, None]).expand(len(valid), -1, -1)
        if prefix is not None:
            seen = seen | (at[None, None, :] < prefix[:, None, None])
        visible = visible & seen[:, None]
    scores = scores.masked_fill(~visible, float("-inf"))
    # A query without a visible key would be NaN; models mask it, here it is zero by definition.
    blind = torch.isneginf(scores).all(-1, keepdim=True)
    scores = scores.masked_fill(blind, 0.0)
    if scores.dtype == torch.float32:
        o = _SoftmaxProduct.apply(scores, v)
    else:
        o = torch.softmax(scores, -1) @ v
    return torch.where(valid[:, :, None, None], o.masked_fill(blind, 0.0).transpose(1, 2), 0.0)


class _SoftmaxProduct(torch.autograd.Function):
    """`softmax(scores) @ v`, differentiated as Dao et al. 2022 do, one torch call a step.

    Softmax's own derivative subtracts `rowsum(P * dP)`, so errors of a row cancel to the last bit. Who keeps
    no score matrix subtracts `rowsum(do * o)`, equal but for rounding; in fp32, where nothing hides that, it
    is the fair yardstick. In 16 bits the stricter one stays.
    """

    @staticmethod
    def forward(ctx, scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        lse = torch.logsumexp(scores, -1, keepdim=True)
        o = torch.exp(scores - lse) @ v
        ctx.save_for_backward(scores, v, lse, o)
        return o

    @staticmethod
    def backward(ctx, do: torch.Tensor):
        scores, v, lse, o = ctx.saved_tensors
        p = torch.exp(scores - lse)
        delta = (do * o).sum(-1, keepdim=True)
        return p * (do @ v.transpose(-2, -1) - delta), p.transpose(-2, -1) @ do
