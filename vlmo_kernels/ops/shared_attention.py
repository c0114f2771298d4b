"""`shared_attention`: attention within each sample, over packed rows of any modality."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmo_kernels.layout import ModalityLayout
from vlmo_kernels.runtime.check import checks_on_device
from vlmo_kernels.runtime.dispatch import Request, implementation, select
from vlmo_kernels.runtime.library import define
from vlmo_kernels.runtime.sequences import Sequences

from . import common

_TAIL = (
    "Tensor? bias, Tensor? prefix, Tensor cu_seqlens, Tensor rows, Tensor positions, SymInt max_seqlen, "
    "bool causal, float scale"
)
define(f"shared_attention(Tensor q, Tensor k, Tensor v, {_TAIL}, str impl) -> (Tensor, Tensor)")
define(
    f"shared_attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_TAIL}, "
    "bool need_dbias, str impl) -> (Tensor, Tensor, Tensor, Tensor)"
)
define(f"shared_attention_packed(Tensor qkv, {_TAIL}, str impl) -> (Tensor, Tensor)")
define(
    f"shared_attention_packed_backward(Tensor do, Tensor qkv, Tensor o, Tensor lse, {_TAIL}, "
    "bool need_dbias, str impl) -> (Tensor, Tensor)"
)


@dataclass(frozen=True)
class RelativePositionBias:
    """A bias looked up in a table: `bias[h, i, j] = table[index[i, j], h]` (Liu et al. 2021, "Swin").

    Attributes:
        table: `[R, H]`; gets its gradient.
        index: int32 or int64 `[N, N]`, by query and key position.
    """

    table: torch.Tensor
    index: torch.Tensor

    def dense(self) -> torch.Tensor:
        """`[H, N, N]` in the dtype of the table.

        Raises:
            TypeError: `table` or `index` is no tensor.
            ValueError: other shapes, an index that is not int32 or int64, two devices, or on the host (on a device
                with `VLMO_KERNELS_CHECK=1`) an index that names no row.
        """
        self._check()
        flat = self.table[self.index.reshape(-1)]
        return flat.view(*self.index.shape, self.table.shape[1]).permute(2, 0, 1).contiguous()

    def _check(self) -> None:
        op, table, index = "RelativePositionBias", self.table, self.index
        for name, t in (("table", table), ("index", index)):
            if not isinstance(t, torch.Tensor):
                raise TypeError(f"{op}: `{name}` must be a tensor, got {type(t).__name__}")
        if table.dim() != 2 or index.dim() != 2 or index.shape[0] != index.shape[1]:
            raise ValueError(
                f"{op}: `table` must be [R, H] and `index` [N, N], got {list(table.shape)} and {list(index.shape)}"
            )
        if index.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{op}: `index` must be int32 or int64, got {index.dtype}")
        if table.device != index.device:
            raise ValueError(f"{op}: `table` and `index` must be on one device, got {table.device} and {index.device}")
        if index.numel() and checks_on_device(index):
            low, high = (int(end) for end in index.aminmax())
            if low < 0 or high >= table.shape[0]:
                raise ValueError(
                    f"{op}: `index` must name rows of `table`, 0 to {table.shape[0] - 1}, got {low} to {high}"
                )


def shared_attention(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    layout: ModalityLayout,
    *,
    bias: torch.Tensor | RelativePositionBias | None = None,
    causal: bool = False,
    prefix: torch.Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Softmax attention of every sample over all its tokens, whatever their modality; no padding.

    Args:
        q: `[T, H, Dh]`, or `[T, 3, H, Dh]` holding q, k and v (then `k` and `v` are None).
        k, v: `[T, Hk, Dh]`; `H` must be a multiple of `Hk` (grouped-query attention).
        layout: the plan of the batch.
        bias: added to the scores, `[H, N, N]` indexed by token positions, or a `RelativePositionBias`.
        causal: a key is visible if its position is not after the query's.
        prefix: int32 `[B]`, only with `causal`: keys before this position are visible to all queries.
        scale: factor on the scores, `Dh ** -0.5` by default.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        `[T, H, Dh]`. A query that sees no key gives 0.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        TypeError: an argument of another kind.
        NotImplementedError: heads of more than 256 elements in Triton.
        RuntimeError: no implementation can run here.
    """
    op = "shared_attention"
    packed = k is None and v is None
    if not packed and (k is None or v is None):
        raise ValueError(f"{op}: `k` and `v` must both be given, or both be None with a packed `q`")
    common.check_rows(op, "q", q, layout, dims=4 if packed else 3)
    if packed and (q.shape[1] != 3 or q.shape[2] == 0):
        raise ValueError(f"{op}: a packed `q` must be [T, 3, H, Dh] with a head or more, got {list(q.shape)}")
    heads, head_dim = q.shape[-2:]
    if not packed:
        _check_kv(op, q, k, v, layout)
    if not isinstance(causal, bool):
        raise TypeError(f"{op}: `causal` must be True or False, got {causal!r}")
    dtype = common.compute_dtype(q)
    if isinstance(bias, RelativePositionBias):
        bias = bias.dense()
    if bias is not None:
        if not isinstance(bias, torch.Tensor):
            raise TypeError(f"{op}: `bias` must be a tensor or a RelativePositionBias, got {type(bias).__name__}")
        if not bias.is_floating_point():
            raise TypeError(
                f"{op}: `bias` must be floating, it is added to the scores, got {bias.dtype}. Hint: which tokens there "
                "are is in the layout; a mask is torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)"
            )
        if bias.dim() != 3 or bias.shape[0] != heads or min(bias.shape[1:]) < layout.max_seqlen:
            raise ValueError(
                f"{op}: `bias` must be [{heads}, N, N] with N at least {layout.max_seqlen} (the layout's "
                f"positions), got {list(bias.shape)}"
            )
        common.check_shape(op, "bias", bias, bias.shape, q)
        bias = bias.to(torch.promote_types(bias.dtype, dtype) if dtype == torch.float64 else bias.dtype)
    if prefix is not None:
        common.check_shape(op, "prefix", prefix, (layout.batch,), q)
        if prefix.dtype != torch.int32:
            raise ValueError(f"{op}: `prefix` must be int32, got {prefix.dtype}")
        if not causal:
            raise ValueError(f"{op}: `prefix` needs causal=True, got causal=False")
        prefix = prefix.contiguous()  # a column of a table, or one number expanded: kernels read it as a table
    scale = head_dim**-0.5 if scale is None else common.check_number(op, "scale", scale)
    impl = select(Request(op, q.device, dtype), impl)
    seqs = layout.sequences()
    tail = (bias, prefix, seqs.cu_seqlens, seqs.rows, seqs.positions, seqs.max_seqlen, causal, scale, impl)
    if packed:
        return torch.ops.vlmo_kernels.shared_attention_packed(q.to(dtype), *tail)[0]
    return torch.ops.vlmo_kernels.shared_attention(q.to(dtype), k.to(dtype), v.to(dtype), *tail)[0]


