"""Whether a device can be used, and when the values of a tensor may be looked at."""

from __future__ import annotations

import os

import torch


def checks_on_device(t: torch.Tensor) -> bool:
    """Whether values may be looked at: always on the host, on a device only with VLMO_KERNELS_CHECK=1."""
    if torch.compiler.is_compiling():
        return False
    return t.device.type == "cpu" or os.environ.get("VLMO_KERNELS_CHECK") == "1"


def usable_device(caller: str, device: torch.device | str | int) -> torch.device:
    """The device of that name, if this torch and this machine have it.

    Raises:
        TypeError: no name of a device.
        ValueError: torch knows no such device.
        RuntimeError: it is not here.
    """
    if isinstance(device, bool) or not isinstance(device, (torch.device, str, int)):
        raise TypeError(f'{caller}: `device` must be a torch.device or its name, got {device!r}. Hint: "cpu" or "cuda"')
    try:
        found = torch.device(device)
    except RuntimeError:
        if isinstance(device, str):
            raise ValueError(
                f'{caller}: `device` must be one that torch knows, got {device!r}. Hint: "cpu" or "cuda"'
            ) from None
        found = torch.device("cuda", device)  # a bare number, where there is no accelerator to number
    if found.type in ("cpu", "meta") or torch.compiler.is_compiling():
        return found
    try:
        torch.empty(0, device=found)
    except (AssertionError, RuntimeError):  # the kind depends on how torch was built
        raise RuntimeError(
            f"{caller}: `device` must be one that this torch can use here, got '{found}'. "
            "Hint: vlmo-kernels info lists the GPUs; a CPU build of torch has none"
        ) from None
    return found
