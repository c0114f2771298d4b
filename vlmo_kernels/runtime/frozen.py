"""Weights packed once for the CPU's GEMMs, inside an explicit scope."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_packed: ContextVar[dict[int, tuple[torch.Tensor, dict[str, torch.Tensor]]] | None] = ContextVar("packed", default=None)


@contextmanager
def frozen_weights(model: torch.nn.Module) -> Iterator[None]:
    """Promise that no weight of `model` changes inside the scope, so that packing them once is sound.

    Outside of it weights are packed on every call: no property of a tensor says reliably that its
    contents are the same (a sharded Parameter keeps its identity and version while its values change at
    every step).

    Under autocast there is nothing to keep: the GEMMs see a fresh cast of each weight, not the weight.

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
    token = _packed.set({id(p): (p, {}) for p in model.parameters()})
    try:
        yield
    finally:
        _packed.reset(token)


def packed_weight(weight: torch.Tensor, order: str, pack: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    """What `pack` makes of `weight` for its first call in this scope; None where the weight is not frozen.

    Args:
        weight: the parameter itself.
        order: names the order it is packed in.
        pack: packs it.
    """
    store = _packed.get()
    if store is None or id(weight) not in store:
        return None
    packed = store[id(weight)][1]
    if order not in packed:
        packed[order] = pack()
    return packed[order]
