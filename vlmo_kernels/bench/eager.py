"""The ops as users write them, unfused and op by op: the measure of rounding that `check` grants."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vlmo_kernels.layout import ModalityLayout

from .probe import Call

FORMS = {"shared_attention": ("scores", "sdpa"), "mome_block": ("scores", "sdpa")}


def run(call: Call, form: str = "scores") -> torch.Tensor:
    """The result of a probe in eager torch, experts by row index, attention sample by sample.

    Eager torch attends in two ways: with a score matrix, or by its fused attention, whose backward computes the
    probabilities again from a rounded log-sum-exp. `form` "sdpa" is the second, which gives the bias no gradient.
    """
    t = call.tensors if form == "scores" else call.tensors | {"form": form}
    return _FUNCTIONS[call.op](t, call.layout)


def _routed(layout: ModalityLayout, rows: int, function) -> torch.Tensor:
    """`function(expert, rows)` for the rows of both modalities, which are contiguous."""
    middle = int(layout.group_offsets[2])
    return torch.cat([function(0, slice(0, middle)), function(1, slice(middle, rows))])


def _linear(t, layout):
    x, r = t["x"], t["residual"]
    return _routed(layout, len(x), lambda e, s: r[s] + t[f"gamma{e}"] * F.linear(x[s], t[f"w{e}"], t[f"b{e}"]))


def _normed(t, layout, x):
    return _routed(layout, len(x), lambda e, s: F.layer_norm(x[s], x.shape[1:], t[f"n{e}"], t[f"m{e}"], 1e-6))


def _norm(t, layout):
    z = t["x"] + t["residual"]
    return torch.cat([_normed(t, layout, z), z], dim=1)


def _ffn(t, layout, x=None, residual=None):
    x, r = (t["x"], t["residual"]) if x is None else (x, residual)

    def expert(e, s):
        h = F.gelu(F.linear(x[s], t[f"w1{e}"], t[f"b1{e}"]))
        return r[s] + t[f"gamma{e}"] * F.linear(h, t[f"w2{e}"], t[f"b2{e}"])

    return _routed(layout, len(x), expert)


def _attention(t, layout, q=None, k=None, v=None):
    q, k, v = (t["q"], t["k"], t["v"]) if q is None else (q, k, v)
    at = layout.cu_seqlens.tolist()
    outs, order = [q[:0]], []
    for start, end in zip(at[:-1], at[1:], strict=True):
        rows = layout.rows[start:end].long()
        where = layout.positions[rows].long()
        qs, ks, vs = (a[rows].transpose(0, 1) for a in (q, k, v))
        bias = t["bias"][:, where[:, None], where]
        outs.append(_attend(qs, ks, vs, bias, fused="form" in t).transpose(0, 1))
        order.append(rows)
    if not order:
        return torch.cat(outs)
    return torch.cat(outs)[torch.cat(order).argsort()]


def _attend(q, k, v, bias, fused):
    """`[H, n, Dh]` each."""
    if fused and q.shape[1]:
        operands = (a[None] for a in (q, k, v))
        return F.scaled_dot_product_attention(*operands, attn_mask=bias.detach()[None].to(q.dtype))[0]
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = (q * q.shape[-1] ** -0.5).to(dtype) @ k.to(dtype).transpose(1, 2)
    return (scores + bias).softmax(-1).to(v.dtype) @ v


def _block(t, layout):
    x, heads = t["x"], 2
    width = x.shape[1]
    h = F.layer_norm(x, (width,), t["n"], t["m"], 1e-6)
    q, k, v = F.linear(h, t["qkv"], t["qkv_b"]).view(len(x), 3, heads, width // heads).unbind(1)
    o = _attention(t, layout, q, k, v).reshape(len(x), width)
    x = x + t["gamma"] * F.linear(o, t["proj"], t["proj_b"])
    return _ffn(t, layout, _normed(t, layout, x), x)


_FUNCTIONS = {
    "routed_linear": _linear,
    "routed_norm": _norm,
    "routed_ffn": _ffn,
    "shared_attention": _attention,
    "mome_block": _block,
}
