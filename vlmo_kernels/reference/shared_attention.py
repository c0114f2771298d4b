"""Reference of `shared_attention`: attention within each sample, over rows of any modality."""

from __future__ import annotations

import torch

from .common import working

Optional = torch.Tensor | None


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seqs,
    bias: Optional,
    causal: bool,
    prefix: Optional,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled dot-product attention (Vaswani et al. 2017) of every sample.

    Args:
        q: `[T, H, Dh]`.
        k, v: `[T, Hk, Dh]`, `H` a multiple of `Hk` (grouped-query attention, Ainslie et al. 2023).
        seqs: `vlmo_kernels.runtime.sequences.Sequences`.
        bias: `[H, N, N]` added to the scores, indexed by query and key position, or None.
        causal: a key is visible if its position is not after the query's.
        prefix: int32 `[B]`; under `causal`, keys before position `prefix[b]` are visible to every query.
        scale: factor on the scores.

    Returns:
        `o` `[T, H, Dh]` and the natural log-sum-exp of the scores `[H, T]` in fp32 (fp64 for fp64), by
        packed row; a query that sees no key gives 0 and -inf. Rows past the live ones are zero.
    """
    wide = working(q.dtype)
    o = q.new_zeros(q.shape)
    lse = q.new_zeros(q.shape[1], q.shape[0], dtype=wide)
    for rows, b in _samples(seqs):
        s = _scores(q[rows].to(wide), k[rows].to(wide), scale)
        s = _masked(s, seqs.positions[rows], bias, causal, None if prefix is None else prefix[b])
        peak = torch.logsumexp(s, -1)
        p = _probabilities(s, peak)
        o[rows] = torch.einsum("hij,jhd->ihd", p, _per_query_head(v[rows].to(wide), q.shape[1])).to(o.dtype)
        lse[:, rows] = peak
    return o, lse


def backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    seqs,
    bias: Optional,
    causal: bool,
    prefix: Optional,
    scale: float,
    need_dbias: bool,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> Optional:
    """Writes the gradients of q, k and v into `out` and returns that of the bias (Dao et al. 2022).

    `dS = P * (dP - rowsum(P * dP))`. Kernels take `P` from the log-sum-exp and `rowsum(do * o)`, which is
    the same sum; here both come anew from the scores, free of what the forward's outputs were rounded to.
    """
    wide = working(q.dtype)
    heads, kv_heads = q.shape[1], k.shape[1]
    dbias = torch.zeros(bias.shape, dtype=working(bias.dtype), device=bias.device) if need_dbias else None
    dq, dk, dv = (t.zero_() for t in out)
    for rows, b in _samples(seqs):
        qs, ks, vs, g = (t[rows].to(wide) for t in (q, k, v, do))
        s = _scores(qs, ks, scale)
        s = _masked(s, seqs.positions[rows], bias, causal, None if prefix is None else prefix[b])
        p = _probabilities(s, torch.logsumexp(s, -1))
        dp = torch.einsum("ihd,jhd->hij", g, _per_query_head(vs, heads))
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        if dbias is not None:
            at = seqs.positions[rows].long()
            dbias[:, at[:, None], at[None, :]] += ds
        dq[rows] = (torch.einsum("hij,jhd->ihd", ds, _per_query_head(ks, heads)) * scale).to(q.dtype)
        dk[rows] = (_per_kv_head(torch.einsum("hij,ihd->jhd", ds, qs), kv_heads) * scale).to(k.dtype)
        dv[rows] = _per_kv_head(torch.einsum("hij,ihd->jhd", p, g), kv_heads).to(v.dtype)
    return None if dbias is None else dbias.to(bias.dtype)


def _samples(seqs):
    at = seqs.cu_seqlens.tolist()
    for b, (start, end) in enumerate(zip(at[:-1], at[1:], strict=True)):
        if end > start:
            yield seqs.rows[start:end].long(), b


def _per_query_head(kv: torch.Tensor, heads: int) -> torch.Tensor:
    return kv.repeat_interleave(heads // kv.shape[1], dim=1)


def _per_kv_head(grad: torch.Tensor, kv_heads: int) -> torch.Tensor:
    return grad.unflatten(1, (kv_heads, -1)).sum(2)


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.einsum("ihd,jhd->hij", q, _per_query_head(k, q.shape[1])) * scale


def _masked(s: torch.Tensor, positions: torch.Tensor, bias: Optional, causal: bool, prefix: Optional):
    at = positions.long()
    if bias is not None:
        s = s + bias[:, at[:, None], at[None, :]].to(s.dtype)
    if causal:
        seen = at[None, :] <= at[:, None]
        if prefix is not None:
            seen = seen | (at[None, :] < prefix)
        s = s.masked_fill(~seen, float("-inf"))
    return s


def _probabilities(s: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    # A row without a visible key has lse = -inf; exp(-inf - -inf) would be NaN, and is 0 by definition.
    blind = torch.isneginf(lse)
    return torch.exp(s - lse.masked_fill(blind, 0.0)[:, :, None].to(s.dtype))
