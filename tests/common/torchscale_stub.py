"""torchscale without timm, of which it needs `drop_path` alone and which needs torchvision."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import torch


def install() -> None:
    """Put stand-ins for `timm.models.layers` where timm is not installed."""
    if "timm" in sys.modules or importlib.util.find_spec("timm") is not None:
        return
    for name in ("timm", "timm.models", "timm.models.layers"):
        sys.modules[name] = ModuleType(name)
    sys.modules["timm"].models = sys.modules["timm.models"]
    sys.modules["timm.models"].layers = sys.modules["timm.models.layers"]
    sys.modules["timm.models.layers"].drop_path = drop_path


def drop_path(x: torch.Tensor, drop_prob: float = 0.0, training: bool = False) -> torch.Tensor:
    """Stochastic depth per sample (Huang et al. 2016), as timm has it."""
    if not drop_prob or not training:
        return x
    keep = 1.0 - float(drop_prob)
    mask = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep)
    return x * (mask / keep if keep > 0.0 else mask)
