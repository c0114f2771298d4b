"""From the host to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def move(t: Tensor, device: torch.device | str) -> Tensor:
    """To a device; from the host to a GPU through pinned memory, so that the host does not wait for what is queued."""
    if torch.device(device).type != "cuda" or t.device.type != "cpu":
        return t.to(device)
    return t.pin_memory().to(device, non_blocking=True)
