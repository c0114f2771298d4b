"""Checks, autocast and list encoding shared by the ops."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from vlmo_kernels.layout import ModalityLayout

Optional = torch.Tensor | None
Weights = Sequence[Optional] | None


def encode(fields: Sequence[Sequence[Optional]]) -> tuple[list[torch.Tensor], list[int]]:
    """Lists with gaps as one list without, and where each entry went (-1: none).

    Op schemas have no list of optional tensors that keeps gradients (a None in `Tensor?[]` loses them).
    """
    tensors: list[torch.Tensor] = []
    at: list[int] = []
    for entries in fields:
        for t in entries:
            at.append(-1 if t is None else len(tensors))
            if t is not None:
                tensors.append(t)
    return tensors, at


def decode(values: Sequence, at: Sequence[int], fields: int) -> list[list]:
    """The inverse of `encode`, for tensors, flags or gradients."""
    experts = len(at) // fields
    flat = [None if i < 0 else values[i] for i in at]
    return [flat[f * experts : (f + 1) * experts] for f in range(fields)]


def flags(values: Sequence[bool], at: Sequence[int], fields: int) -> list[list[bool]]:
    """Like `decode`, with False in the gaps."""
    return [[bool(v) for v in field] for field in decode(values, at, fields)]


def collect(grads: Sequence[Sequence[Optional]], at: Sequence[int], like: Sequence[torch.Tensor]):
    """Gradients in the order of the encoded list; an empty tensor stands for one nobody wants."""
    result: list[Optional] = [None] * len(like)
    for t, i in zip((g for field in grads for g in field), at, strict=True):
        if i >= 0:
            result[i] = None if t is None else t.contiguous()  # as the fakes say, whatever the weight's strides
    return [absent(t) if g is None else g for g, t in zip(result, like, strict=True)]


def absent(like: torch.Tensor) -> torch.Tensor:
    """What an op returns for an output that was not asked for."""
    return like.new_empty(0)


def wanted(grad: torch.Tensor, need: bool) -> Optional:
    return grad if need else None


def per_expert(op: str, name: str, values: Weights, count: int) -> list[Optional]:
    """One entry per expert from a list, or from None."""
    if values is None:
        return [None] * count
    if isinstance(values, torch.Tensor) or not isinstance(values, Sequence):
        raise TypeError(
            f"{op}: `{name}` must be a list with one tensor per expert, got {type(values).__name__}"
        )
    if len(values) != count:
        raise ValueError(f"{op}: `{name}` must have {count} entries, one per expert, got {len(values)}")
    return list(values)


def check_rows(op: str, name: str, x: torch.Tensor, layout: ModalityLayout, dims: int = 2) -> None:
    """`x` must be a floating packed buffer of the layout."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: `{name}` must be a tensor, got {type(x).__name__}")
    if not isinstance(layout, ModalityLayout):
        raise TypeError(f"{op}: `layout` must be a ModalityLayout, got {type(layout).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: `{name}` must be floating point, got {x.dtype}")
    if x.dim() != dims or x.shape[0] != layout.tokens:
        shape = f"[{layout.tokens}" + ", ..." * (dims > 1) + f"] with {dims} dimensions"
        raise ValueError(f"{op}: `{name}` must be {shape}, got {list(x.shape)}")
    if x.device != layout.device:
        raise ValueError(
            f"{op}: `{name}` must be on the layout's device {layout.device}, got {x.device}. "
            "Hint: layout.to(x.device)"
        )


def check_shape(op: str, name: str, t: torch.Tensor, shape: Sequence[int], like: torch.Tensor) -> None:
    """`t` must have this shape and lie on the device of `like`."""
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{op}: `{name}` must be a tensor, got {type(t).__name__}")
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{op}: `{name}` must be {list(shape)}, got {list(t.shape)}")
    if t.device != like.device:
        raise ValueError(f"{op}: `{name}` must be on {like.device}, got {t.device}")


def check_dtype(op: str, name: str, t: torch.Tensor, dtype: torch.dtype) -> None:
    if t.dtype != dtype:
        raise ValueError(
            f"{op}: `{name}` must have the dtype of `x`, {dtype}, got {t.dtype}. Hint: cast one, or use autocast"
        )


def check_number(op: str, name: str, value: float) -> float:
    """`value` must be a number of Python: that of a tensor would have to be waited for."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: `{name}` must be a number, got {type(value).__name__}. Hint: float(...)")
    return float(value)


def check_eps(op: str, eps: float) -> float:
    """What a norm adds to the variance."""
    eps = check_number(op, "eps", eps)
    if not eps >= 0:
        raise ValueError(f"{op}: `eps` must be zero or more, got {eps}")
    return eps


def check_epilogue(op: str, x: torch.Tensor, width: int, residual: Optional, row_scale: Optional) -> None:
    """The residual `[T, width]` and the row scale `[T]` of a fused epilogue."""
    if residual is not None:
        check_shape(op, "residual", residual, (x.shape[0], width), x)
        if not residual.is_floating_point():
            raise TypeError(f"{op}: `residual` must be floating point, got {residual.dtype}")
    if row_scale is not None:
        check_shape(op, "row_scale", row_scale, (x.shape[0],), x)
        if not row_scale.is_floating_point():
            raise TypeError(f"{op}: `row_scale` must be floating point, got {row_scale.dtype}")
        if row_scale.requires_grad:
            raise NotImplementedError(f"{op}: `row_scale` has no gradient (it is a random mask); detach it")


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Autocast's dtype where it is on for the device of `x`, else the dtype of `x`."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def cast(values: Sequence[Optional], dtype: torch.dtype) -> list[Optional]:
    """In the compute dtype: weights under autocast, biases and inner norms at all times."""
    return [None if t is None else t.to(dtype) for t in values]


def contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    """Kernels read rows with any stride, but each row in one piece."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _outside_autocast(compute):
    """What an op computes, with autocast off: the op has cast what it takes, and the rest is fp32 on purpose."""

    @functools.wraps(compute)
    def run(x: torch.Tensor, *args):
        if not torch.is_autocast_enabled(x.device.type):
            return compute(x, *args)
        with torch.autocast(x.device.type, enabled=False):
            return compute(x, *args)

    return run


def register(name: str, forward, meta, setup, autograd) -> None:
    """Give a defined op its implementation, fake and derivative."""
    qualified = f"vlmo_kernels::{name}"
    torch.library.impl(qualified, "CompositeExplicitAutograd")(_outside_autocast(forward))
    torch.library.register_fake(qualified)(meta)
    torch.library.register_autograd(qualified, autograd, setup_context=setup)


def register_backward(name: str, backward, meta) -> None:
    """Give a defined backward op its implementation and fake, and a derivative that raises."""
    register(name, backward, meta, lambda ctx, inputs, output: None, _no_double_backward(name))


def _no_double_backward(name: str):
    def backward(ctx, *grads):
        op = name.removesuffix("_backward").removesuffix("_packed")
        raise NotImplementedError(f"{op}: double backward is not implemented")

    return backward
