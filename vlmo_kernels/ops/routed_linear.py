"""`routed_linear`: a dense layer whose weights are chosen by modality."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlmo_kernels.layout import Experts, ModalityLayout
from vlmo_kernels.runtime.dispatch import Request, implementation, select
from vlmo_kernels.runtime.library import define
from vlmo_kernels.runtime.route import Route

from . import common

FIELDS = 3  # weights, biases, gammas
_ROUTE = "Tensor offsets, Tensor? host_offsets, int[] segments"
define(
    "routed_linear(Tensor x, Tensor[] weights, int[] at, Tensor? residual, Tensor? row_scale, "
    f"{_ROUTE}, str impl) -> Tensor"
)
define(
    "routed_linear_backward(Tensor dy, Tensor x, Tensor[] weights, int[] at, Tensor? row_scale, "
    f"{_ROUTE}, bool need_dx, bool[] need, str impl) -> (Tensor, Tensor[])"
)


def routed_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None] | None,
    layout: ModalityLayout,
    experts: Experts | None = None,
    *,
    gamma: Sequence[torch.Tensor | None] | None = None,
    residual: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """`residual + row_scale * gamma[e] * (x @ weights[e].T + biases[e])`, `e` the expert of the row.

    Args:
        x: `[T, K]` packed rows; fp32, bf16, fp16 (fp64 in the reference).
        weights: one `[N, K]` per expert, dtype of `x` (any under autocast).
        biases: one `[N]` or None per expert, or None.
        layout: the plan of the batch.
        experts: modality or group to expert; by default the i-th modality has expert i, or all the one.
        gamma: LayerScale, one `[N]` or None per expert (Touvron et al. 2021, "Going deeper with Image
            Transformers"), any floating dtype.
        residual: `[T, N]`, any floating dtype.
        row_scale: fp32 `[T]`, DropPath's factor (Huang et al. 2016); not differentiated.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        `[T, N]` in the dtype of the residual, else the compute dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `experts` misses a modality.
        TypeError: an argument of another kind.
        NotImplementedError: `row_scale` requires a gradient.
        RuntimeError: no implementation can run here.
    """
    op = "routed_linear"
    common.check_rows(op, "x", x, layout)
    dtype = common.compute_dtype(x)
    ws = common.per_expert(op, "weights", weights, len(weights) if isinstance(weights, Sequence) else 0)
    if not ws:
        raise ValueError(f"{op}: `weights` must have at least one expert, got {weights!r}")
    width = ws[0].shape[0] if isinstance(ws[0], torch.Tensor) else None
    bs = common.per_expert(op, "biases", biases, len(ws))
    gs = common.per_expert(op, "gamma", gamma, len(ws))
    for e in range(len(ws)):
        common.check_shape(op, f"weights[{e}]", ws[e], (width, x.shape[1]), x)
        for name, t in (("biases", bs[e]), ("gamma", gs[e])):
            if t is not None:
                common.check_shape(op, f"{name}[{e}]", t, (width,), x)
    common.check_epilogue(op, x, width, residual, row_scale)
    route = layout.route(experts, len(ws), op)
    if not torch.is_autocast_enabled(x.device.type):
        for e, t in enumerate(ws):
            common.check_dtype(op, f"weights[{e}]", t, dtype)
    impl = select(Request(op, x.device, dtype), impl)
    tensors, at = common.encode([common.cast(ws, dtype), common.cast(bs, dtype), gs])
    return torch.ops.vlmo_kernels.routed_linear(
        x.to(dtype), tensors, at, residual, row_scale,
        route.offsets, route.host_offsets, route.flat_segments(), impl,
    )  # fmt: skip


def _forward(x, weights, at, residual, row_scale, offsets, host_offsets, segments, impl):
    route = Route.from_flat(offsets, host_offsets, segments)
    x = common.contiguous_rows(x)
    return implementation("routed_linear", impl, x).forward(
        x, *common.decode(weights, at, FIELDS), route, residual, row_scale
    )


def _forward_meta(x, weights, at, residual, row_scale, offsets, host_offsets, segments, impl):
    dtype = x.dtype if residual is None else residual.dtype
    return x.new_empty(x.shape[0], weights[at[0]].shape[0], dtype=dtype)


def _setup(ctx, inputs, output) -> None:
    x, weights, at, residual, row_scale, offsets, host_offsets, segments, impl = inputs
    ctx.save_for_backward(x, row_scale, offsets, host_offsets, *weights)
    ctx.at, ctx.segments, ctx.impl = at, segments, impl
    ctx.has_residual = residual is not None


def _autograd(ctx, dy):
    x, row_scale, offsets, host_offsets, *weights = ctx.saved_tensors
    need_dx, need = ctx.needs_input_grad[0], list(ctx.needs_input_grad[1])
    dx, grads = torch.ops.vlmo_kernels.routed_linear_backward(
        dy, x, weights, ctx.at, row_scale, offsets, host_offsets, ctx.segments, need_dx, need, ctx.impl
    )
    grads = [common.wanted(g, n) for g, n in zip(grads, need, strict=True)]
    return (common.wanted(dx, need_dx), grads, None, common.wanted(dy, ctx.needs_input_grad[3]), *[None] * 5)


def _backward(dy, x, weights, at, row_scale, offsets, host_offsets, segments, need_dx, need, impl):
    route = Route.from_flat(offsets, host_offsets, segments)
    dx, *grads = implementation("routed_linear", impl, x).backward(
        dy.contiguous(), common.contiguous_rows(x), *common.decode(weights, at, FIELDS), route, row_scale,
        need_dx, *common.flags(need, at, FIELDS),
    )  # fmt: skip
    return (common.absent(x) if dx is None else dx), common.collect(grads, at, weights)


def _backward_meta(dy, x, weights, at, row_scale, offsets, host_offsets, segments, need_dx, need, impl):
    grads = [w.new_empty(w.shape if n else 0) for w, n in zip(weights, need, strict=True)]
    return x.new_empty(x.shape if need_dx else 0), grads


common.register("routed_linear", _forward, _forward_meta, _setup, _autograd)
common.register_backward("routed_linear_backward", _backward, _backward_meta)