def _check_kv(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: ModalityLayout) -> None:
    for name, t in (("k", k), ("v", v)):
        common.check_rows(op, name, t, layout, dims=3)
        if t.dtype != q.dtype and not torch.is_autocast_enabled(q.device.type):
            raise ValueError(f"{op}: `{name}` must have the dtype of `q`, {q.dtype}, got {t.dtype}")
    if k.shape != v.shape or k.shape[2] != q.shape[2] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{op}: `k` and `v` must be [T, Hk, {q.shape[2]}] with Hk dividing {q.shape[1]}, "
            f"got {list(k.shape)} and {list(v.shape)}"
        )


def _forward(q, k, v, bias, prefix, cu_seqlens, rows, positions, max_seqlen, causal, scale, impl):
    seqs = Sequences(cu_seqlens, rows, positions, max_seqlen)
    q, k, v = (common.contiguous_rows(t) for t in (q, k, v))
    return implementation("shared_attention", impl, q).forward(q, k, v, seqs, bias, causal, prefix, scale)


def _forward_meta(q, k, v, bias, prefix, cu_seqlens, rows, positions, max_seqlen, causal, scale, impl):
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


def _setup(ctx, inputs, output) -> None:
    q, k, v, bias, prefix, cu_seqlens, rows, positions, max_seqlen, causal, scale, impl = inputs
    o, lse = output
    ctx.save_for_backward(q, k, v, o, lse, bias, prefix, cu_seqlens, rows, positions)
    ctx.tail = max_seqlen, causal, scale
    ctx.impl = impl
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _autograd(ctx, do, _lse):
    if do is None:
        return (None,) * 12
    q, k, v, o, lse, *tables = ctx.saved_tensors
    need_dbias = ctx.needs_input_grad[3]
    dq, dk, dv, dbias = torch.ops.vlmo_kernels.shared_attention_backward(
        do, q, k, v, o, lse, *tables, *ctx.tail, need_dbias, ctx.impl
    )
    return dq, dk, dv, common.wanted(dbias, need_dbias), *[None] * 8


