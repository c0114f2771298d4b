"""`routed_norm`: LayerNorm or RMSNorm whose weights are chosen by modality."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlmo_kernels.layout import Experts, ModalityLayout
from vlmo_kernels.runtime.dispatch import Request, implementation, select
from vlmo_kernels.runtime.library import define
from vlmo_kernels.runtime.route import Route

from . import common

KINDS = ("layer", "rms", "rms1p")
FIELDS = 2  # weights, biases
_ROUTE = "Tensor offsets, Tensor? host_offsets, int[] segments"
define(
    "routed_norm(Tensor x, Tensor? residual, Tensor[] weights, int[] at, "
    f"{_ROUTE}, str kind, float eps, str impl) -> (Tensor, Tensor, Tensor, Tensor)"
)
define(
    "routed_norm_backward(Tensor dy, Tensor? dz, Tensor z, Tensor[] weights, int[] at, Tensor mean, "
    f"Tensor rstd, {_ROUTE}, str kind, bool[] need, str impl) -> (Tensor, Tensor[])"
)


def check_kind(op: str, kind: str) -> None:
    """ValueError for one that is not known."""
    if kind not in KINDS:
        raise ValueError(f"{op}: `kind` must be one of {', '.join(KINDS)}, got {kind!r}")


def routed_norm(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor | None],
    biases: Sequence[torch.Tensor | None] | None,
    layout: ModalityLayout,
    experts: Experts | None = None,
    *,
    kind: str = "layer",
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`norm(x + residual) * weights[e] + biases[e]`, `e` the expert of the row.

    Args:
        x: `[T, D]` packed rows.
        weights: one `[D]` or None per expert, any floating dtype.
        biases: one `[D]` or None per expert, or None.
        layout: the plan of the batch.
        experts: modality or group to expert; by default the i-th modality has expert i, or all the one.
        kind: "layer" (Ba et al. 2016), "rms" (Zhang and Sennrich 2019), "rms1p" (RMSNorm with the factor
            `1 + w`, as Gemma has it).
        eps: added to the variance.
        residual: `[T, D]`, any floating dtype, added before the norm.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        `[T, D]` in the dtype of `x`; with a residual also the sum, in the dtype of the residual.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `experts` misses a modality.
        TypeError: an argument of another kind.
        NotImplementedError: rows of more than 16384 elements in Triton.
        RuntimeError: no implementation can run here.
    """
    op = "routed_norm"
    common.check_rows(op, "x", x, layout)
    check_kind(op, kind)
    eps = common.check_eps(op, eps)
    ws = common.per_expert(op, "weights", weights, len(weights) if isinstance(weights, Sequence) else 1)
    bs = common.per_expert(op, "biases", biases, len(ws))
    if not ws:
        raise ValueError(f"{op}: `weights` must have at least one expert, got {weights!r}")
    for name, values in (("weights", ws), ("biases", bs)):
        for e, t in enumerate(values):
            if t is not None:
                common.check_shape(op, f"{name}[{e}]", t, (x.shape[1],), x)
    common.check_epilogue(op, x, x.shape[1], residual, None)
    route = layout.route(experts, len(ws), op)
    impl = select(Request(op, x.device, x.dtype, frozenset({kind})), impl)
    tensors, at = common.encode([ws, bs])
    y, z, _, _ = torch.ops.vlmo_kernels.routed_norm(
        x, residual, tensors, at, route.offsets, route.host_offsets, route.flat_segments(), kind, eps, impl
    )
    return y if residual is None else (y, z)


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _forward(x, residual, weights, at, offsets, host_offsets, segments, kind, eps, impl):
    route = Route.from_flat(offsets, host_offsets, segments)
    y, z, mean, rstd = implementation("routed_norm", impl, x, kind).forward(
        common.contiguous_rows(x), residual, *common.decode(weights, at, FIELDS), route, kind, eps
    )
    z = common.absent(x) if z is None else z.contiguous()
    return y.contiguous(), z, (common.absent(rstd) if mean is None else mean), rstd


def _forward_meta(x, residual, weights, at, offsets, host_offsets, segments, kind, eps, impl):
    z = common.absent(x) if residual is None else residual.new_empty(residual.shape)
    dtype = _statistics_dtype(x.dtype if residual is None else residual.dtype)
    mean = x.new_empty(x.shape[0] if kind == "layer" else 0, dtype=dtype)
    return x.new_empty(x.shape), z, mean, x.new_empty(x.shape[0], dtype=dtype)


def _setup(ctx, inputs, output) -> None:
    x, residual, weights, at, offsets, host_offsets, segments, kind, _, impl = inputs
    _, z, mean, rstd = output
    ctx.save_for_backward(x if residual is None else z, mean, rstd, offsets, host_offsets, *weights)
    ctx.at, ctx.segments, ctx.kind, ctx.impl = at, segments, kind, impl
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)


def _autograd(ctx, dy, dz, _mean, _rstd):
    z, mean, rstd, offsets, host_offsets, *weights = ctx.saved_tensors
    need = list(ctx.needs_input_grad[2])
    x_dtype, residual_dtype = ctx.dtypes
    if dy is None:
        dy = z.new_zeros(z.shape, dtype=x_dtype)
    dz = None if residual_dtype is None else dz
    dx, grads = torch.ops.vlmo_kernels.routed_norm_backward(
        dy, dz, z, weights, ctx.at, mean, rstd, offsets, host_offsets, ctx.segments, ctx.kind, need, ctx.impl
    )
    grads = [common.wanted(g, n) for g, n in zip(grads, need, strict=True)]
    dresidual = dx if ctx.needs_input_grad[1] else None
    return dx.to(x_dtype) if ctx.needs_input_grad[0] else None, dresidual, grads, *[None] * 7


def _backward(dy, dz, z, weights, at, mean, rstd, offsets, host_offsets, segments, kind, need, impl):
    route = Route.from_flat(offsets, host_offsets, segments)
    dx, *grads = implementation("routed_norm", impl, z, kind).backward(
        dy.contiguous(), None if dz is None else dz.contiguous(), common.contiguous_rows(z),
        *common.decode(weights, at, FIELDS), mean if kind == "layer" else None, rstd, route, kind,
        *common.flags(need, at, FIELDS),
    )  # fmt: skip
    return dx, common.collect(grads, at, weights)


def _backward_meta(dy, dz, z, weights, at, mean, rstd, offsets, host_offsets, segments, kind, need, impl):
    return z.new_empty(z.shape), [
        w.new_empty(w.shape if n else 0) for w, n in zip(weights, need, strict=True)
    ]


common.register("routed_norm", _forward, _forward_meta, _setup, _autograd)
common.register_backward("routed_norm_backward", _backward, _backward_meta)
