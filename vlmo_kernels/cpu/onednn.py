"""Dense layers through the oneDNN linear that torch exposes to its own compiler, and torch's products."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from vlmo_kernels.runtime import compiled
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


def why_not(dtype: torch.dtype) -> str | None:
    """Why it cannot take operands of `dtype`, or None."""
    if not available():
        return "this torch was built without oneDNN"
    if dtype not in DTYPES:
        return f"oneDNN GEMMs here take fp32 and bf16, got {dtype}"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bf16 instructions"
    return None


@cache
def sums_as_exactly() -> bool:
    """Whether fp32 products of oneDNN are as exact here as those of the library that torch itself takes.

    On AMD they are not: oneDNN adds up all of K in one chain and errs 2.2 times as much at K = 3072.
    """
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(32, 3072, generator=generator, dtype=torch.float32, device="cpu") for _ in range(2))
    right, plain = x.double() @ w.double().T, F.linear(x, w)
    found = torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], None)
    return bool((found - right).square().mean() <= 1.25**2 * (plain - right).square().mean())


def _taken(dtype: torch.dtype) -> bool:
    return dtype != torch.float32 or sums_as_exactly()


def prepare(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """`weight` `[N, K]` in the order that `forward_into` reads, for products of about `rows` rows."""
    if not _taken(weight.dtype):
        return weight

    def pack() -> torch.Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)

    packed = packed_weight(weight, "onednn", pack)
    return weight if packed is None else packed  # oneDNN packs on its own


def forward_into(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional,
    activation: str = "none",
    pre: Optional = None,
    gamma: Optional = None,
    residual: Optional = None,
    row_scale: Optional = None,
) -> None:
    """`out = residual + row_scale * gamma * act(x @ weight.T + bias)`; `pre` receives the sum under `act`.

    Args:
        out, pre, residual: `[R, N]`; x: `[R, K]`; weight: `[N, K]`, prepared; bias, gamma: `[N]`; row_scale: `[R]`.
    """
    if gamma is None and row_scale is None:
        if pre is not None:
            pre.copy_(_linear(x, weight, bias))
            out.copy_(activate(activation, pre))
        elif residual is None:
            out.copy_(_linear(x, weight, bias, activation))
        elif residual.dtype == x.dtype and _taken(x.dtype):
            out.copy_(_add_linear(residual, x, weight, bias))
        else:
            torch.add(residual, _linear(x, weight, bias), out=out)
        return
    y = _linear(x, weight, bias, activation)
    scale = gamma
    if row_scale is not None:
        scale = row_scale[:, None] if gamma is None else row_scale[:, None] * gamma
    if residual is None:
        out.copy_(y * scale)
    elif residual.dtype == y.dtype == scale.dtype:
        torch.addcmul(residual, y, scale, out=out)
    else:
        # Mixed dtypes go through fp32: a factor rounded to 16 bits first would cost accuracy.
        out.copy_(torch.addcmul(residual.float(), y.float(), scale.float()))


def input_grad_into(dx: torch.Tensor, g: torch.Tensor, weight: torch.Tensor, gamma: Optional = None) -> None:
    """`dx = (gamma * g) @ weight`: `[R, K]` from `[R, N]` and `[N, K]`."""
    torch.mm(g if gamma is None else (g * gamma).to(g.dtype), weight, out=dx)


def activation_grad(
    g: torch.Tensor, weight: torch.Tensor, gamma: Optional, activation: str, pre: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`dpre = ((gamma * g) @ weight) * act'(pre)`, `act(pre)`, and the fp32 column sums of `dpre`."""
    dh = torch.mm(g if gamma is None else (g * gamma).to(g.dtype), weight)
    dpre = activation_backward(activation, dh, pre)
    return dpre, activate(activation, pre), column_sums(dpre)


def weight_grads(
    g: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, gamma: Optional, need_dw: bool, need_dots: bool
) -> tuple[Optional, Optional]:
    """`dw = gamma * U` and the fp32 row sums of `weight * U`, with `U = g.T @ x`; None where not needed."""
    if not (need_dw or need_dots):
        return None, None
    if why_not(x.dtype) is not None:  # no instructions for these 16 bits: torch would be many times slower
        g, x = g.float(), x.float()
    unscaled = g.T @ x
    dw = (unscaled if gamma is None else unscaled * gamma[:, None]).to(weight.dtype)
    dots = (weight.float() * unscaled.float()).sum(1) if need_dots else None
    return (dw if need_dw else None), dots


def column_sums(x: torch.Tensor) -> torch.Tensor:
    """fp32 sums over the rows. Torch's sum of 16-bit rows into fp32 makes an fp32 copy of them first."""
    ops = compiled.cpu_ops()
    return x.sum(0, dtype=torch.float32) if ops is None else ops.column_sums(x)


def activate(kind: str, z: torch.Tensor) -> torch.Tensor:
    """A plain activation."""
    if kind.startswith("gelu"):
        return F.gelu(z, approximate="tanh" if kind == "gelu_tanh" else "none")
    if kind == "none":
        return z
    return F.relu(z) if kind == "relu" else F.silu(z)


def activation_backward(kind: str, dh: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """The gradient of a plain activation's input."""
    if kind.startswith("gelu"):
        return torch.ops.aten.gelu_backward(dh, z, approximate="tanh" if kind == "gelu_tanh" else "none")
    if kind == "relu":
        return torch.ops.aten.threshold_backward(dh, z, 0)
    return torch.ops.aten.silu_backward(dh, z)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: Optional, activation: str = "none") -> torch.Tensor:
    if not _taken(x.dtype):
        return activate(activation, F.linear(x, weight, _like(bias, x)))
    name, algorithm = _FUSED[activation]
    return torch.ops.mkldnn._linear_pointwise(x, weight, _like(bias, x), name, [], algorithm)


def _add_linear(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: Optional) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, _like(bias, x), "add")


def _like(bias: Optional, x: torch.Tensor) -> Optional:
    return None if bias is None else bias.to(x.dtype)
