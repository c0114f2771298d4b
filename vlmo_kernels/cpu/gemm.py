"""Dense layers on a row range, through the oneDNN linear that torch exposes to its own compiler."""

from __future__ import annotations

import torch

from vlmo_kernels.runtime.frozen import packed_weight

Optional = torch.Tensor | None
DTYPES = (torch.float32, torch.bfloat16)

# activation -> (name, algorithm) of oneDNN's epilogue
_FUSED = {
    "none": ("none", None),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", None),
    "silu": ("swish", None),
}


def available() -> bool:
    """Whether this torch has the oneDNN linear with fused epilogues."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def why_not(request) -> str | None:
    """Why the oneDNN path cannot take a call, or None."""
    if not available():
        return "this torch was built without oneDNN"
    if request.dtype not in DTYPES:
        return f"oneDNN GEMMs here take fp32 and bf16, got {request.dtype}"
    if request.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bf16 instructions"
    return None


def dense(x: torch.Tensor, weight: torch.Tensor, bias: Optional, activation: str = "none") -> torch.Tensor:
    """`act(x @ weight.T + bias)`, `[R, K]` times `[N, K]`, the activation in the GEMM's fp32 epilogue."""
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    name, algorithm = _FUSED[activation]
    return torch.ops.mkldnn._linear_pointwise(x, packed_weight(weight, x.shape[0]), bias, name, [], algorithm)


def add_dense(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: Optional) -> torch.Tensor:
    """`residual + x @ weight.T + bias`, the sum in the GEMM's epilogue."""
    return torch.ops.mkldnn._linear_pointwise.binary(
        x, residual, packed_weight(weight, x.shape[0]), bias, "add"
    )
