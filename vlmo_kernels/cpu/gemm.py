"""Dense layers on a row range: which of two implementations computes them, `dense` (compiled) or `onednn`."""

from __future__ import annotations

from types import ModuleType

import torch

from vlmo_kernels.runtime import compiled

from . import dense, onednn


def backend() -> ModuleType:
    """The module whose functions run. With AMX tiles, and without vector instructions, oneDNN is ahead."""
    return dense if dense.why_not() is None else onednn


def why_not(request) -> str | None:
    """Why neither can take a call, or None."""
    if dense.why_not() is None:
        known = dense.DTYPES
        return None if request.dtype in known else f"takes fp32, bf16 and fp16, got {request.dtype}"
    return onednn.why_not(request.dtype)


def how(request) -> str:
    """What runs, for `explain`."""
    why = dense.why_not()
    if why is None:
        return f"compiled kernels ({compiled.instructions()})"
    inexact = request.dtype == torch.float32 and not onednn.sums_as_exactly()
    return f"{'torch, for oneDNN is less exact here' if inexact else 'oneDNN'}; compiled kernels: {why}"


def scaled(dy: torch.Tensor, row_scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The gradient of a branch: `row_scale * dy`, in the compute dtype."""
    return (dy if row_scale is None else dy * row_scale[:, None]).to(dtype)


def finish(
    grads: list[torch.Tensor | None], like: list[torch.Tensor | None], need: list[bool]
) -> list[torch.Tensor | None]:
    """Gradients in the dtype of their weights; zeros for an expert without rows."""
    return [
        None if not wanted else torch.zeros_like(t) if g is None else g.to(t.dtype)
        for g, t, wanted in zip(grads, like, need, strict=True)
    ]


def add(totals: list[torch.Tensor | None], expert: int, part: torch.Tensor | None) -> None:
    """Add a range's gradient to its expert's."""
    total = totals[expert]
    totals[expert] = part if total is None or part is None else total + part
