"""When the values of a tensor may be looked at."""

from __future__ import annotations

import os

import torch


def checks_on_device(t: torch.Tensor) -> bool:
    """Whether values may be looked at: always on the host, on a device only with VLMO_KERNELS_CHECK=1."""
    if torch.compiler.is_compiling():
        return False
    return t.device.type == "cpu" or os.environ.get("VLMO_KERNELS_CHECK") == "1"
