"""CPU `shared_attention`: compiled flash attention over the row table, or torch's, sample by sample. No padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmo_kernels.reference import shared_attention as reference
from vlmo_kernels.runtime import compiled
from vlmo_kernels.runtime.sequences import Sequences

Optional = torch.Tensor | None
DTYPES = (torch.float32, torch.bfloat16)


def why_not(request) -> str | None:
    """Why this path cannot take a call, or None."""
    if request.dtype in DTYPES or (request.dtype == torch.float16 and compiled.cpu_ops() is not None):
        return None
    if request.dtype == torch.float16:
        return f"torch's CPU flash attention is used in fp32 and bf16, got {request.dtype}; compiled: {_missing()}"
    return f"takes fp32, bf16 and fp16, got {request.dtype}"


def how(request) -> str:
    """What runs, for `explain`."""
    if compiled.cpu_ops() is not None:
        return f"compiled kernels ({compiled.instructions()})"
    return f"torch's flash attention, sample by sample; compiled kernels: {_missing()}"


def _missing() -> str | None:
    return compiled.why_not("vlmo_kernels_cpu")


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
    if compiled.cpu_ops() is not None:
        return _compiled_forward(q, k, v, seqs, bias, causal, prefix, scale)
    order = _order(seqs)
    masks = _Masks.build(order, bias, causal, prefix, q.dtype)
    parts = _gather(order, q.shape[1], q, k, v)
    o = q.new_empty(order.rows.shape[0], *q.shape[1:])  # sample-major
    lse = q.new_empty(q.shape[1], o.shape[0], dtype=torch.float32)
    for b, (start, end) in enumerate(order.spans):
        if start == end:
            continue
        out, peak = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_heads(t, start, end) for t in parts), 0.0, False, attn_mask=masks.of(b), scale=scale
        )
        blind = torch.isneginf(peak) | torch.isnan(peak) if masks.may_hide_all else None
        if blind is not None and blind.any():
            out = out.masked_fill(blind.unsqueeze(-1), 0.0)
            peak = peak.masked_fill(blind, float("-inf"))
        o[start:end] = out[0].transpose(0, 1)
        lse[:, start:end] = peak[0]
    return _to_packed(o, order, q.shape[0], 0), _to_packed(lse, order, q.shape[0], 1)


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

    Torch's kernel gives no bias gradient, so without the compiled one and with `need_dbias` the score matrix of
    one sample at a time is formed, as the reference does.
    """
    if compiled.cpu_ops() is not None:
        return _compiled_backward(do, q, k, v, o, lse, seqs, bias, causal, prefix, scale, need_dbias, out)
    if need_dbias:
        return reference.backward(do, q, k, v, o, lse, seqs, bias, causal, prefix, scale, True, out)
    order = _order(seqs)
    masks = _Masks.build(order, bias, causal, prefix, q.dtype)
    parts = _gather(order, q.shape[1], do, q, k, v, o)
    # A query without a visible key has lse -inf; with +inf its probabilities come out as the zeros they are.
    peaks = torch.where(torch.isneginf(lse), float("inf"), lse)[:, order.rows]
    for t in out:
        t.zero_()
    for b, (start, end) in enumerate(order.spans):
        if start == end:
            continue
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_heads(t, start, end) for t in parts), peaks[None, :, start:end].contiguous(), 0.0, False,
            attn_mask=masks.of(b), scale=scale,
        )  # fmt: skip
        for target, grad in zip(out, grads, strict=True):
            grad = grad[0]
            if grad.shape[0] != target.shape[1]:  # one key head serves several query heads
                grad = grad.unflatten(0, (target.shape[1], -1)).sum(1, dtype=torch.float32).to(grad.dtype)
            target[order.rows[start:end]] = grad.transpose(0, 1)
    return None


def _compiled_forward(q, k, v, seqs: Sequences, bias: Optional, causal: bool, prefix: Optional, scale: float):
    o = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    live = int(seqs.cu_seqlens[-1])
    o[live:] = 0
    lse[:, live:] = 0
    compiled.cpu_ops().attention_forward(
        q, k, v, _bias(bias, q), prefix, seqs.cu_seqlens, seqs.rows, seqs.positions, causal, scale, o, lse
    )
    return o, lse


def _compiled_backward(
    do, q, k, v, o, lse, seqs: Sequences, bias: Optional, causal: bool, prefix: Optional, scale: float,
    need_dbias: bool, out,
) -> Optional:  # fmt: skip
    ops = compiled.cpu_ops()
    live = int(seqs.cu_seqlens[-1])
    for t in out:
        t[live:] = 0
    parts = None
    if need_dbias:  # sums over groups of samples, added up here in order
        groups = ops.attention_dbias_groups(seqs.cu_seqlens.numel() - 1, k.shape[1])
        parts = bias.new_empty(groups, *bias.shape, dtype=torch.float32)
        if live == 0 or q.shape[2] == 0:
            parts.zero_()
    ops.attention_backward(
        do, q, k, v, o.contiguous(), lse.contiguous(), _bias(bias, q), prefix, seqs.cu_seqlens, seqs.rows,
        seqs.positions, causal, scale, *out, parts,
    )  # fmt: skip
    if parts is None:
        return None
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total.to(bias.dtype)


