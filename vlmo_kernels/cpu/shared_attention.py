"""CPU `shared_attention`: torch's flash attention, samples of equal length together, no padding."""

from __future__ import annotations

import torch

from vlmo_kernels.reference import shared_attention as reference
from vlmo_kernels.runtime.sequences import Sequences

Optional = torch.Tensor | None
DTYPES = (torch.float32, torch.bfloat16)


def why_not(request) -> str | None:
    """Why this path cannot take a call, or None."""
    if request.dtype not in DTYPES:
        return f"torch's CPU flash attention is used in fp32 and bf16, got {request.dtype}"
    return None


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seqs: Sequences,
    bias: Optional,
    causal: bool,
    prefix: Optional,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `vlmo_kernels.reference.shared_attention.forward`."""
    o = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    for rows, samples in _by_length(seqs):
        qs, ks, vs = (_gather(t, rows, q.shape[1]) for t in (q, k, v))
        mask = _mask(rows, samples, seqs, bias, causal, prefix, q.dtype)
        os, peak = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            qs, ks, vs, 0.0, False, attn_mask=mask, scale=scale
        )
        if mask is not None and (causal or bias is not None):
            blind = torch.isneginf(peak) | torch.isnan(peak)
            os = torch.where(blind.unsqueeze(-1), 0.0, os)
            peak = torch.where(blind, float("-inf"), peak)
        o[rows.reshape(-1)] = os.transpose(1, 2).reshape(-1, *q.shape[1:])
        lse[:, rows.reshape(-1)] = peak.transpose(0, 1).reshape(q.shape[1], -1).float()
    return o, lse


def backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    seqs: Sequences,
    bias: Optional,
    causal: bool,
    prefix: Optional,
    scale: float,
    need_dbias: bool,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> Optional:
    """See `vlmo_kernels.reference.shared_attention.backward`.

    Torch's kernel gives no bias gradient, so with `need_dbias` the score matrix of one sample at a time
    is formed, as the reference does.
    """
    if need_dbias:
        return reference.backward(do, q, k, v, o, lse, seqs, bias, causal, prefix, scale, True, out)
    for t in out:
        t.zero_()
    for rows, samples in _by_length(seqs):
        g, qs, ks, vs, os = (_gather(t, rows, q.shape[1]) for t in (do, q, k, v, o))
        mask = _mask(rows, samples, seqs, bias, causal, prefix, q.dtype)
        flat = rows.reshape(-1)
        peak = lse[:, flat].view(q.shape[1], *rows.shape).transpose(0, 1).contiguous()
        # A query without a visible key has lse -inf; with +inf its probabilities come out as the zeros they are.
        peak = torch.where(torch.isneginf(peak), float("inf"), peak)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, qs, ks, vs, os, peak, 0.0, False, attn_mask=mask, scale=scale
        )
        for target, grad in zip(out, grads, strict=True):
            heads = target.shape[1]
            if grad.shape[1] != heads:
                grad = grad.unflatten(1, (heads, -1)).sum(2, dtype=torch.float32).to(grad.dtype)
            target[flat] = grad.transpose(1, 2).reshape(-1, *target.shape[1:])
    return None


def _by_length(seqs: Sequences):
    """Samples of equal length as one `[b, n]` table of packed rows, with their indices."""
    at = seqs.cu_seqlens.long()
    lengths = at.diff()
    for n in lengths.unique().tolist():
        if n:
            samples = (lengths == n).nonzero().view(-1)
            places = at[samples, None] + torch.arange(n)
            yield seqs.rows[places].long(), samples


def _gather(t: torch.Tensor, rows: torch.Tensor, heads: int) -> torch.Tensor:
    """`[T, Hk, Dh]` to `[b, H, n, Dh]`."""
    part = t[rows.reshape(-1)].view(*rows.shape, *t.shape[1:])
    if t.shape[1] != heads:
        part = part.repeat_interleave(heads // t.shape[1], dim=2)
    return part.transpose(1, 2)


def _mask(rows, samples, seqs, bias, causal, prefix, dtype) -> Optional:
    """What is added to the scores, `[b or 1, H or 1, n, n]`, or None."""
    if bias is None and not causal:
        return None
    at = seqs.positions[rows].long()
    same = bool((at == at[:1]).all()) and prefix is None
    if same:
        at = at[:1]
    mask = None
    if bias is not None:
        mask = bias[:, at[:, :, None], at[:, None, :]].transpose(0, 1).to(dtype)
    if causal:
        seen = at[:, None, :] <= at[:, :, None]
        if prefix is not None:
            seen = seen | (at[:, None, :] < prefix[samples, None, None])
        hidden = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))[:, None]
        mask = hidden if mask is None else mask + hidden
    return mask
