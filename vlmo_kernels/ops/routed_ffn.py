"""`routed_ffn`: the modality-routed feed-forward network with its whole epilogue."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlmo_kernels.layout import Experts, ModalityLayout
from vlmo_kernels.runtime.dispatch import Request, implementation, select
from vlmo_kernels.runtime.ffn_weights import FFNWeights
from vlmo_kernels.runtime.library import define
from vlmo_kernels.runtime.route import Route

from . import common

PLAIN = ("gelu", "gelu_tanh", "relu", "silu")
GATED = ("swiglu", "geglu", "geglu_tanh")
RECOMPUTE = ("activation", "full")
FIELDS = len(FFNWeights._fields)
_ROUTE = "Tensor offsets, Tensor? host_offsets, int[] segments"
define(
    "routed_ffn(Tensor x, Tensor[] weights, int[] at, Tensor? residual, Tensor? row_scale, "
    f"{_ROUTE}, str activation, float eps, bool save, str impl) -> (Tensor, Tensor, Tensor)"
)
define(
    "routed_ffn_backward(Tensor dy, Tensor x, Tensor[] weights, int[] at, Tensor? pre, Tensor? up, "
    f"Tensor? row_scale, {_ROUTE}, str activation, float eps, bool need_dx, bool[] need, str impl) "
    "-> (Tensor, Tensor[])"
)


def check_options(op: str, activation: str, recompute: str) -> None:
    """ValueError for a name that is not known."""
    for name, value, known in (
        ("activation", activation, (*PLAIN, *GATED)), ("recompute", recompute, RECOMPUTE)
    ):
        if value not in known:
            raise ValueError(f"{op}: `{name}` must be one of {', '.join(known)}, got {value!r}")


def routed_ffn(
    x: torch.Tensor,
    w1: Sequence[torch.Tensor],
    b1: Sequence[torch.Tensor | None] | None,
    w2: Sequence[torch.Tensor],
    b2: Sequence[torch.Tensor | None] | None,
    layout: ModalityLayout,
    experts: Experts | None = None,
    *,
    activation: str = "gelu",
    w_up: Sequence[torch.Tensor] | None = None,
    b_up: Sequence[torch.Tensor | None] | None = None,
    gamma: Sequence[torch.Tensor | None] | None = None,
    inner_norm: tuple[Sequence[torch.Tensor | None], Sequence[torch.Tensor | None] | None] | None = None,
    residual: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    eps: float = 1e-5,
    recompute: str = "activation",
    impl: str = "auto",
) -> torch.Tensor:
    """`residual + row_scale * gamma * (norm(act(x w1' + b1)) w2' + b2)`, all weights those of the row's expert.

    Mixture of modality experts (Bao et al. 2022, "VLMo", section 3.1). With a gated activation the
    hidden value is `act(x w1' + b1) * (x w_up' + b_up)` (Shazeer 2020).

    Args:
        x: `[T, D]` packed rows; fp32, bf16, fp16 (fp64 in the reference).
        w1, b1: first layer, one `[F, D]` and one `[F]` or None per expert; gated: the gate. Without
            `w_up`, a gated `w1` is `[2F, D]` and holds the gate above the up projection.
        w2, b2: second layer, one `[D_out, F]` and one `[D_out]` or None per expert.
        layout: the plan of the batch.
        experts: modality or group to expert; by default the i-th modality has expert i, or all the one.
        activation: "gelu" (exact), "gelu_tanh", "relu", "silu", or gated "swiglu", "geglu", "geglu_tanh".
        w_up, b_up: up projection of gated activations, as `w1` and `b1`.
        gamma: LayerScale, one `[D_out]` or None per expert, any floating dtype.
        inner_norm: weights and biases, `[F]` per expert, of a LayerNorm on the hidden values (BEiT-3).
        residual: `[T, D_out]`, any floating dtype.
        row_scale: fp32 `[T]`, DropPath's factor; not differentiated.
        eps: of the inner norm.
        recompute: "activation" keeps the pre-activation for backward, "full" computes it again.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        `[T, D_out]` in the dtype of the residual, else the compute dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `experts` misses a modality.
        TypeError: an argument of another kind.
        NotImplementedError: `row_scale` requires a gradient.
        RuntimeError: no implementation can run here.
    """
    op = "routed_ffn"
    common.check_rows(op, "x", x, layout)
    check_options(op, activation, recompute)
    eps = common.check_eps(op, eps)
    weights = _weights(op, x, w1, b1, w2, b2, w_up, b_up, gamma, inner_norm, activation)
    common.check_epilogue(op, x, weights.w2[0].shape[0], residual, row_scale)
    route = layout.route(experts, weights.experts, op)
    dtype = common.compute_dtype(x)
    if not torch.is_autocast_enabled(x.device.type):
        for name, values in (("w1", weights.w1), ("w2", weights.w2), ("w_up", weights.w_up)):
            for e, t in enumerate(values):
                if t is not None:
                    common.check_dtype(op, f"{name}[{e}]", t, dtype)
    impl = select(Request(op, x.device, dtype, frozenset({activation})), impl)
    kept = {"gamma": weights.gamma}  # LayerScale stays in its own dtype: it only scales the fp32 epilogue
    typed = FFNWeights(*(kept.get(n, common.cast(f, dtype)) for n, f in weights._asdict().items()))
    tensors, at = common.encode(typed)
    differentiated = torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in tensors))
    y, _, _ = torch.ops.vlmo_kernels.routed_ffn(
        x.to(dtype), tensors, at, residual, row_scale, route.offsets, route.host_offsets, route.flat_segments(),
        activation, eps, differentiated and recompute == "activation", impl,
    )  # fmt: skip
    return y


def _weights(op, x, w1, b1, w2, b2, w_up, b_up, gamma, inner_norm, activation) -> FFNWeights:
    count = len(w1) if isinstance(w1, Sequence) else 0
    w1 = common.per_expert(op, "w1", w1, count)
    if not w1:
        raise ValueError(f"{op}: `w1` must have at least one expert, got {w1!r}")
    b1 = common.per_expert(op, "b1", b1, count)
    gated = activation in GATED
    for name, values in (("w_up", w_up), ("b_up", b_up)):
        if not gated and values is not None:
            raise ValueError(f"{op}: `{name}` must be None with activation={activation!r}, which is not gated")
    w2 = common.per_expert(op, "w2", w2, count)
    _check_matrices(op, {"w1": w1, "w2": w2})
    if gated and w_up is None:
        if b_up is not None:
            raise ValueError(f"{op}: `b_up` needs `w_up`; a stacked `w1` has its bias in `b1`")
        for e, (first, second, bias) in enumerate(zip(w1, w2, b1)):
            hidden, dim = second.shape[1], first.shape[1]
            if first.shape[0] != 2 * hidden:
                raise ValueError(
                    f"{op}: activation={activation!r} is gated: `w_up` must have one [{hidden}, {dim}] per expert, as "
                    f"`w1`, or `w1` be stacked, [{2 * hidden}, {dim}], gate above up; got `w_up` None and `w1[{e}]` "
                    f"{list(first.shape)} with `w2[{e}]` {list(second.shape)}"
                )
            if bias is not None:
                common.check_shape(op, f"b1[{e}]", bias, (2 * hidden,), x)
        (w1, w_up), (b1, b_up) = _halves(w1), _halves(b1)
    norm = (None, None) if inner_norm is None else inner_norm
    fields = FFNWeights(
        w1=w1,
        b1=b1,
        w2=w2,
        b2=common.per_expert(op, "b2", b2, count),
        w_up=common.per_expert(op, "w_up", w_up, count),
        b_up=common.per_expert(op, "b_up", b_up, count),
        gamma=common.per_expert(op, "gamma", gamma, count),
        norm_weight=common.per_expert(op, "inner_norm[0]", norm[0], count),
        norm_bias=common.per_expert(op, "inner_norm[1]", norm[1], count),
    )
    _check_matrices(op, {"w_up": fields.w_up if gated else []})
    hidden, width = fields.w1[0].shape[0], fields.w2[0].shape[0]
    shapes = FFNWeights(
        (hidden, x.shape[1]), (hidden,), (width, hidden), (width,), (hidden, x.shape[1]), (hidden,), (width,),
        (hidden,), (hidden,),
    )  # fmt: skip
    for name, entries, shape in zip(fields._fields, fields, shapes, strict=True):
        for e, t in enumerate(entries):
            if t is not None:
                common.check_shape(op, f"{name}[{e}]", t, shape, x)
    for e in range(count):
        if fields.norm_bias[e] is not None and fields.norm_weight[e] is None:
            raise ValueError(f"{op}: `inner_norm[1][{e}]` needs a weight in `inner_norm[0][{e}]`, got None")
    return fields


def _check_matrices(op: str, fields: dict[str, list]) -> None:
    for name, values in fields.items():
        for e, t in enumerate(values):
            if not isinstance(t, torch.Tensor) or t.dim() != 2:
                given = list(t.shape) if isinstance(t, torch.Tensor) else type(t).__name__
                raise ValueError(f"{op}: `{name}[{e}]` must be a matrix, got {given}")


def _halves(values):
    pairs = [(None, None) if t is None else tuple(t.chunk(2)) for t in values]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _forward(
    x, weights, at, residual, row_scale, offsets, host_offsets, segments, activation, eps, save, impl
):  # fmt: skip
    route = Route.from_flat(offsets, host_offsets, segments)
    y, pre, up = implementation("routed_ffn", impl, x, activation).forward(
        common.contiguous_rows(x), FFNWeights(*common.decode(weights, at, FIELDS)), route, activation, residual,
        row_scale, eps, save,
    )  # fmt: skip
    return y.contiguous(), (common.absent(x) if pre is None else pre), (common.absent(x) if up is None else up)


def _forward_meta(
    x, weights, at, residual, row_scale, offsets, host_offsets, segments, activation, eps, save, impl
):  # fmt: skip
    experts = len(at) // FIELDS
    hidden, width = weights[at[0]].shape[0], weights[at[2 * experts]].shape[0]
    y = x.new_empty(x.shape[0], width, dtype=x.dtype if residual is None else residual.dtype)
    pre = x.new_empty(x.shape[0], hidden) if save else common.absent(x)
    up = x.new_empty(x.shape[0], hidden) if save and activation in GATED else common.absent(x)
    return y, pre, up


def _setup(ctx, inputs, output) -> None:
    x, weights, at, _, row_scale, offsets, host_offsets, segments, activation, eps, save, impl = inputs
    _, pre, up = output
    gated = activation in GATED
    saved = (pre if save else None, up if save and gated else None)
    ctx.save_for_backward(x, *saved, row_scale, offsets, host_offsets, *weights)
    ctx.at, ctx.segments, ctx.activation, ctx.eps, ctx.impl = at, segments, activation, eps, impl
    ctx.mark_non_differentiable(pre, up)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, _pre, _up):
    x, pre, up, row_scale, offsets, host_offsets, *weights = ctx.saved_tensors
    need_dx, need = ctx.needs_input_grad[0], list(ctx.needs_input_grad[1])
    if dy is None:
        return None, [None] * len(need), *[None] * 10
    dx, grads = torch.ops.vlmo_kernels.routed_ffn_backward(
        dy, x, weights, ctx.at, pre, up, row_scale, offsets, host_offsets, ctx.segments, ctx.activation, ctx.eps,
        need_dx, need, ctx.impl,
    )  # fmt: skip
    grads = [common.wanted(g, n) for g, n in zip(grads, need, strict=True)]
    return (common.wanted(dx, need_dx), grads, None, common.wanted(dy, ctx.needs_input_grad[3]), *[None] * 8)


def _backward(
    dy,
    x,
    weights,
    at,
    pre,
    up,
    row_scale,
    offsets,
    host_offsets,
    segments,
    activation,
    eps,
    need_dx,
    need,
    impl,
):
    route = Route.from_flat(offsets, host_offsets, segments)
    dx, grads = implementation("routed_ffn", impl, x, activation).backward(
        dy.contiguous(), common.contiguous_rows(x), FFNWeights(*common.decode(weights, at, FIELDS)), pre, up, route,
        activation, row_scale, eps, need_dx, FFNWeights(*common.flags(need, at, FIELDS)),
    )  # fmt: skip
    return (common.absent(x) if dx is None else dx), common.collect(grads, at, weights)


def _backward_meta(
    dy,
    x,
    weights,
    at,
    pre,
    up,
    row_scale,
    offsets,
    host_offsets,
    segments,
    activation,
    eps,
    need_dx,
    need,
    impl,
):
    grads = [w.new_empty(w.shape if n else 0) for w, n in zip(weights, need, strict=True)]
    return x.new_empty(x.shape if need_dx else 0), grads


common.register("routed_ffn", _forward, _forward_meta, _setup, _autograd)
common.register_backward("routed_ffn_backward", _backward, _backward_meta)