def _bias(bias: Optional, q: torch.Tensor) -> Optional:
    """In a dtype the compiled kernels read: fp32, or that of `q`."""
    if bias is None:
        return None
    return (bias if bias.dtype in (q.dtype, torch.float32) else bias.float()).contiguous()


@dataclass(frozen=True)
class _Order:
    """Tokens of every sample in an order in which, if possible, samples are prefixes of one another.

    Then a sample's block of the (reordered) bias is a corner of it, and needs no copy. In a batch of
    image-text pairs that is image first: the texts only differ in where they end.
    """

    rows: torch.Tensor  # int64 [live], sample-major position to packed row
    positions: torch.Tensor  # int64 [live], the same tokens' positions
    spans: list[tuple[int, int]]  # first and end sample-major position of every sample
    common: torch.Tensor  # int64 [N], positions in the common order
    nested: bool  # whether every sample is a prefix of `common`


def _order(seqs: Sequences) -> _Order:
    at = seqs.cu_seqlens.tolist()
    live = at[-1]
    rows = seqs.rows[:live].long()
    positions = seqs.positions[rows].long()
    lengths = seqs.cu_seqlens.diff().long()
    sample = torch.repeat_interleave(torch.arange(len(at) - 1, device="cpu"), lengths, output_size=live)
    uses = torch.bincount(positions, minlength=seqs.max_seqlen)
    common = torch.argsort(uses, descending=True, stable=True)
    rank = torch.empty_like(common)
    rank[common] = torch.arange(common.numel(), device="cpu")
    by_rank = torch.argsort(sample * (seqs.max_seqlen + 1) + rank[positions])
    rows, positions = rows[by_rank], positions[by_rank]
    within = torch.arange(live, device="cpu") - seqs.cu_seqlens.long()[sample]
    nested = torch.equal(rank[positions], within)
    return _Order(rows, positions, list(zip(at[:-1], at[1:], strict=True)), common, nested)


@dataclass(frozen=True)
class _Masks:
    """What is added to every sample's scores."""

    order: _Order
    bias: Optional  # [H, N, N]; in the common order if samples are nested
    causal: bool
    prefix: Optional
    dtype: torch.dtype
    may_hide_all: bool

    @staticmethod
    def build(order: _Order, bias: Optional, causal: bool, prefix: Optional, dtype: torch.dtype) -> _Masks:
        # Under a causal mask every token sees itself; only an -inf in the bias can leave a row without a key.
        may_hide_all = bias is not None and bool(torch.isneginf(bias).any())
        if bias is not None and order.nested:
            bias = bias.index_select(1, order.common).index_select(2, order.common).to(dtype)
        return _Masks(order, bias, causal, prefix, dtype, may_hide_all)

    def of(self, b: int) -> Optional:
        """`[1, H or 1, n, n]`, or None."""
        start, end = self.order.spans[b]
        at = self.order.positions[start:end]
        mask = None
        if self.bias is not None and self.order.nested:
            mask = self.bias[None, :, : end - start, : end - start]
        elif self.bias is not None:
            mask = self.bias.index_select(1, at).index_select(2, at).to(self.dtype)[None]
        if not self.causal:
            return mask
        seen = at[None, :] <= at[:, None]
        if self.prefix is not None:
            seen = seen | (at[None, :] < self.prefix[b])
        hidden = torch.zeros(seen.shape, dtype=self.dtype, device="cpu").masked_fill_(~seen, float("-inf"))[None, None]
        return hidden if mask is None else mask + hidden


def _gather(order: _Order, heads: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Packed `[T, Hk, Dh]` to sample-major `[live, H, Dh]`, key heads repeated."""
    parts = [t.index_select(0, order.rows) for t in tensors]
    return [t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], dim=1) for t in parts]


def _heads(t: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """One sample of a sample-major buffer as `[1, H, n, Dh]`, a view."""
    return t[start:end].transpose(0, 1)[None]


def _to_packed(t: torch.Tensor, order: _Order, rows: int, dim: int) -> torch.Tensor:
    """Sample-major to packed order along `dim`; dead rows repeat row 0, and nobody reads them."""
    place = torch.zeros(rows, dtype=torch.int64, device="cpu")
    place[order.rows] = torch.arange(order.rows.numel(), device="cpu")
    if order.rows.numel() == 0:
        return t.new_zeros([rows if d == dim else n for d, n in enumerate(t.shape)])
    return t.index_select(dim, place)
