"""Activations of the feed-forward network and their derivatives, in plain torch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}


def activate(kind: str, z: torch.Tensor) -> torch.Tensor:
    """Plain activation `kind` of `z`, any shape. GELU: Hendrycks and Gimpel 2016, exact (erf) or tanh."""
    if kind == "gelu":
        return F.gelu(z)
    if kind == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if kind == "relu":
        return F.relu(z)
    return F.silu(z)


def derivative(kind: str, z: torch.Tensor) -> torch.Tensor:
    """Derivative of `activate(kind, z)` with respect to `z`."""
    if kind == "gelu":
        density = torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
        return 0.5 * (1.0 + torch.erf(z / math.sqrt(2.0))) + z * density
    if kind == "gelu_tanh":
        scale = math.sqrt(2.0 / math.pi)
        t = torch.tanh(scale * (z + 0.044715 * z**3))
        return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * scale * (1.0 + 3.0 * 0.044715 * z * z)
    if kind == "relu":
        return (z > 0).to(z.dtype)
    s = torch.sigmoid(z)
    return s * (1.0 + z * (1.0 - s))