def _backward(
    do,
    q,
    k,
    v,
    o,
    lse,
    bias,
    prefix,
    cu_seqlens,
    rows,
    positions,
    max_seqlen,
    causal,
    scale,
    need_dbias,
    impl,
):
    seqs = Sequences(cu_seqlens, rows, positions, max_seqlen)
    q, k, v = (common.contiguous_rows(t) for t in (q, k, v))
    grads = tuple(t.new_empty(t.shape) for t in (q, k, v))
    dbias = implementation("shared_attention", impl, q).backward(
        do.contiguous(), q, k, v, o, lse, seqs, bias, causal, prefix, scale, need_dbias, grads
    )
    return *grads, (common.absent(q) if dbias is None else dbias)


def _backward_meta(
    do,
    q,
    k,
    v,
    o,
    lse,
    bias,
    prefix,
    cu_seqlens,
    rows,
    positions,
    max_seqlen,
    causal,
    scale,
    need_dbias,
    impl,
):
    dbias = bias.new_empty(bias.shape) if need_dbias else common.absent(q)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _packed_forward(qkv, *tail):
    return _forward(*qkv.unbind(1), *tail)


def _packed_forward_meta(qkv, *tail):
    return _forward_meta(*qkv.unbind(1), *tail)


def _packed_setup(ctx, inputs, output) -> None:
    qkv, bias, prefix, cu_seqlens, rows, positions, max_seqlen, causal, scale, impl = inputs
    o, lse = output
    ctx.save_for_backward(qkv, o, lse, bias, prefix, cu_seqlens, rows, positions)
    ctx.tail = max_seqlen, causal, scale
    ctx.impl = impl
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _packed_autograd(ctx, do, _lse):
    if do is None:
        return (None,) * 10
    need_dbias = ctx.needs_input_grad[1]
    dqkv, dbias = torch.ops.vlmo_kernels.shared_attention_packed_backward(
        do, *ctx.saved_tensors, *ctx.tail, need_dbias, ctx.impl
    )
    return dqkv, common.wanted(dbias, need_dbias), *[None] * 8


def _packed_backward(
    do, qkv, o, lse, bias, prefix, cu_seqlens, rows, positions, max_seqlen, causal, scale, need_dbias, impl
):
    seqs = Sequences(cu_seqlens, rows, positions, max_seqlen)
    qkv = common.contiguous_rows(qkv)
    dqkv = qkv.new_empty(qkv.shape)
    dbias = implementation("shared_attention", impl, qkv).backward(
        do.contiguous(), *qkv.unbind(1), o, lse, seqs, bias, causal, prefix, scale, need_dbias, dqkv.unbind(1)
    )
    return dqkv, (common.absent(qkv) if dbias is None else dbias)


def _packed_backward_meta(
    do, qkv, o, lse, bias, prefix, cu_seqlens, rows, positions, max_seqlen, causal, scale, need_dbias, impl
):
    return qkv.new_empty(qkv.shape), (bias.new_empty(bias.shape) if need_dbias else common.absent(qkv))


common.register("shared_attention", _forward, _forward_meta, _setup, _autograd)
common.register_backward("shared_attention_backward", _backward, _backward_meta)
common.register(
    "shared_attention_packed", _packed_forward, _packed_forward_meta, _packed_setup, _packed_autograd
)
common.register_backward("shared_attention_packed_backward", _packed_backward, _packed_backward_meta)
