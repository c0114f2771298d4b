"""Allocations that show what a kernel writes: poison inside, a red zone on either side."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

MARGIN = 512  # elements on either side, enough for a tile that runs over an edge


@contextlib.contextmanager
def red_zones() -> Iterator[None]:
    """Within, `new_empty`, `torch.empty` and `torch.empty_like` return poisoned memory between red zones.

    Memory is poisoned with NaN (integers: their largest value), so that a result nobody wrote is noticed.
    On leaving, every red zone must be as it was.
    """
    zones: list[torch.Tensor] = []
    original = torch.Tensor.new_empty, torch.empty, torch.empty_like

    def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = torch.Size(shape).numel()
        poison = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max
        zone = torch.full((size + 2 * MARGIN,), poison, dtype=dtype)
        zones.append(zone)
        return zone[MARGIN : MARGIN + size].view(shape)

    def new_empty(self: torch.Tensor, *shape, dtype: torch.dtype | None = None, device=None) -> torch.Tensor:
        if device is not None:  # the interpreter's own bookkeeping
            return original[0](self, *shape, dtype=dtype, device=device)
        return guarded(_flat(shape), dtype or self.dtype)

    def empty(*shape, dtype: torch.dtype | None = None, device=None) -> torch.Tensor:
        return guarded(_flat(shape), dtype or torch.get_default_dtype())

    def empty_like(like: torch.Tensor, *, dtype: torch.dtype | None = None, **_) -> torch.Tensor:
        return guarded(tuple(like.shape), dtype or like.dtype)

    torch.Tensor.new_empty, torch.empty, torch.empty_like = new_empty, empty, empty_like
    try:
        yield
    finally:
        torch.Tensor.new_empty, torch.empty, torch.empty_like = original
    for zone in zones:
        for side in (zone[:MARGIN], zone[-MARGIN:]):
            intact = side.isnan() if side.is_floating_point() else side == torch.iinfo(side.dtype).max
            assert intact.all(), f"written outside an allocation of {zone.numel() - 2 * MARGIN} elements"


def _flat(shape: tuple) -> tuple[int, ...]:
    return tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
