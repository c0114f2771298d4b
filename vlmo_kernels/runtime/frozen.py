"""Weights packed once for oneDNN, inside an explicit scope."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_packed: ContextVar[dict[int, tuple[torch.Tensor, torch.Tensor]] | None] = ContextVar("packed", default=None)


@contextmanager
def frozen_weights(model: torch.nn.Module) -> Iterator[None]:
    """Promise that no weight of `model` changes inside the scope, so that packing them once is sound.

    Outside of it weights are packed on every call: no property of a tensor says reliably that its
    contents are the same (a sharded Parameter keeps its identity and version while its values change at
    every step).

    Args:
        model: the module whose parameters are frozen.

    Raises:
        TypeError: `model` is no module.

    Example:
        >>> with torch.inference_mode(), frozen_weights(model):  # doctest: +SKIP
        ...     model(batch)
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"frozen_weights: `model` must be a torch.nn.Module, got {type(model).__name__}")
    # The parameters themselves are held, so an id cannot be given to another tensor meanwhile.
    token = _packed.set({id(p): (p, None) for p in model.parameters()})
    try:
        yield
    finally:
        _packed.reset(token)


def packed_weight(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """`weight` `[N, K]` in oneDNN's blocked order for about `rows` rows; from the scope's store if it is in one."""
    store = _packed.get()
    if store is not None and id(weight) in store:
        owner, packed = store[id(weight)]
        if packed is None:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
            store[id(weight)] = (owner, packed)
        return packed
    return weight
