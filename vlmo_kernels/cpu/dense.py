"""Dense layers by the compiled kernels (csrc): everything around a product is done on tiles that are in the cache.

The functions are those of `onednn`, which says what they compute.
"""

from __future__ import annotations

import torch

from vlmo_kernels.runtime import compiled
from vlmo_kernels.runtime.frozen import packed_weight

from .onednn import column_sums

__all__ = ["activation_grad", "column_sums", "forward_into", "input_grad_into", "prepare", "weight_grads", "why_not"]
Optional = torch.Tensor | None
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu", "silu")  # the order of csrc/include/vlmo_kernels/dense.h
INSTRUCTIONS = ("AVX2", "AVX-512", "AVX-512 BF16")


def why_not() -> str | None:
    """Why these kernels are not used here, or None."""
    if compiled.cpu_ops() is None:
        return compiled.why_not("vlmo_kernels_cpu")
    found = compiled.instructions()
    return None if found in INSTRUCTIONS else f"not faster with {found} instructions"


def prepare(weight: torch.Tensor, rows: int) -> torch.Tensor:
    return _panels(weight, False)


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
    if out.dtype not in DTYPES:  # an fp64 residual: the branch in fp32, the sum in its own dtype
        branch = out.new_empty(out.shape, dtype=torch.float32)
        forward_into(branch, x, weight, bias, activation, pre, gamma, None, row_scale)
        torch.add(residual, branch, out=out)
        return
    compiled.cpu_ops().dense(
        _rows(x), weight, _wide(bias), ACTIVATIONS.index(activation), _wide(gamma), _wide(row_scale),
        _rows(residual), pre, out,
    )  # fmt: skip


def input_grad_into(dx: torch.Tensor, g: torch.Tensor, weight: torch.Tensor, gamma: Optional = None) -> None:
    ops = compiled.cpu_ops()
    ops.dense_backward(_rows(g), _wide(gamma), _panels(weight, True), 0, None, None, False, dx)


def activation_grad(
    g: torch.Tensor, weight: torch.Tensor, gamma: Optional, activation: str, pre: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dpre, hidden = (pre.new_empty(pre.shape) for _ in range(2))
    sums = compiled.cpu_ops().dense_backward(
        _rows(g), _wide(gamma), _panels(weight, True), ACTIVATIONS.index(activation), pre, hidden, True, dpre
    )
    return dpre, hidden, sums


def weight_grads(
    g: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, gamma: Optional, need_dw: bool, need_dots: bool
) -> tuple[Optional, Optional]:
    if not (need_dw or need_dots):
        return None, None
    dw = x.new_empty(weight.shape)
    dots = compiled.cpu_ops().weight_grad(
        _rows(g), _rows(x), _wide(gamma), _rows(weight).to(x.dtype) if need_dots else None, dw
    )
    return (dw.to(weight.dtype) if need_dw else None), (dots if need_dots else None)


def _panels(weight: torch.Tensor, swapped: bool) -> torch.Tensor:
    """The weight in the order the kernels read: of `x @ weight.T`, or with `swapped` of `x @ weight`."""

    def pack() -> torch.Tensor:
        return compiled.cpu_ops().pack_weight(_rows(weight.detach()), swapped)

    packed = packed_weight(weight, f"panels {swapped} {compiled.instructions()}", pack)
    return pack() if packed is None else packed


def _rows(t: Optional) -> Optional:
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def _wide(t: Optional) -> Optional:
    return None if t is None else t.float().contiguous()
