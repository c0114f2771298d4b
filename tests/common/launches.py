"""What Triton launches are made of, seen from the interpreter."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import GridExecutor


def record_launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """A list that grows by (kernel, grid, numbers, constants) at every launch from now on.

    Two batches of one capacity must make the same ones, or a captured graph and compiled code could not serve both.
    """
    launches: list[tuple] = []
    original = GridExecutor.__call__

    def record(executor, *args, **kwargs):
        numbers = [a for a in args if isinstance(a, int | float | bool)]
        constants = {k: v for k, v in kwargs.items() if not isinstance(v, torch.Tensor)}
        launches.append((executor.fn.__name__, executor.grid, numbers, constants))
        with _disable_current_modes():  # the interpreter's own copies are none of a caller's ops
            return original(executor, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", record)
    return launches
