"""What every reference shares: the working precision, and zero gradients for experts without rows."""

from __future__ import annotations

import torch


def working(dtype: torch.dtype) -> torch.dtype:
    """The larger of fp32 and `dtype`: sums are never kept in 16 bits, and fp64 stays fp64."""
    return torch.promote_types(dtype, torch.float32)


def zeros_where(wanted: list[bool], like: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """A zero gradient for every wanted entry, None for the rest."""
    return [
        torch.zeros_like(t, memory_format=torch.contiguous_format) if want and t is not None else None
        for want, t in zip(wanted, like, strict=True)
    ]
